"""The files of the score program, and its entry in the manifest. Rank 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from dist_export.archive.lookup_operator import list_lookups, unbind
from dist_export.archive.pt2 import pack_program
from dist_export.archive.safe_load import check_archive
from dist_export.dense.eager import DenseSample
from dist_export.errors import DistExportError
from dist_export.manifest import SCORE_FOLDER, ScoreEntry, TensorEntry
from dist_export.model.user_errors import said
from dist_export.package.score_sample import SAMPLE, write_sample
from dist_export.score.table_weight import NotExportableError
from dist_export.score.trace import TracedScores, describe_shapes

PROGRAM = "exported_model.pt"


def pack_scores(traced: TracedScores, *, archive_format: Literal["pt2", "legacy"]) -> bytes:
    """Return the bytes of the program, with the plain names of tables. NotExportableError if they cannot be written."""
    tables = list_tables(traced)
    unbind(traced.program.graph_module)
    try:
        packed = pack_program(traced.program, archive_format=archive_format)
        check_archive(packed, tables=tables)
    except DistExportError as error:
        told = str(error).split(": ", 1)[-1].split("; not loaded")[0]
        raise NotExportableError(f"the program cannot be written: {told}") from error
    except Exception as error:
        raise NotExportableError(f"torch.export.save cannot write the program: {said(error)}") from error
    return packed


def list_tables(traced: TracedScores) -> tuple[str, ...]:
    """Return the tables that a program looks rows up in, sorted."""
    return tuple(sorted({table for _, table in list_lookups(traced.program.graph_module)}))


def describe_scores(
    traced: TracedScores, sample: DenseSample, row_modules: Mapping[str, str], first_sizes: Mapping[str, str]
) -> ScoreEntry:
    """Return the manifest's entry, still without parity. ``first_sizes`` are as ``describe_shapes`` takes them."""
    inputs, outputs, conditions = describe_shapes(traced, first_sizes)
    return ScoreEntry(
        program=f"{SCORE_FOLDER}/{PROGRAM}",
        sample=f"{SCORE_FOLDER}/{SAMPLE}",
        inputs=tuple(
            TensorEntry(name=name, dtype=_dtype(tensor), shape=inputs[name]) for name, tensor in traced.inputs.items()
        ),
        outputs=tuple(
            TensorEntry(name=name, dtype=_dtype(tensor), shape=shape)
            for name, tensor, shape in zip(sample.output_names, sample.outputs, outputs, strict=True)
        ),
        dropped_inputs=traced.dropped,
        conditions=conditions,
        tables=list_tables(traced),
        row_modules=dict(sorted(row_modules.items())),
        torch=str(torch.__version__),
    )


def write_score_folder(
    scratch: Path, entry: ScoreEntry, packed: bytes, inputs: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor]
) -> None:
    """Write the program and the sample into the folder of the score program."""
    folder = scratch / SCORE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROGRAM).write_bytes(packed)
    (folder / SAMPLE).write_bytes(write_sample(entry, inputs, outputs))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
