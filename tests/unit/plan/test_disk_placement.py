"""Files that are built on disks which not all ranks see: who builds which, and that each is whole where it is built."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dist_export.errors import TransferError
from dist_export.plan.disk_placement import find_placements
from dist_export.plan.memory_budget import MemoryBudget
from dist_export.plan.plan import SparsePlan
from dist_export.plan.work_units import Unit, plan_units
from dist_export.storage.range_reader import OpenReaders
from dist_export.storage.staging import Staging
from dist_export.storage.urls import open_directory
from dist_export.transfer.output_files import StagedFiles
from dist_export.transfer.unit_runner import UnitRunner
from dist_export.transfer.work_stealing import open_queues, take_units
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.sparse_cases import plan, run, tiny
from tests.unit.transfer.test_work_stealing import ranks_of

TINY = tiny()


@pytest.fixture
def split(tmp_path: Path) -> SparsePlan:
    """Three parts a table into eight files, with copies of another table between."""
    tables = make_tables({"a": 900, "b": 60}, 3)
    return plan(write_checkpoint(tmp_path / "in", tables, dense={"w": np.ones(40)}), num_shards=8, tuning=TINY).plan


@pytest.mark.parametrize("disk_of_rank", [[0, 0, 1, 1], [0, 1, 2], [0, 1, 1, 1, 2, 0], [0, 1, 0, 1]])
def test_each_disk_builds_its_files_whole(split: SparsePlan, tmp_path: Path, disk_of_rank: list[int]) -> None:
    """By ranks of that disk alone; the bytes are those of an export with one disk."""
    expected = run(split, tmp_path / "one", tuning=TINY)
    homes = find_placements(split, range(len(split.files)), disk_of_rank)
    writing, hashing = plan_units(split, placements=homes, tuning=TINY)
    assert all(unit.disk == homes[unit.number] for unit in (*writing, *hashing) if unit.number >= 0)
    assert sum(unit.num_bytes for unit in writing) == split.num_bytes, "what two disks read is written once"
    budget = MemoryBudget(64 << 20, 1, TINY)
    for disk in sorted(set(disk_of_rank)):
        here = {number for number, its in homes.items() if its == disk}
        assert here, "a disk without work"
        folder = tmp_path / f"disk{disk}"
        folder.mkdir()
        staging = Staging(open_directory(folder))
        for number in here:
            staging.create(split.files[number].name, split.files[number].num_bytes)
        outputs = StagedFiles(split, staging)
        elsewhere = homes.keys() - here
        runner = UnitRunner(
            split, outputs, OpenReaders(lambda _: None), budget=budget, digest="none", skip=elsewhere  # type: ignore[arg-type,return-value]
        )  # fmt: skip
        for unit in writing:
            if unit.disk == disk:
                runner.run(unit)
        runner.close()
        outputs.close(sync=False)
        for number in here:
            name = split.files[number].name
            assert Path(staging.path(name)).read_bytes() == expected[name]


def test_disks_get_files_by_their_ranks_and_in_runs(split: SparsePlan) -> None:
    """So that few gathers are run at two of them."""
    homes = find_placements(split, range(8), [0, 1, 1, 1])
    assert list(homes.values()) == [0, 0, 1, 1, 1, 1, 1, 1]
    homes = find_placements(split, range(8), [0, 0, 1, 1])
    assert list(homes.values()) == [0, 0, 0, 0, 1, 1, 1, 1]
    gathers = [unit for unit in plan_units(split, placements=homes, tuning=TINY)[0] if unit.kind == "gather"]
    run_at = [{g for unit in gathers if unit.disk == disk for g in range(unit.begin, unit.end)} for disk in (0, 1)]
    assert run_at[0] | run_at[1] == set(range(len(split.gathers)))
    parts = {split.gathers[number].part for number in run_at[0] & run_at[1]}
    assert {split.checkpoint.parts.begin[part] for part in parts} == {split.checkpoint.parts.begin[1]}, (
        "of three parts the middle one alone straddles the two halves"
    )


def test_files_that_are_there_are_nobodys(split: SparsePlan) -> None:
    homes = find_placements(split, [0, 7], [0, 1])
    assert homes == {0: 0, 7: 1}
    units = plan_units(split, skip=frozenset(range(1, 7)), placements=homes, tuning=TINY)[0]
    gathers = [unit for unit in units if unit.kind == "gather"]
    assert gathers
    assert {unit.disk for unit in gathers} == {0, 1}
    sizes = [split.files[number].num_bytes for number in homes]
    assert sum(unit.num_bytes for unit in units) == sum(sizes)


def test_rows_in_memory_are_built_at_their_owner(split: SparsePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ranks of several machines hold cannot be put together on one disk."""
    owner = np.arange(len(split.checkpoint.files)) % 3
    object.__setattr__(split.checkpoint, "memory", SimpleNamespace(owner=owner))
    assert set(find_placements(split, range(8), [0, 0, 0, 1]).values()) == {0}
    with pytest.raises(TransferError, match=r"memory of ranks on several machines.*TMPDIR"):
        find_placements(split, range(8), [0, 1, 1])


@pytest.mark.parametrize("threads", [1, 2])
def test_bound_units_are_taken_by_ranks_of_their_disk_alone(threads: int) -> None:
    random = np.random.default_rng(1)
    disks = [0, 1, 1, 0]
    units = [
        Unit("copy", number, 0, int(size), True, int(size), disk=number % 3 - 1)
        for number, size in enumerate(random.integers(0, 1000, 200))
    ]
    ranks = ranks_of(4)
    for rank in ranks:
        open_queues(rank, "w", threads)
        open_queues(rank, "w/disk", threads)
    taken: dict[int, list[Unit]] = {}

    def work(worker: int) -> None:
        mine = take_units(
            ranks[worker // threads], "w", units, worker=worker, threads=threads, disk_of_rank=disks
        )  # fmt: skip
        taken[worker] = [unit for unit, _ in mine]

    workers = [threading.Thread(target=work, args=(worker,)) for worker in range(4 * threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(unit.number for mine in taken.values() for unit in mine) == list(range(200))
    for worker, mine in taken.items():
        assert {unit.disk for unit in mine} <= {-1, disks[worker // threads]}
