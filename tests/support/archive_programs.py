"""Small dense nets, traced as the exporter traces them, and zips with a member exchanged: for the tests of archive."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.export import Dim, ExportedProgram


class Case(NamedTuple):
    """A program, the inputs that it was traced with, and what the module gave for them."""

    program: ExportedProgram
    inputs: dict[str, torch.Tensor]
    expected: tuple[torch.Tensor, ...]


class Mlp(nn.Module):
    """BatchNorm, a persistent and a non-persistent buffer, a literal, a tied weight, and names that collide."""

    scale: torch.Tensor
    offsets: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.weight = nn.Linear(8, 4)
        self.head = nn.Linear(4, 1)
        self.tied = nn.Linear(4, 1)
        self.tied.weight = self.head.weight
        self.register_buffer("scale", torch.full((1,), 2.0))
        self.register_buffer("offsets", torch.arange(3.0), persistent=False)
        self.unused = nn.Linear(3, 3)

    def forward(
        self,
        *,
        input: torch.Tensor,  # noqa: A002 -- the collision is what is tested
        self_x: torch.Tensor,
        weight: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.relu(self.weight(self.norm(weight))) * self.scale + torch.tensor([1.0, 2.0, 3.0, 4.0])
        rows = torch.arange(input.shape[0], device=input.device)[:, None]
        logit = self.head(hidden) + self.tied(hidden) + input.float().sum(1, keepdim=True) + self.offsets.sum() + rows
        return logit + self_x.masked_fill(self_x < 0, float("-inf")), hidden.reshape(hidden.shape[0], 2, 2)[:, 0]


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, *, sequence: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(sequence)
        found: torch.Tensor = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return found.mean(1)


class Shapes(nn.Module):
    """Symbolic sizes in many guises: products, remainders, a division, a maximum; and six outputs."""

    def forward(self, *, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        size = a.shape[0]
        return (
            a.reshape(size * 2, -1).sum(1).reshape(-1, 2),
            torch.cat([a, b], 1)[:size],
            a.new_zeros(size),
            nn.functional.pad(a, (0, 0, 0, size % 3)),
            a * (size / 2),
            a * max(size, 5),
        )


class LowPrecision(nn.Module):
    """Weights of a small dtype, one of them a transposed view."""

    turn: torch.Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6).to(dtype)
        self.dtype = dtype
        self.register_buffer("turn", torch.randn(6, 6).t())

    def forward(self, *, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(x.to(self.dtype))
        return found.float() @ self.turn


class Regions(nn.Module):
    """Regions that become subgraphs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, *, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            frozen: torch.Tensor = self.linear(x) * 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed: torch.Tensor = self.linear(x)
        return frozen + mixed.float()


def trace(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Case:
    module.eval()
    inputs = dict(sorted(inputs.items()))
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        batch = Dim("batch", min=1, max=204800)
        shapes = {name: {0: batch} for name in inputs}
        program = torch.export.export(module, args=(), kwargs=inputs, dynamic_shapes=shapes, strict=False)
        with torch.no_grad():
            return Case(program, inputs, as_tuple(module(**inputs)))
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


_MAKERS: dict[str, Callable[[], Case]] = {
    "mlp": lambda: trace(Mlp(), {"weight": rand(4, 8), "input": torch.arange(12).reshape(4, 3), "self_x": rand(4, 1)}),
    "transformer": lambda: trace(Transformer(), {"sequence": rand(4, 3, 8)}),
    "shapes": lambda: trace(Shapes(), {"a": rand(4, 6), "b": rand(4, 2)}),
    "fp16": lambda: trace(LowPrecision(torch.float16), {"x": rand(4, 6)}),
    "bf16": lambda: trace(LowPrecision(torch.bfloat16), {"x": rand(4, 6)}),
    "regions": lambda: trace(Regions(), {"x": rand(4, 6)}),
}
NAMES = tuple(_MAKERS)


@cache
def case(name: str) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _MAKERS[name]()


def assert_same(outputs: Any, expected: tuple[torch.Tensor, ...]) -> None:
    outputs = as_tuple(outputs)
    assert len(outputs) == len(expected)
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=0, atol=0)


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def exchange(data: bytes, changes: Mapping[str, bytes | Callable[[bytes], bytes] | None], **kwargs: Any) -> bytes:
    """Return the zip with members replaced, edited, added, or (None) taken out. ``kwargs`` go to ``ZipFile``."""
    members = members_of(data)
    for name, change in changes.items():
        if change is None:
            del members[name]
        else:
            members[name] = change(members[name]) if callable(change) else change
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **kwargs) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()
