"""A plain model of the account of rows, in Python dicts: which rows are kept, which are dropped, what is misplaced.

Nothing of dist_export is used, so that a mistake there cannot hide behind the same mistake here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tests.support.recis_writer import PartSpec


class TableModel(NamedTuple):
    """What an export of one table should give."""

    rows: dict[int, tuple[int, int]]
    """id -> (part in the order of slices, row within it) of the row that is kept."""
    rows_in: int
    misplaced: int
    repaired: int

    @property
    def duplicates(self) -> int:
        return self.rows_in - len(self.rows)


def is_inside(one_id: int, part: tuple[int, int, int]) -> bool:
    """RecIS's rule."""
    begin, end, size = part
    return begin <= (int(one_id) % (1 << 64)) % size < end


def model_of(parts: Sequence[PartSpec], *, keep: str) -> tuple[TableModel, list[PartSpec]]:
    """Return the model and the parts in the order that decides which row is first: by slice, then as they came."""
    ordered = sorted(parts, key=lambda part: part.slice)
    rows: dict[int, tuple[int, int]] = {}
    for number, part in enumerate(ordered):
        for row, one_id in enumerate(part.ids.tolist()):
            if keep == "last" or one_id not in rows:
                rows[one_id] = (number, row)
    strangers = [
        (number, row)
        for number, part in enumerate(ordered)
        for row, one_id in enumerate(part.ids.tolist())
        if not is_inside(one_id, part.slice)
    ]
    kept = set(rows.values())
    return (
        TableModel(
            rows=rows,
            rows_in=sum(len(part.ids) for part in ordered),
            misplaced=len(strangers),
            repaired=sum(place in kept for place in strangers),
        ),
        ordered,
    )


def truth_of_model(parts: Sequence[PartSpec], *, keep: str) -> dict[str, np.ndarray]:
    """Return id and slots of the rows that are kept, sorted by id."""
    model, ordered = model_of(parts, keep=keep)
    places = [model.rows[one_id] for one_id in sorted(model.rows)]
    truth = {"id": np.array(sorted(model.rows), np.int64)}
    for slot in ordered[0].slots:
        values = [ordered[part].slots[slot][row] for part, row in places]
        like = ordered[0].slots[slot]
        truth[slot] = np.array(values, like.dtype).reshape(-1, *like.shape[1:])
    return truth
