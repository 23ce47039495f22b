"""What a pickle is made of while it is read: names, records, and keys that cost little to hash and to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAX_KEY = 1 << 16
"""Limit of a text, in characters. Each time a text is a key, it is compared with equal texts to the end."""
_MAX_KEY_PARTS = 64
_MAX_KEY_TEXT = 4_096
"""Limits of a tuple that is a key: its parts, and the characters in them."""
_MAX_COLLISIONS = 16
"""Limit of different keys with one hash. Such keys are easy to make, and each lookup compares a key with all of them."""
_HASH_BITS = 61
"""Python's hash of a smaller integer is that integer."""


class PickleError(ValueError):
    """The pickle is damaged, or contains something that this reader does not support. The text is the middle of a sentence."""


class Global:
    """A class or a function that a pickle names; the object only represents the name."""

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[..., Any] | None = None) -> None:
        """Keep the name. ``make`` is called with the pickle's own arguments, when the pickle makes an object of the name."""
        self.name = name
        self.make = make


class Record:
    """An object of a class of which only the name is known."""

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, kind: str, arguments: tuple[Any, ...] = ()) -> None:
        self.kind = kind
        self.arguments = arguments
        self.state: Any = None
        """The state that it was restored from, by reference, so that no copy is made."""


def recorded(name: str) -> Global:
    """Return a global whose objects become records."""
    return Global(name, lambda *arguments: Record(name, arguments))


class KeyCheck:
    """Refuses keys whose hash or comparison could take very long. It knows the keys of one pickle."""

    def __init__(self) -> None:
        self._collisions: dict[int, list[Any]] = {}

    def check(self, key: Any) -> None:
        """Refuse a key whose hash or comparison could take very long. PickleError."""
        kind = type(key)
        if kind is str or kind is bytes:
            if len(key) > MAX_KEY:
                raise PickleError(f"has a key of {len(key):,} characters")
        elif kind is int:
            if key.bit_length() >= _HASH_BITS:
                self._count_collisions(key)
        elif kind is tuple:
            _measure_key(key)
            self._count_collisions(key)
        elif kind not in (bool, float, type(None), Record, Global):
            raise PickleError(f"has a key that is a {kind.__name__}")

    def _count_collisions(self, key: Any) -> None:
        same = self._collisions.setdefault(hash(key), [])
        if key not in same:
            same.append(key)
            if len(same) > _MAX_COLLISIONS:
                raise PickleError("has keys of one hash; they are made to take for ever")


def _measure_key(key: tuple[Any, ...]) -> None:
    """Refuse a tuple with too many parts, counting repeated ones each time, or with too long ones."""
    waiting: list[Any] = [key]
    parts = length = 0
    while waiting:
        part = waiting.pop()
        parts += 1
        if type(part) is tuple:
            waiting.extend(part[: _MAX_KEY_PARTS + 1])
        elif type(part) in (str, bytes):
            length += len(part)
        elif type(part) not in (int, bool, float, type(None), Global):
            raise PickleError(f"has a key with a {type(part).__name__} in it")
        if parts > _MAX_KEY_PARTS or length > _MAX_KEY_TEXT:
            raise PickleError("has a key of too many parts")
