from __future__ import annotations

from collections.abc import Iterator

import pytest

from dist_export.storage.directory import Directory
from dist_export.storage.s3 import S3
from dist_export.storage.s3_directory import S3Directory
from dist_export.storage.traffic import TRAFFIC
from dist_export.storage.urls import open_directory
from tests.support.directory_contract import DirectoryContract
from tests.support.s3.s3_cases import Store
from tests.support.s3.s3_server import S3Server


@pytest.fixture
def store(s3_server: S3Server) -> Store:
    return Store(s3_server)


class TestS3(DirectoryContract):
    @pytest.fixture
    def directory(self, store: Store) -> Iterator[Directory]:
        directory = open_directory(store.url("dir"), store.options)
        yield directory
        open_directory(store.url(""), store.options).remove_tree("dir")


@pytest.mark.parametrize(("there", "is_copied"), [(b"same", True), (b"else", False), (None, False)])
def test_the_store_copies_what_repeats_another_object(store: Store, there: bytes | None, is_copied: bool) -> None:
    old, new = (open_directory(store.url(name), store.options) for name in ("old", "new"))
    if there is not None:
        old.write("f", there)
    began = TRAFFIC.snapshot()
    new.write_again("f", "f", b"same", old)
    moved = TRAFFIC.since(began)
    assert new.read("f") == b"same"
    assert (moved["copied"], moved["uploaded"]) == ((4, 0) if is_copied else (0, 4))
    assert moved["retries"] == 0


def test_a_store_that_copies_without_the_condition_is_not_believed(store: Store, monkeypatch) -> None:
    old, new = (open_directory(store.url(name), store.options) for name in ("old", "new"))
    old.write("f", b"else")
    assert isinstance(new, S3Directory)
    real = S3._try
    monkeypatch.setattr(
        S3,
        "_try",
        lambda s3, method, **its: real(s3, method, **{k: v for k, v in its.items() if k != "CopySourceIfMatch"}),
    )
    new.write_again("f", "f", b"same", old)
    assert new.read("f") == b"same"


def test_an_object_is_replaced_only_if_it_is_the_one_that_was_meant(store: Store) -> None:
    directory = open_directory(store.url("dir"), store.options)
    assert isinstance(directory, S3Directory)
    first = directory.write_if("f", b"1", version=None)
    assert first == directory.stat("f").version
    assert directory.write_if("f", b"2", version=None) is None
    second = directory.write_if("f", b"3", version=first)
    assert second not in (None, first)
    assert directory.write_if("f", b"4", version=first) is None
    assert directory.read("f") == b"3"


def test_a_bucket_that_is_not_there_is_named(store: Store) -> None:
    directory = open_directory("s3://no-such-bucket/x", store.options)
    assert directory.why_not_writable() == "there is no bucket 'no-such-bucket'"
    assert directory.say_missing() == "there is no bucket 'no-such-bucket'"


def test_an_object_that_goes_while_it_is_compared_is_not_ours(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease is given back between the refused write and the look at what refused it."""
    directory = open_directory(store.url("dir"), store.options)
    assert isinstance(directory, S3Directory)
    directory.write("f", b"the other's")
    real = S3.head

    def head(self: S3, path: str):
        directory.remove("f")
        return real(self, path)

    with monkeypatch.context() as patched:
        patched.setattr(S3, "head", head)
        assert directory.write_if("f", b"ours", version=None) is None
    assert directory.write_if("f", b"ours", version=None) is not None
