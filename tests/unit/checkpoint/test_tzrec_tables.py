"""Which table of the base a table of a dump is."""

from __future__ import annotations

import pytest

from dist_export.checkpoint.tzrec.parquet import FLOAT, QUANTIZED
from dist_export.checkpoint.tzrec.spool import Kind
from dist_export.checkpoint.tzrec.tables import FoundTable, match_tables
from dist_export.errors import PlanError
from dist_export.manifest import LeftOutEntry, Manifest, SlotEntry, SourceEntry, TableEntry


def entry(name: str, source_name: str | None = None) -> TableEntry:
    kept = (
        SlotEntry(name="id", dtype="int64", shape=(), num_bytes=8),
        SlotEntry(name="embedding", dtype="float32", shape=(4,), num_bytes=16),
    )
    more = {} if source_name is None else {"source_name": source_name}
    return TableEntry(
        name=name,
        rows_in=1,
        rows_out=1,
        rows_dropped={},
        misplaced=0,
        id_sum="0" * 16,
        kept=kept,
        dropped=(),
        parts=(),
        **more,
    )


def base_of(*tables: TableEntry, left_out: tuple[str, ...] = ()) -> Manifest:
    return Manifest(
        mode="filter",
        num_shards=1,
        source=SourceEntry(path="", format="dcp", fingerprint="", num_files=0, num_bytes=0),
        tables=tables,
        left_out_tables=tuple(LeftOutEntry(name=name, rows=1, reason="drop_tables") for name in left_out),
        dense_tensors=(),
        dropped_dense_tensors=(),
        files=(),
        dense=None,
        parity=None,
        notes=(),
        versions={},
    )


def match(name: str, base: Manifest) -> str | None:
    """Return the base's table that a table of a dump is; None if it is left out."""
    matched = match_tables({name: FoundTable(name, Kind(FLOAT, 16), "file")}, base, "there")
    found = [table.name for table, its in zip(matched.tables, matched.found, strict=True) if its is not None]
    assert matched.left_out == (() if found else (name,))
    return found[0] if found else None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.ebc.embedding_bags.item", "a.ebc.embedding_bags.item.weight"),
        ("b.ebc.embedding_bags.item", "b.ebc.embedding_bags.item"),
        ("b.ebc.embedding_bags.goods", "shop"),
        ("model.ec.embeddings.user", "user"),
        ("c.ebc.embedding_bags.item", None),
        ("d.ec.embeddings.city", None),
    ],
)
def test_exact_names_go_first_also_of_tables_that_are_left_out(name: str, expected: str | None) -> None:
    base = base_of(
        entry("a.ebc.embedding_bags.item.weight"),
        entry("b.ebc.embedding_bags.item"),
        entry("shop", "b.ebc.embedding_bags.goods.weight"),
        entry("user"),
        left_out=("c.ebc.embedding_bags.item.weight", "city"),
    )
    assert match(name, base) == expected


def test_a_last_part_that_several_tables_have_is_no_name() -> None:
    for base in (
        base_of(entry("a.item.weight"), entry("b.item")),
        base_of(entry("a.item.weight"), left_out=("b.item",)),
    ):
        with pytest.raises(PlanError, match=r"'c.item' may be any of a.item.weight, b.item"):
            match("c.item", base)


def test_a_table_of_no_base_lists_those_of_the_base() -> None:
    with pytest.raises(PlanError, match=r"'c.other' is no table of the base; the base has a, b"):
        match("c.other", base_of(entry("a"), entry("b")))


def test_rows_that_do_not_fit_the_base_say_what_to_export() -> None:
    """Quantised dumps need a base of int8, and a dump of another width another base."""
    with pytest.raises(PlanError, match="Give a base whose table is exported with dtype: int8, or dump float32"):
        match_tables({"item": FoundTable("item", Kind(QUANTIZED, 12), "file")}, base_of(entry("item")), "there")
    with pytest.raises(PlanError, match="Give a base of the same model"):
        match_tables({"item": FoundTable("item", Kind(FLOAT, 20), "file")}, base_of(entry("item")), "there")
