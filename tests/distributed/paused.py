"""The command line, except that one rank stops at one place and waits there to be killed. Run by torchrun.

The environment says where: ``PAUSE_AT`` is a step's name, ``unit`` (before its first unit of work), or ``number:<n>`` (the
n-th step that has a name or is a unit, from 0 on); ``PAUSE_RANK`` is the rank, ``PAUSE_MARK`` a file that is made on arrival
and holds the process id. The other ranks go on. ``HOLD`` makes the rank hold the interpreter too, as a stuck C call does.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import time
from pathlib import Path

from dist_export.collective import Ranks
from dist_export.transfer.units import UnitRunner

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
    if "HOLD" in os.environ:
        ctypes.PyDLL(None).sleep(600)
    time.sleep(600)


real_gather = Ranks.gather
real_run = UnitRunner.run


def gather(self, step, work, **options):
    def arrive_and_work():
        arrive(step)
        return work()

    return real_gather(self, step, work if work.__name__ == "_nothing" else arrive_and_work, **options)


def run(self, unit):
    arrive("unit")
    return real_run(self, unit)


Ranks.gather = gather
UnitRunner.run = run

if __name__ == "__main__":
    from dist_export.cli import main

    sys.exit(main(sys.argv[1:]))
