"""Which ranks see a common disk for files that are built before they go to a store. Needs the ranks and a temporary directory."""

from __future__ import annotations

import os

from dist_export.runtime.ranks import Ranks
from dist_export.storage.staging import Staging


def share_disks(ranks: Ranks, staging: Staging) -> list[int]:
    """Let ranks that see one disk build files in one directory there; return the number of each rank's disk, from 0 on.

    Which ranks these are, only looking tells: containers of one machine may have disks of their own, and machines a common one.
    Where all see rank 0's directory it is the only one. All ranks.
    """
    first = ranks.broadcast("make a directory for shards", staging.make)
    folders = ranks.all_gather(
        "look for a directory for shards", lambda: first if os.path.isdir(first) else staging.make()
    )
    known = list(dict.fromkeys(folders))
    if len(known) == 1:
        staging.join(first)
        return [0] * ranks.world_size

    def choose() -> int:
        place = next(place for place, folder in enumerate(known) if os.path.isdir(folder))
        staging.join(known[place])
        return place

    chosen = ranks.all_gather("look for directories of others", choose)
    numbers = {place: number for number, place in enumerate(sorted(set(chosen)))}
    return [numbers[place] for place in chosen]
