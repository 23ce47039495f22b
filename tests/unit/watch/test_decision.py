"""What ``watch`` does next, from what is there and what was tried."""

from __future__ import annotations

from typing import Any

import pytest

from dist_export.registry.versions import Current, Switch
from dist_export.watch.decision import Checkpoint, Decision, Failure, Rules, Seen, decide, key_of

RULES = Rules(base="latest", full_every=20, max_delta=0.3)
NOW = 1000.0
AT = "2026-01-01T00:00:00+00:00"


def current_of(*steps: int, base: str | None = None, num_deltas: int = 0) -> Current:
    """Return a directory whose newest version is of the first step."""
    switches = [Switch(version=f"v{step}", at=AT, step=step, base=base, num_deltas=num_deltas) for step in steps]
    return Current(
        version=f"v{steps[0]}", manifest_digest="", base=base, step=steps[0], created_at=AT, switches=tuple(switches)
    )


def seen_of(step: int | None, current: Current | None = None, **more: Any) -> Seen:
    checkpoint = None if step is None else Checkpoint(step=step, saved_at=1.0, stamp=f"stamp{step}")
    return Seen(checkpoint=checkpoint, current=current, **more)


def next_of(seen: Seen, failure: Failure | None = None, **rules: Any) -> Decision:
    its = Rules(**{name: getattr(RULES, name) for name in ("base", "full_every", "max_delta", "until_step")} | rules)
    return decide(seen, failure, its, now=NOW)


def test_the_first_version_is_a_full_package() -> None:
    assert next_of(seen_of(5)) == Decision(kind="export", step=5, is_full=True)


def test_a_later_checkpoint_is_a_delta() -> None:
    assert next_of(seen_of(6, current_of(5))) == Decision(kind="export", step=6, is_full=False)


@pytest.mark.parametrize(("num_deltas", "is_full"), [(0, False), (18, False), (19, True), (25, True)])
def test_every_nth_version_is_a_full_package(num_deltas: int, is_full: bool) -> None:
    current = current_of(5, base="v1", num_deltas=num_deltas)
    assert next_of(seen_of(6, current)).is_full == is_full


def test_after_a_full_package_the_deltas_are_counted_anew() -> None:
    deltas = current_of(5, base="v1", num_deltas=19).switches
    full = current_of(6)
    assert not next_of(
        seen_of(
            7,
            Current(version="v6", manifest_digest="", step=6, created_at=AT, switches=(*full.switches, *deltas)),
        )
    ).is_full


def test_full_every_1_writes_no_deltas() -> None:
    assert next_of(seen_of(6, current_of(5)), full_every=1, base=None).is_full
    assert next_of(seen_of(6, current_of(5)), full_every=1).is_full


@pytest.mark.parametrize(("share", "is_full"), [(0.3, False), (0.31, True)])
def test_after_a_large_delta_comes_a_full_package(share: float, is_full: bool) -> None:
    assert next_of(seen_of(6, current_of(5, base="v1"), last_share=share)).is_full == is_full


def test_a_base_that_the_settings_name_stays_the_base() -> None:
    current = current_of(5, base="v1", num_deltas=99)
    assert not next_of(seen_of(6, current, last_share=1.0), base="/serving/base").is_full


@pytest.mark.parametrize("current", [current_of(5), current_of(3, 5, 2)], ids=["current", "rolled back"])
def test_a_published_step_is_not_exported_again(current: Current) -> None:
    assert next_of(seen_of(5, current)) == Decision(kind="wait")


def test_an_earlier_step_than_the_current_one_waits_and_says_why() -> None:
    decision = next_of(seen_of(5, current_of(9)))
    assert decision.kind == "wait"
    assert "of step 5, and the current version, v9, of step 9" in decision.lines[0]


def test_without_a_checkpoint_it_waits() -> None:
    assert next_of(seen_of(None, problems=("none yet",))) == Decision(kind="wait", lines=("none yet",))


def test_what_cannot_be_read_is_not_exported() -> None:
    assert next_of(seen_of(5, is_readable=False)).kind == "wait"


def test_what_was_passed_over_is_reported_with_the_export() -> None:
    assert next_of(seen_of(5, problems=("7 is damaged",))).lines == ("7 is damaged",)


def test_a_failed_export_waits_until_something_changes() -> None:
    seen = seen_of(6, current_of(5))
    failure = Failure(key=key_of(seen), times=1, failed_at=NOW - 1)
    assert next_of(seen, failure).kind == "wait"
    assert next_of(seen_of(7, current_of(5)), failure).kind == "export"
    assert next_of(seen_of(6, current_of(4)), failure).kind == "export"
    written_again = Seen(checkpoint=Checkpoint(step=6, saved_at=2.0, stamp="another"), current=current_of(5))
    assert next_of(written_again, failure).kind == "export"


@pytest.mark.parametrize(("times", "secs"), [(1, 5), (2, 10), (3, 20), (7, 300), (10**6, 300)])
def test_a_failed_export_is_tried_again_less_and_less_often(times: int, secs: float) -> None:
    """A full disk or a store that is down is no change of a file."""
    seen = seen_of(6, current_of(5))
    assert next_of(seen, Failure(key=key_of(seen), times=times, failed_at=NOW - secs + 0.1)).kind == "wait"
    assert next_of(seen, Failure(key=key_of(seen), times=times, failed_at=NOW - secs)).kind == "export"


def test_it_ends_once_a_step_is_published() -> None:
    assert next_of(seen_of(9, current_of(5)), until_step=6).kind == "export"
    assert next_of(seen_of(9, current_of(6, 5)), until_step=6).kind == "end"
