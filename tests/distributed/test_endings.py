"""Real ranks under torchrun that die, hang, lose their launcher or are asked to stop: all end, and one says why."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_export.errors import ExportError
from dist_export.runtime import joining
from dist_export.runtime.io_activity import ACTIVITY
from tests.support import ROOT, warm
from tests.support.distributed import crash, warm_torchrun
from tests.support.distributed.crash import environment, free_port, launcher, ranks_of, wait_for_end, wait_for_mark
from tests.support.distributed.ranks import run_ranks
from tests.support.recis_writer import make_tables, read_back, write_checkpoint

pytestmark = pytest.mark.distributed


class Job:
    """An export under torchrun whose rank 1 waits in the middle of the transfer."""

    def __init__(
        self,
        folder: Path,
        *,
        agents: int = 1,
        at: str = "write shards",
        rank: int = 1,
        more: dict | None = None,
        warm_launcher: bool = True,
    ):
        self.out, self.mark = folder / "out", folder / "mark"
        write_checkpoint(folder / "ckpt", make_tables({"t": 500, "u": 300}, 4))
        self.arguments = [
            *("--ckpt_dir", str(folder / "ckpt"), "--export_dir", str(self.out), "--filter_sparse_opt", "true"),
            *("--num_shards", "4", "--threads", "1"),
        ]
        self.port = free_port()
        pause = {"PAUSE_AT": at, "PAUSE_RANK": str(rank), "PAUSE_MARK": str(self.mark)}
        options = (more or {}).pop("options", ())
        self.agents = [
            crash.start(
                [
                    *launcher(2, agent=agent, agents=agents, port=self.port, options=options),
                    crash.SCRIPT,
                    *self.arguments,
                    *(more or {}).get("arguments", ()),
                ],
                warm_launcher=warm_launcher,
                **pause,
                **(more or {}).get("environment", {}),
            )
            for agent in range(agents)
        ]
        self.paused = 0

    def wait(self) -> Job:
        assert wait_for_mark(self.mark, self.agents), self.end()
        self.paused = int(self.mark.read_text())
        time.sleep(1.5)  # its next sign of life says where it is
        return self

    def end(self) -> list[str]:
        """Wait for all ranks and agents; return what the export itself said, line by line."""
        wait_for_end(self.out, [])
        said = []
        for agent in self.agents:
            try:
                _, errors = agent.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                agent.kill()
                raise
            said += [line for line in errors.splitlines() if line.startswith("dist_export: ")]
            assert "/dist_export/" not in errors, f"no traceback of ours: {errors}"
        return said

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self.agents:
            agent.kill()
        for pid in ranks_of(self.out):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def run_again(self) -> None:
        again = warm.run_command(1, "-m", "dist_export", *self.arguments)
        assert again.returncode == 0, again.stderr[-3000:]
        assert set(read_back(self.out)) == {"t", "u"}


@pytest.mark.parametrize("agents", [1, 2])
def test_a_killed_rank_ends_all_and_is_named(agents: int, tmp_path: Path) -> None:
    """With two agents torchrun itself would let the other one run on."""
    with Job(tmp_path, agents=agents).wait() as job:
        os.kill(job.paused, signal.SIGKILL)
        (line,) = job.end()
        assert re.fullmatch(
            rf"dist_export: rank 1 of 2 \(process {job.paused} on \S+\) died in 'write shards'\. No manifest was written, so "
            rf"{job.out} is no package; shards that are whole are kept there for the next run\. Run the same command again "
            "to go on",
            line,
        )
        assert all(agent.returncode for agent in job.agents)
        assert not (job.out / "manifest.json").exists()
        job.run_again()


@pytest.mark.parametrize(("agents", "victim"), [(1, 0), (2, 0), (2, 1)])
def test_a_killed_agent_ends_all(agents: int, victim: int, tmp_path: Path) -> None:
    """SIGKILL leaves its workers alive; agent 0 takes the store with it."""
    with Job(tmp_path, agents=agents).wait() as job:
        job.agents[victim].kill()
        said = job.end()
        assert said, "somebody tells it"
        assert all("its launcher (process " in line or "the job's store " in line for line in said), said
        assert len(said) <= agents, "on each machine one"
        assert all(agent.returncode for agent in job.agents)
        assert not (job.out / "manifest.json").exists()
        job.run_again()


def test_a_launcher_that_dies_before_the_ranks_know_each_other(tmp_path: Path) -> None:
    """They would wait for its store until the timeout."""
    script = tmp_path / "early.py"
    script.write_text(
        "import os, sys, time\n"
        "from dist_export.runtime import joining\n"
        "real = joining._start_group\n"
        "def wait(timeout):\n"
        "    open(f\"{os.environ['PAUSE_MARK']}{os.environ['RANK']}\", 'w').close()\n"
        "    time.sleep(2)\n"
        "    return real(timeout)\n"
        "joining._start_group = wait\n"
        "from dist_export.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 50}, 2))
    out, mark = tmp_path / "out", tmp_path / "mark"
    command = [*launcher(2), str(script), "--ckpt_dir", str(tmp_path / "ckpt"), "--export_dir", str(out)]
    with crash.started(command, out, warm_launcher=False, PAUSE_MARK=str(mark)) as process:
        for rank in (0, 1):
            assert wait_for_mark(Path(f"{mark}{rank}"), [process])
        process.kill()
        wait_for_end(out, [])
        _, errors = process.communicate(timeout=30)
    (line,) = [line for line in errors.splitlines() if line.startswith("dist_export: ")]
    assert "rank 0 of 2: its launcher" in line
    assert "is gone; this rank was in 'start'. Nothing was written" in line


def test_an_orphan_does_not_commit(tmp_path: Path) -> None:
    """The launcher dies while rank 0 is about to publish: it looks once more."""
    script = tmp_path / "orphan.py"
    script.write_text(
        "import os, sys, time\n"
        "from dist_export.pipeline import steps\n"
        "from dist_export.runtime import watchdog\n"
        "watchdog.Watchdog.start = lambda self, **_: None  # as if it had not come round to looking yet\n"
        "real = steps.refuse_changed_files\n"
        "def wait(*arguments):\n"
        "    open(os.environ['PAUSE_MARK'], 'w').write(str(os.getpid()))\n"
        "    while os.getppid() == launcher: time.sleep(0.01)\n"
        "    return real(*arguments)\n"
        "steps.refuse_changed_files = wait\n"
        "launcher = os.getppid()\n"
        "from dist_export.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 50}, 2))
    out, mark = tmp_path / "out", tmp_path / "mark"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(script)),
        *("--ckpt_dir", str(tmp_path / "ckpt"), "--export_dir", str(out), "--filter_sparse_opt", "true"),
    ]
    with crash.started(command, out, PAUSE_MARK=str(mark)) as process:
        assert wait_for_mark(mark, [process])
        process.kill()
        wait_for_end(out, [])
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize("agents", [1, 2])
def test_a_stopped_rank_is_a_hang(agents: int, tmp_path: Path) -> None:
    """SIGSTOP: its process is there and does nothing, not even beat."""
    with Job(tmp_path, agents=agents, more={"arguments": ("--timeout", "3")}).wait() as job:
        os.kill(job.paused, signal.SIGSTOP)
        while len(ranks_of(job.out)) > 1:
            time.sleep(0.05)
        os.kill(job.paused, signal.SIGKILL)  # torchrun would do that after half a minute
        lines = job.end()
        assert any("rank 1 of 2" in line and "hangs: no sign of life for" in line for line in lines), lines
        assert not (job.out / "manifest.json").exists()
        job.run_again()


def test_a_rank_that_gets_nothing_done_is_a_hang(tmp_path: Path) -> None:
    slow = {"SLOW_SECS": "1"}  # the timeout is longer than what the display takes to look at the counters again
    with Job(tmp_path, at="unit", rank=0, more={"arguments": ("--timeout", "7"), "environment": slow}).wait() as job:
        lines = job.end()
        assert len(lines) == 1
        assert re.search(
            r"rank 0 of 2 \(process \d+ on \S+\) hangs: no progress for \d+ s \(timeout\) in 'write shards'", lines[0]
        )
        job.run_again()


def test_ranks_may_wait_longer_than_the_timeout_for_one_that_works(tmp_path: Path) -> None:
    """Rank 0 is slow and gets on, unit by unit; the others wait in a collective for longer than the timeout."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import os, sys, time\n"
        "from dist_export.transfer.unit_runner import UnitRunner\n"
        "from dist_export.runtime.io_activity import ACTIVITY\n"
        "real = UnitRunner.run\n"
        "def run(self, unit):\n"
        "    if os.environ['RANK'] == '0':\n"
        "        for _ in range(8):\n"
        "            time.sleep(0.5); ACTIVITY.begin('x'); ACTIVITY.end()\n"
        "    return real(self, unit)\n"
        "UnitRunner.run = run\n"
        "from dist_export.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 50}, 2))
    command = [
        *launcher(2), str(script), "--ckpt_dir", str(tmp_path / "ckpt"), "--export_dir", str(tmp_path / "out"),
        "--filter_sparse_opt", "true", "--timeout", "2",
    ]  # fmt: skip
    done = warm_torchrun.run(command[3:], environment())
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("whom", ["launcher", "rank"])
def test_sigterm_stops_cleanly_and_the_rerun_goes_on(whom: str, tmp_path: Path) -> None:
    """A preempted job: what is whole stays, nothing half is left, one line says so."""
    pause = {"environment": {"PAUSE_SECS": "2", "SLOW_SECS": "1"}}
    place = "publish model-000001-of-000004.safetensors"
    with Job(tmp_path, at=place, rank=0, more=pause, warm_launcher=whom == "rank").wait() as job:
        if whom == "launcher":
            job.agents[0].terminate()
        else:
            os.kill(job.paused, signal.SIGTERM)
        (line,) = job.end()
        assert "stopped by SIGTERM, which came in 'write shards'" in line
        assert "Run the same command again to go on" in line
        assert job.agents[0].returncode
        names = os.listdir(job.out)
        assert "manifest.json" not in names
        assert [name for name in names if name.endswith(".partial")] == []
        assert "model-000001-of-000004.safetensors" in names
        job.run_again()


