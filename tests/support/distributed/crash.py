"""Kill a real export, look at what it left, run it again: one case of the crash harness."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from dist_export.verify.verify import verify
from tests.support import ROOT, warm
from tests.support.distributed import warm_torchrun

SCRIPT = str(Path(__file__).with_name("paused.py"))
END_SECS = 60.0
"""A rank that still runs so long after a kill is a failure. What the watchdog takes is measured, not asserted."""

AnyProcess: TypeAlias = "subprocess.Popen[str] | warm_torchrun.Launcher"


@dataclass(frozen=True)
class Setup:
    """What is exported."""

    source: Path
    arguments: tuple[str, ...]
    expected: Path
    """The package of an undisturbed export."""
    place: tuple[str, ...] = ("--export_dir",)
    """The arguments before the place of the package."""
    old: Path | None = None
    """A package that is in export_dir already, and is to be replaced."""


@dataclass(frozen=True)
class Kill:
    """When and what. ``at`` as in paused.py, or ``after:<seconds>`` from the start of the launcher."""

    world_size: int
    at: str
    rank: int = 0
    victims: str = "rank"
    """rank, all (ranks), launcher, or everything."""

    def __str__(self) -> str:
        return f"{self.world_size} ranks, rank {self.rank} at {self.at!r}: SIGKILL to {self.victims}"


@dataclass
class Outcome:
    """What became of it."""

    was_reached: bool
    was_committed: bool
    kept: int
    """Shards that were whole and were not written again."""
    seconds: float
    """Until the last rank had ended."""


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launcher(
    world_size: int, *, agent: int = 0, agents: int = 1, port: int = 0, options: tuple[str, ...] = ()
) -> list[str]:
    """Return the command before the script: torchrun's, of several agents the one with this number; none for one rank."""
    if world_size == 1:
        return [sys.executable]
    common = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size // agents), *options]
    if agents == 1:
        return [*common, "--standalone"]
    return [
        *common,
        *("--nnodes", str(agents), "--rdzv-backend", "c10d", "--rdzv-id", f"crash{port}"),
        *(
            "--rdzv-endpoint",
            f"127.0.0.1:{port}",
            "--local-addr",
            "127.0.0.1",
            "--rdzv-conf",
            f"is_host={int(agent == 0)}",
        ),
    ]


def start(command: list[str], *, warm_launcher: bool = True, **more: str) -> AnyProcess:
    """Start a command whose output is kept; torchrun comes from the warm pool, unless the test is about its start."""
    if warm_launcher and command[1:3] == ["-m", "torch.distributed.run"]:
        return warm_torchrun.Launcher(command[3:], environment(**more))
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ranks_of(out: Path) -> list[int]:
    """Return the process ids of all ranks that export into ``out``, launchers aside."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            words = Path(f"/proc/{int(entry)}/cmdline").read_bytes().split(b"\0")
            if str(out).encode() in words and b"torch.distributed.run" not in words:
                state = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    found.append(int(entry))
    return found


def wait_for_end(out: Path, processes: Sequence[AnyProcess]) -> float:
    """Wait until no rank runs any more; return the seconds. AssertionError where one does not end."""
    started = time.monotonic()
    while ranks_of(out):
        if time.monotonic() - started > END_SECS:
            left = ranks_of(out)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"ranks {left} did not end within {END_SECS} s")
        time.sleep(0.05)
    ended = time.monotonic() - started
    for process in processes:
        process.wait(END_SECS)
    return ended


@contextlib.contextmanager
def started(command: list[str], out: Path, *, warm_launcher: bool = True, **more: str) -> Iterator[AnyProcess]:
    process = start(command, warm_launcher=warm_launcher, **more)
    try:
        yield process
    finally:
        process.kill()
        for pid in ranks_of(out):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def wait_for_mark(mark: Path, processes: Sequence[AnyProcess]) -> bool:
    """Return whether the rank arrived; False where all ended before."""
    deadline = time.monotonic() + 120
    while not mark.exists():
        if all(process.poll() is not None for process in processes):
            return mark.exists()
        assert time.monotonic() < deadline, "the place was not reached"
        time.sleep(0.01)
    return True


def run_kill(setup: Setup, kill: Kill, folder: Path, *, warm_launcher: bool = True) -> Outcome:
    """Start the export, kill, check what is left, run it again and compare. AssertionError where a promise is broken."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    out, mark = folder / "out", folder / "mark"
    if setup.old is not None:
        shutil.copytree(setup.old, out)
    command = [*launcher(kill.world_size), SCRIPT, *setup.arguments, *setup.place, str(out)]
    is_timed = kill.at.startswith("after:")
    place = "" if is_timed else kill.at
    pause = {"PAUSE_AT": place, "PAUSE_RANK": str(kill.rank), "PAUSE_MARK": str(mark)}
    with started(command, out, warm_launcher=warm_launcher, **pause) as process:
        if not is_timed:
            was_reached = wait_for_mark(mark, [process])
        else:
            time.sleep(float(kill.at.removeprefix("after:")))
            was_reached = process.poll() is None
        if was_reached:
            hit(kill, process, out, mark)
        seconds = wait_for_end(out, [process])
    was_committed = check_what_is_left(setup, out)
    before, was_cleaning = whole_shards(setup, out), (out / ".dist_export").exists()
    again = warm.run_command(1, "-m", "dist_export", *setup.arguments, *setup.place, str(out))
    is_done = was_committed and not was_cleaning
    assert again.returncode == 0, again.stderr[-3000:]
    if is_done and setup.old is None:  # it was all over before the kill
        assert "already exported" in again.stdout, again.stderr
    if not is_done or setup.old is None:  # else it replaced the new package by another of the same content
        after = whole_shards(setup, out)
        rewritten = [name for name, identity in before.items() if after[name] != identity]
        assert not rewritten, f"{rewritten} were whole and were written again"
    compare(setup, out)
    left = [name for name in os.listdir(folder) if name not in ("out", "mark", "mark.partial")]
    assert not left, f"{left} were left beside the package"
    return Outcome(was_reached, was_committed, len(before), seconds)


