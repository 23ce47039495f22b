"""Tell tables, optimizer state and dense parameters of a DCP checkpoint apart, by names and shapes. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import NamedTuple

from dist_export.checkpoint.dcp.metadata import Chunk, TensorMeta
from dist_export.checkpoint.doubtful_tensors import note_left
from dist_export.checkpoint.indexed_tables import fits_table
from dist_export.checkpoint.model_weights import Roles
from dist_export.checkpoint.payload import DENSE, STATE, OtherTensor, other_tensor
from dist_export.checkpoint.state_keys import MODEL_KEYS
from dist_export.checkpoint.state_roots import State, say_left_out
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.checkpoint.tensors.classify import (
    PatternMatches,
    Skipped,
    is_in_collection,
    list_others,
    listed,
    note_skipped,
)
from dist_export.errors import CheckpointError, UnaskedError
from dist_export.formats.dtypes import CODE_BY_TORCH, explain_unread
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT

_LARGE_BYTES = 1 << 16
"""An object of this size may be a whole state_dict: steps and learning rates take a kilobyte."""
_OBJECT = "an object in one piece, which may hold tensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class DcpSlot:
    """Optimizer state of one table."""

    name: str
    tensor: TensorMeta
    fits: bool
    """Whether it has a value for each row of the table: else what was saved is not the whole of it, or is laid out otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DcpTable:
    """One table, whose rows go by number."""

    name: str
    """Within the model."""
    weight: TensorMeta
    """Of shape (rows, dim)."""
    slots: tuple[DcpSlot, ...]
    sharding: str
    """How its rows and columns were shared out, for people."""


class SortedDcp(NamedTuple):
    """What the tensors of a checkpoint are; as :class:`~dist_export.checkpoint.dcp.tables.DcpCheckpoint` has it."""

    tables: tuple[DcpTable, ...]
    dense: tuple[tuple[str, TensorMeta], ...]
    other_state: tuple[str, ...]
    others: tuple[OtherTensor, ...]
    aliases: tuple[tuple[str, str], ...]
    skipped: tuple[Skipped, ...]
    left_out: tuple[Skipped, ...]
    notes: tuple[str, ...]
    unmatched_slots: frozenset[str]


def sort_dcp(
    where: str,
    tensors: Mapping[str, TensorMeta],
    state: State,
    optimizers: set[tuple[str, ...]],
    settings: TensorSettings,
    patterns: PatternMatches,
    *,
    objects: str,
    has_more_slots: bool,
) -> SortedDcp:
    """Say which tensors are tables, state of these, and dense parameters.

    Args:
        where: the checkpoint, for messages.
        tensors: by full name.
        state: which of them are read, and their names within the model.
        optimizers: what optimizers were saved under.
        settings: what they say of the tensors.
        patterns: those of the settings, of which those that match something are ticked off.
        objects: what to add to an error where tensors are missed.
        has_more_slots: as :func:`~dist_export.checkpoint.dcp.tables.read_dcp` has it.

    Raises:
        CheckpointError: a pattern matches nothing, or what it names cannot be a table.
    """
    kinds = _tell_apart(where, tensors, state, optimizers, settings, patterns)
    names = state.names
    final = _unique_names([*kinds.tables, *kinds.dense], names)
    slots, other = _assign_slots(kinds, tensors, final, patterns)
    elsewhere = patterns.pop_slots() if has_more_slots else frozenset()
    _refuse_unmatched(where, patterns, state, [name for name in kinds.dense if len(tensors[name].shape) == 2], objects)
    held = {within: tensors[name] for name, within in names.items() if name in tensors}
    left_out = tuple(
        Skipped(name, tensors[name].dtype, tensors[name].shape, say_left_out(settings))
        for name in state.left_out
        if name in tensors
    )
    aliases = [(alias, held[source]) for alias, source in kinds.roles.dense_aliases]
    return SortedDcp(
        tables=_make_tables(where, kinds, [(final[name], tensors[name], slots[name]) for name in kinds.tables], held),
        dense=(
            *((final[name], tensors[name]) for name in kinds.dense),
            *((alias, tensor) for alias, tensor in aliases if not explain_unread(tensor.dtype)),
        ),
        other_state=tuple(other),
        others=tuple(
            other_tensor(final.get(name, name), tensors[name].dtype, tensors[name].shape, kind)
            for kind, its in ((DENSE, kinds.dense), (STATE, other))
            for name in its
            if kind == STATE or names[name] not in kinds.roles.exported
        )
        + list_others([*kinds.skipped, *left_out]),
        aliases=(*kinds.roles.table_aliases, *kinds.roles.dense_aliases),
        skipped=tuple(kinds.skipped),
        left_out=left_out,
        notes=_make_notes(where, kinds, tensors, state, settings, other),
        unmatched_slots=elsewhere,
    )


