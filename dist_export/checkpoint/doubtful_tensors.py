"""Tensors that are no table of the package and may be taken for one: each is named, for nothing is left out in silence. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from dist_export.checkpoint.model_weights import ModelWeights
from dist_export.humanize import count, few

MANY_ROWS = 4096
"""A matrix of more rows is looked at twice: few layers are so wide, and most tables are longer."""

Shape = tuple[int, ...]


def note_left(
    left: Sequence[tuple[str, Shape]],
    states: Iterable[tuple[str, Shape]],
    *,
    kept_dense: Sequence[str],
    weights: ModelWeights | None,
    left_out: Sequence[tuple[str, str, Shape]] = (),
) -> tuple[str, ...]:
    """Return what is to be told of tensors that are no table: a warning for each that looks like one, and what the model says.

    Args:
        left: (name, shape) of what is neither a table nor, with a model, in the program.
        states: (tail, shape) of optimizer state of no table; a tail names the parameter, then the slot.
        kept_dense: names that a pattern of ``treat_as_tables`` matches and the program keeps.
        weights: what the model says, where there is one.
        left_out: (full name, name within its state, shape) of what is in another state than the model's, and no copy of it.
    """
    states = list(states)
    unused = [] if weights is None else _note_unused([name for name, _ in left], weights)
    return (
        *_note_kept_dense(kept_dense),
        *unused,
        *_note_doubtful([(name, name, shape) for name, shape in left], states),
        *_note_doubtful(left_out, states, needs="state_root: . and "),
    )


def _note_doubtful(
    found: Sequence[tuple[str, str, Shape]], states: Sequence[tuple[str, Shape]], *, needs: str = ""
) -> list[str]:
    """Return a warning for each matrix that looks like a table; ``needs``: a setting without which it cannot be one.

    ``found``: (name, name by which optimizer state has it, shape).
    """
    matrices: dict[str, set[Shape]] = {}
    for _, within, shape in found:
        if len(shape) == 2:
            matrices.setdefault(within, set()).add(shape)
    by_row = {
        (name, weight)
        for tail, shape in states
        if matrices and (len(shape) == 1 or shape[1:] == (1,))
        for name in _names_in(tail)
        for weight in matrices.get(name, ())
        if _is_by_row(shape, weight)
    }
    return [
        f"{name!r} of shape {list(shape)} is in no table, though it "
        f"{_why(shape, is_by_row=(within, shape) in by_row)}: if rows of it are looked up, they are in no file. To export it as "
        f'a table say {needs}treat_as_tables: ["{name}"]'
        for name, within, shape in found
        if len(shape) == 2 and (shape[0] > MANY_ROWS or (within, shape) in by_row)
    ]


def _note_unused(names: Sequence[str], weights: ModelWeights) -> list[str]:
    """Return a note on what is neither a table nor within the dense arch of the model; nothing where there is none."""
    if not names:
        return []
    elsewhere = [name for name in names if name in weights.elsewhere]
    tables = f"; weights of embeddings among them: {few(elsewhere)}" if elsewhere else ""
    note = (
        f"{count(len(names), 'tensor')} of the checkpoint ({few(names)}) in no shard: neither the weight of an embedding module "
        f"in {weights.sparse_name or 'the model'} nor within {weights.dense_name or 'the model'}{tables}"
    )
    return [note]


def _note_kept_dense(names: Sequence[str]) -> list[str]:
    """Return a note on what a pattern of ``treat_as_tables`` matches and the program keeps; nothing where there is none."""
    if not names:
        return []
    return [f"tables matches {few(names)}, which stay in the program: they are within the dense arch"]


def _names_in(tail: str) -> Iterator[str]:
    """Yield all names that a tail may have in it: runs of its steps, but for the last, which is of the slot."""
    steps = tail.split(".")
    for first in range(len(steps) - 1):
        for last in range(first + 1, len(steps)):
            yield ".".join(steps[first:last])


def _is_by_row(state: Shape, weight: Shape) -> bool:
    """Whether optimizer state has one value for each row of a matrix of several columns."""
    return len(weight) == 2 and state != weight and state in ((weight[0],), (weight[0], 1)) and math.prod(weight) > 0


def _why(shape: Shape, *, is_by_row: bool) -> str:
    rows = f"has {shape[0]:,} rows" if shape[0] > MANY_ROWS else ""
    return " and ".join(filter(None, (rows, "has optimizer state of one value a row" if is_by_row else "")))
