"""What the tests of the sparse rooms share: export in one call, plans without an export, and runs of a plan by hand."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import dist_export
from dist_export.checkpoint.metadata import Checkpoint
from dist_export.config.schema import ExportConfig
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.pipeline.planning import PlannedSparse, open_checkpoint, plan_sparse
from dist_export.plan.memory_budget import MemoryBudget
from dist_export.plan.plan import SparsePlan
from dist_export.plan.work_units import assign, plan_units
from dist_export.runtime.joining import join
from dist_export.storage import range_reader
from dist_export.storage.range_reader import OpenReaders
from dist_export.storage.staging import Staging
from dist_export.storage.urls import open_directory
from dist_export.transfer.output_files import StagedFiles
from dist_export.transfer.unit_runner import UnitRunner
from tests.support import exports
from tests.support.recis_writer import read_back

KEPT = ("id", "embedding")
ADAM = ("sparse_adam_exp_avg", "sparse_adam_exp_avg_sq")


def export(source: Any, target: Any, *, tuning: Tuning = STANDARD, **settings: Any) -> dist_export.Manifest:
    """Export with the filter on and without a score program, in this process."""
    config = {"ckpt_dir": str(source), "export_dir": str(target), "filter_sparse_opt": True, **settings}
    return exports.export(config, tuning=tuning)


def export_with_scores(source: Any, target: Any, **settings: Any) -> dist_export.Manifest:
    """Export with the filter on, and with a score program if there can be one."""
    return export(source, target, **{"score_program": "auto", **settings})


def copy(source: Any, target: Any, **settings: Any) -> dist_export.Manifest:
    """Export the files as they are, in this process."""
    return export(source, target, filter_sparse_opt=False, **settings)


def assert_exact(
    target: Any,
    truth: Mapping[str, Mapping[str, np.ndarray]],
    *,
    slots: Sequence[str] | None = None,
    merged: bool = True,
) -> None:
    """Read the export back by RecIS's rules and compare it with the truth, bit by bit.

    ``slots``: those of every table; by default all of the truth but optimizer state.
    """
    found = read_back(target, merged=merged)
    assert set(found) == set(truth)
    for table, rows in truth.items():
        kept = [slot for slot in rows if not slot.startswith("sparse_")] if slots is None else slots
        assert set(found[table]) == set(kept), table
        for slot in kept:
            assert found[table][slot].dtype.itemsize == rows[slot].dtype.itemsize
            assert found[table][slot].shape == rows[slot].shape, (table, slot)
            assert found[table][slot].tobytes() == np.ascontiguousarray(rows[slot]).tobytes(), (table, slot)


def open_source(source: Any) -> Checkpoint:
    """Read indexes and headers."""
    with join(timeout_secs=60) as ranks:
        return open_checkpoint(ranks, open_directory(str(source)))


def plan(source: Any, *, world_size: int = 1, tuning: Tuning = STANDARD, **settings: Any) -> PlannedSparse:
    """Plan an export with the filter on, as ``export`` does; write nothing."""
    values = {"filter_sparse_opt": True, **settings}
    config = ExportConfig(ckpt_dir=str(source), export_dir="/nowhere", **values)
    with join(timeout_secs=60) as ranks:
        checkpoint = open_checkpoint(ranks, open_directory(str(source)))
        return plan_sparse(ranks, checkpoint, config, world_size=world_size, tuning=tuning)


def run(
    plan: SparsePlan, folder: Path, *, world_size: int = 1, seed: int | None = None, tuning: Tuning = STANDARD
) -> dict[str, bytes]:
    """Run the units of a plan as so many ranks would, in a shuffled order, and return the files."""
    folder.mkdir(parents=True)
    staging = Staging(open_directory(folder))
    for file in plan.files:
        staging.create(file.name, file.num_bytes)
    writing, _ = plan_units(plan, tuning=tuning)
    budget = MemoryBudget(64 << 20, 1, tuning)
    queues = assign(writing, world_size)
    assert sorted(unit for queue in queues for unit in queue) == list(range(len(writing)))
    outputs = [StagedFiles(plan, staging) for _ in queues]
    runners = [
        UnitRunner(plan, its, OpenReaders(lambda _: None), budget=budget, digest="xxh3")  # type: ignore[arg-type,return-value]
        for its in outputs
    ]
    work = [(rank, unit) for rank, queue in enumerate(queues) for unit in queue]
    if seed is not None:
        random.Random(seed).shuffle(work)
    for rank, unit in work:
        runners[rank].run(writing[unit])
    for runner, its in zip(runners, outputs, strict=True):
        runner.close()
        its.close(sync=False)
    for file in plan.files:
        staging.publish(file.name)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tiny(*, chunk: int = 64, unit: int = 128, granule: int = 7, buffer: int = 24, **others: Any) -> Tuning:
    """Cut all work into tiny pieces, so that small files meet every edge."""
    return Tuning(
        chunk_bytes=chunk,
        unit_bytes=unit,
        copy_bytes=buffer,
        gather_bytes=buffer,
        write_bytes=0,
        granule_rows=granule,
        run_rows=granule,
        **others,
    )


def content(folder: Path) -> dict[str, bytes]:
    """Return all files of a directory but the manifest, whose times vary."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


@contextmanager
def recorded_reads(monkeypatch: Any) -> Any:
    """Yield a list that fills with (path, first byte, last byte + 1) of every ranged read."""
    reads: list[tuple[str, int, int]] = []
    original = range_reader.RangeReader.read_into

    def read_into(self: range_reader.RangeReader, view: memoryview, offset: int) -> None:
        reads.append((self.where, offset, offset + len(view)))
        original(self, view, offset)

    with monkeypatch.context() as patch:
        patch.setattr(range_reader.RangeReader, "read_into", read_into)
        patch.setattr(range_reader.LocalReader, "read_many", range_reader.RangeReader.read_many)  # one by one
        yield reads
