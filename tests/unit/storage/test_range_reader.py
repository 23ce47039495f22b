"""Reading an object of a store by ranges: which requests are made for what is asked, and that the bytes are right."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_export.errors import TransferError
from dist_export.storage.range_reader import LocalReader, RangeReader
from dist_export.storage.s3_reader import S3Reader
from tests.support.properties import examples

DATA = bytes(range(256)) * 1000


class FakeStore:
    """An S3 store with one object; remembers what was asked for."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data = data
        self.asked: list[tuple[int, int]] = []
        self.threads: set[int] = set()

    def get(self, path: str, begin: int, end: int, *, etag: str | None = None) -> bytes:
        self.asked.append((begin, end))
        self.threads.add(threading.get_ident())
        return self.data[begin:end]

    def get_ranges(self, path: str, ranges: list[tuple[int, int]], *, etag: str | None = None) -> list[bytes]:
        return [self.get(path, *edges) for edges in ranges]


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


def open_on(store: FakeStore) -> RangeReader:
    return S3Reader("s3://b/x", store, "b/x", head_bytes=1000, request_bytes=3000, near_bytes=50)  # type: ignore[arg-type]


def read(reader: RangeReader, offset: int, length: int) -> bytes:
    view = bytearray(length)
    reader.read_into(memoryview(view), offset)
    return bytes(view)


def test_a_header_is_one_request(store: FakeStore) -> None:
    reader = open_on(store)
    assert store.asked == []
    assert read(reader, 0, 8) == DATA[:8]
    assert read(reader, 8, 700) == DATA[8:708]
    assert store.asked == [(0, 1000)]
    assert read(reader, 900, 500) == DATA[900:1400], "what is there already is not asked for again"
    assert store.asked[1:] == [(1000, 1400)]


def test_a_long_read_is_several_requests(store: FakeStore) -> None:
    assert read(open_on(store), 5000, 7000) == DATA[5000:12000]
    assert store.asked == [(5000, 8000), (8000, 11000), (11000, 12000)]


def test_scattered_rows_are_put_together(store: FakeStore) -> None:
    views = [bytearray(20) for _ in range(4)]
    places = [4000, 4060, 9000, 4030]
    open_on(store).read_many([(memoryview(view), place) for view, place in zip(views, places, strict=True)])
    assert [bytes(view) for view in views] == [DATA[place : place + 20] for place in places]
    assert store.asked == [(4000, 4080), (9000, 9020)]


def test_a_stream_reads_ahead_of_its_use_and_no_further(store: FakeStore) -> None:
    reader = open_on(store)
    found = bytearray(20_000)
    with reader.ahead(2000, 20_000, window_bytes=6000) as stream:
        for first in range(0, 20_000, 1000):
            stream.read_into(memoryview(found)[first : first + 1000])
            if first == 0:
                stream._next.result()
                assert max(end for _, end in store.asked) == 14_000, "two windows, and no more"
    assert bytes(found) == DATA[2000:22_000]
    assert min(store.asked)[0] == 2000
    assert max(end for _, end in store.asked) == 22_000
    assert sum(end - begin for begin, end in store.asked) == 20_000
    assert threading.get_ident() not in store.threads


@examples(50)
@given(st.integers(0, 5000), st.integers(1, 9000), st.integers(1, 4000), st.integers(1, 3000))
def test_a_stream_gives_every_byte_once(offset: int, length: int, window: int, piece: int) -> None:
    store = FakeStore()
    found = bytearray(length)
    with open_on(store).ahead(offset, length, window_bytes=window) as stream:
        for first in range(0, length, piece):
            stream.read_into(memoryview(found)[first : first + piece])
    assert bytes(found) == DATA[offset : offset + length]
    assert sum(end - begin for begin, end in store.asked) == length


@pytest.mark.parametrize("offset", [10, 3000])
def test_an_object_that_has_shrunk(store: FakeStore, offset: int) -> None:
    store.data = DATA[:500]
    with pytest.raises(TransferError, match=r"ended at byte .* it shrank while it was being read"):
        read(open_on(store), offset, 700)
    with pytest.raises(TransferError, match="ended at byte 500, 500 bytes before the end"):
        open_on(store).read_many([(memoryview(bytearray(500)), 0), (memoryview(bytearray(500)), 500)])


def test_scattered_ranges_of_a_file_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call may read less than it was asked for, and a file may have been cut short."""
    path = tmp_path / "rows"
    path.write_bytes(DATA[:1000])
    fd = os.open(path, os.O_RDONLY)
    reader = LocalReader(str(path), fd)
    views, places = [bytearray(20) for _ in range(3)], [980, 0, 500]
    reader.read_many([(memoryview(view), place) for view, place in zip(views, places, strict=True)])
    assert [bytes(view) for view in views] == [DATA[place : place + 20] for place in places]
    with pytest.raises(TransferError, match=r"rows: ended at byte 1,000, 10 bytes before the end"):
        reader.read_many([(memoryview(bytearray(20)), 990)])
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:7]], offset))
    found = bytearray(20)
    reader.read_many([(memoryview(found), 300)])
    assert bytes(found) == DATA[300:320]
    reader.close()
