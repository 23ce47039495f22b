"""Tables for which the model has one weight: the checkpoint must have the same values for both."""

from __future__ import annotations

import numpy as np
import torch

from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.sample_rows import SampleRows
from dist_export.errors import ModelError
from dist_export.formats.dtypes import DTYPES
from dist_export.runtime.ranks import Ranks


def refuse_torn_tables(ranks: Ranks, finder: RowFinder, rows: SampleRows) -> None:
    """Compare all rows of tied tables in the checkpoint, a piece at a time; the pieces are shared out. All ranks.

    Args:
        finder: of the checkpoint.
        rows: what this rank's sample has shown of the model.

    Raises:
        ModelError: on all ranks, where two of them differ.
    """
    if finder.is_live:
        return
    told = ranks.all_gather("look for tied tables", lambda: dict(rows.tied))
    tied = {pair: num_rows for its in told for pair, num_rows in its.items()}

    def refuse() -> None:
        for (one, other), num_rows in sorted(tied.items()):
            pieces = finder.pieces(one, num_rows)
            for ids in (ids for place, ids in enumerate(pieces) if place % ranks.world_size == ranks.rank):
                row = _first_apart(finder, one, other, ids)
                if row is not None:
                    raise ModelError(
                        f"the model has one weight for the tables {one!r} and {other!r}, but the checkpoint has different values "
                        f"for them, first in row {row:,}: the model would hold those of one alone. Nothing was written. Export a "
                        "checkpoint of this model, or give a model that does not tie them"
                    )

    ranks.run("compare tied tables", refuse, may_block=True)


def _first_apart(finder: RowFinder, one: str, other: str, ids: np.ndarray) -> int | None:
    """Return the first of the rows that both tables have, and that has other values in the one than in the other."""
    found = finder.scan(one, ids), finder.scan(other, ids)
    has_both = found[0].has_row & found[1].has_row
    values = [_values(finder, table, its.rows[has_both]) for table, its in zip((one, other), found, strict=True)]
    if values[0].shape != values[1].shape:
        return int(ids[0])
    is_apart = ~((values[0] == values[1]) | ((values[0] != values[0]) & (values[1] != values[1])))
    apart = ids[has_both][is_apart.reshape(len(is_apart), -1).any(dim=1).numpy()]
    return int(apart[0]) if len(apart) else None


def _values(finder: RowFinder, table: str, rows: np.ndarray) -> torch.Tensor:
    slot = finder.stored_embedding(table)
    dtype = getattr(torch, DTYPES[slot.dtype].torch)
    return torch.from_numpy(rows.reshape(-1)).view(dtype).reshape(len(rows), *slot.inner_shape).double()
