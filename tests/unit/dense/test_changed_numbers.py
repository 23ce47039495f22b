"""Numbers that a dense arch changes in its forward: named where scores are made of them, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_export.dense.blocks import read_blocks
from dist_export.dense.changed_numbers import note_changed_numbers
from dist_export.dense.eager import run_dense_arch


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count, self.rate, self.tensor = 0, 0.5, torch.tensor(0)
        self.out = nn.Linear(3, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.out(blocks["a"]) * self.change(blocks["a"])

    def change(self, _: torch.Tensor) -> Any:
        return 1.0


class WarmUp(Dense):
    """What it does after many steps is not what it does at first."""

    def change(self, _: torch.Tensor) -> Any:
        self.count += 1
        return 0.5 if self.count < 1000 else 1.0


class WarmUpInTraining(WarmUp):
    def change(self, x: torch.Tensor) -> Any:
        if self.training:
            self.count += 1
        return 0.5 * x.new_ones(1) if self.count < 1000 else 1.0


class InPlace(Dense):
    def change(self, _: torch.Tensor) -> Any:
        self.tensor.add_(1)
        return (self.tensor / 1e9).float()


class Replaced(Dense):
    def change(self, _: torch.Tensor) -> Any:
        if self.training:
            self.tensor = self.tensor + 1
        return torch.where(self.tensor < 1000, 0.5, 1.0)


class Annealed(Dense):
    def change(self, _: torch.Tensor) -> Any:
        if self.training:
            self.rate *= 0.9
        return self.rate


class Logging(Dense):
    def change(self, x: torch.Tensor) -> Any:
        self.count += 1
        self.tensor += x.shape[0]
        self.rate = x.shape[0] / 2
        if self.count % 100 == 0:
            print(self.count)
        return self.rate


class Constant(Dense):
    def change(self, _: torch.Tensor) -> Any:
        return self.rate


class Cached(Dense):
    """Grows a mask as it needs to, and fails with a number that it would never have."""

    def change(self, x: torch.Tensor) -> Any:
        if self.count == 0:
            self.count = x.shape[0]
        return torch.ones(x.shape[0], 1)[: self.count] * [1.0, 2.0][self.count > 10**7 or self.count // 10**6 * 2]


class Random(Dense):
    def change(self, x: torch.Tensor) -> Any:
        self.count += 1
        return torch.rand(x.shape[0], 1)


def notes_of(dense_arch: Dense) -> list[str]:
    blocks = read_blocks({"a": torch.rand(4, 3, generator=torch.Generator().manual_seed(1))})
    sample = run_dense_arch(nn.Sequential(dense_arch).eval(), blocks, export_outputs=None)
    before = {name: (its.clone() if name == "tensor" else its) for name, its in vars(dense_arch).items()}
    notes = note_changed_numbers(sample, "dense_arch")
    assert all(vars(dense_arch)[name] == before[name] for name in ("count", "rate", "tensor"))
    return notes


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (WarmUp, "count"),
        (WarmUpInTraining, "count"),
        (InPlace, "tensor"),
        (Replaced, "tensor"),
        (Annealed, "rate"),
    ],
)
def test_a_number_that_scores_are_made_of_is_named(kind: type[Dense], name: str) -> None:
    (note,) = notes_of(kind())
    assert note.startswith(
        f"the dense arch changes dense_arch.0.{name} in its forward and makes scores of it, and no checkpoint"
    )


@pytest.mark.parametrize("kind", [Dense, Logging, Constant, Cached, Random])
def test_other_numbers_are_not(kind: type[Dense]) -> None:
    assert notes_of(kind()) == []
