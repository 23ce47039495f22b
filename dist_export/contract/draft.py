"""Join what the sources state to one contract. Sources that contradict each other are an error that names both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch

from dist_export.config.serving import StatedContract, StatedFeature
from dist_export.contract.read import Reading
from dist_export.contract.statements import FeatureStatement, Statements
from dist_export.errors import ConfigError
from dist_export.formats.serving_entries import ColumnsEntry, DenseInputEntry, FeatureEntry, IdsEntry, ServingEntry
from dist_export.manifest import TableEntry
from dist_export.score.inputs import Jagged

_PROGRAM = "program"
_SAID = {
    "fg": "fg.json",
    "collection": "the collection's config",
    _PROGRAM: "the model's own sparse arch",
    "settings": "serving",
}


class Draft:
    """The contract while it is put together. Rank 0."""

    def __init__(self, reading: Reading, tensors: Mapping[str, torch.Tensor], jagged: Sequence[Jagged]) -> None:
        """``tensors``: of the sample, flat. ``jagged``: lists whose pairing the batch tells."""
        self._features = dict(reading.features)
        self._inputs = dict(reading.inputs)
        self._tensors = tensors
        self._jagged = jagged
        self._named: set[str] = set()
        """Features that mc names by their columns."""
        self._filled: set[str] = set()
        """Dense inputs whose columns fg or the settings state, because the program does not tell."""

    def add_fg(self, statements: Statements) -> None:
        """Take in what fg and mc state. ConfigError where the model does otherwise."""
        blocks = {
            name: members
            for name, members in statements.blocks.items()
            if name in self._inputs and self._inputs[name].dims > 1
        }
        unknown = [name for name in blocks if self._inputs[name].unknown is not msgspec.UNSET]
        for name, members in blocks.items():
            if name not in unknown:
                self._name_features(name, members, statements.features)
        for feature, statement in statements.features.items():
            if not statement.is_number:
                self._state(feature, statement)
        for name in unknown:
            if all(member in statements.features for member, _ in blocks[name]):
                self._fill_input(name, blocks[name])

    def add_collections(self, statements: Mapping[str, FeatureStatement]) -> None:
        """Take in what the configs of collections state."""
        for name, statement in statements.items():
            self._state(name, statement)

    def add_settings(self, stated: StatedContract, dims: Mapping[str, int] | None = None) -> None:
        """Take in what the user states. ConfigError where another source says otherwise, or a name is unknown.

        ``dims``: the width of each table of the package; None where all features are known.
        """
        for name, its in stated.features.items():
            self._add_stated(name, its)
        if dims is not None:  # columns follow from it
            self._set_dims(dims)
        for name, members in stated.inputs.items():
            if name not in self._inputs:
                known = ", ".join(self._inputs) or "none"
                raise ConfigError(f"serving.inputs: {name!r} is no input of the dense arch; they are {known}")
            self._fill_input(name, [(member, self._width_of(name, member)) for member in members])

    def is_stated_by_user(self, entry: DenseInputEntry) -> bool:
        """Whether fg or the settings state what an input is made of, so that they are wrong if it differs from the model's."""
        features = [self._features[its.feature] for its in entry.columns if isinstance(its.feature, str)]
        fields = ("ids", "pooling", "padding_id", "transforms")
        return entry.name in self._filled or any(
            feature.stated_by.get(field) in ("fg", "settings") for feature in features for field in fields
        )

    def finish(self, tables: Mapping[str, TableEntry], inputs: Sequence[str]) -> ServingEntry:
        """Return the contract for these inputs of the dense program."""
        entries = [self._finish_input(self._inputs[name]) for name in inputs]
        used = {columns.feature for entry in entries for columns in entry.columns}
        features = [
            msgspec.structs.replace(feature, default_row=tables[feature.table].default_row)
            for name, feature in sorted(self._features.items())
            if feature.table in tables and (name in used or not feature.is_known)
        ]
        return ServingEntry(features=tuple(features), inputs=tuple(entries))

    # ---- fg and mc ----

    def _name_features(
        self, name: str, members: Sequence[tuple[str, int]], features: Mapping[str, FeatureStatement]
    ) -> None:
        """Give the features of one known input the names that mc has for their columns. ConfigError if they do not fit."""
        at, columns = 0, list(self._inputs[name].columns)
        for member, width in members:
            own = next((its for its in columns if its.begin == at and its.feature is not msgspec.UNSET), None)
            statement = features.get(member)
            if statement is not None and not statement.is_number:
                if own is None or own.end != at + width:
                    raise ConfigError(
                        f"mc: block {name!r} has feature {member!r} in columns {at} to {at + width - 1}, but there "
                        f"{_SAID[_PROGRAM]} has {self._say_columns(columns, at)}. Mend mc, or set serving: off"
                    )
                assert isinstance(own.feature, str)
                columns[columns.index(own)] = msgspec.structs.replace(own, feature=self._rename(own.feature, member))
            at += width
        self._inputs[name] = msgspec.structs.replace(self._inputs[name], columns=tuple(columns))

    def _rename(self, old: str, new: str) -> str:
        """Give a feature the name that fg has for it. Returns the name."""
        if old == new:
            self._named.add(new)
        if old == new or new in self._features:
            return new if old == new or _is_same(self._features[old], self._features[new]) else old
        self._named.add(new)
        self._features[new] = msgspec.structs.replace(self._features.pop(old), name=new)
        for name, entry in self._inputs.items():
            columns = [
                msgspec.structs.replace(its, feature=new) if its.feature == old else its for its in entry.columns
            ]
            self._inputs[name] = msgspec.structs.replace(entry, columns=tuple(columns))
        return new

    def _say_columns(self, columns: Sequence[ColumnsEntry], at: int) -> str:
        its = next((one for one in columns if one.begin <= at < one.end), None)
        if its is None:
            return "no columns"
        what = f"feature {its.feature!r}" if its.feature is not msgspec.UNSET else f"tensor {its.tensor!r}"
        return f"{what} in columns {its.begin} to {its.end - 1}"

    def _state(self, name: str, statement: FeatureStatement) -> None:
        """Take in a statement of fg or a collection. ConfigError where another source says otherwise."""
        stated = {
            field: value
            for field, value in (
                ("table", statement.table),
                ("dim", statement.dim),
                ("pooling", statement.pooling),
                ("longest", statement.longest),
            )
            if value is not None
        }
        feature = self._features.get(name)
        if feature is not None and name not in self._named and statement.table not in (None, feature.table):
            return  # the tensor of that name is looked up in several tables
        if feature is not None and feature.pooling == "none":
            stated.pop("longest", None)  # the program tells what it fills lists up to
        if feature is None:
            if statement.table is None or statement.dim is None:
                return
            feature = FeatureEntry(name=name, table=statement.table, dim=statement.dim, ids=self._find_ids(name))
            if feature.ids is not msgspec.UNSET:
                feature = msgspec.structs.replace(feature, stated_by={"ids": statement.source})
        self._features[name] = self._agree(feature, stated, statement.source)

    def _agree(self, feature: FeatureEntry, stated: Mapping[str, Any], source: str) -> FeatureEntry:
        """Return the feature with what a source states of it. ConfigError where another one says otherwise."""
        by = dict(feature.stated_by)
        for field, value in stated.items():
            known = getattr(feature, field)
            is_other = (
                known is not msgspec.UNSET and known != value and not self._is_one_id(feature, field, (known, value))
            )
            if is_other and source == "collection":
                continue  # the arch pools what the collection gives once more; what it does was tried
            if is_other:
                other = _SAID[by.get(field, _PROGRAM)]
                raise ConfigError(
                    f"feature {feature.name!r}: {_SAID[source]} says that its {field} is {_say(value)}, {other} that it is "
                    f"{_say(known)}. Mend the one that is wrong, or set serving: off"
                )
            if known is msgspec.UNSET:
                feature = msgspec.structs.replace(feature, **{field: value})
            by[field] = source if source != "settings" or known is msgspec.UNSET else by.get(field, source)
        return msgspec.structs.replace(feature, stated_by=dict(sorted(by.items())))

    def _is_one_id(self, feature: FeatureEntry, field: str, values: tuple[Any, Any]) -> bool:
        """Whether a feature has one id for each example, so that any pooling of it is the same."""
        ids = feature.ids
        if field != "pooling" or ids is msgspec.UNSET or "none" not in values:
            return False
        if ids.lengths is not msgspec.UNSET or ids.offsets is not msgspec.UNSET:
            return False
        tensor = self._tensors.get(ids.values)
        return ids.column is not msgspec.UNSET or (tensor is not None and (tensor.dim() == 1 or tensor.shape[1] == 1))

    # ---- the settings ----

    def _add_stated(self, name: str, its: StatedFeature) -> None:
        ids = IdsEntry(values=its.ids) if isinstance(its.ids, str) else its.ids
        fields: dict[str, Any] = {"table": its.table, "ids": ids, "pooling": its.pooling, "padding_id": its.padding_id}
        fields |= {"transforms": its.transforms, "longest": its.longest}
        stated = {field: value for field, value in fields.items() if value is not msgspec.UNSET}
        feature = self._features.get(name)
        if feature is None:
            if its.table is msgspec.UNSET:
                known = ", ".join(sorted(self._features)) or "none"
                raise ConfigError(
                    f"serving.features: {name!r} is no known feature ({known}); a new one needs its table"
                )
            feature = FeatureEntry(name=name, table=its.table, dim=0, stated_by={"table": "settings"})
        for tensor in (ids.values, ids.lengths, ids.offsets, ids.weights) if isinstance(ids, IdsEntry) else ():
            if tensor is not msgspec.UNSET and tensor not in self._tensors:
                raise ConfigError(
                    f"serving.features.{name}.ids: the batch has no tensor {tensor!r}; it has {', '.join(self._tensors)}"
                )
        self._features[name] = self._agree(feature, stated, "settings")

    def _width_of(self, name: str, member: str) -> int:
        if member in self._features:
            return self._features[member].dim
        if member in self._tensors:
            tensor = self._tensors[member]
            return int(tensor.shape[-1]) if tensor.dim() > 1 else 1
        raise ConfigError(f"serving.inputs.{name}: {member!r} is neither a feature nor a tensor of the batch")

    def _set_dims(self, dims: Mapping[str, int]) -> None:
        """Give the features that the settings add the width of their tables. ConfigError for a table that is not there."""
        for name, feature in self._features.items():
            if feature.table not in dims:
                known = ", ".join(sorted(dims))
                raise ConfigError(
                    f"serving.features.{name}: the package has no table {feature.table!r}; it has {known}"
                )
            if not feature.dim:
                self._features[name] = msgspec.structs.replace(feature, dim=dims[feature.table])

    # ---- by name ----

    def _fill_input(self, name: str, members: Sequence[tuple[str, int]]) -> None:
        """Say that an input has the columns of these features or tensors, in order."""
        columns, at = [], 0
        for member, width in members:
            is_feature = member in self._features or member not in self._tensors
            feature, tensor = (member, msgspec.UNSET) if is_feature else (msgspec.UNSET, member)
            columns.append(ColumnsEntry(begin=at, end=at + width, feature=feature, tensor=tensor))
            at += width
        entry = self._inputs[name]
        if entry.unknown is msgspec.UNSET and [(c.begin, c.end, c.feature, c.tensor) for c in entry.columns] != [
            (c.begin, c.end, c.feature, c.tensor) for c in columns
        ]:
            raise ConfigError(
                f"serving.inputs.{name}: {_SAID[_PROGRAM]} has {_say_members(entry.columns)}, the setting "
                f"{_say_members(columns)}. Mend the setting, or set serving: off"
            )
        self._filled.update([name] if entry.unknown is not msgspec.UNSET else [])
        self._inputs[name] = msgspec.structs.replace(entry, columns=tuple(columns), unknown=msgspec.UNSET)

    def _find_ids(self, name: str) -> IdsEntry | msgspec.UnsetType:
        """Return where the ids of a feature are, by its name alone: a key of lists, or a tensor."""
        for jagged in self._jagged:
            if name in jagged.keys:
                key = jagged.keys.index(name)
                return IdsEntry(
                    values=jagged.values[0],
                    lengths=jagged.lengths,
                    key=key,
                    num_keys=jagged.num_keys,
                    weights=jagged.values[1] if len(jagged.values) > 1 else msgspec.UNSET,
                )
        tensor = self._tensors.get(name)
        if tensor is None or tensor.is_floating_point() or tensor.dim() not in (1, 2):
            return msgspec.UNSET
        return IdsEntry(values=name)

    # ---- the end ----

    def _finish_input(self, entry: DenseInputEntry) -> DenseInputEntry:
        if entry.unknown is not msgspec.UNSET:
            return entry
        for columns in entry.columns:
            name = columns.feature
            if name is msgspec.UNSET:
                continue
            feature = self._features.get(name)
            lacks = (
                ["anything"]
                if feature is None
                else [
                    field
                    for field in ("ids", "pooling", "padding_id", "transforms")
                    if getattr(feature, field) is msgspec.UNSET
                ]
            )
            if lacks:
                return msgspec.structs.replace(
                    entry,
                    columns=(),
                    unknown=f"of feature {name!r}, {', '.join(lacks)} is not known; state it in serving.features",
                )
        return entry


def _is_same(one: FeatureEntry, other: FeatureEntry) -> bool:
    return msgspec.structs.replace(one, name="", stated_by={}) == msgspec.structs.replace(other, name="", stated_by={})


def _say(value: Any) -> str:
    return repr(value) if isinstance(value, str | int) or value is None else msgspec.json.encode(value).decode()


def _say_members(columns: Sequence[ColumnsEntry]) -> str:
    return ", ".join(str(its.tensor if its.feature is msgspec.UNSET else its.feature) for its in columns) or "nothing"
