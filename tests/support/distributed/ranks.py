"""Run a function on several real gloo ranks that meet in a file: no ports, no environment."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support import warm


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    store: str | os.PathLike[str],
    *args: Any,
    timeout: float = 90,
    may_end: tuple[int, ...] = (),
) -> list[Any]:
    """Call ``fn(rank, *args)`` on each rank, in a warm process of its own with gloo as its default group.

    Return what each call returned, in rank order; results and arguments are pickled, so ``fn`` is a top-level function.

    Args:
        store: a path that is not there yet; the ranks meet in it.
        timeout: seconds until the ranks that are left are killed.
        may_end: ranks that the watchdog may end; their result is None then.

    Raises:
        AssertionError: a rank failed or was still running; with the tracebacks of all that failed.
    """
    store = Path(store)
    workers = [warm.start(_run_rank, fn, rank, world_size, str(store), timeout, args) for rank in range(world_size)]
    late = warm.wait(workers, timeout)
    results, failures = [], []
    for rank, worker in enumerate(workers):
        found = _result_of(store, rank)
        is_good, result = pickle.loads(found.read_bytes()) if found.exists() else (False, f"ended: {worker.exitcode}")
        if rank in may_end and worker.exitcode == 1 and not found.exists():
            result = None
        elif rank in late:
            failures.append(f"rank {rank} was still running after {timeout} s")
        elif not is_good:
            failures.append(f"rank {rank}: {result}")
        results.append(result)
    assert not failures, "\n".join(failures)
    return results


def _run_rank(
    fn: Callable[..., Any], rank: int, world_size: int, store: str, timeout: float, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)  # the ranks share few cores
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    outcome: tuple[bool, Any]
    try:
        outcome = True, fn(rank, *args)
    except BaseException:
        outcome = False, traceback.format_exc()
    partial = Path(f"{store}.partial{rank}")
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(_result_of(Path(store), rank))
    os._exit(0)  # gloo may wait for ranks that are gone when it is torn down


def _result_of(store: Path, rank: int) -> Path:
    return store.with_name(f"{store.name}.rank{rank}")
