"""Tables of a base that a delta carries as they are: which checkpoint they can belong to, and their account."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from dist_export.checkpoint.metadata import SlotMeta, TableMeta
from dist_export.delta.carried_tables import account_carried, carry_tables, find_other_table, settings_of
from dist_export.formats.dtypes import CODE_BY_NAME
from dist_export.manifest import LeftOutEntry, Manifest, SlotEntry, SourceEntry, TableEntry
from dist_export.storage.urls import open_directory


def entry(name: str = "item", *, dim: int = 4, **more: Any) -> TableEntry:
    slots = (
        SlotEntry(name="id", dtype="int64", shape=(), num_bytes=80),
        SlotEntry(name="embedding", dtype="float32", shape=(dim,), num_bytes=40 * dim),
        SlotEntry(name="sparse_adam_exp_avg", dtype="float16", shape=(dim,), num_bytes=20 * dim),
    )
    plain = {
        "rows_in": 10,
        "rows_out": 10,
        "rows_dropped": {},
        "misplaced": 0,
        "id_sum": "0",
        "dropped": (),
        "parts": (),
    }
    return TableEntry(name=name, kept=slots, **{**plain, **more})


def manifest(*tables: TableEntry, **more: Any) -> Manifest:
    source = SourceEntry(path="/ckpt", format="recis", fingerprint="", num_files=0, num_bytes=0)
    empty = {
        "dense_tensors": (),
        "dropped_dense_tensors": (),
        "files": (),
        "dense": None,
        "parity": None,
        "notes": (),
        "versions": {},
    }
    return Manifest(mode="filter", num_shards=1, source=source, tables=tables, **{**empty, **more})


def checkpoint(tmp_path, *tables: TableMeta, rows: int = 10):
    carried = carry_tables(manifest(*(entry(table.name) for table in tables)), open_directory(str(tmp_path)), None)
    parts = replace(carried.parts, rows=np.full(len(tables), rows))
    return replace(carried, tables=tables, parts=parts)


def table(name: str = "item", dim: int = 4, **more: Any) -> TableMeta:
    ids = SlotMeta(name="id", dtype=CODE_BY_NAME["I64"], inner_shape=(), row_bytes=8, column=0)
    rows = SlotMeta(name="embedding", dtype=CODE_BY_NAME["F32"], inner_shape=(dim,), row_bytes=4 * dim, column=1)
    return TableMeta(name=name, slots=(ids, rows), **more)


def test_a_base_of_other_tables_is_not_that_of_a_checkpoint(tmp_path) -> None:
    dropped = {"left_out_tables": (LeftOutEntry(name="more", rows=3, reason="drop_tables"),)}
    by_number: dict[str, Any] = {"is_hashed": False, "has_ids": False}
    for ours, theirs, found in (
        ((table(),), manifest(entry()), None),
        ((table(), table("more")), manifest(entry(), **dropped), None),
        ((table(),), manifest(entry("goods", source_name="item")), None),
        ((table(**by_number),), manifest(entry(is_hashed=False)), None),
        ((table(), table("more")), manifest(entry()), "it lacks the tables more, which the checkpoint has"),
        ((table(),), manifest(entry(), entry("more")), "it has the tables more, which the checkpoint lacks"),
        ((table(dim=8),), manifest(entry()), "its table 'item' has rows of 4 values, and that of the checkpoint of 8"),
        (
            (table(),),
            manifest(entry(is_hashed=False)),
            "its table 'item' is row-indexed, and that of the checkpoint has ids",
        ),
        (
            (table(**by_number),),
            manifest(entry(is_hashed=False, rows_out=9)),
            "its table 'item' has 9 rows by number, and that of the checkpoint 10",
        ),
        (
            (table(raw_ids=object()),),
            manifest(entry()),
            "its table 'item' has rows by the raw ids of a managed-collision module, which maps them to other rows by now",
        ),
    ):
        assert find_other_table(checkpoint(tmp_path, *ours), theirs) == found


def test_settings_name_and_keep_what_the_base_has() -> None:
    base = manifest(
        entry("goods[1]", source_name="item[*]", default_row=(1.0, 2.0, 3.0, 4.0)), entry("user", default_row="zeros")
    )
    assert settings_of(base) == {
        "keep_slots": ["item[[][*]].sparse_adam_exp_avg", "user.sparse_adam_exp_avg"],
        "rename_tables": {"item[[][*]]": "goods[1]"},
        "default_row": {"item[[][*]]": [1.0, 2.0, 3.0, 4.0], "user": "zeros"},
    }


@pytest.mark.parametrize("rows", [10, 0])
def test_all_rows_are_the_same(tmp_path, rows: int) -> None:
    made = account_carried(entry(rows_out=0), entry(rows_out=rows))
    assert not isinstance(made.delta, msgspec.UnsetType)
    assert (made.delta.rows_base, made.delta.same, made.delta.changed, made.delta.new, made.delta.deleted) == (
        rows,
        rows,
        0,
        0,
        0,
    )
    assert made.rows_in == made.rows_out + sum(made.rows_dropped.values()) == rows
    carried = carry_tables(manifest(entry(is_hashed=False)), open_directory(str(tmp_path)), None)
    assert carried.tables[0].is_hashed
    assert carried.parts.rows.tolist() == [0]
