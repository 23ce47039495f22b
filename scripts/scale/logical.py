"""Ranks of one export as threads of one process, with the real code of each, and counters where it meets the others.

``Ranks`` is the real one. Below it a gather hands over the objects, and the job's store is a dictionary; both count
what the real ones would send. No network, no watchdog: its beats are counted by themselves.
"""

from __future__ import annotations

import pickle
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch.distributed as dist

from dist_export.runtime.object_exchange import FIRST_BYTES, LENGTH_BYTES
from dist_export.runtime.ranks import Ranks

T = TypeVar("T")


class Store:
    """The job's store, shared by all logical ranks: what each asked of it is counted by call and bytes."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()
        self.calls: Counter[str] = Counter()
        self.calls_of: Counter[int] = Counter()
        self.keys_read = 0
        self.num_bytes = 0

    def of(self, rank: int) -> StoreOfRank:
        """Return the store as one rank sees it."""
        return StoreOfRank(self, rank)


class StoreOfRank:
    """Has the methods of torch's stores that ``collective``, ``rendezvous`` and ``watchdog`` call."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._rank = rank

    def _count(self, call: str, *sent: str | bytes, keys: int = 1) -> None:
        store = self._store
        store.calls[call] += 1
        store.calls_of[self._rank] += 1
        store.keys_read += keys
        store.num_bytes += sum(map(len, sent)) + 8 * keys  # and a length or a number back for each key

    def add(self, key: str, amount: int) -> int:
        with self._store.changed:
            self._count("add", key)
            value = int(self._store.values.get(key, b"0")) + amount
            self._store.values[key] = str(value).encode()
            self._store.changed.notify_all()
            return value

    def set(self, key: str, value: str | bytes) -> None:
        with self._store.changed:
            self._count("set", key, value)
            self._store.values[key] = value.encode() if isinstance(value, str) else value
            self._store.changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._store.changed:
            self._store.changed.wait_for(lambda: key in self._store.values, 60)
            self._count("get", key, self._store.values[key])
            return self._store.values[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        with self._store.changed:
            self._store.changed.wait_for(lambda: all(key in self._store.values for key in keys), 60)
            self._count("multi_get", *keys, keys=len(keys))
            return [self._store.values[key] for key in keys]

    def check(self, keys: list[str]) -> bool:
        with self._store.changed:
            self._count("check", *keys, keys=len(keys))
            return all(key in self._store.values for key in keys)

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        with self._store.changed:
            self._count("compare_set", key, expected, value)
            if key not in self._store.values and not expected:
                self._store.values[key] = value.encode()
            return self._store.values[key]


class Gathers:
    """Stands for gloo: every rank hands in what it has, and gets what all have."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.rounds = 0
        self.largest: list[int] = []
        """Pickled bytes of the largest contribution, one for each gather; all are padded to it."""
        self.broadcasts: list[int] = []
        """Bytes of each broadcast of rank 0; the root of a binomial tree sends them log2(world_size) times, others less."""
        self.own_bytes: Counter[int] = Counter()
        self._told: bytes | None = None
        self._given: list[Any] = [None] * world_size
        self._sizes: list[int] = [0] * world_size
        self._enter = threading.Barrier(world_size, action=self._close_round)
        self._leave = threading.Barrier(world_size)

    def exchange(self, given: Any, rank: int) -> list[Any]:
        """Do what ``gather_objects`` does; what is handed over is one object for all, which nobody unpickles."""
        pickled = pickle.dumps(given)
        self._sizes[rank] = len(pickled)
        self.own_bytes[rank] += len(pickled)
        self._given[rank] = given
        self._enter.wait()
        outcomes = list(self._given)
        self._leave.wait()
        return outcomes

    def broadcast(self, data: bytes | None) -> bytes:
        """Do what ``broadcast_bytes`` does from rank 0, the one with data: the bytes go down a binomial tree."""
        if data is not None:
            self.broadcasts.append(len(data))
            self._told = data
        self._leave.wait()
        told = self._told
        self._leave.wait()
        assert told is not None
        return told

    def _close_round(self) -> None:
        self.rounds += 1
        self.largest.append(max(self._sizes))

    def abort(self) -> None:
        """Let no rank wait for one that has failed."""
        self._enter.abort()
        self._leave.abort()

    @property
    def messages_of_a_rank(self) -> int:
        """gloo's allgather is a ring: each rank sends world_size - 1 messages, and twice as many where what one gives is large.

        Of broadcasts it is rank 0's, which sends most.
        """
        rings = self.rounds + sum(size + LENGTH_BYTES > FIRST_BYTES for size in self.largest)
        return rings * (self.world_size - 1) + len(self.broadcasts) * self._depth

    @property
    def bytes_of_a_rank(self) -> int:
        """What each rank sends, and receives: its neighbour's blocks, as long as the largest; of broadcasts rank 0's share."""
        gathered = sum(max(FIRST_BYTES, size + LENGTH_BYTES) for size in self.largest)
        return (self.world_size - 1) * gathered + self._depth * sum(self.broadcasts)

    @property
    def _depth(self) -> int:
        return (self.world_size - 1).bit_length()


class _Group:
    def __init__(self, gathers: Gathers, rank: int) -> None:
        self.gathers, self.rank = gathers, rank


@contextmanager
def _replaced() -> Iterator[None]:
    def gather_objects(ranks: Ranks, given: Any) -> list[Any]:
        gathers: Gathers = ranks._group.gathers  # noqa: SLF001 -- what stands for gloo below the ranks
        return gathers.exchange(given, ranks.rank)

    def broadcast_bytes(ranks: Ranks, data: bytes) -> bytes:
        gathers: Gathers = ranks._group.gathers  # noqa: SLF001
        return gathers.broadcast(data if ranks.rank == 0 else None)

    with (
        mock.patch.object(Ranks, "_gather_objects", gather_objects),
        mock.patch.object(Ranks, "_broadcast_bytes", broadcast_bytes),
        mock.patch.object(dist, "destroy_process_group"),
    ):
        yield


def run(world_size: int, work: Callable[[Ranks], T]) -> tuple[list[T], Gathers, Store]:
    """Call ``work(ranks)`` on each logical rank; return what they returned, and the counters. Raises what any raised."""
    gathers, store = Gathers(world_size), Store()
    results: list[Any] = [None] * world_size
    failures: list[BaseException] = []

    def run_rank(rank: int) -> None:
        group = _Group(gathers, rank)
        ranks = Ranks(rank, world_size, store.of(rank), group, owns_default_group=False, timeout_secs=600.0)
        try:
            results[rank] = work(ranks)
            ranks.close()
        except BaseException as error:  # noqa: BLE001 -- told below, once all have ended
            failures.append(error)
            gathers.abort()

    old = threading.stack_size(1 << 20), sys.getswitchinterval()
    sys.setswitchinterval(
        1.0
    )  # they wait for each other anyway, and each that waits for the interpreter asks for it so often
    try:
        with _replaced():
            threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(world_size)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        threading.stack_size(old[0])
        sys.setswitchinterval(old[1])
    for error in failures:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not failures, failures
    return results, gathers, store