def hit(kill: Kill, process: AnyProcess, out: Path, mark: Path) -> None:
    ranks = ranks_of(out)
    if kill.victims == "rank":
        ranks = [int(mark.read_text())] if mark.exists() else random.sample(ranks, min(1, len(ranks)))
    if kill.victims in ("launcher", "everything"):
        process.kill()
    for pid in ranks if kill.victims != "launcher" else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def check_what_is_left(setup: Setup, out: Path) -> bool:
    """There is no manifest, or a package that verifies: the new one, or the old one that was there. Return whether the new."""
    if not (out / "manifest.json").exists():
        assert setup.old is None, "the old package is gone, and there is no new one"
        return False
    report = verify(str(out))
    assert report.findings == [], report.findings
    files = set(os.listdir(out)) - {".dist_export"}
    is_old = (
        setup.old is not None and (out / "manifest.json").read_bytes() == (setup.old / "manifest.json").read_bytes()
    )
    assert files == set(os.listdir(setup.old if is_old else setup.expected))
    return not is_old


def whole_shards(setup: Setup, out: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of the shards that are whole, wherever they are kept."""
    found = {}
    for folder in (out.parent / f".{out.name}.dist_export-next", out):
        for name in os.listdir(setup.expected):
            path = folder / name
            if name.endswith(".safetensors") and name not in found and path.exists():
                if (out.parent / f".{out.name}.dist_export-next").exists() and folder is out and setup.old is not None:
                    continue  # the old package's
                receipt = folder / ".dist_export" / f"{name}.json"
                if path.read_bytes() == (setup.expected / name).read_bytes() and (
                    receipt.exists() or (folder / "manifest.json").exists()
                ):
                    found[name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def compare(setup: Setup, out: Path) -> None:
    """The package equals that of an undisturbed export byte for byte, but for the manifest's ``run``."""
    report = verify(str(out))
    assert report.findings == [], report.findings
    found, expected = content(out), content(setup.expected)
    assert found.keys() == expected.keys()
    differing = [name for name in found if found[name] != expected[name]]
    assert not differing, f"{differing} differ from those of an undisturbed export"
    from dist_export.package.reader import open_package

    digests = [open_package(folder).manifest.digest for folder in (out, setup.expected)]
    assert digests[0] == digests[1]


def content(folder: Path) -> dict[str, str]:
    """Return the digest of every file but the manifest."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def list_places(setup: Setup, world_size: int, rank: int, folder: Path) -> list[str]:
    """Return the names of all places that a rank comes to in an undisturbed export."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "log"
    if setup.old is not None:
        shutil.copytree(setup.old, folder / "out")
    done = subprocess.run(
        [*launcher(world_size), SCRIPT, *setup.arguments, "--export_dir", str(folder / "out")],
        cwd=ROOT, env=environment(STEP_LOG=str(log), PAUSE_RANK=str(rank)), capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split(" ", 1)[1] for line in log.read_text().splitlines()]
