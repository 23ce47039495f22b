"""Deltas published in a store, and two publishers at once: what is current opens, and one of them may say that it lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dist_export
from dist_export import cli
from tests.integration.test_delta_export import change, save, tables_of
from tests.support.deltas import read_package
from tests.support.s3.s3_cases import Store
from tests.support.s3.s3_server import S3Server

pytestmark = pytest.mark.s3

DELTA: dict[str, Any] = {"base": "latest", "on_base_mismatch": "full"}


def publish(store: Store, source: Path, **more: Any) -> dist_export.Manifest:
    return dist_export.export(published(store, source, **more))


def published(store: Store, source: Path, **more: Any) -> dict[str, Any]:
    options = {"versions": {"storage_options": store.options}}
    settings = store.settings(source, "", publish=store.url("serving"), registry_options=options, **more)
    del settings["export_dir"]
    return {**settings, "row_fingerprints": True, "target_storage_options": store.options, "progress": False}


def current(store: Store) -> dict[str, Any]:
    return json.loads(store.files("serving")["current.json"])


def rows_of(store: Store, tables: list[str], expected: dict[str, Any]) -> None:
    """Compare all rows of the current version with those of a package on a disk."""
    where, options = f"versions:{store.url('serving')}", {"versions": {"storage_options": store.options}}
    with dist_export.open_package(where, storage_options=store.options, registry_options=options) as package:
        for table in tables:
            rows = expected[table]
            found, has_row = package.lookup(table, list(rows), raw=True)
            assert has_row.all()
            assert [row.tobytes() for row in found] == [slots[0] for slots in rows.values()]


def test_a_delta_goes_on_top_of_the_full_version_and_can_be_taken_back(s3_server: S3Server, tmp_path: Path) -> None:
    store, before = Store(s3_server), tables_of()
    old, new = save(tmp_path / "old", before, 2), save(tmp_path / "new", change(before), 2)
    publish(store, old)
    first = current(store)["version"]
    publish(store, new, **DELTA)
    assert current(store)["base"] == first
    for source, name in ((old, "old_full"), (new, "new_full")):
        store.export(source, tmp_path / name)
    rows_of(store, list(before), read_package(tmp_path / "new_full"))
    assert cli.main(["rollback", store.url("serving"), "--storage_options", json.dumps(store.options)]) == 0
    assert current(store)["version"] == first
    rows_of(store, list(before), read_package(tmp_path / "old_full"))


def test_two_publishers_at_once(s3_server: S3Server, tmp_path: Path) -> None:
    store, before = Store(s3_server), tables_of()
    old, new = save(tmp_path / "old", before, 2), save(tmp_path / "new", change(before), 2)
    publish(store, old)
    first = current(store)["version"]
    script = "import json, sys, dist_export; dist_export.export(json.loads(sys.argv[1]))"
    jobs = []
    for more in (DELTA, {"num_shards": 3}):
        command = [sys.executable, "-c", script, json.dumps(published(store, new, **more))]
        jobs.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    ended = [(job.communicate()[0], job.returncode) for job in jobs]
    assert 0 in [code for _, code in ended], ended
    for said, code in ended:
        assert code == 0 or "has changed since this export began: the current version is" in said, said
    assert current(store)["version"] != first
    store.export(new, tmp_path / "new_full")
    rows_of(store, list(before), read_package(tmp_path / "new_full"))
