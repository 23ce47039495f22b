"""Check the serving contract of a package: it fits tables and dense inputs, and gives the sample's dense inputs from its ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from dist_export.errors import DistExportError
from dist_export.formats.serving_entries import DenseInputEntry, FeatureEntry, ServingEntry
from dist_export.manifest import MANIFEST, DenseEntry, ScoreEntry, TensorEntry
from dist_export.package.dense_inputs import build_dense_inputs
from dist_export.package.reader import Package
from dist_export.package.serving_fit import find_misfits


def check_serving(
    package: Package,
    serving: ServingEntry,
    dense: DenseEntry,
    score: ScoreEntry | None,
    findings: list[str],
    checked: list[str],
) -> None:
    """Carry the contract out on the stored sample, and compare with the stored dense inputs of the same examples."""
    misfits = find_misfits(package.manifest, serving)
    findings += [f"{MANIFEST}: {text}" for text in misfits]
    known = [entry for entry in serving.inputs if entry.unknown is msgspec.UNSET]
    if misfits or not known:
        return
    if score is None:
        checked.append("serving contract: fits tables and dense inputs; there is no sample of ids to carry it out on")
        return
    import torch

    from dist_export.archive.output_diff import find_far
    from dist_export.package.score_sample import read_sample
    from dist_export.verify.dense import read_named_inputs

    try:
        sample = read_sample(package, score)
        own = read_named_inputs(package.files, dense)
        arrays = {name: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for name, t in sample.inputs.items()}
        computed = _build(package, serving, arrays)
    except DistExportError as error:
        findings.append(f"{MANIFEST}: the serving contract cannot be carried out on the stored sample: {error}")
        return
    before = len(findings)
    for entry in known:
        if entry.name not in own:
            continue  # already a finding
        stated, found = own[entry.name], torch.from_numpy(computed[entry.name]).to(own[entry.name].dtype)
        rows = min(len(stated), len(found))
        stated, found = stated[:rows], found[:rows]
        wrong = None if stated.shape != found.shape else find_far(found, stated)
        if stated.shape != found.shape or wrong is not None:
            findings.append(
                f"{MANIFEST}: the serving contract gives dense input {entry.name!r} otherwise than the model did for the same "
                f"examples (example {wrong[0] if wrong else 0}, column {wrong[-1] if wrong else 0})"
            )
    if serving.is_known and len(findings) == before:
        _compare_scores(package, serving, score, arrays, findings)
    checked.append(
        f"serving contract: gives {len(known)} of {len(serving.inputs)} dense inputs of the sample from its ids"
    )


def _build(package: Package, serving: ServingEntry, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return build_dense_inputs(
        serving, arrays, lambda table, slot, ids: package.lookup(table, ids, slot=slot)[0], where=package.directory.url
    )


def _compare_scores(
    package: Package, serving: ServingEntry, score: ScoreEntry, arrays: Mapping[str, np.ndarray], findings: list[str]
) -> None:
    """Compare scores of the contract with those of the score program, for ids that the stored sample does not have.

    What the sample lacks, such as a padding id, would hide a contract that says something else of it.
    """
    from dist_export.archive.output_diff import usual_sizes

    score_program, dense_program = package.load_score_program().module(), package.load_program().module()
    for told, its in other_ids(serving, arrays):
        for changed in _run_together_or_apart(score_program, score, arrays, its):
            own = _run(score_program, changed, score.inputs)
            if isinstance(own, str):
                continue  # the model itself refuses such ids
            found = _run(dense_program, _build(package, serving, changed), serving.inputs)
            if isinstance(found, str):
                findings.append(
                    f"{MANIFEST}: the serving contract gives no scores {told}, the score program does: {found}"
                )
                return
            for entry, expected, given in zip(score.outputs, own, found, strict=True):
                allowed = _SHARE * (expected.double().abs() + usual_sizes(None, expected)) + _SHARE**2
                if expected.shape != given.shape or bool(((given.double() - expected.double()).abs() > allowed).any()):
                    findings.append(
                        f"{MANIFEST}: the serving contract gives output {entry.name!r} otherwise than the score program {told}"
                    )
                    return


def _run_together_or_apart(
    program: Any, score: ScoreEntry, arrays: Mapping[str, np.ndarray], its: Mapping[str, np.ndarray]
) -> list[dict[str, np.ndarray]]:
    """Return the tensors of the sample with other ids in all of ``its``; in one at a time, if the model refuses some of them."""
    together = {**arrays, **its}
    if len(its) < 2 or not isinstance(_run(program, together, score.inputs), str):
        return [together]
    return [{**arrays, name: ids} for name, ids in its.items()]


def _run(
    program: Any, arrays: Mapping[str, np.ndarray], entries: Sequence[TensorEntry | DenseInputEntry]
) -> list[Any] | str:
    """Return what a program gives for these arrays, or why it fails."""
    import torch

    tensors = {entry.name: torch.from_numpy(np.ascontiguousarray(arrays[entry.name])) for entry in entries}
    dtypes = {entry.name: getattr(torch, entry.dtype) for entry in entries}
    try:
        with torch.no_grad():
            result = program(**{name: tensor.to(dtypes[name]) for name, tensor in tensors.items()})
    except Exception as error:  # noqa: BLE001 -- a foreign program
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return list(result) if isinstance(result, (tuple, list)) else [result]


_SHARE = 0.02
"""How far scores may be apart, as a share of their own size and the usual one: another id changes them by more."""
_FAR = 1_000_003
"""Added to ids: no table has them, unless a transform brings them back."""


def other_ids(serving: ServingEntry, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield other ids by tensor of the sample, and which these are."""
    features: dict[str, list[FeatureEntry]] = {}
    for feature in serving.features:
        if feature.ids is not msgspec.UNSET:
            features.setdefault(feature.ids.values, []).append(feature)
    for told, make in _OTHERS.items():
        changed = {}
        for name, its in features.items():
            ids = arrays[name].copy()
            flat = ids.reshape(-1)
            chosen = np.random.default_rng(0).random(len(flat)) < 0.5  # a fixed step would pass over whole columns
            chosen[:1] = True
            other = make(flat.astype(np.int64), its)
            range_of = np.iinfo(ids.dtype)
            if told == _ORDER:
                chosen[:] = True
            fits = (other >= range_of.min) & (other <= range_of.max)
            flat[chosen & fits] = other[chosen & fits]
            changed[name] = ids
        yield told, changed


