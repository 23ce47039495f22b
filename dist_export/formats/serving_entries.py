"""The entries of the serving contract in ``manifest.json``: what a server does with ids before it calls the dense program."""

from __future__ import annotations

from typing import Literal

import msgspec

from dist_export.formats.delta_entries import Count

Pooling = Literal["none", "sum", "mean", "max"]


class TransformEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One step from the id in the request to the id that is looked up."""

    op: Literal["modulo", "mask", "add", "from_end"]
    """``modulo``: the remainder with the sign of ``value``, as in Python; ``mask``: bitwise and; ``add``; ``from_end``: a
    negative id counts from ``value``, so ``value`` is added to it."""
    value: int


class IdsEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a feature's ids are among the inputs of the score program, or of a batch of the dataset."""

    values: str
    """The tensor that holds the ids. Without ``lengths`` and ``offsets`` its rows are the examples: (batch,) has one id each,
    (batch, length) a list each."""
    column: Count | msgspec.UnsetType = msgspec.UNSET
    """The only column of ``values`` that counts, from 0: it holds one id for each example."""
    lengths: str | msgspec.UnsetType = msgspec.UNSET
    """The tensor with the length of each list, (num_keys * batch,): ``values`` holds the lists one after the other."""
    offsets: str | msgspec.UnsetType = msgspec.UNSET
    """The tensor with where each list begins within ``values``, (num_keys * batch,)."""
    has_end: bool = False
    """Whether ``offsets`` has one number more: the end of the last list. Without it, that is the end of ``values``."""
    key: Count = 0
    """Of ``num_keys`` runs of lists, the one that is this feature's."""
    num_keys: Count = 1
    """Runs of ``batch`` lists in ``lengths`` or ``offsets``, one after the other."""
    weights: str | msgspec.UnsetType = msgspec.UNSET
    """The tensor with one factor for each id: its row is multiplied by it."""


class FeatureEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A feature: how its ids become columns."""

    name: str
    table: str
    """A table of the package."""
    slot: str = "embedding"
    dim: Count
    """Columns of a row."""
    ids: IdsEntry | msgspec.UnsetType = msgspec.UNSET
    """Absent if it is not known in which tensor of a batch the ids are."""
    pooling: Pooling | msgspec.UnsetType = msgspec.UNSET
    """How the rows of a list become one. ``none``: they stay a list; of one id for each example, it is its row. An empty list
    gives zeros. Absent if it is not known."""
    padding_id: int | msgspec.UnsetType | None = msgspec.UNSET
    """The id that fills lists up, as it is in the request: it does not count, and where ``pooling`` is ``none`` its row is zeros.
    null if no id does. Absent if it is not known."""
    transforms: tuple[TransformEntry, ...] | msgspec.UnsetType = msgspec.UNSET
    """From the id in the request to the id that is looked up, in order. Absent if it is not known."""
    longest: Count | msgspec.UnsetType = msgspec.UNSET
    """The length of the longest list, if the model or fg fixes it. Where ``pooling`` is ``none``, lists of different lengths are
    filled up with zeros or cut to it; if it is absent, they are filled up to the longest of the batch."""
    shortest: Count = 0
    """The least number of columns of a padded tensor of ids: with fewer the model gives NaN, fails, or could not be tried."""
    default_row: str | tuple[float, ...] | msgspec.UnsetType = msgspec.UNSET
    """The row of an out-of-vocabulary id, as :attr:`TableEntry.default_row`."""
    stated_by: dict[str, str] = {}
    """Which source states which of these fields: ``fg``, ``collection``, ``program`` or ``settings``."""

    @property
    def is_known(self) -> bool:
        """Whether all that computes its columns is known."""
        return msgspec.UNSET not in (self.ids, self.pooling, self.padding_id, self.transforms)


class ColumnsEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Neighbouring columns of a dense input, from one feature or from a tensor of the request."""

    begin: Count
    end: Count
    """Columns ``begin`` to ``end`` - 1 of the last dimension."""
    feature: str | msgspec.UnsetType = msgspec.UNSET
    """The feature whose columns these are, all of them."""
    tensor: str | msgspec.UnsetType = msgspec.UNSET
    """Or the tensor of the request that goes through as it is."""
    first: Count = 0
    """The first column of ``tensor``."""


class DenseInputEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One input of the dense program."""

    name: str
    dtype: str
    """torch's name, such as float32."""
    dims: Count
    """The number of its dimensions: 1 is (batch,), 2 is (batch, columns), 3 is (batch, longest, columns)."""
    columns: tuple[ColumnsEntry, ...] = ()
    """In order. Together they are the whole input, unless ``unknown`` says otherwise."""
    unknown: str | msgspec.UnsetType = msgspec.UNSET
    """Why the contract does not say how this input comes about; absent if it does."""


class ReplayEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The contract carried out with numpy on the sample, with rows of the written shards, against the model."""

    rows: Count
    """Examples of the sample."""
    inputs: tuple[str, ...]
    """The dense inputs that were computed from ids; the others came from the model's sparse arch."""
    max_abs: dict[str, float]
    """By output of the dense program, the largest difference from the model's."""


class ServingEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The serving contract: from ids to the inputs of the dense program.

    :mod:`dist_export.package.dense_inputs` carries it out.
    """

    features: tuple[FeatureEntry, ...]
    inputs: tuple[DenseInputEntry, ...]
    """One for each input of the dense program, in its order."""
    replay: ReplayEntry | None = None
    """Null if no input is known, so there was nothing to compare."""

    @property
    def is_known(self) -> bool:
        """Whether every input of the dense program is known."""
        return all(entry.unknown is msgspec.UNSET for entry in self.inputs)
