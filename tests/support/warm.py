"""Processes that start in milliseconds: forked from one that has imported torch and the package, and has traced once.

For tests of what ranks do. A test of starting itself, of the launcher, or of what an import costs starts a Python of its own.
Processes of the pool share one seed of ``hash()``; ranks that ``torchrun`` starts do not.
"""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from tests.support import ROOT


class Ended(subprocess.CompletedProcess[str]):
    """How a command ended. ``codes`` are the exit codes of its ranks."""

    codes: list[int | None]


def start(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """Call a top-level function in a process of its own, with this process's environment or another one."""
    given = dict(os.environ if environment is None else environment)
    process = _context().Process(target=_call, args=(function, arguments, given, os.getpid()), daemon=True)
    _start(process)
    return process


def wait(processes: list[ForkServerProcess], timeout: float) -> list[int]:
    """Wait for all; kill those that still run after ``timeout`` seconds, and return their numbers."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [number for number, process in enumerate(processes) if process.is_alive()]
    for number in late:
        processes[number].kill()
        processes[number].join()
    return late


def run_command(world_size: int, *command: str, cwd: Path = ROOT, timeout: float = 240, **more: str) -> Ended:
    """Run a script, or ``-m`` and a module, on each of some ranks, as ``python`` or a launcher would run it.

    The result is put together as torchrun's would be: what all ranks said, and 0 if all ended well, else 1; of one rank
    alone its own exit code. Ranks that outlive one that failed are waited for: they are to end by themselves.
    """
    shared = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more
    if world_size > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    reads, processes = [], []
    for rank in range(world_size):
        environment = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {})
        files = [os.memfd_create(name) for name in ("stdout", "stderr")]
        reads.append(files)
        names = [f"/proc/{os.getpid()}/fd/{file}" for file in files]
        processes.append(start(_run, command, str(cwd), *names, environment=environment))
    late = wait(processes, timeout)
    said = ["", ""]
    for files in reads:
        for number, file in enumerate(files):
            with open(file, "rb", closefd=True) as out:
                out.seek(0)
                said[number] += out.read().decode()
    if late:
        raise subprocess.TimeoutExpired(list(command), timeout, *said)
    codes = [process.exitcode for process in processes]
    done = Ended(list(command), codes[0] if world_size == 1 else int(any(codes)), *said)  # type: ignore[arg-type]
    done.codes = codes
    return done


def run_script(folder: Path, text: str, *arguments: str, timeout: float = 240, **more: str) -> Ended:
    """Run a Python program that is written into ``folder``, in a process of its own."""
    script = folder / "script.py"
    script.write_text(text)
    return run_command(1, str(script), *arguments, cwd=ROOT, timeout=timeout, **more)


def _run(command: tuple[str, ...], cwd: str, stdout: str, stderr: str) -> None:
    """Be the process of a command; does not return."""
    write_to(stdout, stderr)
    run_here(command, cwd)


def run_here(command: tuple[str, ...], cwd: str) -> None:
    """Run a script, or ``-m`` and a module, in this process as ``python`` would, and end it."""
    os.chdir(cwd)
    code: Any = 0
    try:
        sys.path[0:0] = [
            cwd if command[0] == "-m" else os.path.dirname(os.path.abspath(command[0])),
            *os.environ["PYTHONPATH"].split(os.pathsep),
        ]
        if command[0] == "-m":
            sys.argv = list(command[1:])
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(command)
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], caller: int) -> None:
    os.environ.clear()
    os.environ.update(environment)
    write_to(*(f"/proc/{caller}/fd/{descriptor}" for descriptor in (1, 2)))  # not to where the server was started
    function(*arguments)


def write_to(stdout: str, stderr: str) -> None:
    """Have this process write to other files from now on."""
    for descriptor, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)


def _context() -> ForkServerContext:
    return mp.get_context("forkserver")


def _start(process: ForkServerProcess) -> None:
    """Start a process; with the first one the server, which finds its imports by this environment alone."""
    _context().set_forkserver_preload(["tests.support.warm_imports"])
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    try:
        process.start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
