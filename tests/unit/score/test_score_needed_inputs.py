"""Conditions on sizes: those that say nothing are not stated."""

from __future__ import annotations

import pytest

from dist_export.archive.traced_sizes import holds_always
from dist_export.score.needed_inputs import is_of_tried_sizes


@pytest.mark.parametrize(
    "condition",
    [
        "batch + 1 >= 1",
        "((-1) + (batch + 1)) == batch",
        "batch == batch or batch == 1",
        "batch == 1 or (batch >= 0 and not batch < 0)",
        "clicks_size_1 == clicks_size_1 or clicks_size_1 == mask_size_1",
    ],
)
def test_what_every_size_fulfils_is_no_condition(condition: str) -> None:
    assert holds_always(condition)


@pytest.mark.parametrize(
    "condition",
    [
        "batch <= 1000",
        "batch >= 1",
        "(batch % 8) == 0",
        "clicks_size_1 >= mask_size_1",
        "Mod(batch, 8) == 0",
        "batch != 5",
        "(batch % 11) != 0",
        "2*batch != 1000",
        "batch == mask_size_1 or batch == 1",
        "clicks_size_1 == clicks_size_1 and mask_size_1 != 17",
    ],
)
def test_what_some_size_does_not_fulfil_is_one(condition: str) -> None:
    assert not holds_always(condition)


@pytest.mark.parametrize(
    ("condition", "is_of_these"),
    [
        ("batch != 1", True),
        ("clicks_size_1 != 1 or batch == 1", True),
        ("values_size != 1", False),
        ("(batch + 1) == values_size", False),
    ],
)
def test_sizes_that_a_program_is_tried_with(condition: str, is_of_these: bool) -> None:
    """Of how many elements all lists have together, no batch of the tries needs to have the least."""
    assert is_of_tried_sizes(condition) is is_of_these
