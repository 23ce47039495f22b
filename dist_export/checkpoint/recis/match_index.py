"""Match the headers of a RecIS checkpoint with ``index`` and ``tensorkey.json``: which blocks are whose. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dist_export.checkpoint.metadata import DenseTensor
from dist_export.checkpoint.recis.assemble import SparseBlocks
from dist_export.checkpoint.recis.header_columns import HeaderColumns
from dist_export.errors import CheckpointError
from dist_export.formats.interning import Numbering
from dist_export.formats.recis import DENSE_SUFFIX, INDEX, TENSORKEY, Slice, parse_slice
from dist_export.formats.recis_index import Indexes, split_internal, split_stem


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class MatchedBlocks:
    """The outcome of :func:`match_blocks`."""

    sparse: SparseBlocks
    dense: tuple[DenseTensor, ...]
    row_indexed: tuple[str, ...]
    """Names of dense tensors that were saved without the suffix, under which RecIS cannot find them again."""


def match_blocks(headers: HeaderColumns, index: Indexes, *, where: tuple[str, ...], tensorkey: str) -> MatchedBlocks:
    """Say of each block whether it is a table's or a dense tensor, and that no index names one that is not there.

    Args:
        where: the paths of the files, for messages; ``tensorkey`` is that of tensorkey.json.

    Raises:
        CheckpointError: a block that one of the three has and another one lacks.
    """
    return _Matching(headers, index, where, tensorkey).match()


class _Matching:
    def __init__(self, headers: HeaderColumns, index: Indexes, where: tuple[str, ...], tensorkey: str) -> None:
        self._headers = headers
        self._index = index
        self._where = where
        self._tensorkey = tensorkey
        self._dense: dict[str, DenseTensor] = {}
        self._row_indexed: list[str] = []

    def match(self) -> MatchedBlocks:
        headers, index = self._headers, self._index
        self._check_nothing_is_missing()
        stems: Numbering[str] = Numbering(zip(index.stems, range(len(index.stems)), strict=True))
        texts: Numbering[str] = Numbering(zip(index.slices, range(len(index.slices)), strict=True))
        stem, part = index.stem[headers.place], index.slice[headers.place]
        stem[headers.is_row_indexed] = -1  # tensorkey.json goes by the name in the header, which is another one
        for row in np.flatnonzero(stem < 0).tolist():
            internal = self._name_by_hand(row)
            if internal is not None:
                before, _, behind = internal.rpartition("^")
                stem[row], part[row] = stems[before], texts[behind]
        rows = np.flatnonzero(stem >= 0)
        return MatchedBlocks(
            sparse=SparseBlocks(
                where=self._where,
                keys=self._keys(rows),
                file=headers.file[rows],
                offset=headers.begin[rows],
                dtype=headers.dtype[rows],
                rows=headers.rows[rows],
                inner=headers.inner[rows],
                inner_shapes=headers.inner_shapes,
                kind=stem[rows],
                kinds=tuple(split_stem(text) or ("", text) for text in stems),
                slice=part[rows],
                slices=tuple(parse_slice(text) or Slice(0, 0, 1) for text in texts),
            ),
            dense=tuple(self._dense.values()),
            row_indexed=tuple(self._row_indexed),
        )

    def _check_nothing_is_missing(self) -> None:
        headers, index = self._headers, self._index
        times = np.bincount(headers.place, minlength=len(index.keys))
        if times.max(initial=0) > 1:  # with and without the suffix
            row = int(np.flatnonzero(times[headers.place] > 1)[-1])
            raise CheckpointError(
                f"{self._where[headers.file[row]]} holds {self._key(row)!r}, a second dense tensor of that name"
                ". Copy the checkpoint again, or take an earlier one"
            )
        for place in np.flatnonzero(times == 0).tolist():
            key = index.keys[place]
            row_indexed = index.place_of_key.get(key.removesuffix(DENSE_SUFFIX), place)
            if not times[row_indexed]:
                raise CheckpointError(
                    f"{self._where[index.file[place]]} does not hold {key!r}, although {INDEX} says so"
                    ". Copy the checkpoint again, or take an earlier one"
                )
        is_held = np.zeros(len(index.keys), bool)
        is_held[headers.place[~headers.is_row_indexed]] = True
        row_indexed_keys = {self._key(row) for row in np.flatnonzero(headers.is_row_indexed).tolist()}
        unheld = [index.keys[place] for place in np.flatnonzero((index.stem >= 0) & ~is_held).tolist()]
        unheld += [key for key in index.strays if key not in row_indexed_keys]
        if unheld:
            raise CheckpointError(
                f"{self._tensorkey} names {unheld[0]!r}, which no file of the checkpoint holds"
                ". Copy the checkpoint again, or take an earlier one"
            )

    def _name_by_hand(self, row: int) -> str | None:
        """Return the internal name of a block that tensorkey.json does not name by its place; None for a dense tensor."""
        headers, index = self._headers, self._index
        key = self._key(row)
        where = self._where[headers.file[row]]
        internal = index.strays.get(key)
        is_row_indexed = (
            internal is None and not key.endswith(DENSE_SUFFIX) and key + DENSE_SUFFIX in index.place_of_key
        )
        if internal is None and (is_row_indexed or key.endswith(DENSE_SUFFIX)):
            name = key.removesuffix(DENSE_SUFFIX)
            if name in self._dense:
                raise CheckpointError(
                    f"{where} holds {key!r}, a second dense tensor of that name"
                    ". Copy the checkpoint again, or take an earlier one"
                )
            if is_row_indexed:
                self._row_indexed.append(key)
            begin, end = int(headers.begin[row]), int(headers.end[row])
            self._dense[name] = DenseTensor(
                name=name,
                dtype=int(headers.dtype[row]),
                shape=headers.shape(row),
                file=int(headers.file[row]),
                offset=begin,
                num_bytes=end - begin,
            )
            return None
        if internal is None and "^" not in key:
            raise CheckpointError(
                f"{where} holds {key!r}, which {TENSORKEY} does not name; RecIS's loader would lose its rows silently"
                ". Copy the checkpoint again, or take an earlier one"
            )
        internal = internal or key
        if split_internal(internal) is None:
            raise CheckpointError(
                f"{where}: block {key!r} has the internal name {internal!r}; expected <table>@<slot>^BEGIN@END@SIZE"
                ". Copy the checkpoint again, or take an earlier one"
            )
        return internal

    def _key(self, row: int) -> str:
        """Return the name of a block in its header."""
        key: str = self._index.keys[self._headers.place[row]]
        return key.removesuffix(DENSE_SUFFIX) if self._headers.is_row_indexed[row] else key

    def _keys(self, rows: np.ndarray) -> np.ndarray:
        """Return the names of blocks in their headers, as an array of objects."""
        by_place = np.empty(len(self._index.keys), object)
        by_place[:] = self._index.keys
        keys: np.ndarray = by_place[self._headers.place[rows]]
        for number in np.flatnonzero(self._headers.is_row_indexed[rows]).tolist():
            keys[number] = self._key(int(rows[number]))
        return keys
