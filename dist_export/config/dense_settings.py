"""Check settings of the dense arch: its formats, what these need on this machine, and the names of its outputs."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence

from dist_export.errors import ConfigError

_MAX_BATCHES = 10_000

ONNX = "onnx"
AOTI = "aoti"
DENSE_FORMATS = (ONNX, AOTI)
LAYOUTS = ("triton",)

_NEEDED = {ONNX: ("onnx", "onnxscript", "onnxruntime")}
"""Format -> packages that write and check it."""


def check_dense_formats(dense_formats: Sequence[str]) -> None:
    """Refuse an unknown or duplicate format, and one that cannot be written on this machine. ConfigError."""
    _check_values("dense_formats", dense_formats, DENSE_FORMATS)
    for name in dense_formats:
        missing = [package for package in _NEEDED.get(name, ()) if importlib.util.find_spec(package) is None]
        if missing:
            raise ConfigError(
                f"dense_formats has {name}, which needs {', '.join(missing)}: pip install 'dist_export[{name}]'"
            )
    if AOTI in dense_formats and shutil.which(compiler()) is None:
        raise ConfigError(
            f"dense_formats has aoti, which needs a C++ compiler, but there is no {compiler()}: install g++, or set the "
            "environment variable CXX to another one"
        )


def check_layouts(layouts: Sequence[str], dense_formats: Sequence[str]) -> None:
    """Refuse an unknown or duplicate layout, and one whose format is not written. ConfigError."""
    _check_values("layouts", layouts, LAYOUTS)
    if layouts and ONNX not in dense_formats:
        raise ConfigError(f"layouts has {layouts[0]}, which serves the ONNX file; set dense_formats: [onnx]")


def compiler() -> str:
    """Return the C++ compiler that AOTInductor calls."""
    return os.environ.get("CXX") or "g++"


def check_output_names(names: list[str]) -> None:
    """Refuse output names that are empty or duplicate."""
    for place, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"export_outputs: name {place} is {name!r}; every output needs a name")
        if name in names[:place]:
            raise ConfigError(f"export_outputs: {name!r} stands there twice; names must be unique")


def _check_values(setting: str, values: Sequence[str], known: Sequence[str]) -> None:
    for place, value in enumerate(values):
        if value not in known:
            raise ConfigError(f"{setting} has {value!r}; the known values are {', '.join(known)}")
        if value in values[:place]:
            raise ConfigError(f"{setting} has {value!r} twice; give each value once")


def check_free_dims(dynamic_dims: Mapping[str, Mapping[int, str]]) -> None:
    """Refuse a further free dimension that is the batch's own, or whose name is no identifier. ConfigError."""
    for name, dims in dynamic_dims.items():
        for dim, label in dims.items():
            if dim < 1:
                raise ConfigError(f"dynamic_dims.{name}: {dim} is no further dimension; 0 is the batch, count from 1")
            if not label.isidentifier() or label == "batch":
                raise ConfigError(
                    f"dynamic_dims.{name}.{dim}: {label!r} is no name for a dimension; give an identifier"
                )


def check_drift(drift_batches: int, max_drift: float | dict[str, float] | None) -> None:
    """Refuse bounds that are no numbers, or that nothing is measured for. ConfigError."""
    if not 0 <= drift_batches <= _MAX_BATCHES:
        raise ConfigError(f"drift_batches is {drift_batches}; give a number from 0 to {_MAX_BATCHES:,}")
    if max_drift is None:
        return
    bounds = max_drift if isinstance(max_drift, dict) else {"": max_drift}
    for name, limit in bounds.items():
        if not 0 <= limit < float("inf"):
            raise ConfigError(f"max_drift{name and f'.{name}'} is {limit}; give a finite number from 0 up")
    if not drift_batches:
        raise ConfigError("max_drift bounds the drift, but drift_batches is 0, which leaves it out")
