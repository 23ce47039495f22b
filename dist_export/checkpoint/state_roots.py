"""Which state of a checkpoint is the model's, where it holds several, and what its tensors are called within the model. Pure.

Training loops save a model beside its moving average (EMA, SWA), under keys of a nested dict or as the begin of flat names:
``{"model": ..., "ema": ...}``, ``model.x`` beside ``ema.x``. Both hold tensors of the same names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from dist_export.checkpoint.arch_roots import find_arch_roots, find_model_root
from dist_export.checkpoint.model_weights import plain_name  # copies of one model differ in wrappers
from dist_export.checkpoint.state_keys import (
    COLLECTIONS,
    COPY_WORDS,
    MODEL_KEYS,
    STATE_WORDS,
    Member,
    Root,
    dotted,
    find_roots,
    is_copy,
    is_copy_of,
    is_own,
    list_some,
    nested_root,
    words_of,
)
from dist_export.checkpoint.tensor_settings import WHOLE, TensorSettings
from dist_export.checkpoint.wrapping_prefix import strip_wrapping_prefix
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
        if all(within in spellings[name] for name, within in names.items()):
            known = frozenset(spelling for its in spellings.values() for spelling in its)
            several = "" if settings.state_root else _say_several(rest)
            return State(names, frozenset(optimizer), known, left_out, notes, several)
        for name, within in names.items():
            spellings[name].add(within)


_Choice = tuple[dict[str, str], dict[str, str], tuple[str, ...]]
"""``names``, ``left_out`` and ``notes`` of a :class:`State`."""


def _choose(members: Sequence[Member], settings: TensorSettings, *, where: str, leaves_rest: bool) -> _Choice:
    if settings.state_root is None:
        names, removed, notes = _choose_model(members, settings, where=where, leaves_rest=leaves_rest)
        return names, removed, (*notes, *_note_average(members, names, settings.model_paths, where))
    if settings.state_root == WHOLE:
        return {member.name: member.name for member in members}, {}, ()
    begin = f"{settings.state_root}."
    below = [member for member in members if member.name.startswith(begin)]
    roots = find_roots(members)
    if not below:
        raise UnaskedError(
            f"{where}: state_root is {settings.state_root!r}, but no tensor lies below it; there are "
            f"{_count_roots(members, roots)}"
            "; set state_root to one of them"
        )
    inner = [Member(m.name.removeprefix(begin), _cut_path(m, len(begin)), m.shape) for m in below]
    names, removed, notes = _choose_model(inner, settings, where=where, leaves_rest=leaves_rest)
    outside = {m.name: _root_of(m, roots) for m in members if not m.name.startswith(begin)}
    if outside:
        told = list_some(sorted(set(outside.values())))
        notes = (f"{where}: state_root takes what {settings.state_root!r} holds; left out: {told}", *notes)
    left_out = {begin + name: begin + root for name, root in removed.items()} | outside
    return {begin + name: within for name, within in names.items()}, left_out, notes


def _choose_model(members: Sequence[Member], settings: TensorSettings, *, where: str, leaves_rest: bool) -> _Choice:
    """Choose among the keys of nested dicts, then among the beginnings of names."""
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
    names, copies, notes = _choose_flat(found, model_paths, where=where)
    if left_out:
        notes = (_say_choice(where, dotted(chosen or ()), left_out.values()), *notes)
    if rivals and chosen is None and any(is_copy_of(by_root[a], by_root[b]) for a in rivals for b in rivals if a != b):
        told = list_some(sorted({_root_of(m, roots) for m in members if root_of[m.name] in rivals}))
        several = f"{where} holds several states with the same names: {told}"
        notes = (f"{several}; each is taken under its full name, and state_root takes one of them", *notes)
    return names, left_out | copies, notes


def _choose_arches(
    members: Sequence[Member], root_of: Mapping[str, Root], arches: Mapping[Root, str], *, where: str
) -> _Choice:
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
            found.add(dotted(root) if is_average else _copy_path(names[member.name], model_paths))
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


def _choose_flat(
    found: Mapping[str, tuple[str, tuple[int, ...]]], model_paths: Sequence[str], *, where: str
) -> _Choice:
    """Leave out copies of a model that the begin of their names tells; ``found``: full name -> name within, shape."""
    names = {name: within for name, (within, _) in found.items()}
    copy_of = {name: _copy_path(within, model_paths) for name, within in names.items()}
    copies: dict[str, dict[str, tuple[int, ...]]] = {}
    others: dict[str, tuple[int, ...]] = {}
    for name, (within, shape) in found.items():
        if path := copy_of[name]:
            copies.setdefault(path, {})[plain_name(within.removeprefix(f"{path}."))] = shape
        else:
            others[within] = shape
    original_of: dict[str, str] = {}
    doubtful: list[str] = []
    for path, its in copies.items():
        alike = {root: model for root, model in _siblings(path, others).items() if is_copy_of(its, model)}
        parent, _, key = path.rpartition(".")
        originals = [
            root
            for root, model in alike.items()
            if _is_surely_copy(key, its, root.rpartition(".")[2], model, is_rest=_holds_all(root, others))
        ]
        inner = [root for root in originals if root != parent]
        if len(inner or originals) == 1:
            (original_of[path],) = inner or originals
        elif alike:
            doubtful.append(path)
    told = () if not doubtful else (_say_doubtful(where, doubtful),)
    left_out = {name: path for name, path in copy_of.items() if path in original_of}
    kept = {name: within for name, within in names.items() if name not in left_out}
    if not left_out:
        return kept, {}, told
    root, *more = sorted(set(original_of.values()))
    note = _say_choice(where, root, left_out.values())
    is_model = root.rpartition(".")[2] in MODEL_KEYS and not more and not is_own(root, model_paths)
    if is_model and all(within.startswith(f"{root}.") or "state" in within.split(".") for within in kept.values()):
        kept = {name: within.removeprefix(f"{root}.") for name, within in kept.items()}
    return kept, left_out, (note, *told)


def _copy_path(name: str, model_paths: Sequence[str]) -> str:
    """Return the begin of a name up to the element that tells of a copy; empty where none does, or it is the model's own."""
    elements = name.split(".")
    for place, element in enumerate(elements[:-1]):
        if element in COLLECTIONS:  # a table may be called anything
            return ""
        if is_copy(element):
            path = ".".join(elements[: place + 1])
            is_within = any(f".{own}." in f".{path}." for own in model_paths if own)
            return "" if is_within or is_own(path, model_paths) else path
    return ""


