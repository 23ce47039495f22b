"""The C sources of the compiled kernels, and their digest. Imports nothing but the standard library, because setup.py runs it."""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "src"
LIBRARY = Path(__file__).resolve().parent / "_compiled.so"
"""The shared library, if it was built. Its name has no version of Python, because it uses nothing of Python."""


def list_sources() -> list[Path]:
    """Return the C files and headers, ordered by name."""
    return sorted(path for path in FOLDER.iterdir() if path.suffix in (".c", ".h"))


def digest_sources() -> str:
    """Return a digest of names and contents of the sources: the library must have been built from exactly these."""
    digest = hashlib.sha256()
    for path in list_sources():
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
