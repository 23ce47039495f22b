"""Tensors that are known by name and place: which are tables, their slots and dense parameters. Pure.

For formats that hold tensors and say nothing of tables. A table is a weight that the model looks rows up in; without a model a
matrix below torchrec's embedding collections; and in either case one that the setting ``treat_as_tables`` names. Its rows go by
number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import NamedTuple

from dist_export.checkpoint.chunk_cover import check_cover
from dist_export.checkpoint.doubtful_tensors import note_left
from dist_export.checkpoint.indexed_tables import TensorTable
from dist_export.checkpoint.model_weights import Roles
from dist_export.checkpoint.payload import DENSE, STATE, OtherTensor, other_tensor
from dist_export.checkpoint.raw_ids import Piece, StoredTensor
from dist_export.checkpoint.state_keys import COLLECTIONS, Member
from dist_export.checkpoint.state_roots import State, choose_state, say_left_out
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.errors import CheckpointError, UnaskedError
from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES, explain_unread
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT

_SHOWN = 8
_MAX_STEPS = 64
"""Of a name of optimizer state. All that could be another tensor's name in it is looked up, so more would take for ever."""
_MAX_COLUMNS = 1 << 16
"""Of a table. A row that lies column by column costs a strip for each."""


class Skipped(NamedTuple):
    """A tensor that is not read."""

    name: str
    """Within the model; the full name of one of another state."""
    dtype: str
    shape: tuple[int, ...]
    reason: str
    """What the tensor is, or where it lies, that it is not read."""


