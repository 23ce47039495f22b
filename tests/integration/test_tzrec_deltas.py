"""A trainer's own deltas: dumps on top of a base give what a full export of the trained tables gives, row for row."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

import dist_export
from dist_export import cli
from dist_export.checkpoint.tzrec.spool import Spool
from dist_export.errors import CheckpointError, ConfigError, PlanError, TransferError, UserError
from dist_export.verify.verify import verify
from tests.support import dcp_writer, exports
from tests.support.deltas import manifest_of, put_together, read_package
from tests.support.recis_writer import split_table, write_checkpoint
from tests.support.tzrec_dumps import quantize, write_dump, write_file

DIM = 8
ITEM, USER = "ebc.embedding_bags.item", "ec.embeddings.user"

State = dict[str, tuple[np.ndarray, np.ndarray]]


def hashed_state() -> State:
    """Return ids and rows by table, of tables that are keyed by raw id."""
    random = np.random.default_rng(0)
    return {
        name: (random.choice(1 << 40, count, replace=False), random.normal(size=(count, DIM)).astype(np.float32))
        for name, count in {"item": 900, "user": 120}.items()
    }


def save_hashed(folder: Path, state: State) -> Path:
    return write_checkpoint(
        folder, {name: split_table(ids, {"embedding": rows}, 2) for name, (ids, rows) in state.items()}
    )


def export(source: Path, out: Path, **settings: Any) -> Path:
    exports.export({"ckpt_dir": str(source), "export_dir": str(out), "filter_sparse_opt": True, **settings})
    return out


def export_dump(folder: Path | str, out: Path, base: Path | str, /, **settings: Any) -> Path:
    given: dict[str, Any] = {"format": "tzrec_delta", "base": str(base), "since_step": 100}
    exports.export({"ckpt_dir": str(folder), "export_dir": str(out), **given, **settings})
    return out


def train(state: State, seed: int) -> tuple[State, State]:
    """Return a later state, and the rows that were looked up for it: changed ones, equal ones, and new ids."""
    random = np.random.default_rng(seed)
    after, looked_up = {}, {}
    for name, (ids, before) in state.items():
        rows = before.copy()
        places = random.choice(len(ids), 40, replace=False)
        rows[places[:25]] += random.normal(size=(25, DIM)).astype(np.float32)
        fresh = random.choice(1 << 20, 6, replace=False) + (seed << 41)
        new = random.normal(size=(6, DIM)).astype(np.float32)
        after[name] = np.concatenate([ids, fresh]), np.concatenate([rows, new])
        looked_up[name] = np.concatenate([ids[places], fresh]), np.concatenate([rows[places], new])
    return after, looked_up


def named(state: State, rank: int = 0, world_size: int = 1) -> State:
    """Return the rows that a rank has, under the trainer's names of the tables."""
    names = {"item": ITEM, "user": USER}
    return {names[name]: (ids[rank::world_size], rows[rank::world_size]) for name, (ids, rows) in state.items()}


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base of step 100, the dumps of two ranks at 110 and 120, and the full export of step 120."""
    before = hashed_state()
    middle, first = train(before, 1)
    after, second = train(middle, 2)
    write_dump(tmp_path / "dumps", 110, named(first, 0, 2), named(first, 1, 2))
    write_dump(tmp_path / "dumps", 120, named(second, 0, 2), named(second, 1, 2))
    base = export(save_hashed(tmp_path / "before", before), tmp_path / "base", num_shards=2)
    return base, tmp_path / "dumps", export(save_hashed(tmp_path / "after", after), tmp_path / "full")


@pytest.mark.parametrize("compare", ["fingerprints", "exact"])
def test_dumps_on_their_base_are_the_full_export(trained, tmp_path: Path, compare: str) -> None:
    base, dumps, full = trained
    delta = export_dump(dumps, tmp_path / "delta", base, compare=compare, num_shards=3)
    assert put_together(base, delta) == read_package(full)
    manifest = manifest_of(delta)
    assert manifest["source"]["format"] == "tzrec_delta"
    assert (manifest["source"]["steps"], manifest["source"]["step"]) == ([110, 120], 120)
    assert [file["path"] for file in manifest["source"]["files"]] == [
        f"step_{step}/delta_embedding_step_{step}_rank_{rank}_of_2.parquet" for step in (110, 120) for rank in (0, 1)
    ]
    assert all(file["digest"].startswith("xxh3:") for file in manifest["source"]["files"])
    assert f"matched with the base's by the last part of their names: {ITEM} is item, {USER} is user" in str(
        manifest["notes"]
    )
    for table in manifest["tables"]:
        delta_of = table["delta"]
        assert delta_of["deleted"] == 0
        assert delta_of["new"] == 12
        assert 25 < delta_of["changed"] <= 50
        assert table["rows_in"] == delta_of["rows_base"] + delta_of["new"]
        assert table["rows_dropped"] == {"same": delta_of["same"]}


def test_verify_and_lookups(trained, tmp_path: Path) -> None:
    base, dumps, full = trained
    delta = export_dump(dumps, tmp_path / "delta", base)
    assert verify(str(delta)).findings == []
    with dist_export.open_package(delta) as package, dist_export.open_package(full) as whole:
        ids = np.concatenate([np.array(list(read_package(full)["item"])), [-7]])
        for one, other in zip(package.lookup("item", ids), whole.lookup("item", ids), strict=True):
            assert (one == other).all()


def test_the_last_step_wins_and_steps_outside_are_left_alone(tmp_path: Path) -> None:
    state = hashed_state()
    ids, _ = state["item"]
    for step in (90, 100, 110, 120, 130):
        write_dump(tmp_path / "dumps", step, {ITEM: (ids[:5], np.full((5, DIM), step, np.float32))})
    base = export(save_hashed(tmp_path / "before", state), tmp_path / "base")
    delta = export_dump(tmp_path / "dumps", tmp_path / "delta", base, until_step=120)
    assert manifest_of(delta)["source"]["steps"] == [110, 120]
    together = put_together(base, delta)["item"]
    assert all(np.frombuffer(together[its][0], np.float32).tolist() == [120.0] * DIM for its in ids[:5].tolist())
    with pytest.raises(
        CheckpointError, match="no dump after step 200 of the base; there are those of 5 steps from 90 to 130"
    ):
        export_dump(tmp_path / "dumps", tmp_path / "none", base, since_step=200)
    assert not (tmp_path / "none").exists()


def test_the_base_says_its_step(tmp_path: Path) -> None:
    state = hashed_state()
    save_hashed(tmp_path / "run" / "ckpt_100", state)
    ids, rows = state["item"]
    write_dump(tmp_path / "dumps", 100, {ITEM: (ids[:5], rows[:5] + 1)})
    write_dump(tmp_path / "dumps", 110, {ITEM: (ids[5:9], rows[5:9] + 1)})
    base = export(tmp_path / "run", tmp_path / "base", step=100)
    delta = export_dump(tmp_path / "dumps", tmp_path / "delta", base, since_step=None)
    assert manifest_of(delta)["tables"][0]["delta"]["changed"] == 4
    with pytest.raises(ConfigError, match=r"since_step is 99, and base .* has rows of step 100"):
        export_dump(tmp_path / "dumps", tmp_path / "other", base, since_step=99)
    of_no_step = export(tmp_path / "run" / "ckpt_100", tmp_path / "no_step")
    assert "step" not in manifest_of(of_no_step)["source"]
    with pytest.raises(ConfigError, match=r"does not say the training step of its rows.*set since_step"):
        export_dump(tmp_path / "dumps", tmp_path / "other", of_no_step, since_step=None)


def test_a_missing_rank(trained, tmp_path: Path) -> None:
    base, dumps, full = trained
    (dumps / "step_120" / "delta_embedding_step_120_rank_1_of_2.parquet").unlink()
    with pytest.raises(CheckpointError, match=r"the dump of step 120 lacks rank 1, so changed rows would be missing"):
        export_dump(dumps, tmp_path / "delta", base)
    assert not (tmp_path / "delta").exists()
    delta = export_dump(dumps, tmp_path / "delta", base, allow_ragged=True)
    assert any("step 120 lacks rank 1; what is there was taken" in note for note in manifest_of(delta)["notes"])
    assert put_together(base, delta) != read_package(full)


def test_two_world_sizes_in_a_step(trained, tmp_path: Path) -> None:
    base, dumps, _ = trained
    write_file(dumps / "step_120" / "delta_embedding_step_120_rank_2_of_3.parquet", {}, step=120, rank=2, world_size=3)
    for more in ({}, {"allow_ragged": True}):
        with pytest.raises(CheckpointError, match="step 120 has files of 2 and of 3 ranks, so two trainers wrote it"):
            export_dump(dumps, tmp_path / "delta", base, **more)


def test_leftovers_and_empty_ranks(trained, tmp_path: Path) -> None:
    base, dumps, full = trained
    left = dumps / "step_120" / "delta_embedding_step_120_rank_1_of_2.parquet.rank1.tmp"
    left.write_bytes(b"PAR1 half")
    write_dump(dumps, 125, {}, {}, {})
    delta = export_dump(dumps, tmp_path / "delta", base)
    assert put_together(base, delta) == read_package(full)
    assert manifest_of(delta)["source"]["steps"] == [110, 120, 125]
    assert any(left.name in note and "passed over" in note for note in manifest_of(delta)["notes"])


def test_nothing_but_empty_ranks(trained, tmp_path: Path) -> None:
    base, dumps, _ = trained
    write_dump(dumps, 125, {}, {})
    delta = export_dump(dumps, tmp_path / "delta", base, since_step=120)
    assert [table["rows_out"] for table in manifest_of(delta)["tables"]] == [0, 0]
    assert put_together(base, delta) == read_package(base)
    assert verify(str(delta)).findings == []


def test_ranks_may_repeat_a_key_with_equal_rows(tmp_path: Path) -> None:
    state = hashed_state()
    ids, rows = state["item"]
    base = export(save_hashed(tmp_path / "before", state), tmp_path / "base")
    its = {ITEM: (ids[:7], rows[:7] + 1)}
    write_dump(tmp_path / "dumps", 110, its, its)
    delta = export_dump(tmp_path / "dumps", tmp_path / "delta", base)
    assert manifest_of(delta)["tables"][0]["delta"]["changed"] == 7
    other = {ITEM: (ids[6:8], rows[6:8] + 2)}
    write_dump(tmp_path / "dumps", 120, its, other)
    with pytest.raises(CheckpointError, match=rf"different rows of key {ids[6]} of '{ITEM}' at step 120"):
        export_dump(tmp_path / "dumps", tmp_path / "other", base)
    assert not (tmp_path / "other").exists()


WEIGHT = "sparse_arch.ebc.embedding_bags.item.weight"


def save_numbered(folder: Path, *, later: bool = False) -> Path:
    torch.manual_seed(0)
    weight = torch.randn(400, DIM)
    if later:
        weight[[3, 200, 399]] += 1.0
    return dcp_writer.save(folder, {WEIGHT: weight, "dense_arch.fc.weight": torch.zeros(2, 2)})


def test_tables_by_row_number(tmp_path: Path) -> None:
    base = export(save_numbered(tmp_path / "before"), tmp_path / "base", num_shards=2)
    full = export(save_numbered(tmp_path / "after", later=True), tmp_path / "full")
    rows = np.array([np.frombuffer(its[0], np.float32) for its in read_package(full)[WEIGHT].values()])
    keys = np.array([399, 5, 200, 3])
    write_dump(tmp_path / "dumps", 110, {WEIGHT.removesuffix(".weight"): (keys, rows[keys])})
    delta = export_dump(tmp_path / "dumps", tmp_path / "delta", base)
    assert put_together(base, delta) == read_package(full)
    assert "by the last part" not in str(manifest_of(delta)["notes"])
    assert manifest_of(delta)["tables"][0]["delta"] == {
        "rows_base": 400, "same": 397, "changed": 3, "new": 0, "deleted": 0, "deleted_ids": []
    }  # fmt: skip
    assert verify(str(delta)).findings == []
    for key in (400, -1):
        write_dump(tmp_path / "dumps", 120, {WEIGHT.removesuffix(".weight"): (np.array([7, key]), rows[:2])})
        with pytest.raises(PlanError, match=rf"key {key} of .* is no row of table .*, which has 400 rows by number"):
            export_dump(tmp_path / "dumps", tmp_path / "other", base)


def test_a_managed_collision_table_needs_a_base_of_raw_ids(tmp_path: Path) -> None:
    source = save_numbered(tmp_path / "before")
    name = "sparse_arch.mc_ebc._embedding_module.embedding_bags.item"
    write_dump(tmp_path / "dumps", 110, {name: (np.array([3]), np.ones((1, DIM), np.float32))})
    for number, settings in enumerate(({}, {"to_hash_tables": ["*"]})):  # both are keyed by row number
        base = export(source, tmp_path / f"base{number}", **settings)
        with pytest.raises(PlanError, match=r"managed-collision \(ZCH\) table, of which the dump has raw ids"):
            export_dump(tmp_path / "dumps", tmp_path / "delta", base)
    ids, rows = hashed_state()["item"]
    base = export(save_hashed(tmp_path / "raw", {"item": (ids, rows)}), tmp_path / "base_of_raw_ids")
    delta = export_dump(tmp_path / "dumps", tmp_path / "delta", base)
    assert manifest_of(delta)["tables"][0]["delta"]["new"] == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_rows_are_cast_as_those_of_the_base(tmp_path: Path, dtype: str) -> None:
    state = hashed_state()
    after, looked_up = train(state, 3)
    casts = {"dtype": {"item": dtype}}
    base = export(save_hashed(tmp_path / "before", state), tmp_path / "base", **casts)
    full = export(save_hashed(tmp_path / "after", after), tmp_path / "full", **casts)
    write_dump(tmp_path / "dumps", 110, named(looked_up))
    delta = export_dump(tmp_path / "dumps", tmp_path / "delta", base)
    assert put_together(base, delta) == read_package(full)
    assert verify(str(delta)).findings == []


def test_values_that_do_not_fit_the_base_s_dtype(tmp_path: Path) -> None:
    ids, rows = hashed_state()["item"]
    state = {"item": (ids, rows)}
    base = export(save_hashed(tmp_path / "before", state), tmp_path / "base", dtype={"*": "float16"})
    write_dump(tmp_path / "dumps", 110, {ITEM: (ids[:2], np.full((2, DIM), 1e6, np.float32))})
    with pytest.raises(TransferError, match="16 values do not fit float16"):
        export_dump(tmp_path / "dumps", tmp_path / "delta", base)
    delta = export_dump(tmp_path / "dumps", tmp_path / "clamped", base, on_overflow="clamp")
    (cast,) = (slot["cast"] for slot in manifest_of(delta)["tables"][0]["kept"] if "cast" in slot)
    assert cast["out_of_range"] == 2 * DIM


def test_a_base_with_dense_tensors_in_its_shards(tmp_path: Path) -> None:
    ids, rows = hashed_state()["item"]
    tables = {"item": split_table(ids, {"embedding": rows}, 1)}
    source = write_checkpoint(tmp_path / "before", tables, dense={"bias": np.ones(3, np.float32)})
    base = export(source, tmp_path / "base")
    write_dump(tmp_path / "dumps", 110, {ITEM: (ids[:2], rows[:2])})
    with pytest.raises(PlanError, match="its shards hold 1 dense tensor, which a delta of dumps cannot carry"):
        export_dump(tmp_path / "dumps", tmp_path / "delta", base)


def test_a_pruned_base(tmp_path: Path) -> None:
    ids, rows = hashed_state()["item"]
    source = save_hashed(tmp_path / "before", {"item": (ids, rows)})
    np.save(tmp_path / "deny.npy", ids[:3])
    base = export(source, tmp_path / "base", prune=[{"tables": "item", "deny": str(tmp_path / "deny.npy")}])
    write_dump(tmp_path / "dumps", 110, {ITEM: (ids[:2], rows[:2])})
    with pytest.raises(PlanError, match="rows were pruned when it was exported, and dumps would bring them back"):
        export_dump(tmp_path / "dumps", tmp_path / "delta", base)


@pytest.mark.parametrize("done", ["renamed", "pruned"])
def test_a_base_of_another_package_with_other_names_or_rows(tmp_path: Path, done: str) -> None:
    state = hashed_state()
    np.save(tmp_path / "deny.npy", state["item"][0][:3])
    settings: dict[str, Any] = {"rename_tables": {"item": "user", "user": "item"}}
    if done == "pruned":
        settings = {"prune": [{"tables": "item", "deny": str(tmp_path / "deny.npy")}]}
    first = export(save_hashed(tmp_path / "before", state), tmp_path / "first", **settings)
    base = export(first, tmp_path / "base", num_shards=2)
    write_dump(tmp_path / "dumps", 110, named(train(state, 3)[1]))
    with pytest.raises(PlanError, match=rf"exported from the package {first}, of which .* had been {done}"):
        export_dump(tmp_path / "dumps", tmp_path / "delta", base)


def test_tables_that_the_base_has_left_out(tmp_path: Path) -> None:
    state = hashed_state()
    after, looked_up = train(state, 3)
    base = export(save_hashed(tmp_path / "before", state), tmp_path / "base", drop_tables=["user"])
    full = export(save_hashed(tmp_path / "after", after), tmp_path / "full", drop_tables=["user"])
    write_dump(tmp_path / "dumps", 110, named(looked_up))
    delta = export_dump(tmp_path / "dumps", tmp_path / "delta", base)
    assert put_together(base, delta) == read_package(full)
    assert any(note.endswith(f"and so does this one: {USER}") for note in manifest_of(delta)["notes"])


def test_quantised_rows(tmp_path: Path) -> None:
    state = hashed_state()
    base = export(save_hashed(tmp_path / "before", state), tmp_path / "base", dtype={"*": "int8"})
    ids, rows = state["item"]
    packed = quantize(rows[:9] * 3)
    write_dump(tmp_path / "dumps", 110, {ITEM: (ids[:9], packed)}, is_quantized=True)
    delta = export_dump(tmp_path / "dumps", tmp_path / "delta", base)
    with dist_export.open_package(delta) as package:
        found, _ = package.lookup("item", ids[:9])
    halves = packed[:, DIM:].copy().view(np.float16).astype(np.float32)
    assert (found == packed[:, :DIM].astype(np.float32) * halves[:, :1] + halves[:, 1:]).all()
    assert manifest_of(delta)["tables"][0]["delta"]["changed"] == 9
    assert verify(str(delta)).findings == []
    plain = export(save_hashed(tmp_path / "before", state), tmp_path / "plain")
    with pytest.raises(PlanError, match=r"have 8 values of uint8, and those of table 'item' in the base 8 of float32"):
        export_dump(tmp_path / "dumps", tmp_path / "other", plain)
    write_dump(tmp_path / "dumps", 120, {ITEM: (ids[:9], rows[:9])})
    with pytest.raises(CheckpointError, match="Take dumps of one kind"):
        export_dump(tmp_path / "dumps", tmp_path / "other", base)


def test_names_and_default_rows_are_those_of_the_base(tmp_path: Path) -> None:
    state = hashed_state()
    after, looked_up = train(state, 3)
    settings = {"rename_tables": {"item": "goods"}, "default_row": {"item": [0.5] * DIM, "user": "zeros"}}
    settings["dtype"] = {"*": "float16"}
    base = export(save_hashed(tmp_path / "before", state), tmp_path / "base", **settings)
    full = export(save_hashed(tmp_path / "after", after), tmp_path / "full", **settings)
    write_dump(tmp_path / "dumps", 110, named(looked_up))
    delta = export_dump(tmp_path / "dumps", tmp_path / "delta", base)
    assert put_together(base, delta) == read_package(full)
    for ours, theirs in zip(manifest_of(delta)["tables"], manifest_of(full)["tables"], strict=True):
        assert all(ours.get(name) == theirs.get(name) for name in ("name", "source_name", "default_row"))
    assert verify(str(delta)).findings == []


def test_dumps_in_a_store(trained, tmp_path: Path) -> None:
    base, dumps, full = trained
    store = fsspec.filesystem("memory")
    store.put(str(dumps), "/dumps-of-tzrec", recursive=True)
    try:
        delta = export_dump("memory://dumps-of-tzrec", tmp_path / "delta", base)
    finally:
        store.rm("/dumps-of-tzrec", recursive=True)
    assert put_together(base, delta) == read_package(full)


def test_a_plan_and_a_look_at_dumps_are_refused(trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, dumps, _ = trained
    given = ["--ckpt_dir", str(dumps), "--export_dir", str(tmp_path / "out"), "--format=tzrec_delta", f"--base={base}"]
    for argv, text in (
        (["plan", *given], "no plan without an export"),
        (["inspect", str(dumps), "--format=tzrec_delta"], "only an export against a base reads it"),
        (["watch", *given[:2], *given[4:], "--publish", str(tmp_path / "out")], "watch exports checkpoints"),
        ([*given[:4]], "format: tzrec_delta and a base"),
    ):
        assert cli.main(argv) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tables_that_do_not_fit(tmp_path: Path) -> None:
    state = hashed_state()
    base = export(save_hashed(tmp_path / "before", state), tmp_path / "base")
    ids, rows = state["item"]
    for number, (table, its, text) in enumerate(
        (
            ("ebc.embedding_bags.other", rows[:2], "is no table of the base; the base has item, user"),
            (ITEM, rows[:2, :4].copy(), "have 4 values of float32, and those of table 'item' in the base 8 of float32"),
        )
    ):
        write_dump(tmp_path / f"dumps{number}", 110, {table: (ids[:2], its)})
        with pytest.raises(PlanError, match=text):
            export_dump(tmp_path / f"dumps{number}", tmp_path / "delta", base)
    write_dump(tmp_path / "twice", 110, {ITEM: (ids[:2], rows[:2]), "ec.embeddings.item": (ids[:2], rows[:2])})
    with pytest.raises(PlanError, match="are both table 'item' of the base"):
        export_dump(tmp_path / "twice", tmp_path / "delta", base)
    assert not (tmp_path / "delta").exists()


def test_a_base_with_more_than_embeddings(tmp_path: Path) -> None:
    ids, rows = hashed_state()["item"]
    slots = {"embedding": rows, "score": np.ones((len(ids), 1), np.int64)}
    base = export(write_checkpoint(tmp_path / "before", {"item": split_table(ids, slots, 1)}), tmp_path / "base")
    write_dump(tmp_path / "dumps", 110, {ITEM: (ids[:2], rows[:2])})
    with pytest.raises(PlanError, match=r"has the slots score .* \(drop_slots: \[score\]\)"):
        export_dump(tmp_path / "dumps", tmp_path / "delta", base)


def test_a_damaged_dump_and_one_under_another_name(trained, tmp_path: Path) -> None:
    base, dumps, _ = trained
    file = dumps / "step_120" / "delta_embedding_step_120_rank_1_of_2.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="is no parquet file that can be read"):
        export_dump(dumps, tmp_path / "delta", base)
    file.write_bytes((dumps / "step_110" / "delta_embedding_step_110_rank_1_of_2.parquet").read_bytes())
    with pytest.raises(CheckpointError, match="its rows have global_step 110, and its name says 120"):
        export_dump(dumps, tmp_path / "delta", base)
    (dumps / "other.parquet").write_bytes(whole)
    with pytest.raises(CheckpointError, match="is named otherwise than a dump of TorchEasyRec"):
        export_dump(dumps, tmp_path / "delta", base)


def test_a_file_that_changes_while_it_is_read(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, dumps, _ = trained
    file = dumps / "step_120" / "delta_embedding_step_120_rank_1_of_2.parquet"
    add_file = Spool.add_file

    def add_and_touch(spool: Spool, directory: Any, its: Any) -> Any:
        found = add_file(spool, directory, its)
        os.utime(file, ns=(1, 1))
        return found

    monkeypatch.setattr(Spool, "add_file", add_and_touch)
    with pytest.raises(CheckpointError, match=r"rank_1_of_2.parquet: changed while it was read"):
        export_dump(dumps, tmp_path / "delta", base)


def test_keys_need_memory(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, dumps, _ = trained
    monkeypatch.setattr("dist_export.pipeline.trainer_rows._BYTES_OF_KEY", 1 << 20)
    with pytest.raises(PlanError, match=r"need .* bytes to be compared.*Raise max_memory"):
        export_dump(dumps, tmp_path / "delta", base, max_memory="64MiB")


def test_the_same_export_again_and_one_more_dump(trained, tmp_path: Path) -> None:
    base, dumps, _ = trained
    delta = export_dump(dumps, tmp_path / "delta", base)
    written = (delta / "manifest.json").stat().st_mtime_ns
    export_dump(dumps, delta, base)
    assert (delta / "manifest.json").stat().st_mtime_ns == written
    write_dump(dumps, 130, {}, {})
    with pytest.raises(UserError, match="overwrite"):
        export_dump(dumps, delta, base)


def test_each_dump_is_a_new_version(trained, tmp_path: Path) -> None:
    _, dumps, full = trained
    versions = {"publish": str(tmp_path / "serving"), "export_dir": ""}
    export(tmp_path / "before", tmp_path, **versions)
    out = {"export_dir": "", "publish": str(tmp_path / "serving")}
    for until in (110, 120, 120):
        export_dump(dumps, tmp_path, "latest", until_step=until, **out)
    found = sorted((tmp_path / "serving" / "versions").glob("1*-*"))
    assert [path.name.partition("-")[0] for path in found] == ["110", "120"]
    with dist_export.open_package(f"versions:{tmp_path / 'serving'}") as package:
        rows = read_package(full)["user"]
        ids = np.array(list(rows))
        assert package.lookup("user", ids)[0].tobytes() == b"".join(row[0] for row in rows.values())


def test_a_rank_that_comes_late_makes_another_version(trained, tmp_path: Path) -> None:
    _, dumps, _ = trained
    publish = {"publish": str(tmp_path / "serving"), "export_dir": ""}
    export(tmp_path / "before", tmp_path, **publish)
    late = dumps / "step_120" / "delta_embedding_step_120_rank_1_of_2.parquet"
    content = late.read_bytes()
    late.unlink()
    export_dump(dumps, tmp_path, "latest", allow_ragged=True, **publish)
    late.write_bytes(content)
    export_dump(dumps, tmp_path, "latest", allow_ragged=True, **publish)
    assert len(list((tmp_path / "serving" / "versions").glob("120-*"))) == 2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"base": None}, "so they need a base"),
        ({"on_base_mismatch": "full"}, "of the dumps of tzrec_delta no full package can be made"),
        ({"prune": [{"tables": ["item"], "norm_at_most": 0}]}, "all but the rows is the base's; remove prune"),
        ({"dtype": {"item": "float16"}}, "rows are cast as the base's are; remove dtype"),
        ({"step": 110}, "give until_step"),
        ({"until_step": 90}, "until_step is 90 and since_step 100"),
        ({"on_duplicate": "last"}, "on_duplicate is set"),
    ],
)
def test_settings_that_do_not_go_with_dumps(trained, tmp_path: Path, settings, text: str) -> None:
    base, dumps, _ = trained
    with pytest.raises(ConfigError, match=text):
        export_dump(dumps, tmp_path / "delta", base, **settings)
    assert not (tmp_path / "delta").exists()


def test_settings_of_dumps_are_for_dumps(tmp_path: Path) -> None:
    for settings in ({"since_step": 1}, {"until_step": 1}, {"allow_ragged": True}):
        with pytest.raises(ConfigError, match="format is not tzrec_delta"):
            export(tmp_path, tmp_path / "out", **settings)


def test_without_pyarrow(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, dumps, _ = trained
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pip install 'dist_export\[parquet\]'"):
        export_dump(dumps, tmp_path / "delta", base)
