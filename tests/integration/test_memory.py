"""``max_memory`` holds for a table far larger than it, in every mode: measured in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import dist_export
from tests.support.recis_writer import PartSpec, write_checkpoint
from tests.support.warm import run_script

BUDGET = 64 << 20
NUM_ROWS = 9_000_000
assert BUDGET < NUM_ROWS * 8
NUM_REPEATS = 131_000
"""Nearly as many rows as 64 MiB have room for to leave behind."""

SCRIPT = """
import json, sys, threading, time
import torch
import dist_export, dist_export.pipeline.steps
from dist_export.pipeline.compact_command import OPTIONS, compact
from dist_export.runtime.joining import alone
from dist_export.verify.verify import verify

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def run(settings):
    if "delta" not in settings:
        return dist_export.export(settings)
    compact(alone(), {name: option.default for name, option in OPTIONS.items()} | settings)
    with dist_export.open_package(settings["out"]) as package:
        return package.manifest

warm, settings = json.loads(sys.argv[1])
run(warm)
base, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
manifest = run(settings)
done.set()
watcher.join()
print(json.dumps({"peak": peak - base, "rows": manifest.tables[0].rows_out}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One part whose id column alone is larger than the budget."""
    folder = tmp_path_factory.mktemp("memory")
    ids = np.arange(NUM_ROWS, dtype=np.int64) * 0x1F3D5B79  # spread over slices, all distinct
    rows = np.zeros((NUM_ROWS, 2), np.float16)
    write_checkpoint(folder / "in", {"t": [PartSpec(ids, {"embedding": rows}, (0, 65536, 65536))]})
    few = np.arange(10, dtype=np.int64)
    ids[-NUM_REPEATS:] = ids[:NUM_REPEATS]
    write_checkpoint(folder / "repeats", {"t": [PartSpec(ids, {"embedding": rows}, (0, 65536, 65536))]})
    write_checkpoint(folder / "small", {"t": [PartSpec(few, {"embedding": rows[:10]}, (0, 65536, 65536))]})
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured through /proc")
@pytest.mark.parametrize(
    "settings",
    [
        {"num_shards": 1},
        {"num_shards": 1, "digest": "none", "threads": 2},
        {"num_shards": 3, "threads": 2},
        {"num_shards": 50},
        {"num_shards": 3, "threads": 2, "on_duplicate": "first"},
        {"num_shards": 1, "on_duplicate": "last"},
        {"num_shards": 1, "dtype": {"t": "int8"}},
        {"num_shards": 3, "threads": 2, "dtype": {"t": "float32"}, "on_duplicate": "first"},
    ],
    ids=str,
)
def test_a_part_larger_than_the_budget_keeps_to_it(tmp_path, checkpoint, settings):
    common = {"filter_sparse_opt": True, "max_memory": BUDGET, "threads": 1, **settings}
    warm = {"ckpt_dir": str(checkpoint / "small"), "export_dir": str(tmp_path / "warm"), **common}
    has_duplicates = "on_duplicate" in settings
    large = {
        "ckpt_dir": str(checkpoint / ("repeats" if has_duplicates else "in")),
        "export_dir": str(tmp_path / "out"),
        **common,
    }
    found = measure(warm, large)
    assert found["rows"] == NUM_ROWS - (NUM_REPEATS if has_duplicates else 0)
    assert found["peak"] < BUDGET, f"{found['peak'] / (1 << 20):.0f} MiB"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured through /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_rules_and_a_list_as_large_as_may_be_keep_to_the_budget(tmp_path, checkpoint, threads):
    """Most rows are left behind, and none of them is listed."""
    number = np.arange(NUM_ROWS)
    ids = number * 0x1F3D5B79
    rows = np.repeat((number % 3 > 0).astype(np.float16)[:, None], 2, axis=1)
    slots = {"embedding": rows, "score": number % 5}
    write_checkpoint(tmp_path / "in", {"t": [PartSpec(ids, slots, (0, 65536, 65536))]})
    num_denied = BUDGET // 4 // 8
    np.save(tmp_path / "deny.npy", ids[:num_denied])
    rules = [
        {"tables": "t", "deny": str(tmp_path / "deny.npy")},
        {"tables": "t", "norm_at_most": 0},
        {"tables": "t", "slot": "score", "below": 2},
    ]
    common = {"filter_sparse_opt": True, "max_memory": BUDGET, "threads": threads, "num_shards": 3}
    warm = {"ckpt_dir": str(checkpoint / "small"), "export_dir": str(tmp_path / "warm"), **common}
    large = {"ckpt_dir": str(tmp_path / "in"), "export_dir": str(tmp_path / "out"), **common, "prune": rules}
    found = measure(warm, {**large, "drop_slots": ["score"]})
    assert found["rows"] == int(np.count_nonzero((number >= num_denied) & (number % 3 > 0) & (number % 5 >= 2)))
    assert found["peak"] < BUDGET, f"{found['peak'] / (1 << 20):.0f} MiB"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured through /proc")
def test_a_compaction_keeps_to_the_budget(tmp_path, checkpoint):
    """One row in 20 is changed, and one in 31 deleted."""
    ids, rows = np.arange(NUM_ROWS, dtype=np.int64) * 0x1F3D5B79, np.zeros((NUM_ROWS, 2), np.float16)
    rows[::20] += 1
    is_kept = np.ones(NUM_ROWS, bool)
    is_kept[::31] = False
    slices = (0, 65536, 65536)
    write_checkpoint(tmp_path / "later", {"t": [PartSpec(ids[is_kept], {"embedding": rows[is_kept]}, slices)]})
    write_checkpoint(tmp_path / "few", {"t": [PartSpec(ids[1:9], {"embedding": rows[1:9]}, slices)]})
    common = {"filter_sparse_opt": True, "num_shards": 1, "threads": 2, "progress": False}
    for of_base, of_delta, name in (("small", "few", "warm"), ("in", "later", "large")):
        base = {"ckpt_dir": str(checkpoint / of_base), "export_dir": str(tmp_path / f"base-{name}")}
        dist_export.export(common | base)
        delta = {"ckpt_dir": str(tmp_path / of_delta), "export_dir": str(tmp_path / f"delta-{name}")}
        dist_export.export(common | delta | {"base": base["export_dir"]})
    warm, large = (
        {"delta": str(tmp_path / f"delta-{name}"), "out": str(tmp_path / f"out-{name}"), "num_shards": 2}
        | {"max_memory": BUDGET, "threads": 2, "progress": False}
        for name in ("warm", "large")
    )
    found = measure(warm, large)
    assert found["rows"] == int(np.count_nonzero(is_kept))
    assert found["peak"] < BUDGET, f"{found['peak'] / (1 << 20):.0f} MiB"


def measure(warm, large):
    """Export both in a process of its own; return the rows of the second and the memory that it took."""
    done = run_script(Path(large.get("export_dir") or large["out"]).parent, SCRIPT, json.dumps([warm, large]))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
