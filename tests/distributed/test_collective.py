"""Failures are shared at once and by name, and a running job's process group is used and left as it was."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_export.errors import CheckpointError, ExportError, StepFailedError
from dist_export.runtime.joining import join
from dist_export.runtime.object_exchange import FIRST_BYTES, LENGTH_BYTES
from dist_export.runtime.ranks import Ranks
from tests.support.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed


def share_a_failure(rank: int) -> None:
    def work() -> int:
        if rank == 1:
            raise OSError(28, "No space left on device", "model-000001")
        return rank

    with join(timeout_secs=30) as ranks:
        with pytest.raises(
            StepFailedError, match=r"'write shards' failed on rank 1 of 3: model-000001: No space"
        ) as caught:
            ranks.all_gather("write shards", work)
        assert caught.value.exit_code == 1
        assert ranks.has_failure(), "also those that are busy can see it"


def test_every_rank_learns_which_rank_failed(tmp_path: Path) -> None:
    run_ranks(share_a_failure, 3, tmp_path / "store")


def gather_all_sizes(rank: int) -> None:
    """What fits beside its length into the first gather, one byte more and less, and what is far larger on one rank."""
    around = FIRST_BYTES - LENGTH_BYTES - len(pickle.dumps((b"x" * 100, None))) + 100
    with join(timeout_secs=30) as ranks:
        for sizes in ([0, 0, 0], *([around + near, 5, around] for near in (-1, 0, 1, 2)), [3, 1_000_000, around + 9]):
            assert ranks.all_gather("tell", lambda sizes=sizes: bytes([rank]) * sizes[rank]) == [
                bytes([other]) * size for other, size in enumerate(sizes)
            ]


def test_objects_of_any_size_reach_all_ranks(tmp_path: Path) -> None:
    run_ranks(gather_all_sizes, 3, tmp_path / "store")


def hear_of_rank_0(rank: int) -> None:
    """Small results travel with the gather, large ones by broadcast, and what cannot travel is rank 0's failure."""

    def build(size: int) -> bytes:
        assert rank == 0, "no other rank does the work"
        return b"x" * size

    with join(timeout_secs=30) as ranks:
        for size in (0, 10, 100, 200, 1000, 3_000_000):
            assert ranks.broadcast("build", lambda size=size: build(size)) == b"x" * size
        assert ranks.broadcast("tell nothing", lambda: None) is None
        with pytest.raises((StepFailedError, AttributeError, TypeError, pickle.PicklingError)) as caught:
            ranks.broadcast("tell what cannot be told", lambda: lambda: None)
        assert rank == 0 or isinstance(caught.value, StepFailedError)
        assert ranks.broadcast("go on", lambda: rank) == 0, "the ranks are still in step"


def test_what_rank_0_tells_reaches_all(tmp_path: Path) -> None:
    run_ranks(hear_of_rank_0, 3, tmp_path / "store")


def share_a_mistake(_: int) -> None:
    def work() -> None:
        raise CheckpointError("index is missing")

    with join(timeout_secs=30) as ranks:
        with pytest.raises(StepFailedError) as caught:
            ranks.all_gather("open", work)
        assert str(caught.value) == "index is missing", "a fault that all ranks meet is told without ranks"
        assert caught.value.exit_code == 2


def test_a_fault_that_all_ranks_meet_is_told_as_one(tmp_path: Path) -> None:
    run_ranks(share_a_mistake, 2, tmp_path / "store")


def keep_a_bugs_traceback(rank: int) -> None:
    def work() -> None:
        if rank == 0:
            raise KeyError("bug")

    with join(timeout_secs=30) as ranks, pytest.raises(KeyError if rank == 0 else StepFailedError):
        ranks.all_gather("plan", work)


def test_a_bug_is_itself_where_it_happened(tmp_path: Path) -> None:
    run_ranks(keep_a_bugs_traceback, 2, tmp_path / "store")


def stop_waiting(rank: int) -> None:
    ranks = join(timeout_secs=30)
    if rank == 1:
        return  # this rank ends without a word
    ranks.all_gather("write", lambda: 1)


