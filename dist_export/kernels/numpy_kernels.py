"""The kernels in numpy: the definition of what the compiled ones must return, and what runs without them."""

from __future__ import annotations

from dist_export.kernels.numpy_casts import NumpyCasts
from dist_export.kernels.numpy_duplicates import NumpyDuplicates
from dist_export.kernels.numpy_fingerprints import NumpyFingerprints
from dist_export.kernels.numpy_followed_rows import NumpyFollowedRows
from dist_export.kernels.numpy_id_sweep import NumpyIdSweep
from dist_export.kernels.numpy_row_index import NumpyRowIndex
from dist_export.kernels.numpy_rows import NumpyRows


class NumpyKernels(
    NumpyDuplicates,
    NumpyIdSweep,
    NumpyRowIndex,
    NumpyCasts,
    NumpyRows,
    NumpyFingerprints,
    NumpyFollowedRows,
):
    """All kernels in numpy. It implements ``Kernels``."""

    def __init__(self, reason: str = "", **sizes: int) -> None:
        """``reason``: why numpy is used, for people. ``sizes``: those of ``NumpyDuplicates``."""
        super().__init__(**sizes)
        self._reason = reason

    @property
    def description(self) -> str:
        """See the protocol."""
        return f"numpy ({self._reason})" if self._reason else "numpy"
