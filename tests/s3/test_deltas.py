"""Deltas on a real S3 server: the bytes of a disk, whether the base has fingerprints or not, and lookups over both packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dist_export
from dist_export.diff.compare import diff
from dist_export.storage.traffic import TRAFFIC
from dist_export.verify.verify import verify
from tests.integration.test_delta_chains import STATES
from tests.integration.test_delta_export import change, save, tables_of
from tests.integration.test_delta_refresh import export, refresh
from tests.integration.test_delta_scores import build, train_on
from tests.support import score_models as models
from tests.support.deltas import read_deleted, read_package
from tests.support.recis_writer import split_table, write_checkpoint
from tests.support.s3.s3_cases import Store, files_of, without_manifest
from tests.support.s3.s3_server import S3Server

pytestmark = pytest.mark.s3


@pytest.mark.parametrize("fingerprints", [True, False])
def test_a_delta_in_a_store_is_that_on_a_disk(s3_server: S3Server, tmp_path: Path, fingerprints: bool) -> None:
    store, before = Store(s3_server), tables_of()
    old, new = save(tmp_path / "old", before, 2), save(tmp_path / "new", change(before), 2)
    base = store.export(old, store.url("base"), row_fingerprints=fingerprints)
    store.export(old, tmp_path / "base", row_fingerprints=fingerprints)
    began = TRAFFIC.snapshot()
    store.export(store.put_tree(new, "new"), store.url("delta"), base=store.url("base"))
    moved = TRAFFIC.since(began)
    store.export(new, tmp_path / "delta", base=str(tmp_path / "base"))
    store.export(new, tmp_path / "full")
    assert without_manifest(store.files("delta")) == without_manifest(files_of(tmp_path / "delta"))
    assert moved["uploaded"] < base.num_bytes / 5
    assert verify(store.url("delta"), store.options).findings == []
    full, deleted = read_package(tmp_path / "full"), read_deleted(tmp_path / "delta")
    with dist_export.open_package(store.url("delta"), storage_options=store.options) as package:
        for table, rows in full.items():
            ids = np.array([*rows, *deleted[table], -7])
            found, has_row = package.lookup(table, ids, raw=True)
            assert has_row.tolist() == [True] * len(rows) + [False] * (len(ids) - len(rows))
            assert [row.tobytes() for row in found[: len(rows)]] == [slots[0] for slots in rows.values()]


def test_of_a_base_in_a_store_ids_row_index_and_fingerprints_are_read_once(
    s3_server: S3Server, tmp_path: Path, monkeypatch
) -> None:
    """Rows are looked up in pieces: if each piece asked the store, the bytes would grow with the square of the table."""
    store, count = Store(s3_server), 200_000
    ids = np.random.default_rng(0).permutation(count)
    rows = {"embedding": np.zeros((count, 16), np.float32)}
    old = save(tmp_path / "old", {"t": (ids, rows)}, 1)
    rows["embedding"][:100] = 1
    order = np.random.default_rng(1).permutation(count)
    new = save(tmp_path / "new", {"t": (ids[order], {"embedding": rows["embedding"][order]})}, 1)
    store.export(old, store.url("large"), row_fingerprints=True)
    began = TRAFFIC.snapshot()
    manifest = store.export(new, store.url("large_delta"), base=store.url("large"))
    assert (manifest.tables[0].delta.changed, manifest.tables[0].delta.same) == (100, count - 100)
    once = count * (8 + 8 + 6)  # of each row of the base its id, its fingerprint, and its share of the row index
    assert TRAFFIC.since(began)["downloaded"] < 1.2 * once
    newer = save(tmp_path / "newer", {"t": (ids, rows)}, 1)  # rows of which none is near another one cost more
    store.export(newer, store.url("large_full"))
    monkeypatch.setattr("dist_export.diff.rows.MOST_ROWS", 5_000)
    began = TRAFFIC.snapshot()
    found = diff(store.url("large"), store.url("large_full"), storage_options=store.options)
    assert (found.tables[0].changed, found.tables[0].same) == (100, count - 100)
    rows = 2 * count * 16 * 4
    assert TRAFFIC.since(began)["downloaded"] < 1.2 * (once + count * 8 + rows)


def test_a_new_dense_part_over_tables_in_a_store(s3_server: S3Server, tmp_path: Path) -> None:
    store, model = Store(s3_server), models.train(build())
    before = models.save(model, tmp_path / "before.pth")
    after = models.save(train_on(model), tmp_path / "after.pth")
    options: dict[str, Any] = {"storage_options": store.options, "row_fingerprints": False}
    old = export(before, store.url("base"), **options)
    export(before, tmp_path / "base", row_fingerprints=False)
    began = TRAFFIC.snapshot()
    made = export(after, store.url("delta"), base=store.url("base"), need_export_sparse=False, **options)
    moved = TRAFFIC.since(began)
    refresh(after, tmp_path / "delta", tmp_path / "base", row_fingerprints=False)
    assert moved["uploaded"] < 1 << 20
    repeated = sum(file.num_bytes for file in set(made.files) & set(old.files))
    assert 0 < repeated <= moved["copied"]
    assert verify(store.url("delta"), store.options, base=store.url("base")).findings == []
    batch = models.batch_of()
    with (
        dist_export.open_package(store.url("delta"), storage_options=store.options) as there,
        dist_export.open_package(tmp_path / "delta") as here,
    ):
        scores, expected = there.score(batch), here.score(batch)
        assert scores.keys() == expected.keys()
        for name, values in expected.items():
            assert np.array_equal(scores[name], values)


def test_a_chain_in_a_store_is_that_on_a_disk(s3_server: S3Server, tmp_path: Path) -> None:
    store = Store(s3_server)
    for step, state in enumerate(STATES[:3]):
        tables = {name: split_table(*state[name], 2) for name in ("t", "u", "kept")}
        source, more = write_checkpoint(tmp_path / f"step-{step}", tables), [{}, {}]
        if step:
            below = (store.url(f"link{step - 1}"), str(tmp_path / f"link{step - 1}"))
            more = [{"base": base, "delta_chain": 8} for base in below]
        store.export(source, store.url(f"link{step}"), **more[0])
        store.export(source, tmp_path / f"link{step}", **more[1])
        assert without_manifest(store.files(f"link{step}")) == without_manifest(files_of(tmp_path / f"link{step}"))
    store.export(source, tmp_path / "full")
    assert verify(store.url("link2"), store.options).findings == []
    for cache in (None, tmp_path / "cache"):
        with dist_export.open_package(store.url("link2"), storage_options=store.options, cache_dir=cache) as package:
            assert [layer.directory.url for layer in package.layers] == [store.url(f"link{step}") for step in (2, 1, 0)]
            for table, rows in read_package(tmp_path / "full").items():
                found, has_row = package.lookup(table, np.array([*rows]), raw=True)
                assert has_row.all()
                assert [row.tobytes() for row in found] == [slots[0] for slots in rows.values()]
