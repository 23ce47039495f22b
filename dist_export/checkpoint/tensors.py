"""Tensors that are known by name and place: which are tables, their slots and dense parameters, and tables as parts. Pure.

For formats that hold tensors and say nothing of tables. A table is a matrix below torchrec's embedding collections, or one
that the setting ``tables`` names. Its rows go by number.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from dist_export.checkpoint.dcp_metadata import check_cover
from dist_export.checkpoint.reader import ABSENT, IN_STRIPS, Blocks, Parts, SlotMeta, Strips, TableMeta
from dist_export.errors import CheckpointError, UnaskedError
from dist_export.layout.dtypes import CODE_BY_TORCH, DTYPES, I64
from dist_export.layout.recis import EMBEDDING_SLOT, ID_SLOT

_COLLECTIONS = frozenset({"embedding_bags", "embeddings"})
"""What torchrec's embedding collections call the module that holds their tables."""
_SHOWN = 8
_MAX_COLUMNS = 1 << 16
"""Of a table. A row that lies column by column costs a strip for each."""


class Piece(NamedTuple):
    """A rectangle of a tensor, and where it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: int
    """Number of the file."""
    offset: int
    """Absolute position of its first element, in bytes."""
    strides: tuple[int, ...]
    """In bytes."""


class StoredTensor(NamedTuple):
    """One tensor; its pieces cover it once."""

    name: str
    dtype: str
    """Torch's name."""
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class TensorTable(NamedTuple):
    """A table, whose rows go by number, and its optimizer slots by name."""

    weight: StoredTensor
    slots: tuple[tuple[str, StoredTensor], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorted:
    """The outcome of :func:`sort_tensors`; each in the order of names."""

    tables: tuple[TensorTable, ...]
    dense: tuple[StoredTensor, ...]
    """In the order of the checkpoint."""
    other_state: tuple[str, ...]
    """Optimizer state of no table: never read."""

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of all that could be a table and is not known to be one."""
        return tuple(tensor.name for tensor in self.dense if len(tensor.shape) == 2)


def sort_tensors(
    tensors: Sequence[StoredTensor],
    *,
    where: str,
    tables: Sequence[str] = (),
    optimizer_slots: Sequence[str] = (),
) -> Sorted:
    """Tell tables, optimizer state and dense parameters apart.

    Args:
        tensors: of different names.
        where: the checkpoint, for messages.
        tables: patterns of further tensors that are tables.
        optimizer_slots: patterns of further tensors that are optimizer state, beside ``<root>.state.<parameter>.<slot>``.

    Raises:
        CheckpointError: a pattern matches nothing, or what it names cannot be a table.
    """
    names = {tensor.name for tensor in tensors}
    settings = {"tables": tables, "optimizer_slots": optimizer_slots}
    unmatched = {(setting, pattern) for setting, patterns in settings.items() for pattern in patterns}

    def matches(setting: str, name: str) -> bool:
        hits = [pattern for pattern in settings[setting] if fnmatchcase(name, pattern)]
        unmatched.difference_update((setting, pattern) for pattern in hits)
        return bool(hits)

    weights: list[StoredTensor] = []
    dense: list[StoredTensor] = []
    state: list[tuple[str, StoredTensor]] = []
    for tensor in tensors:
        is_asked = matches("tables", tensor.name)
        is_state = matches("optimizer_slots", tensor.name)
        tail = _state_tail(tensor.name, names)
        if is_state or tail is not None:
            state.append((tail or tensor.name, tensor))
        elif is_asked or _is_collection(tensor):
            weights.append(tensor)
        else:
            dense.append(tensor)
    for tensor in weights:
        _refuse_no_table(tensor, where)
    slots: dict[str, list[tuple[str, StoredTensor]]] = {tensor.name: [] for tensor in weights}
    other: list[str] = []
    for tail, tensor in state:
        found = next(((weight, slot) for weight in weights if (slot := _slot_of(weight, tail))), None)
        if found is None or tensor.dtype not in CODE_BY_TORCH:
            other.append(tensor.name)
        else:
            slots[found[0].name].append((found[1], tensor))
            for name in (found[1], f"{found[0].name}.{found[1]}"):  # as the plan has them
                matches("optimizer_slots", name)
    if unmatched:
        setting, pattern = min(unmatched)
        matrices = [tensor.name for tensor in dense if len(tensor.shape) == 2]
        raise UnaskedError(
            f"{where}: {setting}: the pattern {pattern!r} matches no tensor; its matrices besides tables: {listed(matrices)}"
        )
    return Sorted(
        tables=tuple(
            TensorTable(weight, _name_once(slots[weight.name])) for weight in sorted(weights, key=lambda w: w.name)
        ),
        dense=tuple(dense),
        other_state=tuple(sorted(other)),
    )


def _name_once(slots: list[tuple[str, StoredTensor]]) -> tuple[tuple[str, StoredTensor], ...]:
    """Order slots by name; those whose name another one has, or stands for something else, get that of the tensor."""
    counts = Counter([*(name for name, _ in slots), ID_SLOT, EMBEDDING_SLOT])
    return tuple(sorted((name if counts[name] == 1 else tensor.name, tensor) for name, tensor in slots))


def say_no_tables(found: Sorted, where: str) -> str:
    """Return what to tell where no table is known."""
    return (
        f"{where}: no matrix lies below embedding_bags or embeddings, as torchrec names its tables; name those that are "
        f"tables with tables: [patterns]. Its matrices: {listed(found.matrices)}"
    )


def listed(names: Sequence[str]) -> str:
    """Return the first of some names, for a message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more


def join_pieces(
    found: Iterable[tuple[str, str, tuple[int, ...] | None, Piece]], *, where: str, paths: Sequence[str]
) -> tuple[StoredTensor, ...]:
    """Put tensors together from pieces in the order of files: (name, dtype, whole shape, piece).

    A shape of None says that the piece is one of several, and only they tell the shape.

    Args:
        where: the checkpoint, for messages; ``paths`` are its files.

    Raises:
        CheckpointError: a whole tensor stands twice, pieces are of different dtypes, leave a gap or overlap.
    """
    pieces: dict[str, list[Piece]] = {}
    facts: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    for name, dtype, shape, piece in found:
        held = pieces.setdefault(name, [])
        known = facts.setdefault(name, (dtype, shape))
        if held and (shape is not None or known[1] is not None):
            raise CheckpointError(
                f"{paths[piece.file]} holds {name!r}, which {paths[held[0].file]} holds too; it cannot be told which counts"
            )
        if dtype != known[0] or len(piece.sizes) != len((held or [piece])[0].sizes):
            raise CheckpointError(
                f"{paths[piece.file]}: {name!r} is {dtype} {list(piece.sizes)}, but a piece of it in "
                f"{paths[held[0].file]} is {known[0]} {list(held[0].sizes)}"
            )
        held.append(piece)
    tensors = []
    for name, its in pieces.items():
        dtype, shape = facts[name]
        if shape is None:
            shape = tuple(
                max(o + s for o, s in ends)
                for ends in zip(*(zip(p.offsets, p.sizes, strict=True) for p in its), strict=True)
            )
            check_cover(name, shape, its, where)
        tensors.append(StoredTensor(name, dtype, shape, tuple(its)))
    return tuple(tensors)


def build_numbered(tables: Sequence[TensorTable]) -> tuple[tuple[TableMeta, ...], Parts, Blocks, Strips]:
    """Make tables of tensors: a part for each range of rows that the pieces have in common.

    Rows that do not lie one behind the other come as strips: those of columns that were cut, of transposed and of padded
    tensors.
    """
    metas: list[TableMeta] = []
    parts: list[tuple[int, int, int, int, int, int]] = []
    placed: list[dict[int, tuple[int, int]]] = []
    keys: list[dict[int, str]] = []
    strips: list[tuple[int, ...]] = []
    for number, table in enumerate(tables):
        named = [(EMBEDDING_SLOT, table.weight), *table.slots]
        slots = [SlotMeta(name=ID_SLOT, dtype=I64, inner_shape=(), row_bytes=8, column=0)]
        slots += [
            _describe_slot(name, tensor, column, fits=_fits(tensor, table.weight))
            for column, (name, tensor) in enumerate(named, 1)
        ]
        columns = {slot.column: named[slot.column - 1][1] for slot in slots[1:] if slot.stored_shape is None}
        metas.append(TableMeta(name=table.weight.name, slots=tuple(slots), is_hashed=False, has_ids=False))
        rows = table.weight.shape[0]
        edges = {0, rows, *(edge for tensor in columns.values() for edge in _row_edges(tensor))}
        for begin, end in itertools.pairwise(sorted(edges)) if rows else [(0, 0)]:
            part = len(parts)
            parts.append((number, begin, end, max(rows, 1), end - begin, begin))
            placed.append({})
            keys.append({})
            for column, tensor in columns.items():
                keys[part][column] = tensor.name
                found = _place_rows(tensor, begin, end)
                if len(found) == 1 and found[0][:2] == (0, slots[column].row_bytes) and found[0][2] == found[0][1]:
                    placed[part][column] = found[0][3:]
                else:
                    placed[part][column] = (IN_STRIPS, 0)
                    strips += [(part, column, *strip) for strip in found]
    width = max((len(meta.slots) for meta in metas), default=2)
    file = np.full((len(parts), width), ABSENT, np.int32)
    offset = np.zeros((len(parts), width), np.int64)
    key = np.full((len(parts), width), "", object)
    for part, (at, its_keys) in enumerate(zip(placed, keys, strict=True)):
        for column, (number, position) in at.items():
            file[part, column], offset[part, column], key[part, column] = number, position, its_keys[column]
        key[part, 0] = its_keys[1]
    part_columns = np.array(parts, np.int64).reshape(-1, 6).T.copy()
    strip_columns = np.array(sorted(strips), np.int64).reshape(-1, 7).T.copy()
    return (
        tuple(metas),
        Parts(**dict(zip(("table", "begin", "end", "size", "rows", "first_row"), part_columns, strict=True))),
        Blocks(file=file, offset=offset, key=key),
        Strips(
            **dict(
                zip(
                    ("part", "column", "first_byte", "width", "row_stride", "file", "offset"),
                    strip_columns,
                    strict=True,
                )
            )
        ),
    )


def _describe_slot(name: str, tensor: StoredTensor, column: int, *, fits: bool) -> SlotMeta:
    code = CODE_BY_TORCH[tensor.dtype]
    inner = tensor.shape[1:] if fits else ()
    return SlotMeta(
        name=name,
        dtype=code,
        inner_shape=inner,
        row_bytes=(inner[0] if inner else 1) * DTYPES[code].itemsize,
        column=column,
        is_optimizer=column > 1,
        stored_shape=None if fits else tensor.shape,
    )


def _row_edges(tensor: StoredTensor) -> Iterable[int]:
    for piece in tensor.pieces:
        if all(piece.sizes):
            yield piece.offsets[0]
            yield piece.offsets[0] + piece.sizes[0]


def _place_rows(tensor: StoredTensor, begin: int, end: int) -> list[tuple[int, int, int, int, int]]:
    """Return where the rows of a part lie: (first byte, width, row stride, file, offset), by first byte."""
    itemsize = DTYPES[CODE_BY_TORCH[tensor.dtype]].itemsize
    found = []
    for piece in tensor.pieces:
        first, rows = piece.offsets[0], piece.sizes[0]
        if not all(piece.sizes) or first >= end or first + rows <= begin:
            continue
        left, columns = (piece.offsets[1], piece.sizes[1]) if len(piece.sizes) > 1 else (0, 1)
        row_stride = piece.strides[0]
        column_stride = piece.strides[1] if columns > 1 else itemsize
        at = piece.offset + (begin - first) * row_stride
        if column_stride == itemsize:
            width = columns * itemsize
            found.append((left * itemsize, width, width if rows == 1 else row_stride, piece.file, at))
        else:
            found += [
                ((left + column) * itemsize, itemsize, row_stride, piece.file, at + column * column_stride)
                for column in range(columns)
            ]
    return sorted(found)


def _refuse_no_table(tensor: StoredTensor, where: str) -> None:
    what = f"{where}: the table {tensor.name!r} has shape {list(tensor.shape)}"
    if len(tensor.shape) != 2 or not tensor.shape[1]:
        raise CheckpointError(f"{what}; a table has rows and columns")
    if tensor.shape[1] > _MAX_COLUMNS:
        raise CheckpointError(f"{what}; no row has so many columns")
    if tensor.dtype not in CODE_BY_TORCH:
        raise CheckpointError(f"{where}: the table {tensor.name!r} is of {tensor.dtype}, which no package can hold")
    itemsize = DTYPES[CODE_BY_TORCH[tensor.dtype]].itemsize
    for piece in tensor.pieces:
        reach = itemsize  # of the dimensions with smaller strides
        for stride, size in sorted(zip(piece.strides, piece.sizes, strict=True)):
            if size > 1 and stride < reach:
                raise CheckpointError(
                    f"{what}, but its rows share what is stored (expanded); save it again, contiguous"
                )
            reach = max(reach, stride * (size - 1) + reach) if size > 1 else reach


def _is_collection(tensor: StoredTensor) -> bool:
    steps = tensor.name.split(".")
    return len(tensor.shape) == 2 and len(steps) >= 3 and steps[-1] == "weight" and steps[-3] in _COLLECTIONS


def _state_tail(name: str, names: set[str]) -> str | None:
    """Return what stands behind ``state``, where that begins with another tensor's name; None for anything else."""
    steps = name.split(".")
    for place, step in enumerate(steps[:-1]):
        behind = steps[place + 1 :]
        if step == "state" and any(".".join(behind[:count]) in names for count in range(1, len(behind))):
            return ".".join(behind)
    return None


def _slot_of(weight: StoredTensor, tail: str) -> str | None:
    """Return the slot that a tail names: what stands behind the weight's name; None where that is not in it."""
    _, mark, slot = f".{tail}".rpartition(f".{weight.name}.")
    table = weight.name.split(".")[-2:-1]  # torchrec names the table once more
    steps = slot.split(".")
    slot = ".".join(steps[1:] if len(steps) > 1 and steps[:1] == table else steps)
    return slot if mark and slot else None


def _fits(tensor: StoredTensor, weight: StoredTensor) -> bool:
    """Whether optimizer state has a value for each row of its table."""
    rows = weight.shape[0]
    return tensor.shape in (weight.shape, (rows,), (rows, 1))
