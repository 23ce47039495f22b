"""Rows that rules leave behind: which they are, in which order rules are tried, and that they are gone and accounted for."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_cases import numbered_tables, write_numbered
from recis_writer import PartSpec, Raw, make_tables, read_back, split_table, truth_of, write_checkpoint
from row_model import is_inside, model_of, truth_of_model
from sparse_cases import assert_exact, content, export, open_source, plan, recorded_reads, shrink

import dist_export
from dist_export import source as source_room
from dist_export.checkpoint.reader import SlotMeta
from dist_export.dense.rows import RowFinder
from dist_export.errors import CommitError, ConfigError, PlanError, UserError
from dist_export.id_lists import read_id_list
from dist_export.layout.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.package.verify import verify
from dist_export.plan.limits import Limits
from dist_export.plan.prune import IdList, TableRule, reasons_of
from dist_export.row_rules import REASONS, parse_rules
from dist_export.transfer import pruning as pruning_room
from dist_export.transfer.pruning import PruneReader, find_pruned

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


# ---- rules on rows ---------------------------------------------------------------------------------------------------


def slot_of(dtype: str, *inner: int) -> SlotMeta:
    code = CODE_BY_TORCH[dtype]
    width = int(np.prod(inner)) * DTYPES[code].itemsize
    return SlotMeta(name="s", dtype=code, inner_shape=inner, row_bytes=width, column=1)


def bytes_of(values, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (np.array(values, np.float32).view(np.uint32) >> 16).astype("<u2").reshape(-1).view(np.uint8)
    return np.array(values, DTYPES[CODE_BY_TORCH[dtype]].numpy).reshape(-1).view(np.uint8)


def below(values, dtype: str, limit) -> list[bool]:
    from dist_export.plan import prune

    rule = parse_rules([{"tables": "t", "slot": "s", "below": limit}])[0]
    checkpoint = type("C", (), {"tables": (table_meta(slot_of(dtype, 1)),)})()
    compiled = prune.plan_pruning(checkpoint, [rule], {}).rules[0]
    codes = reasons_of(compiled, np.arange(len(values)), {1: bytes_of(values, dtype)})
    return (codes > 0).tolist()


def table_meta(*slots: SlotMeta):
    from dist_export.checkpoint.reader import TableMeta

    ids = SlotMeta(name="id", dtype=CODE_BY_TORCH["int64"], inner_shape=(), row_bytes=8, column=0)
    return TableMeta(name="t", slots=(ids, *slots))


@pytest.mark.parametrize(
    ("dtype", "values", "limit", "gone"),
    [
        ("int64", [9, 10, 11, -(1 << 63)], 10, [1, 0, 0, 1]),
        ("int64", [2, 3, 4], 2.5, [1, 0, 0]),
        ("int64", [(1 << 53), (1 << 53) + 1, (1 << 53) + 2], (1 << 53) + 1, [1, 0, 0]),
        ("int64", [0, (1 << 63) - 1], 1e300, [1, 1]),
        ("int64", [0, -(1 << 63)], -1e300, [0, 0]),
        ("int8", [-128, 0, 127], 300, [1, 1, 1]),
        ("uint8", [0, 255], -1, [0, 0]),
        ("bool", [0, 1], 1, [1, 0]),
        ("float32", [0.5, float("nan"), float("-inf"), float("inf"), 0.1], 0.1, [0, 0, 1, 0, 0]),
        ("float16", [0.0999755859375, 0.1], 0.1, [1, 1]),
        ("float64", [0.1, np.nextafter(0.1, 0)], 0.1, [0, 1]),
        ("bfloat16", [0.5, 1.0, float("nan")], 1, [1, 0, 0]),
    ],
)
def test_a_value_below_the_limit_goes_and_nan_stays(dtype, values, limit, gone):
    assert below(values, dtype, limit) == [bool(one) for one in gone]


def norms(rows, limit, dtype="float32") -> list[bool]:
    rows = np.array(rows)
    rule = TableRule("norm", slot_of(dtype, rows.shape[1]), float(limit), None)
    return (reasons_of([rule], np.arange(len(rows)), {1: bytes_of(rows, dtype)}) > 0).tolist()


def test_a_norm_of_nothing_is_of_zeros_alone():
    tiny = np.finfo(np.float64).tiny
    rows = [[0.0, -0.0], [0.0, tiny], [float("nan"), 0.0], [1.0, 0.0]]
    assert norms(rows, 0, "float64") == [True, False, False, False], "though the square of the second is 0"


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int8"])
def test_a_norm_is_compared_with_the_limit(dtype):
    rows = [[3, 4], [3, 5], [0, 0], [-5, 0]]
    assert norms(rows, 5, dtype) == [True, False, True, True]


def test_norms_of_nan_and_infinity_stay():
    assert norms([[float("nan"), 0], [float("inf"), 0], [1e200, 1e200]], 1e300, "float64") == [False, False, False]
    assert norms([[2.0, float("-inf")]], 10) == [False]


@pytest.mark.parametrize("width", [1, 7, 64, 130])
def test_a_norm_does_not_depend_on_how_many_rows_there_are_at_a_time(width):
    """Else the census could count a row that a gather leaves behind."""
    rows = np.random.default_rng(width).standard_normal((501, width)).astype(np.float32)
    exact = np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1))
    for limit in exact[:50]:  # right at the edge, where the last bit decides
        whole = norms(rows, limit)
        assert whole == [one for row in rows for one in norms(row[None], limit)]
        assert whole == norms(rows[:13], limit) + norms(rows[13:], limit)


@pytest.mark.parametrize("count", [0, 1, 5, 255, 256, 257, 512, 513, 100_000])
def test_a_list_holds_its_ids_and_no_others(count):
    random = np.random.default_rng(count)
    ids = np.unique(random.integers(-(1 << 63), (1 << 63) - 1, count, np.int64))
    asked = np.concatenate(
        [random.permutation(ids)[:600], ids[-300:], ids[:300] + 1, [0, -1, -(1 << 63), (1 << 63) - 1]]
    )
    held = set(ids.tolist())
    assert IdList(ids).contains(asked).tolist() == [one in held for one in asked.tolist()]


def test_the_first_rule_that_applies_gives_the_reason():
    listed = IdList(np.array([1, 2]))
    rules = [
        TableRule("deny_list", None, 0, listed),
        TableRule("norm", slot_of("float32", 1), 0.0, None),
        TableRule("allow_list", None, 0, IdList(np.array([1, 3, 4]))),
    ]
    codes = reasons_of(rules, np.array([1, 3, 5, 4, 0]), {1: bytes_of([0, 0, 0, 1, 1], "float32")})
    assert [REASONS[code - 1] if code else "" for code in codes.tolist()] == [
        "deny_list",
        "norm",
        "norm",
        "",
        "allow_list",
    ]


# ---- files of ids ----------------------------------------------------------------------------------------------------


def read(path, most_bytes=1 << 20):
    return read_id_list(str(path), most_bytes=most_bytes, setting="prune[0].deny").tolist()


@pytest.mark.parametrize("dtype", ["<i8", ">i8", "<u8", "<i4", "|u1", ">u8"])
def test_ids_come_from_npy(tmp_path, dtype):
    np.save(tmp_path / "ids.npy", np.array([7, 3, 7, 200], dtype))
    assert read(tmp_path / "ids.npy") == [3, 7, 200]


def test_unsigned_ids_become_the_signed_ones_of_the_same_bits(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([(1 << 64) - 1, 5], np.uint64))
    assert read(tmp_path / "ids.npy") == [-1, 5]
    (tmp_path / "ids.txt").write_text(f"{(1 << 64) - 1}\n5\n")
    assert read(tmp_path / "ids.txt") == [-1, 5]


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_ids_come_from_text(tmp_path, monkeypatch, end):
    monkeypatch.setattr("dist_export.id_lists._PIECE_BYTES", 5)
    (tmp_path / "ids").write_text(f"12\n-7\n\n  {(1 << 63) - 1} \n{-(1 << 63)}\n12{end}")
    assert read(tmp_path / "ids") == [-(1 << 63), -7, 12, (1 << 63) - 1]


def test_ids_come_from_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    ids = np.random.default_rng(0).integers(-(1 << 63), (1 << 63) - 1, 70_000, np.int64)
    pq.write_table(pa.table({"x": ids, "id": ids}), tmp_path / "ids.parquet", row_group_size=999)
    assert read(tmp_path / "ids.parquet") == np.unique(ids).tolist()
    for table, message in (
        ({"x": [1]}, r"no column 'id' of integers; it has x \(int64\)"),
        ({"id": [1.0]}, "no column 'id' of integers"),
        ({"id": [1, None]}, "has a null"),
    ):
        pq.write_table(pa.table(table), tmp_path / "bad.parquet")
        with pytest.raises(ConfigError, match=message):
            read(tmp_path / "bad.parquet")
    with pytest.raises(PlanError, match="holds 70,000 ids"):
        read(tmp_path / "ids.parquet", most_bytes=8 * 69_999)


def test_without_pyarrow_a_parquet_file_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "ids").write_bytes(b"PAR1....PAR1")
    with pytest.raises(ConfigError, match=r"needs the package pyarrow: pip install 'dist_export\[parquet\]'"):
        read(tmp_path / "ids")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1\n2\nx3\n", r"line 3 is 'x3'; expected one id a line"),
        (b"1\n1.5\n", "line 2 is '1.5'"),
        (b"1 2\n", "line 1 is '1 2'"),
        (b"\n\n%d\n" % (1 << 64), "line 3 is '18446744073709551616'"),
        (b"--1\n", "line 1 is '--1'"),
        (b"9" * 5000, "neither npy nor parquet, and line 1 is no id"),
        (b"\x93NUMPY\x01\x00\xff\xff", "is no npy file that can be read"),
        (b"\x00" * 20, "line 1 is"),
    ],
)
def test_what_is_no_list_of_ids_is_refused(tmp_path, monkeypatch, content, message):
    (tmp_path / "ids").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as told:
        read(tmp_path / "ids")
    assert str(tmp_path / "ids") in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "array", [np.zeros(3), np.zeros((3, 2), np.int64), np.array(1), np.array(["a"]), np.zeros(2, bool)]
)
def test_an_npy_file_of_anything_else_is_refused(tmp_path, array):
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(ConfigError, match=r"expected integers of shape \[n\]"):
        read(tmp_path / "ids.npy")


def test_an_npy_file_that_is_cut_short_or_pickled_is_refused(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(100))
    raw = (tmp_path / "ids.npy").read_bytes()
    (tmp_path / "ids.npy").write_bytes(raw[:-8])
    with pytest.raises(ConfigError, match=r"has 920 bytes, its header says 928"):
        read(tmp_path / "ids.npy")
    np.save(tmp_path / "ids.npy", np.array([1, "x"], object))
    with pytest.raises(ConfigError, match=r"holds object of shape \[2\]"):
        read(tmp_path / "ids.npy")


def test_a_list_that_is_not_there_or_too_large_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no regular file"):
        read(tmp_path)
    np.save(tmp_path / "ids.npy", np.arange(100))
    (tmp_path / "ids.txt").write_text("\n".join(map(str, range(100))))
    for name in ("ids.npy", "ids.txt"):
        assert len(read(tmp_path / name, most_bytes=800)) == 100
        with pytest.raises(PlanError, match=r"a quarter of max_memory together.*room for 99. Raise max_memory"):
            read(tmp_path / name, most_bytes=799)


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{}], r"prune\[0\].tables is None; give a pattern"),
        ([{"tables": []}], r"prune\[0\].tables is \[\]"),
        (
            [{"tables": "a", "norm_at_most": 0}, {"tables": "a"}],
            r"prune\[1\] has nothing beside tables; a rule is one of",
        ),
        ([{"tables": "a", "slot": "s"}], r"prune\[0\] has slot; a rule is one of"),
        ([{"tables": "a", "below": 3}], r"prune\[0\] has below"),
        ([{"tables": "a", "slot": "s", "below": 1, "deny": "x"}], r"prune\[0\] has below, deny, slot"),
        ([{"tables": "a", "slot": "s", "beneath": 1}], r"prune\[0\]: 'beneath' is no key of a rule"),
        ([{"tables": "a", "slot": "s", "below": "ten"}], r"prune\[0\].below is 'ten'; give a finite number"),
        ([{"tables": "a", "slot": "s", "below": True}], r"prune\[0\].below is True"),
        ([{"tables": "a", "slot": "s", "below": float("nan")}], r"prune\[0\].below is nan"),
        ([{"tables": "a", "slot": "id", "below": 1}], "ids are kept or left behind by lists"),
        ([{"tables": "a", "slot": 3, "below": 1}], r"prune\[0\].slot is 3; give text"),
        ([{"tables": "a", "norm_at_most": -1}], "no norm is below 0"),
        ([{"tables": "a", "deny": ""}], r"prune\[0\].deny is ''; give text"),
        ([{"tables": "a", "allow": ["x"]}], r"prune\[0\].allow is \['x'\]; give text"),
        ({"tables": "a"}, "prune is {'tables': 'a'}; expected a list of rules"),
    ],
)
def test_a_rule_that_is_none_is_refused_when_the_config_is_built(rules, message):
    values = {"ckpt_dir": "a", "export_dir": "b", "filter_sparse_opt": True}
    with pytest.raises(ConfigError, match=message):
        dist_export.ExportConfig(**values, prune=rules)


def test_a_copy_leaves_nothing_behind():
    with pytest.raises(ConfigError, match=r"prune needs new shards.*set filter_sparse_opt: true"):
        dist_export.ExportConfig(ckpt_dir="a", export_dir="b", prune=[{"tables": "a", "norm_at_most": 0}])


# ---- exports ---------------------------------------------------------------------------------------------------------


def with_filter(tables, seed=0):
    """Give each table a ``step_filter`` as RecIS has it (I64, [n, 1]), and let some embeddings be zeros."""
    random = np.random.default_rng(seed)
    for parts in tables.values():
        for part in parts:
            part.slots["embedding"][random.random(len(part.ids)) < 0.2] = 0
            part.slots["step_filter"] = random.integers(0, 20, (len(part.ids), 1))
    return tables


@pytest.fixture
def tables():
    return with_filter(make_tables({"user_a": 130, "user_b": 60, "item": 90}, 3))


def filtered(truth, is_kept):
    return {slot: rows[is_kept] for slot, rows in truth.items()}


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, "source"])
@pytest.mark.parametrize("drops", [[], ["step_filter"]])
def test_what_is_kept_is_the_truth_less_what_the_rules_name(tmp_path, tables, num_shards, drops):
    write_checkpoint(tmp_path / "in", tables)
    truth = truth_of(tables)
    denied = truth["item"]["id"][::3]
    np.save(tmp_path / "deny.npy", denied)
    (tmp_path / "allow.txt").write_text("\n".join(map(str, truth["user_b"]["id"][:20].tolist())))
    rules = [
        {"tables": "user_*", "slot": "step_filter", "below": 10},
        {"tables": ["item"], "deny": str(tmp_path / "deny.npy")},
        {"tables": "*", "norm_at_most": 0},
        {"tables": "user_b", "allow": str(tmp_path / "allow.txt")},
    ]
    manifest = export(
        tmp_path / "in", tmp_path / "out", prune=rules, drop_slots=drops, num_shards=num_shards, threads=2
    )
    expected, counts = {}, {}
    for name, rows in truth.items():
        reasons = np.full(len(rows["id"]), "", object)
        hits = [
            ("slot_value", rows["step_filter"][:, 0] < 10 if name != "item" else np.zeros(len(reasons), bool)),
            ("deny_list", np.isin(rows["id"], denied) & (name == "item")),
            ("norm", ~rows["embedding"].any(axis=1)),
            ("allow_list", (np.arange(len(reasons)) >= 20) & (name == "user_b")),
        ]
        for reason, hit in hits:
            reasons[hit & (reasons == "")] = reason
        expected[name] = filtered(rows, reasons == "")
        counts[name] = {reason: rows for reason, rows in Counter(reasons.tolist()).items() if reason}
    kept = ["id", "embedding"] if drops else ["id", "embedding", "step_filter"]
    assert_exact(tmp_path / "out", expected, slots=kept)
    for table in manifest.tables:
        assert table.rows_dropped == counts[table.name]
        assert table.rows_in == table.rows_out + sum(table.rows_dropped.values())
        assert table.duplicates == 0
    assert verify(str(tmp_path / "out")).findings == []


def test_parts_that_lose_no_row_go_as_byte_ranges(tmp_path):
    tables = {"t": split_table(np.arange(400), {"embedding": np.ones((400, 4), np.float32)}, 4, size=16)}
    tables["t"][2].slots["embedding"][:3] = 0
    write_checkpoint(tmp_path / "in", tables)
    planned = plan(tmp_path / "in", num_shards=2, prune=[{"tables": "t", "norm_at_most": 0}]).plan
    assert {gather.part for gather in planned.gathers} == {2}
    assert int(planned.copies.num_bytes.sum()) == 300 * 24


def test_rules_that_leave_nothing_behind_change_no_file(tmp_path, tables):
    write_checkpoint(tmp_path / "in", tables)
    export(tmp_path / "in", tmp_path / "plain", num_shards=3)
    manifest = export(
        tmp_path / "in", tmp_path / "out", num_shards=3, prune=[{"tables": "*", "slot": "step_filter", "below": 0}]
    )
    assert content(tmp_path / "plain") == content(tmp_path / "out")
    assert all(table.rows_dropped == {} for table in manifest.tables)


def test_a_table_of_which_nothing_is_left(tmp_path, tables):
    write_checkpoint(tmp_path / "in", tables)
    rules = [{"tables": "item", "slot": "step_filter", "below": 1000}]
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards=2, prune=rules)
    assert len(read_back(tmp_path / "out")["item"]["id"]) == 0
    assert manifest.tables[2].rows_dropped == {"slot_value": 90}
    assert verify(str(tmp_path / "out")).findings == []


def test_of_slots_only_those_that_rules_look_at_are_read(tmp_path, monkeypatch):
    """Of tables without rules the ids alone; of what is dropped and no rule names nothing at all."""
    tables = with_filter(make_tables({"a": 300, "b": 200}, 2, slots=("embedding", "sparse_adam_exp_avg")))
    write_checkpoint(tmp_path / "in", tables)
    rules = [{"tables": "a", "slot": "step_filter", "below": 5}]
    num_bytes = []
    for prune in ([], rules):
        with recorded_reads(monkeypatch) as reads:
            plan(tmp_path / "in", prune=prune)
        num_bytes.append(sum(end - begin for _, begin, end in reads))
    assert num_bytes[1] - num_bytes[0] == 300 * 8


@pytest.mark.parametrize("keep", ["first", "last"])
def test_rules_come_before_duplicates(tmp_path, keep):
    """Of an id whose first row is pruned the second one is kept, and is no duplicate any more."""
    ids = np.array([1, 2, 3, 1, 2, 3, 1])
    rows = np.array([[0], [1], [2], [3], [0], [4], [0]], np.float32)
    write_checkpoint(tmp_path / "in", {"t": [PartSpec(ids, {"embedding": rows}, (0, 8, 8))]})
    settings = {"prune": [{"tables": "t", "norm_at_most": 0}], "on_duplicate": keep}
    manifest = export(tmp_path / "in", tmp_path / "out", **settings)
    found = read_back(tmp_path / "out")["t"]
    assert found["id"].tolist() == [1, 2, 3]
    assert found["embedding"][:, 0].tolist() == [3, 1, 2 if keep == "first" else 4]
    assert manifest.tables[0].rows_dropped == {"duplicate": 1, "norm": 3}
    assert manifest.tables[0].duplicates == 1


def test_an_id_that_stands_twice_is_an_error_though_one_row_would_go(tmp_path):
    part = PartSpec(np.array([1, 1]), {"embedding": np.array([[0], [1]], np.float32)}, (0, 8, 8))
    write_checkpoint(tmp_path / "in", {"t": [part]})
    with pytest.raises(UserError, match="holds the id 1 twice"):
        export(tmp_path / "in", tmp_path / "out", prune=[{"tables": "t", "norm_at_most": 0}])


def test_misplaced_rows_are_repaired_or_pruned(tmp_path):
    ids = np.arange(40)
    rows = (ids % 2).astype(np.float32)[:, None]
    parts = [
        PartSpec(ids[:20], {"embedding": rows[:20]}, (0, 8, 16)),
        PartSpec(ids[20:], {"embedding": rows[20:]}, (8, 16, 16)),
    ]
    write_checkpoint(tmp_path / "in", {"t": parts})
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards=3, prune=[{"tables": "t", "norm_at_most": 0}])
    strangers = [i for i in ids.tolist() if not is_inside(i, parts[i // 20].slice)]
    table = manifest.tables[0]
    assert (table.misplaced, table.repaired) == (len(strangers), sum(i % 2 for i in strangers))
    assert read_back(tmp_path / "out")["t"]["id"].tolist() == [i for i in ids.tolist() if i % 2]
    assert verify(str(tmp_path / "out")).findings == []
    with pytest.raises(PlanError, match="on_misplaced is error"):
        export(tmp_path / "in", tmp_path / "no", on_misplaced="error", prune=[{"tables": "t", "norm_at_most": 0}])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("budget", [None, "runs", 40])
def test_neither_threads_nor_memory_nor_pieces_change_what_goes(tmp_path, monkeypatch, tables, threads, budget):
    write_checkpoint(tmp_path / "in", tables)
    rules = [{"tables": "*", "slot": "step_filter", "below": 7}, {"tables": "*", "norm_at_most": 1.5}]
    whole = export(tmp_path / "in", tmp_path / "whole", prune=rules, num_shards=2)
    if budget == "runs":
        shrink(monkeypatch, granule=5)
        monkeypatch.setattr(pruning_room, "_PIECE_BYTES", 17)
    elif budget is not None:
        monkeypatch.setattr(Limits, "held_ids", budget)
    cut = export(tmp_path / "in", tmp_path / "cut", prune=rules, num_shards=2, threads=threads)
    assert content(tmp_path / "whole") == content(tmp_path / "cut")
    assert whole.tables == cut.tables


def test_numbered_tables_are_pruned_as_hash_tables_alone(tmp_path, monkeypatch):
    tables = numbered_tables(a=90, b=50)
    tables["a"][::4] = 0
    source = write_numbered(tmp_path / "in", tables, monkeypatch)
    rules = [{"tables": "a", "norm_at_most": 0}]
    with pytest.raises(PlanError, match=r"prune\[0\]: the rows of table 'a' go by number.*name the table in as_hash"):
        export(source, tmp_path / "out", prune=rules)
    manifest = export(source, tmp_path / "out", num_shards=3, as_hash=["a"], rename_tables={"a": "z"}, prune=rules)
    assert manifest.tables[0].rows_dropped == {"norm": 23}
    rows, has_row = dist_export.open_package(tmp_path / "out").lookup("z", np.arange(90))
    assert has_row.tolist() == [bool(i % 4) for i in range(90)]
    assert rows.tobytes() == tables["a"].tobytes()


def test_bfloat16_rows_are_looked_at_as_numbers(tmp_path):
    bits = np.array([[0x3F80], [0x8000], [0x4000], [0x7FC0]])
    part = PartSpec(np.arange(4), {"embedding": Raw("BF16", bits)}, (0, 8, 8))
    write_checkpoint(tmp_path / "in", {"t": [part]})
    export(tmp_path / "in", tmp_path / "out", prune=[{"tables": "t", "norm_at_most": 1}])
    assert read_back(tmp_path / "out")["t"]["id"].tolist() == [2, 3], "a 2 and a NaN; 1 and -0 are gone"


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"tables": "x*", "norm_at_most": 0},
            r"prune\[0\].tables: the pattern 'x\*' matches no table; there are user_a",
        ),
        ({"tables": ["item", "x"], "norm_at_most": 0}, "the pattern 'x' matches no table"),
        ({"tables": "*", "slot": "score", "below": 1}, "'user_a' has no slot 'score'; tables that have it: none"),
        ({"tables": "*", "slot": "embedding", "below": 1}, r"slot 'embedding' of table 'user_a' has rows of \[4\]"),
        ({"tables": "item", "deny": "/nowhere/ids"}, r"prune\[0\].deny: /nowhere/ids cannot be read: No such file"),
    ],
)
def test_a_rule_that_does_not_fit_the_checkpoint_is_refused(tmp_path, tables, rule, message):
    write_checkpoint(tmp_path / "in", tables)
    with pytest.raises(UserError, match=message) as told:
        export(tmp_path / "in", tmp_path / "out", prune=[rule])
    assert told.value.exit_code == 2
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_an_empty_allow_list_is_a_mistake_and_an_empty_deny_list_is_none(tmp_path, tables):
    write_checkpoint(tmp_path / "in", tables)
    (tmp_path / "none").write_text("\n")
    with pytest.raises(PlanError, match="holds no ids, so every row would be left behind"):
        export(tmp_path / "in", tmp_path / "out", prune=[{"tables": "item", "allow": str(tmp_path / "none")}])
    manifest = export(tmp_path / "in", tmp_path / "out", prune=[{"tables": "item", "deny": str(tmp_path / "none")}])
    assert all(table.rows_dropped == {} for table in manifest.tables)


def test_lists_may_take_a_quarter_of_the_memory_together(tmp_path, tables, monkeypatch):
    write_checkpoint(tmp_path / "in", tables)
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.arange(1200 * 1024))
    rules = [{"tables": "item", "deny": str(tmp_path / f"{name}.npy")} for name in ("a", "a", "b")]
    settings = {"max_memory": "64MiB", "threads": 1}
    plan(tmp_path / "in", prune=rules[:2], **settings)
    with pytest.raises(PlanError, match=r"prune\[2\].deny: .*b.npy holds 1,228,800 ids.*room for 868,352"):
        plan(tmp_path / "in", prune=rules, **settings)
    limits = plan(tmp_path / "in", prune=rules[:2], **settings).limits
    assert limits.max_memory <= (64 << 20) - 1200 * 1024 * 8, "what lists take is not there for other things"


# ---- what vouches for it ---------------------------------------------------------------------------------------------


def test_the_plan_tells_apart_rules_and_lists(tmp_path, tables):
    write_checkpoint(tmp_path / "in", tables)
    np.save(tmp_path / "ids.npy", np.arange(10))
    listed = [{"tables": "item", "deny": str(tmp_path / "ids.npy")}]
    digests = [plan(tmp_path / "in", prune=rules).plan.digest for rules in ([], listed)]
    np.save(tmp_path / "ids.npy", np.arange(11))
    digests.append(plan(tmp_path / "in", prune=listed).plan.digest)
    for limit in (-1, -2):
        rules = [{"tables": "item", "slot": "step_filter", "below": limit}]
        digests.append(plan(tmp_path / "in", prune=rules).plan.digest)
    assert len(set(digests)) == 5


def test_a_list_that_changed_is_another_export(tmp_path, tables):
    write_checkpoint(tmp_path / "in", tables)
    identities = set()
    for count in (10, 11, 11):
        np.save(tmp_path / "ids.npy", np.arange(count))
        rules = [{"tables": "item", "deny": str(tmp_path / "ids.npy")}]
        manifest = export(tmp_path / "in", tmp_path / "out", prune=rules, overwrite=True)
        identities.add(manifest.run["identity"])
    assert len(identities) == 2


def test_a_gather_that_leaves_other_rows_behind_than_the_census_counted_is_found(tmp_path, monkeypatch, tables):
    write_checkpoint(tmp_path / "in", tables)
    original = PruneReader.reasons

    def reasons(self, part, first_row, ids):
        codes = original(self, part, first_row, ids)
        return np.roll(codes, 1) if monkeypatch_is_on else codes

    monkeypatch_is_on = False
    monkeypatch.setattr(PruneReader, "reasons", reasons)
    transfer = dist_export.exporter.transfer

    def spoilt(*args, **settings):
        nonlocal monkeypatch_is_on
        monkeypatch_is_on = True
        return transfer(*args, **settings)

    monkeypatch.setattr(dist_export.exporter, "transfer", spoilt)
    with pytest.raises(CommitError):
        export(
            tmp_path / "in",
            tmp_path / "out",
            num_shards=1,
            prune=[{"tables": "item", "slot": "step_filter", "below": 10}],
        )
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_plan_and_the_summary_say_what_is_left_behind(tmp_path, tables, capsys):
    from dist_export.cli import main

    write_checkpoint(tmp_path / "in", tables)
    gone = int((truth_of(tables)["item"]["step_filter"] < 10).sum())
    arguments = [f"--ckpt_dir={tmp_path / 'in'}", f"--export_dir={tmp_path / 'out'}", "--filter_sparse_opt=true"]
    arguments += ["--prune=[{tables: item, slot: step_filter, below: 10}]"]
    assert main(["plan", *arguments]) == 0
    assert f"table item: 90 rows, {gone} dropped (slot_value)" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert f"dropped  {gone} rows (slot_value)" in told.out + told.err
    document = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert document["tables"][2]["rows_dropped"] == {"slot_value": gone}


def test_the_sample_passes_over_what_is_left_behind(tmp_path, tables):
    write_checkpoint(tmp_path / "in", tables)
    planned = plan(tmp_path / "in", prune=[{"tables": "item", "slot": "step_filter", "below": 10}])
    is_pruned = find_pruned(planned.plan.checkpoint, planned.plan.pruning)
    finder = RowFinder(
        open_source(tmp_path / "in"), planned.census.misplaced, planned.plan.dropped.rows_in, is_pruned=is_pruned
    )
    for name, rows in truth_of(tables).items():
        found, _ = finder.find(name, rows["id"])
        expected = rows["step_filter"][:, 0] >= 10 if name == "item" else np.ones(len(rows["id"]), bool)
        assert found.tolist() == expected.tolist()


def test_an_export_with_a_model_is_scored_without_them(tmp_path):
    """The sample asks for rows that are left behind: missing both before and after."""
    tables = tiny_model.tables()
    source = write_checkpoint(tmp_path / "in", tables, model_state=tiny_model.trained_dense_state())
    model = {"model": "tiny_model:build_model", "dataset": "tiny_model:build_dataset"}
    plain = export(source, tmp_path / "plain", **model)
    truth = truth_of(tables)["user_emb"]
    np.save(tmp_path / "deny.npy", truth["id"])
    manifest = export(
        source, tmp_path / "out", prune=[{"tables": "user_emb", "deny": str(tmp_path / "deny.npy")}], **model
    )
    asked, missing = manifest.run["sample"]["asked"], manifest.run["sample"]["missing"]
    assert missing["user_emb"] == asked["user_emb"] > plain.run["sample"]["missing"]["user_emb"]
    assert max(manifest.parity.from_files.max_abs.values()) <= 1e-6
    assert verify(str(tmp_path / "out")).findings == []


# ---- any tables ------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn):
    """Few ids in few slices, most of them twice and in the wrong place, with a score and rows of zeros; and rules."""
    size = draw(st.sampled_from([5, 16, 65536]))
    value = 1
    parts = []
    num_parts = draw(st.integers(1, 4))
    for number in range(num_parts):
        begin, end = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
        ids = np.array(draw(st.lists(st.integers(-6, 12), max_size=10)), np.int64)
        rows = np.arange(value, value + len(ids) * 2, dtype=np.float32).reshape(len(ids), 2)
        value += len(ids) * 2
        zeros = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        rows[np.array(zeros, bool)] = 0
        score = np.array(draw(st.lists(st.integers(0, 4), min_size=len(ids), max_size=len(ids))), np.int64)
        slots = {"embedding": rows, "score": score.reshape(-1, 1), "sparse_adam_exp_avg": rows + 1}
        parts.append(PartSpec(ids, slots, (begin, end, size), suffix=f"/part_{number}_{num_parts}"))
    rules = draw(st.lists(st.sampled_from(["score", "norm", "deny", "allow"]), min_size=1, max_size=3))
    return parts, rules, draw(st.lists(st.integers(-6, 12), min_size=1, max_size=12))


@PROPERTY
@given(
    cases(),
    st.sampled_from(["first", "last"]),
    st.sampled_from([1, 2, 3, 5, "source"]),
    st.integers(1, 3),
    st.sampled_from([None, 2, 5]),
    st.booleans(),
)
def test_an_export_is_what_a_plain_model_says(case, keep, num_shards, threads, granule, drops_score) -> None:
    """Rows are pruned one by one, then of what is left one row of each id stays."""
    parts, kinds, listed = case
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        source, target = Path(folder) / "in", Path(folder) / "out"
        (Path(folder) / "ids").write_text("\n".join(map(str, listed)))
        rule_of = {
            "score": {"slot": "score", "below": 2},
            "norm": {"norm_at_most": 0},
            "deny": {"deny": f"{folder}/ids"},
            "allow": {"allow": f"{folder}/ids"},
        }
        if granule is not None:
            shrink(patch, granule=granule)
            patch.setattr(pruning_room, "_PIECE_BYTES", 16)
        write_checkpoint(source, {"t": parts, "u": make_tables({"u": 9}, 2)["u"]})
        manifest = export(
            source,
            target,
            prune=[{"tables": "t", **rule_of[kind]} for kind in kinds],
            on_duplicate=keep,
            num_shards=num_shards,
            threads=threads,
            drop_slots=["score"] if drops_score else [],
        )
        found = read_back(target)["t"]
        report = verify(str(target))
    counts: Counter[str] = Counter()
    left, strangers = [], 0
    for part in parts:
        is_kept = np.ones(len(part.ids), bool)
        for row, one_id in enumerate(part.ids.tolist()):
            strangers += not is_inside(one_id, part.slice)
            applies = {
                "score": part.slots["score"][row, 0] < 2,
                "norm": not part.slots["embedding"][row].any(),
                "deny": one_id in listed,
                "allow": one_id not in listed,
            }
            name = {"score": "slot_value", "norm": "norm", "deny": "deny_list", "allow": "allow_list"}
            reason = next((name[kind] for kind in kinds if applies[kind]), None)
            if reason is not None:
                is_kept[row] = False
                counts[reason] += 1
        left.append(PartSpec(part.ids[is_kept], {n: v[is_kept] for n, v in part.slots.items()}, part.slice))
    model, _ = model_of(left, keep=keep)
    truth = truth_of_model(left, keep=keep)
    for slot in ("id", "embedding", *([] if drops_score else ["score"])):
        assert found[slot].tobytes() == truth[slot].tobytes()
    assert ("score" in found) != drops_score
    entry = manifest.tables[0]
    expected = dict(counts) | ({"duplicate": model.duplicates} if model.duplicates else {})
    assert entry.rows_dropped == expected
    assert (entry.misplaced, entry.repaired) == (strangers, model.repaired)
    assert report.findings == []


def test_lists_are_read_once(tmp_path, tables, monkeypatch):
    write_checkpoint(tmp_path / "in", tables)
    np.save(tmp_path / "ids.npy", np.arange(5))
    asked = []
    original = source_room.read_id_list
    monkeypatch.setattr(source_room, "read_id_list", lambda *a, **k: (asked.append(a), original(*a, **k))[1])
    plan(tmp_path / "in", prune=[{"tables": "item", "deny": str(tmp_path / "ids.npy")}] * 3)
    assert len(asked) == 1
