"""Which state of a checkpoint is the model's, where it holds several, and what its tensors are called within the model. Pure.

Training loops save a model beside its moving average (EMA, SWA), under keys of a nested dict or as the begin of flat names:
``{"model": ..., "ema": ...}``, ``model.x`` beside ``ema.x``. Both hold tensors of the same names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from dist_export.checkpoint.arch_roots import find_arch_roots, find_model_root
from dist_export.checkpoint.flat_states import Choice, choose_flat, copy_path, say_choice
from dist_export.checkpoint.model_weights import ModelWeights, plain_name  # copies of one model differ in wrappers
from dist_export.checkpoint.state_keys import (
    MODEL_KEYS,
    Member,
    Root,
    dotted,
    find_roots,
    is_copy,
    is_copy_of,
    is_own,
    is_surely_copy,
    list_some,
    nested_root,
)
from dist_export.checkpoint.tensor_settings import WHOLE, TensorSettings
from dist_export.checkpoint.wrapping_prefix import say_below, strip_wrapping_prefix, take_below
from dist_export.errors import UnaskedError
from dist_export.humanize import count


class State(NamedTuple):
    """The state that is read."""

    names: dict[str, str]
    """Full name -> name within the model, of each tensor that is read and is no optimizer state."""
    optimizer: frozenset[str]
    """Full names of optimizer state, of whatever model."""
    known: frozenset[str]
    """All names that parameters may have, by which optimizer state was found."""
    left_out: dict[str, str]
    """Full name -> dotted root of the state that it lies in, of each tensor that is not read."""
    notes: tuple[str, ...]
    several: str = ""
    """What to add to an error where tensors are missed: the states that the checkpoint holds; empty where it holds one."""

    def list_others(self, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return (full name, name within its state, shape) of what is not read and is no copy of anything that is read.

        ``shapes``: of all tensors, by full name.
        """
        taken = {(plain_name(within), shapes.get(name)) for name, within in self.names.items()}
        within = {name: name.removeprefix(f"{root}.") for name, root in self.left_out.items() if name in shapes}
        return [(n, its, shapes[n]) for n, its in within.items() if (plain_name(its), shapes[n]) not in taken]

    def explain(self, pattern: str) -> str:
        """Return what to add to an error where a pattern matches nothing; empty where no other state has it."""
        root = next((root for name, root in self.left_out.items() if fnmatchcase(name, pattern)), None)
        return "" if root is None else f"; it matches tensors of {root!r}, which are left out: set state_root: {root}"

    def tell_several(self) -> str:
        """Return what to add to an error on a tensor that is not there; empty where the checkpoint holds one state."""
        return self.several and f"; {self.several}"


def say_left_out(settings: TensorSettings) -> str:
    """Return why a tensor of another state than the one that is read is left out."""
    return "not of the model" if settings.state_root is None else "not of state_root"


def choose_state(
    members: Sequence[Member],
    settings: TensorSettings,
    *,
    where: str,
    find_optimizer: Callable[[Mapping[str, set[str]]], set[str]],
    leaves_rest: bool = False,
) -> State:
    """Choose the state to read, and name its tensors as the model does.

    Args:
        members: all tensors, of different names.
        settings: ``state_root`` names the state; ``model_paths`` tell whether a key is of the model's own.
        where: the checkpoint, for messages.
        find_optimizer: returns the full names of optimizer state, given by full name all names that a tensor may have.
        leaves_rest: whether what lies beside the one key that is a model's is left out with its copies.

    Raises:
        UnaskedError: nothing lies below ``state_root``.
    """
    spellings = {name: {name, below} for name, below in _nested_names(members).items()}
    if settings.state_root is not None:
        for name, its in spellings.items():
            its.add(name.removeprefix(f"{settings.state_root}."))
    while True:  # optimizer state may name parameters as the state that is chosen does
        optimizer = find_optimizer(spellings)
        rest = [member for member in members if member.name not in optimizer]
        names, left_out, notes = _choose(rest, settings, where=where, leaves_rest=leaves_rest)
        if settings.state_root != WHOLE:
            names, prefix = strip_wrapping_prefix(names, settings.weights)
            notes = (*notes, *([_say_prefix(where, prefix)] if prefix else []))
            names, beside, told = _leave_beside(names, settings, where=where)
            left_out, notes = left_out | beside, (*notes, *told)
        if all(within in spellings[name] for name, within in names.items()):
            known = frozenset(spelling for its in spellings.values() for spelling in its)
            several = "" if settings.state_root else _say_several(rest)
            if not several and not any(map(_is_table_of(settings.weights), names.values())):
                several = say_below([member.name for member in rest], settings.weights, root=settings.state_root)
            return State(names, frozenset(optimizer), known, left_out, notes, several)
        for name, within in names.items():
            spellings[name].add(within)


