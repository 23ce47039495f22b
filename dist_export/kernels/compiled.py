"""The compiled kernels: a thin layer that checks arrays and calls the library."""

from __future__ import annotations

import ctypes

from dist_export.kernels.compiled_casts import CompiledCasts
from dist_export.kernels.compiled_duplicates import CompiledDuplicates
from dist_export.kernels.compiled_fingerprints import CompiledFingerprints
from dist_export.kernels.compiled_followed_rows import CompiledFollowedRows
from dist_export.kernels.compiled_id_sweep import CompiledIdSweep
from dist_export.kernels.compiled_row_index import CompiledRowIndex
from dist_export.kernels.compiled_rows import CompiledRows


class CompiledKernels(
    CompiledDuplicates,
    CompiledIdSweep,
    CompiledRowIndex,
    CompiledCasts,
    CompiledRows,
    CompiledFingerprints,
    CompiledFollowedRows,
):
    """All compiled kernels. It implements ``Kernels``."""

    @property
    def description(self) -> str:
        """See the protocol."""
        return "compiled (AVX2, F16C)" if self._level else "compiled (plain C)"


def best_level(library: ctypes.CDLL) -> int:
    """Return the highest level that this processor has."""
    found: int = library.kernels_best_level()
    return found
