"""The checkpoint's values in what is no table of the caller's sparse arch, as long as the export runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from dist_export.checkpoint.dense import DenseParameters
from dist_export.checkpoint.model_weights import plain_name
from dist_export.config.needs import ModelValues
from dist_export.dense.missing_values import refuse_missing_values
from dist_export.dense.own_extra_state import extra_state_within
from dist_export.dense.own_parameters import values_within
from dist_export.dense.row_lookup import RowFinder
from dist_export.model.unwrap import unwrap
from dist_export.runtime.ranks import Ranks


class SparseValues:
    """Puts the checkpoint's values into the sparse arch, and takes them out again."""

    def __init__(self, ranks: Ranks, config: ModelValues, model: Any, parameters: DenseParameters | None) -> None:
        """``parameters``: those of the checkpoint; None leaves the sparse arch as it is."""
        self._model = model
        self._ranks = ranks
        self._config = config
        self._parameters = parameters
        self.put: tuple[str, ...] = ()
        """Names within the model of what has had the checkpoint's values."""
        self.tables: RowFinder | None = None
        """Those of the checkpoint; None if no tables are exported."""
        self.passed: list[str] = []
        """Parameters and buffers that the checkpoint does not have, and that the settings let pass."""
        self.lacking: list[str] = []
        """Extra state that the checkpoint does not have."""

    @contextlib.contextmanager
    def within(self, arch: nn.Module) -> Iterator[None]:
        """Within this block, what is no table in the caller's sparse arch has the checkpoint's values. All ranks."""
        if self._parameters is None:  # a model in memory has them
            yield
            return
        state = self._ranks.check("read the parameters of the sparse arch", self._parameters.load)
        config = self._config
        path, below = config.sparse_model_name, config.dense_model_name
        with contextlib.ExitStack() as held:

            def put() -> None:
                names = _names_by_tensor(self._model)
                values = held.enter_context(values_within(arch, state, path=path, except_below=below, others=names))
                keep = config.allow_load_hooks
                extra = extra_state_within(arch, state, path=path, except_below=below, keep=keep)
                found = held.enter_context(extra)
                self.put, self.lacking = (*values, *found.put), found.lacking
                if self.tables is not None:
                    self.passed = refuse_missing_values(
                        arch,
                        self.put,
                        self.tables,
                        sparse_model_name=path,
                        dense_model_name=below,
                        allowed=config.allow_missing_dense,
                    )

            self._ranks.check("put values into the sparse arch", put)
            yield


def _names_by_tensor(model: Any) -> Mapping[int, Collection[str]]:
    """Return the names within the model of each tensor that has several."""
    root = unwrap(model)
    named = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
    names: dict[int, list[str]] = {}
    for name, tensor in named:
        names.setdefault(id(tensor), []).append(plain_name(name))
    return {key: its for key, its in names.items() if len(its) > 1}
