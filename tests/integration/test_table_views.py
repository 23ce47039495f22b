"""Tables that are left out, renamed, written as hash tables, and their default rows."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dist_export
from dist_export.errors import ConfigError, ModelError, PlanError
from dist_export.pipeline.dry_run import make_report, render_report
from dist_export.plan.table_view import TableSettings, _compile, view_tables
from dist_export.verify.verify import verify
from tests.support import tiny_model
from tests.support.numbered_cases import numbered_tables, write_numbered
from tests.support.properties import examples
from tests.support.recis_writer import Raw, make_tables, split_table, truth_of, write_checkpoint
from tests.support.sparse_cases import assert_exact, content, export, open_source


@pytest.fixture
def source(tmp_path):
    tables = make_tables({"user_a": 60, "user_b": 40, "item": 30}, 3)
    write_checkpoint(tmp_path / "in", tables, dense={"w": np.ones(3)})
    return tmp_path / "in"


@pytest.fixture
def truth(source):
    return truth_of(make_tables({"user_a": 60, "user_b": 40, "item": 30}, 3))


def entries(manifest):
    return {table.name: table for table in manifest.tables}


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5, "source"])
def test_tables_are_selected_left_out_and_renamed_in_one_pass(tmp_path, source, truth, num_shards):
    manifest = export(
        source,
        tmp_path / "out",
        num_shards=num_shards,
        select_tables=["user_*", "item"],
        drop_tables=["*_b"],
        rename_tables={"user_*": "u.{0}", "i?em": "{0}hing"},
    )
    assert_exact(tmp_path / "out", {"u.a": truth["user_a"], "thing": truth["item"]})
    assert {name: table.source_name for name, table in entries(manifest).items()} == {"u.a": "user_a", "thing": "item"}
    assert [(table.name, table.rows, table.reason) for table in manifest.left_out_tables] == [
        ("user_b", 40, "drop_tables")
    ]
    assert verify(str(tmp_path / "out")).findings == []
    assert dist_export.open_package(tmp_path / "out").lookup("thing", truth["item"]["id"])[1].all()


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("default_row", {"*": "zeros", "item": [1.0] * 8}),
        ("rename_tables", {"*": "t.{0}", "item": "thing"}),
        ("dtype", {"*": "float16", "user_*": "bfloat16"}),
        ("dtype", [{"user_?": "float16"}, {"user_a": "int8"}]),
    ],
)
def test_a_pattern_without_effect_is_refused(tmp_path, source, setting, values):
    with pytest.raises(PlanError, match=rf"{setting}: the pattern '\S+' has no effect, because '\S+' comes before it"):
        export(source, tmp_path / "out", **{setting: values})
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_is_narrower_or_says_the_same_may_follow(tmp_path, source):
    dtype = {"user_a": "float16", "user_*": "bfloat16", "user_b": "bfloat16", "*": "source"}
    manifest = export(source, tmp_path / "out", dtype=dtype)
    kept = {name: table.kept[1].dtype for name, table in entries(manifest).items()}
    assert kept == {"user_a": "float16", "user_b": "bfloat16", "item": "float32"}


def test_what_is_left_is_written_as_if_the_rest_had_never_been(tmp_path, source):
    """Byte for byte but for the manifest: parts, blocks and strips are numbered anew."""
    tables = make_tables({"user_a": 60, "user_b": 40, "item": 30}, 3)
    write_checkpoint(tmp_path / "less", {"user_a": tables["user_a"], "item": tables["item"]}, dense={"w": np.ones(3)})
    export(tmp_path / "less", tmp_path / "expected", num_shards=2)
    export(source, tmp_path / "out", num_shards=2, drop_tables=["user_b"])
    assert content(tmp_path / "out") == content(tmp_path / "expected")


@examples(400)
@given(st.text("ab-]*?[!^.", max_size=7), st.lists(st.text("ab-]^!.", max_size=5), min_size=1, max_size=8))
def test_a_pattern_for_new_names_matches_what_any_other_pattern_matches(pattern, names):
    try:
        matches = _compile(pattern)
    except PlanError:  # such as [b-a], which matches nothing
        return
    assert [matches(name) is not None for name in names] == [fnmatchcase(name, pattern) for name in names]


def test_two_tables_may_swap_their_names(tmp_path, source, truth):
    export(source, tmp_path / "out", select_tables=["user_*"], rename_tables={"user_a": "user_b", "user_b": "user_a"})
    assert_exact(tmp_path / "out", {"user_b": truth["user_a"], "user_a": truth["user_b"]})


def test_without_such_settings_the_manifest_says_nothing_of_them(tmp_path, source):
    export(source, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "left_out_tables" not in document
    assert not {"source_name", "default_row"} & set(document["tables"][0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"select_tables": ["x*"]},
            r"select_tables: the pattern 'x\*' matches no table; there are user_a, user_b, item",
        ),
        ({"drop_tables": ["x"]}, "drop_tables: the pattern 'x' matches no table"),
        ({"select_tables": ["item", "nothing"]}, "select_tables: the pattern 'nothing'"),
        ({"drop_tables": ["*"]}, "leave no table; set need_export_sparse: false"),
        ({"rename_tables": {"x": "y"}}, "rename_tables: the pattern 'x' matches no table"),
        (
            {"rename_tables": {"item": "z"}, "drop_tables": ["item"]},
            "'item' matches no table; there are user_a, user_b$",
        ),
        ({"rename_tables": {"user_*": "u"}}, "the tables 'user_a' and 'user_b' would both be called 'u'"),
        ({"rename_tables": {"item": "user_a"}}, "the tables 'user_a' and 'item' would both be called 'user_a'"),
        ({"rename_tables": {"item": "{0}"}}, r"asks for piece \{0\}, but 'item' has 0 wildcards"),
        ({"rename_tables": {"[*": "y"}}, r"'\[\*' matches no table"),
        ({"rename_tables": {"item": "a@b"}}, "would become 'a@b', which has '@' in it"),
        ({"rename_tables": {"item": "a^b"}}, r"'\^' in it"),
        ({"rename_tables": {"item": "a/part_0_1"}}, "'/part_' in it"),
        ({"rename_tables": {"item": ""}}, "is empty"),
        ({"rename_tables": {"item": " a"}}, "begins or ends with a space"),
        ({"rename_tables": {"item": "a\nb"}}, "cannot be printed"),
        ({"rename_tables": {"item": "ü" * 201}}, "longer than 400 bytes"),
        ({"to_hash_tables": ["nothing"]}, "to_hash_tables: the pattern 'nothing' matches no table"),
        ({"to_hash_tables": ["item"]}, "to_hash_tables: 'item' is a hash table already"),
        ({"default_row": {"x": "zeros"}}, "default_row: the pattern 'x' matches no table"),
        ({"default_row": {"item": [1.0]}}, "default_row: 1 values for table 'item', whose rows have 4"),
        ({"default_row": {"item": [0.0, 0.0, 1e39, 0.0]}}, r"value 2 for table 'item' is 1e\+39, which float32 cannot"),
    ],
)
def test_what_cannot_be_is_an_error_before_anything_is_written(tmp_path, source, settings, message):
    with pytest.raises(PlanError, match=message) as told:
        export(source, tmp_path / "out", **settings)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["select_tables", "drop_tables", "to_hash_tables"])
def test_a_copy_and_an_export_without_tables_take_no_such_settings(name):
    with pytest.raises(ConfigError, match=f"{name} needs new shards.*set filter_sparse_opt: true"):
        dist_export.ExportConfig(ckpt_dir="a", export_dir="b", filter_sparse_opt=False, **{name: ["x"]})
    with pytest.raises(ConfigError, match="need_export_sparse is false"):
        dist_export.ExportConfig(
            ckpt_dir="a", export_dir="b", filter_sparse_opt=True, need_export_sparse=False, **{name: ["x"]}
        )


def test_the_plan_and_the_summary_show_it(tmp_path, source, capsys):
    from dist_export.cli import main

    settings = ["--filter_sparse_opt=true", "--drop_tables=[user_b]", "--rename_tables={item: thing}"]
    settings += ["--default_row={item: [1, 2, 3, 4], user_a: zeros}"]
    places = [f"--ckpt_dir={source}", f"--export_dir={tmp_path / 'out'}"]
    assert main(["plan", *places, *settings]) == 0
    told = capsys.readouterr().out
    assert "  table thing (item in the source): 30 rows\n    for ids that it lacks: [1, 2, 3, 4]\n" in told
    assert "  table user_a: 60 rows\n    for ids that it lacks: zeros\n" in told
    assert "  table user_b: left out, 40 rows (drop_tables)" in told
    assert main([*places, *settings]) == 0
    captured = capsys.readouterr()
    told = captured.out + captured.err
    assert "left out 1 table, 40 rows: user_b" in told
    assert "renamed  item -> thing" in told


# ---- default rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F64", "F16", "BF16", "I8"])
def test_a_lookup_gives_the_default_row_for_ids_that_are_not_there(tmp_path, dtype):
    ids = np.arange(5)
    values = np.ones((5, 3)) if dtype != "BF16" else np.full((5, 3), 0x3F80)
    part = split_table(ids, {"embedding": np.ones((5, 3), np.float32)}, 1)
    part[0].slots["embedding"] = Raw(dtype, values)
    write_checkpoint(tmp_path / "in", {"t": part})
    manifest = export(tmp_path / "in", tmp_path / "out", default_row={"*": [1, -2, 3]})
    assert manifest.tables[0].default_row == (1.0, -2.0, 3.0)
    package = dist_export.open_package(tmp_path / "out")
    rows, has_row = package.lookup("t", [[2, 99], [7, 4]])
    assert has_row.tolist() == [[True, False], [False, True]]
    assert rows.tolist() == [[[1, 1, 1], [1, -2, 3]], [[1, -2, 3], [1, 1, 1]]]
    raw, _ = package.lookup("t", [99], raw=True)
    assert (
        raw.tobytes()
        == (
            np.array([0x3F80, 0xC000, 0x4040], "<u2") if dtype == "BF16" else np.array([1, -2, 3], rows.dtype)
        ).tobytes()
    )
    assert verify(str(tmp_path / "out")).findings == []


def test_a_bfloat16_default_is_rounded_to_the_nearest(tmp_path):
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(1)
    values = random.standard_normal(64).astype(np.float32)
    part = split_table(np.arange(2), {"embedding": np.ones((2, 64), np.float32)}, 1)
    part[0].slots["embedding"] = Raw("BF16", np.zeros((2, 64)))
    write_checkpoint(tmp_path / "in", {"t": part})
    export(tmp_path / "in", tmp_path / "out", default_row={"t": values.tolist()})
    found = dist_export.open_package(tmp_path / "out").lookup("t", 99)[0]
    assert found.tolist() == torch.tensor(values).bfloat16().float().tolist()


@pytest.mark.parametrize("default", [None, "zeros"])
def test_zeros_are_what_a_lookup_gives_without_a_word_too(tmp_path, source, default):
    settings = {} if default is None else {"default_row": {"user_*": default}}
    manifest = export(source, tmp_path / "out", **settings)
    assert (entries(manifest)["user_a"].default_row == "zeros") == (default is not None)
    rows, has_row = dist_export.open_package(tmp_path / "out").lookup("user_a", [3])
    assert not has_row.any()
    assert not rows.any()


def test_a_copy_may_have_default_rows(tmp_path, source):
    manifest = export(source, tmp_path / "out", filter_sparse_opt=False, default_row={"item": [1, 2, 3, 4]})
    assert entries(manifest)["item"].default_row == (1.0, 2.0, 3.0, 4.0)
    assert verify(str(tmp_path / "out")).findings == []


@pytest.mark.parametrize("values", [[1.5], [300], [-129]])
def test_a_default_that_the_dtype_cannot_hold_is_refused(tmp_path, values):
    write_checkpoint(tmp_path / "in", {"t": split_table(np.arange(2), {"embedding": np.ones((2, 1), np.int8)}, 1)})
    with pytest.raises(PlanError, match="which int8 cannot hold"):
        export(tmp_path / "in", tmp_path / "out", default_row={"t": values})


@pytest.mark.parametrize("row", [[1.0], "ones", [1.0] * 5])
def test_verify_finds_a_default_row_that_is_none(tmp_path, source, row):
    from dist_export.errors import PackageError
    from dist_export.manifest import compute_digest

    export(source, tmp_path / "out", default_row={"item": [1, 2, 3, 4]})
    path = tmp_path / "out" / "manifest.json"
    document = json.loads(path.read_text())
    document["tables"][2]["default_row"] = row
    document["digest"] = compute_digest(document)
    path.write_text(json.dumps(document))
    findings = verify(str(tmp_path / "out")).findings
    assert any("the default row of table 'item' is no row of it" in finding for finding in findings)
    if isinstance(row, list):
        with pytest.raises(PackageError, match=r"default row of table 'item' has \d values"):
            dist_export.open_package(tmp_path / "out").lookup("item", [3])


# ---- to_hash_tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, "source"])
def test_numbers_become_ids(tmp_path, monkeypatch, num_shards):
    tables = numbered_tables(a=90, b=7, c=0)
    source = write_numbered(tmp_path / "in", tables, monkeypatch)
    manifest = export(source, tmp_path / "out", num_shards=num_shards, to_hash_tables=["*"], threads=2)
    expected = {name: {"id": np.arange(len(rows)), "embedding": rows} for name, rows in tables.items()}
    assert_exact(tmp_path / "out", expected)
    assert all(part.slice.endswith("@65536") for table in manifest.tables for part in table.parts)
    assert verify(str(tmp_path / "out")).findings == []


def test_some_tables_become_hash_tables_and_others_do_not(tmp_path, monkeypatch):
    tables = numbered_tables(a=90, b=70)
    source = write_numbered(tmp_path / "in", tables, monkeypatch)
    manifest = export(source, tmp_path / "out", num_shards=3, to_hash_tables=["b"], rename_tables={"b": "hashed"})
    assert [(table.name, table.is_hashed) for table in manifest.tables] == [
        ("a", False),
        ("hashed", dist_export.manifest.msgspec.UNSET),
    ]
    rows, has_row = dist_export.open_package(tmp_path / "out").lookup("hashed", np.arange(71))
    assert has_row.tolist() == [True] * 70 + [False]
    assert rows[:70].tobytes() == tables["b"].tobytes()


def test_a_view_of_strips_and_row_numbers_holds_what_it_held(tmp_path, monkeypatch):
    tables = numbered_tables(a=90, b=80, c=70)
    source = write_numbered(tmp_path / "in", tables, monkeypatch)
    whole = open_source(source)
    seen = view_tables(whole, TableSettings(drop=["b"], to_hash_tables=["c"]))
    assert [table.name for table in seen.tables] == ["a", "c"]
    for table, name in ((0, "a"), (1, "c")):
        before = whole.parts.of_table([table.name for table in whole.tables].index(name))
        for old, new in zip(before, seen.parts.of_table(table), strict=True):
            assert seen.parts.first_row_of(new) == whole.parts.first_row_of(old)
            strips = [
                [getattr(c.strips, field)[list(c.strips.of(part, 1))].tolist() for field in ("offset", "width")]
                for c, part in ((whole, old), (seen, new))
            ]
            assert strips[0] == strips[1]


# ---- with a model ----------------------------------------------------------------------------------------------------


def test_the_sample_finds_renamed_tables_by_the_names_that_the_model_has(tmp_path):
    tables = tiny_model.tables()
    source = write_checkpoint(tmp_path / "in", tables, model_state=tiny_model.trained_dense_state())
    model = {"model": tiny_model.MODEL, "dataset": tiny_model.DATASET}
    manifest = export(source, tmp_path / "out", rename_tables={"*": "served_{0}"}, **model)
    plain = export(source, tmp_path / "plain", **model)
    assert {table.name for table in manifest.tables} == {f"served_{name}" for name in tables}
    assert manifest.run["sample"]["missing"] == {
        f"served_{name}": rows for name, rows in plain.run["sample"]["missing"].items()
    }
    assert manifest.parity.from_files == plain.parity.from_files
    report = verify(str(tmp_path / "out"))
    assert report.findings == []
    assert any("the rows of its" in line for line in report.checked)


def test_a_table_that_the_model_uses_cannot_be_left_out(tmp_path):
    tables = tiny_model.tables()
    source = write_checkpoint(tmp_path / "in", tables, model_state=tiny_model.trained_dense_state())
    name = next(iter(tables))
    model = {"model": tiny_model.MODEL, "dataset": tiny_model.DATASET}
    with pytest.raises(ModelError, match=f"rows of table '{name}' up, which drop_tables leaves out"):
        export(source, tmp_path / "out", drop_tables=[name], **model)
    assert not (tmp_path / "out").exists()


def test_the_report_is_plain_values(source, tmp_path):
    values = {"ckpt_dir": str(source), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True}
    report = make_report(dist_export.ExportConfig(**values, select_tables=["item"]), world_size=2)
    json.dumps(report)
    assert [table["name"] for table in report["left_out_tables"]] == ["user_a", "user_b"]
    assert any("user_b: left out" in line for line in render_report(report))


def test_fg_names_tables_as_the_trainer_does_and_is_told_of_new_names(tmp_path):
    tables = tiny_model.tables()
    source = write_checkpoint(tmp_path / "in", tables)
    feature = {"feature_name": "item_id", "feature_type": "id_feature", "expression": "item:item_id"}
    feature |= {"value_type": "String", "need_prefix": False, "gen_val_type": "lookup", "gen_key_type": "hash"}
    feature |= {"embedding_dimension": tiny_model.DIM, "shared_name": "item_emb"}
    fg = {"fg_conf_or_path": {"features": [feature]}, "fg_rules": "none"}
    manifest = export(source, tmp_path / "out", rename_tables={"item_emb": "things"}, **fg)
    assert "fg.json names tables as the trainer does, the package otherwise: item_emb is things" in manifest.notes
    with pytest.raises(ConfigError, match="'item_emb'"):
        export(source, tmp_path / "no", drop_tables=["item_emb"], **fg)
