"""The files of the dense folder, as the RTP serving family reads them. Rank 0."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from dist_export.archive.fx_folder import graph_text, write_fx_folder
from dist_export.archive.pt2 import pack_program
from dist_export.dense.eager import DenseSample
from dist_export.dense.trace import TracedDense
from dist_export.manifest import DenseEntry, TensorEntry

PROGRAM = "exported_model.pt"


def write_dense_folder(
    folder: Path,
    sample: DenseSample,
    traced: TracedDense,
    *,
    export_model_name: str,
    archive_format: Literal["pt2", "legacy"],
    mc_conf: Mapping[str, Any] | None,
) -> None:
    """Write all files of the dense arch into ``folder``, a local directory."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {name: tensor.cpu() for name, tensor in traced.inputs.items()}
    outputs = [tensor.detach().cpu() for tensor in sample.outputs]
    (folder / PROGRAM).write_bytes(pack_program(traced.program, archive_format=archive_format))
    write_fx_folder(traced.program, folder / export_model_name, export_model_name)
    (folder / "graph.txt").write_text(graph_text(traced.program), encoding="utf-8")
    nodes = [
        {"OutputNodeName": name, "dtype": str(tensor.dtype), "shape": list(tensor.shape)}
        for name, tensor in zip(sample.output_names, outputs, strict=True)
    ]
    _write_json(folder / "output_info.json", {"OutputNodes": nodes})
    _write_json(folder / "params_order.json", list(inputs))
    lite: dict[str, dict[str, Any]] = {
        name: {"idx": place, "shape": list(tensor.shape), "dtype": str(tensor.dtype)}
        for place, (name, tensor) in enumerate(inputs.items())
    }
    _write_json(folder / "inputs_dict_lite.json", lite)
    _write_json(
        folder / "inputs_dict.json",
        {name: {**entry, "values": inputs[name].tolist()} for name, entry in lite.items()},
    )
    (folder / "inputs_dict.pkl").write_bytes(pickle.dumps(inputs, protocol=4))
    base = outputs[0] if sample.is_single else tuple(outputs)
    (folder / "output_base.pkl").write_bytes(pickle.dumps(base, protocol=4))
    _write_json(folder / "input_columns.json", dict(mc_conf or {}))


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
    shapes = _output_shapes(traced, dynamic_dims)
    return DenseEntry(
        folder=folder_name,
        program=f"{folder_name}/{PROGRAM}",
        archive_format=archive_format,
        inputs=tuple(
            TensorEntry(
                name=name,
                dtype=_dtype(tensor),
                shape=("batch", *(dynamic_dims.get(name, {}).get(d, tensor.shape[d]) for d in range(1, tensor.dim()))),
            )
            for name, tensor in traced.inputs.items()
        ),
        outputs=tuple(
            TensorEntry(name=name, dtype=_dtype(tensor), shape=shape)
            for name, tensor, shape in zip(sample.output_names, sample.outputs, shapes, strict=True)
        ),
        dropped_inputs=traced.dropped,
        max_batch_size=max_batch_size,
    )


def _output_shapes(traced: TracedDense, dynamic_dims: Mapping[str, Mapping[int, str]]) -> list[tuple[int | str, ...]]:
    """Return the outputs' shapes; a size that follows from free dimensions is given as an expression of their names."""
    values = {node.name: node.meta.get("val") for node in traced.program.graph.nodes}
    names: dict[str, str] = {}
    for name, node in zip(traced.inputs, traced.program.graph_signature.user_inputs, strict=True):
        value = values.get(str(node))
        for dim, label in ({0: "batch"} | dict(dynamic_dims.get(name, {}))).items():
            if isinstance(value, torch.Tensor):
                names[str(value.shape[dim])] = label
    shapes: list[tuple[int | str, ...]] = []
    for node in traced.program.graph_signature.user_outputs:
        value = values.get(str(node))
        sizes = [str(size) for size in value.shape] if isinstance(value, torch.Tensor) else []
        shapes.append(tuple(int(size) if size.isdigit() else _in_words(size, names) for size in sizes))
    return shapes


def _in_words(size: str, names: Mapping[str, str]) -> str:
    return re.sub(r"[a-z]+\d+", lambda match: names.get(match[0], match[0]), size)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