def test_nobody_waits_for_a_dead_rank(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The watchdog ends the rank that is left, long before the timeout, and says who died."""
    with pytest.raises(AssertionError, match=r"rank 0: ended: 1$"):
        run_ranks(stop_waiting, 2, tmp_path / "store", timeout=25)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dist_export:")]
    assert line.startswith("dist_export: rank 1 of 2 (process ")
    assert "died in 'start'. Nothing was written. Run the same command again" in line


def claim_all(_: int) -> None:
    with join(timeout_secs=30) as ranks:
        mine: list[int] = []

        def claim() -> None:
            while (number := ranks.shared.claim("queue", 200, from_end=ranks.rank == 1)) is not None:
                mine.append(number)

        threads = [threading.Thread(target=claim) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        everyone = [number for share in ranks.all_gather("compare", lambda: mine) for number in share]
        assert sorted(everyone) == list(range(200)), "each number goes to one claimer"
        ranks.shared.add("bytes", 5)
        ranks.all_gather("wait", lambda: None)
        assert ranks.shared.add("bytes", 0) == 5 * ranks.world_size
        front, back = ranks.shared.count_taken(["queue"])[0]
        assert front + back == 200 + 2 * ranks.world_size, "each claimer was told once that there is no more"
        assert back >= 2


def test_a_counter_gives_each_number_once(tmp_path: Path) -> None:
    run_ranks(claim_all, 3, tmp_path / "store")


def use_the_jobs_group(_: int) -> None:
    default = dist.group.WORLD
    for _ in range(2):
        with join(timeout_secs=30) as ranks:
            assert ranks.shared.claim("same", 9) in (0, 1)
            assert ranks.all_gather("names", dist.get_rank) == list(range(ranks.world_size))
        assert dist.group.WORLD is default
        assert len(dist.distributed_c10d._world.pg_map) == 1, "no group is left behind"
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == dist.get_world_size(), "the job's own group still works"


def test_a_running_jobs_group_is_used_and_left(tmp_path: Path) -> None:
    run_ranks(use_the_jobs_group, 2, tmp_path / "store")


def fail_alone_in_a_collective_step(rank: int) -> None:
    ranks = join(timeout_secs=600)
    if rank == 0:
        with pytest.raises(CheckpointError, match="alone"):
            ranks.run("sample", lambda: (_ for _ in ()).throw(CheckpointError("alone")), may_block=True)
    elif rank == 1:
        time.sleep(120)  # as if it waited in the model's own collective
    else:
        with pytest.raises(StepFailedError, match="'sample' failed on rank 0 of 3: alone"):
            ranks.run("sample", lambda: 1, may_block=True)


def test_a_rank_that_failed_alone_in_a_collective_step_does_not_wait(tmp_path: Path) -> None:
    """Its own error is raised within seconds, those that are through with the step hear of it, and those in it are ended."""
    with pytest.raises(AssertionError) as caught:
        run_ranks(fail_alone_in_a_collective_step, 3, tmp_path / "store", timeout=60)
    assert str(caught.value) == "rank 1: ended: 1"


def pass_a_collective_step(rank: int) -> None:
    with join(timeout_secs=60) as ranks:
        for step in ("sample", "sample"):  # a step may come twice
            time.sleep(0.2 * rank)
            assert ranks.run(step, lambda: rank, may_block=True) == rank
        with pytest.raises(StepFailedError, match="rank 1 of 2: late"):
            ranks.run("late", lambda: rank == 0 or (_ for _ in ()).throw(CheckpointError("late")), may_block=True)


def test_a_collective_step_that_all_ranks_reach_is_like_any_other(tmp_path: Path) -> None:
    run_ranks(pass_a_collective_step, 2, tmp_path / "store")


def fail_in_a_check(rank: int) -> None:
    def look() -> int:
        if rank == 1:
            raise CheckpointError("rank 1 sees another file")
        return rank

    def go_on(ranks: Ranks, step: Callable[[Ranks], object]) -> None:
        assert ranks.check("look", look) == rank
        assert rank != 1, "a rank that failed does not go on"
        assert ranks.check("more", lambda: rank) == rank
        step(ranks)

    later: list[Callable[[Ranks], object]] = [
        lambda ranks: ranks.all_gather("count", lambda: rank),
        lambda ranks: ranks.broadcast("tell", lambda: b"x" * 3_000_000),
        lambda ranks: ranks.run("sample", lambda: rank, may_block=True),
        lambda ranks: ranks.settle_checks("claim export_dir"),
    ]
    with join(timeout_secs=60) as ranks:
        for step in later:
            assert ranks.check("open", lambda: rank) == rank, "nobody waits in it"
            with pytest.raises(
                StepFailedError, match="'look' failed on rank 1 of 3: rank 1 sees another file"
            ) as caught:
                go_on(ranks, step)
            assert caught.value.exit_code == 2
            assert ranks.all_gather("go on", lambda: rank) == [0, 1, 2], "the ranks are still in step"
        with ranks.meeting_in_checks(), pytest.raises(StepFailedError, match="'look' failed on rank 1 of 3"):
            ranks.check("look", look)
        assert ranks.all_gather("go on", lambda: rank) == [0, 1, 2]


def test_a_failure_in_a_check_is_told_in_the_next_step(tmp_path: Path) -> None:
    run_ranks(fail_in_a_check, 3, tmp_path / "store", timeout=60)


def check_on_the_first(rank: int) -> None:
    def fail(ranks: Ranks) -> None:
        ranks.check_on_first("look", lambda: (_ for _ in ()).throw(CheckpointError("gone")), "")
        ranks.settle_checks("claim export_dir")

    with join(timeout_secs=60) as ranks:
        assert ranks.check_on_first("look", lambda: "found", "") == ("found" if rank == 0 else "")
        with pytest.raises(StepFailedError, match="'look' failed on rank 0 of 2: gone"):
            fail(ranks)


def test_what_rank_0_alone_looks_at_is_told_as_any_check(tmp_path: Path) -> None:
    run_ranks(check_on_the_first, 2, tmp_path / "store", timeout=60)


def test_one_process_needs_no_group() -> None:
    with join(timeout_secs=1) as ranks:
        assert (ranks.rank, ranks.world_size) == (0, 1)
        assert ranks.all_gather("x", lambda: 3) == [3]
        claim = ranks.shared.claim
        assert [claim("q", 4), claim("q", 4), claim("q", 4, from_end=True)] == [
            0,
            1,
            3,
        ]
        assert [claim("q", 4), claim("q", 4), claim("q", 4, from_end=True)] == [
            2,
            None,
            None,
        ]
        assert ranks.shared.count_taken(["q", "other"]) == [(4, 2), (0, 0)]
        assert not dist.is_initialized()
        with pytest.raises(ExportError, match="x: f: No space"):
            ranks.all_gather("x", lambda: (_ for _ in ()).throw(OSError(28, "No space", "f")))


def test_rank_0_speaks_before_the_others_go() -> None:
    told: list[int] = []
    Ranks(0, 1, None, None, owns_default_group=False, timeout_secs=1).tell_once(lambda: told.append(1))
    assert told == [1]
