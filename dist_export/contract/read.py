"""Read from the program of a sparse arch what each dense input is made of, and try it on made-up rows and batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch

from dist_export.contract.candidates import (
    compute,
    find_lists,
    is_looked_up,
    list_features,
    list_poolings,
    name_feature,
)
from dist_export.contract.graph import Ancestry, GraphFacts, Lookup, list_looked_up, read_graph
from dist_export.contract.made_up import DescribesRows, Lists, MadeUpRows, Trial, Trials
from dist_export.formats.serving_entries import ColumnsEntry, DenseInputEntry, FeatureEntry
from dist_export.humanize import few
from dist_export.score.block_program import BlockProgram

_NUM_TRIALS = 4
_NUM_EXAMPLES = 256
"""Trials have so many examples together, if that takes no more than the most trials. One example hides much of what is done."""
_MAX_TRIALS = 32
"""More are run until each input has had all values that matter."""
_ATOL, _RTOL = 1e-5, 1e-4
_HALF_TOLERANCE = 2e-2
"""Of blocks that are float16 or bfloat16."""


@dataclass(slots=True)
class Reading:
    """What was read: the features that some known columns come from, and the inputs of the dense arch."""

    features: dict[str, FeatureEntry] = field(default_factory=dict)
    inputs: dict[str, DenseInputEntry] = field(default_factory=dict)
    lists: list[Lists] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Hit:
    """Columns of a dense input that are explained."""

    begin: int
    end: int
    feature: FeatureEntry | None = None
    tensor: str = ""
    first: int = 0


def read_blocks_of(traced: BlockProgram, kinds: DescribesRows, conditions: Sequence[str] = ()) -> Reading:
    """Return what the program of a sparse arch does with ids, where that is a plain lookup, pooling and concatenation. Rank 0.

    A guess that the graph allows is taken if, on batches of made-up ids and lists with made-up rows, it gives what the program
    gives. Anything else is unknown, with a reason. ``conditions``: what the model's code demands of sizes.
    The contract has no word for that.
    """
    rows, told = MadeUpRows(kinds), {jagged.lengths for jagged in traced.batch.jagged}
    ids = [name for name in list_looked_up(traced) if name not in told and _may_be_ids(traced.tensors[name])]
    lists = find_lists(traced, ids)
    bounds = {its.bounds for its in lists}
    ids = [name for name in ids if name not in bounds]
    facts = read_graph(traced, not_ids=told | bounds)
    trials = Trials(
        traced, rows, lists=lists, ids=ids, numbers={name: facts.numbers_of(name) for name in traced.tensors}
    )
    ran = run_trials(trials)
    reading = Reading(lists=lists)
    reader = _Reader(traced, facts, rows, reading, ran, trials)
    for name in traced.blocks:
        reading.inputs[name] = reader.read(name, conditions)
    return reading


def _may_be_ids(tensor: torch.Tensor) -> bool:
    return tensor.dim() > 0 and not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def run_trials(trials: Trials) -> list[Trial]:
    """Return made-up batches; with the sizes of the sample if the sparse arch refuses others."""
    for vary_sizes in (True, False):
        if not vary_sizes:
            trials.forget_lengths()
        ran: list[Trial] = []
        for number in range(_MAX_TRIALS):
            is_enough = number >= _NUM_TRIALS and sum(trial.num_examples for trial in ran) >= _NUM_EXAMPLES
            if (is_enough and not trials.untried) or (number >= _NUM_TRIALS and not ran):
                break
            trial = trials.run(vary_sizes=vary_sizes)
            ran += [] if trial is None else [trial]
        if ran:
            return ran
    return []


class _Reader:
    def __init__(
        self,
        traced: BlockProgram,
        facts: GraphFacts,
        rows: MadeUpRows,
        reading: Reading,
        trials: Sequence[Trial],
        more: Trials,
    ) -> None:
        self._traced = traced
        self._facts = facts
        self._rows = rows
        self._reading = reading
        self._trials = trials
        self._more = more
        self._untried = frozenset(more.untried)
        self._computed: dict[tuple[Any, ...], np.ndarray | None] = {}
        self._short: dict[tuple[str, int], Trial | None] = {}

    def read(self, name: str, conditions: Sequence[str]) -> DenseInputEntry:
        """Return what one input of the dense arch is made of."""
        tensor = self._block(name)
        entry = DenseInputEntry(name=name, dtype=str(tensor.dtype).removeprefix("torch."), dims=tensor.dim())
        if reason := f"the sparse arch takes only some sizes ({few(conditions)})" if conditions else self._refuse(name):
            return msgspec.structs.replace(entry, unknown=reason)
        block, outputs = self._facts.blocks[name], [self._as_columns(trial.blocks[name]) for trial in self._trials]
        is_fixed = all(isinstance(size, int) for size in tensor.shape[1:])
        hits = [*self._find_tensors(block, outputs, tensor.dtype)]
        hits += [
            hit for lookup in self._lookups_of(block) for hit in self._find_features(lookup, block, outputs, is_fixed)
        ]
        width = outputs[0].shape[-1]
        chosen, at = [], 0
        while at < width:
            here = [hit for hit in hits if hit.begin == at]
            if not here:
                until = min((hit.begin for hit in hits if hit.begin > at), default=width)
                return msgspec.structs.replace(entry, unknown=self._explain(block, at, until, width))
            chosen.append(max(here, key=lambda hit: hit.end - hit.begin))
            at = chosen[-1].end
        if unexplained := sorted(block.inputs - {name for hit in chosen for name in _inputs_of(hit)}):
            return msgspec.structs.replace(
                entry, unknown=f"its columns can be explained, but it is computed from {few(unexplained)}, too"
            )
        return msgspec.structs.replace(entry, columns=tuple(self._describe(hit, name) for hit in chosen))

    def _block(self, name: str) -> torch.Tensor:
        nodes = {str(node): node for node in self._traced.program.graph.nodes}
        output = self._traced.program.graph_signature.user_outputs[self._traced.blocks.index(name)]
        value = nodes[str(output)].meta["val"]
        assert isinstance(value, torch.Tensor)
        return value

    def _refuse(self, name: str) -> str:
        if not self._trials:
            return "the sparse arch refuses other ids than those of the sample, so nothing could be tried"
        if name not in self._facts.blocks:
            return "it is no tensor of the sparse arch's graph"
        if state := self._facts.blocks[name].state:
            return f"it is computed from parameters or buffers of the sparse arch ({few(sorted(state))})"
        if others := self._facts.blocks[name].others:
            return f"it is more than lookups, pooling and columns side by side ({few(sorted(others))})"
        if untried := sorted(self._untried & self._facts.blocks[name].inputs):
            return f"there are too many numbers that values of {few(untried)} may be compared with"
        if not 1 <= self._block(name).dim() <= 3:
            return "it has more dimensions than (batch, longest, columns)"
        return ""

    def _explain(self, block: Ancestry, begin: int, end: int, width: int) -> str:
        which = "it" if (begin, end) == (0, width) else f"what is in its columns {begin} to {end - 1}"
        made_of = [f"table {table!r}" for table in sorted(block.lookups)] + [
            f"input {name!r}" for name in sorted(block.inputs)
        ]
        told = few(made_of) or "nothing"
        return (
            f"{which} is no column of the request and no plain pooling of a table's rows (it is computed from {told})"
        )

    @staticmethod
    def _as_columns(block: np.ndarray) -> np.ndarray:
        return block[:, None] if block.ndim == 1 else block

    def _lookups_of(self, block: Ancestry) -> Iterator[Lookup]:
        seen = set()
        for lookup in self._facts.lookups:
            if lookup.table in block.lookups and lookup.ids.inputs <= block.inputs and lookup not in seen:
                seen.add(lookup)
                yield lookup

    def _find_tensors(self, block: Ancestry, outputs: list[np.ndarray], dtype: torch.dtype) -> Iterator[_Hit]:
        """Yield the columns that go from the request to the block as they are, as many neighbours as there are."""
        for name in sorted(block.inputs):
            given = [self._as_columns(trial.inputs[name]) for trial in self._trials if trial.inputs[name].ndim]
            if len(given) != len(outputs) or any(
                its.shape[:-1] != found.shape[:-1] for its, found in zip(given, outputs, strict=True)
            ):
                continue
            matches = [
                _columns_equal(torch.from_numpy(its).to(dtype).to(torch.float32).numpy(), found)
                for its, found in zip(given, outputs, strict=True)
            ]
            pairs = set.intersection(*matches)
            for first, at in sorted(pairs):
                if (first - 1, at - 1) in pairs:
                    continue
                count = 1
                while (first + count, at + count) in pairs:
                    count += 1
                yield _Hit(at, at + count, tensor=name, first=first)

    def _find_features(
        self, lookup: Lookup, block: Ancestry, outputs: list[np.ndarray], is_fixed: bool
    ) -> Iterator[_Hit]:
        """Yield the columns that are the pooled rows of a lookup, with the plainest feature that explains them.

        ``is_fixed``: the block has the same width for all batches, so no list in it is as long as the longest of its batch.
        """
        shape, dtype = self._rows.describe_rows(lookup.table)
        dim = int(np.prod(shape))
        explained: set[tuple[int, int]] = set()
        half = dtype in (torch.float16, torch.bfloat16)
        for candidate in list_features(lookup, block, self._traced, self._reading.lists, dim):
            if not all(is_looked_up(candidate, trial) for trial in self._trials):
                continue
            for feature in list_poolings(candidate, self._traced, block):
                if is_fixed and _is_as_long_as_lists(feature):
                    continue
                for columns in self._find_columns(feature, outputs, is_half=half):
                    if columns not in explained:
                        explained.add(columns)
                        yield _Hit(*columns, feature)

    def _find_columns(
        self, feature: FeatureEntry, outputs: list[np.ndarray], *, is_half: bool
    ) -> Iterator[tuple[int, int]]:
        begins: list[int] | None = None
        width = 0
        for trial, found in zip(self._trials, outputs, strict=True):
            made = self._compute(feature, trial)
            if made is not None and made.ndim == 3 and found.ndim == 2:
                made = made.reshape(len(made), -1)
            if made is None or made.shape[:-1] != found.shape[:-1] or (begins is not None and made.shape[-1] != width):
                return
            width = made.shape[-1]
            begins = _find_begins(made, found, is_half=is_half) if begins is None else begins
            begins = [at for at in begins if _is_near(made, found[..., at : at + width], is_half=is_half)]
            if not begins:
                return
        yield from ((at, at + width) for at in begins or ())

    def _compute(self, feature: FeatureEntry, trial: Trial) -> np.ndarray | None:
        """Return the columns of a feature in a trial, from memory where it was asked before."""
        key = (*_what_it_is(feature), trial.turn)
        if key not in self._computed:
            self._computed[key] = compute(feature, trial, self._rows)
        return self._computed[key]

    def _find_shortest(self, hit: _Hit, name: str) -> int:
        """Return how long rows of a padded tensor must be, so that the columns of a hit are the model's."""
        assert hit.feature is not None
        assert hit.feature.ids is not msgspec.UNSET
        shape = self._traced.shapes[hit.feature.ids.values]
        if len(shape) != 2 or hit.feature.ids.column is not msgspec.UNSET:
            return 0
        if isinstance(shape[1], int):
            return shape[1]  # the program takes no other length, so no shorter one can be tried
        is_half = self._rows.describe_rows(hit.feature.table)[1] in (torch.float16, torch.bfloat16)
        for length in (1, 0):
            trial = self._try_length(str(shape[1]), length)
            made = None if trial is None else self._compute(hit.feature, trial)
            if trial is None or made is None:
                return length + 1
            found = self._as_columns(trial.blocks[name])[..., hit.begin : hit.end]
            if not _is_near(made, found, is_half=is_half):
                return length + 1
        return 0

    def _try_length(self, symbol: str, length: int) -> Trial | None:
        """Return a batch in which padded lists have so many ids; None if the sparse arch refuses it."""
        if (symbol, length) not in self._short:
            self._short[symbol, length] = self._more.run(vary_sizes=True, fixed={symbol: length})
        return self._short[symbol, length]

    def _describe(self, hit: _Hit, block: str) -> ColumnsEntry:
        if hit.feature is None:
            return ColumnsEntry(begin=hit.begin, end=hit.end, tensor=hit.tensor, first=hit.first)
        features = self._reading.features
        found = msgspec.structs.replace(hit.feature, shortest=self._find_shortest(hit, block))
        name = {_what_it_is(one): name for name, one in features.items()}.get(_what_it_is(found))
        if name is None:
            name = name_feature(found, self._reading.lists, features)
            stated = dict.fromkeys(("table", "ids", "pooling", "padding_id", "transforms"), "program")
            features[name] = msgspec.structs.replace(found, name=name, stated_by=stated)
        return ColumnsEntry(begin=hit.begin, end=hit.end, feature=name)


