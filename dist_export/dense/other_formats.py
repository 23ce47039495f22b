"""The dense arch in further formats beside the exported program, each compared with the model as the program is. Rank 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from dist_export.archive.native_program import NativeProgram
from dist_export.archive.onnx_model import OnnxProgram, is_supported
from dist_export.config.dense_settings import AOTI, ONNX
from dist_export.config.needs import Comparisons, DenseSettings
from dist_export.dense.aoti_format import compile_dense
from dist_export.dense.comparison import Bounds
from dist_export.dense.eager import DenseSample
from dist_export.dense.onnx_format import list_onnx_versions, make_onnx
from dist_export.dense.parity import check_parity
from dist_export.dense.trace import TracedDense
from dist_export.errors import ConfigError, PackageError, TraceError
from dist_export.formats.triton_layout import TRITON, list_triton_files, render_config
from dist_export.manifest import DenseEntry, FormatEntry, ParityEntry
from dist_export.storage.local_io import naming

TOLERANCE = 1e-5
"""Other runtimes have other kernels: their atol and rtol are at least this."""

FILES = {ONNX: "model.onnx", AOTI: "model.pt2"}
"""Format -> file within the dense folder."""


@dataclass(frozen=True, slots=True)
class FormatWriter:
    """Writes the formats of ``dense_formats`` into the dense folder."""

    config: DenseSettings
    sample: DenseSample
    traced: TracedDense
    entry: DenseEntry
    """What the manifest will say of the exported program."""
    compare: Callable[[Any, str, Comparisons, ParityEntry], ParityEntry]
    """Compares a program with the caller's own model on the whole batch and adds the figures to a parity: the program, its
    name for messages, the tolerances, the parity."""

    def write(self, folder: Path) -> DenseEntry:
        """Write all formats, compare each, and return the entry with theirs.

        Raises:
            TraceError: a format cannot express the program.
            ParityError: a written file gives other outputs than the model.
        """
        if not self.config.dense_formats:
            return self.entry
        write = {ONNX: self._write_onnx, AOTI: self._write_aoti}
        formats = tuple(write[name](folder) for name in self.config.dense_formats)
        entry = msgspec.structs.replace(self.entry, formats=formats)
        return self._write_triton(folder, entry) if TRITON in self.config.layouts else entry

    def _write_triton(self, folder: Path, entry: DenseEntry) -> DenseEntry:
        """Write Triton's model repository of the ONNX file."""
        name, model = self.config.export_model_name, FILES[ONNX]
        config, copy = list_triton_files(name, model)
        (folder / copy).parent.mkdir(parents=True)
        _write(folder / config, render_config(entry, name, model).encode())
        _write(folder / copy, (folder / model).read_bytes())
        return msgspec.structs.replace(entry, layouts={TRITON: f"{self.config.export_folder_name}/{TRITON}"})

    def _write_onnx(self, folder: Path) -> FormatEntry:
        content, opset = make_onnx(self.traced, self.sample.output_names, self.config.dynamic_dims)
        path = folder / FILES[ONNX]
        _write(path, content)
        where = f"dense_formats: {path.name}"
        try:
            names = self.sample.output_names
            program = OnnxProgram(path.read_bytes(), names, where=where, is_single=self.sample.is_single)
        except PackageError as error:
            raise TraceError(f"{error}. Use other operators, or leave onnx out of dense_formats") from error
        return FormatEntry(
            format=ONNX,
            file=f"{self.config.export_folder_name}/{path.name}",
            parity=self._check(program, "the ONNX file"),
            opset=opset,
            versions=list_onnx_versions(),
        )

    def _write_aoti(self, folder: Path) -> FormatEntry:
        compiled = compile_dense(self.traced, self.sample.output_names)
        path = folder / FILES[AOTI]
        _write(path, compiled.content)
        try:
            program = NativeProgram(path.read_bytes(), where=f"dense_formats: {path.name}")
        except PackageError as error:
            raise TraceError(f"{error}. Leave aoti out of dense_formats") from error
        return FormatEntry(
            format=AOTI,
            file=f"{self.config.export_folder_name}/{path.name}",
            parity=self._check(program, "the compiled dense arch"),
            versions=compiled.versions,
            machine=compiled.machine,
            features=compiled.features,
        )

    def _check(self, program: Any, what: str) -> ParityEntry:
        """Compare what was written with the dense arch at the batch sizes of the program, and with the caller's model."""
        atol, rtol = max(self.config.atol, TOLERANCE), max(self.config.rtol, TOLERANCE)
        parity = check_parity(
            self.sample,
            self.traced.inputs,
            program,
            shapes=[output.shape for output in self.entry.outputs],
            atol=atol,
            rtol=rtol,
            max_batch_size=self.config.max_batch_size,
            what=what,
        )
        return self.compare(program, what, Bounds(atol, rtol, self.config.max_batch_size), parity)


def refuse_wrong_sample(sample: DenseSample, config: DenseSettings) -> None:
    """Refuse dtypes and devices that a format of ``dense_formats`` cannot take. Rank 0, before anything is written.

    Raises:
        ConfigError: it names the first.
    """
    device = next(iter(sample.inputs.values())).device
    if AOTI in config.dense_formats and device.type != "cpu":
        raise ConfigError(
            f"dense_formats has aoti, which compiles for the CPU, but the dense arch is traced on {device}; set device: cpu"
        )
    if ONNX not in config.dense_formats:
        return
    if both := [name for name in sample.output_names if name in sample.inputs]:
        raise ConfigError(
            f"dense_formats has onnx, but the dense arch has an input and an output {both[0]!r}; in ONNX the two cannot have "
            "one name. Set export_outputs, or leave onnx out"
        )
    found = [(f"input {name!r}", tensor) for name, tensor in sample.inputs.items()]
    found += [(f"output {name!r}", tensor) for name, tensor in zip(sample.output_names, sample.outputs, strict=True)]
    for name, tensor in found:
        if not is_supported(_name_of(tensor.dtype)):
            raise ConfigError(
                f"dense_formats has onnx, but {name} of the dense arch is {_name_of(tensor.dtype)}, which ONNX Runtime does "
                "not take. Cast it in forward, or leave onnx out"
            )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(path: Path, content: bytes) -> None:
    with naming(str(path)):
        path.write_bytes(content)
