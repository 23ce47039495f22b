"""Which table of the base each table of a dump is, and whether its rows fit there. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import numpy as np

from dist_export.checkpoint.metadata import SlotMeta, TableMeta
from dist_export.checkpoint.tzrec.parquet import FLOAT
from dist_export.checkpoint.tzrec.spool import Kind
from dist_export.errors import PlanError
from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES, I64
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT, mix
from dist_export.formats.row_encodings import F32, INT8_ROWWISE, U8
from dist_export.humanize import few
from dist_export.manifest import Manifest, SlotEntry, TableEntry

_WEIGHT = ".weight"
_COLLISIONS = "_embedding_module"
"""The attribute under which torchrec's managed-collision collections have their tables."""
_RUN_ROWS = 1 << 20
_CASTS = {"float16": "float16", "bfloat16": "bfloat16", INT8_ROWWISE: "int8"}
"""What rows of float32 can become, by the base's dtype or encoding: the dtype of the settings."""


class FoundTable(NamedTuple):
    """Rows of the dump for a table of the base."""

    name: str
    """In the dump."""
    kind: Kind
    where: str
    """A file that has them, for messages."""


class Matched(NamedTuple):
    """The tables of the base, in its order, as the dump has them."""

    tables: tuple[TableMeta, ...]
    found: tuple[FoundTable | None, ...]
    """By table; None if the dump has no row of it."""
    dtypes: tuple[tuple[str, str], ...]
    """(table, dtype of the settings) of those that are cast."""
    left_out: tuple[str, ...]
    """Tables of the dump that the export of the base has left out."""


def match_tables(found: Mapping[str, FoundTable], base: Manifest, where: str) -> Matched:
    """Match the tables of a dump with those of the base.

    Args:
        found: by the name in the dump.
        base: the base's manifest.
        where: the directory of dumps, for messages.

    Raises:
        PlanError: a table that the base lacks, or whose rows do not fit there.
    """
    by_number: dict[int, FoundTable] = {}
    left_out = []
    for name, its in found.items():
        number = _find_table(name, base, where)
        if number is None:
            left_out.append(name)
            continue
        if number in by_number:
            raise PlanError(
                f"{where}: {by_number[number].name!r} and {name!r} are both table {base.tables[number].name!r} of the base; "
                "export the base with tables of different names"
            )
        by_number[number] = its
    tables, dtypes = [], []
    for number, entry in enumerate(base.tables):
        one = by_number.get(number)
        embedding = _find_embedding(entry, one)
        tables.append(_describe(entry, embedding, one))
        precision = _precision_of(embedding)
        if one is not None and one.kind.kind == FLOAT and precision in _CASTS:
            dtypes.append((tables[-1].name_in_source, _CASTS[precision]))
    return Matched(tuple(tables), tuple(map(by_number.get, range(len(base.tables)))), tuple(dtypes), tuple(left_out))


def _find_table(name: str, base: Manifest, where: str) -> int | None:
    """Return the number of the base's table; None if the export of the base has left it out. PlanError if there is none."""
    left_out = () if base.left_out_tables is msgspec.UNSET else base.left_out_tables
    names = [{entry.name, entry.source_name} - {msgspec.UNSET} for entry in base.tables]
    names += [{entry.name} for entry in left_out]
    shown = [*(entry.name for entry in base.tables), *(entry.name for entry in left_out)]
    fitting: list[int] = []
    for wanted in (name, name + _WEIGHT):
        fitting = fitting or [number for number, its in enumerate(names) if wanted in its]
    last = name.rpartition(".")[2]
    fitting = fitting or [number for number, its in enumerate(names) if last in {_last(str(one)) for one in its}]
    if len(fitting) == 1:
        return fitting[0] if fitting[0] < len(base.tables) else None
    why = "is no table of the base" if not fitting else f"may be any of {few([shown[number] for number in fitting])}"
    raise PlanError(
        f"{where}: {name!r} {why}; the base has {', '.join(entry.name for entry in base.tables) or 'no table'}. Give the "
        "base that was exported from this training"
    )