def _leave_beside(
    names: dict[str, str], settings: TensorSettings, *, where: str
) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
    """Leave out what lies beside the one prefix that has all of the model's names: ``names``, ``left_out``, ``notes``."""
    kept, prefix = take_below(names, settings.weights)
    if not prefix:
        return names, {}, ()
    steps = prefix.split(".")

    def root_of(name: str, within: str) -> str:
        """Return the full name up to the first element that is not the prefix's."""
        its = within.split(".")
        place = next((n for n, (one, two) in enumerate(zip(its, steps, strict=False)) if one != two), len(its) - 1)
        return name.removesuffix(within) + ".".join(its[: place + 1])

    left_out = {name: root_of(name, within) for name, within in names.items() if name not in kept}
    told = list_some(sorted(set(left_out.values())))
    note = f"{where}: all of the model's names lie below {prefix!r}, which is what is read; left out: {told}"
    return kept, left_out, (note,)


def _is_table_of(weights: ModelWeights | None) -> Callable[[str], bool]:
    """Return what says whether a name within the model, or within the sparse arch, is that of one of its tables."""
    if weights is None:
        return lambda _: True  # nothing is known to be missed
    begin = f"{weights.sparse_name}." if weights.sparse_name else ""
    return lambda name: not weights.tables.isdisjoint((plain_name(name), begin + plain_name(name)))


def _choose(members: Sequence[Member], settings: TensorSettings, *, where: str, leaves_rest: bool) -> Choice:
    if settings.state_root is None:
        names, removed, notes = _choose_model(members, settings, where=where, leaves_rest=leaves_rest)
        return names, removed, (*notes, *_note_average(members, names, settings.model_paths, where))
    if settings.state_root == WHOLE:
        return {member.name: member.name for member in members}, {}, ()
    begin = f"{settings.state_root}."
    below = [member for member in members if member.name.startswith(begin)]
    roots = find_roots(members)
    if not below:
        deeper = next((m.name.partition(f".{begin}")[0] for m in members if f".{begin}" in m.name), None)
        also = "" if deeper is None else f" or to a deeper path: state_root: {deeper}.{settings.state_root}"
        raise UnaskedError(
            f"{where}: state_root is {settings.state_root!r}, but no tensor lies below it; there are "
            f"{_count_roots(members, roots)}"
            f"; set state_root to one of them{also}"
        )
    inner = [Member(m.name.removeprefix(begin), _cut_path(m, len(begin)), m.shape) for m in below]
    names, removed, notes = _choose_model(inner, settings, where=where, leaves_rest=leaves_rest, begin=begin)
    outside = {m.name: _root_of(m, roots) for m in members if not m.name.startswith(begin)}
    if outside:
        told = list_some(sorted(set(outside.values())))
        notes = (f"{where}: state_root takes what {settings.state_root!r} holds; left out: {told}", *notes)
    left_out = {begin + name: begin + root for name, root in removed.items()} | outside
    return {begin + name: within for name, within in names.items()}, left_out, notes


