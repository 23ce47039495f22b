"""A module around the trained model, whose attribute is in front of every key, as PyTorch Lightning saves ``model.x``. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dist_export.checkpoint.model_weights import WRAPPER_ELEMENTS, ModelWeights, plain_name


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


def _has_any(names: Collection[str], weights: ModelWeights) -> bool:
    """Whether a name is one of the model's, from the model on, or from the sparse arch on, which may be saved alone."""
    begin = f"{weights.sparse_name}." if weights.sparse_name else ""
    dense = {f"{weights.dense_name}.{name}" if weights.dense_name else name for name in weights.dense_names}
    known = weights.tables | dense | weights.elsewhere
    return any(plain in known or begin + plain in weights.tables for plain in map(plain_name, names))


def _without(name: str, first: str) -> str:
    """Return a name without its first element that is none of a wrapper's; another name as it is."""
    elements = name.split(".")
    place = next((place for place, element in enumerate(elements) if element not in WRAPPER_ELEMENTS), 0)
    is_below = elements[place] == first and place + 1 < len(elements)
    return ".".join(elements[place + 1 :]) if is_below else name
