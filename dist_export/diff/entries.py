"""What a comparison of two packages finds, as plain values that JSON can hold."""

from __future__ import annotations

from typing import Any

import msgspec


class TableDiff(msgspec.Struct, frozen=True, kw_only=True):
    """One table. Rows of A = same + changed + deleted; rows of B = same + changed + new."""

    name: str
    same: int = 0
    changed: int = 0
    new: int = 0
    """Rows of ids that only B has."""
    deleted: int = 0
    """Rows of ids that only A has."""
    max_abs: float = 0.0
    """The largest change of a value, of values that are finite on both sides."""
    slots: tuple[str, ...] = ()
    """How the slots differ: dtypes, widths, slots that one side lacks."""
    default_row: bool = False
    """Whether the row of out-of-vocabulary ids differs."""
    not_compared: str = ""
    """Why rows could not be compared; then the counts are those of the manifests."""

    @property
    def is_equal(self) -> bool:
        """Whether serving gets the same rows for all ids."""
        return not (self.changed or self.new or self.deleted or self.slots or self.default_row or self.not_compared)


class DenseDiff(msgspec.Struct, frozen=True, kw_only=True):
    """The dense arch."""

    same: int = 0
    """Parameters, buffers and constants that are equal, bit for bit."""
    changed: dict[str, float] = {}
    """Name -> the largest change of a finite value."""
    only_in_a: tuple[str, ...] = ()
    only_in_b: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    """Other differences, in words: inputs, outputs, the program's code."""

    @property
    def is_equal(self) -> bool:
        """Whether the programs compute the same from the same inputs."""
        return not (self.changed or self.only_in_a or self.only_in_b or self.others)


class ScoresDiff(msgspec.Struct, frozen=True, kw_only=True):
    """The scores of both packages for the stored sample of A."""

    max_abs: dict[str, float] = {}
    """By output that both have, of scores that are finite on both sides."""
    odd: tuple[str, ...] = ()
    """Outputs of other shapes, or finite in other places."""
    not_compared: str = ""


class PackageDiff(msgspec.Struct, frozen=True, kw_only=True):
    """Everything."""

    a: str
    b: str
    digest_a: str
    digest_b: str
    tables: tuple[TableDiff, ...] = ()
    dense: DenseDiff = DenseDiff()
    others: tuple[str, ...] = ()
    """How the score programs, the serving contracts and fg.json differ, in words."""
    scores: ScoresDiff = ScoresDiff()
    not_compared: str = ""
    """What of both is not compared; then it does not count for ``is_equal``."""
    settings: dict[str, tuple[str, str]] = {}
    """What is packaged otherwise, though serving gets the same: name -> how A and B have it."""

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values, with ``is_equal``."""
        return {"is_equal": self.is_equal, **msgspec.json.decode(msgspec.json.encode(self))}

    @property
    def is_equal(self) -> bool:
        """Whether serving gets the same from both."""
        is_same = all(table.is_equal for table in self.tables) and self.dense.is_equal and not self.others
        return is_same and not self.scores.odd and not any(self.scores.max_abs.values())