def _choose_model(
    members: Sequence[Member], settings: TensorSettings, *, where: str, leaves_rest: bool, begin: str = ""
) -> Choice:
    """Choose among the keys of nested dicts, then among the beginnings of names. ``begin`` is before all names."""
    model_paths = settings.model_paths
    roots = find_roots(members)
    root_of = {member.name: nested_root(member, roots) for member in members}
    by_root: dict[Root, dict[str, tuple[int, ...]]] = {}
    for member in members:
        root = root_of[member.name]
        by_root.setdefault(root, {})[plain_name(_below(member, root))] = member.shape
    if settings.weights is not None and (arches := find_arch_roots(by_root, settings.weights)):
        return _choose_arches(members, root_of, arches, where=where)
    rivals = _find_rivals(by_root)
    chosen = _pick(rivals)
    if chosen is not None and not _is_state(chosen, rivals, by_root):
        chosen = None
    if not rivals and leaves_rest:
        keys = [root for root in by_root if len(root) == 1 and root[0] in MODEL_KEYS]
        chosen = keys[0] if len(keys) == 1 else find_model_root(by_root, settings.weights)
    removed = {root for root in by_root if chosen is not None and root != chosen and (root in rivals or leaves_rest)}
    left_out = {m.name: _root_of(m, roots) for m in members if root_of[m.name] in removed}
    is_alone = len(by_root) == 1 and any("." in member.path[-1] for member in members)
    strips = chosen is not None or (not rivals and (is_alone or not leaves_rest))
    found = {
        member.name: (
            _below(member, root) if strips and not is_own(dotted(root), model_paths) else member.name,
            member.shape,
        )
        for member in members
        if (root := root_of[member.name]) not in removed
    }
    names, copies, notes = choose_flat(found, model_paths, where=where, begin=begin)
    if left_out:
        taken = dotted(chosen or ())
        told = say_choice(where, taken and begin + taken, [begin + its for its in left_out.values()])
        notes = (told, *notes)
    if rivals and chosen is None and any(is_copy_of(by_root[a], by_root[b]) for a in rivals for b in rivals if a != b):
        told = list_some(sorted({_root_of(m, roots) for m in members if root_of[m.name] in rivals}))
        several = f"{where} holds several states with the same names: {told}"
        notes = (f"{several}; each is taken under its full name, and state_root takes one of them", *notes)
    return names, left_out | copies, notes


def _choose_arches(
    members: Sequence[Member], root_of: Mapping[str, Root], arches: Mapping[Root, str], *, where: str
) -> Choice:
    """Take sparse and dense arch from the roots that hold one of them each; what lies beside them is left out."""
    names = {
        member.name: f"{arches[root]}.{_below(member, root)}"
        for member in members
        if (root := root_of[member.name]) in arches
    }
    left_out = {
        member.name: dotted(root_of[member.name]) or member.name for member in members if member.name not in names
    }
    told = " and ".join(f"{dotted(root)!r} holds the model's {path}" for root, path in sorted(arches.items()))
    beside = f"; left out: {list_some(sorted(set(left_out.values())))}" if left_out else ""
    return names, left_out, (f"{where}: by the names of their tensors {told}{beside}",)


def _note_average(
    members: Sequence[Member], names: Mapping[str, str], model_paths: Sequence[str], where: str
) -> tuple[str, ...]:
    """Return a note where all matrices that are read are of what is called a moving average, and there is nothing else."""
    roots = find_roots(members)
    found = set()
    for member in members:
        if member.name in names and len(member.shape) > 1:
            root = nested_root(member, roots)
            is_average = any(map(is_copy, root)) and not is_own(dotted(root), model_paths)
            found.add(dotted(root) if is_average else copy_path(names[member.name], model_paths))
    if not found or "" in found:
        return ()
    told = list_some(sorted(found))
    return (
        f"{where}: {told} is a moving average by its name, and what is exported: the checkpoint holds no other state",
    )


