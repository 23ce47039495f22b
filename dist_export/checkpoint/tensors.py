"""Tensors that are known by name and place: which are tables, their slots and dense parameters. Pure.

For formats that hold tensors and say nothing of tables. A table is a weight that the model looks rows up in; without a model a
matrix below torchrec's embedding collections; and in either case one that the setting ``tables`` names. Its rows go by number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dist_export.checkpoint.chunk_cover import check_cover
from dist_export.checkpoint.doubtful import note_left
from dist_export.checkpoint.model_weights import ModelWeights, Roles
from dist_export.checkpoint.payload import DENSE, STATE, OtherTensor, other_tensor
from dist_export.checkpoint.row_layout import Piece, StoredTensor, TensorTable
from dist_export.errors import CheckpointError, UnaskedError
from dist_export.layout.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.layout.recis import EMBEDDING_SLOT, ID_SLOT

_COLLECTIONS = frozenset({"embedding_bags", "embeddings"})
"""What torchrec's embedding collections call the module that holds their tables."""
_SHOWN = 8
_MAX_STEPS = 64
"""Of a name of optimizer state. All that could be another tensor's name in it is looked up, so more would take for ever."""
_MAX_COLUMNS = 1 << 16
"""Of a table. A row that lies column by column costs a strip for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorted:
    """The outcome of :func:`sort_tensors`; each in the order of names."""

    tables: tuple[TensorTable, ...]
    dense: tuple[StoredTensor, ...]
    """In the order of the checkpoint."""
    other_state: tuple[str, ...]
    """Optimizer state of no table: never read."""
    others: tuple[OtherTensor, ...] = ()
    """What is in no table: dense parameters, and optimizer state of no table."""
    aliases: tuple[tuple[str, str], ...] = ()
    """(name, tensor) of tables and dense parameters that the checkpoint holds under another name."""
    notes: tuple[str, ...] = ()
    """On tensors that may be taken for something else than they are, for people."""

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
    weights: ModelWeights | None = None,
) -> Sorted:
    """Tell tables, optimizer state and dense parameters apart.

    Args:
        tensors: of different names.
        where: the checkpoint, for messages.
        tables: patterns of further tensors that are tables.
        optimizer_slots: patterns of further tensors that are optimizer state, beside ``<root>.state.<parameter>.<slot>``.
        weights: what the model says of the tensors, where one is exported.

    Raises:
        CheckpointError: a pattern matches nothing, or what it names cannot be a table.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    names = set(by_name)
    settings = {"tables": tables, "optimizer_slots": optimizer_slots}
    unmatched = {(setting, pattern) for setting, patterns in settings.items() for pattern in patterns}

    def matches(setting: str, name: str) -> bool:
        hits = [pattern for pattern in settings[setting] if fnmatchcase(name, pattern)]
        unmatched.difference_update((setting, pattern) for pattern in hits)
        return bool(hits)

    roles = Roles() if weights is None else weights.sort(names)
    found: list[StoredTensor] = []
    dense: list[StoredTensor] = []
    state: list[tuple[str, StoredTensor]] = []
    kept_dense: list[str] = []
    for tensor in tensors:
        is_asked = matches("tables", tensor.name)
        is_state = matches("optimizer_slots", tensor.name)
        tail = _state_tail(tensor.name, names)
        if is_state or tail is not None:
            state.append((tail or tensor.name, tensor))
        elif roles.is_table(
            tensor.name, is_asked=is_asked, is_in_collection=is_in_collection(tensor.name, tensor.shape)
        ):
            found.append(tensor)
            dense += [tensor] if tensor.name in roles.both else []
        else:
            dense.append(tensor)
            kept_dense += [tensor.name] if is_asked else []
    alone = [tensor for tensor in dense if tensor.name not in roles.exported]
    for aliases, its in ((roles.table_aliases, found), (roles.dense_aliases, dense)):
        its += [by_name[source]._replace(name=alias) for alias, source in aliases]
    for tensor in found:
        _refuse_no_table(tensor, where)
    slots: dict[str, list[tuple[str, StoredTensor]]] = {tensor.name: [] for tensor in found}
    other: list[tuple[str, StoredTensor]] = []
    for tail, tensor in state:
        owner = next(((weight, slot) for weight in found if (slot := _slot_of(weight, tail))), None)
        if owner is None or tensor.dtype not in CODE_BY_TORCH:
            other.append((tail, tensor))
        else:
            slots[owner[0].name].append((owner[1], tensor))
            for name in (owner[1], f"{owner[0].name}.{owner[1]}"):  # as the plan has them
                matches("optimizer_slots", name)
    if unmatched:
        setting, pattern = min(unmatched)
        matrices = [tensor.name for tensor in dense if len(tensor.shape) == 2]
        raise UnaskedError(
            f"{where}: {setting}: the pattern {pattern!r} matches no tensor; its matrices besides tables: {listed(matrices)}"
        )
    left = [tensor for tensor in dense if tensor.name not in roles.taken]
    return Sorted(
        tables=tuple(
            TensorTable(weight.name, weight, _name_once(slots[weight.name]))
            for weight in sorted(found, key=lambda w: w.name)
        ),
        dense=tuple(dense),
        other_state=tuple(sorted(tensor.name for _, tensor in other)),
        others=tuple(
            other_tensor(tensor.name, tensor.dtype, tensor.shape, kind)
            for kind, its in ((DENSE, alone), (STATE, [tensor for _, tensor in other]))
            for tensor in its
        ),
        aliases=(*roles.table_aliases, *roles.dense_aliases),
        notes=note_left(
            [(tensor.name, tensor.shape) for tensor in left],
            [(tail, tensor.shape) for tail, tensor in other],
            kept_dense=kept_dense,
            weights=weights,
        ),
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


def is_in_collection(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a table of one of torchrec's embedding collections, by its name."""
    return len(shape) == 2 and split_collection(name) is not None


def split_collection(name: str) -> tuple[str, str] | None:
    """Return (path of the embedding collection, table) of the name of a weight; None where it is that of no collection."""
    steps = name.split(".")
    if len(steps) < 3 or steps[-1] != "weight" or steps[-3] not in _COLLECTIONS:
        return None
    return ".".join(steps[:-3]), steps[-2]


def _state_tail(name: str, names: set[str]) -> str | None:
    """Return what stands behind ``state``, where that begins with another tensor's name; None for anything else."""
    steps = name.split(".")
    for place, step in enumerate(steps[:-1] if len(steps) <= _MAX_STEPS else ()):
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
