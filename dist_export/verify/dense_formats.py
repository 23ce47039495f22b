"""Check the further formats of the dense arch: the ONNX file gives the stored outputs, if ONNX Runtime is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from dist_export.errors import PackageError
from dist_export.formats.triton_layout import CONFIG, TRITON, list_triton_files, render_config
from dist_export.manifest import DenseEntry, FormatEntry
from dist_export.package.reader import Package

if TYPE_CHECKING:
    import torch

_TOLERANCE = 1e-5
"""The largest atol and rtol of a manifest that are taken; the largest difference that it states is added."""

Measure = Callable[[], "torch.Tensor | None"]
"""Returns how far rounding moves an output."""


class StoredSample(NamedTuple):
    """What a program of the dense arch is compared on."""

    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]
    """By name, in order."""
    measures: Sequence[Measure]
    """By output."""


def check_formats(
    package: Package, entry: DenseEntry, sample: StoredSample, findings: list[str], checked: list[str]
) -> None:
    """Check each format of ``dense.formats``. The general check of files compares the digests.

    Args:
        package: the package.
        entry: its dense arch.
        sample: as the package has it.
        findings: gets one line for each fault.
        checked: gets one line for each format, with what was checked and what was not.
    """
    listed = {file.path for file in package.manifest.files if file.digest}
    for form in () if entry.formats is msgspec.UNSET else entry.formats:
        if form.file not in listed:
            findings.append(f"{form.file}: is not among the files of the manifest, or has no digest there")
        elif form.format == "onnx":
            _check_onnx(package, entry, form, sample, findings, checked)
        elif form.format == "aoti":
            checked.append(f"{form.file}: its digest alone, because it is native code, which verify does not run")
        else:
            checked.append(f"{form.file}: its digest alone; the format {form.format!r} is not known here")
    if entry.layouts is not msgspec.UNSET and TRITON in entry.layouts:
        _check_triton(package, entry, entry.layouts[TRITON], findings, checked)


def _check_triton(package: Package, entry: DenseEntry, folder: str, findings: list[str], checked: list[str]) -> None:
    """Compare Triton's model repository with the manifest and with the ONNX file."""
    digests = {file.path: file.digest for file in package.manifest.files}
    configs = [path for path in digests if path.startswith(f"{folder}/") and path.endswith(f"/{CONFIG}")]
    model = next((form.file for form in entry.formats or () if form.format == "onnx"), "")
    if len(configs) != 1 or folder != f"{entry.folder}/{TRITON}":
        findings.append(f"{folder}: has {len(configs)} files {CONFIG} among the files of the manifest, expected one")
        return
    name = configs[0].removeprefix(f"{folder}/").partition("/")[0]
    config, copy = (f"{entry.folder}/{path}" for path in list_triton_files(name, model))
    before = len(findings)
    if not model or digests.get(copy) != digests.get(model):
        findings.append(f"{copy}: is not the ONNX file {model or '(there is none)'}")
    try:
        if package.files.read(config) != render_config(entry, name, model).encode():
            findings.append(f"{config}: is not what the manifest says of the dense arch")
    except KeyError as error:
        findings.append(f"{config}: {error} is no dtype that Triton's ONNX backend takes")
    if len(findings) == before:
        checked.append(f"{config}: says what the manifest says; {copy} is the ONNX file")


def _check_onnx(
    package: Package,
    entry: DenseEntry,
    form: FormatEntry,
    sample: StoredSample,
    findings: list[str],
    checked: list[str],
) -> None:
    from dist_export.archive.onnx_model import OnnxProgram, has_runtime

    if not has_runtime():
        checked.append(f"{form.file}: its digest alone, because onnxruntime is not installed")
        return
    names = [output.name for output in entry.outputs]
    try:
        program = OnnxProgram(package.files.read(form.file), names, where=form.file)
    except PackageError as error:
        findings.append(str(error))
        return
    stated = sorted(tensor.name for tensor in entry.inputs)
    if sorted(program.input_names) != stated or program.output_names != names:
        findings.append(
            f"{form.file}: has the inputs {sorted(program.input_names)} and the outputs {program.output_names}, the manifest "
            f"says {stated} and {names}"
        )
        return
    try:
        found = program(**sample.inputs)
    except Exception as error:  # noqa: BLE001 -- any error of a foreign file is a finding
        first = next(iter(str(error).strip().splitlines()), "")
        findings.append(f"{form.file}: fails on the stored sample: {type(error).__name__}: {first}")
        return
    told = []
    for name, tensor, measure in zip(names, found, sample.measures, strict=False):
        base = sample.outputs.get(name)
        if base is None or base.shape != tensor.shape or base.dtype != tensor.dtype:
            other = "nothing" if base is None else f"{base.dtype} {list(base.shape)}"
            findings.append(
                f"{form.file}: output {name!r} is {tensor.dtype} {list(tensor.shape)}, output_base.pkl has {other}"
            )
            continue
        told.append(_compare(form, name, base, tensor, measure, findings))
    checked.append(f"{form.file}: ONNX Runtime gives the stored outputs on the stored sample: {'; '.join(told)}")


def _compare(
    form: FormatEntry,
    name: str,
    base: torch.Tensor,
    found: torch.Tensor,
    measure: Measure,
    findings: list[str],
) -> str:
    """Add a finding if an output differs, and return the figures as text."""
    from dist_export.archive.output_diff import compare, describe_allowed

    atol = min(form.parity.atol, _TOLERANCE + form.parity.max_abs.get(name, 0.0))
    rtol = min(form.parity.rtol, _TOLERANCE)
    worst = compare(base, found, atol=atol, rtol=rtol)
    if not worst.is_close and base.is_floating_point():
        worst = compare(base, found, atol=atol, rtol=rtol, rounding=measure())
    figures = f"max abs {worst.max_abs:.2g}, {worst.max_ulp:,} ULP"
    if not worst.is_close:
        findings.append(
            f"{form.file}: output {name!r} is not what was stored in output_base.pkl: {figures}, in row {worst.row}; allowed "
            f"is {describe_allowed(atol, rtol)}"
        )
    return f"{name} {figures}"
