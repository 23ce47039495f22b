"""torchrun from the warm pool: its own agent, in a forked process, whose ranks are children of it that were forked ahead.

The agent and its ranks import nothing anew, which takes most of the time of a small job. Signals, sessions, parents and the
store are those of a real torchrun. A test of starting itself starts ``python -m torch.distributed.run``.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_export.runtime import process_identity
from tests.support import ROOT, warm


class Launcher:
    """A torchrun that runs; used as a ``Popen`` with pipes is, or, with ``terminal``, as one with a session of its own."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], *, terminal: str | None = None) -> None:
        """Start it. ``words``: those after ``-m torch.distributed.run``; ``terminal``: the path of a pty."""
        self._files = [] if terminal else [os.memfd_create(name) for name in ("stdout", "stderr")]
        names = [terminal, terminal] if terminal else [f"/proc/{os.getpid()}/fd/{file}" for file in self._files]
        self._process = warm.start(
            _launch, tuple(words), terminal is not None, *names, environment={**environment, "PYTHONPATH": str(ROOT)}
        )
        self.pid: int = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("torchrun", timeout or 0)
        return code

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the agent, and return what it and its ranks have said until now."""
        self.wait(timeout)
        said = []
        for file in self._files:
            with open(f"/proc/self/fd/{file}", "rb") as content:
                said.append(content.read().decode())
            os.close(file)
        self._files = []
        return (said[0], said[1]) if said else ("", "")


def run(words: Sequence[str], environment: Mapping[str, str], *, timeout: float = 120) -> warm.Ended:
    """Run torchrun to its end."""
    process = Launcher(words, environment)
    try:
        said = process.communicate(timeout)
    finally:
        process.kill()
    return warm.Ended(list(words), process.wait(), *said)


def torchrun(world_size: int, *command: str, timeout: float = 240) -> warm.Ended:
    """Run a script, or ``-m`` and a module, on this machine."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return run(("--standalone", "--nproc-per-node", str(world_size), *command), environment, timeout=timeout)


def _launch(words: tuple[str, ...], is_session: bool, stdout: str, stderr: str) -> None:
    """Be the agent; does not return."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    if is_session:
        os.setsid()
    warm.write_to(stdout, stderr)
    standby: list[tuple[int, int]] = []
    for _ in range(_number_after("--nproc-per-node", words) * (1 + _number_after("--max-restarts", words))):
        standby.append(_stand_by([writer for _, writer in standby]))

    def start(_: Any, args: tuple[str, ...], env: dict[str, str]) -> _Rank:
        return _Rank(standby.pop(0), args, env)

    setattr(subprocess_handler.SubprocessHandler, "_popen", start)  # noqa: B010
    warm.run_here(("-m", "torch.distributed.run", *words), str(ROOT))


class _Rank(subprocess.Popen[str]):
    """A child that waits to be a rank, and becomes it."""

    def __init__(self, standby: tuple[int, int], args: tuple[str, ...], env: dict[str, str]) -> None:
        self._standby, self._environment = standby, env
        super().__init__(args)

    def _execute_child(self, args: tuple[str, ...], *_: Any) -> None:
        self.pid, writer = self._standby
        self._child_created = True
        with open(writer, "wb") as pipe:
            pickle.dump((args, self._environment), pipe)


def _number_after(option: str, words: tuple[str, ...]) -> int:
    return int(words[words.index(option) + 1]) if option in words else 0


def _stand_by(others: list[int]) -> tuple[int, int]:
    """Fork a child that waits for its command; return its process id and where the command is to be written."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(reader)
        return pid, writer
    os.setsid()
    process_identity.PARENT = os.getppid()  # as importing it now would set it
    for descriptor in (writer, *others):
        os.close(descriptor)
    with open(reader, "rb") as pipe:
        given = pipe.read()
    if not given:  # the agent is gone, or needed no other
        os._exit(0)
    args, environment = pickle.loads(given)
    os.environ.clear()
    os.environ.update(environment)
    words = [word for word in args if word != "-u"]
    assert words[0] == sys.executable, args
    for option in ("--export_dir", "--publish"):
        if option in words:
            _show_as("rank", words[words.index(option) + 1])
    warm.run_here(tuple(words[1:]), str(ROOT))
    raise AssertionError("run_here does not return")


def _show_as(*words: str) -> None:
    """Have /proc show these words as the command of this process, by which tests find the ranks of an export."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc_pid_stat(5)
    content = b"\0".join(word.encode() for word in words) + b"\0"
    assert len(content) <= end - start, f"no room for {words}"
    ctypes.memmove(start, content.ljust(end - start, b"\0"), end - start)
