"""Start contenders as processes of their own, let them work one after another, and collect what they tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from scripts.bench.worker import MARK

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECS = 600.0


class ContenderError(Exception):
    """A contender failed, or did not do what it was asked for."""


class Started:
    """The ranks of one contender, started: they import what they need, then wait for :meth:`work`.

    Importing takes seconds, so all contenders of a round are started together; none works while another one does.
    """

    def __init__(self, label: str, job: Mapping[str, Any], *, ranks: int, scratch: Path) -> None:
        """``scratch`` is a directory for the file in which the ranks meet and for what they print."""
        self.label = label
        self._ranks: list[subprocess.Popen[str]] = []
        self._logs: list[Path] = []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # who installs a package has it compiled
        for rank in range(ranks):
            log = scratch / f"{rank}.log"
            whole = {
                "touch": 0,
                **job,
                "rank": rank,
                "ranks": ranks,
                "meeting": str(scratch / "meeting"),
                "timeout": TIMEOUT_SECS,
            }
            with log.open("w") as errors:
                process = subprocess.Popen(
                    [sys.executable, "-m", "scripts.bench.worker", json.dumps(whole)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    cwd=ROOT,
                    env=environment,
                )
            self._ranks.append(process)
            self._logs.append(log)

    def wait_until_ready(self) -> None:
        """Return when all ranks have imported what they need."""
        self._hear()

    def work(self) -> list[dict[str, Any]]:
        """Let all ranks work; return what each told, in rank order. ContenderError where one failed."""
        for process in self._ranks:
            try:
                _pipe(process.stdin).write("go\n")
                _pipe(process.stdin).flush()
            except BrokenPipeError:
                pass  # it is gone; what follows tells why
        told = self._hear()
        for process in self._ranks:
            process.wait(TIMEOUT_SECS)
        return told

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs."""
        for process in self._ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
            _pipe(process.stdin).close()
            _pipe(process.stdout).close()

    def _hear(self) -> list[dict[str, Any]]:
        late = threading.Timer(TIMEOUT_SECS, self._kill)
        late.start()
        try:
            return [self._hear_one(rank) for rank in range(len(self._ranks))]
        finally:
            late.cancel()

    def _kill(self) -> None:
        for process in self._ranks:
            process.kill()

    def _hear_one(self, rank: int) -> dict[str, Any]:
        process = self._ranks[rank]
        for line in _pipe(process.stdout):
            if line.startswith(MARK):
                told: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return told
        code = process.wait()
        said = self._logs[rank].read_text(errors="replace").strip()[-3000:]
        raise ContenderError(f"{self.label}: rank {rank} of {len(self._ranks)} ended with code {code}\n{said}")


def run_once(label: str, job: Mapping[str, Any], *, ranks: int = 1, scratch: Path) -> list[dict[str, Any]]:
    """Start one contender, let it work, and return what its ranks told."""
    scratch.mkdir(parents=True)
    with Started(label, job, ranks=ranks, scratch=scratch) as started:
        started.wait_until_ready()
        return started.work()


def combine(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a contender took: seconds from the common start to the end of the slowest rank.

    Memory is that of the rank that used most; bytes read are summed over the ranks; the rest is rank 0's.
    """
    return {
        **told[0],
        "seconds": max(rank["end"] for rank in told) - min(rank["begin"] for rank in told),
        "peak_anonymous": max(rank["peak_anonymous"] for rank in told),
        "peak_mapped": max(rank["peak_mapped"] for rank in told),
        "read_bytes": sum(rank["read_bytes"] for rank in told),
    }


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
