"""Distinguish one start of a job from an earlier start in the same store.

torchrun keeps one store over all restarts (torch 2.13: ``DynamicRendezvousHandler`` shares its TCPStore), and on several
machines its agents count restarts differently. Without this, restarted ranks would find the addresses of dead ranks there.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import Any

from dist_export.runtime.heartbeat import Store

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.005, 0.5

_STORE_SECS = 5
"""Time limit for one call of the watchdog to the job's store."""

_RANKS_A_SECOND = 20_000
"""How often all ranks together ask the store, once the first short pauses are over."""


def agree_on_start(store: Store, rank: int, world_size: int, *, timeout_secs: float) -> str:
    """Return a name that the ranks of this start share, and that no earlier start used. All ranks.

    Rank 0 makes up the name. Another rank writes a random word under that name and accepts the name only once rank 0
    has answered with the same word. Keys of an earlier start cannot contain that answer.

    Raises:
        TimeoutError: not all ranks arrived; the text names those that rank 0 misses.
    """
    word = uuid.uuid4().hex
    deadline = time.monotonic() + timeout_secs
    pause, longest = _SHORTEST_PAUSE, min(max(0.02, world_size / _RANKS_A_SECOND), _LONGEST_PAUSE)
    if rank == 0:
        store.set("start", word)
    missing = set(range(1, world_size))
    while True:
        if rank == 0:
            missing -= {other for other in sorted(missing) if _answer(store, word, other)}
            if not missing:
                return word
        elif (name := _ask(store, word, rank)) is not None:
            return name
        if time.monotonic() > deadline:
            absent = f"rank {', '.join(map(str, sorted(missing)))}" if rank == 0 else "rank 0"
            raise TimeoutError(f"{absent} did not arrive within {timeout_secs:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _answer(store: Store, name: str, other: int) -> bool:
    if not store.check([f"{name}/said/{other}"]):
        return False
    store.set(f"{name}/heard/{other}", store.get(f"{name}/said/{other}").decode())
    return True


def _ask(store: Store, word: str, rank: int) -> str | None:
    if not store.check(["start"]):
        return None
    name = store.get("start").decode()
    store.set(f"{name}/said/{rank}", word)
    is_heard = store.check([f"{name}/heard/{rank}"]) and store.get(f"{name}/heard/{rank}").decode() == word
    return name if is_heard else None


def connect_anew(store: Any, prefix: str) -> Any:
    """Return a separate connection to the same store, which calls of other threads do not delay."""
    import torch._C._distributed_c10d as torch_store

    if hasattr(store, "clone"):  # torch 2.9
        own = store.clone()
    else:
        own = store
        while isinstance(own, torch_store.PrefixStore):
            own = own.underlying_store
        if isinstance(own, torch_store.TCPStore):
            own = torch_store.TCPStore(own.host, own.port, None, False, timedelta(seconds=_STORE_SECS))
        elif isinstance(own, torch_store.FileStore):
            own = torch_store.FileStore(getattr(own, "path"))  # noqa: B009 -- the stubs lack it
        prefix = f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{prefix}"
    own.set_timeout(timedelta(seconds=_STORE_SECS))
    return torch_store.PrefixStore(prefix, own)
