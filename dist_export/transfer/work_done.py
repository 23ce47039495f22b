"""Define what ranks and threads report about their work: digests of chunks, pieces of files, and counts."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from dist_export.storage.s3 import UploadedPart

ChunkDigests = dict[tuple[int, int], list[bytes]]
"""(output file, first byte) -> digests of the chunks from that byte on."""


class Share(NamedTuple):
    """The work of one rank."""

    rank: int
    num_units: int = 0
    num_helped: int = 0
    """The units among them that were assigned to another rank."""
    num_bytes: int = 0
    seconds: float = 0.0

    def plus(self, other: Share) -> Share:
        """Return the sum of both, with this rank's number."""
        return Share(
            self.rank,
            self.num_units + other.num_units,
            self.num_helped + other.num_helped,
            self.num_bytes + other.num_bytes,
            self.seconds + other.seconds,
        )


class Piece(NamedTuple):
    """Finished bytes of a file: the digests of their chunks, and the parts that the thread uploaded."""

    chunks: list[bytes]
    parts: list[UploadedPart]


PIECES = msgspec.msgpack.Decoder(Piece)


def join_digests(shares: list[ChunkDigests]) -> ChunkDigests:
    """Return the digests of all shares as one mapping."""
    return {key: digests for share in shares for key, digests in share.items()}


def chunks_of_files(found: ChunkDigests) -> dict[int, list[bytes]]:
    """Return the chunk digests of each file, in order."""
    chunks: dict[int, list[bytes]] = {}
    for number, begin in sorted(found):
        chunks.setdefault(number, []).extend(found[number, begin])
    return chunks
