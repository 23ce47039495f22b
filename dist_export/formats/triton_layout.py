"""Triton's model repository of the dense arch: its paths, and the text of ``config.pbtxt``."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable

from dist_export.formats.package_entries import DenseEntry, TensorEntry

TRITON = "triton"
CONFIG = "config.pbtxt"
_VERSION = "1"
_COPY = re.compile(rf"(?P<folder>.+)/{TRITON}/[^/]+/{_VERSION}/(?P<file>[^/]+\.onnx)")

DATA_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
}
"""torch's dtype -> Triton's; of those that ONNX Runtime takes."""


def list_triton_files(model_name: str, model_file: str) -> tuple[str, str]:
    """Return the paths of the configuration and of the model, relative to the dense folder."""
    return f"{TRITON}/{model_name}/{CONFIG}", f"{TRITON}/{model_name}/{_VERSION}/{posixpath.basename(model_file)}"


def find_original(path: str) -> str | None:
    """Return the file of the package whose content a file of the repository repeats; None if it repeats none."""
    found = _COPY.fullmatch(path)
    return f"{found['folder']}/{found['file']}" if found else None


def render_config(entry: DenseEntry, model_name: str, model_file: str) -> str:
    """Return ``config.pbtxt``. ``max_batch_size`` is 0, so that shapes have their batch dimension, which is free."""
    lines = [
        f"name: {_quote(model_name)}",
        'backend: "onnxruntime"',
        "max_batch_size: 0",
        f"default_model_filename: {_quote(posixpath.basename(model_file))}",
        *_render("input", entry.inputs),
        *_render("output", entry.outputs),
    ]
    return "\n".join(lines) + "\n"


def _render(kind: str, tensors: Iterable[TensorEntry]) -> list[str]:
    lines = []
    for tensor in tensors:
        dims = [size if isinstance(size, int) else -1 for size in tensor.shape]
        lines += [f"{kind} {{", f"  name: {_quote(tensor.name)}", f"  data_type: {DATA_TYPES[tensor.dtype]}"]
        lines += [f"  dims: [ {', '.join(map(str, dims))} ]"] if dims else ["  dims: [ 1 ]", "  reshape { shape: [ ] }"]
        lines.append("}")
    return lines


def _quote(text: str) -> str:
    """Return a string of protobuf's text format, in UTF-8."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(f"\\{ord(sign):03o}" if ord(sign) < 32 or ord(sign) == 127 else sign for sign in plain) + '"'
