"""What the progress display shows: the state of an export at one moment, as text."""

from __future__ import annotations

from typing import Any, NamedTuple

from dist_export.humanize import amount


class Moment(NamedTuple):
    """The state of an export at one moment. The bytes are those of all ranks."""

    stage: str
    step: str
    """The current step of the stage, as the ranks name it."""
    secs: float
    """Seconds since the stage began."""
    done: int = 0
    total: int = 0
    """Zero if no bytes are being moved."""
    speed: float = 0.0
    """Bytes a second; zero if none were moved recently."""


def describe_moment(moment: Moment) -> str:
    """Return a moment as text, without its bar."""
    if not moment.total:
        return f"{_describe_stage(moment)}, {_describe_secs(moment.secs)}"
    if moment.done >= moment.total:
        return f"shards: all {amount(moment.total)} done; {_describe_stage(moment)}, {_describe_secs(moment.secs)}"
    speed = ""
    if moment.speed:
        left = _describe_secs((moment.total - moment.done) / moment.speed)
        speed = f", {amount(round(moment.speed))}/s, {left} left"
    beside = "" if moment.stage == "transfer" else f"; {moment.stage}, {_describe_secs(moment.secs)}"
    return f"shards: {amount(moment.done)} of {amount(moment.total)}{speed}{beside}"


def _describe_stage(moment: Moment) -> str:
    if moment.total and moment.stage != "transfer":
        return moment.stage  # the step belongs to the transfer, which runs beside this stage
    return moment.step if moment.step.startswith(moment.stage) else f"{moment.stage}: {moment.step}"


def _describe_secs(secs: float) -> str:
    if secs < 60:
        return f"{secs:.0f} s"
    return f"{int(secs) // 60} min {int(secs) % 60} s"


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal. Programs put all kinds of objects into ``sys.stderr``."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # there is no stream or no such method, or the stream is closed
        return False
