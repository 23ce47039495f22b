"""Ranks whose models differ: rank 0's would be served, and nobody would know."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_export.dense.same_model import Structure, describe_structure, refuse_other_models
from dist_export.errors import ModelError
from dist_export.model.unwrap import copy_dense_arch


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scaled(self.mlp(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse_arch, self.dense_arch = nn.ModuleDict({"table": nn.Embedding(5, 3)}), Head()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.dense_arch(self.sparse_arch["table"](ids))


class Further(Model):
    pass


def structure_of(model: nn.Module) -> Structure:
    return describe_structure(model, model.sparse_arch, copy_dense_arch(model.dense_arch))


def put(path: str, module: nn.Module) -> nn.Module:
    model = Model()
    model.set_submodule(path, module)
    return model


def test_tables_and_caches_may_differ() -> None:
    other = put("sparse_arch.table", nn.Embedding(9, 3))
    other.sparse_arch["further"] = nn.Embedding(2, 3)
    other.dense_arch.cache = torch.zeros(7)
    assert structure_of(other).digest == structure_of(Model()).digest


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            Further(),
            "the model's class differs between ranks 0 and 2 (test_same_model.Model and test_same_model.Further):",
        ),
        (
            put("dense_arch.mlp.1", nn.GELU()),
            (
                "the dense arch's mlp.1 differs between ranks 0 and 2 (torch.nn.modules.activation.ReLU and "
                "torch.nn.modules.activation.GELU):"
            ),
        ),
        (
            put("dense_arch.mlp.2", nn.Linear(4, 2, dtype=torch.float64)),
            (
                "the dense arch's mlp.2.weight differs between ranks 0 and 2 (float32 [1, 4] and float64 [2, 4]), and so the "
                "dense arch's mlp.2.bias:"
            ),
        ),
    ],
)
def test_what_differs_is_named(other: nn.Module, told: str) -> None:
    mine, theirs = structure_of(Model()), structure_of(other)
    assert mine.digest != theirs.digest
    with pytest.raises(ModelError) as caught:
        refuse_other_models([mine, mine, theirs])
    assert told in str(caught.value).replace(f"{__name__}.", "test_same_model.")


@pytest.mark.parametrize("name", ["Head.forward", "scaled"])
def test_code_that_differs_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where one machine has an older file."""
    mine = structure_of(Model())
    function = scaled if name == "scaled" else Head.forward

    def scaled_otherwise(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    def forward(self: Head, x: torch.Tensor) -> torch.Tensor:
        return scaled(self.mlp(x)) + 1

    monkeypatch.setattr(function, "__code__", (scaled_otherwise if name == "scaled" else forward).__code__)
    theirs = structure_of(Model())
    assert mine.digest != theirs.digest
    with pytest.raises(ModelError, match=rf"the code of \S*\b{name} differs between ranks 0 and 1: the ranks have"):
        refuse_other_models([mine, theirs])
    refuse_other_models([mine, Structure(theirs.parts, theirs.code, b"another Python")])


def test_functions_that_one_rank_lacks_are_no_difference() -> None:
    mine = structure_of(Model())
    refuse_other_models([mine, Structure(mine.parts, {}, mine.python)])
