"""The checkpoint's values in what is no table of the caller's sparse arch, as long as the export runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from dist_export.checkpoint.dense import DenseParameters
from dist_export.config.schema import ExportConfig
from dist_export.dense.own_extra_state import extra_state_within
from dist_export.dense.own_parameters import values_within
from dist_export.runtime.ranks import Ranks


class SparseValues:
    """Puts the checkpoint's values into the sparse arch, and takes them out again."""

    def __init__(self, ranks: Ranks, config: ExportConfig, parameters: DenseParameters | None) -> None:
        """``parameters``: those of the checkpoint; None leaves the sparse arch as it is."""
        self._ranks = ranks
        self._config = config
        self._parameters = parameters
        self.put: tuple[str, ...] = ()
        """Names within the model of what has had the checkpoint's values."""
        self.lacking: list[str] = []
        """Extra state that the checkpoint does not have."""

    @contextlib.contextmanager
    def within(self, arch: nn.Module) -> Iterator[None]:
        """Within this block, what is no table in the caller's sparse arch has the checkpoint's values. All ranks."""
        if self._parameters is None:  # a model in memory has them
            yield
            return
        state = self._ranks.run("read the parameters of the sparse arch", self._parameters.load)
        config = self._config
        path, below = config.sparse_model_name, config.dense_model_name
        with contextlib.ExitStack() as held:

            def put() -> None:
                values = held.enter_context(values_within(arch, state, path=path, except_below=below))
                keep = config.allow_load_hooks
                extra = extra_state_within(arch, state, path=path, except_below=below, keep=keep)
                found = held.enter_context(extra)
                self.put, self.lacking = (*values, *found.put), found.lacking

            self._ranks.run("put values into the sparse arch", put)
            yield
