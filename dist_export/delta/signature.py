"""Whether a new dense arch takes and gives what that of the base does. Names, order, dtypes and shapes are compared. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from dist_export.manifest import DenseEntry, FeatureEntry, ScoreEntry, ServingEntry, TensorEntry

Shape = tuple[int | str, ...]
_OF_IDS = {
    "ids": "ids",
    "transforms": "transforms of ids",
    "padding_id": "padding id",
    "pooling": "pooling",
    "longest": "longest list",
    "shortest": "least number of columns",
    "default_row": "default row",
}
"""Fields of a feature that say what serving does with ids -> what they are, in words."""


def find_other_tensors(what: str, ours: Sequence[TensorEntry], theirs: Sequence[TensorEntry]) -> str:
    """Return the first difference between tensors of a program and those of the base's, in words; empty if there is none.

    Args:
        what: of the tensors, such as "input".
        ours: of the new program.
        theirs: of the base's.
    """
    if reason := find_other_names(f"{what}s", [its.name for its in ours], [its.name for its in theirs]):
        return reason
    for one, other in zip(ours, theirs, strict=True):
        if (one.dtype, _plain(one.shape)) != (other.dtype, _plain(other.shape)):
            return f"{what} {one.name!r} is {_say(one)}, and {_say(other)} in the base"
    return ""


def find_other_names(what: str, ours: Sequence[str], theirs: Sequence[str]) -> str:
    """Return the first difference between two lists of names, in words; empty if there is none."""
    if lacking := [name for name in theirs if name not in ours]:
        return f"the {what} lack {lacking[0]!r}, which the base has"
    if surplus := [name for name in ours if name not in theirs]:
        return f"the {what} have {surplus[0]!r}, which the base lacks"
    if list(ours) != list(theirs):
        place = next(place for place, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        return (
            f"the {what} are in another order: number {place + 1} is {ours[place]!r}, and {theirs[place]!r} in the base"
        )
    return ""


def find_other_dense(ours: DenseEntry, theirs: DenseEntry) -> str:
    """Return the first difference between two dense programs seen from outside, in words; empty if there is none."""
    return (
        find_other_names("blocks of the dense arch", ours.input_order, theirs.input_order)
        or find_other_tensors("input", ours.inputs, theirs.inputs)
        or find_other_tensors("output", ours.outputs, theirs.outputs)
    )


def find_other_score(ours: ScoreEntry, theirs: ScoreEntry) -> str:
    """Return the same of two score programs."""
    found = find_other_tensors("input", ours.inputs, theirs.inputs) or find_other_tensors(
        "output", ours.outputs, theirs.outputs
    )
    return found and f"of the score program, {found}"


def find_other_contract(ours: ServingEntry, theirs: ServingEntry) -> str:
    """Return the first difference between what two serving contracts make of features, in words; empty if there is none.

    Columns of an input that are not known in one of them are passed over.
    """
    before = {entry.name: entry for entry in theirs.inputs}
    for entry in ours.inputs:
        other = before.get(entry.name)
        if other is None or entry.name in list_unknown(ours, theirs, [entry.name]):
            continue
        columns = [
            [(its.begin, its.end, its.feature, its.tensor, its.first) for its in one.columns] for one in (entry, other)
        ]
        for place, (one, two) in enumerate(zip(*columns, strict=False)):
            if one != two:
                told = [its[2] if its[2] is not msgspec.UNSET else its[3] for its in (one, two)]
                return (
                    f"of input {entry.name!r}, columns {one[0]} to {one[1] - 1} are of {told[0]!r}, and "
                    f"number {place + 1} of the base is of {told[1]!r}"
                )
        if len(columns[0]) != len(columns[1]):
            return f"input {entry.name!r} is made of {len(columns[0])} features or tensors, and of {len(columns[1])} in the base"
    features = {feature.name: feature for feature in theirs.features}
    for feature in ours.features:
        known = features.get(feature.name)
        if known is not None and (feature.table, feature.slot, feature.dim) != (known.table, known.slot, known.dim):
            return (
                f"feature {feature.name!r} looks up {feature.slot} of table {feature.table!r} ({feature.dim} values), and "
                f"{known.slot} of {known.table!r} ({known.dim} values) in the base"
            )
        if known is not None and (reason := _find_other_ids(feature, known)):
            return f"feature {feature.name!r} {reason}"
    return ""


def _find_other_ids(ours: FeatureEntry, theirs: FeatureEntry) -> str:
    """Return the first difference between what a feature does with ids, from the request to its columns; empty if there is none.

    What one of the two does not know is passed over.
    """
    for field, what in _OF_IDS.items():
        one, other = getattr(ours, field), getattr(theirs, field)
        if msgspec.UNSET not in (one, other) and one != other:
            return f"has the {what} {_say_value(one)}, and {_say_value(other)} in the base"
    return ""


def _say_value(value: object) -> str:
    return "none" if value in (None, ()) else msgspec.json.encode(value).decode()


def list_unknown(ours: ServingEntry | None, theirs: ServingEntry | None, inputs: Sequence[str]) -> list[str]:
    """Return the inputs of which one of two contracts does not say which features are in their columns."""
    known = [
        {entry.name for entry in one.inputs if entry.unknown is msgspec.UNSET} if one is not None else set()
        for one in (ours, theirs)
    ]
    return [name for name in inputs if not all(name in its for its in known)]


def _plain(shape: Sequence[int | str]) -> Shape:
    """Return a shape without the names of its free sizes, which do not matter."""
    return tuple(size if isinstance(size, int) else "" for size in shape)


def _say(entry: TensorEntry) -> str:
    return f"{entry.dtype} [{', '.join(map(str, entry.shape))}]"
