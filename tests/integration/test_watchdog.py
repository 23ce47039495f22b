"""The watchdog's judgement, with a store in memory and peers that are made up: who is dead, who hangs, who tells it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from dist_export.runtime import watchdog
from dist_export.runtime.heartbeat import Beat, End
from dist_export.runtime.io_activity import Activity
from dist_export.runtime.process_identity import Identity, identify
from dist_export.runtime.watchdog import Watchdog


class FakeStore:
    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.is_gone = False
        self.is_stuck = threading.Event()

    def _ask(self) -> None:
        if self.is_stuck.is_set():
            time.sleep(30)
        if self.is_gone:
            raise RuntimeError("Connection reset by peer\nmore")

    def set(self, key: str, value: str) -> None:
        self._ask()
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        self._ask()
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        self._ask()
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self._ask()
        if self.values.get(key, b"").decode() == expected:
            self.values[key] = desired.encode()
        return self.values[key]


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Everything ten times as fast."""
    monkeypatch.setattr(watchdog, "BEAT_SECS", 0.05)
    monkeypatch.setattr(watchdog, "TICK_SECS", 0.02)
    monkeypatch.setattr(watchdog, "STEP_SECS", 0.01)
    monkeypatch.setattr(watchdog, "SILENT_SECS", 0.4)
    monkeypatch.setattr(watchdog, "STOP_SECS", 0.4)
    monkeypatch.setattr(watchdog, "ACTIVITY", Activity())
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


