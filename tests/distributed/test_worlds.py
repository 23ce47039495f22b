"""Whole exports on several real ranks, against the truth and against the bytes that one rank writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import ROOT
from tests.support.fixture_cases import CASES, NUM_SHARDS, share_pairs
from tests.support.recis_writer import read_back, read_dense
from tests.support.warm import run_command

pytestmark = [pytest.mark.distributed, pytest.mark.fixtures]


def torchrun(
    world_size: int, *command: str, cwd: Path = ROOT, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    return subprocess.run(
        [*launcher, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="module")
def one_rank(recis_fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank writes, for all cases and shard counts."""
    out = tmp_path_factory.mktemp("one_rank")
    done = run_command(1, "tests/support/distributed/export_cases.py", str(recis_fixtures), str(out), "1")
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def test_one_rank_gives_the_truth(one_rank: Path, recis_fixtures: Path) -> None:
    """All fixtures export exactly, for every number of shards."""
    for case in CASES:
        for num_shards in NUM_SHARDS:
            check_against_truth(one_rank / case / str(num_shards), recis_fixtures, case)


@pytest.mark.parametrize(
    ("world_size", "threads", "launch"), [(2, 3, torchrun), (3, 1, run_command), (4, 2, run_command)]
)
def test_bytes_do_not_depend_on_the_number_of_ranks_and_threads(
    world_size: int, threads: int, launch: Any, one_rank: Path, recis_fixtures: Path, tmp_path: Path
) -> None:
    """Shards, indexes and manifest (but for its run section) are those of one rank with one thread.

    Ranks that torchrun starts also differ in the seed of ``hash()``; those of the warm pool share one.
    """
    done = launch(
        world_size, "tests/support/distributed/export_cases.py", str(recis_fixtures), str(tmp_path), str(threads)
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for case, num_shards in share_pairs(CASES, NUM_SHARDS, world_size):
        check_against_one_rank(tmp_path / case / str(num_shards), one_rank / case / str(num_shards))


def check_against_one_rank(found: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    for name in names:
        if name == "manifest.json":
            assert bare_manifest(found) == bare_manifest(expected)
        else:
            assert (found / name).read_bytes() == (expected / name).read_bytes(), (found, name)


def bare_manifest(directory: Path) -> dict[str, object]:
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest.pop("run")
    return manifest


def check_against_truth(directory: Path, fixtures: Path, case: str) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    tables = read_back(directory)
    for entry in manifest["tables"]:
        assert entry["rows_in"] == entry["rows_out"] == len(tables[entry["name"]]["id"])
    # fullckpt holds the rows of small2; there is no truth for hostile_bool_dense but its own file
    truth_of = {"fullckpt/ckpt_3": "small2"}.get(case, case)
    if case == "hostile_bool_dense":
        dense = read_dense(directory)
        assert dense["flag"][0] == "BOOL"
        assert sorted(tables) == ["cate_emb", "item_emb", "user_emb"]
        return
    with np.load(fixtures / f"{truth_of}.truth.npz") as truth:
        expected: dict[str, dict[str, np.ndarray]] = {}
        dense_truth = {}
        for key in truth.files:
            if key.startswith("dense:"):
                dense_truth[key.removeprefix("dense:")] = truth[key]
            elif "@" in key:
                table, _, slot = key.rpartition("@")
                if slot in ("id", "embedding", "step_filter"):
                    expected.setdefault(table, {})[slot] = truth[key]
    assert sorted(tables) == sorted(expected)
    for table, slots in expected.items():
        assert sorted(tables[table]) == sorted(slots), table
        for slot, rows in slots.items():
            assert tables[table][slot].tobytes() == np.ascontiguousarray(rows).tobytes(), (case, table, slot)
    dense = read_dense(directory)
    for name, value in dense_truth.items():
        if not name.startswith("sparse_"):
            assert dense[name][1].tobytes() == np.ascontiguousarray(value).tobytes(), (case, name)
    assert not [name for name in dense if name.startswith("sparse_")]
