"""What the user sees: bytes of all ranks while they are moved, and the closing summary."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from dist_export import progress
from dist_export.amounts import amount
from dist_export.collective import join
from dist_export.progress import Reporter


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (5 * 10**12, "5.0 TB")]
)
def test_amounts_are_for_people(num_bytes: int, text: str) -> None:
    assert amount(num_bytes) == text


def test_a_log_gets_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "_LOG_EVERY_SECS", 0.02)
    with join(timeout_secs=1) as ranks, caplog.at_level(logging.INFO):
        reporter = Reporter(ranks, is_shown=True)
        reporter.count_bytes(500)  # another rank may be faster than rank 0's display
        with reporter.transferring(2000):
            wait_for(lambda: "shards: 500 B of 2.0 kB" in caplog.text)
            reporter.count_bytes(1500)
            wait_for(lambda: "shards: 2.0 kB of 2.0 kB" in caplog.text)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(force_terminal=True, record=True, width=100)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with join(timeout_secs=1) as ranks:
        reporter = Reporter(ranks, is_shown=True)
        with reporter.transferring(2000):
            reporter.count_bytes(1000)
            wait_for(lambda: "1.0/2.0 kB" in console.export_text(clear=False))


def wait_for(happened: Callable[[], bool]) -> None:
    """Wait until it has, however busy the machine is; fail after ten seconds."""
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_other_ranks_and_embedded_exports_show_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with join(timeout_secs=1) as ranks, caplog.at_level(logging.INFO), Reporter(ranks, is_shown=False).transferring(10):
        time.sleep(0.05)
    assert not caplog.records
