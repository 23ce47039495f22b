"""Compare the files of a package with the sizes and digests that its manifest states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import numpy as np

from dist_export.errors import DistExportError
from dist_export.formats.digests import (
    SHA256,
    SHA256_PARTS,
    algorithm_of,
    digest_of_parts,
    hash_chunks,
    hash_whole,
    root_digest,
)
from dist_export.formats.tuning import STANDARD
from dist_export.humanize import count
from dist_export.manifest import MANIFEST, FileEntry, Manifest
from dist_export.package.shard_headers import fact_of
from dist_export.storage.directory import Directory
from dist_export.storage.range_reader import RangeReader
from dist_export.verify.listing import Listing
from dist_export.verify.report import Report
from dist_export.verify.work_split import Work, cut

_BUFFER_BYTES = 1 << 20


class ChunkDigests(NamedTuple):
    """Digests of neighbouring chunks of one file, or why there are none."""

    file: int
    first: int
    digests: tuple[bytes, ...]
    error: str = ""


def check_sizes(
    directory: Directory, manifest: Manifest, listing: Listing, report: Report
) -> tuple[tuple[tuple[str, int, str], ...], frozenset[str]]:
    """Return (path, bytes, digest) of the files to hash, and the files that already have a finding."""
    to_hash: dict[str, tuple[str, int, str]] = {}
    bad: set[str] = {path for path in listing.files if listing.leads_out(path)}
    for entry in manifest.files:
        if entry.path in to_hash:
            report.add(MANIFEST, "manifest", f"lists the file {entry.path!r} twice")
            continue
        if listing.leads_out(entry.path):
            bad.add(entry.path)
            continue
        try:
            size = directory.stat(entry.path).size
        except FileNotFoundError:
            bad.add(entry.path)
            report.add(entry.path, "size", f"is missing; the manifest says {entry.num_bytes:,} bytes")
            continue
        except OSError as error:
            bad.add(entry.path)
            report.add(entry.path, "size", f"cannot be read: {error.strerror or error}")
            continue
        if size != entry.num_bytes:
            bad.add(entry.path)
            report.add(entry.path, "size", f"has {size:,} bytes, the manifest says {entry.num_bytes:,}")
            continue
        digest = entry.digest
        if algorithm_of(digest) == SHA256_PARTS and (fault := _fault_of_parts(entry)):
            report.add(entry.path, "digest", f"{fault} in the manifest, so its digest cannot be compared")
            digest = ""
        to_hash[entry.path] = (entry.path, size, digest)
    return tuple(to_hash.values()), frozenset(bad)


def _fault_of_parts(entry: FileEntry) -> str:
    if entry.parts is msgspec.UNSET or sum(part.num_bytes for part in entry.parts) != entry.num_bytes:
        return "its parts do not add up"
    try:
        digest = digest_of_parts(bytes.fromhex(part.sha256) for part in entry.parts)
    except ValueError:
        return "its parts have no digests"
    return "" if digest == entry.digest else "its parts do not belong to its digest"


def find_parts(
    manifest: Manifest, to_hash: tuple[tuple[str, int, str], ...]
) -> dict[int, tuple[tuple[int, bytes], ...]]:
    """Return bytes and SHA-256 of each part of files that a store assembled from parts, by their index in ``to_hash``."""
    parts = {entry.path: entry.parts for entry in manifest.files if entry.parts is not msgspec.UNSET}
    return {
        place: tuple((part.num_bytes, bytes.fromhex(part.sha256)) for part in parts[path])
        for place, (path, _, digest) in enumerate(to_hash)
        if algorithm_of(digest) == SHA256_PARTS
    }


def cut_files(work: Work, *, chunk_bytes: int = STANDARD.chunk_bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return file, first byte and bytes (int64) of each chunk, or part, of the files to hash."""
    files = enumerate(work.digest_files)
    sizes = [size if digest and place not in work.digest_parts else 0 for place, (_, size, digest) in files]
    columns = [np.stack(cut(np.array(sizes, np.int64), chunk_bytes))]
    for place, parts in work.digest_parts.items():
        num_bytes = np.array([size for size, _ in parts], np.int64)
        columns.append(np.stack([np.full_like(num_bytes, place), np.cumsum(num_bytes) - num_bytes, num_bytes]))
    file, first, size = np.concatenate(columns, axis=1)
    is_needed = (size > 0) | ~np.isin(file, list(work.digest_parts))
    return file[is_needed], first[is_needed], size[is_needed]


