"""What a rank and its threads report of their work: digests of chunks, pieces of files, counts."""

from __future__ import annotations

from typing import NamedTuple

from dist_export.storage.s3 import UploadedPart

ChunkDigests = dict[tuple[int, int], list[bytes]]
"""(output file, first byte) -> digests of the chunks from there on."""


class Share(NamedTuple):
    """What one rank did."""

    rank: int
    num_units: int = 0
    num_helped: int = 0
    """Of these, units that were another rank's to begin with."""
    num_bytes: int = 0
    seconds: float = 0.0

    def plus(self, other: Share) -> Share:
        """Return both together."""
        return Share(
            self.rank,
            self.num_units + other.num_units,
            self.num_helped + other.num_helped,
            self.num_bytes + other.num_bytes,
            self.seconds + other.seconds,
        )


class Piece(NamedTuple):
    """What a thread hands in of a file: digests, and the parts that it has uploaded."""

    chunks: list[bytes]
    parts: list[UploadedPart]


def join_digests(shares: list[ChunkDigests]) -> ChunkDigests:
    """Return the digests of all shares as one mapping."""
    return {key: digests for share in shares for key, digests in share.items()}


def chunks_of_files(found: ChunkDigests) -> dict[int, list[bytes]]:
    """Return the chunk digests of each file, in order."""
    chunks: dict[int, list[bytes]] = {}
    for number, begin in sorted(found):
        chunks.setdefault(number, []).extend(found[number, begin])
    return chunks
