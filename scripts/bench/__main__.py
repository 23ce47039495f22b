"""The command: ``python -m scripts.bench``; ``scripts/bench.sh`` makes its environment first."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.bench import command, deltas, kernels, lookup, scaling, scenarios, serving
from scripts.bench.asked import render_asked
from scripts.bench.processes import ROOT
from scripts.bench.report import HOW_TO_READ, describe_machine
from scripts.bench.rounds import Place
from scripts.bench.scenarios import Bench

SCENARIOS: dict[str, Callable[[Bench], None]] = {
    "filter": scenarios.run_filter,
    "merge": scenarios.run_merge,
    "split": scenarios.run_split,
    "reshard": scenarios.run_reshard,
    "prune": scenarios.run_prune,
    "giant": scenarios.run_giant,
    "torchrec": scenarios.run_torchrec,
    "cast": scenarios.run_cast,
    "slots": scaling.run_slots,
    "growth": scaling.run_growth,
    "metadata": scaling.run_metadata,
    "command": command.run_command,
    "lookup": lookup.run_lookup,
    "row_index": lookup.run_index_cost,
    "serving": serving.run_serving,
    "kernels": kernels.run_kernels,
    "deltas": deltas.run_deltas,
}
ON_DISK = ("filter", "reshard")
"""A copy and a gather; at dim 64 alone, for a disk takes its time."""


def main() -> int:
    """Run the scenarios that were asked for; return 1 where anything failed."""
    given = _parse()
    # what these add has scenarios of its own: row_index and deltas
    settings: dict[str, Any] = {"row_index": False, "row_fingerprints": False}
    if given.max_memory:
        settings["max_memory"] = given.max_memory
    machine = describe_machine()
    print(f"{HOW_TO_READ}\n\n{machine}")
    results: list[dict[str, Any]] = []
    failures: list[str] = []
    has_run = False
    for where in given.where:
        parent = given.tmpfs if where == "tmpfs" else given.disk
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="dist_export-bench-", dir=parent) as directory:
            bench = Bench(
                place=Place(name=where, directory=Path(directory)),
                size=given.size,
                rounds=given.rounds,
                settings=settings,
                results=results,
                failures=failures,
            )
            for name in given.only:
                if where == "disk" and name not in ON_DISK:
                    continue
                started = time.monotonic()
                SCENARIOS[name](bench)
                has_run = True
                print(f"\n({name}, {where}: {time.monotonic() - started:.0f} s in all)", flush=True)
    print(render_asked(results), flush=True)
    if failures:
        print(f"\n{len(failures)} FAILED: {', '.join(failures)}")
    elif not has_run:
        print("\nnothing was measured: on disk run " + ", ".join(ON_DISK))
        return 1
    return 1 if failures else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench.sh", description="Time exports against copies and peers.")
    parser.add_argument("--size", type=float, default=1.0, metavar="GB", help="kept bytes of a case (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    parser.add_argument(
        "--only", type=_names(SCENARIOS), default=list(SCENARIOS), metavar="NAME,...", help=", ".join(SCENARIOS)
    )
    parser.add_argument(
        "--where", type=_names(("tmpfs", "disk")), default=["tmpfs", "disk"], metavar="tmpfs,disk",
        help=f"where the files lie; on disk run {', '.join(ON_DISK)}, at dim 64 alone",
    )  # fmt: skip
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"), help="a directory on a tmpfs")
    parser.add_argument("--disk", type=Path, default=ROOT / ".cache", help="a directory on a disk")
    parser.add_argument("--max-memory", help="the setting max_memory of every export, such as 512MiB")
    given = parser.parse_args()
    if given.size <= 0 or given.rounds < 1:
        parser.error("--size and --rounds must be above 0")
    return given


def _names(choices: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        unknown = [name for name in names if name not in choices]
        if unknown:
            raise argparse.ArgumentTypeError(f"no such name: {unknown[0]}; there are {', '.join(choices)}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
