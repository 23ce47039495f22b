"""Check the score program of a package: it loads, and gives the stored outputs for the stored sample, with the shards' rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from dist_export.errors import DistExportError
from dist_export.manifest import MANIFEST, OUTPUTS, SCORE_FOLDER, Manifest, ParityEntry, ScoreEntry, TensorEntry
from dist_export.package.reader import Package

if TYPE_CHECKING:
    import torch

    from dist_export.package.score_sample import ScoreSample

_ATOL, _RTOL = 1e-6, 1e-5
_TIMES = 4
"""How many times the difference that the manifest states two machines may be apart."""


def check_scores(package: Package, entry: ScoreEntry, findings: list[str], checked: list[str]) -> None:
    """Load the program after a check of its archive, run it on the stored sample, and compare with the stored outputs.

    The stored outputs are compared with those of the dense arch's sample, which are of the same examples. This needs neither
    the model's code nor the job.
    """
    import torch

    from dist_export.package.score import load_score_program
    from dist_export.package.score_sample import read_sample
    from dist_export.verify.score_signature import check_traced  # it imports torch

    try:
        program = load_score_program(package)
        sample = read_sample(package, entry)
    except DistExportError as error:
        findings.append(f"{entry.program}: {_first_line(error)}")
        return
    _check_signature(entry, sample, findings)
    check_traced(program, entry, findings)
    for stated, tensor in zip(entry.inputs, sample.inputs.values(), strict=True):
        if not _is_kind(tensor, stated):
            findings.append(
                f"{entry.sample}: input {stated.name!r} is {tensor.dtype} {list(tensor.shape)}, the manifest says {stated.dtype} "
                f"[{', '.join(map(str, stated.shape))}]"
            )
    _compare_with_dense(package, entry, sample, findings)
    try:
        with torch.no_grad():
            result = program.module()(**sample.inputs)
    except Exception as error:  # noqa: BLE001 -- any error of a foreign program is a finding
        findings.append(f"{entry.program}: fails on the stored sample: {type(error).__name__}: {_first_line(error)}")
        return
    found = [result] if isinstance(result, torch.Tensor) else list(result)
    if len(found) != len(entry.outputs):
        findings.append(f"{entry.program}: returns {len(found)} outputs, the manifest names {len(entry.outputs)}")
        return
    told = [
        _compare(entry, stated, base, value, package.manifest.parity, findings)
        for stated, base, value in zip(entry.outputs, sample.outputs, found, strict=True)
    ]
    checked.append(f"score program: loads, gives the stored outputs on the stored sample: {'; '.join(told)}")


def find_without_entry(manifest: Manifest) -> str:
    """Return a file of a score program that the manifest lists without an entry for it; empty if there is none."""
    has_entry = manifest.score is not msgspec.UNSET
    listed = [file.path for file in manifest.files if file.path.startswith(f"{SCORE_FOLDER}/")]
    return "" if has_entry or not listed else listed[0]


def _check_signature(entry: ScoreEntry, sample: ScoreSample, findings: list[str]) -> None:
    """Compare names, dropped inputs and modules with those that the export stored beside the sample."""
    from dist_export.package.score_sample import signature_of

    for name, stated in signature_of(entry).items():
        if sample.signature.get(name) != stated:
            findings.append(
                f"{entry.sample}: {name} is {sample.signature.get(name)}, the manifest's score.{name} is {stated}"
            )


def _compare_with_dense(package: Package, entry: ScoreEntry, sample: ScoreSample, findings: list[str]) -> None:
    """Compare the stored outputs with the stored outputs of the dense arch: they are the model's, for the same examples."""
    from dist_export.archive.output_diff import has_same_values
    from dist_export.verify.dense import read_named_outputs

    dense = package.manifest.dense
    if dense is None:
        return
    own = [one.name for one in entry.outputs]
    if own != [one.name for one in dense.outputs]:
        findings.append(f"{MANIFEST}: score.outputs are {own}, dense.outputs are {[one.name for one in dense.outputs]}")
        return
    try:
        by_name = read_named_outputs(package.files, dense, findings)
    except DistExportError as error:
        findings.append(str(error))
        return
    for name, output in zip(own, sample.outputs, strict=True):
        base = by_name.get(name)
        if base is None:
            continue  # already a finding
        rows = min(len(base), len(output)) if base.dim() and output.dim() else None
        if not has_same_values(base[:rows] if base.dim() else base, output[:rows] if output.dim() else output):
            findings.append(
                f"{entry.sample}: output {name!r} is not what {dense.folder}/{OUTPUTS} has for the same examples, so the score "
                "program and the dense program are of two models"
            )


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

    if base.dim() and not len(base):
        findings.append(f"{entry.sample}: output {stated.name!r} has no rows, so the sample proves nothing")
        return f"{stated.name} is not comparable"
    if base.dim() and base.shape[1:] == found.shape[1:] and base.shape[0] < found.shape[0]:
        found = found[: base.shape[0]]  # a sample that cannot be cut by example has more rows than are stored
    if base.shape != found.shape or base.dtype != found.dtype:
        findings.append(
            f"{entry.sample}: output {stated.name!r} is {base.dtype} {list(base.shape)}, the program gives {found.dtype} "
            f"{list(found.shape)}"
        )
        return f"{stated.name} is not comparable"
    seen = 0.0 if entry.parity is None else entry.parity.max_abs.get(stated.name, 0.0)
    atol, rtol = _tolerances(stated.name, base, seen, parity, findings)
    worst = compare(base, found, atol=atol, rtol=rtol)
    figures = f"max abs {worst.max_abs:.2g}, max rel {worst.max_rel:.2g}, {worst.max_ulp:,} ULP"
    if not worst.is_close:
        findings.append(
            f"{entry.program}: output {stated.name!r} is not what was stored in {entry.sample}: {figures}, in row {worst.row}; "
            f"allowed is {describe_allowed(atol, rtol)}"
        )
    return f"{stated.name} {figures}"


def _tolerances(
    name: str, base: torch.Tensor, seen: float, parity: ParityEntry | None, findings: list[str]
) -> tuple[float, float]:
    """Return atol and rtol. They grow by the difference ``seen`` in the export, up to what an export lets pass.

    An export lets the tolerance of its settings pass, and the rounding of the dense arch, which is a small share of the usual
    size of an output. So no figure of the manifest can make the comparison pass anything.
    """
    from dist_export.archive.output_diff import largest_rounding, usual_sizes

    stated = (_ATOL, _RTOL) if parity is None else (parity.atol, parity.rtol)
    if not base.is_floating_point() or not base.numel():
        return 0.0, 0.0
    usual = float(usual_sizes(None, base).max())
    if stated[0] > max(_ATOL, usual) or stated[1] > 1:
        findings.append(
            f"{MANIFEST}: parity.atol {stated[0]:g} and rtol {stated[1]:g} allow output {name!r} of the score program to be "
            f"anything: its usual size is {usual:.2g}"
        )
    most = max(stated[0], _ATOL) + largest_rounding(base.dtype) * usual
    return min(min(stated[0], _ATOL) + _TIMES * seen, most), min(stated[1], _RTOL)


def _is_kind(tensor: torch.Tensor, stated: TensorEntry) -> bool:
    if str(tensor.dtype).removeprefix("torch.") != stated.dtype or tensor.dim() != len(stated.shape):
        return False
    return all(isinstance(size, str) or size == found for size, found in zip(stated.shape, tensor.shape, strict=True))


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
