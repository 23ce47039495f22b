"""Digests of files: one of each 64 MiB-aligned chunk, and a root over these. So several writers or readers can share a file.

A digest is written ``<algorithm>:<hex>``; the root is the algorithm over the chunk digests, concatenated in order.
``none`` means no digest, and its text is empty.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, cast

import xxhash

from dist_export.errors import PackageError
from dist_export.formats.tuning import STANDARD

XXH3 = "xxh3"
SHA256 = "sha256"
NONE = "none"
SHA256_PARTS = "sha256-parts"
"""For files that an S3 store assembles: the sha256 over the sha256 of each part. The part sizes are recorded."""
ALGORITHMS = (XXH3, SHA256, "blake3", NONE)

_EXTRA = {"blake3": "blake3"}
"""Algorithms that need a package of their own -> that package."""


class Hasher(Protocol):
    """The common interface of all algorithms."""

    def update(self, data: memoryview, /) -> object:
        """Add bytes."""

    def digest(self) -> bytes:
        """Return the digest of the bytes so far."""


def missing_package(algorithm: str) -> str | None:
    """Return the package that an algorithm needs and that is not installed; None if the algorithm can be used."""
    package = _EXTRA.get(algorithm)
    return package if package is not None and importlib.util.find_spec(package) is None else None


def start_hash(algorithm: str) -> Callable[[], Hasher]:
    """Return a function that makes a new hasher of an algorithm.

    Raises:
        PackageError: the algorithm is unknown, or its package is missing.
    """
    if algorithm == XXH3:
        return xxhash.xxh3_128
    if algorithm == SHA256:
        return hashlib.sha256
    if algorithm == "blake3":
        try:
            import blake3
        except ImportError:
            raise PackageError("digests by blake3 need its package: pip install blake3") from None
        return cast("Callable[[], Hasher]", blake3.blake3)
    raise PackageError(f"{algorithm!r} is no digest algorithm known here; {', '.join(ALGORITHMS[:-1])} are")


def algorithm_of(digest: str) -> str:
    """Return the algorithm of a digest's text; ``none`` for an empty text."""
    return digest.partition(":")[0] if digest else NONE


def hash_chunks(
    pieces: Iterable[memoryview], algorithm: str, *, chunk_bytes: int = STANDARD.chunk_bytes
) -> list[bytes]:
    """Return the digest of each chunk. ``pieces`` cover a chunk-aligned range in order; they may have any length.

    Returns at least one digest: without any bytes, the digest of no bytes.
    """
    new = start_hash(algorithm)
    digests: list[bytes] = []
    hasher = new()
    room = chunk_bytes
    for whole in pieces:
        piece = whole
        while len(piece) >= room:
            hasher.update(piece[:room])
            digests.append(hasher.digest())
            hasher = new()
            piece, room = piece[room:], chunk_bytes
        if len(piece):
            hasher.update(piece)
            room -= len(piece)
    if room < chunk_bytes or not digests:
        digests.append(hasher.digest())
    return digests


def hash_whole(pieces: Iterable[memoryview], algorithm: str) -> bytes:
    """Return the digest of bytes that come in pieces, without dividing them into chunks."""
    hasher = start_hash(algorithm)()
    for piece in pieces:
        hasher.update(piece)
    return hasher.digest()


def digest_of_parts(sha256s: Iterable[bytes]) -> str:
    """Return the digest of a file from the SHA-256 of each of its parts."""
    return f"{SHA256_PARTS}:{hashlib.sha256(b''.join(sha256s)).hexdigest()}"


def root_digest(chunk_digests: Iterable[bytes], algorithm: str = XXH3) -> str:
    """Return the digest of a file from the digests of its chunks."""
    hasher = start_hash(algorithm)()
    hasher.update(memoryview(b"".join(chunk_digests)))
    return f"{algorithm}:{hasher.digest().hex()}"


def digest_pieces(pieces: Iterable[memoryview], algorithm: str, *, chunk_bytes: int = STANDARD.chunk_bytes) -> str:
    """Return the digest of a whole file that comes in pieces."""
    return root_digest(hash_chunks(pieces, algorithm, chunk_bytes=chunk_bytes), algorithm)


def digest_bytes(data: bytes, algorithm: str = XXH3, *, chunk_bytes: int = STANDARD.chunk_bytes) -> str:
    """Return the digest of a file's whole content."""
    return digest_pieces(_whole(data), algorithm, chunk_bytes=chunk_bytes)


def _whole(data: bytes) -> Iterator[memoryview]:
    yield memoryview(data)
