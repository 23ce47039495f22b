"""What the watchdogs of the ranks tell each other through the job's store."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from dist_export.runtime.process_identity import Identity


class Store(Protocol):
    """What is asked of the job's store. Every call may raise RuntimeError when it is gone."""

    def set(self, key: str, value: str) -> Any:
        """Set a key."""

    def get(self, key: str) -> bytes:
        """Return a key's value, of one that is known to be there."""

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys are there."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set a key if it has the expected value, or none and ``expected`` is empty; return what it has then."""


class Beat(msgspec.Struct, frozen=True):
    """A rank's sign of life."""

    number: int
    doing: str
    """Step and file."""
    has_left: bool = False


class End(msgspec.Struct, frozen=True):
    """Why the export is over, as the first rank to find out recorded it."""

    text: str
    host: str
    rank: int
    is_raised: bool = False
    """Whether that rank raised an error, of which ranks that poll for it hear by themselves."""
    exit_code: int = 1


def encode(value: msgspec.Struct) -> str:
    """Return a record as the store keeps it."""
    return msgspec.json.encode(value).decode()


def has_ended(store: Store, rank: int, me: Identity) -> bool:
    """Whether a rank has left, is known to be dead, or has never arrived. RuntimeError where the store is gone."""
    if not store.check([f"who/{rank}", f"beat/{rank}"]):
        return True
    identity = msgspec.json.decode(store.get(f"who/{rank}"), type=Identity)
    return msgspec.json.decode(store.get(f"beat/{rank}"), type=Beat).has_left or identity.is_alive(me) is False
