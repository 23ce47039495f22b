"""``verify`` keeps to ``max_memory`` with tables far larger than it: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.recis_writer import PartSpec, write_checkpoint

NUM_ROWS = 9_000_000
BUDGET = 64 << 20

SCRIPT = """
import json, sys, threading
from dist_export.verify.verify import verify

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

warm, large, budget = json.loads(sys.argv[1])
verify(warm, finite=True)
base, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
report = verify(large, finite=True, max_memory=budget, threads=2)
done.set()
watcher.join()
print(json.dumps({"peak": peak - base, "findings": report.findings, "checked": report.checked}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured through /proc")
@pytest.mark.parametrize("ends", [(65536,), (65536, 65536)], ids=["one part", "overlapping parts"])
def test_ids_larger_than_the_budget_are_searched_within_it(tmp_path: Path, ends: tuple[int, ...]) -> None:
    assert BUDGET < NUM_ROWS * 8
    ids = np.arange(NUM_ROWS, dtype=np.int64) * 0x1F3D5B79 + 1  # spread over slices, all distinct
    ids[-1] = ids[7]
    if len(ends) > 1:
        ids = ids[np.argsort(ids & 0xFFFF, kind="stable")]
    begins = (0, int(ids[NUM_ROWS // 2] & 0xFFFF))[: len(ends)]  # the second begins within the first
    parts = [
        PartSpec(its, {"embedding": np.zeros((len(its), 2), np.float16)}, (begin, end, 65536))
        for its, begin, end in zip(np.array_split(ids, len(ends)), begins, ends, strict=True)
    ]
    write_checkpoint(tmp_path / "large", {"t": parts})
    few = PartSpec(np.arange(10), {"embedding": np.zeros((10, 2), np.float16)}, (0, 65536, 65536))
    write_checkpoint(tmp_path / "warm", {"t": [few]})
    arguments = json.dumps([str(tmp_path / "warm"), str(tmp_path / "large"), BUDGET])
    done = subprocess.run([sys.executable, "-c", SCRIPT, arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (line,) = found["findings"]
    assert "1 ids of table 't' stand twice" in line
    assert any("all finite" in line for line in found["checked"])
    assert found["peak"] < BUDGET, f"{found['peak'] / (1 << 20):.0f} MiB"
