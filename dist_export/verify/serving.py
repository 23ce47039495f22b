"""Check the serving contract of a package: it fits tables and dense inputs, and gives the sample's dense inputs from its ids."""

from __future__ import annotations

import msgspec

from dist_export.errors import DistExportError
from dist_export.formats.serving_entries import DenseInputEntry, ServingEntry
from dist_export.manifest import MANIFEST, DenseEntry, Manifest, ScoreEntry
from dist_export.package.dense_inputs import build_dense_inputs
from dist_export.package.reader import Package


def find_misfits(manifest: Manifest, serving: ServingEntry) -> list[str]:
    """Return where the contract does not fit the tables and the dense inputs of its manifest."""
    tables = {table.name: table for table in manifest.tables}
    found = []
    for feature in serving.features:
        table = tables.get(feature.table)
        slot = None if table is None else next((one for one in table.kept if one.name == feature.slot), None)
        if table is None or slot is None:
            found.append(
                f"feature {feature.name!r} is looked up in {feature.table!r}, slot {feature.slot!r}, which is not there"
            )
            continue
        dim = slot.shape[0] if slot.dim is msgspec.UNSET else slot.dim
        if feature.dim != dim:
            found.append(f"feature {feature.name!r} has {feature.dim} columns, its table {feature.table!r} {dim}")
        if feature.default_row != table.default_row:
            found.append(f"feature {feature.name!r} has another default_row than its table {feature.table!r}")
    stated = [] if manifest.dense is None else [entry.name for entry in manifest.dense.inputs]
    names = [entry.name for entry in serving.inputs]
    if names != stated:
        found.append(f"serving.inputs are {names}, the dense inputs are {stated}")
    return found + [text for entry in serving.inputs for text in _find_gaps(entry, serving, manifest)]


def _find_gaps(entry: DenseInputEntry, serving: ServingEntry, manifest: Manifest) -> list[str]:
    """Return what is wrong with the columns of one dense input."""
    if entry.unknown is not msgspec.UNSET:
        return []
    features = {feature.name: feature for feature in serving.features}
    found, at = [], 0
    for columns in entry.columns:
        if columns.begin != at or columns.end <= columns.begin:
            found.append(f"dense input {entry.name!r}: columns {columns.begin} to {columns.end} follow column {at}")
        at = columns.end
        if (columns.feature is msgspec.UNSET) == (columns.tensor is msgspec.UNSET):
            found.append(f"dense input {entry.name!r}: columns {columns.begin} to {columns.end} have not one origin")
        elif columns.feature is not msgspec.UNSET and columns.feature not in features:
            found.append(f"dense input {entry.name!r}: there is no feature {columns.feature!r}")
        elif columns.feature is not msgspec.UNSET and not features[columns.feature].is_known:
            found.append(f"dense input {entry.name!r}: feature {columns.feature!r} is not known")
    dense = (
        None if manifest.dense is None else next((one for one in manifest.dense.inputs if one.name == entry.name), None)
    )
    if dense is not None and (dense.dtype != entry.dtype or len(dense.shape) != entry.dims):
        found.append(
            f"dense input {entry.name!r} is {entry.dtype} with {entry.dims} dimensions, dense.inputs says otherwise"
        )
    elif dense is not None and entry.dims > 1 and isinstance(dense.shape[-1], int) and dense.shape[-1] != at:
        found.append(f"dense input {entry.name!r} has {dense.shape[-1]} columns, the contract {at}")
    return found


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
        computed = build_dense_inputs(
            serving,
            arrays,
            lambda table, slot, ids: package.lookup(table, ids, slot=slot)[0],
            where=package.directory.url,
        )
    except DistExportError as error:
        findings.append(f"{MANIFEST}: the serving contract cannot be carried out on the stored sample: {error}")
        return
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
    checked.append(
        f"serving contract: gives {len(known)} of {len(serving.inputs)} dense inputs of the sample from its ids"
    )
