"""What a rank knows about the next rank in the ring, which it watches."""

from __future__ import annotations

import time

from dist_export.runtime.heartbeat import BEATS, IDENTITIES, Beat, Store
from dist_export.runtime.process_identity import Identity


class Neighbour:
    """The next rank that has not left. Used by one thread; every call on the store may raise RuntimeError if it is gone."""

    def __init__(self, rank: int, world_size: int, me: Identity, *, timeout_secs: float, silent_secs: float) -> None:
        """Know nothing yet.

        Args:
            rank: this rank.
            world_size: of the export.
            me: this process.
            timeout_secs: seconds without a sign of life after which a rank counts as hanging.
            silent_secs: the same for a rank of another machine, where nobody can see whether its process is alive.
        """
        self._own_rank, self._world_size, self._me = rank, world_size, me
        self._timeout_secs, self._silent_secs = timeout_secs, silent_secs
        self._rank = rank
        self._identity: Identity | None = None
        self._number = -2
        self._silent_since = 0.0

    def find_failure(self, store: Store) -> str | None:
        """Return why the rank cannot go on, if it cannot. If it has left, the next one is watched from the next call on."""
        if self._rank == self._own_rank:
            self._move_on()
        rank = self._rank
        if rank == self._own_rank:
            return None  # all others have left
        now = time.monotonic()
        if not store.check([f"beat/{rank}", f"who/{rank}"]):
            is_late = now - self._silent_since > self._timeout_secs
            return f"rank {rank} of {self._world_size} never arrived" if is_late else None
        beat = BEATS.decode(store.get(f"beat/{rank}"))
        if beat.has_left:
            self._move_on()
            return None
        if beat.number != self._number:
            self._number, self._silent_since = beat.number, now
        if self._identity is None:
            self._identity = IDENTITIES.decode(store.get(f"who/{rank}"))
        return self._judge(store, self._identity, beat, now - self._silent_since)

    def _move_on(self) -> None:
        self._rank = (self._rank + 1) % self._world_size
        self._identity, self._number, self._silent_since = None, -2, time.monotonic()

    def _judge(self, store: Store, identity: Identity, beat: Beat, silent: float) -> str | None:
        is_alive = identity.is_alive(self._me)
        who = f"rank {self._rank} of {self._world_size} ({identity})"
        if is_alive is False:
            again = BEATS.decode(store.get(f"beat/{self._rank}"))
            return None if again.has_left else f"{who} died in {beat.doing}"  # it may have left between the two reads
        if is_alive is None and silent > self._silent_secs:
            return f"{who} has given no sign of life for {silent:.0f} s; it was last in {beat.doing}"
        if silent > self._timeout_secs:
            return f"{who} hangs: no sign of life for {silent:.0f} s (timeout); it was last in {beat.doing}"
        return None