def _is_as_long_as_lists(feature: FeatureEntry) -> bool:
    """Whether there are as many rows of a feature side by side as the longest list of a batch has ids."""
    assert feature.ids is not msgspec.UNSET
    has_lists = feature.ids.lengths is not msgspec.UNSET or feature.ids.offsets is not msgspec.UNSET
    return has_lists and feature.pooling == "none" and feature.longest is msgspec.UNSET


def _inputs_of(hit: _Hit) -> list[str]:
    """Return the inputs that columns come from."""
    if hit.feature is None:
        return [hit.tensor]
    ids = hit.feature.ids
    assert ids is not msgspec.UNSET
    return [name for name in (ids.values, ids.lengths, ids.offsets, ids.weights) if name is not msgspec.UNSET]


def _what_it_is(feature: FeatureEntry) -> tuple[Any, ...]:
    its = feature.table, feature.ids, feature.pooling, feature.padding_id, feature.transforms
    return *its, feature.longest, feature.shortest


def _find_begins(made: np.ndarray, found: np.ndarray, *, is_half: bool) -> list[int]:
    """Return where columns may begin that are near to ``made``: where its first one is."""
    if not made.size:
        return []
    rtol, atol = (_HALF_TOLERANCE, _HALF_TOLERANCE) if is_half else (_RTOL, _ATOL)
    rows = tuple(range(found.ndim - 1))
    is_there = np.isclose(made[..., :1], found[..., : found.shape[-1] - made.shape[-1] + 1], rtol=rtol, atol=atol)
    begins: list[int] = np.flatnonzero(is_there.all(axis=rows)).tolist()
    return begins


def _is_near(made: np.ndarray, found: np.ndarray, *, is_half: bool) -> bool:
    if made.shape != found.shape:
        return False
    rtol, atol = (_HALF_TOLERANCE, _HALF_TOLERANCE) if is_half else (_RTOL, _ATOL)
    if made.size and not np.isclose(made[..., 0], found[..., 0], rtol=rtol, atol=atol).all():
        return False
    return bool(np.isclose(made, found, rtol=rtol, atol=atol).all())


def _columns_equal(given: np.ndarray, found: np.ndarray) -> set[tuple[int, int]]:
    """Return the pairs (column of ``given``, column of ``found``) with the same values."""
    found = found.astype(np.float32)
    columns: dict[bytes, list[int]] = {}
    for place in range(found.shape[-1]):
        columns.setdefault(np.ascontiguousarray(found[..., place]).tobytes(), []).append(place)
    return {
        (first, at)
        for first in range(given.shape[-1])
        for at in columns.get(np.ascontiguousarray(given[..., first]).tobytes(), ())
    }
