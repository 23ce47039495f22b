"""A module around the trained model, whose attribute is in front of its keys, as PyTorch Lightning saves ``model.x``. Pure.

The module around may have state of its own, such as ``criterion.pos_weight``, whose keys lie beside.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from dist_export.checkpoint.model_weights import WRAPPER_ELEMENTS, ModelWeights, plain_name
from dist_export.checkpoint.state_keys import list_some

_MAX_STEPS = 64
"""Of a name. Each end of it is looked up, so more would take for ever."""


def strip_wrapping_prefix(names: Mapping[str, str], weights: ModelWeights | None) -> tuple[dict[str, str], str]:
    """Return the names without what is in front of all of them, where only then the model has any of them; and what that is.

    Args:
        names: full name -> name within the model, as far as it is known. A name without a dot may lie beside.
        weights: what the model says; without a model nothing is known to be in front.
    """
    if weights is None:
        return dict(names), ""
    taken: list[str] = []
    within = dict(names)
    while not _has_any(within.values(), weights):
        firsts = {plain_name(name).partition(".")[0] for name in within.values() if "." in plain_name(name)}
        if len(firsts) != 1:
            return dict(names), ""
        (first,) = firsts
        taken.append(first)
        within = {name: _without(its, first) for name, its in within.items()}
        if len(set(within.values())) < len(within):  # one lies beside another of that name
            return dict(names), ""
    return within, ".".join(taken)


def take_below(names: Mapping[str, str], weights: ModelWeights | None) -> tuple[dict[str, str], str]:
    """Return the names below the one prefix that has all tables and dense parameters of the model, without it, and the prefix.

    Where the model has any name without a prefix, or it is not this one alone that has all of them, the names as they are.
    """
    if weights is None or _has_any(names.values(), weights):
        return dict(names), ""
    found, num_all = names_below(names.values(), weights)
    whole = [prefix for prefix, its in found.items() if len(its) == num_all]
    if len(whole) != 1:
        return dict(names), ""
    (prefix,) = whole
    steps = prefix.split(".")
    within = {name: its for name, its in names.items() if plain_name(its).split(".")[: len(steps)] == steps}
    for step in steps:
        within = {name: _without(its, step) for name, its in within.items()}
    return (dict(names), "") if len(set(within.values())) < len(within) else (within, prefix)


def names_below(names: Iterable[str], weights: ModelWeights) -> tuple[dict[str, set[str]], int]:
    """Return by prefix which tables and dense parameters of the model lie below it, and how many the model has.

    Of tied ones a checkpoint may have any, and one counts for all.
    """
    one_of = {name: tie[0] for tie in weights.ties for name in tie}
    known = {name: one_of.get(name, name) for name in (*weights.tables, *_dense_of(weights))}
    known |= {name: first for name, first in one_of.items() if first in set(known.values())}
    found: dict[str, set[str]] = {}
    for name in names:
        steps = plain_name(name).split(".")
        for place in range(1, len(steps) if len(steps) <= _MAX_STEPS else 1):
            its = known.get(".".join(steps[place:]))
            if its is not None:
                found.setdefault(".".join(steps[:place]), set()).add(its)
    return found, len(set(known.values()))


def say_below(names: Iterable[str], weights: ModelWeights | None, *, root: str | None) -> str:
    """Return below which keys the checkpoint has tables and dense parameters of the model, for an error; else nothing.

    Args:
        names: full ones.
        weights: of the model, whose tables are missed.
        root: the setting ``state_root``.
    """
    if weights is None:
        return ""
    found, num_all = names_below(names, weights)
    told = [f"{len(its):,} below {prefix!r}" for prefix, its in sorted(found.items(), key=lambda its: -len(its[1]))]
    if not told:
        return ""
    first = max(found, key=lambda prefix: len(found[prefix]))
    asked = "" if root is None else f"no table of the model lies below state_root, {root!r}; "
    return asked + (
        f"of {num_all:,} tables and dense parameters that the model has, it holds {list_some(told)}; state_root takes what lies "
        f"below one of them, such as state_root: {first}"
    )


def _has_any(names: Collection[str], weights: ModelWeights) -> bool:
    """Whether a name is one of the model's, from the model on, or from the sparse arch on, which may be saved alone."""
    begin = f"{weights.sparse_name}." if weights.sparse_name else ""
    known = weights.tables | _dense_of(weights) | weights.elsewhere
    return any(plain in known or begin + plain in weights.tables for plain in map(plain_name, names))


def _dense_of(weights: ModelWeights) -> set[str]:
    return {f"{weights.dense_name}.{name}" if weights.dense_name else name for name in weights.dense_names}


def _without(name: str, first: str) -> str:
    """Return a name without its first element that is none of a wrapper's; another name as it is."""
    elements = name.split(".")
    place = next((place for place, element in enumerate(elements) if element not in WRAPPER_ELEMENTS), 0)
    is_below = elements[place] == first and place + 1 < len(elements)
    return ".".join(elements[place + 1 :]) if is_below else name
