"""A delta and its base in a store become a full package there, with the bytes that a disk gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_export.pipeline.compact_command import OPTIONS, compact
from dist_export.runtime.joining import alone
from dist_export.verify.verify import verify
from tests.integration.test_delta_export import change, save, state_of, tables_of
from tests.support import dcp_writer
from tests.support.deltas import read_package
from tests.support.s3.s3_cases import Store, files_of, without_manifest
from tests.support.s3.s3_server import S3Server

pytestmark = pytest.mark.s3


@pytest.mark.parametrize("by_number", [False, True], ids=["hashed", "by_number"])
def test_a_package_in_a_store_is_that_on_a_disk(s3_server: S3Server, tmp_path: Path, by_number: bool) -> None:
    store, before = Store(s3_server), tables_of()
    settings: dict[str, Any] = {"treat_as_tables": ["sparse_arch.item.weight"]} if by_number else {}
    if by_number:
        old = dcp_writer.save(tmp_path / "old", state_of())
        new = dcp_writer.save(tmp_path / "new", state_of(420, later=True))
    else:
        old, new = save(tmp_path / "old", before, 2), save(tmp_path / "new", change(before), 2)
    store.export(old, store.url("base"), **settings)
    store.export(new, store.url("delta"), base=store.url("base"), **settings)
    store.export(new, tmp_path / "full", **settings)
    for place in (store.url("made"), str(tmp_path / "made")):
        arguments: dict[str, Any] = {name: option.default for name, option in OPTIONS.items()}
        arguments |= {"delta": store.url("delta"), "out": place, "storage_options": store.options, "progress": False}
        compact(alone(), {**arguments, "target_storage_options": store.options if "://" in place else {}})
    assert without_manifest(store.files("made")) == without_manifest(files_of(tmp_path / "made"))
    assert verify(store.url("made"), store.options).findings == []
    assert read_package(tmp_path / "made") == read_package(tmp_path / "full")
