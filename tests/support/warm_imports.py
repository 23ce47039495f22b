"""What processes of the warm pool have done before they are forked: imports, and what torch makes on its first trace.

No thread may run afterwards: a fork takes only the thread that forks.
"""

from __future__ import annotations

import gc
import io
import os
import warnings

import hypothesis  # noqa: F401
import numpy as np  # noqa: F401
import pytest  # noqa: F401
import torch
import torch.distributed

import dist_export.cli
import dist_export.config.loader
import dist_export.dense
import dist_export.pipeline.steps
import dist_export.verify.verify  # noqa: F401
from tests.support import shortcuts


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.linear(x))


def trace_once() -> None:
    """Have torch import what it imports late, and fill its tables of operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch", min=1, max=1024)
        program = torch.export.export(_Net().eval(), (torch.ones(3, 3),), dynamic_shapes=({0: batch},))
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        torch.export.load(file).module()(torch.ones(2, 3))


torch.set_num_threads(1)
shortcuts.take()
trace_once()
assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
gc.collect()
gc.freeze()  # else the first collection of each child copies the pages of all objects
