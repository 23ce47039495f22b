"""Ranks of one start find each other in a store that holds what earlier starts left."""

from __future__ import annotations

import concurrent.futures
import random
import threading
import time

import pytest

from dist_export.runtime.rendezvous import agree_on_start


class MemoryStore:
    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


def start(store: MemoryStore, world_size: int, delays: list[float], timeout: float = 20) -> list[str]:
    def join(rank: int) -> str:
        time.sleep(delays[rank])
        return agree_on_start(store, rank, world_size, timeout_secs=timeout)

    with concurrent.futures.ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(join, range(world_size)))


def test_each_start_has_a_name_of_its_own_whatever_the_order_of_arrival() -> None:
    chance = random.Random(1)
    store = MemoryStore()
    names = set()
    for _ in range(12):
        delays = [chance.uniform(0, 0.1) for _ in range(4)]
        found = start(store, 4, delays)
        assert len(set(found)) == 1, "all have the same"
        names.add(found[0])
    assert len(names) == 12, "and no earlier start had it"


def test_one_rank_needs_nobody() -> None:
    assert start(MemoryStore(), 1, [0])


def test_a_rank_that_does_not_come_is_named() -> None:
    store = MemoryStore()
    start(store, 3, [0, 0, 0])
    others = threading.Thread(target=lambda: start_and_ignore(store))
    others.start()
    with pytest.raises(TimeoutError, match="rank 2 did not arrive within"):
        agree_on_start(store, 0, 3, timeout_secs=0.3)
    others.join()


def start_and_ignore(store: MemoryStore) -> None:
    agree_on_start(store, 1, 3, timeout_secs=20)


def test_a_rank_does_not_believe_an_earlier_start() -> None:
    """Rank 0 of this start is late: what the earlier one left must not let the others go ahead."""
    store = MemoryStore()
    start(store, 2, [0, 0])
    with pytest.raises(TimeoutError, match="rank 0 did not arrive"):
        agree_on_start(store, 1, 2, timeout_secs=0.3)
