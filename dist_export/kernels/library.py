"""Load the library of the compiled kernels. It must have been built from the sources that lie beside it."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from dist_export.kernels.sources import digest_sources


class NoLibraryError(Exception):
    """There is no library that can be used. The text says why."""


class NotBuiltError(NoLibraryError):
    """No library was built: there was no compiler, or nobody asked it."""


class OtherSourcesError(NoLibraryError):
    """The library was built from other sources: it is left over from an earlier version."""


def load_library(path: Path) -> ctypes.CDLL:
    """Return the library. NoLibraryError if it is missing, cannot be loaded here, or was built from other sources."""
    if not path.exists():
        raise NotBuiltError(f"{os.path.basename(path)} was not built")
    if sys.byteorder != "little":
        raise NoLibraryError("this machine is not little-endian")
    try:
        library = ctypes.CDLL(str(path))
        read_digest = library.kernels_source_digest
        read_digest.restype = ctypes.c_char_p
        found = read_digest()
    except (OSError, AttributeError) as error:
        raise NoLibraryError(f"{path} cannot be loaded: {' '.join(str(error).split())}") from error
    if found != digest_sources().encode():
        raise OtherSourcesError(f"{path} was built from other sources than those in {path.parent}")
    return library