def _assign_slots(
    kinds: _Kinds, tensors: Mapping[str, TensorMeta], final: Mapping[str, str], patterns: PatternMatches
) -> tuple[dict[str, list[DcpSlot]], list[str]]:
    """Return the optimizer slots of each table, by the name of its weight, and the optimizer state of no table."""
    only_dense = [name for name in kinds.dense if name not in kinds.tables]
    owner = _Owners({name: final[name] for name in kinds.tables}, {n for d in only_dense for n in (d, final[d])})
    slots: dict[str, list[DcpSlot]] = {name: [] for name in kinds.tables}
    other: list[str] = []
    for name, tail in kinds.state.items():
        owned = owner.find(tail)
        if owned is None:
            other.append(name)
            continue
        weight, slot = owned
        fits = fits_table(tensors[name].shape, tensors[weight].shape)
        slots[weight].append(DcpSlot(name=slot, tensor=tensors[name], fits=fits))
        patterns.match("optimizer_slots", slot, f"{final[weight]}.{slot}")  # as the plan has them
    return slots, other


def _make_tables(
    where: str,
    kinds: _Kinds,
    own: Iterable[tuple[str, TensorMeta, list[DcpSlot]]],
    held: Mapping[str, TensorMeta],
) -> tuple[DcpTable, ...]:
    """Return the tables by name, with those that are another one's weight under a name of their own.

    Args:
        where: the checkpoint, for messages.
        kinds: whose roles name the aliases.
        own: name, weight and slots of each table.
        held: tensors by their names within the model.
    """
    found = [(name, weight, _name_once(slots)) for name, weight, slots in own]
    for alias, source in kinds.roles.table_aliases:
        _refuse_no_table(where, alias, held[source])
        found.append((alias, held[source]._replace(name=alias), ()))
    return tuple(
        DcpTable(name=name, weight=weight, slots=slots, sharding=describe_sharding(weight))
        for name, weight, slots in sorted(found, key=lambda table: table[0])
    )


def _make_notes(
    where: str,
    kinds: _Kinds,
    tensors: Mapping[str, TensorMeta],
    state: State,
    settings: TensorSettings,
    other: Iterable[str],
) -> tuple[str, ...]:
    """Return what a user should know of the choice. ``other``: optimizer state of no table."""
    left = [name for name in kinds.dense if state.names[name] not in kinds.roles.taken]
    return (
        *state.notes,
        *note_skipped(kinds.skipped, where),
        *note_left(
            [(state.names[name], tensors[name].shape) for name in left],
            [(kinds.state[name], tensors[name].shape) for name in other],
            kept_dense=kinds.kept_dense,
            weights=settings.weights,
            left_out=state.list_others({name: tensor.shape for name, tensor in tensors.items()}),
        ),
    )


class _Kinds(NamedTuple):
    """Names of tensors by what they are."""

    tables: list[str]
    dense: list[str]
    """With tables that the program needs too."""
    state: dict[str, str]
    """Optimizer state -> what stands behind ``state``."""
    kept_dense: list[str]
    """Of ``dense``, the names within the model of what a pattern of ``treat_as_tables`` matches."""
    skipped: list[Skipped]
    roles: Roles


def _tell_apart(
    where: str,
    tensors: Mapping[str, TensorMeta],
    state: State,
    optimizers: set[tuple[str, ...]],
    settings: TensorSettings,
    patterns: PatternMatches,
) -> _Kinds:
    roles = Roles() if settings.weights is None else settings.weights.sort(state.names.values())
    found = _Kinds([], [], {}, [], [], roles)
    for name, tensor in tensors.items():
        if name in state.optimizer:
            tail = state_tail(name, optimizers, state.known)
            found.state[name] = tail if tail is not None else name.partition(".state.")[2] or name
            continue
        if name not in state.names:
            continue
        within = state.names[name]
        is_asked, is_in = patterns.match("treat_as_tables", name, within), is_in_collection(within, tensor.shape)
        reason = explain_unread(tensor.dtype)
        if roles.is_table(within, is_asked=is_asked, is_in_collection=is_in):
            _refuse_no_table(where, name, tensor)
            found.tables.append(name)
            found.dense.extend([name] if within in roles.both else [])
        elif reason:
            found.skipped.append(Skipped(within, tensor.dtype, tensor.shape, reason))
        else:
            found.dense.append(name)
            found.kept_dense.extend([within] if is_asked else [])
    return found


def _refuse_unmatched(where: str, patterns: PatternMatches, state: State, matrices: list[str], objects: str) -> None:
    if missed := patterns.first_unmatched():
        setting, pattern = missed
        raise UnaskedError(
            f"{where}: {setting}: the pattern {pattern!r} matches no tensor{state.explain(pattern)}{state.tell_several()}; "
            "give one of its matrices that are no tables yet: "
            f"{listed([state.names[name] for name in matrices])}{objects}"
        )


def say_objects(sizes: Mapping[str, int]) -> str:
    """Return what to add to an error where tensors are missed: the objects that may hold them; empty where none may."""
    large = {
        name: size for name, size in sizes.items() if size >= _LARGE_BYTES or name.rpartition(".")[2] in MODEL_KEYS
    }
    if not large:
        return ""
    told = listed([f"{name!r} ({size:,} bytes)" for name, size in large.items()])
    return (
        f"; it holds objects in one piece: {told}. A state_dict in one piece was saved with flatten_state_dict=False; save it "
        "with flatten_state_dict=True, which is the default of dcp.save"
    )


