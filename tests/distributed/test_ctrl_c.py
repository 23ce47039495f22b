"""Ctrl-C in every state, alone and under torchrun, on a real terminal: exit code 130, one line, nobody left; a rerun goes on."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.distributed import crash
from tests.support.distributed.crash import environment, launcher, ranks_of, wait_for_end, wait_for_mark
from tests.support.recis_writer import make_tables, read_back, write_checkpoint
from tests.support.terminal import Terminal

pytestmark = pytest.mark.distributed

PLACES = [
    "read the settings",
    "find the checkpoint",
    "read the headers",
    "count the ids",
    "claim export_dir",
    "unit",
    "publish model-000001-of-000004.safetensors",
    "check the shards",
    "write index",
    "write manifest.json",
    "written manifest.json",
    "collect the events",
]


class Run:
    """The command line on a terminal, paused at one place of one rank."""

    def __init__(self, folder: Path, at: str, *, world_size: int = 1, rank: int = 0, **more: str) -> None:
        self.out, self.mark = folder / "out", folder / "mark"
        write_checkpoint(folder / "ckpt", make_tables({"t": 500, "u": 300}, 4))
        self.arguments = [
            *("--ckpt_dir", str(folder / "ckpt"), "--export_dir", str(self.out), "--filter_sparse_opt", "true"),
            *("--num_shards", "4", "--threads", "1"),
        ]
        pause = {"PAUSE_AT": at, "PAUSE_MARK": str(self.mark), "PAUSE_RANK": str(rank), **more}
        command = [*launcher(world_size), crash.SCRIPT, *self.arguments]
        is_warm = world_size > 1 and at != "write shards"  # one place under a torchrun started as a user starts it
        self.terminal = Terminal(command, cwd=ROOT, env=environment(**pause), warm_launcher=is_warm)

    def wait(self) -> int:
        """Wait until the place is reached; return the process that is there."""
        assert wait_for_mark(self.mark, [self.terminal.process]), self.terminal.read_lines()
        return int(self.mark.read_text())

    def end(self) -> list[str]:
        """Wait for all to end; return what was said."""
        lines = self.terminal.read_lines()
        wait_for_end(self.out, [])
        assert not any("/dist_export/" in line and "File " in line for line in lines), "\n".join(lines)
        return [line for line in lines if "dist_export: " in line]

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.terminal.__exit__()
        for pid in ranks_of(self.out):
            os.kill(pid, signal.SIGKILL)

    def run_again(self) -> None:
        with Terminal([sys.executable, "-m", "dist_export", *self.arguments], cwd=ROOT, env=environment()) as again:
            lines = again.read_lines()
        assert again.process.returncode == 0, lines
        assert set(read_back(self.out)) == {"t", "u"}


@pytest.mark.parametrize("at", PLACES)
def test_ctrl_c_ends_one_process_in_every_state(at: str, tmp_path: Path) -> None:
    with Run(tmp_path, at) as run:
        run.wait()
        run.terminal.interrupt()
        (line,) = run.end()
        assert run.terminal.process.returncode == 130
        assert line.startswith("dist_export: interrupted in '")
        assert line.endswith("Run the same command again to go on")
        run.run_again()


@pytest.mark.parametrize("at", ["read the headers", "write shards", "check the shards", "written manifest.json"])
def test_ctrl_c_ends_all_ranks_under_torchrun(at: str, tmp_path: Path) -> None:
    """The terminal signals torchrun and its ranks; torchrun passes it on to ranks that have had it."""
    with Run(tmp_path, at, world_size=2) as run:
        run.wait()
        run.terminal.interrupt()
        (line,) = run.end()
        assert run.terminal.process.returncode
        assert line.startswith("dist_export: interrupted in '")
        assert "exitcode: 1 " not in run.terminal.raw
        run.run_again()


def test_one_interrupted_rank_ends_the_others_too(tmp_path: Path) -> None:
    with Run(tmp_path, "check the shards", world_size=2, rank=1) as run:
        os.kill(run.wait(), signal.SIGINT)
        (line,) = run.end()
        assert line.startswith("dist_export: interrupted in 'check the shards'")
        assert run.terminal.process.returncode
        run.run_again()


SWALLOWS = """
import os, sys, time
from pathlib import Path
from dist_export.runtime.ranks import Ranks

mark = Path(sys.argv.pop(1))
real = Ranks.broadcast

def broadcast(self, step, work):
    if step == "find the checkpoint":
        mark.touch()
        BODY
    return real(self, step, work)