def is_exact(name: str, table: TableMeta) -> bool:
    """Return whether a table of a dump has the name of the base's table, and not the last part of it alone."""
    return bool({name, name + _WEIGHT} & {table.name, table.name_in_source})


def _last(name: str) -> str:
    return name.removesuffix(_WEIGHT).rpartition(".")[2]


def _precision_of(slot: SlotEntry) -> str:
    return slot.dtype if slot.encoding is msgspec.UNSET else slot.encoding


def _find_embedding(entry: TableEntry, found: FoundTable | None) -> SlotEntry:
    """Return the base's slot of embeddings. PlanError if the base holds more than a dump, or rows of the dump do not fit."""
    others = [slot.name for slot in entry.kept if slot.name not in (ID_SLOT, EMBEDDING_SLOT)]
    embedding = next((slot for slot in entry.kept if slot.name == EMBEDDING_SLOT), None)
    if others or embedding is None:
        raise PlanError(
            f"the base has the slots {few(others)} of table {entry.name!r}, and a dump of TorchEasyRec has embeddings alone. "
            f"Export the base without them (drop_slots: [{', '.join(others)}])"
        )
    if found is None:
        return embedding
    if _COLLISIONS in found.name.split(".") and _has_row_numbers(entry):
        raise PlanError(
            f"{found.where}: {found.name!r} is a managed-collision (ZCH) table, of which the dump has raw ids, and the base has "
            f"row numbers of table {entry.name!r}. Export the base from a checkpoint that has the ids of this table"
        )
    precision, (kind, row_bytes) = _precision_of(embedding), found.kind
    dim = embedding.shape[-1] if embedding.dim is msgspec.UNSET else embedding.dim
    row_of_base = dim * 4 if kind == FLOAT else dim + 8
    fits = precision == "float32" or precision in _CASTS if kind == FLOAT else precision == INT8_ROWWISE
    if not fits or len(embedding.shape) != 1 or row_bytes != row_of_base:
        width = row_bytes // 4 if kind == FLOAT else row_bytes - 8
        is_for_int8 = width == dim and kind != FLOAT
        told = "whose table is exported with dtype: int8, or dump float32" if is_for_int8 else "of the same model"
        raise PlanError(
            f"{found.where}: rows of {found.name!r} have {width} values of {kind}, and those of table {entry.name!r} in the base "
            f"{dim} of {precision}, to which they cannot be brought. Give a base {told}"
        )
    return embedding


def _has_row_numbers(entry: TableEntry) -> bool:
    """Return whether the rows of a table go by number, or its ids are the numbers of its rows (``to_hash_tables``)."""
    if entry.is_row_indexed:
        return True
    total = 0
    for first in range(0, entry.rows_out, _RUN_ROWS):
        numbers = np.arange(first, min(first + _RUN_ROWS, entry.rows_out))
        total += int(mix(numbers).sum(dtype=np.uint64))
    return f"{total % (1 << 64):016x}" == entry.id_sum


def _describe(entry: TableEntry, embedding: SlotEntry, found: FoundTable | None) -> TableMeta:
    """Return a table as the source has it; without rows as the base has it."""
    encoding = "" if embedding.encoding is msgspec.UNSET else embedding.encoding
    dtype, shape = CODE_BY_TORCH[embedding.dtype], embedding.shape
    if found is not None and found.kind.kind == FLOAT:
        encoding, dtype, shape = "", F32, (found.kind.row_bytes // 4,)
    elif found is not None:
        encoding, dtype, shape = INT8_ROWWISE, U8, (found.kind.row_bytes,)
    row_bytes = DTYPES[dtype].itemsize
    for size in shape:
        row_bytes *= size
    return TableMeta(
        name=entry.name,
        slots=(
            SlotMeta(name=ID_SLOT, dtype=I64, inner_shape=(), row_bytes=8, column=0),
            SlotMeta(
                name=EMBEDDING_SLOT,
                dtype=dtype,
                inner_shape=tuple(shape),
                row_bytes=row_bytes,
                column=1,
                encoding=encoding,
            ),
        ),
        source_name=None if entry.source_name is msgspec.UNSET else entry.source_name,
        default_row=None if entry.default_row is msgspec.UNSET else entry.default_row,
    )