def hash_share(
    directory: Directory, work: Work, chosen: slice, *, chunk_bytes: int = STANDARD.chunk_bytes
) -> list[ChunkDigests]:
    """Hash a run of the chunks of :func:`cut_files`. Any rank, any thread."""
    file, first, size = (column[chosen] for column in cut_files(work, chunk_bytes=chunk_bytes))
    edges = np.flatnonzero(np.diff(file)) + 1
    found = []
    for numbers, begins, sizes in zip(*(np.split(column, edges) for column in (file, first, size)), strict=True):
        if not len(numbers) or not work.digest_files[numbers[0]][2]:
            continue
        path, _, digest = work.digest_files[numbers[0]]
        begin = int(begins[0])
        where = int(numbers[0]), begin // chunk_bytes
        try:
            with directory.open_reader(path) as reader:
                if int(numbers[0]) in work.digest_parts:
                    ends = (begins + sizes).tolist()
                    hashed = [
                        hash_whole(_read_pieces(reader, *edges), SHA256)
                        for edges in zip(begins.tolist(), ends, strict=True)
                    ]
                    found.append(ChunkDigests(int(numbers[0]), begin, tuple(hashed)))
                    continue
                pieces = _read_pieces(reader, begin, begin + int(sizes.sum()))
                hashes = hash_chunks(pieces, algorithm_of(digest), chunk_bytes=chunk_bytes)
                found.append(ChunkDigests(*where, tuple(hashes)))
        except DistExportError as error:
            found.append(ChunkDigests(*where, (), fact_of(error)))
        except OSError as error:
            found.append(ChunkDigests(*where, (), error.strerror or str(error)))
    return found


def compare_digests(work: Work, shares: list[ChunkDigests], report: Report) -> None:
    """Compute the digest of each file from those of its chunks, and compare it with the manifest's."""
    by_file: dict[int, list[ChunkDigests]] = {}
    for share in shares:
        by_file.setdefault(share.file, []).append(share)
    num_bytes = 0
    for number, (path, size, stated) in enumerate(work.digest_files):
        num_bytes += size
        if not stated:
            continue
        parts = sorted(by_file[number])
        error = next((part.error for part in parts if part.error), "")
        if error:
            report.add(path, "digest", f"its digest cannot be taken: {error}")
            continue
        if number in work.digest_parts:
            _compare_parts(path, work.digest_parts[number], [d for part in parts for d in part.digests], report)
            continue
        digest = root_digest((d for part in parts for d in part.digests), algorithm_of(stated))
        if digest != stated:
            report.add(path, "digest", f"its content is not what was written (digest {digest}, not {stated})")
    row_indexed = sum(not stated for _, _, stated in work.digest_files)
    but = f" (sizes alone of {row_indexed}, which were exported without a digest)" if row_indexed else ""
    report.checked.insert(
        0, f"{count(len(work.digest_files), 'file')}, {count(num_bytes, 'byte')}: sizes and digests{but}"
    )


def _compare_parts(path: str, stated: tuple[tuple[int, bytes], ...], found: list[bytes], report: Report) -> None:
    begin = 0
    for (num_bytes, expected), digest in zip(stated, found, strict=True):
        if digest != expected:
            where, digests_of = f"bytes {begin:,} to {begin + num_bytes:,}", f"{digest.hex()}, not {expected.hex()}"
            report.add(path, "digest", f"{where} are not what was written (sha256 {digests_of})")
            return
        begin += num_bytes


def _read_pieces(reader: RangeReader, begin: int, end: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, max(end - begin, 1))))
    with reader.ahead(begin, end - begin) as stream:
        for offset in range(begin, end, len(buffer)):
            piece = buffer[: min(len(buffer), end - offset)]
            stream.read_into(piece)
            yield piece
