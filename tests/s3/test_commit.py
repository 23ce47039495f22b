"""The commit on a real S3 store: killed at many requests it holds no package or a whole one; a dense arch; in place."""

from __future__ import annotations

from pathlib import Path

import pytest

import dist_export
from dist_export.storage.s3 import S3
from dist_export.verify.verify import verify
from dist_export.workdir import lock
from tests.support import tiny_model
from tests.support.s3.s3_cases import Store, files_of, without_manifest, write_large
from tests.support.s3.s3_server import S3Server

pytestmark = pytest.mark.s3

CHANGES = (
    "put_object",
    "upload_part",
    "upload_part_copy",
    "create_multipart_upload",
    "complete_multipart_upload",
    "abort_multipart_upload",
    "delete_object",
    "delete_objects",
)


class Killed(BaseException):
    pass


@pytest.fixture
def store(s3_server: S3Server) -> Store:
    return Store(s3_server)


def test_killed_at_many_requests(store: Store, tmp_path: Path, monkeypatch) -> None:
    """Whatever was the last request that went through, the next run ends in the same package, and nothing is left."""
    monkeypatch.setattr(lock, "LEASE_SECS", 0.05)
    monkeypatch.setattr(lock, "RENEW_SECS", 0.02)
    monkeypatch.setattr(lock.Lease, "_keep", lambda _: None)  # requests of another thread would blur the count
    source = store.put_tree(write_large(tmp_path / "ckpt"), "ckpt")
    real, state = S3._try, {"count": 0, "limit": 1 << 30}

    def request(self, method, **arguments):
        if method in CHANGES:
            if state["count"] >= state["limit"]:
                raise Killed
            state["count"] += 1
        return real(self, method, **arguments)

    monkeypatch.setattr(S3, "_try", request)
    store.export(source, store.url("expected"), threads=1)
    expected, total = without_manifest(store.files("expected")), state["count"]
    committed = 0
    for limit in (0, 1, *range(2, total, 9), total - 2, total - 1):
        name = f"out{limit}"
        state.update(count=0, limit=limit)
        with pytest.raises(Killed):
            store.export(source, store.url(name), threads=1)
        state["limit"] = 1 << 30
        if "manifest.json" in store.files(name):
            assert verify(store.url(name), store.options).findings == []
            committed += 1
        store.export(source, store.url(name), threads=1)
        assert without_manifest(store.files(name)) == expected, f"after request {limit}"
        assert store.uploads(name) == []
    assert 0 < committed < 5


def test_a_dense_arch_goes_along(store: Store, tmp_path: Path) -> None:
    checkpoint = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    source = store.put_tree(checkpoint, "ckpt")
    more = {"model": tiny_model.MODEL, "dataset": tiny_model.DATASET}
    manifest = store.export(source, store.url("out"), **more)
    assert manifest.dense is not None
    assert verify(store.url("out"), store.options).findings == []
    program = dist_export.open_package(store.url("out"), storage_options=store.options).load_program()
    assert program.module() is not None
    before = store.fs.ls(f"{store.root}/out", detail=True)
    assert store.export(source, store.url("out"), **more) == manifest, "the same export again is done"
    assert store.fs.ls(f"{store.root}/out", detail=True) == before


def test_a_checkpoint_is_completed_in_place(store: Store, tmp_path: Path) -> None:
    checkpoint = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    source = store.put_tree(checkpoint, "ckpt")
    manifest = store.export(source, source, filter_sparse_opt=False, num_shards=None)
    assert store.export(source, source, filter_sparse_opt=False, num_shards=None) == manifest
    after = store.files("ckpt")
    assert {name: after[name] for name in files_of(checkpoint)} == files_of(checkpoint)
    assert verify(source, store.options).findings == []
