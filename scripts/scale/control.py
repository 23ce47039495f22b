"""What one export costs in control messages: a real one, each rank a thread, on a small checkpoint of as many parts."""

from __future__ import annotations

import resource
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dist_export.config.schema import ExportConfig
from dist_export.model.user_objects import Objects
from dist_export.pipeline.run import run_export
from dist_export.runtime.heartbeat import Beat
from dist_export.runtime.process_identity import identify
from dist_export.runtime.rendezvous import agree_on_start
from dist_export.runtime.watchdog import Watchdog
from dist_export.verify.verify import verify
from scripts.scale import logical
from tests.support.recis_writer import make_tables, write_checkpoint


@dataclass(frozen=True, kw_only=True)
class Control:
    """The counters of one export, of the start before it, and of the watchdog beside it."""

    world_size: int
    gathers: int
    broadcasts: int
    gather_messages: int
    """That one rank sends in all gathers and broadcasts, rank 0, which sends most."""
    gather_bytes: int
    """The same in bytes."""
    largest_own: int
    """Pickled bytes that one rank contributes to all gathers together, the largest rank's."""
    store_calls: Counter[str]
    store_calls_of_rank: float
    """Of one rank, on average."""
    store_keys: int
    """Keys that the store was asked for or told, by all ranks together."""
    store_bytes: int
    start_calls: int
    """Of all ranks until they agreed on a name for their start. Ranks poll, so it depends on how late the last one comes."""
    beat_calls: float
    """Of one rank in a second."""
    receipts: int
    seconds: float


def measure(world_size: int, folder: Path) -> Control:
    """Export with this many logical ranks, verify the package, and count."""
    source, out = folder / "ckpt", folder / "out"
    write_checkpoint(source, make_tables({"big": 40 * world_size, "small": 4 * world_size}, world_size))
    config = ExportConfig(ckpt_dir=str(source), export_dir=str(out), filter_sparse_opt=True, threads=1)
    started = time.perf_counter()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the files of all ranks are this process's
    try:
        results, gathers, store = logical.run(
            world_size, lambda ranks: run_export(ranks, config, Objects(), is_shown=False)[0]
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    seconds = time.perf_counter() - started
    report = verify(str(out))
    assert not report.findings, report.findings
    shards = [file for file in results[0].files if file.path.endswith(".safetensors")]
    return Control(
        world_size=world_size,
        gathers=gathers.rounds,
        broadcasts=len(gathers.broadcasts),
        gather_messages=gathers.messages_of_a_rank,
        gather_bytes=gathers.bytes_of_a_rank,
        largest_own=max(gathers.own_bytes.values()),
        store_calls=store.calls,
        store_calls_of_rank=sum(store.calls_of.values()) / world_size,
        store_keys=store.keys_read,
        store_bytes=store.num_bytes,
        start_calls=count_start(world_size),
        beat_calls=count_beats(world_size),
        receipts=len(shards),
        seconds=seconds,
    )


def count_start(world_size: int) -> int:
    """Return the store calls of all ranks while they agree on a name for their start."""
    store = logical.Store()
    names: list[str] = []

    def work(rank: int) -> None:
        names.append(agree_on_start(store.of(rank), rank, world_size, timeout_secs=300))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 1, names
    assert len(names) == world_size
    return sum(store.calls.values())


def count_beats(world_size: int, beats: int = 5) -> float:
    """Return the store calls of one rank's watchdog in a second, when all is well: the real beat, of a few ranks."""
    store = logical.Store()
    few = [*range(min(world_size, 4)), world_size - 1]
    dogs = {
        rank: Watchdog(
            rank, world_size, store.of(rank), timeout_secs=60, launcher=None, request_stop=_ignore,
            has_failure=lambda: False, finish=_refuse,
        )
        for rank in few
    }  # fmt: skip
    for rank in {number % world_size for few_rank in few for number in (few_rank, few_rank + 1)}:  # and whom they watch
        store.of(rank).set(f"who/{rank}", msgspec.json.encode(identify()))
        store.of(rank).set(f"beat/{rank}", msgspec.json.encode(Beat(0, "'write shards'")))
    for number in range(beats + 1):
        if number == 1:
            store.calls_of.clear()
        for rank, dog in dogs.items():
            dog._beat(store.of(rank))  # noqa: SLF001 -- its second, without waiting for it
            dog._cycles += 1  # noqa: SLF001
    return max(store.calls_of.values()) / beats


def _ignore(_: str) -> None:
    return None


def _refuse(text: str | None, _: float, __: int) -> None:
    raise AssertionError(text)
