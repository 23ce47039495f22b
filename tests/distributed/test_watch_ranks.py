"""``watch`` as processes: on several ranks, with SIGTERM and Ctrl-C between exports and within one, and a start anew."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dist_export
from tests.integration.test_watch import assert_is_served, save, state_of
from tests.support.distributed import crash
from tests.support.distributed.crash import launcher, ranks_of, wait_for_mark

pytestmark = pytest.mark.distributed

SECS = 60.0


@contextlib.contextmanager
def watching(
    folder: Path, *, world_size: int = 1, more: tuple[str, ...] = (), warm_launcher: bool = False, **pause: str
) -> Iterator[Any]:
    run, where = str(folder / "run"), str(folder / "serving")
    arguments = ["watch", "--ckpt_dir", run, "--publish", where, "--poll_secs", "0.1", "--progress=false", *more]
    process = crash.start([*launcher(world_size), crash.SCRIPT, *arguments], warm_launcher=warm_launcher, **pause)
    try:
        yield process
    finally:
        for pid in ranks_of(folder / "serving"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate()


def wait_for_step(folder: Path, step: int, process: Any) -> None:
    path, deadline = folder / "serving" / "current.json", time.monotonic() + SECS
    while not path.exists() or json.loads(path.read_text())["step"] != step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_is_current(folder: Path, step: int) -> None:
    with dist_export.open_package(f"versions:{folder / 'serving'}") as package:
        assert_is_served(package, state_of(step))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_between_exports_ends_it_at_once(tmp_path: Path, number: signal.Signals, code: int) -> None:
    save(tmp_path / "run", 1)
    with watching(tmp_path) as process:
        wait_for_step(tmp_path, 1, process)
        time.sleep(0.5)
        started = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=SECS)
        assert time.monotonic() - started < 3
    assert process.returncode == code
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert ("stopped by SIGTERM" if code == 0 else "interrupted in '") in last
    assert_is_current(tmp_path, 1)


@pytest.mark.parametrize("at", ["unit", "check the shards", "write the small files"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_within_an_export_publishes_nothing_and_the_next_start_goes_on(
    tmp_path: Path, at: str, number: signal.Signals, code: int
) -> None:
    save(tmp_path / "run", 1)
    mark = tmp_path / "mark"
    with watching(tmp_path, PAUSE_AT=at, PAUSE_MARK=str(mark), PAUSE_SECS="1.5") as process:
        assert wait_for_mark(mark, [process])
        process.send_signal(number)
        _, errors = process.communicate(timeout=SECS)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert not (tmp_path / "serving" / "current.json").exists()
    assert not list(tmp_path.rglob("manifest.json"))
    with watching(tmp_path, more=("--until_step", "1")) as process:
        _, errors = process.communicate(timeout=SECS)
    assert process.returncode == 0, errors
    assert_is_current(tmp_path, 1)
    assert len(list((tmp_path / "serving" / "versions").iterdir())) == 1


def test_two_ranks_export_one_checkpoint_after_the_other(tmp_path: Path) -> None:
    """A failed export in between ends none of them."""
    save(tmp_path / "run", 1)
    events = tmp_path / "events.jsonl"
    more = ("--until_step", "4", "--events", str(events))
    with watching(tmp_path, world_size=2, more=more, warm_launcher=True) as process:
        wait_for_step(tmp_path, 1, process)
        save(tmp_path / "run", 2)
        wait_for_step(tmp_path, 2, process)
        assert_is_current(tmp_path, 2)
        save(tmp_path / "run", 3, has_duplicate=True)
        deadline = time.monotonic() + SECS
        while '"event":"failed"' not in events.read_text().replace('": "', '":"'):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        save(tmp_path / "run", 4)
        _, errors = process.communicate(timeout=SECS)
    assert process.returncode == 0, errors
    assert errors.count("step 3 is not published") == 1
    assert_is_current(tmp_path, 4)


def test_sigterm_ends_two_ranks(tmp_path: Path) -> None:
    save(tmp_path / "run", 1)
    with watching(tmp_path, world_size=2) as process:
        wait_for_step(tmp_path, 1, process)
        time.sleep(0.5)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=SECS)
        assert time.monotonic() - started < 10
    assert "stopped by SIGTERM" in errors
    assert not ranks_of(tmp_path / "serving")
    assert_is_current(tmp_path, 1)