Ranks.broadcast = broadcast
from dist_export.__main__ import run
run()
"""

STUCK = {
    "swallows it": "while True:\n            try:\n                time.sleep(100)\n            except KeyboardInterrupt:\n"
    "                pass",
    "is in a call that does not return": "import ctypes; ctypes.CDLL(None).sem_wait(ctypes.create_string_buffer(64))",
}


@pytest.mark.parametrize("body", [pytest.param(text, id=name) for name, text in STUCK.items()])
@pytest.mark.parametrize("presses", [1, 2])
def test_what_does_not_stop_by_itself_is_ended(body: str, presses: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 50}, 1))
    arguments = ["--ckpt_dir", str(tmp_path / "ckpt"), "--export_dir", str(tmp_path / "out")]
    command = [sys.executable, "-c", SWALLOWS.replace("BODY", body), str(tmp_path / "mark"), *arguments]
    with Terminal(command, cwd=ROOT, env=environment()) as terminal:
        assert wait_for_mark(tmp_path / "mark", [terminal.process])
        time.sleep(0.5)
        for _ in range(presses):
            terminal.interrupt()
            time.sleep(1.2 if presses > 1 else 0)
        lines = [line for line in terminal.read_lines() if line]
        assert terminal.process.returncode == 130
        assert [line for line in lines if "dist_export: " in line] == [lines[-1]]
        assert lines[-1].startswith("dist_export: interrupted in '")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_others_that_never_come(rank: int, tmp_path: Path) -> None:
    started = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    started |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(crash.free_port())}
    script = (
        "import sys\nfrom pathlib import Path\nfrom dist_export.runtime import joining\nmark = Path(sys.argv.pop(1))\n"
        "real = joining._start_group\n"
        "def start(*arguments):\n    mark.touch()\n    real(*arguments)\n"
        "joining._start_group = start\nfrom dist_export.__main__ import run\nrun()"
    )
    arguments = ["--ckpt_dir", str(tmp_path), "--export_dir", str(tmp_path / "out")]
    command = [sys.executable, "-c", script, str(tmp_path / "mark"), *arguments]
    with Terminal(command, cwd=ROOT, env=environment(**started)) as terminal:
        assert wait_for_mark(tmp_path / "mark", [terminal.process])
        time.sleep(1)
        terminal.interrupt()
        lines = [line for line in terminal.read_lines() if line]
        assert terminal.process.returncode == 130, lines
        assert lines[-1].startswith("dist_export: interrupted")


@pytest.mark.parametrize("command", ["plan", "inspect", "verify"])
def test_the_other_commands_too(command: str, tmp_path: Path) -> None:
    """In the middle of reading the checkpoint."""
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 50}, 1))
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom dist_export.storage.directory import Directory\n"
        "def wait(*_):\n    Path(mark).touch()\n    time.sleep(100)\nmark = sys.argv.pop(1)\n"
        "Directory.names = wait\nfrom dist_export.__main__ import run\nrun()"
    )
    arguments = ["--ckpt_dir", str(tmp_path / "ckpt"), "--export_dir", str(tmp_path / "out")]
    arguments = arguments if command == "plan" else [str(tmp_path / "ckpt")]
    words = [sys.executable, "-c", script, str(tmp_path / "mark"), command, *arguments]
    with Terminal(words, cwd=ROOT, env=environment()) as terminal:
        assert wait_for_mark(tmp_path / "mark", [terminal.process])
        terminal.interrupt()
        lines = [line for line in terminal.read_lines() if line]
        assert terminal.process.returncode == 130
        assert len(lines) == 1
        assert lines[0].startswith("dist_export: interrupted")


def test_a_background_job_that_ignores_it_goes_on(tmp_path: Path) -> None:
    """As a shell without job control starts what stands before ``&``."""
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 50}, 1))
    out, mark = tmp_path / "out", tmp_path / "mark"
    script = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    )
    arguments = ["--ckpt_dir", str(tmp_path / "ckpt"), "--export_dir", str(out)]
    command = [sys.executable, "-c", script, sys.executable, crash.SCRIPT, *arguments]
    pause = {"PAUSE_AT": "check the places", "PAUSE_MARK": str(mark), "PAUSE_SECS": "1"}
    with Terminal(command, cwd=ROOT, env=environment(**pause)) as terminal:
        assert wait_for_mark(mark, [terminal.process])
        terminal.interrupt()
        terminal.read_lines()
        assert terminal.process.returncode == 0
    assert set(read_back(out)) == {"t"}
