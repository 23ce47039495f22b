"""Find the ranks that see a common disk, for files that are built before they are sent to a store."""

from __future__ import annotations

import os

from dist_export.runtime.ranks import Ranks
from dist_export.storage.staging import Staging


def share_disks(ranks: Ranks, staging: Staging) -> list[int]:
    """Let ranks that see one disk build files in one directory, and return the number of each rank's disk. All ranks.

    Each rank looks for the directories of the others, because containers of one machine may have separate disks, and several
    machines may share one. Disks are numbered from 0. If all ranks see rank 0's directory, it is the only one.
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
