"""Which errors of a store pass by themselves, and how long a request is tried for."""

from __future__ import annotations

import errno
import socket

import pytest

from dist_export.storage import retry
from dist_export.storage.retry import is_transient, with_retries
from dist_export.storage.traffic import TRAFFIC


class ClientError(Exception):
    """As botocore's."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class ReadTimeoutError(Exception):
    """As botocore's."""


def translated(cause: Exception, number: int = errno.EIO) -> OSError:
    error = OSError(number, "something")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (translated(ClientError(503, "SlowDown"), errno.EBUSY), True),
        (translated(ClientError(500, "InternalError")), True),
        (translated(ClientError(400, "RequestTimeout")), True),
        (translated(ClientError(404, "NoSuchKey")), False),
        (translated(ClientError(403, "AccessDenied")), False),
        (translated(ClientError(412, "PreconditionFailed")), False),
        (ReadTimeoutError(), True),
        (ConnectionResetError(), True),
        (translated(ReadTimeoutError()), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError(), False),
    ],
)
def test_what_is_tried_again(error: Exception, expected: bool) -> None:
    assert is_transient(error) is expected


class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        monkeypatch.setattr(retry.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(retry.time, "sleep", self.sleep)

    def sleep(self, secs: float) -> None:
        self.pauses.append(secs)
        self.now += secs


def test_pauses_grow_and_span_a_restart(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    before = TRAFFIC.snapshot()

    def fail(_: bool) -> None:
        raise ConnectionRefusedError

    with pytest.raises(ConnectionRefusedError):
        with_retries(fail, "somewhere")
    assert clock.now > 20
    assert clock.now < 70
    assert max(clock.pauses[:2]) < 0.5
    assert len(clock.pauses) < 40
    moved = TRAFFIC.since(before)
    assert moved["requests"] == len(clock.pauses) + 1
    assert moved["retries"] == len(clock.pauses)


def test_a_try_that_takes_for_ever_is_not_the_only_one(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    tries = []

    def hang(_: bool) -> None:
        tries.append(clock.now)
        clock.now += 120
        raise TimeoutError

    with pytest.raises(TimeoutError):
        with_retries(hang, "somewhere")
    assert len(tries) == 3


def test_what_does_not_pass_is_not_tried_again(monkeypatch) -> None:
    clock = Clock(monkeypatch)

    def fail(_: bool) -> None:
        raise FileNotFoundError

    with pytest.raises(FileNotFoundError):
        with_retries(fail, "somewhere")
    assert clock.pauses == []


@pytest.mark.parametrize(
    ("number", "is_known", "is_short"),
    [
        (socket.EAI_NONAME, False, True),
        (socket.EAI_NONAME, True, False),  # a name service may lose a name for a moment
        (socket.EAI_AGAIN, False, False),  # it does not answer itself
    ],
)
def test_a_host_that_nobody_knows(number: int, is_known: bool, is_short: bool, monkeypatch) -> None:
    """It is a mistake, and no minute is waited, only where the store has never answered and the name service has."""
    clock = Clock(monkeypatch)

    def fail(_: bool) -> None:
        raise ConnectionError from socket.gaierror(number, "no")

    with pytest.raises(ConnectionError):
        with_retries(fail, "somewhere", is_known=is_known)
    assert len(clock.pauses) >= retry.LEAST_RETRIES
    assert (clock.now < 2) is is_short
    assert (clock.now > 20) is not is_short


def test_a_request_learns_that_it_was_made_before(monkeypatch) -> None:
    Clock(monkeypatch)
    told = []

    def fail_once(is_again: bool) -> str:
        told.append(is_again)
        if not is_again:
            raise TimeoutError
        return "done"

    assert with_retries(fail_once, "somewhere") == "done"
    assert told == [False, True]
