"""The command line, except that one rank stops at one place and waits there to be killed. Run by torchrun, or alone.

The environment says where: ``PAUSE_AT`` is the name of a place, or ``number:<n>`` for the n-th that this rank comes to;
``PAUSE_RANK`` is the rank, ``PAUSE_MARK`` a file that is made on arrival and holds the process id. The other ranks go on.
With ``PAUSE_SECS`` it waits so long and goes on. Places are the steps of the export by name, ``unit`` (each unit of work),
``write <file>`` and ``written <file>`` around small files, ``publish <shard>`` and ``published <shard>``, ``exchange``,
``clean up`` and ``end``. The ranks other than ``PAUSE_RANK`` take ``SLOW_SECS`` for each unit, so that it gets its share; where
it is to stop at a ``unit``, they begin none before it has arrived, or they might have done all of its units for it.
``STEP_LOG`` is a file that gets all of them, with their numbers.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_export.pipeline import target
from dist_export.runtime.ranks import Ranks
from dist_export.storage.directory import Directory
from dist_export.storage.staging import Staging
from dist_export.transfer.unit_runner import UnitRunner
from dist_export.workdir import swap

AT = os.environ.get("PAUSE_AT", "")
RANK = os.environ.get("PAUSE_RANK", "0")
MARK = os.environ.get("PAUSE_MARK", "")
LOG = os.environ.get("STEP_LOG", "")
_number = itertools.count()


def arrive(name: str) -> None:
    if os.environ.get("RANK", "0") != RANK:
        return
    number = next(_number)
    if LOG:
        with open(LOG, "a") as log:
            log.write(f"{number} {name}\n")
    if AT not in (name, f"number:{number}") or os.path.exists(MARK):
        return
    partial = Path(f"{MARK}.partial")
    partial.write_text(str(os.getpid()))
    partial.rename(MARK)
    time.sleep(float(os.environ.get("PAUSE_SECS", "600")))


def around(owner: Any, name: str, before: Callable[..., str], after: Callable[..., str] | None = None) -> None:
    """Arrive before and after each call of ``owner.name``."""
    real = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        arrive(before(*arguments))
        result = real(*arguments, **options)
        if after is not None:
            arrive(after(*arguments))
        return result

    setattr(owner, name, call)


def patch() -> None:
    real_try = Ranks._try

    def try_it(self: Ranks, step: str, work: Callable[[], Any]) -> Any:
        def arrive_and_work() -> Any:
            arrive(step)
            return work()

        return real_try(self, step, work if getattr(work, "__name__", "") == "_nothing" else arrive_and_work)

    setattr(Ranks, "_try", try_it)  # noqa: B010 -- types forbid to put another function in its place
    real_run = UnitRunner.run

    def run(self: UnitRunner, unit: Any) -> Any:
        arrive("unit")
        if os.environ.get("RANK", "0") != RANK:
            while AT == "unit" and not os.path.exists(MARK):
                time.sleep(0.01)
            time.sleep(float(os.environ.get("SLOW_SECS", "0")))
        return real_run(self, unit)

    setattr(UnitRunner, "run", run)  # noqa: B010
    around(Directory, "write", lambda _, name, *__: f"write {name}", lambda _, name, *__: f"written {name}")
    around(Staging, "publish", lambda _, name: f"publish {name}", lambda _, name: f"published {name}")
    around(swap, "replace_directory", lambda *_: "exchange")
    around(target, "finish_commit", lambda *_: "clean up", lambda *_: "end")


if __name__ == "__main__":
    from dist_export.cli import main

    patch()
    sys.exit(main(sys.argv[1:]))
