"""What the settings say of the tensors of a checkpoint whose names do not tell what they are."""

from __future__ import annotations

from typing import NamedTuple


class TensorSettings(NamedTuple):
    """For formats that hold tensors and say nothing of tables. All readers of one checkpoint get the same ones."""

    tables: tuple[str, ...] = ()
    """Patterns of tensors that are tables, besides those of torchrec's embedding collections."""
    optimizer_slots: tuple[str, ...] = ()
    """Patterns of tensors that are optimizer state, besides ``<root>.state.<parameter>.<slot>``."""
