"""The files of the dense folder, as the RTP serving family reads them. Rank 0."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch.export import ExportedProgram

from dist_export.archive.fx_folder import GRAPH, graph_text, write_fx_folder
from dist_export.archive.safe_load import load_program
from dist_export.dense.eager import DenseSample
from dist_export.dense.pack import pack_traced
from dist_export.dense.trace import TracedDense, output_shapes
from dist_export.manifest import BLOCKS, DEFAULT_ROWS, OUTPUTS, SAMPLE_ROWS, DenseEntry, TensorEntry
from dist_export.storage.local_io import naming

PROGRAM = "exported_model.pt"

MAX_SAMPLE_IDS = 4096
"""Of a table, that the package keeps for a later look."""


def write_dense_folder(
    folder: Path,
    sample: DenseSample,
    traced: TracedDense,
    *,
    export_model_name: str,
    archive_format: Literal["pt2", "legacy"],
    mc_conf: Mapping[str, Any] | None,
    looked_up: Mapping[str, Mapping[int, str | None]],
    default_rows: Mapping[str, str] | None = None,
) -> ExportedProgram:
    """Write all files of the dense arch into ``folder``, a local directory. Returns the program that its file holds.

    Args:
        looked_up: what the sample found in the tables, as :class:`~dist_export.dense.sample_rows.SampleRows` holds it.
        default_rows: by table, a hash like those of the row that ids without a row have; None without tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {name: tensor.cpu() for name, tensor in traced.inputs.items()}
    outputs = [tensor.detach().cpu() for tensor in sample.outputs]
    _write(folder / PROGRAM, pack_traced(traced.program, archive_format=archive_format))
    # an archive may give the parts of a graph other names: whoever makes code of the written program gets this very text
    served = load_program(folder / PROGRAM)
    write_fx_folder(served, folder / export_model_name, export_model_name)
    _write(folder / GRAPH, graph_text(served).encode())
    nodes = [
        {"OutputNodeName": name, "dtype": str(tensor.dtype), "shape": list(tensor.shape)}
        for name, tensor in zip(sample.output_names, outputs, strict=True)
    ]
    _write_json(folder / "output_info.json", {"OutputNodes": nodes})
    _write_json(folder / "params_order.json", list(inputs))
    blocks = sample.blocks
    _write_json(
        folder / BLOCKS, {"input_order": list(blocks.tensors), "constants": dict(sorted(blocks.constants.items()))}
    )
    lite = _describe_all(inputs)
    _write_json(folder / "inputs_dict_lite.json", lite)
    _write_json(folder / "inputs_dict.json", _with_values(lite, inputs))
    by_name = dict(zip(sample.output_names, outputs, strict=True))
    _write_json(folder / OUTPUTS, _with_values(_describe_all(by_name), by_name))
    _write(folder / "inputs_dict.pkl", _pickled(inputs))
    base = outputs[0] if sample.is_single else tuple(outputs)
    _write(folder / "output_base.pkl", _pickled(base))
    _write_json(folder / "input_columns.json", dict(mc_conf or {}))
    kept = {
        table: [{"id": number, "row": rows[number]} for number in sorted(rows)[:MAX_SAMPLE_IDS]]
        for table, rows in sorted(looked_up.items())
    }
    _write_json(folder / SAMPLE_ROWS, kept)
    _write_json(folder / DEFAULT_ROWS, dict(sorted((default_rows or {}).items())))
    return served


def describe_dense(
    sample: DenseSample,
    traced: TracedDense,
    *,
    folder_name: str,
    archive_format: str,
    max_batch_size: int,
    dynamic_dims: Mapping[str, Mapping[int, str]],
) -> DenseEntry:
    """Return the manifest's entry: names, dtypes, and shapes with the free dimensions by name."""
    shapes = output_shapes(traced, dynamic_dims)
    return DenseEntry(
        folder=folder_name,
        program=f"{folder_name}/{PROGRAM}",
        archive_format=archive_format,
        inputs=describe_inputs(traced.inputs, dynamic_dims),
        outputs=tuple(
            TensorEntry(name=name, dtype=_dtype(tensor), shape=shape)
            for name, tensor, shape in zip(sample.output_names, sample.outputs, shapes, strict=True)
        ),
        dropped_inputs=traced.dropped,
        max_batch_size=max_batch_size,
        input_order=tuple(sample.blocks.tensors),
        constants=dict(sorted(sample.blocks.constants.items())) or msgspec.UNSET,
        torch=str(torch.__version__),
    )


def describe_inputs(
    tensors: Mapping[str, torch.Tensor], dynamic_dims: Mapping[str, Mapping[int, str]]
) -> tuple[TensorEntry, ...]:
    """Return names, dtypes and shapes of dense inputs, with the free dimensions by name."""
    return tuple(
        TensorEntry(
            name=name,
            dtype=_dtype(tensor),
            shape=("batch", *(dynamic_dims.get(name, {}).get(d, tensor.shape[d]) for d in range(1, tensor.dim()))),
        )
        for name, tensor in tensors.items()
    )


class _Pickler(pickle.Pickler):
    """Pickles tensors so that ``pickle.load`` gives them back, without the address that torch would put in."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, (torch.storage.TypedStorage, torch.storage.UntypedStorage)):
            return NotImplemented
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return torch.storage._load_from_bytes, (buffer.getvalue(),)  # noqa: SLF001 -- what torch's own pickles call


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=4).dump(value)
    return buffer.getvalue()


def _describe_all(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    return {
        name: {"idx": place, "shape": list(tensor.shape), "dtype": str(tensor.dtype)}
        for place, (name, tensor) in enumerate(tensors.items())
    }


def _with_values(entries: Mapping[str, dict[str, Any]], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: {**entry, "values": _to_lists(tensors[name])} for name, entry in entries.items()}


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _to_lists(values: torch.Tensor) -> Any:
    """Return the values for JSON, which has no complex numbers: each is then a list of its real and imaginary part."""
    return (torch.view_as_real(values) if values.is_complex() else values).tolist()


def _write_json(path: Path, value: Any) -> None:
    _write(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    with naming(str(path)):
        path.write_bytes(data)