class Unread(NamedTuple):
    """What the files say of tensors besides name, dtype and shape."""

    paths: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    """Full name -> keys of the nested dicts that lead to the tensor; of flat files nothing."""
    reasons: Mapping[str, str] = MappingProxyType({})
    """Full name -> why its values cannot be read."""
    extra: tuple[tuple[str, ...], ...] = ()
    """Keys that lead to the extra state of modules, where that is no single tensor."""


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
    skipped: tuple[Skipped, ...] = ()
    """What would be dense, and cannot be read. In the order of the checkpoint."""
    left_out: tuple[Skipped, ...] = ()
    """Tensors of other states than the model's. In the order of the checkpoint."""
    notes: tuple[str, ...] = ()
    """What was chosen, and what is skipped, each a sentence."""
    several: str = ""
    """The states that the checkpoint holds, for errors; empty where it holds one."""
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name within the model of a module's extra state -> the keys that lead to it."""

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of all that could be a table and is not known to be one."""
        return tuple(tensor.name for tensor in self.dense if len(tensor.shape) == 2)


def sort_tensors(
    tensors: Sequence[StoredTensor],
    settings: TensorSettings = TensorSettings(),  # noqa: B008 -- immutable
    *,
    where: str,
    unread: Unread = Unread(),  # noqa: B008 -- immutable
) -> Sorted:
    """Tell tables, optimizer state and dense parameters apart.

    Args:
        tensors: of different names.
        settings: what they say of the tensors.
        where: the checkpoint, for messages.
        unread: what else the files say.

    Raises:
        CheckpointError: a pattern matches nothing, or what it names cannot be a table, or cannot be read.
    """
    patterns = PatternMatches(settings)

    def find_optimizer(spellings: Mapping[str, set[str]]) -> set[str]:
        known = {spelling for its in spellings.values() for spelling in its}
        is_asked = {name: patterns.match("optimizer_slots", *its) for name, its in spellings.items()}
        return {name for name in spellings if is_asked[name] or state_tail(name, known) is not None}

    members = [Member(its.name, unread.paths.get(its.name, (its.name,)), its.shape) for its in tensors]
    extra = {".".join(path): path for path in unread.extra}
    members += [Member(name, path, ()) for name, path in extra.items()]
    chosen = choose_state(members, settings, where=where, find_optimizer=find_optimizer, leaves_rest=True)
    state: list[tuple[str, StoredTensor]] = []
    for tensor in tensors:
        if tensor.name in chosen.optimizer:
            patterns.match("treat_as_tables", tensor.name)
            state.append((state_tail(tensor.name, chosen.known) or tensor.name, tensor))
    kinds = _tell_apart(tensors, chosen, settings, patterns, where=where, reasons=unread.reasons)
    tables, other = _join_slots(kinds.weights, state, patterns, unread.reasons)
    _refuse_unmatched(patterns, chosen, kinds, where)
    doubtful = note_left(
        [(tensor.name, tensor.shape) for tensor in kinds.dense if tensor.name not in kinds.roles.taken],
        [(tail, tensor.shape) for tail, tensor in other],
        kept_dense=kinds.kept_dense,
        weights=settings.weights,
        left_out=chosen.list_others({tensor.name: tensor.shape for tensor in tensors}),
    )
    left_out = tuple(
        Skipped(tensor.name, tensor.dtype, tensor.shape, say_left_out(settings))
        for tensor in tensors
        if tensor.name in chosen.left_out
    )
    roles, own = kinds.roles, set(chosen.names.values())  # aliases are no tensors of their own
    alone = [tensor for tensor in kinds.dense if tensor.name in own and tensor.name not in roles.exported]
    return Sorted(
        tables=tables,
        dense=tuple(kinds.dense),
        other_state=tuple(sorted(tensor.name for _, tensor in other)),
        skipped=tuple(kinds.skipped),
        left_out=left_out,
        others=(
            *(other_tensor(its.name, its.dtype, its.shape, DENSE) for its in alone),
            *(other_tensor(its.name, its.dtype, its.shape, STATE) for _, its in other),
            *list_others([*(its for its in kinds.skipped if its.name in own), *left_out]),
        ),
        aliases=(*roles.table_aliases, *roles.dense_aliases),
        several=chosen.several,
        notes=(*chosen.notes, *note_skipped(kinds.skipped, where), *doubtful),
        extra={chosen.names[name]: path for name, path in extra.items() if name in chosen.names},
    )


def _refuse_unmatched(patterns: PatternMatches, chosen: State, kinds: _Kinds, where: str) -> None:
    if missed := patterns.first_unmatched():
        setting, pattern = missed
        matrices = [tensor.name for tensor in kinds.dense if len(tensor.shape) == 2]
        raise UnaskedError(
            f"{where}: {setting}: the pattern {pattern!r} matches no tensor{chosen.explain(pattern)}{chosen.tell_several()}; "
            f"give one of its matrices that are no tables yet: {listed(matrices)}"
        )


class _Kinds(NamedTuple):
    """Tensors of the state that is read, under their names within the model."""

    weights: list[StoredTensor]
    dense: list[StoredTensor]
    """With tables that the program needs too."""
    skipped: list[Skipped]
    kept_dense: list[str]
    """Names of what a pattern of ``treat_as_tables`` matches and the program keeps."""
    roles: Roles


def _tell_apart(
    tensors: Sequence[StoredTensor],
    chosen: State,
    settings: TensorSettings,
    patterns: PatternMatches,
    *,
    where: str,
    reasons: Mapping[str, str],
) -> _Kinds:
    roles = Roles() if settings.weights is None else settings.weights.sort(chosen.names.values())
    found = _Kinds([], [], [], [], roles)
    aliases: dict[str, list[tuple[str, bool]]] = {}
    for is_table, pairs in ((True, roles.table_aliases), (False, roles.dense_aliases)):
        for alias, source in pairs:
            aliases.setdefault(source, []).append((alias, is_table))

    def add(tensor: StoredTensor, reason: str, *, is_table: bool) -> None:
        if is_table:
            _refuse_no_table(tensor, reason, where)
            found.weights.append(tensor)
        elif reason:
            found.skipped.append(Skipped(tensor.name, tensor.dtype, tensor.shape, reason))
        else:
            found.dense.append(tensor)

    for tensor in tensors:
        if tensor.name not in chosen.names:
            continue
        within = tensor._replace(name=chosen.names[tensor.name])
        is_asked = patterns.match("treat_as_tables", tensor.name, within.name)
        is_in = is_in_collection(within.name, within.shape)
        is_table = roles.is_table(within.name, is_asked=is_asked, is_in_collection=is_in)
        reason = reasons.get(tensor.name) or explain_unread(within.dtype)
        add(within, reason, is_table=is_table)
        found.dense.extend([within] if is_table and within.name in roles.both else [])
        found.kept_dense.extend([within.name] if is_asked and not is_table else [])
        for alias, is_aliased_table in aliases.get(within.name, ()):
            add(within._replace(name=alias), reason, is_table=is_aliased_table)
    return found


def _join_slots(
    weights: Sequence[StoredTensor],
    state: Sequence[tuple[str, StoredTensor]],
    patterns: PatternMatches,
    reasons: Mapping[str, str],
) -> tuple[tuple[TensorTable, ...], list[tuple[str, StoredTensor]]]:
    """Return the tables with their slots, in the order of names, and the optimizer state (tail, tensor) that is of none."""
    slots: dict[str, list[tuple[str, StoredTensor]]] = {tensor.name: [] for tensor in weights}
    other: list[tuple[str, StoredTensor]] = []
    for tail, tensor in state:
        owner = next(((weight, slot) for weight in weights if (slot := _slot_of(weight, tail))), None)
        if owner is None or tensor.dtype not in CODE_BY_TORCH or tensor.name in reasons:
            other.append((tail, tensor))
        else:
            slots[owner[0].name].append((owner[1], tensor))
            patterns.match("optimizer_slots", owner[1], f"{owner[0].name}.{owner[1]}")  # as the plan has them
    ordered = sorted(weights, key=lambda weight: weight.name)
    return tuple(TensorTable(weight.name, weight, _name_once(slots[weight.name])) for weight in ordered), other


class PatternMatches:
    """Patterns of the settings, and which of them matched something."""

    def __init__(self, settings: TensorSettings) -> None:
        self._patterns = {"treat_as_tables": settings.treat_as_tables, "optimizer_slots": settings.optimizer_slots}
        self.unmatched = {(setting, pattern) for setting, its in self._patterns.items() for pattern in its}
        """(setting, pattern) of those that have matched nothing so far."""

    def match(self, setting: str, *names: str) -> bool:
        """Whether a pattern of the setting matches one of these names of a tensor."""
        hits = [p for p in self._patterns[setting] if any(fnmatchcase(name, p) for name in names)]
        self.unmatched.difference_update((setting, pattern) for pattern in hits)
        return bool(hits)

    def pop_slots(self) -> frozenset[str]:
        """Return the patterns of ``optimizer_slots`` that matched nothing, and no longer count them."""
        slots = frozenset(pattern for setting, pattern in self.unmatched if setting == "optimizer_slots")
        self.unmatched -= {("optimizer_slots", pattern) for pattern in slots}
        return slots

    def first_unmatched(self) -> tuple[str, str] | None:
        """Return setting and pattern of one that matched nothing, None where all did."""
        return min(self.unmatched, default=None)


def list_others(skipped: Iterable[Skipped]) -> tuple[OtherTensor, ...]:
    """Return tensors that are not read as the account has them."""
    return tuple(other_tensor(its.name, its.dtype, its.shape, its.reason) for its in skipped)


def note_skipped(skipped: Sequence[Skipped], where: str) -> list[str]:
    """Return a sentence for each reason why tensors are not read."""
    by_reason: dict[str, list[str]] = {}
    for tensor in skipped:
        by_reason.setdefault(tensor.reason, []).append(tensor.name)
    return [f"{where}: not read: {listed(names)}: {reason}" for reason, names in by_reason.items()]


def _name_once(slots: list[tuple[str, StoredTensor]]) -> tuple[tuple[str, StoredTensor], ...]:
    """Order slots by name; those whose name another one has, or stands for something else, get that of the tensor."""
    counts = Counter([*(name for name, _ in slots), ID_SLOT, EMBEDDING_SLOT])
    return tuple(sorted((name if counts[name] == 1 else tensor.name, tensor) for name, tensor in slots))


def say_no_tables(found: Sorted, where: str) -> str:
    """Return what to tell where no table is known."""
    several = found.several and f"{found.several}. As it is, "
    return (
        f"{where}: {several}no matrix lies below embedding_bags or embeddings, as torchrec names its tables; name those that are "
        f"tables with treat_as_tables: [patterns]. Its matrices: {listed(found.matrices)}"
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
                f"{paths[piece.file]} holds {name!r}, and so does {paths[held[0].file]}; nothing says which one is valid"
                ": remove the file that is not of this save"
            )
        if dtype != known[0] or len(piece.sizes) != len((held or [piece])[0].sizes):
            raise CheckpointError(
                f"{paths[piece.file]}: {name!r} is {dtype} {list(piece.sizes)}, but a piece of it in "
                f"{paths[held[0].file]} is {known[0]} {list(held[0].sizes)}"
                ". Copy the checkpoint again, or take an earlier one"
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


def _refuse_no_table(tensor: StoredTensor, reason: str, where: str) -> None:
    """Refuse a tensor that the settings or its name make a table, and that can be none; ``reason``: why it is not read."""
    if reason:
        raise CheckpointError(
            f"{where}: the table {tensor.name!r} cannot be exported: it is {reason}; save it as a plain tensor"
        )
    what = f"{where}: the table {tensor.name!r} has shape {list(tensor.shape)}"
    if len(tensor.shape) != 2 or not tensor.shape[1]:
        raise CheckpointError(f"{what}; a table has rows and columns; if treat_as_tables names it, take it out there")
    if tensor.shape[1] > _MAX_COLUMNS:
        raise CheckpointError(f"{what}; no row has so many columns; if treat_as_tables names it, take it out there")
    if tensor.dtype not in CODE_BY_TORCH:
        raise CheckpointError(
            f"{where}: the table {tensor.name!r} is of {tensor.dtype}, which no package can hold"
            "; save it in another dtype"
        )
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
    if len(steps) < 3 or steps[-1] != "weight" or steps[-3] not in COLLECTIONS:
        return None
    return ".".join(steps[:-3]), steps[-2]


def state_tail(name: str, names: AbstractSet[str]) -> str | None:
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
