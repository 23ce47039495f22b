"""DynamicEmb dumps: exported as hash tables, equal and resharded; refused where they are not whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_export.checkpoint.detect import detect_format
from dist_export.cli import main
from dist_export.errors import CheckpointError, PlanError
from dist_export.storage.urls import open_place
from tests.support.dynamicemb_writer import make_table, truth_of, write_dump
from tests.support.hostile_cases import assert_refused, run
from tests.support.plain_cases import NUM_SHARDS, dense_of
from tests.support.recis_writer import read_back
from tests.support.sparse_cases import assert_exact, export

HUGE = [0, -1, 5, 1 << 62, -(1 << 63), (1 << 63) - 1, 65_536, -65_536, 1 << 40]
USER = make_table([*HUGE, *range(1_000, 1_700, 7)], 8, seed=1)
ITEM = make_table(range(50), 4, seed=2)
MODULE = "model.sparse_arch.ebc"
KEPT = ("id", "embedding", "score")
TRUTH = {"user": truth_of(USER, *KEPT), "item_emb": truth_of(ITEM, *KEPT)}


def write(folder: Path, *, version: int = 2, world_size: int = 3) -> Path:
    """Two tables of one collection; the dump's directory is returned."""
    write_dump(folder / MODULE, "user", USER, world_size, version=version)
    write_dump(folder / MODULE, "item_emb", ITEM, world_size, version=version)
    return folder


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("num_shards", NUM_SHARDS)
def test_tables_come_out_as_they_went_in(num_shards: int, version: int, tmp_path: Path) -> None:
    """Keys of any sign and size, on ranks that have nothing to do with slices; scores stay, optimizer state goes."""
    manifest = export(write(tmp_path / "in", version=version), tmp_path / "out", num_shards=num_shards)
    assert_exact(tmp_path / "out", TRUTH, slots=KEPT)
    assert manifest.source.format == "dynamicemb"
    for table in manifest.tables:
        assert [(slot.name, slot.reason) for slot in table.dropped] == [("opt_values", "optimizer")]
        assert {part.slice.rpartition("@")[2] for part in table.parts} == {"65536"}
        assert table.misplaced == 0


def test_slots_are_kept_and_dropped_by_name(tmp_path: Path) -> None:
    export(write(tmp_path / "in"), tmp_path / "out", drop_slots=["score"], keep_slots=["user.opt_values"], num_shards=2)
    found = read_back(tmp_path / "out")
    assert set(found["user"]) == {"id", "embedding", "opt_values"}
    assert set(found["item_emb"]) == {"id", "embedding"}
    assert found["user"]["opt_values"].tobytes() == truth_of(USER, "opt_values")["opt_values"].tobytes()


def test_where_dumps_lie(tmp_path: Path) -> None:
    """The dump's path, that of one collection, a checkpoint that keeps it in dynamicemb/."""
    dump = write(tmp_path / "ckpt" / "dynamicemb")
    for number, place in enumerate((tmp_path / "ckpt", dump, dump / MODULE)):
        assert detect_format(open_place(place)) == "dynamicemb"
        export(place, tmp_path / f"out{number}", num_shards=2)
        assert_exact(tmp_path / f"out{number}", TRUTH, slots=KEPT)


def test_tables_of_one_name_in_two_collections(tmp_path: Path) -> None:
    write(tmp_path / "in")
    write_dump(tmp_path / "in" / "model.other", "user", ITEM, 2)
    export(tmp_path / "in", tmp_path / "out")
    names = {f"{MODULE}.user": TRUTH["user"], "model.other.user": TRUTH["item_emb"], "item_emb": TRUTH["item_emb"]}
    assert_exact(tmp_path / "out", names, slots=KEPT)


def test_ranks_without_rows_and_tables_without_scores(tmp_path: Path) -> None:
    """A rank may have no row; a table that has none on any rank is left out and told, for nothing tells its dimension."""
    few = {what: column[:1] for what, column in ITEM.items() if what in ("keys", "values")}
    write_dump(tmp_path / "in", "few", few, 4)
    write_dump(tmp_path / "in", "none", {what: column[:0] for what, column in few.items()}, 2)
    write_dump(tmp_path / "in", "few_counter", {"frequencies": few["keys"], "keys": few["keys"]}, 4)
    for path in (tmp_path / "in").glob("few_counter_emb_*"):
        path.rename(path.with_name(path.name.replace("_emb_", "_")))
    manifest = export(tmp_path / "in", tmp_path / "out")
    assert_exact(tmp_path / "out", {"few": truth_of(few, *KEPT)})
    assert "2 kinds of files are of no table and stay behind, first few_counter_frequencies" in manifest.notes[0]
    assert "table 'none' has no row, so its dimension is not told; it is left out" in manifest.notes[1]
    for path in (tmp_path / "in").glob("few*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no table of the dump has a row"):
        export(tmp_path / "in", tmp_path / "other")


