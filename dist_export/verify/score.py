"""Check the score program of a package: it loads, and gives the stored outputs for the stored sample, with the shards' rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dist_export.errors import DistExportError
from dist_export.manifest import ParityEntry, ScoreEntry, TensorEntry
from dist_export.package.reader import Package

if TYPE_CHECKING:
    import torch

_ATOL, _RTOL = 1e-6, 1e-5
_TIMES = 4
"""How many times the difference that the manifest states two machines may be apart."""


def check_scores(package: Package, entry: ScoreEntry, findings: list[str], checked: list[str]) -> None:
    """Load the program after a check of its archive, run it on the stored sample, and compare with the stored outputs.

    This needs neither the model's code nor the job.
    """
    import torch

    from dist_export.package.score import load_score_program, read_sample

    try:
        program = load_score_program(package)
        inputs, outputs = read_sample(package)
    except DistExportError as error:
        findings.append(f"{entry.program}: {_first_line(error)}")
        return
    for stated, tensor in zip(entry.inputs, inputs.values(), strict=True):
        if not _is_kind(tensor, stated):
            findings.append(
                f"{entry.sample}: input {stated.name!r} is {tensor.dtype} {list(tensor.shape)}, the manifest says {stated.dtype} "
                f"[{', '.join(map(str, stated.shape))}]"
            )
    try:
        with torch.no_grad():
            result = program.module()(**inputs)
    except Exception as error:  # noqa: BLE001 -- any error of a foreign program is a finding
        findings.append(f"{entry.program}: fails on the stored sample: {type(error).__name__}: {_first_line(error)}")
        return
    found = [result] if isinstance(result, torch.Tensor) else list(result)
    if len(found) != len(entry.outputs):
        findings.append(f"{entry.program}: returns {len(found)} outputs, the manifest names {len(entry.outputs)}")
        return
    told = [
        _compare(entry, stated, base, value, package.manifest.parity, findings)
        for stated, base, value in zip(entry.outputs, outputs, found, strict=True)
    ]
    checked.append(f"score program: loads, gives the stored outputs on the stored sample: {'; '.join(told)}")


def _compare(
    entry: ScoreEntry,
    stated: TensorEntry,
    base: torch.Tensor,
    found: torch.Tensor,
    parity: ParityEntry | None,
    findings: list[str],
) -> str:
    """Add a finding if an output is not the stored one; return the figures as text."""
    from dist_export.archive.output_diff import compare, describe_allowed

    if base.dim() and base.shape[1:] == found.shape[1:] and base.shape[0] < found.shape[0]:
        found = found[: base.shape[0]]  # a sample that cannot be cut by example has more rows than are stored
    if base.shape != found.shape or base.dtype != found.dtype:
        findings.append(
            f"{entry.sample}: output {stated.name!r} is {base.dtype} {list(base.shape)}, the program gives {found.dtype} "
            f"{list(found.shape)}"
        )
        return f"{stated.name} is not comparable"
    seen = 0.0 if entry.parity is None else entry.parity.max_abs.get(stated.name, 0.0)
    atol = min(_ATOL if parity is None else parity.atol, _ATOL) + _TIMES * seen
    rtol = min(_RTOL if parity is None else parity.rtol, _RTOL)
    worst = compare(base, found, atol=atol, rtol=rtol)
    figures = f"max abs {worst.max_abs:.2g}, max rel {worst.max_rel:.2g}, {worst.max_ulp:,} ULP"
    if not worst.is_close:
        findings.append(
            f"{entry.program}: output {stated.name!r} is not what was stored in {entry.sample}: {figures}, in row {worst.row}; "
            f"allowed is {describe_allowed(atol, rtol)}"
        )
    return f"{stated.name} {figures}"


def _is_kind(tensor: torch.Tensor, stated: TensorEntry) -> bool:
    if str(tensor.dtype).removeprefix("torch.") != stated.dtype or tensor.dim() != len(stated.shape):
        return False
    return all(isinstance(size, str) or size == found for size, found in zip(stated.shape, tensor.shape, strict=True))


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
