"""Rows for lookups before the shards are written: those of the checkpoint, as they will be written."""

from __future__ import annotations

import numpy as np
import torch

from dist_export.dense.row_lookup import RowFinder
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.row_encodings import RowCast


class CheckpointRows:
    """Gives the lookup operator the rows that the package will have. Rank 0; reads the checkpoint."""

    def __init__(self, finder: RowFinder, casts: dict[str, RowCast]) -> None:
        self._finder = finder.probe()  # what is found here is not what the sample found
        self._casts = casts
        self._tables = {finder.written_name(name): name for name in finder.exported_names()}

    def describe_rows(self, table: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and the dtype of one row in the package: rows of int8 with scale and bias are float32."""
        slot, cast = self._finder.embedding_of(self._tables[table]), self._casts.get(table)
        if cast is not None and cast.encoding:
            return slot.inner_shape, torch.float32
        code = slot.dtype if cast is None else cast.target
        return slot.inner_shape, getattr(torch, DTYPES[code].torch)

    def find_rows(self, table: str, ids: np.ndarray) -> torch.Tensor:
        """Return the rows (n, ...) of ids (int64, (n,)), with the default row for out-of-vocabulary ids."""
        name = self._tables[table]
        unique, inverse = np.unique(ids, return_inverse=True)
        has_row, rows = self._finder.find(name, unique)
        rows = np.where(has_row[:, None], rows, self._finder.default_row(name)[None])
        slot = self._finder.embedding_of(name)
        values = self._finder.decode(name, np.ascontiguousarray(rows)).reshape(-1)
        source = torch.from_numpy(values.view(np.uint8)).view(getattr(torch, DTYPES[slot.dtype].torch))
        _, dtype = self.describe_rows(table)
        return source.reshape(len(unique), *slot.inner_shape).to(dtype)[torch.from_numpy(inverse.reshape(-1))]
