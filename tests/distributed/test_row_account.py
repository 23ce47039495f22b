"""Rows that stand twice and rows in the wrong slice, on several real ranks: the same bytes as on one, and the truth."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dist_export
from dist_export.errors import DistExportError
from dist_export.plan.memory_budget import MemoryBudget
from dist_export.transfer import duplicates
from dist_export.verify.verify import verify
from tests.support.distributed.ranks import run_ranks
from tests.support.recis_writer import PartSpec, make_tables, read_back, read_blocks, write_checkpoint
from tests.support.row_model import truth_of_model

pytestmark = pytest.mark.distributed

NUM_SHARDS = (1, 2, 3, "source")
CASES = ("hostile_misplaced2", "repeats", "made")


KEEPS = ("first", "last")
Chosen = list[tuple[str, str, Any]]


def choose(world_size: int) -> Chosen:
    """Return which cases so many ranks export: one rank all, two and three a half each, in which each two values meet."""
    cases = itertools.product(range(len(CASES)), range(len(KEEPS)), range(len(NUM_SHARDS)))
    return [
        (CASES[case], KEEPS[keep], NUM_SHARDS[shards])
        for case, keep, shards in cases
        if world_size == 1 or (case + keep + shards + world_size) % 2
    ]


def export_all(_: int, sources: str, out: str, chosen: Chosen) -> None:
    duplicates._EXCHANGED_ROWS = 5  # so that the rows travel in many turns
    for case, keep, num_shards in chosen:
        dist_export.export(settings(sources, f"{out}/{case}/{keep}/{num_shards}", case, keep, num_shards))


def settings(sources: str, target: str, case: str, keep: str, num_shards: Any) -> dict[str, Any]:
    return {
        "ckpt_dir": f"{sources}/{case}",
        "export_dir": target,
        "filter_sparse_opt": True,
        "num_shards": num_shards,
        "on_duplicate": keep,
        "threads": 2,
    }


def parts_of(checkpoint: Path) -> dict[str, list[PartSpec]]:
    """Return the tables of a checkpoint that RecIS wrote."""
    parts: dict[str, dict[tuple[int, int, int], dict[str, np.ndarray]]] = {}
    for block in read_blocks(checkpoint):
        parts.setdefault(block.table, {}).setdefault(block.slice, {})[block.slot] = block.array
    return {
        table: [
            PartSpec(slots["id"], {name: rows for name, rows in slots.items() if name != "id"}, part)
            for part, slots in sorted(its.items())
        ]
        for table, its in parts.items()
    }


def repeat(tables: dict[str, list[PartSpec]], seed: int) -> dict[str, list[PartSpec]]:
    """Let rows of each table stand again, with other values, in the same part, in another one, or in both."""
    random = np.random.default_rng(seed)
    for parts in tables.values():
        for _ in range(3):
            giver, taker = (parts[number] for number in random.integers(len(parts), size=2))
            ids = random.choice(giver.ids, min(9, len(giver.ids)), replace=False)
            order = random.permutation(len(taker.ids) + len(ids))
            for slot, rows in taker.slots.items():
                fresh = random.random((len(ids), *rows.shape[1:])).astype(rows.dtype)
                taker.slots[slot] = np.concatenate([rows, fresh])[order]
            taker.ids = np.concatenate([taker.ids, ids])[order]
    return tables


@pytest.fixture(scope="module")
def sources(recis_fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RecIS's own checkpoint with misplaced rows, the same with rows that stand twice as well, and one of ours."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "hostile_misplaced2").symlink_to(recis_fixtures / "hostile_misplaced2")
    write_checkpoint(folder / "repeats", repeat(parts_of(recis_fixtures / "hostile_misplaced2"), 1))
    write_checkpoint(folder / "made", repeat(make_tables({"a": 300, "b": 60, "c": 1}, 4), 2), files_per_shard=2)
    return folder


@pytest.fixture(scope="module")
def one_rank(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one_rank")
    export_all(0, str(sources), str(out), choose(1))
    return out


@pytest.mark.fixtures
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("case", CASES)
def test_one_rank_gives_the_truth(sources: Path, one_rank: Path, recis_fixtures: Path, case: str, keep: str) -> None:
    """Against a plain model of the rows, and RecIS's own truth where nothing stands twice."""
    tables = parts_of(sources / case)
    expected = {table: truth_of_model(parts, keep=keep) for table, parts in tables.items()}
    if case == "hostile_misplaced2":
        with np.load(recis_fixtures / f"{case}.truth.npz") as truth:
            for table, slots in expected.items():
                assert all(np.array_equal(truth[f"{table}@{slot}"], rows) for slot, rows in slots.items())
    for num_shards in NUM_SHARDS:
        target = one_rank / case / keep / str(num_shards)
        found = read_back(target)
        for table, slots in expected.items():
            for slot in ("id", "embedding"):
                assert found[table][slot].tobytes() == slots[slot].tobytes(), (table, slot, num_shards)
        entries = {entry["name"]: entry for entry in json.loads((target / "manifest.json").read_text())["tables"]}
        surplus = {
            table: sum(len(part.ids) for part in parts) - len(expected[table]["id"]) for table, parts in tables.items()
        }
        assert {table: entry["duplicates"] for table, entry in entries.items()} == surplus
        assert any(surplus.values()) == (case != "hostile_misplaced2")
        assert any(entry["misplaced"] for entry in entries.values())
        assert verify(str(target)).findings == []


