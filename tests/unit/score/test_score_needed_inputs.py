"""Conditions on sizes: those that say nothing are not stated."""

from __future__ import annotations

import pytest

from dist_export.score.needed_inputs import holds_always


@pytest.mark.parametrize("condition", ["batch + 1 >= 1", "((-1) + (batch + 1)) == batch"])
def test_what_every_size_fulfils_is_no_condition(condition: str) -> None:
    assert holds_always(condition)


@pytest.mark.parametrize(
    "condition",
    ["batch <= 1000", "batch >= 1", "(batch % 8) == 0", "clicks_size_1 >= mask_size_1", "Mod(batch, 8) == 0"],
)
def test_what_some_size_does_not_fulfil_is_one(condition: str) -> None:
    assert not holds_always(condition)
