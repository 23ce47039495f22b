"""Two machines with two ranks each, started by launch/torchrun.sh, over a directory that both see; then the link is cut."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import dist_export
from dist_export.verify.verify import verify
from tests.support.distributed import crash, machines
from tests.support.recis_writer import make_tables, read_back, write_checkpoint

pytestmark = pytest.mark.distributed

RANKS_SECS, AGENTS_SECS = 10.0, 15.0
"""Within these the ranks and torchrun's agents must have ended on both machines once the link is cut."""


@pytest.fixture(scope="module")
def pair() -> Iterator[machines.Pair]:
    with machines.joined() as pair:
        yield pair


@pytest.fixture
def case(tmp_path: Path) -> tuple[Path, list[str]]:
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 500, "u": 300}, 8))
    return tmp_path / "out", [
        *("--ckpt_dir", str(tmp_path / "ckpt"), "--export_dir", str(tmp_path / "out"), "--filter_sparse_opt", "true"),
        *("--num_shards", "8", "--threads", "1"),
    ]


def own_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("dist_export: ")]


def ranks_of(out: Path) -> list[int]:
    """Return the ranks alone: the commands that lead to torchrun name ``out`` too."""
    found = []
    for pid in crash.ranks_of(out):
        with contextlib.suppress(OSError):
            if b"torchrun.sh" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


@contextlib.contextmanager
def exporting(
    pair: machines.Pair, out: Path, arguments: list[str], *, ranks: int = 2, **environment: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """``ranks``: on each machine. To start one takes seconds of the processor, so one is enough where that is all one."""
    agents = [machine.start_export(*arguments, ranks=ranks, **environment) for machine in pair.machines]
    try:
        yield agents
    finally:
        for pid in ranks_of(out):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for agent in agents:
            agent.kill()  # unshare takes the whole machine with it
            agent.communicate()


def test_two_machines_export(pair: machines.Pair, case: tuple[Path, list[str]]) -> None:
    out, arguments = case
    with exporting(pair, out, arguments) as agents:
        said = [agent.communicate(timeout=120) for agent in agents]
        assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum(text.count("package: ") for text, _ in said) == 1, "one rank speaks"
    assert dist_export.open_package(out).manifest.run["world_size"] == 4
    assert verify(str(out)).findings == []
    assert set(read_back(out)) == {"t", "u"}


def test_a_cut_link_ends_both_machines_and_a_rerun_resumes(
    pair: machines.Pair, case: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """The rank of machine 1 waits in mid transfer; no exception and no signal tells anybody of the cut."""
    out, arguments = case
    mark = tmp_path / "mark"
    pause = {"ENTRY": crash.SCRIPT, "PAUSE_AT": "unit", "PAUSE_RANK": "1", "PAUSE_MARK": str(mark)}
    with exporting(pair, out, arguments, ranks=1, **pause) as agents:
        assert crash.wait_for_mark(mark, agents), [agent.communicate() for agent in agents]
        time.sleep(2)  # the others are through with their shares, and wait in a collective
        whole = {path.name: path.stat().st_ino for path in out.glob("*.safetensors")}
        pair.cut()
        started = time.monotonic()
        try:
            while ranks_of(out) and time.monotonic() - started < crash.END_SECS:
                time.sleep(0.02)
            ranks_secs = time.monotonic() - started
            said = [agent.communicate(timeout=60)[1] for agent in agents]
            agents_secs = time.monotonic() - started
        finally:
            pair.mend()
        print(f"ranks ended after {ranks_secs:.1f} s, agents after {agents_secs:.1f} s")
        assert ranks_secs < RANKS_SECS
        assert agents_secs < AGENTS_SECS
        assert all(agent.returncode for agent in agents)
    lines = [own_lines(text) for text in said]
    assert [len(found) for found in lines] == [1, 1], f"each machine says it once: {said}"
    assert "no sign of life" in lines[0][0] or "not answered" in lines[0][0], lines
    assert "the job's store" in lines[1][0], lines
    assert all("Run the same command again to go on" in line for (line,) in lines)
    assert whole
    assert not (out / "manifest.json").exists()

    with exporting(pair, out, arguments, ranks=1) as agents:
        said = [agent.communicate(timeout=120)[1] for agent in agents]
        assert [agent.returncode for agent in agents] == [0, 0], said
    assert verify(str(out)).findings == []
    kept = {name: (out / name).stat().st_ino for name in whole}
    assert kept == whole, "what was whole is kept"
    assert dist_export.open_package(out).manifest.run["reused_shards"] >= len(whole)
