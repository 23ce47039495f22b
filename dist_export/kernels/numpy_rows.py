"""Rows by owner, in numpy."""

from __future__ import annotations

import numpy as np


class NumpyRows:
    """The twin of ``CompiledRows``. Its order has, for each place, the row that goes there."""

    def order_rows(
        self, owners: np.ndarray, kept: np.ndarray | None, num_targets: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """See the protocol."""
        if kept is not None:
            owners = owners.take(kept)
        order = np.argsort(owners, kind="stable")
        edges = np.searchsorted(owners.take(order), np.arange(num_targets + 1))
        return order if kept is None else kept.take(order), np.diff(edges)

    def move_rows(self, order: np.ndarray, rows: np.ndarray, row_bytes: int, out: np.ndarray) -> None:
        """See the protocol."""
        kind = np.dtype((np.void, row_bytes))  # one item is one row, so take moves whole rows
        np.take(rows.view(kind), order, out=out.view(kind), mode="clip")