def _siblings(path: str, others: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return what may be the original of a copy, by root: what lies beside it, as a whole and by its first element."""
    begin = path[: path.rfind(".") + 1]
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in others.items():
        if name.startswith(begin):
            element, _, behind = name[len(begin) :].partition(".")
            found.setdefault(begin.removesuffix("."), {})[plain_name(name[len(begin) :])] = shape
            if behind:
                found.setdefault(begin + element, {})[plain_name(behind)] = shape
    return found


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
        _is_surely_copy(
            next(filter(is_copy, root), ""), by_root[root], "".join(chosen[-1:]), by_root[chosen], is_rest=is_rest
        )
        for root in rivals
        if root != chosen
    )


def _is_surely_copy(
    key: str, copy: Mapping[str, tuple[int, ...]], original: str, model: Mapping[str, tuple[int, ...]], *, is_rest: bool
) -> bool:
    """Whether what lies below ``key`` is the copy of a whole model, for certain. The model's own tables may be called so too.

    Args:
        key: the key that tells of a copy.
        copy: its tensors.
        original: the last key of what it may be the copy of; empty for what lies beside it.
        model: the tensors of that.
        is_rest: whether there is nothing else in the checkpoint.
    """
    words = words_of(key) - COPY_WORDS - STATE_WORDS
    is_model = not original or original in MODEL_KEYS
    if is_model and not words:
        return is_copy_of(copy, model)
    tensors = {name: shape for name, shape in copy.items() if shape}  # a copy counts its updates
    is_whole = len(tensors) > 1 and all(model.get(name) == shape for name, shape in tensors.items())
    return is_whole and (is_model or (is_rest and words in (set(), words_of(original) - STATE_WORDS)))


def _holds_all(root: str, tensors: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether all of the tensors but single numbers lie below ``root``."""
    return all(name.startswith(f"{root}.") for name, shape in tensors.items() if shape)


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


def _say_choice(where: str, chosen: str, removed: Iterable[str]) -> str:
    what = f"what {chosen!r} holds" if chosen else "what lies beside them"
    return f"{where}: the model is {what}; left out: {list_some(sorted(set(removed)))} (state_root takes another one)"


def _say_doubtful(where: str, paths: Sequence[str]) -> str:
    return (
        f"{where}: {list_some(sorted(paths))} may be a moving average by its name, which is not certain: it is taken with the "
        "rest (state_root takes one state alone)"
    )
