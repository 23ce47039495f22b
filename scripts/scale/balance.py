"""How even the plan's units of work, and the receipts that come of them, are over the ranks."""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass

import numpy as np

from dist_export.formats.tuning import STANDARD
from dist_export.plan.census import share_parts
from dist_export.plan.plan import SparsePlan
from dist_export.plan.target_slices import plan_targets
from dist_export.plan.work_units import Unit, assign, plan_units
from dist_export.workdir.state import Receipt
from scripts.scale import fleet

TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Balance:
    """One fleet. Bytes are those that a rank moves by its own share of the units, before anybody helps anybody."""

    world_size: int
    num_parts: int
    num_shards: int
    num_units: int
    kept_bytes: int
    ideal: float
    largest: int
    smallest: int
    largest_unit: int
    ids_off: float
    """By how much the rank with most rows to count exceeds the ideal, as a share of it."""
    seconds: float
    """For the plan and the units, on each rank; making up the checkpoint and its census is not in it."""
    gathered_digests: int
    """Pickled bytes of the largest rank's digests, which each rank hands to all others when the shards are written."""
    receipt_bytes: int
    """JSON of all receipts together: what rank 0 lists and puts into the manifest."""

    @property
    def off(self) -> float:
        """The largest deviation from the ideal, in bytes."""
        return max(self.largest - self.ideal, self.ideal - self.smallest)

    @property
    def is_even(self) -> bool:
        """Within 5 % of the ideal, or one unit where that is larger."""
        return self.off <= max(TOLERANCE * self.ideal, self.largest_unit)


def measure(world_size: int, *, bytes_per_rank: int, num_parts: int, num_shards: int, threads: int = 4) -> Balance:
    """Plan a fleet's export and deal it out."""
    checkpoint = fleet.make_checkpoint(bytes_per_rank * world_size, num_parts)
    census = fleet.count(checkpoint, plan_targets(checkpoint, num_shards))
    started = time.perf_counter()
    plan = fleet.make_plan(checkpoint, census, num_shards)
    units, _ = plan_units(plan)
    queues = assign(units, world_size * threads)
    seconds = time.perf_counter() - started
    costs = np.array([unit.num_bytes for unit in units])
    by_worker = np.array([costs[queue].sum() if queue else 0 for queue in queues])
    by_rank = by_worker.reshape(world_size, threads).sum(1)
    rows = np.array(
        [plan.checkpoint.parts.rows[share].sum() for share in share_parts(plan.checkpoint, world_size * threads)]
    )
    rows = rows.reshape(world_size, threads).sum(1)
    of_ranks = [
        [number for queue in queues[r * threads : (r + 1) * threads] for number in queue] for r in range(world_size)
    ]
    return Balance(
        world_size=world_size,
        num_parts=num_parts,
        num_shards=num_shards,
        num_units=len(units),
        kept_bytes=int(costs.sum()),
        ideal=costs.sum() / world_size,
        largest=int(by_rank.max()),
        smallest=int(by_rank.min()),
        largest_unit=int(costs.max()),
        ids_off=float(rows.max() / rows.mean() - 1),
        seconds=seconds,
        gathered_digests=max(len(pickle.dumps(digests_of(units, mine))) for mine in of_ranks),
        receipt_bytes=sum(len(str(receipt)) for receipt in receipts(plan)),
    )


def digests_of(units: list[Unit], numbers: list[int]) -> dict[tuple[int, int], list[bytes]]:
    """Return digests of a rank's units in the form in which the ranks exchange them: 16 bytes for each chunk of 64 MiB."""
    return {
        (units[n].number, units[n].begin): [bytes(16)] * -(-(units[n].end - units[n].begin) // STANDARD.chunk_bytes)
        for n in numbers
        if units[n].is_hashed
    }


def receipts(plan: SparsePlan) -> list[bytes]:
    """Return all shards' receipts, as they are written."""
    import msgspec

    return [
        msgspec.json.encode(
            Receipt(plan=plan.digest, name=file.name, num_bytes=file.num_bytes, digest=f"xxh3:{0:032x}")
        )
        for file in plan.files
    ]