def _padding_of(ids: np.ndarray, features: Sequence[FeatureEntry]) -> np.ndarray:
    paddings = [feature.padding_id for feature in features if isinstance(feature.padding_id, int)]
    return np.full_like(ids, paddings[0]) if paddings else ids


def _bring_back(ids: np.ndarray, features: Sequence[FeatureEntry]) -> np.ndarray:
    """Return ids that the transforms of a feature bring to those of the sample. Each feature gets its share of the places."""
    found: np.ndarray = ids.copy()
    for number, feature in enumerate(features):
        own = ids[number :: len(features)]
        steps = () if feature.transforms is msgspec.UNSET else feature.transforms
        for step in reversed(steps):
            value = np.int64(step.value)
            if step.op == "modulo":
                own = own + value
            elif step.op == "add":
                own = own - value
            elif step.op == "from_end":
                own = np.where(own - value < 0, own - value, own)
            else:
                own = own | (~value & (value + 1))  # the lowest bit that is not in the mask
        found[number :: len(features)] = own
    return found


def _add_high_bit(ids: np.ndarray, _: Sequence[FeatureEntry]) -> np.ndarray:
    """Return ids that are a row's modulo each power of two below: a mask and a narrower dtype take the bit away."""
    found: np.ndarray = ids ^ np.where(np.arange(len(ids)) % 2, np.int64(1) << 62, np.int64(1) << 30)
    return found


def _count_down(ids: np.ndarray, _: Sequence[FeatureEntry]) -> np.ndarray:
    found: np.ndarray = -1 - np.arange(len(ids)) % 8
    return found


_ORDER = "with ids in another order"
_OTHERS: dict[str, Callable[[np.ndarray, Sequence[FeatureEntry]], np.ndarray]] = {
    _ORDER: lambda ids, _: np.roll(ids, 1),
    "with ids 0": lambda ids, _: np.zeros_like(ids),
    "with the padding id": _padding_of,
    "with ids that no table has": lambda ids, _: ids + _FAR,
    "with negative ids": _count_down,
    "with ids that differ from those of rows by a power of two": _add_high_bit,
    "with ids that its transforms make those of rows": _bring_back,
}
