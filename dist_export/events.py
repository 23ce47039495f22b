"""What an export did, for machines: JSON lines as it goes on, and Prometheus text at its end. Written by rank 0.

An event has ``time`` (UTC, RFC 3339), ``event`` and ``rank``, and by need ``stage``, ``step`` (of the training run), ``bytes``,
``seconds``, ``retries``, ``error``. Source of the text format: Prometheus, "Text-based format", version 0.0.4.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from dist_export.config import ExportConfig
from dist_export.disk import first_line
from dist_export.storage import Directory

logger = logging.getLogger(__name__)


class Events:
    """The events of one export. On rank 0 they go to a file; other ranks hand theirs in at the end."""

    def __init__(self, config: ExportConfig, export_dir: str, *, rank: int, step: int | None) -> None:
        """Write nothing yet. ``step``: of the training run, where one is known."""
        self._rank = rank
        self._url = _place_of(config, export_dir)
        self._options = config.options_of_target
        self._step = step
        self._lines: list[dict[str, Any]] = []
        self._is_told = False

    def add(self, event: str, **fields: Any) -> None:
        """Take down what has happened."""
        step = {} if self._step is None else {"step": self._step}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._lines.append({"time": stamp, "event": event, "rank": self._rank, **step, **fields})
        if self._rank == 0:
            self._write()

    def lines(self) -> list[dict[str, Any]]:
        """Return this rank's events."""
        return self._lines

    def take_in(self, others: Iterable[list[dict[str, Any]]]) -> None:
        """Add the events of other ranks."""
        for lines in others:
            self._lines += lines
        self._write()

    def _write(self) -> None:
        """Write all events anew: there are a few dozen. An export does not fail for want of its log, which is told once."""
        if not self._url:
            return
        folder, _, name = self._url.rpartition("/")
        data = b"".join(msgspec.json.encode(line) + b"\n" for line in self._lines)
        try:
            Directory(folder or ".", self._options).write(name, data)
        except Exception as error:  # noqa: BLE001 -- a store's own code may raise anything
            if not self._is_told:
                logger.warning("events cannot be written to %s: %s", self._url, first_line(error))
            self._is_told = True


def write_metrics(
    url: str, options: Mapping[str, Any], samples: Iterable[tuple[str, Mapping[str, str], float]]
) -> None:
    """Write samples (name, labels, value) as Prometheus text. Rank 0. A failure is told, and does not fail the export."""
    lines: list[str] = []
    for name, labels, value in sorted(samples, key=lambda sample: sample[0]):
        head = f"# TYPE {name} gauge"
        if head not in lines:
            lines.append(head)
        inner = ",".join(f'{label}="{_escape(text)}"' for label, text in labels.items())
        lines.append(f"{name}{{{inner}}} {value:.17g}" if inner else f"{name} {value:.17g}")
    folder, _, file = url.rpartition("/")
    try:
        Directory(folder or ".", dict(options)).write(file, ("\n".join(lines) + "\n").encode())
    except Exception as error:  # noqa: BLE001
        logger.warning("metrics cannot be written to %s: %s", url, first_line(error))


def samples_of(
    *,
    export_dir: str,
    seconds: Mapping[str, float],
    num_bytes: int,
    rows: Mapping[str, int],
    rank_bytes: Mapping[int, int],
    store: Mapping[str, int],
) -> list[tuple[str, Mapping[str, str], float]]:
    """Return the figures of an export that succeeded; ``store`` is what all ranks exchanged with an object store."""
    package = {"package": export_dir}
    samples: list[tuple[str, Mapping[str, str], float]] = [
        ("dist_export_success", package, 1.0),
        ("dist_export_finished_timestamp_seconds", package, time.time()),
        ("dist_export_package_bytes", package, float(num_bytes)),
    ]
    samples += [("dist_export_stage_seconds", {**package, "stage": name}, value) for name, value in seconds.items()]
    samples += [("dist_export_rows", {**package, "table": name}, float(value)) for name, value in rows.items()]
    samples += [
        ("dist_export_moved_bytes", {**package, "rank": str(rank)}, float(value)) for rank, value in rank_bytes.items()
    ]
    samples += [(f"dist_export_store_{name}", package, float(value)) for name, value in store.items()]
    return samples


def failure_of(export_dir: str) -> list[tuple[str, Mapping[str, str], float]]:
    """Return the figures of an export that failed."""
    package = {"package": export_dir}
    return [
        ("dist_export_success", package, 0.0),
        ("dist_export_finished_timestamp_seconds", package, time.time()),
    ]


def _place_of(config: ExportConfig, export_dir: str) -> str:
    if config.events is True:
        return f"{export_dir.rstrip('/')}.events.jsonl"
    return config.events or ""


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
