"""Numbers for repeated values: a million names become a column of integers and a short list. Pure."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


class Numbering(dict[T, int]):
    """Value -> number from 0 up, in the order in which the values were first looked up. Iteration has that order too."""

    def __missing__(self, value: T) -> int:
        number = self[value] = len(self)
        return number
