"""Made-up rows: no id of a table has one that says something of another one, and each batch has others."""

from __future__ import annotations

import numpy as np
import torch

from dist_export.contract.made_up import MadeUpRows

IDS = np.array([-1, 0, 1, 2, 3, 1 << 40])


class Described:
    def describe_rows(self, table: str) -> tuple[tuple[int, ...], torch.dtype]:
        return (16,), torch.float32


def test_rows_are_looked_up_as_they_are_computed_later() -> None:
    rows = MadeUpRows(Described())
    for _ in range(2):
        turn = rows.renew()
        assert np.array_equal(rows.find_rows("t", IDS).numpy(), rows.rows_of("t", IDS, turn))
        assert rows.asked == {"t": set(IDS.tolist())}


def test_each_turn_table_and_id_has_a_row_of_its_own() -> None:
    """An id whose row were low in each turn would hide in each maximum."""
    rows = MadeUpRows(Described())
    made = [rows.rows_of(table, IDS, turn) for table in ("t", "u") for turn in (1, 2, 3)]
    assert len({row.tobytes() for its in made for row in its}) == 6 * len(IDS)


def test_columns_of_a_row_are_not_those_of_another_one_moved() -> None:
    """Where two columns differ by the same number in each row, a maximum is of the same row in both."""
    made = MadeUpRows(Described()).rows_of("t", IDS, 1)
    differences = (made[:, :, None] - made[:, None, :])[:, ~np.eye(16, dtype=bool)]
    assert (np.abs(differences[1:] - differences[:1]).max(0) > 1e-3).all()