def list_large(sizes: Mapping[str, int], known: AbstractSet[str]) -> tuple[OtherTensor, ...]:
    """Return what may hold tensors and is no tensor, as the account has it: large objects that are not among those ``known``."""
    large = {name: size for name, size in sizes.items() if size >= _LARGE_BYTES and name not in known}
    return tuple(OtherTensor(name, "", (size,), size, _OBJECT) for name, size in large.items())


def note_large(objects: Sequence[OtherTensor], where: str) -> list[str]:
    """Return a note on :func:`list_large`."""
    told = [f"{its.name} ({its.num_bytes:,} bytes)" for its in objects]
    return [f"{where}: not read: {listed(told)}: {_OBJECT}"] if told else []


def _refuse_no_table(where: str, name: str, tensor: TensorMeta) -> None:
    if len(tensor.shape) != 2:
        raise CheckpointError(
            f"{where}: treat_as_tables names {name!r}, which has shape {list(tensor.shape)}; a table has two dimensions"
            "; take it out of treat_as_tables"
        )
    if tensor.dtype not in CODE_BY_TORCH:
        raise CheckpointError(
            f"{where}: table {name!r} is of {tensor.dtype}, which no package can hold; save it in another dtype"
        )


def describe_sharding(tensor: TensorMeta) -> str:
    """Return how a matrix was shared out over ranks, for people."""
    solid = [chunk for chunk in tensor.chunks if math.prod(chunk.sizes)]
    if len(solid) <= 1:
        return "in one piece"
    full = [all(_spans(chunk, tensor, dim) for chunk in solid) for dim in (0, 1)]
    how = "by rows" if full[1] else "by columns" if full[0] else "by rows and columns"
    return f"{how}, {len(solid)} pieces"


def optimizer_roots(names: Iterable[str]) -> set[tuple[str, ...]]:
    """Return what stands before ``param_groups``: the roots that optimizers were saved under."""
    roots: set[tuple[str, ...]] = set()
    for name in names:
        steps = name.split(".")
        if "param_groups" in steps:
            roots.add(tuple(steps[: steps.index("param_groups")]))
    return roots


def state_tail(name: str, roots: set[tuple[str, ...]], known: AbstractSet[str]) -> str | None:
    """Return what stands behind ``state``, for optimizer state; None for anything else.

    It is optimizer state under a root that also has ``param_groups``, and where the name of another tensor stands behind
    ``state``: torchrec's fused optimizers have groups, but nothing in them that would be saved.
    """
    steps = name.split(".")
    for place, step in enumerate(steps[:-1]):
        behind = steps[place + 1 :]
        if step == "state" and (
            tuple(steps[:place]) in roots or any(".".join(behind[:n]) in known for n in range(1, len(behind)))
        ):
            return ".".join(behind)
    return None


class _Owners:
    """Finds the table that optimizer state belongs to: its name is that of the table, or ends it, then the slot's."""

    def __init__(self, weights: dict[str, str], dense: set[str]) -> None:
        self._dense = dense
        self._weights: dict[str, set[str]] = {}
        for name, within in weights.items():
            for spelling in (name, within):
                steps = spelling.split(".")
                for first in range(max(1, len(steps) - 1)):
                    self._weights.setdefault(".".join(steps[first:]), set()).add(name)

    def find(self, tail: str) -> tuple[str, str] | None:
        """Return the weight and the slot's name; None where no table, or none alone, has the name."""
        steps = tail.split(".")
        for length in range(len(steps) - 1, 0, -1):
            name = ".".join(steps[:length])
            found = self._weights.get(name, set())
            if name in self._dense:
                return None
            if len(found) == 1:
                weight = next(iter(found))
                slot = steps[length:]
                table = weight.split(".")[-2:-1]  # torchrec names the table once more
                return weight, ".".join(slot[1:] if len(slot) > 1 and slot[:1] == table else slot)
        return None


def _unique_names(kept: list[str], names: dict[str, str]) -> dict[str, str]:
    """Return the names within the model; the full ones where two models in one checkpoint have the same."""
    found = {name: names[name] for name in kept}
    return found if len(set(found.values())) == len(found) else {name: name for name in kept}


def _name_once(slots: list[DcpSlot]) -> tuple[DcpSlot, ...]:
    """Order a table's slots by name; of those whose name another one has, or stands for something else, take the tensor's."""
    counts = Counter([slot.name for slot in slots] + [ID_SLOT, EMBEDDING_SLOT])
    once = [slot if counts[slot.name] == 1 else replace(slot, name=slot.tensor.name) for slot in slots]
    return tuple(sorted(once, key=lambda slot: slot.name))


def _spans(chunk: Chunk, tensor: TensorMeta, dim: int) -> bool:
    return chunk.sizes[dim] == tensor.shape[dim]
