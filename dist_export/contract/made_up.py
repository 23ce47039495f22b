"""Made-up rows and batches, with which a sparse arch is tried: each id of each table has a row that no other has.

Each batch has rows of its own: a row whose values are all low would hide in each maximum.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from dist_export.archive.lookup_operator import bind, register_source
from dist_export.contract.operators import LONGEST_LIST
from dist_export.formats.recis import CHILD_BITS, mix
from dist_export.score.block_program import BlockProgram

_LARGEST = 1e6
"""Numbers of the graph that are larger are no values of made-up floats: sums would lose what is small beside them."""
_LARGEST_ID = 1 << 62
_MOST_IDS = 4
"""Most lists that are made up have so many ids at most. A few are as long as a number in the code, or longer."""

_MOST_LONG = 4
"""So many lists of a batch are that long."""


class DescribesRows(Protocol):
    """What is asked for the shape and dtype of a table's rows."""

    def describe_rows(self, table: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and the dtype of one row."""


class MadeUpRows:
    """Gives the lookup operator rows that are made of table, id and column. Notes which ids are asked for."""

    def __init__(self, kinds: DescribesRows) -> None:
        self._kinds = kinds
        self._seeds: dict[str, int] = {}
        self._turn = 0
        self.asked: dict[str, set[int]] = {}
        """Table -> the ids that were looked up since the last :meth:`renew`."""

    def renew(self) -> int:
        """Give each id another row, and forget which ids were asked for. Return the number of these rows."""
        self._turn += 1
        self.asked = {}
        return self._turn

    def describe_rows(self, table: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and the dtype of one row."""
        return self._kinds.describe_rows(table)

    def find_rows(self, table: str, ids: np.ndarray) -> torch.Tensor:
        """Return the rows (n, dim) of ids (int64, (n,)), each value between -1 and 1."""
        self.asked.setdefault(table, set()).update(ids.tolist())
        shape, dtype = self.describe_rows(table)
        return (
            torch.from_numpy(self._make(table, ids, int(np.prod(shape)), self._turn))
            .to(dtype)
            .reshape(len(ids), *shape)
        )

    def rows_of(self, table: str, ids: np.ndarray, turn: int) -> np.ndarray:
        """Return the rows that ids had in a turn as float32, (n, dim), without a note."""
        shape, dtype = self.describe_rows(table)
        made = torch.from_numpy(self._make(table, ids, int(np.prod(shape)), turn))
        return made.to(dtype).to(torch.float32).numpy()

    def _make(self, table: str, ids: np.ndarray, width: int, turn: int) -> np.ndarray:
        seed = self._seeds.setdefault(table, len(self._seeds) + 1)
        columns = mix(np.arange(1, width + 1, dtype=np.int64) * 1_000_003 + seed + (turn << 40))
        mixed = _scramble(_scramble(ids.view(np.uint64))[:, None] ^ columns[None]) >> np.uint64(40)
        made: np.ndarray = mixed.astype(np.float32) / np.float32(1 << 23) - 1
        return made


def _scramble(numbers: np.ndarray) -> np.ndarray:
    """Return 64 bits for each number (uint64), so that numbers with few different bits have nothing in common."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scrambled: np.ndarray = numbers ^ (numbers >> np.uint64(31))
    return scrambled


@dataclass(frozen=True, slots=True)
class Trial:
    """One made-up batch, and what the sparse arch gives for it."""

    inputs: dict[str, np.ndarray]
    blocks: dict[str, np.ndarray]
    """As float32, or int64."""
    asked: Mapping[str, set[int]]
    """Table -> ids that were looked up."""
    turn: int
    """Which rows ids had."""

    @property
    def num_examples(self) -> int:
        """Return the number of rows of its blocks."""
        return max((len(block) for block in self.blocks.values() if block.ndim), default=0)


@dataclass(frozen=True, slots=True)
class Lists:
    """Lists of different lengths, one after the other in tensors of ids and weights."""

    values: str
    """One of those tensors; the others have the same free size."""
    bounds: str
    kind: str
    """What ``bounds`` holds: ``lengths``; ``offsets``, where each list begins; ``ends``, the end of the last one too."""
    num_keys: int = 1
    keys: tuple[str, ...] = ()
    """The names of the runs of lists, where they have names."""


class Trials:
    """Runs the sparse arch on made-up batches."""

    def __init__(
        self,
        traced: BlockProgram,
        rows: MadeUpRows,
        *,
        lists: Sequence[Lists],
        ids: Sequence[str],
        numbers: Mapping[str, Collection[int | float]],
    ) -> None:
        """Take the program of a sparse arch.

        Args:
            traced: the program.
            rows: gives its rows.
            lists: those of different lengths.
            ids: the inputs that ids come from; they get ids of all sizes.
            numbers: by input, the numbers that may matter for its values. It gets each of them, and what is next to it.
        """
        self._traced = traced
        self._rows = rows
        self._lists = lists
        self._bounds = frozenset(its.bounds for its in lists)
        self._ids = frozenset(ids)
        self._random = np.random.default_rng(0)
        self._pools = {
            name: _Pool(numbers.get(name, ()), self._random, tensor.dtype) for name, tensor in traced.tensors.items()
        }
        for name in self._bounds:
            self._pools[name].keep_lengths()
        self._shapes = traced.shapes
        bind(traced.program.graph_module, register_source(rows))
        self._module = traced.program.module()

    @property
    def untried(self) -> list[str]:
        """The inputs that have not had all values that matter."""
        return [name for name, pool in self._pools.items() if pool.missing]

    def forget_lengths(self) -> None:
        """Try no further lengths: the sparse arch takes those of the sample alone."""
        for name in self._bounds:
            self._pools[name].missing.clear()

    def run(self, *, vary_sizes: bool, fixed: Mapping[str, int] | None = None) -> Trial | None:
        """Run a made-up batch. Return None if the sparse arch refuses it.

        Args:
            vary_sizes: whether lists get other lengths than in the sample.
            fixed: by symbol, lengths of padded lists that are not left to chance.
        """
        made = self._make_up(vary_sizes=vary_sizes, fixed=fixed or {})
        turn, found = self._rows.renew(), None
        with contextlib.suppress(RuntimeError, AssertionError, IndexError, ValueError), torch.no_grad():
            found = self._module(**{name: tensor.clone() for name, tensor in made.items()})
        if found is None:
            return None
        for name, pool in self._pools.items():
            if name in self._bounds:
                continue  # its numbers are tried as lengths
            pool.missing.difference_update(made[name].reshape(-1).tolist())
        values = [found] if isinstance(found, torch.Tensor) else list(found)
        blocks = {name: _as_numbers(value) for name, value in zip(self._traced.blocks, values, strict=True)}
        given = {name: _as_numbers(value) for name, value in made.items()}
        return Trial(given, blocks, dict(self._rows.asked), turn)

    def _make_up(self, *, vary_sizes: bool, fixed: Mapping[str, int]) -> dict[str, torch.Tensor]:
        sizes = self._known_sizes()
        bounds: dict[str, torch.Tensor] = {}
        lengths: dict[str, np.ndarray] = {}
        for its in self._lists if vary_sizes else ():
            size = str(self._shapes[its.values][0])
            sample = self._traced.tensors[its.bounds]
            num_lists = sample.numel() - (its.kind == "ends")
            if size not in lengths or len(lengths[size]) != num_lists:
                lengths[size] = self._make_lengths(num_lists, size)
            alike = next((one.values for one in self._traced.batch.jagged if its.values in one.values), (its.values,))
            for name in alike:  # such as weights that nobody reads, whose size no code compares
                sizes[str(self._shapes[name][0])] = int(lengths[size].sum())
            bounds[its.bounds] = _make_bounds(its.kind, lengths[size]).to(sample.dtype).reshape(sample.shape)
        for name in self._ids if vary_sizes else ():
            shape = self._shapes[name]
            if len(shape) == 2 and not isinstance(shape[1], int) and str(shape[1]).isidentifier():
                sizes[str(shape[1])] = int(self._random.integers(2, _MOST_IDS + 1))
        sizes |= fixed
        made = {}
        for name, sample in self._traced.tensors.items():
            shape = tuple(self._size(size, sizes, sample.shape[dim]) for dim, size in enumerate(self._shapes[name]))
            if name in self._bounds:
                made[name] = bounds.get(name, sample)
            else:
                made[name] = self._fill(name, sample, shape)
        return made

    def _make_lengths(self, num_lists: int, size: str) -> np.ndarray:
        """Return the lengths of so many lists that have ``size`` ids. Some are as long as numbers that were not tried yet."""
        pools = [self._pools[its.bounds] for its in self._lists if str(self._shapes[its.values][0]) == size]
        lengths = self._random.integers(0, _MOST_IDS + 1, num_lists)
        untried = sorted(set().union(*(pool.missing for pool in pools)))
        chosen = self._random.permutation(untried)[: min(_MOST_LONG, num_lists)]
        lengths[self._random.permutation(num_lists)[: len(chosen)]] = chosen
        for pool in pools:
            pool.missing.difference_update(chosen.tolist())
        return lengths

    def _known_sizes(self) -> dict[str, int]:
        return {
            str(size): int(self._traced.tensors[name].shape[dim])
            for name, shape in self._shapes.items()
            for dim, size in enumerate(shape)
        }

    def _size(self, size: Any, sizes: Mapping[str, int], of_sample: int) -> int:
        return size if isinstance(size, int) else sizes.get(str(size), int(of_sample))

    def _fill(self, name: str, sample: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        count, pool = int(np.prod(shape, dtype=np.int64)), self._pools[name]
        if sample.dtype == torch.bool:
            values: np.ndarray = self._random.integers(0, 2, count)
            pool.missing.clear()  # it has but two, and a batch has both
        elif not sample.is_floating_point() and not sample.is_complex():
            values = (
                self._make_ids(shape, pool) if name in self._ids else pool.mix_in(self._random.integers(0, 50, count))
            )
            if sample.dtype != torch.int64:
                info = torch.iinfo(sample.dtype)
                values = np.clip(values, info.min, info.max)
        else:
            values = pool.mix_in(self._random.standard_normal(count))
        return torch.from_numpy(np.ascontiguousarray(values)).to(sample.dtype).reshape(shape)

    def _make_ids(self, shape: tuple[int, ...], pool: _Pool) -> np.ndarray:
        """Return ids (n,): small ones, any ones, and those of the pool. Some lists are one id over and over."""
        count = int(np.prod(shape, dtype=np.int64))
        small = self._random.integers(0, 1000, count)
        large = self._random.integers(-_LARGEST_ID, _LARGEST_ID, count)
        ids = pool.mix_in(np.where(self._random.integers(0, 2, count) == 0, small, large))
        if len(shape) == 2 and count:
            lists = ids.reshape(shape)
            alike = np.flatnonzero(self._random.integers(0, 3, shape[0]) == 0)
            lists[alike] = pool.mix_in(lists[alike, 0].copy())[:, None]
        return ids


class _Pool:
    """Values that an input must have had before it is known what becomes of it."""

    def __init__(self, numbers: Collection[int | float], random: np.random.Generator, dtype: torch.dtype) -> None:
        self._random = random
        if dtype.is_floating_point:
            anchors = np.array([0.0, 1.0, *(float(number) for number in numbers)])
            near = np.concatenate([anchors, anchors * 1.001 + 1e-3, anchors * 0.999 - 1e-3])
            near = torch.from_numpy(near[np.abs(near) < _LARGEST]).to(dtype).double().numpy()
            self._values = near[np.isfinite(near)]
        else:
            whole = {math.floor(number) + step for number in numbers for step in (-1, 0, 1)} | {-1, 0, 1, 2}
            if CHILD_BITS in numbers:  # ids of coalesced tables: an id within each child
                whole |= {int(number) << CHILD_BITS | 1 for number in numbers if 0 < number < 1 << (62 - CHILD_BITS)}
            info = torch.iinfo(torch.int64 if dtype in (torch.bool, torch.uint64) or dtype.is_complex else dtype)
            lowest, highest = max(info.min, -_LARGEST_ID), min(info.max, _LARGEST_ID)
            self._values = np.array([number for number in sorted(whole) if lowest <= number <= highest], np.int64)
        self.missing = set(self._values.tolist())
        """Those that no batch had yet."""

    def keep_lengths(self) -> None:
        """Leave out what is no length of a list, and those that most lists have anyway."""
        self.missing = {number for number in self.missing if _MOST_IDS < number <= LONGEST_LIST}

    def mix_in(self, values: np.ndarray) -> np.ndarray:
        """Put values of the pool, missing ones first, in the place of about half of ``values``."""
        chosen = np.flatnonzero(self._random.integers(0, 2, len(values)))
        first = self._random.permutation(sorted(self.missing))[: len(chosen)]
        values[chosen] = self._random.choice(self._values, len(chosen))
        values[chosen[: len(first)]] = first
        return values


def _make_bounds(kind: str, lengths: np.ndarray) -> torch.Tensor:
    if kind == "lengths":
        return torch.from_numpy(lengths)
    ends = np.cumsum(lengths)
    return torch.from_numpy(ends - lengths if kind == "offsets" else np.concatenate([np.zeros(1, np.int64), ends]))


def _as_numbers(value: torch.Tensor) -> np.ndarray:
    plain = value.detach().cpu()
    found: np.ndarray = (plain.to(torch.float32) if plain.is_floating_point() else plain).numpy()
    return found
