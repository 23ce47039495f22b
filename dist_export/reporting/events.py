"""Report an export to machines: events as JSON lines while it runs, and Prometheus text at its end. Rank 0 writes both.

An event has ``time`` (UTC, RFC 3339), ``event``, ``rank``, ``attempt``, ``step`` of the training run if it is known, and the
fields in :data:`EVENTS`. Source of the text format: Prometheus, "Text-based format", version 0.0.4.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from dist_export.config.needs import EventSettings
from dist_export.manifest import Manifest
from dist_export.redact import first_line, redact_text
from dist_export.storage.urls import open_directory

logger = logging.getLogger(__name__)

EVENTS = {
    "started": "source, export_dir, world_size",
    "stage": "stage, seconds",
    "moved": "bytes, units, helped, seconds, retries",
    "table": "table, rows, dropped, bytes",
    "drift": "output, max_abs, mean_abs, pairs, pairs_swapped, not_finite",
    "drift_not_measured": "reason",
    "registered": "uri",
    "committed": "bytes, digest",
    "published": "version, is_delta, seconds, changed, new, deleted",
    "failed": "error, exit_code",
}
"""The fields of each event."""

METRICS = {
    "dist_export_success": "Whether the last attempt that got to work succeeded: 1 or 0.",
    "dist_export_finished_timestamp_seconds": "When the last attempt that got to work ended, in Unix time.",
    "dist_export_package_bytes": "Size of all files of the package.",
    "dist_export_stage_seconds": "Duration of a stage on rank 0.",
    "dist_export_rows": "Rows of a table in the package.",
    "dist_export_dropped_rows": "Rows of a table that were left behind, by reason.",
    "dist_export_moved_bytes": "Bytes of shards that a rank wrote.",
    "dist_export_current_saved_timestamp_seconds": "When the save of the current version's checkpoint ended, in Unix time.",
    "dist_export_publish_seconds": "From the end of a checkpoint's save until its version was current.",
    "dist_export_published_versions": "Versions that this process has published.",
    "dist_export_delta_rows": "Rows of a delta against its base, by change; 0 for a full package.",
    "dist_export_store_requests": "Requests of all ranks to an S3 store.",
    "dist_export_store_retries": "Requests to an S3 store that were tried again.",
    "dist_export_store_downloaded_bytes": "Bytes that all ranks read from an S3 store.",
    "dist_export_store_uploaded_bytes": "Bytes that all ranks wrote to an S3 store.",
    "dist_export_store_copied_bytes": "Bytes that an S3 store copied on its own.",
}
"""The meaning of each metric. All are gauges: each export sets them again, and they do not add up over exports."""

_IN_BYTES = ("downloaded", "uploaded", "copied")

Sample = tuple[str, Mapping[str, str], float]
"""Name, labels, value."""


class Events:
    """The events of one export. Rank 0 writes them to a file, and gets those of other ranks at the end."""

    def __init__(self, config: EventSettings, export_dir: str, *, rank: int, step: int | None) -> None:
        """Set up without writing. ``step``: the step of the training run; None if it is not known."""
        self._rank = rank
        self._url = _place_of(config, export_dir)
        self._options = config.options_of_target
        self._step = step
        self._lines: list[dict[str, Any]] = []
        self._is_told = False
        self._before: bytes | None = None
        """The content of the file from earlier attempts; None before it is read."""

    def add(self, event: str, **fields: Any) -> None:
        """Add an event, one of :data:`EVENTS`. Rank 0 also writes the file."""
        step = {} if self._step is None else {"step": self._step}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        told = {name: redact_text(value) if isinstance(value, str) else value for name, value in fields.items()}
        self._lines.append({"time": stamp, "event": event, "rank": self._rank, **step, **told})
        if self._rank == 0:
            self._write()

    def lines(self) -> list[dict[str, Any]]:
        """Return this rank's events."""
        return self._lines

    def take_in(self, others: Iterable[list[dict[str, Any]]]) -> None:
        """Add the events of other ranks, and write the file."""
        for lines in others:
            self._lines += lines
        self._write()

    def _write(self) -> None:
        """Write all events again; there are only a few dozen. If this fails, it logs one warning, and the export continues."""
        if not self._url:
            return
        folder, _, name = self._url.rpartition("/")
        try:
            # a link in the path is the user's choice. A link to the file itself is replaced, as for all written files
            directory = open_directory(folder or ".", self._options, follow_links=True)
            if self._before is None:
                self._before = directory.read(name) if directory.exists(name) else b""
            begin = self._before + (b"\n" if self._before and not self._before.endswith(b"\n") else b"")
            attempt = {"attempt": begin.count(b'"event":"started"') + 1}
            directory.write(name, begin + b"".join(msgspec.json.encode(line | attempt) + b"\n" for line in self._lines))
        except Exception as error:  # noqa: BLE001 -- a store's own code may raise anything
            if not self._is_told:
                logger.warning("events cannot be written to %s: %s", self._url, first_line(error))
            self._is_told = True


