"""How many sockets a rank of a real job holds: run by torchrun; rank 0 prints them. See --real of scripts.scale."""

from __future__ import annotations

import os

from dist_export.runtime.joining import join


def count() -> int:
    """Return this process's open sockets."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except FileNotFoundError:  # the listing's own descriptor
            continue
    return found


def main() -> None:
    """Join as an export does, and count."""
    before = count()
    with join(timeout_secs=60.0, is_own_process=True) as ranks:
        found = ranks.all_gather("count the sockets", lambda: count() - before)
    if ranks.rank == 0:
        print(f"sockets of a rank: {max(found)}", flush=True)


if __name__ == "__main__":
    main()