@pytest.mark.fixtures
@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_do_not_depend_on_the_number_of_ranks(
    sources: Path, one_rank: Path, tmp_path: Path, world_size: int
) -> None:
    """Which rows stay, where they go and what the manifest says are the same."""
    chosen = choose(world_size)
    run_ranks(export_all, world_size, tmp_path / "store", str(sources), str(tmp_path / "out"), chosen, timeout=240)
    folders = [one_rank / case / keep / str(num_shards) for case, keep, num_shards in chosen]
    paths = [path.relative_to(one_rank) for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(folders) == len(CASES) * len(NUM_SHARDS)
    assert len(paths) > len(folders) * 4
    for path in paths:
        found, expected = (folder / path for folder in (tmp_path / "out", one_rank))
        if path.name == "manifest.json":
            assert json.loads(found.read_bytes())["digest"] == json.loads(expected.read_bytes())["digest"], path
        else:
            assert found.read_bytes() == expected.read_bytes(), path


def refuse(rank: int, sources: str, out: str, room: int) -> str:
    MemoryBudget.dropped_rows = room  # type: ignore[assignment,method-assign]
    try:
        dist_export.export(settings(sources, out, "made", "first", 2))
    except DistExportError as error:
        return f"{getattr(error, 'exit_code', None)} {error}"
    return f"rank {rank} exported"


@pytest.mark.fixtures
@pytest.mark.parametrize("room", [0, 20, 30])
def test_too_many_dropped_rows_are_refused_on_all_ranks(sources: Path, tmp_path: Path, room: int) -> None:
    """Also where no rank alone holds too many."""
    said = run_ranks(refuse, 2, tmp_path / "store", str(sources), str(tmp_path / "out"), room)
    assert all(text.startswith("2 ") and "max_memory" in text for text in said), said
    assert not (tmp_path / "out").exists()


def drop_other_rows(rank: int, sources: str, out: str) -> str:
    if rank == 1:
        import dist_export.pipeline.planning as planning

        original = planning.drop_duplicates
        planning.drop_duplicates = lambda checkpoint, found, keep: original(checkpoint, found, keep="last")
    try:
        dist_export.export(settings(sources, out, "made", "first", 1))
    except DistExportError as error:
        return str(error)
    return "exported"


@pytest.mark.fixtures
def test_ranks_that_would_drop_other_rows_do_not_begin(sources: Path, tmp_path: Path) -> None:
    """Their plans differ, and nothing is written."""
    said = run_ranks(drop_other_rows, 2, tmp_path / "store", str(sources), str(tmp_path / "out"))
    assert all("the ranks came to different plans" in text for text in said), said
    assert not (tmp_path / "out").exists()
