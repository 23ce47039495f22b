"""How many batches a sparse arch is tried on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dist_export.contract.read import run_trials


class Trials:
    """Trials of batches with so many examples, where all values that matter were tried at once."""

    untried: tuple[str, ...] = ()

    def __init__(self, num_examples: int) -> None:
        self._num_examples = num_examples

    def run(self, *, vary_sizes: bool) -> Any:
        return SimpleNamespace(num_examples=self._num_examples)


@pytest.mark.parametrize(("num_examples", "num_trials"), [(1, 32), (6, 32), (32, 8), (128, 4), (4096, 4)])
def test_a_small_sample_is_tried_more_often(num_examples: int, num_trials: int) -> None:
    """Few examples do not show what a model does to a list of two ids of which one is padding."""
    assert len(run_trials(Trials(num_examples))) == num_trials
