"""One export at a time: the lock that all ranks of a job hold, and the lease on stores without locks."""

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
from fsspec.implementations.memory import MemoryFileSystem

from dist_export.errors import CommitError, ConfigError
from dist_export.storage.directory import WORK_DIRECTORY, Directory
from dist_export.storage.urls import open_directory
from dist_export.workdir import lock as claims
from dist_export.workdir.lock import Lease, join_lock, lock

LEASE = f"{WORK_DIRECTORY}/lease"


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    return open_directory(tmp_path / "out")


@pytest.fixture
def store():
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield open_directory("memory://out")
    MemoryFileSystem.store.clear()


def test_a_rank_that_is_left_over_keeps_the_others_out(directory: Directory) -> None:
    """Rank 0 is gone, and an orphan of its job still holds the lock."""
    release = lock(directory)
    orphan = join_lock(directory)
    release()
    with pytest.raises(ConfigError, match=rf"another export \(process {os.getpid()} on "):
        lock(directory, patience_secs=0)
    orphan()
    lock(directory, patience_secs=0)()


def test_whoever_comes_right_after_a_crash_waits_for_its_ranks(directory: Directory) -> None:
    release = lock(directory)
    waiting = threading.Timer(0.5, release)
    waiting.start()
    lock(directory)()
    waiting.join()


def test_a_forked_child_does_not_keep_the_lock(directory: Directory) -> None:
    """A data loader's worker that outlives its rank must not make a directory unusable."""
    script = (
        "import os, signal, sys, time\n"
        "from dist_export.workdir.lock import lock\n"
        "from dist_export.storage.urls import open_directory\n"
        "release = lock(open_directory(sys.argv[1]))\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.close(1); time.sleep(60); os._exit(0)\n"
        "print(child, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, directory.path], stdout=subprocess.PIPE, check=False, text=True
    )
    assert done.returncode == -signal.SIGKILL
    child = int(done.stdout)
    try:
        os.kill(child, 0)
        lock(directory, patience_secs=0)()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_that_was_removed_while_waiting_for_it_is_no_lock(directory: Directory, monkeypatch) -> None:
    """An export that ends removes its work directory: what another one had opened then excludes nobody."""
    real, opened = claims._open, []

    def remove_after_opening(where: Directory) -> int:
        fd = real(where)
        opened.append(fd)
        if len(opened) == 1:
            os.unlink(where.join(f"{WORK_DIRECTORY}/lock"))
        return fd

    monkeypatch.setattr(claims, "_open", remove_after_opening)
    release = lock(directory)
    assert len(opened) == 2
    with pytest.raises(ConfigError, match="another export"):
        lock(directory, patience_secs=0)
    release()


def test_a_rank_that_comes_late_does_not_join_another_exports_lock(directory: Directory) -> None:
    directory.make()
    os.makedirs(directory.join(WORK_DIRECTORY))
    script = (
        "import fcntl, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(fd, fcntl.LOCK_EX); os.write(fd, b'process 1 on elsewhere'); print(flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, directory.join(f"{WORK_DIRECTORY}/lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        with pytest.raises(ConfigError, match="process 1 on elsewhere"):
            join_lock(directory)
        other.stdin.close()


def test_a_lease_that_is_renewed_is_anothers(store: Directory) -> None:
    lease = Lease(store, renew_secs=0.05)
    with pytest.raises(ConfigError, match=rf"another export \(process {os.getpid()} on "):
        Lease(store, renew_secs=0.3)
    lease.refuse_if_lost()
    lease.release()
    assert not store.exists(LEASE)
    Lease(store).release()


def test_a_lease_that_nobody_renews_goes_to_one(store: Directory) -> None:
    """Its holder was killed. Two want it: one gets it."""
    dead = Lease(store, renew_secs=600)
    dead._is_over.set()
    outcomes = []

    def take() -> None:
        try:
            outcomes.append(Lease(store, lease_secs=0.6, renew_secs=0.2))
        except ConfigError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = [outcome for outcome in outcomes if isinstance(outcome, Lease)]
    assert len(taken) == 1
    with pytest.raises(CommitError, match="lost its claim"):
        dead.refuse_if_lost()
    taken[0].refuse_if_lost()
    taken[0].release()
    assert store.fs.find("/out") == [], "the names by which it was inherited are gone too"


def test_a_job_that_is_started_anew_takes_over_its_own_lease(store: Directory, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    dead = Lease(store, renew_secs=600)
    dead._is_over.set()
    started = time.monotonic()
    Lease(store, lease_secs=600, renew_secs=600).release()
    assert time.monotonic() - started < 300


@pytest.mark.parametrize(("run", "restarts"), [("none", "1"), ("job 7", "0")])
def test_a_job_of_the_same_name_is_another_job(run: str, restarts: str, store: Directory, monkeypatch) -> None:
    """torchrun calls every job ``none`` that was not given a name."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)
    lease = Lease(store, renew_secs=0.05)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    with pytest.raises(ConfigError, match="another export"):
        Lease(store, renew_secs=0.3)
    lease.release()


def test_an_heir_that_died_before_it_wrote_the_lease_has_an_heir(store: Directory, monkeypatch) -> None:
    dead = Lease(store, renew_secs=600)
    dead._is_over.set()
    with monkeypatch.context() as patched:
        patched.setattr(Directory, "write", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output error"):
            Lease(store, lease_secs=0.3, renew_secs=0.1)
    lease = Lease(store, lease_secs=0.3, renew_secs=0.1)
    lease.refuse_if_lost()
    lease.release()
    assert store.fs.find("/out") == []


def test_a_lease_that_was_taken_away_is_noticed(store: Directory) -> None:
    lease = Lease(store, renew_secs=0.05)
    store.write(LEASE, msgspec.json.encode({"token": "x", "who": "a thief", "job": "", "renewed": 0}))
    lease._thread.join(10)
    with pytest.raises(CommitError, match="a thief has it"):
        lease.refuse_if_lost()
    lease.release()
    assert b"a thief" in store.read(LEASE), "what is another's is left alone"


def test_an_object_that_is_no_lease_is_named(store: Directory) -> None:
    store.write(LEASE, b"{")
    with pytest.raises(ConfigError, match=r"lease is no lease .*; remove it"):
        Lease(store)
