"""Figures as Markdown tables, and what they rest on as JSON."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

HOW_TO_READ = """\
How to read the tables. Each contender runs in fresh processes that have imported what they need; timed is the work
alone, from the common start to the end of the slowest rank. One run of each is discarded, then all contenders run once
in every round. `time / limit` is the median over the rounds of its seconds over those of the limit in the same round,
with least and greatest; the limit is the fastest of cp, sendfile and copy_file_range, with as many writers as the
contender has ranks, copying files that hold nothing but the kept bytes. Every contender and the limit sync each file:
dist_export does so of itself, for the others the harness does it within the timed work (on tmpfs a sync costs nothing).
Where a file system can share blocks between files (btrfs, xfs) a copy shares them and is no limit. The sources
lie in the page cache where it has room. Memory is the highest above what the process had after its imports
(torch among them), of the rank that used most: anonymous, and mapped (files and shared memory). GB and MB are decimal."""


class Spread(NamedTuple):
    """A median with the least and the greatest."""

    median: float
    least: float
    greatest: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.least:.3f}-{self.greatest:.3f})"


def spread(values: Iterable[float]) -> Spread:
    """Return the median, the least and the greatest of some values."""
    found = list(values)
    return Spread(statistics.median(found), min(found), max(found))


def seconds_of(result: dict[str, Any], label: str) -> list[float]:
    """Return a contender's seconds, by round."""
    return [found["contenders"][label]["seconds"] for found in result["rounds"]]


def limits_of(result: dict[str, Any], writers: int) -> list[float]:
    """Return the seconds of the fastest copy with so many writers, by round; empty where there was no limit."""
    return [min(found["limits"][str(writers)].values()) for found in result["rounds"] if found["limits"]]


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Return the spread of the ratios of two contenders, round by round."""
    return spread(a / b for a, b in zip(above, below, strict=True))


def summarize(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return for each contender of a case its figures: seconds, ratios, bytes."""
    summaries = []
    for contender in result["contenders"]:
        label = contender["label"]
        runs = [found["contenders"][label] for found in result["rounds"]]
        seconds, limits = seconds_of(result, label), limits_of(result, contender["writers"])
        reference = result["reference"]
        summary: dict[str, Any] = {
            "label": label,
            "seconds": spread(seconds),
            "to_limit": ratios(seconds, limits) if limits else None,
            "to_reference": ratios(seconds, seconds_of(result, reference)) if reference else None,
            "gigabytes_per_second": result["kept_bytes"] / 1e9 / statistics.median(seconds),
            "peak_anonymous": max(run["peak_anonymous"] for run in runs),
            "peak_mapped": max(run["peak_mapped"] for run in runs),
            "read_bytes": max(run["read_bytes"] for run in runs),
        }
        summaries.append(summary)
    return summaries


def render_case(result: dict[str, Any]) -> str:
    """Return a case as a Markdown table."""
    summaries = summarize(result)
    reference = result["reference"]
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("contender", lambda row: row["label"]),
        ("seconds", lambda row: f"{row['seconds'].median:.3f}"),
    ]
    if summaries[0]["to_limit"] is not None:
        columns.append(("time / limit", lambda row: str(row["to_limit"])))
    if reference:
        columns.append((f"time / {reference}", lambda row: str(row["to_reference"])))
    columns += [
        ("GB/s", lambda row: f"{row['gigabytes_per_second']:.2f}"),
        ("anonymous MB", lambda row: f"{row['peak_anonymous'] / 1e6:.0f}"),
        ("mapped MB", lambda row: f"{row['peak_mapped'] / 1e6:.0f}"),
    ]
    title = f"{result['case']}: {result['kept_bytes'] / 1e9:.3g} GB kept, {result['num_shards']} shards out"
    lines = [
        f"\n### {title}, {result['where']}\n",
        *render_table([name for name, _ in columns], [[cell(row) for _, cell in columns] for row in summaries]),
    ]
    writers = sorted({contender["writers"] for contender in result["contenders"]})
    for number in writers:
        limits = limits_of(result, number)
        if limits:
            fastest = [
                min(found["limits"][str(number)].items(), key=lambda item: item[1])[0] for found in result["rounds"]
            ]
            ways = ", ".join(sorted(set(fastest)))
            lines.append(f"\nlimit, {number} writer{'s' * (number > 1)}: {spread(limits)} s, by {ways}")
    lines += [
        f"\n{_tell_faster(row['to_reference'].median, row['label'])}"
        for row in summaries
        if row["label"].startswith("peer: ")
    ]
    return "\n".join(lines)


def _tell_faster(ratio: float, peer: str) -> str:
    """Say who is faster, from the peer's seconds over those of dist_export with one rank and digests."""
    name = peer.removeprefix("peer: ")
    if ratio >= 1:
        return f"dist_export (1 rank, digests) is {ratio:.2f} x faster than {name}"
    return f"{name} is {1 / ratio:.2f} x faster than dist_export (1 rank, digests)"


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first column is text, the others are numbers."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width) if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return [line(header), line(rule), *(line(row) for row in rows)]


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float, float]:
    """Return slope, intercept, R squared and the worst relative deviation of the least-squares line through points."""
    import numpy as np

    slope, intercept = np.polyfit(x, y, 1)
    fitted = slope * np.asarray(x) + intercept
    rest = float(((np.asarray(y) - fitted) ** 2).sum())
    total = float(((np.asarray(y) - np.mean(y)) ** 2).sum())
    worst = float((np.abs(np.asarray(y) - fitted) / np.asarray(y)).max())
    return float(slope), float(intercept), 1 - rest / total if total else 1.0, worst


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    with open("/proc/meminfo", encoding="ascii") as file:
        memory = int(file.readline().split()[1]) << 10
    names = ("dist_export", "torch", "numpy", "safetensors")
    return {
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