class Dog:
    """A watchdog of rank 0 whose end is a record."""

    def __init__(
        self, store: FakeStore | None, *, rank: int = 0, world_size: int = 2, timeout: float = 60, **more
    ) -> None:
        self.told: list[str | None] = []
        self.stops: list[str] = []
        self.ended = threading.Event()
        self.dog = Watchdog(
            rank,
            world_size,
            store,
            timeout_secs=timeout,
            launcher=more.pop("launcher", None),
            request_stop=self.stops.append,
            has_failure=more.pop("has_failure", lambda: False),
            finish=self._finish,
        )

    def _finish(self, text: str | None, _: float, exit_code: int) -> None:
        self.exit_code = exit_code
        self.told.append(text)
        self.ended.set()

    def __enter__(self) -> Dog:
        self.dog.start(catches_sigterm=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.dog.stop()

    def text(self) -> str:
        assert self.ended.wait(20), "it did not end"
        (text,) = self.told
        assert text is not None
        assert text.count("\n") == 1
        return text


ELSEWHERE = Identity(host="far", machine="another", pid=1, started="1")


def peer(
    store: FakeStore, rank: int, identity: Identity, *, number: int = 1, doing: str = "'write shards'", **more
) -> None:
    store.values[f"who/{rank}"] = msgspec.json.encode(identity)
    store.values[f"beat/{rank}"] = msgspec.json.encode(Beat(number, doing, **more))


def of_child(pid: int) -> Identity:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return msgspec.structs.replace(identify(), pid=pid, started=fields[19])


def dead_process() -> Identity:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        found = of_child(child.pid)
        assert found.is_alive(identify())
        child.stdin.close()
    assert found.is_alive(identify()) is False
    return found


def test_a_process_is_known_by_its_start(monkeypatch) -> None:
    me = identify()
    assert me.is_alive(me)
    assert msgspec.structs.replace(me, started="1").is_alive(me) is False, "its number was given out again"
    assert ELSEWHERE.is_alive(me) is None
    assert str(me) == f"process {os.getpid()} on {me.host}"


def test_a_zombie_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        found = of_child(child.pid)
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert found.is_alive(identify()) is False


def test_a_dead_rank_of_this_machine_is_named_at_once() -> None:
    store = FakeStore()
    gone = dead_process()
    peer(store, 1, gone)
    with Dog(store) as dog:
        assert dog.text() == (
            f"dist_export: rank 1 of 2 ({gone}) died in 'write shards'. Nothing was written. "
            "Run the same command again to go on\n"
        )
    assert msgspec.json.decode(store.values["end"], type=End).rank == 0


def test_a_rank_of_another_machine_is_dead_when_it_is_silent(monkeypatch) -> None:
    store = FakeStore()
    peer(store, 1, ELSEWHERE)
    with Dog(store) as dog:
        assert "rank 1 of 2 (process 1 on far) has given no sign of life for" in dog.text()


def test_a_rank_that_beats_is_alive(monkeypatch) -> None:
    store = FakeStore()
    with Dog(store) as dog:
        for number in range(40):
            peer(store, 1, ELSEWHERE, number=number)
            assert not dog.ended.wait(0.03)


def test_a_rank_whose_process_runs_may_be_silent_until_the_timeout() -> None:
    """It may hold the interpreter for long; a stopped one is a hang."""
    store = FakeStore()
    peer(store, 1, identify())
    with Dog(store) as dog:
        assert not dog.ended.wait(1.0)
    with Dog(store, timeout=0.6) as dog:
        assert "hangs: no sign of life" in dog.text()


def test_a_rank_that_has_left_is_not_missed_and_the_next_one_is_watched() -> None:
    store = FakeStore()
    peer(store, 1, dead_process(), has_left=True)
    with Dog(store) as dog:
        assert not dog.ended.wait(0.5)
    peer(store, 2, dead_process())
    with Dog(store, world_size=3) as dog:
        assert "rank 2 of 3" in dog.text()


def test_a_rank_that_never_comes_is_missed_after_the_timeout() -> None:
    with Dog(FakeStore(), timeout=0.3) as dog:
        assert "rank 1 of 2 never arrived" in dog.text()


def test_the_first_to_record_tells_and_the_others_end_quietly(monkeypatch) -> None:
    store = FakeStore()
    me = identify()
    store.values["end"] = msgspec.json.encode(End("rank 5 died", me.host, 3))
    with Dog(store) as dog:
        assert dog.ended.wait(20)
        assert dog.told == [None]
    store.values["end"] = msgspec.json.encode(End("rank 5 died", "another host", 3))
    with Dog(store) as dog:
        assert "rank 5 died" in dog.text(), "on another machine its first rank says it there"
    monkeypatch.setenv("LOCAL_RANK", "1")
    with Dog(store, rank=1) as dog:
        assert dog.ended.wait(20)
        assert dog.told == [None]


def test_a_main_thread_that_hears_of_failures_itself_is_not_cut_short() -> None:
    store = FakeStore()
    store.values["end"] = msgspec.json.encode(End("no space left", identify().host, 3, is_raised=True))
    dog = Dog(store)
    dog.dog.hears = True
    with dog:
        assert not dog.ended.wait(0.5)
    store.values["end"] = msgspec.json.encode(End("rank 5 died", identify().host, 3))
    dog = Dog(store)
    dog.dog.hears = True
    with dog:
        assert dog.ended.wait(20), "of a death it does not hear by itself"


def test_a_process_without_descriptors_takes_nobody_for_dead(monkeypatch) -> None:
    found = of_child(os.getpid())

    def fail(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Path, "read_text", fail)
    assert found.is_alive(found) is None


def test_stopping_twice_restores_once() -> None:
    dog = Dog(None, world_size=1)
    dog.dog.start(catches_sigterm=True)
    dog.dog.fail("x")
    reader, writer = os.pipe()
    dog.dog.stop()
    os.write(writer, b"x")
    assert os.read(reader, 1) == b"x", "descriptors of others are left alone"
    os.close(reader)
    os.close(writer)


def test_a_store_that_is_gone_ends_the_rank() -> None:
    store = FakeStore()
    peer(store, 1, identify())
    with Dog(store) as dog:
        time.sleep(0.2)
        dog.dog.begin("write shards", is_busy=True)
        store.is_gone = True
        assert "the job's store is gone, and with it the process that hosts it (Connection reset by peer)" in dog.text()
        assert "this rank was in 'write shards'" in dog.told[0]


def test_a_store_call_that_hangs_ends_the_rank_all_the_same() -> None:
    """Only the other thread can do that."""
    store = FakeStore()
    peer(store, 1, identify())
    dog = Dog(store)
    dog.dog.start()
    time.sleep(0.2)
    store.is_stuck.set()
    assert "the job's store has not answered for" in dog.text()
    store.is_stuck.clear()


def test_a_lost_launcher_ends_the_rank() -> None:
    with Dog(None, world_size=1, launcher=1) as dog:
        assert "rank 0 of 1: its launcher (process 1 on " in dog.text()
    assert dog.dog.is_orphan
    assert not Dog(None, launcher=os.getppid()).dog.is_orphan


def test_of_the_ranks_of_a_machine_the_first_speaks_where_there_is_no_store(monkeypatch) -> None:
    store = FakeStore()
    peer(store, 0, identify())
    monkeypatch.setenv("LOCAL_RANK", "1")
    with Dog(store, rank=1) as dog:
        time.sleep(0.2)
        store.is_gone = True
        assert dog.ended.wait(20)
        assert dog.told == [None]
    store = FakeStore()
    peer(store, 0, dead_process(), has_left=True)
    with Dog(store, rank=1) as dog:
        time.sleep(0.2)
        store.is_gone = True
        assert "rank 1 of 2: the job's store is gone" in dog.text(), "the first one is dead, so another speaks"


def test_work_that_does_not_move_is_a_hang() -> None:
    dog = Dog(None, world_size=1, timeout=0.4)
    dog.dog.begin("write shards", is_busy=True)
    watchdog.ACTIVITY.begin("/out/model-0")
    with dog:
        assert " hangs: no progress for " in dog.text()
        assert "in 'write shards' at /out/model-0. Nothing was written" in dog.told[0]


def test_slow_work_that_moves_is_none() -> None:
    dog = Dog(None, world_size=1, timeout=0.4)
    dog.dog.begin("write shards", is_busy=True)
    with dog:
        for _ in range(10):
            watchdog.ACTIVITY.begin("x")
            assert not dog.ended.wait(0.1)
            watchdog.ACTIVITY.end()


def test_waiting_for_others_is_no_hang() -> None:
    dog = Dog(None, world_size=1, timeout=0.2)
    dog.dog.begin("write shards", is_busy=True)
    dog.dog.pause()
    with dog:
        assert not dog.ended.wait(0.8)


def test_a_rank_that_fails_alone_leaves_its_reason() -> None:
    store = FakeStore()
    with Dog(store) as dog:
        dog.dog.fail("x: No space left")
        assert msgspec.json.decode(store.values["end"], type=End).text == "x: No space left"
        assert msgspec.json.decode(store.values["beat/0"], type=Beat).has_left
        assert dog.told == []


def test_sigterm_becomes_a_clean_stop_and_may_come_twice() -> None:
    dog = Dog(None, world_size=1)
    before = signal.getsignal(signal.SIGTERM)
    dog.dog.start(catches_sigterm=True)
    dog.dog.begin("write shards", is_busy=True)
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 10
    while not dog.stops and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    assert dog.stops == ["stopped by SIGTERM, which came in 'write shards'"]
    assert "did not stop by itself" in dog.text()
    dog.dog.stop()
    assert signal.getsignal(signal.SIGTERM) is before


def ask_to_stop(dog: Dog) -> None:
    dog.dog._is_asked_to_stop = True
    dog.dog._wake.set()


def test_torchruns_sigterm_names_the_rank_that_died() -> None:
    store = FakeStore()
    peer(store, 1, identify())
    peer(store, 2, dead_process())
    with Dog(store, world_size=3) as dog:
        ask_to_stop(dog)
        assert "rank 2 of 3" in dog.text()
        assert "died in 'write shards'" in dog.told[0]
    assert dog.stops == []


def test_sigterm_after_a_failure_lets_the_failure_be_told() -> None:
    store = FakeStore()
    peer(store, 1, identify())
    with Dog(store, has_failure=lambda: True) as dog:
        ask_to_stop(dog)
        time.sleep(0.2)
        assert dog.stops == []


def test_a_rank_that_dies_before_its_first_beat_is_missed() -> None:
    """It has said who it is, and that it is there, before its threads begin."""
    store = FakeStore()
    dog = Dog(store, rank=1)
    dog.dog._run_beat = lambda: None
    dog.dog.start()
    assert store.check(["who/1", "beat/1"])
    dog.dog.stop()


def test_who_speaks_looks_at_the_disk_once_rank_0_has_ended(monkeypatch) -> None:
    """Rank 0 may be in the middle of the commit when another rank dies: what was true before that is not said."""
    monkeypatch.setattr(watchdog, "BEAT_SECS", 5.0)
    store = FakeStore()
    peer(store, 0, identify())
    peer(store, 2, dead_process())
    dog = Dog(store, rank=1, world_size=3)
    dog.dog._sigterm = object()  # type: ignore[assignment]
    committed = threading.Event()
    dog.dog.say_on_disk = lambda: "committed" if committed.is_set() else "nothing"

    def rank_0() -> None:
        while "end" not in store.values:
            time.sleep(0.005)
        committed.set()
        peer(store, 0, dead_process())

    thread = threading.Thread(target=rank_0)
    thread.start()
    dog.dog._record(store, "rank 2 of 3 died")
    thread.join()
    assert dog.told == ["dist_export: rank 2 of 3 died. committed. Run the same command again to go on\n"]