@pytest.mark.parametrize("how", ["kill", "sigterm"])
def test_what_is_said_after_the_commit_is_true(how: str, tmp_path: Path) -> None:
    """The manifest is there: the package is whole, whether or not its clean-up is done."""
    pause = {"environment": {"PAUSE_SECS": "2"}} if how == "sigterm" else {}
    with Job(tmp_path, at="written manifest.json", rank=0, more=pause).wait() as job:
        os.kill(job.paused, signal.SIGKILL if how == "kill" else signal.SIGTERM)
        (line,) = job.end()
        why = "died in 'commit'" if how == "kill" else "stopped by SIGTERM, which came in 'commit'"
        assert why in line
        assert f"{job.out} holds the committed package. Run the same command again" in line
        assert "No manifest" not in line
        job.run_again()


def test_one_process_is_stopped_by_sigterm_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 500, "u": 300}, 4))
    out, mark = tmp_path / "out", tmp_path / "mark"
    command = [
        *(sys.executable, crash.SCRIPT, "--ckpt_dir", str(tmp_path / "ckpt"), "--export_dir", str(out)),
        *("--filter_sparse_opt", "true", "--num_shards", "4", "--threads", "1"),
    ]
    pause = {"PAUSE_AT": "publish model-000001-of-000004.safetensors", "PAUSE_MARK": str(mark), "PAUSE_SECS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment(**pause), stderr=subprocess.PIPE, text=True)
    assert wait_for_mark(mark, [process])
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("dist_export: ")]
    assert "stopped by SIGTERM, which came in 'write shards'" in line
    shards = sorted(name for name in os.listdir(out) if name.startswith("model"))
    assert len(shards) in (2, 3), "the unit that was under way is finished, the next one is not begun"


