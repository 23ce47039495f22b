"""launch/slurm.sbatch on a real SLURM: two nodes with two ranks each, its signal at the end of the time, scancel, a mistake."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import dist_export
from dist_export.verify.verify import verify
from tests.support import ROOT
from tests.support.distributed import crash, slurm
from tests.support.needed import lack, need_programs
from tests.support.recis_writer import make_tables, read_back, write_checkpoint

pytestmark = pytest.mark.distributed

SCRIPT = ROOT / "launch" / "slurm.sbatch"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    need_programs(*slurm.PROGRAMS, package="SLURM")
    if os.geteuid() != 0:
        lack("SLURM's daemons need root to start other users' jobs")
    with slurm.running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


class Job:
    """An export that is submitted with so many ranks on each of two nodes, into ``out``; its log in ``log``."""

    def __init__(
        self, cluster: slurm.Cluster, folder: Path, *options: str, num_shards: int = 4, node_ranks: int = 2
    ) -> None:
        self.cluster = cluster
        self.out = folder / "out"
        self.log = folder / "job.log"
        if not (folder / "ckpt").exists():
            write_checkpoint(folder / "ckpt", make_tables({"t": 500, "u": 300}, num_shards))
        self.options = (f"--ntasks-per-node={node_ranks}", "--cpus-per-task=1", f"--output={self.log}", *options)
        self.arguments = [
            *("--ckpt_dir", str(folder / "ckpt"), "--export_dir", str(self.out), "--filter_sparse_opt", "true"),
            *("--num_shards", str(num_shards), "--threads", "1"),
        ]

    def submit(self, *arguments: str, **environment: str) -> str:
        """Submit it; return the job's id."""
        return self.cluster.submit(
            *self.options, str(SCRIPT), *(arguments or self.arguments),
            **{**crash.environment(PYTHON=sys.executable), **environment},
        )  # fmt: skip

    def own_lines(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("dist_export: ")]


SLOW = {"ENTRY": crash.SCRIPT, "PAUSE_RANK": "none", "SLOW_SECS": "3"}
"""Every rank takes three seconds for each unit of work."""


def wait_for_shards(job: Job) -> None:
    deadline = time.monotonic() + 60
    while not list(job.out.glob("*.safetensors")):
        assert time.monotonic() < deadline, job.log.read_text() if job.log.exists() else job.cluster.logs()
        time.sleep(0.1)


def test_two_nodes_export(cluster: slurm.Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path)
    found = cluster.wait(job.submit())
    log = job.log.read_text()
    assert found["JobState"] == "COMPLETED", log + cluster.logs()
    assert log.count("package: ") == 1, "one rank speaks"
    assert dist_export.open_package(job.out).manifest.run["world_size"] == 4
    assert verify(str(job.out)).findings == []
    assert set(read_back(job.out)) == {"t", "u"}


def test_a_mistake_ends_the_job_with_a_line_that_says_so(cluster: slurm.Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path)
    found = cluster.wait(job.submit("--ckpt_dir", str(tmp_path / "nowhere"), "--export_dir", str(job.out)))
    log = job.log.read_text()
    assert found["JobState"] == "FAILED", found
    assert found["ExitCode"] == "1:0"
    assert len(job.own_lines()) == 1, log
    assert "nowhere: does not exist" in job.own_lines()[0]
    assert job.own_lines()[0].endswith("(exit code 2, of which torchrun makes 1)")
    assert "torchrun makes 1 of every failure" in log
    assert not job.out.exists()


def test_the_signal_before_the_end_of_the_time_stops_it_and_a_rerun_resumes(
    cluster: slurm.Cluster, tmp_path: Path
) -> None:
    """SLURM sends SIGTERM to ranks and launchers, and the launchers send it on: twice to each rank."""
    job = Job(cluster, tmp_path, "--time=10", "--signal=TERM@100", num_shards=40, node_ranks=1)
    number = job.submit(**{**SLOW, "SLOW_SECS": "6"})
    wait_for_shards(job)
    cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=2")  # SLURM looks at the time left twice a minute
    found = cluster.wait(number)
    log = job.log.read_text()
    assert found["JobState"] == "FAILED", f"it ended by itself, before the time was up: {found}{log}"
    assert len(job.own_lines()) == 1, log
    assert re.search(
        r"stopped by SIGTERM, which came in '[^']+'.*Run the same command again to go on", job.own_lines()[0]
    )
    assert "/dist_export/" not in log, "no traceback of ours"
    before = {path.name: path.stat().st_ino for path in job.out.glob("*.safetensors")}
    assert before, log
    assert not (job.out / "manifest.json").exists()
    again = cluster.wait(job.submit())
    assert again["JobState"] == "COMPLETED", job.log.read_text()
    assert verify(str(job.out)).findings == []
    assert {name: (job.out / name).stat().st_ino for name in before} == before, "what was whole is kept"


def test_scancel_stops_it_within_killwait(cluster: slurm.Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, num_shards=40, node_ranks=1)
    number = job.submit(**SLOW)
    wait_for_shards(job)
    cluster.run("scancel", number)
    started = time.monotonic()
    cluster.wait(number)
    crash.wait_for_end(job.out, [])
    assert time.monotonic() - started < 30, "before KillWait is over"
    assert not (job.out / "manifest.json").exists()
    assert [path for path in job.out.iterdir() if path.name.endswith(".partial")] == [], (
        "no rank was killed in its work"
    )


def test_a_killed_rank_ends_the_job_on_all_nodes(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """Without --kill-on-bad-exit: the other node's torchrun would let its ranks run on."""
    job, mark = Job(cluster, tmp_path), tmp_path / "mark"
    number = job.submit(ENTRY=crash.SCRIPT, PAUSE_AT="unit", PAUSE_RANK="3", PAUSE_MARK=str(mark))
    deadline = time.monotonic() + 90
    while not mark.exists():
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.1)
    time.sleep(1.5)  # its next sign of life says where it is
    os.kill(int(mark.read_text()), signal.SIGKILL)
    found = cluster.wait(number)
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "1:0")
    (line,) = job.own_lines()
    assert "rank 3 of 4" in line
    assert "died in 'write shards'" in line