def write_metrics(url: str, options: Mapping[str, Any], samples: Iterable[Sample]) -> None:
    """Write samples as Prometheus text. Rank 0. If this fails, it logs a warning, and the export does not fail."""
    lines: list[str] = []
    last = None
    for name, labels, value in sorted(samples, key=lambda sample: sample[0]):
        if name != last:
            lines += [f"# HELP {name} {METRICS[name]}", f"# TYPE {name} gauge"]
        last = name
        inner = ",".join(f'{label}="{_escape(text)}"' for label, text in labels.items())
        lines.append(f"{name}{{{inner}}} {value:.17g}" if inner else f"{name} {value:.17g}")
    folder, _, file = url.rpartition("/")
    try:
        open_directory(folder or ".", dict(options)).write(file, ("\n".join(lines) + "\n").encode())
    except Exception as error:  # noqa: BLE001
        logger.warning("metrics cannot be written to %s: %s", url, first_line(error))


def samples_of(
    manifest: Manifest, *, export_dir: str, seconds: Mapping[str, float], rank_bytes: Mapping[int, int]
) -> list[Sample]:
    """Return the samples of an export that succeeded."""
    package = {"package": redact_text(export_dir)}
    samples: list[Sample] = [
        ("dist_export_success", package, 1.0),
        ("dist_export_finished_timestamp_seconds", package, time.time()),
        ("dist_export_package_bytes", package, float(manifest.num_bytes)),
    ]
    samples += [("dist_export_stage_seconds", {**package, "stage": name}, value) for name, value in seconds.items()]
    for table in manifest.tables:
        labels = {**package, "table": table.name}
        samples.append(("dist_export_rows", labels, float(table.rows_out)))
        samples += [
            ("dist_export_dropped_rows", {**labels, "reason": reason}, float(rows))
            for reason, rows in table.rows_dropped.items()
        ]
    samples += [
        ("dist_export_moved_bytes", {**package, "rank": str(rank)}, float(value)) for rank, value in rank_bytes.items()
    ]
    store = manifest.run.get("store")  # no digest covers ``run``, so in an existing package it may hold anything
    for name, value in store.items() if isinstance(store, dict) else ():
        if not isinstance(value, int | float):
            continue
        unit = "_bytes" if name in _IN_BYTES else ""
        samples.append((f"dist_export_store_{name}{unit}", package, float(value)))
    return samples


def failure_of(export_dir: str) -> list[Sample]:
    """Return the samples of an export that failed."""
    package = {"package": redact_text(export_dir)}
    return [
        ("dist_export_success", package, 0.0),
        ("dist_export_finished_timestamp_seconds", package, time.time()),
    ]


def _place_of(config: EventSettings, export_dir: str) -> str:
    if config.events is True:
        return f"{export_dir.rstrip('/')}.events.jsonl"
    return config.events or ""


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
