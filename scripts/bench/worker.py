"""One process of one contender: import everything, say so, wait for the word, work, tell what it took.

Started by ``processes.py`` as ``python -m scripts.bench.worker JOB``; ``JOB`` is JSON. Several ranks meet in a file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from scripts.bench.watch import MemoryWatch, count_read_bytes, touch_memory

MARK = "@bench "
"""Begins the lines on stdout that are meant for the one who started this process."""


def main() -> None:
    job: dict[str, Any] = json.loads(sys.argv[1])
    if job["kind"] == "limit":  # without torch: what is measured is the machine
        from scripts.bench.limit import time_limits

        _tell({"ready": True})
        if sys.stdin.readline():
            _tell({"limits": time_limits(Path(job["source"]), Path(job["target"]), job["writers"], touch=job["touch"])})
        return
    from scripts.bench.contenders import prepare

    work = prepare(job)
    _tell({"ready": True})
    if not sys.stdin.readline():
        return
    meet = _join(job)
    if job["rank"] == 0:
        touch_memory(job["touch"])
    read_before = count_read_bytes()
    watch = MemoryWatch()
    meet()
    begin = time.monotonic()  # the same clock for all processes of a machine
    further = work(watch)
    end = time.monotonic()
    watch.stop()
    _tell(
        {
            "begin": begin,
            "end": end,
            "peak_anonymous": watch.peak_anonymous,
            "peak_mapped": watch.peak_mapped,
            "baseline": watch.baseline,
            "read_bytes": count_read_bytes() - read_before,
            **further,
        }
    )
    sys.stdout.flush()
    os._exit(0)  # gloo may wait for ranks that are gone when it is torn down


def _join(job: dict[str, Any]) -> Any:
    """Join the other ranks; return what to call to come together with them."""
    import torch

    torch.set_num_threads(1)  # the ranks share few cores
    if job["ranks"] == 1:
        return lambda: None
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{job['meeting']}",
        rank=job["rank"],
        world_size=job["ranks"],
        timeout=timedelta(seconds=job["timeout"]),
    )
    dist.barrier()  # the first one connects the ranks, which is not to be timed
    return dist.barrier


def _tell(document: dict[str, Any]) -> None:
    print(MARK + json.dumps(document), flush=True)


if __name__ == "__main__":
    main()