@pytest.mark.parametrize(("agents", "at"), [(1, "written manifest.json"), (2, "write shards")])
def test_torchruns_restart_resumes(agents: int, at: str, tmp_path: Path) -> None:
    """--max-restarts: the second attempt finds what the first left, or that all is done."""
    more = {"options": ("--max-restarts", "2")}
    with Job(tmp_path, agents=agents, at=at, rank=0, more=more, warm_launcher=agents > 1).wait() as job:
        os.kill(job.paused, signal.SIGKILL)
        while any(agent.poll() is None for agent in job.agents):
            assert all(agent.returncode in (None, 0) for agent in job.agents), job.end()
            time.sleep(0.1)
        (line,) = job.end()
        assert "rank 0 of 2" in line
        assert [agent.returncode for agent in job.agents] == [0] * agents
        assert set(read_back(job.out)) == {"t", "u"}
        assert not (job.out / ".dist_export").exists()


def test_the_same_export_again_is_told_once_and_ends_well(tmp_path: Path) -> None:
    """As a scheduler starts a job again that has ended well."""
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 50}, 2))
    out = tmp_path / "out"
    command = [
        *launcher(2), "-m", "dist_export", "--ckpt_dir", str(tmp_path / "ckpt"), "--export_dir", str(out),
        "--filter_sparse_opt", "true",
    ]  # fmt: skip
    for expected in (0, 1):
        before = crash.content(out) if expected else {}
        done = warm_torchrun.run(command[3:], environment())
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("already exported") == expected
        assert not expected or crash.content(out) == before


