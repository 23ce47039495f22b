"""Pick the implementation of the kernels: the one place that does."""

from __future__ import annotations

import functools
import logging
import os
import threading
from typing import TYPE_CHECKING

from dist_export.errors import ConfigError
from dist_export.kernels.sources import LIBRARY

if TYPE_CHECKING:
    from dist_export.kernels.protocol import Kernels  # it imports numpy, which the help of the command does not need

VARIABLE = "DIST_EXPORT_KERNELS"
"""The environment variable that chooses: ``auto`` (the default), ``numpy``, or ``compiled``, which fails without the library."""
CHOICES = ("auto", "numpy", "compiled")

logger = logging.getLogger(__name__)


def check_choice() -> str:
    """Return what the environment variable chooses. ConfigError if it is no choice."""
    choice = os.environ.get(VARIABLE, "") or "auto"
    if choice not in CHOICES:
        raise ConfigError(f"${VARIABLE} is {choice!r}; give one of {', '.join(CHOICES)}")
    return choice


_LOCK = threading.Lock()


def select_kernels() -> Kernels:
    """Return the kernels of this process. A library that is left over from other sources is reported once.

    Raises:
        ConfigError: the variable has another value, or asks for a library that cannot be used.
    """
    with _LOCK:  # threads that come at the same time would each load and report it
        return _select()


@functools.cache
def _select() -> Kernels:
    from dist_export.kernels.library import NoLibraryError, NotBuiltError, load_library
    from dist_export.kernels.numpy_kernels import NumpyKernels

    choice = check_choice()
    if choice == "numpy":
        return NumpyKernels(f"${VARIABLE} is numpy")
    try:
        library = load_library(LIBRARY)
    except NoLibraryError as error:
        if choice == "compiled":
            raise ConfigError(
                f"${VARIABLE} is compiled, but {error}. Install dist_export again on a machine with a C compiler, or choose auto"
            ) from error
        if not isinstance(error, NotBuiltError):
            logger.warning("%s; numpy is used in its place. Install dist_export again", error)
        return NumpyKernels(str(error))
    from dist_export.kernels.compiled import CompiledKernels, best_level

    return CompiledKernels(library, level=best_level(library))
