"""What ``watch`` does next: a pure function of what is there, what was tried, and the rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_export.config.sparse_settings import LATEST
from dist_export.registry.versions import Current

_FIRST_RETRY_SECS = 5.0
_MAX_RETRY_SECS = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Options of ``watch`` that shape its decisions."""

    base: str | None
    """The setting: latest, a package, or None for full packages only."""
    full_every: int
    max_delta: float
    until_step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The latest complete checkpoint of the run."""

    step: int
    saved_at: float
    """When its save ended, in Unix time, as far as its files tell."""
    stamp: str
    """Changes when one of its files does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is there now."""

    checkpoint: Checkpoint | None = None
    current: Current | None = None
    last_share: float = 0.0
    """Rows of the current version, if that is a delta, as a share of those of its base."""
    problems: tuple[str, ...] = ()
    """What is in the way, or was passed over: one line each."""
    is_readable: bool = True
    """False if the run or ``current.json`` cannot be read now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An export that failed."""

    key: str
    """Of what was exported and where to, as :func:`key_of` returns it."""
    times: int
    failed_at: float
    """On the monotonic clock."""

    @property
    def retry_at(self) -> float:
        """When it is tried again though nothing has changed: a full disk is no change of the checkpoint."""
        return self.failed_at + min(_FIRST_RETRY_SECS * 2.0 ** min(self.times - 1, 10), _MAX_RETRY_SECS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What comes next."""

    kind: Literal["export", "wait", "end"]
    step: int = 0
    """The step to export."""
    is_full: bool = False
    lines: tuple[str, ...] = ()
    """For people. The caller says each once."""


def decide(seen: Seen, failure: Failure | None, rules: Rules, *, now: float) -> Decision:
    """Decide what comes next. ``now`` is on the monotonic clock."""
    current, checkpoint = seen.current, seen.checkpoint
    published = {switch.step for switch in current.switches} if current is not None else set()
    if rules.until_step is not None and any(step is not None and step >= rules.until_step for step in published):
        return Decision(kind="end", lines=(*seen.problems, f"step {rules.until_step:,} is published"))
    if not seen.is_readable or checkpoint is None:
        return Decision(kind="wait", lines=seen.problems)
    step = checkpoint.step
    if step in published:
        return Decision(kind="wait", lines=seen.problems)
    if current is not None and current.step is not None and step < current.step:
        line = (
            f"the latest complete checkpoint is of step {step:,}, and the current version, {current.version}, of step "
            f"{current.step:,}: waiting for a later checkpoint, or for a rollback to an earlier version"
        )
        return Decision(kind="wait", lines=(*seen.problems, line))
    if failure is not None and failure.key == key_of(seen) and now < failure.retry_at:
        return Decision(kind="wait", lines=seen.problems)
    return Decision(kind="export", step=step, is_full=is_full_next(seen, rules), lines=seen.problems)


def key_of(seen: Seen) -> str:
    """Return what identifies an export: the same key again fails for the same reason."""
    current = "" if seen.current is None else f"{seen.current.version} {seen.current.created_at}"
    return "" if seen.checkpoint is None else f"{seen.checkpoint.stamp} {current}"


def is_full_next(seen: Seen, rules: Rules) -> bool:
    """Whether the next version is a full package."""
    current = seen.current
    if rules.base != LATEST:
        return rules.base is None  # one package for all deltas is the user's choice
    if current is None:
        return True
    num_deltas = current.count_deltas(current.base or current.version)
    return num_deltas + 1 >= rules.full_every or seen.last_share > rules.max_delta
