"""The records that the watchdogs of the ranks exchange through the job's store."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from dist_export.runtime.process_identity import Identity


class Store(Protocol):
    """The methods of the job's store that are used here. Every call may raise RuntimeError when the store is gone."""

    def set(self, key: str, value: str) -> Any:
        """Set a key."""

    def get(self, key: str) -> bytes:
        """Return the value of a key that is known to exist."""

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys exist."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set a key if it has the value ``expected``, or if it is not set and ``expected`` is empty; return its value then."""


class Beat(msgspec.Struct, frozen=True):
    """A rank's sign of life."""

    number: int
    doing: str
    """The step and the file."""
    has_left: bool = False


class End(msgspec.Struct, frozen=True):
    """Why the export is over. The first rank that notices writes it."""

    text: str
    host: str
    rank: int
    is_raised: bool = False
    """Whether that rank raised an error. Ranks that poll for failures then learn of it without this record."""
    exit_code: int = 1


# made here, for msgspec's first look at a type crashes if several threads take it at once
BEATS = msgspec.json.Decoder(Beat)
ENDS = msgspec.json.Decoder(End)
IDENTITIES = msgspec.json.Decoder(Identity)


def encode(value: msgspec.Struct) -> str:
    """Return a record as text for the store."""
    return msgspec.json.encode(value).decode()


def has_ended(store: Store, rank: int, me: Identity) -> bool:
    """Return whether a rank has left, is dead, or has never arrived. RuntimeError if the store is gone."""
    if not store.check([f"who/{rank}", f"beat/{rank}"]):
        return True
    identity = IDENTITIES.decode(store.get(f"who/{rank}"))
    return BEATS.decode(store.get(f"beat/{rank}")).has_left or identity.is_alive(me) is False
