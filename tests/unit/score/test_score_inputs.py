"""A batch as flat tensors with names, and cut by example."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dist_export.score.inputs import flatten_batch
from dist_export.score.resize import Resizer
from dist_export.score.table_weight import NotExportableError


class Pair(NamedTuple):
    ids: torch.Tensor
    label: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Features:
    user: torch.Tensor
    source: str = "web"


class Jagged:
    """torchrec's KeyedJaggedTensor, as far as a batch is concerned."""

    def __init__(self, keys: list[str], values: Any, lengths: Any, weights: Any = None) -> None:
        self._keys, self._values, self._lengths, self._weights = keys, values, lengths, weights

    def keys(self) -> list[str]:
        return self._keys

    def values(self) -> torch.Tensor:
        return self._values

    def lengths(self) -> torch.Tensor:
        return self._lengths

    def weights_or_none(self) -> torch.Tensor | None:
        return self._weights

    def offsets(self) -> torch.Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.int64), self._lengths.cumsum(0)])


def test_nested_batches_give_names_joined_by_underscores_and_come_back() -> None:
    batch = {"user": torch.tensor([1, 2]), "deep": {"a": torch.ones(2)}, "pair": (torch.ones(2), "x"), "n": 3}
    flat = flatten_batch(batch)
    assert list(flat.tensors) == ["user", "deep_a", "pair_0"]
    again = flat.rebuild({name: tensor + 1 for name, tensor in flat.tensors.items()})
    assert again["deep"]["a"].tolist() == [2, 2]
    assert again["pair"][1] == "x"
    assert again["n"] == 3
    assert batch["user"].tolist() == [1, 2]


def test_batches_that_are_no_dict() -> None:
    one = torch.tensor([1, 2])
    assert list(flatten_batch(one).tensors) == ["input"]
    assert list(flatten_batch((one, one)).tensors) == ["input_0", "input_1"]
    flat = flatten_batch(Pair(one, one))
    assert isinstance(flat.rebuild(flat.tensors), Pair)
    flat = flatten_batch({"f": Features(one)})
    assert list(flat.tensors) == ["f_user"]
    assert flat.rebuild({"f_user": one + 1})["f"].user.tolist() == [2, 3]


def test_a_jagged_tensor_gives_values_lengths_and_weights() -> None:
    values, lengths = torch.arange(5), torch.tensor([1, 0, 2, 2])
    flat = flatten_batch({"kjt": Jagged(["a", "b"], values, lengths, values * 0.5)})
    assert list(flat.tensors) == ["kjt_values", "kjt_lengths", "kjt_weights"]
    resizer = Resizer(flat, 2)
    assert not resizer.unknown
    cut = resizer.resize(3)  # both examples, and the first one again: key by key
    assert cut["kjt_lengths"].tolist() == [1, 0, 1, 2, 2, 2]
    assert cut["kjt_values"].tolist() == [0, 0, 1, 2, 3, 4, 1, 2]
    assert cut["kjt_weights"].tolist() == [0, 0, 0.5, 1, 1.5, 2, 0.5, 1]
    assert flat.rebuild(cut)["kjt"].keys() == ["a", "b"]
    assert resizer.first_sizes() == {"kjt_lengths": "2*batch"}


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({"my input": torch.ones(2)}, "cannot be an argument named 'my input'"),
        ({"self": torch.ones(2)}, "'self'"),
        ({"a": {"b": torch.ones(2)}, "a_b": torch.ones(2)}, "two tensors of the batch would be named 'a_b'"),
        ({"a": np.ones(2)}, "'a' of the batch is a numpy array"),
        ({"a": torch.eye(2).to_sparse()}, "'a' of the batch is a sparse or nested tensor"),
        ({"a": "text"}, "without a tensor"),
    ],
)
def test_what_cannot_be_an_input_is_named(batch: Any, told: str) -> None:
    with pytest.raises(NotExportableError, match=told):
        flatten_batch(batch)


@pytest.mark.parametrize("kind", ["lengths", "offsets", "starts"])
def test_lists_of_a_dict_are_cut_by_example(kind: str) -> None:
    lengths = torch.tensor([2, 0, 3])
    ends = lengths.cumsum(0)
    bounds = {"lengths": lengths, "offsets": torch.cat([ends.new_zeros(1), ends]), "starts": ends - lengths}
    batch = {"price": torch.arange(3.0), "tags": torch.arange(5), f"tags_{kind}": bounds[kind]}
    resizer = Resizer(flatten_batch(batch), 3)
    assert not resizer.unknown
    cut = resizer.resize(4)
    assert cut["tags"].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert cut["price"].tolist() == [0, 1, 2, 0]
    now = {"lengths": [2, 0, 3, 2], "offsets": [0, 2, 2, 5, 7], "starts": [0, 2, 2, 5]}
    assert cut[f"tags_{kind}"].tolist() == now[kind]
    assert resizer.resize(1)["tags"].tolist() == [0, 1]
    assert resizer.first_sizes()[f"tags_{kind}"] == ("batch + 1" if kind == "offsets" else "batch")


def test_a_tensor_without_dimensions_is_the_same_for_every_batch() -> None:
    resizer = Resizer(flatten_batch({"x": torch.arange(3), "step": torch.tensor(7)}), 3)
    assert not resizer.unknown
    assert resizer.resize(5)["step"].item() == 7
    assert resizer.first_sizes() == {"x": "batch"}


def test_lists_with_other_names_are_paired_where_only_one_fits() -> None:
    batch = {"x": torch.arange(3), "clicked": torch.arange(7), "how_many": torch.tensor([3, 0, 4])}
    assert Resizer(flatten_batch(batch), 3).resize(1)["clicked"].tolist() == [0, 1, 2]
    two = {**batch, "seen": torch.arange(7), "others": torch.tensor([1, 5, 1])}
    assert Resizer(flatten_batch(two), 3).unknown == ["clicked", "seen"]
