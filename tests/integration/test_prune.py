"""Rows that rules leave behind: which they are, in which order rules are tried, and that they are gone and accounted for."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

import dist_export
from dist_export.cli import main
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.source_rows import SourceRows
from dist_export.errors import CommitError, ConfigError, PlanError, UserError
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.manifest import compute_digest
from dist_export.pipeline import planning as source_room
from dist_export.transfer.prune_filter import PruneReader, find_pruned
from dist_export.verify.verify import verify
from tests.support import tiny_model
from tests.support.numbered_cases import numbered_tables, write_numbered
from tests.support.properties import examples
from tests.support.recis_writer import PartSpec, Raw, make_tables, read_back, split_table, truth_of, write_checkpoint
from tests.support.row_model import is_inside, model_of, truth_of_model
from tests.support.sparse_cases import assert_exact, content, export, open_source, plan, recorded_reads, tiny

PROPERTY = examples(60)


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
        dist_export.ExportConfig(
            ckpt_dir="a", export_dir="b", filter_sparse_opt=False, prune=[{"tables": "a", "norm_at_most": 0}]
        )


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
    """A mistyped limit, or a list that goes with other ids, is an error; who means it gets a note."""
    write_checkpoint(tmp_path / "in", tables)
    rules = [
        {"tables": "item", "slot": "step_filter", "below": 10},
        {"tables": "*", "slot": "step_filter", "below": -1},
        {"tables": "item", "slot": "step_filter", "below": 1000},
    ]
    with pytest.raises(PlanError) as caught:
        export(tmp_path / "in", tmp_path / "out", num_shards=2, prune=rules)
    found = re.fullmatch(
        r"the rules of prune leave none of the 90 rows of table 'item' \(prune\[0\] took (\d+), prune\[2\] took (\d+)\), so "
        r"serving would find no row in it\. Nothing was written\. .* or set on_empty_table: allow",
        str(caught.value),
    )
    assert found is not None
    assert int(found[1]) + int(found[2]) == 90
    assert not (tmp_path / "out").exists()
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards=2, prune=rules, on_empty_table="allow")
    assert [note for note in manifest.notes if "prune" in note] == [str(caught.value).partition(", so serving")[0]]
    assert [rule.rows for rule in manifest.prune] == [int(found[1]), 0, int(found[2])]
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
def test_neither_threads_nor_memory_nor_pieces_change_what_goes(tmp_path, tables, threads, budget):
    write_checkpoint(tmp_path / "in", tables)
    rules = [{"tables": "*", "slot": "step_filter", "below": 7}, {"tables": "*", "norm_at_most": 1.5}]
    whole = export(tmp_path / "in", tmp_path / "whole", prune=rules, num_shards=2)
    tuning = STANDARD
    if budget == "runs":
        tuning = tiny(granule=5, rule_bytes=17)
    elif budget is not None:
        tuning = Tuning(held_ids=budget)
    cut = export(tmp_path / "in", tmp_path / "cut", prune=rules, num_shards=2, threads=threads, tuning=tuning)
    assert content(tmp_path / "whole") == content(tmp_path / "cut")
    assert whole.tables == cut.tables


def test_numbered_tables_are_pruned_as_hash_tables_alone(tmp_path, monkeypatch):
    tables = numbered_tables(a=90, b=50)
    tables["a"][::4] = 0
    source = write_numbered(tmp_path / "in", tables, monkeypatch)
    rules = [{"tables": "a", "norm_at_most": 0}]
    with pytest.raises(
        PlanError, match=r"prune\[0\]: the rows of table 'a' go by number.*name the table in to_hash_tables"
    ):
        export(source, tmp_path / "out", prune=rules)
    manifest = export(
        source, tmp_path / "out", num_shards=3, to_hash_tables=["a"], rename_tables={"a": "z"}, prune=rules
    )
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
    with pytest.raises(PlanError, match="holds no ids, so every row would be pruned"):
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
    limits = plan(tmp_path / "in", prune=rules[:2], **settings).budget
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
    original = PruneReader.rules

    def rules(self, part, first_row, ids):
        codes = original(self, part, first_row, ids)
        return np.roll(codes, 1) if monkeypatch_is_on else codes

    monkeypatch_is_on = False
    monkeypatch.setattr(PruneReader, "rules", rules)
    transfer = dist_export.pipeline.steps.transfer

    def spoilt(*args, **settings):
        nonlocal monkeypatch_is_on
        monkeypatch_is_on = True
        return transfer(*args, **settings)

    monkeypatch.setattr(dist_export.pipeline.steps, "transfer", spoilt)
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
        SourceRows(
            checkpoint=open_source(tmp_path / "in"),
            misplaced=planned.census.misplaced,
            dropped_in=planned.plan.dropped.rows_in,
            is_pruned=is_pruned,
        )
    )
    for name, rows in truth_of(tables).items():
        found, _ = finder.find(name, rows["id"])
        expected = rows["step_filter"][:, 0] >= 10 if name == "item" else np.ones(len(rows["id"]), bool)
        assert found.tolist() == expected.tolist()


def test_an_export_with_a_model_is_scored_without_them(tmp_path):
    """The sample asks for rows that are left behind: they are there neither before nor after."""
    tables = tiny_model.tables()
    source = write_checkpoint(tmp_path / "in", tables, model_state=tiny_model.trained_dense_state())
    model = {"model": tiny_model.MODEL, "dataset": tiny_model.DATASET}
    plain = export(source, tmp_path / "plain", **model)
    truth = truth_of(tables)["user_emb"]
    np.save(tmp_path / "deny.npy", truth["id"])
    manifest = export(
        source,
        tmp_path / "out",
        prune=[{"tables": "user_emb", "deny": str(tmp_path / "deny.npy")}],
        on_empty_table="allow",
        **model,
    )
    sample = manifest.run["sample"]
    assert sample["left_behind"] == {"user_emb": sample["asked"]["user_emb"], "item_emb": 0}
    assert sample["missing"] == plain.run["sample"]["missing"]
    assert not any(plain.run["sample"]["left_behind"].values())
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
    tuning = STANDARD if granule is None else tiny(granule=granule, rule_bytes=16)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in", Path(folder) / "out"
        (Path(folder) / "ids").write_text("\n".join(map(str, listed)))
        rule_of = {
            "score": {"slot": "score", "below": 2},
            "norm": {"norm_at_most": 0},
            "deny": {"deny": f"{folder}/ids"},
            "allow": {"allow": f"{folder}/ids"},
        }
        write_checkpoint(source, {"t": parts, "u": make_tables({"u": 9}, 2)["u"]})
        manifest = export(
            source,
            target,
            prune=[{"tables": "t", **rule_of[kind]} for kind in kinds],
            on_empty_table="allow",
            on_duplicate=keep,
            num_shards=num_shards,
            threads=threads,
            drop_slots=["score"] if drops_score else [],
            tuning=tuning,
        )
        found = read_back(target)["t"]
        report = verify(str(target), tuning=tuning)
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


def test_a_table_that_was_empty_before_is_no_error(tmp_path):
    write_checkpoint(tmp_path / "in", with_filter(make_tables({"item": 20, "new": 0}, 2)))
    manifest = export(tmp_path / "in", tmp_path / "out", prune=[{"tables": "*", "norm_at_most": 0}])
    assert manifest.tables[0].rows_out > 0
    assert (manifest.tables[1].rows_in, manifest.tables[1].rows_out) == (0, 0)
    assert not [note for note in manifest.notes if "prune" in note]


def test_the_manifest_has_the_rules_and_lists_that_no_row_matched_are_told(tmp_path, tables, capsys):
    write_checkpoint(tmp_path / "in", tables)
    ids = truth_of(tables)["item"]["id"]
    (tmp_path / "some.txt").write_text("\n".join(map(str, [*ids[:3].tolist(), ids[0]])))
    (tmp_path / "none.txt").write_text("123456789\n")
    lists = {name: str(tmp_path / f"{name}.txt") for name in ("some", "none")}
    rules = [
        {"tables": ["item"], "deny": lists["some"]},
        {"tables": "it*", "deny": lists["none"]},
        {"tables": "item", "deny": lists["some"]},
        {"tables": "item", "slot": "step_filter", "below": 0.5},
        {"tables": "item", "norm_at_most": 0},
    ]
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards=2, prune=rules)
    document = json.loads((tmp_path / "out" / "manifest.json").read_text())
    digest = "xxh3:" + xxhash.xxh3_128_hexdigest(np.sort(ids[:3]).tobytes())
    other = "xxh3:" + xxhash.xxh3_128_hexdigest(np.array([123456789], np.int64).tobytes())
    some = {"reason": "deny_list", "deny": lists["some"], "ids": 3, "ids_digest": digest}
    assert document["prune"][:3] == [
        {"tables": ["item"], **some, "rows": 3},
        {"tables": ["it*"], **some, "deny": lists["none"], "ids": 1, "ids_digest": other, "rows": 0},
        {"tables": ["item"], **some, "rows": 0},
    ]
    assert document["prune"][3]["slot"] == "step_filter"
    assert document["prune"][3]["below"] == 0.5
    assert document["prune"][4]["norm_at_most"] == 0
    assert manifest.tables[2].rows_dropped.get("deny_list") == 3
    document["prune"][3]["below"] = 0.6
    assert compute_digest(document) != manifest.digest
    told = [
        f"prune[{place}].deny: no row of its tables has an id of {lists[name]}"
        for place, name in ((1, "none"), (2, "some"))
    ]
    assert [note.partition(",")[0] for note in manifest.notes if "prune" in note] == told
    config = {
        "ckpt_dir": str(tmp_path / "in"),
        "export_dir": str(tmp_path / "new"),
        "filter_sparse_opt": True,
        "prune": rules,
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert main(["plan", "--config", str(tmp_path / "c.yaml")]) == 0
    assert all(note in capsys.readouterr().out for note in told[:1])


def test_lists_are_read_once(tmp_path, tables, monkeypatch):
    write_checkpoint(tmp_path / "in", tables)
    np.save(tmp_path / "ids.npy", np.arange(5))
    asked = []
    original = source_room.read_id_list
    monkeypatch.setattr(source_room, "read_id_list", lambda *a, **k: (asked.append(a), original(*a, **k))[1])
    plan(tmp_path / "in", prune=[{"tables": "item", "deny": str(tmp_path / "ids.npy")}] * 3)
    assert len(asked) == 1
