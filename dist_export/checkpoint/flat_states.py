"""Copies of a model among flat names, which the begin of a name tells: ``model.x`` beside ``ema.x``. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dist_export.checkpoint.model_weights import plain_name  # copies of one model differ in wrappers
from dist_export.checkpoint.state_keys import (
    COLLECTIONS,
    MODEL_KEYS,
    is_copy,
    is_copy_of,
    is_own,
    is_surely_copy,
    list_some,
)

Choice = tuple[dict[str, str], dict[str, str], tuple[str, ...]]
"""``names``, ``left_out`` and ``notes`` of a :class:`~dist_export.checkpoint.state_roots.State`."""


def choose_flat(
    found: Mapping[str, tuple[str, tuple[int, ...]]], model_paths: Sequence[str], *, where: str, begin: str = ""
) -> Choice:
    """Leave out copies of a model that the begin of their names tells.

    Args:
        found: full name -> name within, shape.
        model_paths: those of the model's own modules.
        where: the checkpoint, for messages.
        begin: stands before all full names in the checkpoint, for messages.
    """
    names = {name: within for name, (within, _) in found.items()}
    copy_of = {name: copy_path(within, model_paths) for name, within in names.items()}
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
            if is_surely_copy(key, its, root.rpartition(".")[2], model, is_rest=_holds_all(root, others))
        ]
        inner = [root for root in originals if root != parent]
        if len(inner or originals) == 1:
            (original_of[path],) = inner or originals
        elif alike:
            doubtful.append(path)
    told = () if not doubtful else (_say_doubtful(where, doubtful),)
    # what state_root takes counts from the whole checkpoint
    left_out = {n: n.removesuffix(names[n]) + path for n, path in copy_of.items() if path in original_of}
    kept = {name: within for name, within in names.items() if name not in left_out}
    if not left_out:
        return kept, {}, told
    root, *more = sorted(set(original_of.values()))
    outer = next((n.removesuffix(its) for n, its in kept.items() if root and its.startswith(f"{root}.")), "")
    note = say_choice(where, root and begin + outer + root, [begin + path for path in left_out.values()])
    is_model = root.rpartition(".")[2] in MODEL_KEYS and not more and not is_own(root, model_paths)
    if is_model and all(within.startswith(f"{root}.") or "state" in within.split(".") for within in kept.values()):
        kept = {name: within.removeprefix(f"{root}.") for name, within in kept.items()}
    return kept, left_out, (note, *told)


def copy_path(name: str, model_paths: Sequence[str]) -> str:
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


def _holds_all(root: str, tensors: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether all of the tensors but single numbers lie below ``root``."""
    return all(name.startswith(f"{root}.") for name, shape in tensors.items() if shape)


def say_choice(where: str, chosen: str, removed: Iterable[str]) -> str:
    """Return a note on which state is read. ``chosen``: its dotted root; ``removed``: those of the others."""
    what = f"what {chosen!r} holds" if chosen else "what lies beside them"
    return f"{where}: the model is {what}; left out: {list_some(sorted(set(removed)))} (state_root takes another one)"


def _say_doubtful(where: str, paths: Sequence[str]) -> str:
    return (
        f"{where}: {list_some(sorted(paths))} may be a moving average by its name, which is not certain: it is taken with the "
        "rest (state_root takes one state alone)"
    )
