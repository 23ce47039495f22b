"""The traced program as bytes, and one line where torch cannot write it. Rank 0."""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch.export import ExportedProgram

from dist_export.archive.legacy import has_dtype
from dist_export.archive.pt2 import pack_program
from dist_export.archive.safe_load import check_archive
from dist_export.dense.eager import DenseSample
from dist_export.errors import ConfigError, DistExportError, PackageError, TraceError
from dist_export.model.user_errors import blame_text, said


def check_dtypes(sample: DenseSample, archive_format: str) -> None:
    """Refuse inputs, outputs and values that the archive format has no dtype for. Rank 0, before anything is written.

    What has such a dtype only within forward is found when the program is packed.

    Raises:
        ConfigError: it names the first.
    """
    if archive_format != "legacy":
        return
    found = [(f"input {name!r}", tensor) for name, tensor in sample.inputs.items()]
    found += [(f"output {name!r}", tensor) for name, tensor in zip(sample.output_names, sample.outputs, strict=True)]
    arch = sample.dense_arch
    found += [(name, tensor) for name, tensor in (*arch.named_parameters(), *arch.named_buffers())]
    for name, tensor in found:
        if not has_dtype(tensor.dtype):
            raise ConfigError(
                f"archive_format is 'legacy', which has no {str(tensor.dtype).removeprefix('torch.')}, the dtype of the dense "
                f"arch's {name}. Use archive_format: pt2, or another dtype"
            )


def pack_traced(program: ExportedProgram, *, archive_format: Literal["pt2", "legacy"]) -> bytes:
    """Return the bytes of ``exported_model.pt``, which passes the look that servers take at it.

    Raises:
        TraceError: torch cannot write the program, or what it wrote has something in it that the look refuses. Its own
            error is kept as the cause.
        ConfigError: as :func:`~dist_export.archive.pt2.pack_program`.
    """
    try:
        packed = pack_program(program, archive_format=archive_format)
    except DistExportError:
        raise
    except Exception as error:
        raise TraceError(
            f"the dense arch was traced, but torch.export.save cannot write the program: {_why(program, error)}. Write this "
            "part of forward with other operators"
        ) from error
    try:
        check_archive(packed)
    except PackageError as error:
        told = str(error).split(": ", 1)[-1].split("; ")[0]
        advice = "Write this part of forward with other operators"
        if "custom object" in told:
            advice = "Let the module hold a plain tensor there, no object of a class of its own"
        raise TraceError(
            f"the dense arch was traced, but no server would load the program: {told}. {advice}"
        ) from error
    return packed


def _why(program: ExportedProgram, error: Exception) -> str:
    """Return the operator that cannot be written and the user's line where it is called, else what torch says."""
    found = re.match(r"Failed serializing node (\S+) in graph", str(error))
    for module in program.graph_module.modules() if found else ():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if found and node.name == found[1]:
                cause = error.__cause__ or error.__context__
                told = f" ({said(cause)})" if cause is not None else ""
                return f"it has no form for {node.target}{told}{blame_text(node.meta.get('stack_trace') or '')}"
    return said(error)
