"""Blocks to parts: which blocks of a RecIS checkpoint belong together, and whether they make whole tables. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dist_export.checkpoint.reader import Blocks, Parts, SlotMeta, TableMeta
from dist_export.errors import CheckpointError
from dist_export.layout.dtypes import DTYPES, I64
from dist_export.layout.indexes import split_internal
from dist_export.layout.recis import EMBEDDING_SLOT, ID_SLOT, Slice, key_stem
from dist_export.layout.safetensors import Header

_MAX_ROW_BYTES = 1 << 40
_LAST_NUMBERS = re.compile(r"\d+")


class _Block(NamedTuple):
    file: int
    offset: int
    rows: int
    key: str


_Group = dict[str, _Block]
"""The blocks of one part, by slot."""


class PartBuilder:
    """Takes in sparse blocks in file order, then builds tables, parts and the matrix of blocks."""

    def __init__(self, where: tuple[str, ...]) -> None:
        """``where`` are the paths of the files, for messages."""
        self._where = where
        self._slots: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {}
        self._blocks: dict[tuple[str, Slice], list[tuple[str, str, _Block]]] = {}

    def add(self, internal: str, key: str, number: int, header: Header, row: int) -> None:
        """Take in one sparse block; ``internal`` is ``<table>@<slot>^<slice>``. CheckpointError as :meth:`build`."""
        name = split_internal(internal)
        if name is None:
            raise self._error(
                number, key, f"has the internal name {internal!r}; expected <table>@<slot>^BEGIN@END@SIZE"
            )
        table, slot, part_slice = name
        shape = header.shapes[row]
        if not shape:
            raise self._error(number, key, "is a scalar, but a block of a table has a row for each id")
        kind = (int(header.dtypes[row]), shape[1:])
        if slot == ID_SLOT and kind != (I64, ()):
            raise self._error(number, key, f"is {DTYPES[kind[0]].name} {list(shape)}; ids are I64 [rows]")
        if slot == EMBEDDING_SLOT and len(shape) < 2:
            raise self._error(number, key, f"has shape {list(shape)}; embeddings are [rows, dim]")
        if math.prod(shape[1:]) * 8 > _MAX_ROW_BYTES:
            raise self._error(number, key, f"has rows of {list(shape[1:])}, which no table has")
        known = self._slots.setdefault(table, {}).setdefault(slot, kind)
        if known != kind:
            raise self._error(
                number,
                key,
                f"is {DTYPES[kind[0]].name} with rows of {list(kind[1])}; other parts of the table have "
                f"{DTYPES[known[0]].name} with rows of {list(known[1])}",
            )
        stem = key_stem(table, slot)
        suffix = key[len(stem) :] if key.startswith(stem) else ""
        block_at = _Block(number, int(header.begins[row]), shape[0], key)
        self._blocks.setdefault((table, part_slice), []).append((slot, suffix, block_at))

    def build(self) -> tuple[tuple[TableMeta, ...], Parts, Blocks]:
        """Return tables in order of appearance, their parts by slice, and the matrix of blocks.

        Raises:
            CheckpointError: a table or a part is not whole, or its blocks contradict each other.
        """
        tables = tuple(
            TableMeta(name=table, slots=tuple(self._order_slots(table, slots))) for table, slots in self._slots.items()
        )
        place = {table.name: i for i, table in enumerate(tables)}
        groups: list[tuple[int, Slice, _Group]] = []
        for table, part_slice in sorted(self._blocks, key=lambda key: (place[key[0]], key[1])):
            groups += [(place[table], part_slice, group) for group in self._split(self._blocks[table, part_slice])]
        num_slots = max((len(table.slots) for table in tables), default=0)
        file = np.full((len(groups), num_slots), -1, np.int32)
        offset = np.zeros((len(groups), num_slots), np.int64)
        names = np.full((len(groups), num_slots), None, object)
        columns = np.zeros((5, len(groups)), np.int64)
        for part, (number, part_slice, group) in enumerate(groups):
            columns[:, part] = (number, *part_slice, self._check_part(tables[number], part_slice, group))
            for slot in tables[number].slots:
                block = group.get(slot.name)
                if block is not None:
                    file[part, slot.column], offset[part, slot.column] = block.file, block.offset
                    names[part, slot.column] = block.key
        parts = Parts(table=columns[0], begin=columns[1], end=columns[2], size=columns[3], rows=columns[4])
        self._check_sizes(tables, groups)
        return tables, parts, Blocks(file=file, offset=offset, key=names)

    def _split(self, blocks: list[tuple[str, str, _Block]]) -> list[_Group]:
        """Return the parts among blocks of one table and slice.

        The internal names tell all that RecIS goes by. Only where two parts carry one slice, and so their blocks one
        name, the end of the keys tells them apart.
        """
        together = {slot: block for slot, _, block in blocks}
        if len(together) == len(blocks):
            return [together]
        by_suffix: dict[str, _Group] = {}
        for slot, suffix, block in blocks:
            group = by_suffix.setdefault(suffix, {})
            if slot in group:
                raise self._error(
                    block.file,
                    block.key,
                    f"and {group[slot].key!r} in {self._where[group[slot].file]} stand for the same slot and slice; "
                    "which one belongs to which ids cannot be told",
                )
            group[slot] = block
        return [by_suffix[suffix] for suffix in sorted(by_suffix, key=_natural)]

    def _check_part(self, table: TableMeta, part_slice: Slice, group: _Group) -> int:
        file = self._where[next(iter(group.values())).file]
        what = f"the part of table {table.name!r} with slice {part_slice.begin}:{part_slice.end}"
        for needed in (ID_SLOT, EMBEDDING_SLOT):
            if needed not in group:
                raise CheckpointError(f"{file}: {what} has no {needed} block")
        rows = group[ID_SLOT].rows
        for slot, block in group.items():
            if block.rows != rows:
                raise self._error(
                    block.file,
                    block.key,
                    f"has {block.rows:,} rows of {slot}, but {what} has {rows:,} ids; RecIS's reader would run on into "
                    "the next block",
                )
        absent = [slot.name for slot in table.slots if slot.name not in group]
        if absent and rows:
            raise CheckpointError(f"{file}: {what} has {rows:,} rows but no {absent[0]}, which other parts have")
        return rows

    def _check_sizes(self, tables: tuple[TableMeta, ...], groups: list[tuple[int, Slice, _Group]]) -> None:
        first: dict[int, Slice] = {}
        for number, part_slice, group in groups:
            other = first.setdefault(number, part_slice)
            if part_slice.size != other.size:
                file = self._where[group[ID_SLOT].file]
                raise CheckpointError(
                    f"{file}: a part of table {tables[number].name!r} has slice size {part_slice.size}, another one "
                    f"{other.size}; RecIS's loader takes rows of one size only"
                )

    def _order_slots(self, table: str, slots: dict[str, tuple[int, tuple[int, ...]]]) -> Iterable[SlotMeta]:
        missing = [name for name in (ID_SLOT, EMBEDDING_SLOT) if name not in slots]
        if missing:
            block = next(blocks[0][2] for (name, _), blocks in self._blocks.items() if name == table)
            raise CheckpointError(
                f"{self._where[block.file]}: holds {block.key!r}, but no file holds the {' or '.join(missing)} block of "
                f"table {table!r}"
            )
        names = [ID_SLOT, EMBEDDING_SLOT, *(name for name in slots if name not in (ID_SLOT, EMBEDDING_SLOT))]
        for column, name in enumerate(names):
            dtype, inner = slots[name]
            row_bytes = math.prod(inner) * DTYPES[dtype].itemsize
            yield SlotMeta(name=name, dtype=dtype, inner_shape=inner, row_bytes=row_bytes, column=column)

    def _error(self, file: int, key: str, text: str) -> CheckpointError:
        return CheckpointError(f"{self._where[file]}: block {key!r} {text}")


def _natural(suffix: str) -> tuple[list[int], str]:
    return [int(number) for number in _LAST_NUMBERS.findall(suffix[:200])], suffix
