"""torch's first trace in a process, which takes seconds: processes that are forked after it do not make it anew."""

from __future__ import annotations

import io
import warnings

import torch


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
