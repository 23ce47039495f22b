"""What the settings and the model say of the tensors of a checkpoint whose names do not tell what they are."""

from __future__ import annotations

from typing import NamedTuple

from dist_export.checkpoint.model_weights import ModelWeights

WHOLE = "."
"""A ``state_root`` that is none: the whole checkpoint is one state, and names stay as they are."""


class TensorSettings(NamedTuple):
    """For formats that hold tensors and say nothing of tables. All readers of one checkpoint get the same ones."""

    treat_as_tables: tuple[str, ...] = ()
    """Patterns of tensors that are tables, besides those that are known without."""
    optimizer_slots: tuple[str, ...] = ()
    """Patterns of tensors that are optimizer state, besides ``<root>.state.<parameter>.<slot>``."""
    weights: ModelWeights | None = None
    """What the model says of them, where one is exported."""
    state_root: str | None = None
    """Dotted path of the state to read, of several in one checkpoint; None takes the model's, ``WHOLE`` all of them."""
    model_paths: tuple[str, ...] = ()
    """Paths within the model that the export asks for, such as ``sparse_arch``: they tell how names begin."""
