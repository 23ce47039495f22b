"""The fleet by simulation: python -m scripts.scale [--ranks 256,1024,10000] [--real 2,4]. docs/scale.md has its figures.

Plans, balance and receipts are computed for all of these numbers of ranks. Whole exports with each rank a thread run up to
``--export-up-to`` ranks; beyond that the counts grow as their columns show. ``--real`` starts gloo jobs of a few ranks.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.scale import balance, control, helping

GIB = 1 << 30


def main() -> int:
    """Print the figures; return 1 where the balance is not what is promised."""
    parser = argparse.ArgumentParser(prog="python -m scripts.scale", description=__doc__)
    parser.add_argument("--ranks", default="256,1024,10000", help="numbers of ranks")
    parser.add_argument(
        "--export-up-to", type=int, default=1024, help="ranks of the largest whole export, each a thread"
    )
    parser.add_argument(
        "--real", default="", help="numbers of ranks of real jobs whose sockets are counted, such as 2,4"
    )
    given = parser.parse_args()
    fleets = [int(number) for number in given.ranks.split(",")]
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n"
    )
    uneven = [world_size for world_size in fleets if not print_balance(world_size)]
    for world_size in fleets:
        if world_size <= given.export_up_to:
            print_control(world_size)
    for world_size in fleets:
        print_helping(world_size)
    for number in filter(None, given.real.split(",")):
        print_sockets(int(number))
    return 1 if uneven else 0


def print_balance(world_size: int) -> bool:
    """Plan 4 GiB a rank, once with as many trainer ranks and once with three for four; return whether both are even."""
    is_even = True
    for num_parts in (world_size, world_size * 3 // 4):
        found = balance.measure(world_size, bytes_per_rank=4 * GIB, num_parts=num_parts, num_shards=world_size)
        print(
            f"{world_size:,} ranks, {num_parts:,} parts a table: {found.num_units:,} units, {found.ideal / GIB:.2f} GiB a rank, "
            f"most {found.largest / found.ideal - 1:+.2%}, least {found.smallest / found.ideal - 1:+.2%}, "
            f"largest unit {found.largest_unit / found.ideal:.2%}; rows to count off by {found.ids_off:.1%}; "
            f"planned in {found.seconds:.0f} s, this process at {peak_bytes() / GIB:.1f} GiB; "
            f"digests of a rank {found.gathered_digests:,} B, all receipts {found.receipt_bytes:,} B"
            f"{'' if found.is_even else '  UNEVEN'}",
            flush=True,
        )
        is_even &= found.is_even
    return is_even


def peak_bytes() -> int:
    """Return the most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_control(world_size: int) -> None:
    """Export with each rank a thread."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        found = control.measure(world_size, Path(folder))
    print(
        f"{world_size:,} ranks, a whole export: {found.gathers} gathers and {found.broadcasts} broadcasts; a rank sends "
        f"{found.gather_messages:,} messages, {found.gather_bytes:,} B; store: {found.store_calls_of_rank:.1f} calls a rank, "
        f"{found.store_keys:,} keys, {found.store_bytes:,} B in all; start {found.start_calls:,} calls; watchdog "
        f"{found.beat_calls:.0f} calls a rank and second; {found.receipts:,} receipts; {found.seconds:.0f} s",
        flush=True,
    )


def print_helping(world_size: int) -> None:
    """Take units from queues, a worker a rank, in virtual time."""
    found = helping.measure(world_size, units_each=4)
    print(
        f"{world_size:,} workers, {found.num_units:,} units: {found.helped:,} helped, done after {found.makespan:.2f} of the "
        f"ideal time (without help {found.alone:.2f}); store: {sum(found.calls.values()):,} calls, {found.keys:,} keys, "
        f"{found.num_bytes:,} B",
        flush=True,
    )


def print_sockets(world_size: int) -> None:
    """Start a real job of this machine's ranks."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)),
            *("-m", "scripts.scale.sockets"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    print(f"{world_size:,} ranks of a real job: {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
