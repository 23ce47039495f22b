"""Rows that stand twice or in the wrong slice: what is kept, moved, dropped or refused, and how it is accounted for."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dist_export.pipeline.shards
import dist_export.pipeline.steps
from dist_export.commit import audit
from dist_export.commit.audit import check_accounts, check_entries
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.source_rows import SourceRows
from dist_export.errors import CheckpointError, CommitError, ConfigError, PlanError, UserError
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.pipeline.dry_run import render_report
from dist_export.plan import memory_budget as plan_limits
from dist_export.plan.dropped_rows import DroppedRows
from dist_export.plan.memory_budget import MemoryBudget
from dist_export.storage.urls import open_directory
from dist_export.transfer import duplicates
from dist_export.verify.verify import verify
from tests.support import tiny_model
from tests.support.properties import examples
from tests.support.recis_writer import PartSpec, make_rows, make_tables, read_back, split_table, write_checkpoint
from tests.support.row_model import model_of, truth_of_model
from tests.support.sparse_cases import assert_exact, content, copy, export, open_source, plan, recorded_reads, tiny

PROPERTY = examples(40)
KEPT = ("id", "embedding")


def repeat_rows(parts: list[PartSpec], rows: list[tuple[int, int, int]]) -> None:
    """Append ``count`` rows of part ``giver`` to part ``taker``, with values of their own."""
    random = np.random.default_rng(9)
    for giver, taker, count in rows:
        ids = parts[giver].ids[:count]
        parts[taker].ids = np.concatenate([parts[taker].ids, ids])
        for slot, values in parts[taker].slots.items():
            fresh = random.random((len(ids), *values.shape[1:])).astype(values.dtype)
            parts[taker].slots[slot] = np.concatenate([values, fresh])


@pytest.fixture
def tables():
    """Table ``a`` repeats rows within a part, in another part, and three times; ``b`` is sound."""
    made = make_tables({"a": 120, "b": 40}, 3)
    repeat_rows(made["a"], [(0, 0, 4), (0, 2, 3), (1, 0, 2), (2, 2, 1)])
    return made


def check_against_model(target, parts, manifest, *, keep, table=0):
    model, _ = model_of(parts, keep=keep)
    entry = manifest.tables[table]
    assert entry.rows_in == model.rows_in
    assert entry.rows_out == len(model.rows)
    assert entry.duplicates == model.duplicates
    assert entry.rows_dropped == ({"duplicate": model.duplicates} if model.duplicates else {})
    assert (entry.misplaced, entry.repaired) == (model.misplaced, model.repaired)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, "source"])
@pytest.mark.parametrize("keep", ["first", "last"])
def test_one_row_of_each_id_is_kept_and_the_others_are_accounted_for(tmp_path, tables, keep, num_shards):
    write_checkpoint(tmp_path / "in", tables)
    manifest = export(tmp_path / "in", tmp_path / "out", on_duplicate=keep, num_shards=num_shards)
    assert_exact(tmp_path / "out", {name: truth_of_model(tables[name], keep=keep) for name in tables})
    check_against_model(tmp_path / "out", tables["a"], manifest, keep=keep)
    assert (manifest.tables[1].rows_dropped, manifest.tables[1].duplicates) == ({}, 0)
    assert manifest.tables[0].rows_dropped == {"duplicate": 10}
    assert {slot.name: slot.num_bytes for slot in manifest.tables[0].kept} == {"id": 120 * 8, "embedding": 120 * 16}
    assert {slot.num_bytes for slot in manifest.tables[0].dropped} == {130 * 16}
    assert verify(str(tmp_path / "out")).findings == []


@pytest.mark.parametrize("keep", ["first", "last"])
def test_the_same_id_in_two_tables_is_no_repeat(tmp_path, keep):
    """Though it is the largest repeated one of the first table and the smallest of the second."""
    tables = {
        name: [PartSpec(np.array([7, 7, i]), {"embedding": np.arange(6.0).reshape(3, 2)}, (0, 8, 8))]
        for i, name in enumerate(("a", "b"))
    }
    write_checkpoint(tmp_path / "in", tables)
    manifest = export(tmp_path / "in", tmp_path / "out", on_duplicate=keep)
    assert [table.rows_dropped for table in manifest.tables] == [{"duplicate": 1}] * 2
    assert_exact(tmp_path / "out", {name: truth_of_model(parts, keep=keep) for name, parts in tables.items()})


@pytest.mark.parametrize("keep", ["first", "last"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("budget", [None, "runs", 300, 40])
def test_neither_threads_nor_memory_nor_pieces_decide_which_row_stays(tmp_path, tables, keep, threads, budget):
    write_checkpoint(tmp_path / "in", tables)
    export(tmp_path / "in", tmp_path / "whole", on_duplicate=keep, num_shards=2)
    whole = content(tmp_path / "whole")
    tuning = STANDARD
    if budget == "runs":
        tuning = tiny(granule=5)
    elif budget is not None:
        tuning = Tuning(held_ids=budget, run_rows=32)
    export(tmp_path / "in", tmp_path / "cut", on_duplicate=keep, num_shards=2, threads=threads, tuning=tuning)
    assert content(tmp_path / "cut") == whole


@pytest.mark.parametrize("keep", ["first", "last"])
def test_parts_of_one_slice_are_ordered_by_their_keys(tmp_path, keep):
    """As the plan has them: part_2 comes before part_10."""
    full = (0, 65536, 65536)
    suffixes = ["/part_10_11", "/part_2_11"]
    parts = [
        PartSpec(np.array([5, 6 + i]), {"embedding": np.full((2, 2), i, np.float32)}, full, suffix=suffix)
        for i, suffix in enumerate(suffixes)
    ]
    write_checkpoint(tmp_path / "in", {"t": parts})
    export(tmp_path / "in", tmp_path / "out", on_duplicate=keep)
    found = read_back(tmp_path / "out")["t"]
    assert found["id"].tolist() == [5, 6, 7]
    assert found["embedding"][0].tolist() == ([1, 1] if keep == "first" else [0, 0])


def test_only_parts_that_lose_rows_are_gathered(tmp_path, monkeypatch):
    tables = make_tables({"a": 400, "b": 50}, 4)
    repeat_rows(tables["a"], [(2, 2, 5)])
    planned = plan(write_checkpoint(tmp_path / "in", tables), num_shards=2, on_duplicate="last").plan
    assert {gather.part for gather in planned.gathers} == {2}
    assert len(planned.copies) > 0
    checkpoint = planned.checkpoint
    kept_bytes = sum(int(checkpoint.parts.rows[part]) * 24 for part in (0, 1, 3))
    assert int(planned.copies.num_bytes.sum()) == kept_bytes + 50 * 24


def test_a_part_of_which_nothing_is_left(tmp_path):
    full, ids = (0, 65536, 65536), np.arange(6)
    parts = [
        PartSpec(ids, {"embedding": np.full((6, 2), i, np.float32)}, full, suffix=f"/part_{i}_3") for i in range(3)
    ]
    write_checkpoint(tmp_path / "in", {"t": parts})
    manifest = export(tmp_path / "in", tmp_path / "out", on_duplicate="last", num_shards=2)
    assert (read_back(tmp_path / "out")["t"]["embedding"] == 2).all()
    assert manifest.tables[0].rows_dropped == {"duplicate": 12}


@pytest.mark.parametrize("keep", ["first", "last"])
def test_tables_without_repeats_are_not_read_again(tmp_path, monkeypatch, keep):
    tables = make_tables({"a": 300, "b": 100}, 2)
    write_checkpoint(tmp_path / "in", tables)
    with recorded_reads(monkeypatch) as reads:
        plan(tmp_path / "in", on_duplicate=keep)
    ids = sum(end - begin for _, begin, end in reads)
    repeat_rows(tables["b"], [(0, 0, 1)])
    write_checkpoint(tmp_path / "twice", tables)
    with recorded_reads(monkeypatch) as reads:
        plan(tmp_path / "in", on_duplicate="error")
    assert ids == sum(end - begin for _, begin, end in reads)
    with recorded_reads(monkeypatch) as reads:
        plan(tmp_path / "twice", on_duplicate=keep)
    again = sum(end - begin for _, begin, end in reads) - ids
    assert 101 * 8 <= again < 300 * 8, "only the table with a repeat is read once more"


def test_what_is_planned_without_repeats_does_not_depend_on_the_setting(tmp_path):
    write_checkpoint(tmp_path / "in", make_tables({"a": 60}, 2))
    digests = {plan(tmp_path / "in", on_duplicate=keep).plan.digest for keep in ("error", "first", "last")}
    assert len(digests) == 1


def test_plans_that_drop_other_rows_have_other_digests(tmp_path):
    """Though headers, ranges and counts are the same: two ranks that do not agree on the rows do not go on."""
    parts = [PartSpec(np.array([7, 7, 1]), {"embedding": np.arange(6.0).reshape(3, 2)}, (0, 8, 8))]
    write_checkpoint(tmp_path / "in", {"t": parts})
    first, last = (plan(tmp_path / "in", on_duplicate=keep, num_shards=1).plan for keep in ("first", "last"))
    assert [file.header for file in first.files] == [file.header for file in last.files]
    assert [str(gather) for gather in first.gathers] == [str(gather) for gather in last.gathers]
    assert first.digest != last.digest


@pytest.mark.parametrize("bits", [1, 4, 20])
def test_a_sieve_holds_back_what_it_knows_and_nothing_else(bits):
    held = np.array([-9, 0, 3, 1 << 60])
    ids = np.array([3, 4, 1 << 60, -9, 5, 3, (1 << 60) + 1, 1 << 62, -(1 << 63)])
    sieve = duplicates._Sieve(held, most_bits=bits)
    assert sieve.find(ids).tolist() == [0, 2, 3, 5]
    assert sieve.find(ids[:0]).tolist() == []
    assert len(sieve._may_hold) <= 32 * len(held), "many tables with one repeat each cost little"


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_an_error_says_how_to_keep_one_row(tmp_path, tables):
    write_checkpoint(tmp_path / "in", tables)
    for run in (export, copy):
        with pytest.raises(CheckpointError, match=r"on_duplicate: first \(or last\) with filter_sparse_opt: true"):
            run(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", ["first", "last"])
def test_a_copy_cannot_drop_rows(keep):
    with pytest.raises(ConfigError, match=r"on_duplicate needs new shards.*set filter_sparse_opt: true"):
        dist_export.ExportConfig(ckpt_dir="a", export_dir="b", on_duplicate=keep, filter_sparse_opt=False)
    with pytest.raises(ConfigError, match="on_duplicate says how to export the tables, but need_export_sparse is"):
        dist_export.ExportConfig(
            ckpt_dir="a", export_dir="b", on_duplicate=keep, filter_sparse_opt=True, need_export_sparse=False
        )
    with pytest.raises(ConfigError, match="on_misplaced says how to export the tables"):
        dist_export.ExportConfig(ckpt_dir="a", export_dir="b", on_misplaced="error", need_export_sparse=False)


def test_misplaced_rows_can_be_an_error(tmp_path):
    tables = make_tables({"ok": 20, "a": 90, "b": 30}, 3)
    for name, count in (("a", 5), ("b", 2)):
        left, right = tables[name][2], tables[name][1]
        right.ids = np.concatenate([right.ids, left.ids[:count]])
        left.ids = left.ids[count:]
        for slot in right.slots:
            right.slots[slot] = np.concatenate([right.slots[slot], left.slots[slot][:count]])
            left.slots[slot] = left.slots[slot][count:]
    write_checkpoint(tmp_path / "in", tables)
    rows = len(tables["a"][1].ids)
    where = rf"'a\.id/part_1_3' in \S*model-000001-of-000003\.safetensors: 5 of its {rows} rows lie outside 21846:43691"
    with pytest.raises(
        PlanError, match=rf"5 rows of table 'a' .*1 more tables.*{where}.*set on_misplaced: repair"
    ) as told:
        export(tmp_path / "in", tmp_path / "out", on_misplaced="error")
    assert told.value.exit_code == 2
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match=rf"cannot be copied.*{where}.*Set filter_sparse_opt: true"):
        copy(tmp_path / "in", tmp_path / "out", on_misplaced="repair")
    with pytest.raises(UserError, match="Set filter_sparse_opt: true"):
        copy(tmp_path / "in", tmp_path / "out", on_misplaced="error")
    assert not (tmp_path / "out").exists()
    manifest = export(tmp_path / "in", tmp_path / "out", on_misplaced="repair")
    assert [(table.misplaced, table.repaired) for table in manifest.tables] == [(0, 0), (5, 5), (2, 2)]


def test_sound_tables_pass_where_misplaced_rows_are_an_error(tmp_path):
    write_checkpoint(tmp_path / "in", make_tables({"a": 60}, 2))
    export(tmp_path / "in", tmp_path / "out", on_misplaced="error")
    copy(tmp_path / "in", tmp_path / "copy", on_misplaced="error")


@pytest.mark.parametrize(("room", "said"), [(0, "more than 0"), (9, "10"), (3, "10|more than 3"), (10, None)])
def test_more_dropped_rows_than_memory_has_room_for_are_refused(tmp_path, monkeypatch, tables, room, said):
    write_checkpoint(tmp_path / "in", tables)
    monkeypatch.setattr(MemoryBudget, "dropped_rows", room)
    if said is None:
        assert export(tmp_path / "in", tmp_path / "out", on_duplicate="first").tables[0].duplicates == 10
        return
    with pytest.raises(PlanError, match=rf"({said}) rows in table 'a' are to be left behind.*Raise max_memory"):
        export(tmp_path / "in", tmp_path / "out", on_duplicate="first")
    assert not (tmp_path / "out").exists()


def test_one_id_that_stands_everywhere_is_refused_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(MemoryBudget, "dropped_rows", 20)
    parts = [PartSpec(np.zeros(200, np.int64), {"embedding": np.zeros((200, 1))}, (0, 8, 8))]
    write_checkpoint(tmp_path / "in", {"t": parts})
    located = []
    original = duplicates._find_in_run
    monkeypatch.setattr(duplicates, "_find_in_run", lambda *a: (located.append(1), original(*a))[1])
    with pytest.raises(PlanError, match="more than 20 rows in table 't'"):
        export(tmp_path / "in", tmp_path / "out", on_duplicate="first", tuning=Tuning(run_rows=16))
    assert len(located) == 2, "16 rows, then 32 of at most 21"


def test_the_bound_is_a_share_of_max_memory():
    assert MemoryBudget(512 << 20, 4).dropped_rows == (512 << 20) // plan_limits.DROPPED_ROW_BYTES == 1 << 20


# ---- the account, and that it can fail -------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path, tables):
    write_checkpoint(tmp_path / "in", tables)
    manifest = export(tmp_path / "in", tmp_path / "out", on_duplicate="first", num_shards=2)
    return plan(tmp_path / "in", on_duplicate="first", num_shards=2), tmp_path / "out", manifest


def test_a_gather_that_skips_other_rows_than_the_plan_says_is_found(tmp_path, monkeypatch):
    """The numbers add up, the ids do not."""
    tables = make_tables({"a": 120}, 3)
    repeat_rows(tables["a"], [(0, 0, 4)])
    write_checkpoint(tmp_path / "in", tables)
    original = DroppedRows.rows_in

    monkeypatch.setattr(DroppedRows, "rows_in", lambda *where: original(*where) - 1)
    with pytest.raises(CommitError, match="shards hold 120 rows of 120, but their ids are not"):
        export(tmp_path / "in", tmp_path / "out", on_duplicate="first", num_shards=1)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_proof_subtracts_rows_and_ids_of_what_was_dropped(exported):
    planned, target, _ = exported
    found = [audit.audit_files(planned.plan, open_directory(target), range(2)).accounts]
    check_accounts(planned.plan, planned.census, found)
    dropped = planned.plan.dropped
    one_less = DroppedRows(part=dropped.part[1:], row=dropped.row[1:], id=dropped.id[1:], reason=dropped.reason[1:])
    other_id = DroppedRows(part=dropped.part, row=dropped.row, id=dropped.id ^ 1, reason=dropped.reason)
    for wrong, message in ((one_less, "hold 120 rows of 121"), (other_id, "120 rows of 120, but their ids are not")):
        object.__setattr__(planned.plan, "dropped", wrong)
        with pytest.raises(CommitError, match=message):
            check_accounts(planned.plan, planned.census, found)


@pytest.mark.parametrize(
    "change",
    [{"rows_in": 131}, {"rows_out": 119}, {"rows_dropped": {}}, {"rows_dropped": {"duplicate": 9}}, {"parts": ()}],
    ids=str,
)
def test_an_entry_that_does_not_add_up_stops_the_commit(exported, tmp_path, monkeypatch, change):
    import msgspec

    _, _, manifest = exported
    check_entries(manifest.tables)
    with pytest.raises(CommitError, match="table 'a': the account does not add up"):
        check_entries([msgspec.structs.replace(manifest.tables[0], **change)])
    original = dist_export.pipeline.shards.describe_tables
    monkeypatch.setattr(
        dist_export.pipeline.shards,
        "describe_tables",
        lambda *a: tuple(msgspec.structs.replace(entry, **change) for entry in original(*a)),
    )
    with pytest.raises(CommitError, match="does not add up"):
        export(tmp_path / "in", tmp_path / "again", on_duplicate="first")
    assert not (tmp_path / "again" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows_dropped": {}}, "does not add up"),
        ({"rows_in": 120}, "does not add up"),
        ({"duplicates": 9}, "contradicts itself"),
        ({"duplicates": 11}, "contradicts itself"),
        ({"misplaced": 99}, "contradicts itself"),
        ({"repaired": 99}, "contradicts itself"),
    ],
    ids=str,
)
def test_verify_finds_an_account_that_cannot_be(exported, change, message):
    from dist_export.manifest import compute_digest

    _, target, _ = exported
    document = json.loads((target / "manifest.json").read_text())
    assert verify(str(target)).findings == []
    document["tables"][0].update(change)
    document["digest"] = compute_digest(document)
    (target / "manifest.json").write_text(json.dumps(document))
    assert any(message in finding for finding in verify(str(target)).findings)


def test_the_plan_and_the_summary_say_what_is_dropped(tmp_path, tables, capsys):
    from dist_export.cli import main
    from dist_export.pipeline.dry_run import make_report

    write_checkpoint(tmp_path / "in", tables)
    values = {"ckpt_dir": str(tmp_path / "in"), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True}
    report = make_report(dist_export.ExportConfig(**values, on_duplicate="first"), world_size=2)
    model, _ = model_of(tables["a"], keep="first")
    entry = {name: report["tables"][0][name] for name in ("rows", "rows_out", "rows_dropped", "misplaced", "repaired")}
    assert entry == {
        "rows": 130,
        "rows_out": 120,
        "rows_dropped": {"duplicate": 10},
        "misplaced": model.misplaced,
        "repaired": model.repaired,
    }
    assert report["tables"][0]["duplicates"] == 10
    assert sum(report["tables"][0]["rows_by_part"]) == 120
    assert sum(rank["bytes"] for rank in report["ranks"]) == sum(file["bytes"] for file in report["files"])
    text = "\n".join(render_report(report))
    misplaced = f"{model.misplaced} of them in another shard's slice"
    assert f"table a: 130 rows, {misplaced}, 10 dropped (duplicate)" in text
    assert "table b: 40 rows\n" in text
    arguments = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    assert main([*arguments, "--on_duplicate", "first"]) == 0
    told = capsys.readouterr()
    text = told.out + told.err
    assert "dropped  10 rows (duplicate)" in text
    rest = f", {model.misplaced - model.repaired} more were dropped" if model.misplaced > model.repaired else ""
    assert re.search(rf"repaired {model.repaired} rows lay in .*{rest}", text)


def test_the_sample_sees_the_row_that_is_exported(tmp_path):
    """The dense arch is traced on rows as serving will have them."""
    tables = {"t": split_table(*make_rows(40), 2)}
    repeat_rows(tables["t"], [(0, 0, 2), (0, 1, 2)])
    write_checkpoint(tmp_path / "in", tables)
    for keep in ("first", "last"):
        planned = plan(tmp_path / "in", on_duplicate=keep)
        source, dropped_in = open_source(tmp_path / "in"), planned.plan.dropped.rows_in
        rows_in = SourceRows(checkpoint=source, misplaced=planned.census.misplaced, dropped_in=dropped_in)
        finder = RowFinder(rows_in)
        truth = truth_of_model(tables["t"], keep=keep)
        found, rows = finder.find("t", truth["id"])
        assert found.all()
        assert rows.tobytes() == truth["embedding"].tobytes()


def test_an_export_with_a_model_passes_over_dropped_rows(tmp_path, monkeypatch):
    """The whole way: the finder of the sample is told which rows are dropped."""
    tables = tiny_model.tables()
    for parts in tables.values():
        repeat_rows(parts, [(0, 0, 2)])
    source = write_checkpoint(tmp_path / "in", tables, model_state=tiny_model.trained_dense_state())
    asked = []
    original = DroppedRows.rows_in
    monkeypatch.setattr(DroppedRows, "rows_in", lambda self, *a: (asked.append(a), original(self, *a))[1])
    with monkeypatch.context() as patch:
        patch.setattr(dist_export.pipeline.steps, "transfer", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(
                source,
                tmp_path / "out",
                on_duplicate="first",
                model=tiny_model.MODEL,
                dataset=tiny_model.DATASET,
            )
    assert asked, "the lookups of the sample asked for dropped rows"


# ---- any tables ------------------------------------------------------------------------------------------------------


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, list[PartSpec]]:
    """Few ids in few slices, so that most stand twice and many in the wrong place; slices overlap and leave gaps."""
    size = draw(st.sampled_from([5, 16, 65536]))
    tables = {}
    value = 0
    for name in draw(st.sampled_from([("t",), ("t", "u")])):
        parts = []
        num_parts = draw(st.integers(1, 4))
        for number in range(num_parts):
            begin, end = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
            ids = np.array(draw(st.lists(st.integers(-6, 12), max_size=10)), np.int64)
            rows = {}
            for slot, dim in (("embedding", 2), ("sparse_adam_exp_avg", 2), ("kept", 1)):
                rows[slot] = np.arange(value, value + len(ids) * dim, dtype=np.float32).reshape(len(ids), dim)
                value += len(ids) * dim
            parts.append(PartSpec(ids, rows, (begin, end, size), suffix=f"/part_{number}_{num_parts}"))
        tables[name] = parts
    return tables


@PROPERTY
@given(
    checkpoints(),
    st.sampled_from(["first", "last"]),
    st.sampled_from([1, 2, 3, 5]),
    st.integers(1, 3),
    st.sampled_from([None, 2, 5]),
)
def test_an_export_is_what_the_model_says(tables, keep, num_shards, threads, granule) -> None:
    """Ids, all slots of the kept rows, and the manifest's account."""
    tuning = STANDARD if granule is None else tiny(granule=granule)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in", Path(folder) / "out"
        write_checkpoint(source, tables)
        manifest = export(source, target, on_duplicate=keep, num_shards=num_shards, threads=threads, tuning=tuning)
        assert_exact(target, {name: truth_of_model(parts, keep=keep) for name, parts in tables.items()})
        for number, parts in enumerate(tables.values()):
            check_against_model(target, parts, manifest, keep=keep, table=number)
        assert verify(str(target), tuning=tuning).findings == []
