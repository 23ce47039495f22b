"""``diff`` under torchrun: ranks share the rows, and one of them prints what one process finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_export.diff.compare import diff
from tests.support import exports
from tests.support.recis_writer import split_table, write_checkpoint
from tests.support.warm import run_command

pytestmark = pytest.mark.distributed


def package(folder: Path, nudge: float, **settings: Any) -> Path:
    random = np.random.default_rng(3)
    ids, rows = random.choice(1 << 40, 4000, replace=False), random.normal(size=(4000, 4)).astype(np.float32)
    rows[::100] += np.float32(nudge)
    source = write_checkpoint(folder / "ckpt", {"t": split_table(ids, {"embedding": rows}, 3)})
    exports.export({"ckpt_dir": str(source), "export_dir": str(folder / "out"), "filter_sparse_opt": True, **settings})
    return folder / "out"


def test_two_and_three_ranks_find_what_one_finds(tmp_path: Path) -> None:
    a, b = package(tmp_path / "a", 0.0), package(tmp_path / "b", 0.5)
    expected = diff(a, b).as_json()
    assert (expected["tables"][0]["same"], expected["tables"][0]["changed"]) == (3960, 40)
    for world_size in (2, 3):
        done = run_command(world_size, "-m", "dist_export", "diff", str(a), str(b), "--json", "--max_memory", "1MiB")
        assert done.returncode == 1, done.stderr[-3000:]
        assert json.loads(done.stdout) == expected
    delta = package(tmp_path / "delta", 0.5, base=str(a))
    for pair in ((a, delta), (delta, b)):
        done = run_command(2, "-m", "dist_export", "diff", *map(str, pair), "--json", "--max_memory", "1MiB")
        found = json.loads(done.stdout)
        assert found == diff(*pair).as_json()
        assert found["tables"][0]["changed"] == (40 if pair[0] == a else 0)
    done = run_command(2, "-m", "dist_export", "diff", str(a), str(tmp_path / "b" / "ckpt"), "--json")
    [table] = json.loads(done.stdout)["tables"]
    assert (table["same"], table["changed"], table["max_abs"]) == (3960, 40, expected["tables"][0]["max_abs"])
    done = run_command(2, "-m", "dist_export", "diff", str(a), str(tmp_path / "nowhere"))
    assert done.returncode == 1  # torchrun makes 1 of every failure
    assert done.stderr.count("nowhere: does not exist") == 1
