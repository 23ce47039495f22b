"""Dense arches of one function, and their way through the trace: for the tests of dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dist_export.dense.blocks import read_blocks
from dist_export.dense.eager import run_dense_arch
from dist_export.dense.trace import TracedDense, trace_dense


class Net(nn.Module):
    """A dense arch of one function over the dict of inputs."""

    def __init__(self, fn: Callable[[Net, dict[str, torch.Tensor]], Any]) -> None:
        super().__init__()
        self.fn = fn
        self.linear = nn.Linear(3, 2)

    def forward(self, inputs: dict[str, torch.Tensor]) -> Any:
        return self.fn(self, inputs)


def some_inputs(num_rows: int = 5, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(num_rows, *shape) for name, shape in (shapes or {"a": (3,), "b": (3,)}).items()}


def trace(
    arch: nn.Module | Callable[[Net, dict[str, torch.Tensor]], Any],
    inputs: dict[str, torch.Tensor] | None = None,
    *,
    dims: dict[str, Any] | None = None,
    max_batch_size: int = 204800,
    outputs: list[str] | None = None,
) -> TracedDense:
    net = (arch if isinstance(arch, nn.Module) else Net(arch)).eval()
    inputs = inputs or some_inputs()
    sample = run_dense_arch(net, read_blocks(inputs), export_outputs=outputs)
    return trace_dense(sample, max_batch_size=max_batch_size, dynamic_dims=dims or {})


def operators(traced: TracedDense) -> list[str]:
    return [str(node.target) for node in traced.program.graph.nodes if node.op == "call_function"]
