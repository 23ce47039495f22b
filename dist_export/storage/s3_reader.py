"""Read objects of S3 at positions: ranges close together share a request, and a long range is fetched in parallel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dist_export.runtime.io_activity import ACTIVITY
from dist_export.storage.local_io import naming_any
from dist_export.storage.range_reader import WINDOW_BYTES, RangeReader
from dist_export.storage.s3 import S3

_HEAD_BYTES = 64 << 10
"""How much the first small read fetches: most headers are shorter."""
_REQUEST_BYTES = 4 << 20
"""Size of one request. Longer ones are not faster; several at once are."""
_REQUESTS_AT_ONCE = 16
NEAR_BYTES = 64 << 10
"""A gap up to this size is read too, because another request would take longer."""


class S3Reader(RangeReader):
    """An object of S3. The first read also fetches the bytes after it, so that a header takes one request."""

    def __init__(
        self,
        where: str,
        s3: S3,
        path: str,
        *,
        etag: str = "",
        head_bytes: int = _HEAD_BYTES,
        request_bytes: int = _REQUEST_BYTES,
        near_bytes: int = NEAR_BYTES,
    ) -> None:
        """Send no request yet: the first read fails if the object is missing. With ``etag``, only that version is read.

        Args:
            where: names the object in messages.
            s3: the store.
            path: the object there.
            etag: of the version.
            head_bytes: how much the first small read fetches.
            request_bytes: size of one request.
            near_bytes: a gap up to this size is read too.
        """
        self.where = where
        self._head_bytes, self._request_bytes, self._near_bytes = head_bytes, request_bytes, near_bytes
        self._s3 = s3
        self._path = path
        self._etag = etag
        self._head = b""
        """The first bytes of the object, once one of them was read."""

    @property
    def is_ranged(self) -> bool:
        """Whether each read is a request to a store."""
        return True

    def read_many(self, ranges: Sequence[tuple[memoryview, int]]) -> None:
        """Fill several views, each from its own byte on, in any order. EndedError if the object ends before one is full.

        Ranges that are close together are read as one, and several requests are sent at once.
        """
        if len(ranges) < 2:
            super().read_many(ranges)
            return
        ACTIVITY.begin(self.where)
        try:
            with naming_any(self.where):
                for group in _group_ranges(ranges, request_bytes=self._request_bytes, near_bytes=self._near_bytes):
                    found = self._s3.get_ranges(self._path, [(begin, end) for begin, end, _ in group], etag=self._etag)
                    for (begin, _, members), data in zip(group, found, strict=True):
                        for number in members:
                            view, offset = ranges[number]
                            piece = data[offset - begin : offset - begin + len(view)]
                            if len(piece) < len(view):
                                raise self.ended(offset + len(piece), len(view) - len(piece))
                            view[:] = piece
                    ACTIVITY.done += 1
        finally:
            ACTIVITY.end()

    def fetch(self, begin: int, end: int) -> bytes:
        """Return a range; its pieces are requested at once. EndedError if the object ends before the range does."""
        step = self._request_bytes
        pieces = [(first, min(first + step, end)) for first in range(begin, end, step)]
        with naming_any(self.where):
            found = self._s3.get_ranges(self._path, pieces, etag=self._etag)
        data = found[0] if len(found) == 1 else b"".join(found)
        if len(data) < end - begin:
            raise self.ended(begin + len(data), end - begin - len(data))
        return data

    def _fill(self, view: memoryview, offset: int) -> None:
        end = offset + len(view)
        if offset < self._head_bytes and end <= self._head_bytes and not self._head and len(view):
            with naming_any(self.where):
                self._head = self._s3.get(self._path, 0, self._head_bytes, etag=self._etag)
        done = self._head[offset:end]
        if done:
            view[: len(done)] = done
        if len(done) < len(view):
            if self._head and len(self._head) < self._head_bytes:  # the whole object is in the head
                raise self.ended(max(len(self._head), offset), end - max(len(self._head), offset))
            view[len(done) :] = self.fetch(offset + len(done), end)


def _group_ranges(
    ranges: Sequence[tuple[memoryview, int]], *, request_bytes: int, near_bytes: int
) -> Iterator[list[tuple[int, int, list[int]]]]:
    """Yield groups of requests to send at once: (first byte, byte after the last, indices of ``ranges`` inside it)."""
    group: list[tuple[int, int, list[int]]] = []
    num_bytes = 0
    for number in sorted(range(len(ranges)), key=lambda number: ranges[number][1]):
        view, offset = ranges[number]
        end = offset + len(view)
        if group and offset - group[-1][1] <= near_bytes and end - group[-1][0] <= request_bytes:
            begin, last, members = group[-1]
            members.append(number)
            group[-1] = (begin, max(last, end), members)
            continue
        if len(group) == _REQUESTS_AT_ONCE or num_bytes > WINDOW_BYTES:
            yield group
            group, num_bytes = [], 0
        group.append((offset, end, [number]))
        num_bytes += len(view)
    if group:
        yield group
