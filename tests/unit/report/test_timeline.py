"""The timeline from events and from the manifest; both may hold anything."""

from __future__ import annotations

from typing import Any

import pytest

from dist_export.report.timeline import Bar, Timeline, describe_timeline


def event(name: str, second: int, **fields: Any) -> dict[str, Any]:
    return {"time": f"2026-11-30T08:00:{second:02}Z", "event": name, "rank": 0, "attempt": 1, **fields}


def timeline(lines: list[Any], run: dict[str, Any] | None = None, why_not: str = "") -> Timeline:
    return describe_timeline(run or {}, lines, digest="xxh3:1", where="out.events.jsonl", why_not=why_not)


RUN = {
    "seconds": {"read": 1.5, "transfer": 8.0},
    "ranks": [{"rank": 0, "seconds": 7.9}, {"rank": 1, "seconds": 6.12345}],
}


def test_events_say_when_each_stage_ran_on_each_rank() -> None:
    lines = [
        event("started", 10),
        event("stage", 14, stage="read", seconds=3.5),
        event("stage", 20, stage="transfer", seconds=6.0, rank=1),
        event("committed", 22, digest="xxh3:1"),
    ]
    found = timeline(lines, RUN)
    assert found.bars == [Bar(0, "read", 0.5, 3.5), Bar(1, "transfer", 4.0, 6.0)]
    assert found.text.startswith("From out.events.jsonl")


def test_only_the_run_that_committed_this_package_counts() -> None:
    lines = [
        event("started", 1),
        event("stage", 2, stage="read", seconds=1.0),
        event("committed", 3, digest="xxh3:other"),
        event("started", 10, attempt=2),
        event("stage", 12, stage="plan", seconds=1.0, attempt=2),
        event("committed", 13, digest="xxh3:1", attempt=2),
    ]
    assert timeline(lines).bars == [Bar(0, "plan", 1.0, 1.0)]
    found = timeline(lines[:3], RUN)
    assert "it has no stage of this package's run" in found.text
    assert {bar.stage for bar in found.bars} == {"read", "transfer"}


def test_without_events_the_manifest_has_durations_alone_and_the_text_says_so() -> None:
    found = timeline([], RUN, why_not="there is no such file")
    assert found.bars == [Bar(0, "read", 0.0, 1.5), Bar(0, "transfer", 0.0, 8.0), Bar(1, "transfer", 0.0, 6.123)]
    assert (
        "is not recorded by out.events.jsonl (there is no such file; the setting events: true writes it)" in found.text
    )


def test_nothing_recorded_is_said() -> None:
    found = timeline([], {}, why_not="there is no such file")
    assert found == Timeline(
        [], "Not recorded: neither by the manifest nor by out.events.jsonl (there is no such file)."
    )


@pytest.mark.parametrize(
    "odd",
    [
        7,
        None,
        [],
        event("stage", 3, stage="x", seconds="1"),
        event("stage", 3, stage="x", seconds=-1.0),
        event("stage", 3, stage="x", seconds=float("inf")),
        event("stage", 3, stage="x", seconds=True),
        event("stage", 3, stage=["x"], seconds=1.0),
        event("stage", 3, stage="x", seconds=1.0, rank="0"),
        {**event("stage", 3, stage="x", seconds=1.0), "time": "noon"},
        {**event("stage", 3, stage="x", seconds=1.0), "time": 5},
    ],
)
def test_odd_events_are_left_out(odd: Any) -> None:
    lines = [
        event("started", 1),
        event("stage", 2, stage="read", seconds=1.0),
        odd,
        event("committed", 9, digest="xxh3:1"),
    ]
    assert timeline(lines).bars == [Bar(0, "read", 0.0, 1.0)]


ODD_RUNS = [{"seconds": 5, "ranks": "x"}, {"seconds": {"read": None}, "ranks": [1, {}, {"rank": "1", "seconds": 1}]}]


@pytest.mark.parametrize("run", ODD_RUNS)
def test_an_odd_run_section_gives_no_bars(run: dict[str, Any]) -> None:
    assert timeline([], run).bars == []