def test_a_failure_of_a_peer_goes_before_torchruns_sigterm(tmp_path: Path) -> None:
    """torchrun ends the others with the same signal as a scheduler does: they do not say that they were stopped."""
    script = tmp_path / "exits.py"
    script.write_text(
        "import os, sys\n"
        "from dist_export.transfer.executor import Transfer\n"
        "real = Transfer.write\n"
        "def write(self):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        os._exit(7)  # as a crash in C code\n"
        "    return real(self)\n"
        "Transfer.write = write\n"
        "from dist_export.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 50}, 2))
    paths = ["--ckpt_dir", str(tmp_path / "ckpt"), "--export_dir", str(tmp_path / "out")]
    done = warm_torchrun.torchrun(2, str(script), *paths, "--filter_sparse_opt", "true", timeout=120)
    lines = [line for line in done.stderr.splitlines() if line.startswith("dist_export: ")]
    assert len(lines) == 1
    assert "rank 1 of 2" in lines[0]
    assert "died" in lines[0]


def join_alone(rank: int) -> str:
    """Rank 1 of the caller's own group ends before the export has made its group."""
    if rank:
        return ""
    with pytest.raises(ExportError, match="the ranks do not find each other for the export: ") as caught:
        joining.join(timeout_secs=2.0)
    return str(caught.value)


def test_a_rank_that_ends_while_the_ranks_of_an_own_group_join_is_not_waited_for_without_end(tmp_path: Path) -> None:
    said, _ = run_ranks(join_alone, 2, tmp_path / "store")
    assert said.endswith("see whether a rank has ended, and start all of them again")


def move_for_a_while(rank: int) -> int:
    for _ in range(30 * rank):
        time.sleep(0.1)
        ACTIVITY.done += 1
    return rank


def wait_in_a_step(rank: int) -> list[int]:
    with joining.join(timeout_secs=2.0) as ranks:
        return ranks.all_gather("wait", lambda: move_for_a_while(rank))


def test_the_limit_of_joining_is_none_of_a_step_that_makes_progress(tmp_path: Path) -> None:
    """The watchdog decides then: rank 1 sends its signs of life."""
    assert run_ranks(wait_in_a_step, 2, tmp_path / "store") == [[0, 1], [0, 1]]