def test_a_key_that_two_ranks_have(tmp_path: Path) -> None:
    """An error, or the first row in the order of ranks."""
    twice = {what: np.concatenate([column, column[3:5]]) for what, column in ITEM.items()}
    twice["values"][-2:] += 1
    ranks = np.arange(52) % 4
    ranks[3:5], ranks[-2:] = 2, 1
    write_dump(tmp_path / "in", "item_emb", twice, 4, ranks=ranks)
    with pytest.raises(CheckpointError, match="'item_emb'"):
        export(tmp_path / "in", tmp_path / "out", num_shards=2)
    first = {what: column.copy() for what, column in ITEM.items()}
    first["values"][3:5] += 1
    for keep, rows in (("first", first), ("last", ITEM)):
        manifest = export(tmp_path / "in", tmp_path / keep, num_shards=3, on_duplicate=keep)
        assert manifest.tables[0].duplicates == 2
        assert_exact(tmp_path / keep, {"item_emb": truth_of(rows, *KEPT)}, slots=KEPT)


def test_what_inspect_and_plan_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in")
    assert main(["inspect", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(t["name"], t["rows"], t["shape"], t["parts"], t["slots"]) for t in found["tables"]] == [
        ("item_emb", 50, [4], 3, ["id", "embedding", "score", "opt_values"]),
        ("user", len(USER["keys"]), [8], 3, ["id", "embedding", "score", "opt_values"]),
    ]
    assert main(["inspect", str(source)]) == 0
    assert "DynamicEmb dump: " in capsys.readouterr().out
    settings = ["--ckpt_dir", str(source), "--export_dir", str(tmp_path / "out"), "--filter_sparse_opt", "true"]
    assert main(["plan", *settings]) == 0
    shown = capsys.readouterr().out
    assert "source: dynamicemb checkpoint" in shown
    assert "drop (optimizer)" in shown


def test_a_dump_has_no_dense_parameters(tmp_path: Path) -> None:
    dense = dense_of(write(tmp_path / "in"))
    assert dense.describe() == []
    with pytest.raises(CheckpointError, match="is a DynamicEmb dump, which holds only tables"):
        dense.load()
    with pytest.raises(PlanError, match="cannot be copied as it is: a dump is raw files"):
        export(tmp_path / "in", tmp_path / "out", filter_sparse_opt=False)


# ---- dumps that are not whole ---------------------------------------------------------------------------------------


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def resize(name: str, by: int) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[:by] if by < 0 else raw + bytes(by))

    return apply


def link_out(folder: Path) -> None:
    path = folder / "user_emb_values.rank_0.world_size_3"
    path.rename(folder.parents[1] / "elsewhere")
    path.symlink_to(folder.parents[1] / "elsewhere")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "keys missing": (
        remove("user_emb_keys.rank_2.world_size_3"),
        "the file of rank 2 of 3 is missing; the dump did not finish",
    ),
    "values missing": (remove("user_emb_values.rank_1.world_size_3"), "user_emb_values.rank_1.world_size_3 is missing"),
    "scores missing": (remove("user_emb_scores.rank_0.world_size_3"), "user_emb_scores.rank_0.world_size_3 is missing"),
    "keys cut": (resize("user_emb_keys.rank_0.world_size_3", -3), "no multiple of 8 for keys; it is cut short"),
    "values cut": (resize("user_emb_values.rank_0.world_size_3", -4), "The files are not of one dump"),
    "values odd": (resize("user_emb_values.rank_1.world_size_3", 2), "The files are not of one dump"),
    "values of another dim": (resize("user_emb_values.rank_1.world_size_3", 320), "The files are not of one dump"),
    "a key too few": (resize("user_emb_keys.rank_0.world_size_3", -8), "The files are not of one dump"),
    "scores cut": (resize("user_emb_scores.rank_2.world_size_3", -8), "The files are not of one dump"),
    "state cut": (resize("user_emb_opt_values.rank_2.world_size_3", -4), "The files are not of one dump"),
    "two dumps": (
        lambda folder: write_dump(folder, "user", USER, 2),
        "files of dumps on 2 and 3 ranks, and nothing says which of them are valid",
    ),
    "rank beyond": (
        lambda folder: (folder / "user_emb_keys.rank_2.world_size_3").rename(
            folder / "user_emb_keys.rank_9.world_size_3"
        ),
        "the file of rank 2 of 3 is missing",
    ),
    "link": (link_out, "is a link that leads out of the directory"),
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_a_dump_that_is_not_whole_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, said = HOSTILE[case]
    source = write(tmp_path / "in")
    damage(source / MODULE)
    places = ("--ckpt_dir", source, "--export_dir", tmp_path / "out", "--filter_sparse_opt", "true")
    for outcome in (
        run(capsys, tmp_path, "plan", *places),
        run(capsys, tmp_path, *places),
        run(capsys, tmp_path, "inspect", source),
    ):
        assert_refused(outcome, said)
    assert not (tmp_path / "out").exists()


def test_a_dump_may_be_taken_out_of_another_checkpoint(tmp_path: Path) -> None:
    """TorchEasyRec's checkpoints hold both. Asked for by name the dump is exported alone, whatever lies beside it."""
    write(tmp_path / "in" / "dynamicemb")
    (tmp_path / "in" / "model").mkdir()
    (tmp_path / "in" / "model" / ".metadata").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"model/\.metadata is damaged"):
        export(tmp_path / "in", tmp_path / "out")
    manifest = export(tmp_path / "in", tmp_path / "out", format="dynamicemb")
    assert_exact(tmp_path / "out", TRUTH, slots=KEPT)
    assert (
        "a DCP checkpoint, which stays behind, for format is dynamicemb; format: auto takes both" in manifest.notes[0]
    )
