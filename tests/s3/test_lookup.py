"""Lookups in a package on a real S3 store: the requests of a call do not grow with the ids, and a fork opens the store anew."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import dist_export
from dist_export.package import slot_reader
from dist_export.storage.traffic import TRAFFIC
from tests.support.recis_writer import make_tables, truth_of, write_checkpoint
from tests.support.s3.s3_cases import Store
from tests.support.s3.s3_server import S3Server

TABLES = make_tables({"t": 20_000}, 2, dim=4)
TRUTH = truth_of(TABLES)["t"]


@pytest.fixture(scope="module")
def store(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(s3_server)
    folder = tmp_path_factory.mktemp("lookup") / "ckpt"
    write_checkpoint(folder, TABLES)
    store.export(folder, store.url("out"), num_shards=1)
    return store


def count_requests(package: dist_export.Package, ids: np.ndarray) -> int:
    before = TRAFFIC.snapshot()
    rows, has_row = package.lookup("t", ids)
    assert has_row.all()
    order = np.searchsorted(TRUTH["id"], ids)
    assert np.array_equal(rows, TRUTH["embedding"][order])
    return TRAFFIC.since(before)["requests"]


def test_the_requests_of_a_lookup_do_not_grow_with_the_ids(store: Store, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(slot_reader.SlotReader, "_scan", None)
    package = dist_export.open_package(store.url("out"), storage_options=store.options)
    package.lookup("t", TRUTH["id"][:1])  # headers
    single = count_requests(package, TRUTH["id"][777:778])
    many = count_requests(package, TRUTH["id"])
    assert single < 12
    assert many < 12, "not one a row"
    cached = dist_export.open_package(store.url("out"), storage_options=store.options, cache_dir=tmp_path / "cache")
    cached.lookup("t", TRUTH["id"][:1])
    assert count_requests(cached, TRUTH["id"][777:778]) == 1
    assert count_requests(cached, TRUTH["id"]) < 10


def test_a_forked_child_opens_the_store_anew(store: Store) -> None:
    package = dist_export.open_package(store.url("out"), storage_options=store.options)
    package.lookup("t", TRUTH["id"][:3])
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            rows, _ = package.lookup("t", TRUTH["id"])
            os.write(write, b"1" if np.array_equal(rows, TRUTH["embedding"]) else b"0")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    assert os.read(read, 1) == b"1"
    os.close(read)
    count_requests(package, TRUTH["id"][:5])


def test_the_same_index_is_in_the_store_as_on_a_disk(store: Store, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ckpt", TABLES)
    store.export(tmp_path / "ckpt", tmp_path / "out", num_shards=1)
    name = "model-000000-of-000001.row_index"
    assert store.files("out")[name] == (tmp_path / "out" / name).read_bytes()
