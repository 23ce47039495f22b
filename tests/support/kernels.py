"""The implementations of the kernels that the tests run: numpy, and the compiled library in plain C and for AVX2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dist_export.kernels.compiled import CompiledKernels, best_level
from dist_export.kernels.library import NoLibraryError, load_library
from dist_export.kernels.numpy_kernels import NumpyKernels
from dist_export.kernels.protocol import Kernels
from dist_export.kernels.sources import LIBRARY

IMPLEMENTATIONS = ("numpy", "plain C", "AVX2")
UNDER_TEST = "KERNELS_UNDER_TEST"
"""The environment variable of another library to test, such as one that was built with sanitizers."""
REQUIRED = "DIST_EXPORT_REQUIRE_TOOLS"

TWIN = NumpyKernels()
SEED = 0x0123456789ABCDEF
"""The seed of the compiled kernels here: for a known one, ids can be crafted."""


def open_kernels(name: str, **sizes: int) -> Kernels:
    """Return one of IMPLEMENTATIONS; if it is not here the test skips, or fails if it must run.

    ``sizes``: in the place of its own, such as ``direct_ids``.
    """
    if name == "numpy":
        return NumpyKernels("", **sizes) if sizes else TWIN
    level = IMPLEMENTATIONS.index(name) - 1
    reason = ""
    try:
        library = load_library(Path(os.environ.get(UNDER_TEST, LIBRARY)))
        if level <= best_level(library):
            return CompiledKernels(library, level=level, seed=SEED, **sizes)
        reason = "this processor has no AVX2, BMI2 and F16C"
    except NoLibraryError as error:
        reason = f"{error}; scripts/make_env.sh builds it if there is a C compiler"
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{reason} (${REQUIRED} asks for it)")
    pytest.skip(reason)


def open_best(**sizes: int) -> Kernels:
    """Return the implementation that a process selects by itself, with other sizes."""
    try:
        library = load_library(LIBRARY)
    except NoLibraryError:
        return NumpyKernels("", **sizes)
    return CompiledKernels(library, level=best_level(library), **sizes)
