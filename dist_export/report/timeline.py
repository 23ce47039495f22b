"""The run's timeline by rank and stage, from its events, else as far as the manifest has it. Pure.

No digest covers either of them, so they may hold anything: what has another type than it should is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeGuard

_LONGEST_SECS = 1e9


class Bar(NamedTuple):
    """One stage on one rank."""

    rank: int
    stage: str
    start: float
    """Seconds after the beginning of the run; 0 where that is not recorded."""
    seconds: float


class Timeline(NamedTuple):
    """The bars, and in words what they are."""

    bars: list[Bar]
    text: str


def describe_timeline(
    run: Mapping[str, Any], lines: Sequence[Any], *, digest: str, where: str, why_not: str
) -> Timeline:
    """Return the timeline of the export that committed the package with this digest.

    Args:
        run: the section of the manifest of that name.
        lines: the lines of the events file, parsed; none if there is none.
        digest: the digest of the package.
        where: the path of the events file.
        why_not: why there are no lines.
    """
    events = _events_of_run([line for line in lines if isinstance(line, dict)], digest)
    began = next((_seconds_of(event.get("time")) for event in events if event.get("event") == "started"), None)
    bars = [] if began is None else [bar for event in events if (bar := _bar_of(event, began)) is not None]
    if bars:
        return Timeline(
            sorted(bars, key=lambda bar: (bar.rank, bar.start)),
            f"From {where}, which has the end of a stage to the second.",
        )
    bars = [*_stages_of_manifest(run), *_ranks_of_manifest(run)]
    why = why_not or "it has no stage of this package's run"
    if not bars:
        return Timeline([], f"Not recorded: neither by the manifest nor by {where} ({why}).")
    return Timeline(
        bars,
        f"When a stage began is not recorded by {where} ({why}; the setting events: true writes it). From the manifest: how "
        "long the stages took on rank 0, and the transfer on each rank. Each bar begins at 0.",
    )


def _events_of_run(events: Sequence[Mapping[str, Any]], digest: str) -> list[Mapping[str, Any]]:
    """Return the events of the last run that committed this package."""
    numbers = [
        event.get("attempt") for event in events if event.get("event") == "committed" and event.get("digest") == digest
    ]
    return [event for event in events if event.get("attempt") == numbers[-1]] if numbers else []


def _bar_of(event: Mapping[str, Any], began: float) -> Bar | None:
    end, seconds, rank, stage = (event.get(name) for name in ("time", "seconds", "rank", "stage"))
    ended = _seconds_of(end)
    if event.get("event") != "stage" or ended is None or not _is_duration(seconds) or not isinstance(stage, str):
        return None
    if not isinstance(rank, int) or isinstance(rank, bool):
        return None
    return Bar(rank, stage, round(max(0.0, ended - began - seconds), 3), seconds)


def _stages_of_manifest(run: Mapping[str, Any]) -> Iterable[Bar]:
    seconds = run.get("seconds")
    for stage, took in seconds.items() if isinstance(seconds, dict) else ():
        if _is_duration(took):
            yield Bar(0, str(stage), 0.0, took)


def _ranks_of_manifest(run: Mapping[str, Any]) -> Iterable[Bar]:
    ranks = run.get("ranks")
    for share in ranks if isinstance(ranks, list) else ():
        rank, took = (share.get("rank"), share.get("seconds")) if isinstance(share, dict) else (None, None)
        if isinstance(rank, int) and rank > 0 and _is_duration(took):
            yield Bar(rank, "transfer", 0.0, round(took, 3))


def _is_duration(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LONGEST_SECS


def _seconds_of(text: Any) -> float | None:
    """Return the Unix time of a stamp such as 2026-11-30T08:02:17Z; None if it is none."""
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except (AttributeError, TypeError, ValueError, OverflowError):
        return None
