"""Rules on single rows, and lists of ids from files."""

from __future__ import annotations

import numpy as np
import pytest

from dist_export.checkpoint.metadata import SlotMeta
from dist_export.config.prune_rules import parse_rules
from dist_export.errors import ConfigError, PlanError
from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.formats.id_list import IdList
from dist_export.ids.lists import read_id_list
from dist_export.plan.prune import Pruning, TableRule, match_rules
from tests.support.properties import examples

PROPERTY = examples(60)


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
    codes = match_rules(compiled, np.arange(len(values)), {1: bytes_of(values, dtype)})
    return (codes > 0).tolist()


def table_meta(*slots: SlotMeta):
    from dist_export.checkpoint.metadata import TableMeta

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
    return (match_rules([rule], np.arange(len(rows)), {1: bytes_of(rows, dtype)}) > 0).tolist()


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
    for limit in exact[:50]:  # right at the edge, where the last bit decides: for one of the 50 rows that go alone
        whole = norms(rows, limit)
        assert whole[:50] == [one for row in rows[:50] for one in norms(row[None], limit)]
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
    codes = match_rules(rules, np.array([1, 3, 5, 4, 0]), {1: bytes_of([0, 0, 0, 1, 1], "float32")})
    assert [rules[code - 1].reason if code else "" for code in codes.tolist()] == [
        "deny_list",
        "norm",
        "norm",
        "",
        "allow_list",
    ]


# ---- files of ids ----------------------------------------------------------------------------------------------------


def read(path, most_bytes=1 << 20, **sizes):
    return read_id_list(str(path), most_bytes=most_bytes, setting="prune[0].deny", **sizes).tolist()


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
def test_ids_come_from_text(tmp_path, end):
    (tmp_path / "ids").write_text(f"12\n-7\n\n  {(1 << 63) - 1} \n{-(1 << 63)}\n12{end}")
    assert read(tmp_path / "ids", piece_bytes=5) == [-(1 << 63), -7, 12, (1 << 63) - 1]


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
    with pytest.raises(ConfigError, match=r"needs the package pyarrow: pip install pyarrow"):
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


def test_a_list_may_be_a_url():
    import fsspec

    with fsspec.open("memory://ids.txt", "wb") as file:
        file.write(b"3\n1\n")
    with fsspec.open("memory://lists/of/ids.npy", "wb") as file:
        np.save(file, np.array([5, 4]))
    assert read("memory://ids.txt") == [1, 3]
    assert read("memory://lists/of/ids.npy") == [4, 5]
    with pytest.raises(ConfigError, match="memory://nothing cannot be read"):
        read("memory://nothing")


class Same:
    """Stands for the rows that some base has."""

    def __init__(self, base: bytes) -> None:
        self.base = base

    def find(self, part: int, first_row: int, ids: np.ndarray, is_kept: np.ndarray, reader: object) -> np.ndarray:
        return is_kept

    def digest(self) -> bytes:
        return self.base


def test_rules_against_another_base_are_others() -> None:
    """So that the shards of an interrupted delta are not taken over into a delta against another base."""
    rules, ranks = Pruning(rules=((),)), np.zeros(1, np.int64)
    one, two = (rules.leaving(Same(base), ranks) for base in (b"one", b"two"))
    assert one.digest() != two.digest() != rules.digest()
    assert one.digest() == rules.leaving(Same(b"one"), ranks).digest()
    assert one.of_settings().digest() == rules.digest()
    assert not one.of_settings()