def _say_several(members: Sequence[Member]) -> str:
    """Return which states there are, for an error; empty for one. Flat names tell where each has tensors of the same names."""
    roots = find_roots(members)
    by_root: dict[str, dict[str, tuple[int, ...]]] = {}
    for member in members:
        root = dotted(nested_root(member, roots))
        by_root.setdefault(root, {})[member.name.removeprefix(f"{root}.")] = member.shape
    if len([root for root in by_root if root]) < 2:
        by_root = {}
        for member in members:
            root, _, below = member.name.partition(".")
            by_root.setdefault(root if below else "", {})[below or member.name] = member.shape
        rivals = [a for a in by_root for b in by_root if a != b and a and b and is_copy_of(by_root[a], by_root[b])]
        by_root = {root: by_root[root] for root in dict.fromkeys(rivals)}
    states = [f"{root} ({count(len(its), 'tensor')})" for root, its in sorted(by_root.items()) if root]
    if len(states) < 2:
        return ""
    first = min(filter(None, by_root))
    return (
        f"it holds {len(states)} states: {list_some(states)}; state_root takes one of them, such as state_root: {first}"
    )


def _nested_names(members: Sequence[Member]) -> dict[str, str]:
    """Return what tensors are called below the keys of nested dicts, optimizer state as it is."""
    roots = find_roots(member for member in members if "state" not in member.path[:-1])
    return {member.name: _below(member, nested_root(member, roots)) for member in members}


def _below(member: Member, root: Root) -> str:
    return member.name.removeprefix(f"{dotted(root)}.") if root else member.name


def _cut_path(member: Member, length: int) -> Root:
    """Return the keys behind the first ``length`` characters of a name."""
    rest = member.name[length:]
    keys: list[str] = []
    for key in reversed(member.path):
        if len(".".join([key, *keys])) > len(rest):
            break
        keys.insert(0, key)
    behind = ".".join(keys)
    return tuple(keys) if behind == rest else (rest,) if not behind else (rest.removesuffix(f".{behind}"), *keys)


def _find_rivals(by_root: Mapping[Root, Mapping[str, tuple[int, ...]]]) -> list[Root]:
    """Return the roots that hold a name which another one holds too."""
    held: dict[str, int] = {}
    for its in by_root.values():
        for name in its:
            held[name] = held.get(name, 0) + 1
    return [root for root, its in by_root.items() if any(held[name] > 1 for name in its)]


def _pick(rivals: Sequence[Root]) -> Root | None:
    """Return the model's root among those of states with the same names; None where it cannot be told."""
    originals = [root for root in rivals if not any(map(is_copy, root))]
    if len(originals) > 1:
        originals = [root for root in originals if root and root[-1] in MODEL_KEYS]
        least = min(map(len, originals), default=0)
        originals = [root for root in originals if len(root) == least]
    return originals[0] if len(originals) == 1 else None


def _is_state(chosen: Root, rivals: Sequence[Root], by_root: Mapping[Root, Mapping[str, tuple[int, ...]]]) -> bool:
    """Whether a root that was picked among rivals is the model's for certain, and not a part of it such as a table."""
    if chosen and chosen[-1] in MODEL_KEYS:
        return True
    is_rest = not any(shape for root, its in by_root.items() if root not in rivals for shape in its.values())
    return all(
        is_surely_copy(
            next(filter(is_copy, root), ""), by_root[root], "".join(chosen[-1:]), by_root[chosen], is_rest=is_rest
        )
        for root in rivals
        if root != chosen
    )


def _root_of(member: Member, roots: set[Root]) -> str:
    """Return the dotted root of a tensor, for messages and for ``state_root``."""
    return dotted(nested_root(member, roots)) or member.name.partition(".")[0]


def _count_roots(members: Sequence[Member], roots: set[Root]) -> str:
    counts = Counter(_root_of(member, roots) for member in members)
    return list_some([f"{root} ({number} tensors)" for root, number in sorted(counts.items())])


def _say_prefix(where: str, prefix: str) -> str:
    return (
        f"{where}: {prefix!r} is in front of the names of all tensors and not in the model: names are taken without it"
    )
