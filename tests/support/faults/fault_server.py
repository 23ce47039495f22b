"""Run exports, each in a process of its own with a fault of its own; started with the shim loaded, reads jobs from stdin.

A process that is forked from one that has imported everything starts in milliseconds, so many faults can be tried. The
fault is armed in the child, after the fork: everything an export does is still done by a real process through libc.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

import dist_export.cli
import dist_export.config.loader
import dist_export.pipeline.steps


def run(job: dict[str, Any]) -> None:
    """Be the process of one export; does not return."""
    code = 1
    try:
        for fd, path in enumerate((os.devnull, job["stdout"], job["stderr"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666), fd)
        os.environ.update(job["environment"])
        ctypes.CDLL(None).faults_arm(job["spec"].encode(), job["log"].encode())
        code = dist_export.cli.main(job["argv"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, timeout: float) -> int | None:
    """Return the exit code, None for a process that had to be killed."""
    deadline = time.monotonic() + timeout
    pause = 0.001
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def main() -> None:
    """Answer one line for each line of stdin, until that ends."""
    has_torch = False
    for line in sys.stdin:
        job = json.loads(line)
        if job["needs_torch"] and not has_torch:
            import torch

            from tests.support import first_trace

            torch.set_num_threads(1)
            first_trace.trace_once()
            assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
            has_torch = True
        pid = os.fork()
        if not pid:
            run(job)
        print(json.dumps(wait(pid, job["timeout"])), flush=True)


if __name__ == "__main__":
    main()
