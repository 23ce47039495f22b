"""The caller's objects, built anew for each export as a process of its own would build them."""

from __future__ import annotations

import gc
import random
import sys
from typing import Any

import numpy as np

from dist_export.config.needs import UserCallables
from dist_export.model.user_objects import Objects, build_objects, import_objects


class FreshObjects:
    """Builds the model, the dataset and fg. Every rank has its own.

    An export may leave traces in them: a dataset that is an iterator has no second sample, and a hash table keeps the sample's
    new ids. Therefore no two exports share objects. Random numbers begin anew too, so that the same sample is drawn.
    """

    def __init__(self, config: UserCallables) -> None:
        """Keep the settings. Nothing is imported."""
        self._config = config
        self._has_model = config.model is not None
        self._states: tuple[Any, Any, Any] = (None, None, None)
        self._first: Objects | None = None

    def build_first(self) -> Objects:
        """Build the objects of the first export before there is a checkpoint, to find mistakes. ConfigError, ModelError."""
        import_objects(self._config)  # a module that draws random numbers while it is imported does so once
        self._states = self._read_states()
        self._first = build_objects(self._config)
        return self._first

    def build(self) -> Objects:
        """Return the objects of the next export. ConfigError, ModelError."""
        first, self._first = self._first, None
        if first is not None:
            return first
        gc.collect()  # a model often is in a cycle of references, and two of them may not fit into memory
        self._restore_states()
        return build_objects(self._config)

    def _read_states(self) -> tuple[Any, Any, Any]:
        if not self._has_model:
            return None, None, None
        import torch

        return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 -- the caller's code may use it

    def _restore_states(self) -> None:
        state, of_numpy, of_torch = self._states
        if not self._has_model:
            return
        random.setstate(state)
        np.random.set_state(of_numpy)  # noqa: NPY002
        torch = sys.modules["torch"]
        torch.set_rng_state(of_torch)
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is not None:
            dynamo.reset()  # its caches keep the graphs of each export
