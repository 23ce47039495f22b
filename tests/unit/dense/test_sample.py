"""Taking one batch from what people call a dataset, and getting the dense inputs out of what they call a sparse arch."""

from __future__ import annotations

import collections
import copy
import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dist_export.dense.blocks import read_blocks
from dist_export.dense.sample import Batches, check_input_names, cut_sample, run_sparse_arch
from dist_export.errors import ModelError

CPU = torch.device("cpu")
DATA = {"x": torch.arange(6.0).reshape(3, 2)}


@pytest.mark.parametrize(
    "flag", [False, 0, torch.tensor(False), torch.tensor([0]), torch.zeros(1, 1, dtype=torch.int32)]
)
def test_a_stop_flag_is_taken_off(flag) -> None:
    batch = Batches([(flag, DATA)]).take()
    assert batch.is_there
    assert repr(batch.data) == repr(DATA)


@pytest.mark.parametrize("flag", [True, 1, torch.tensor(True), torch.tensor([1])])
def test_a_flag_that_is_set_means_no_data(flag) -> None:
    assert not Batches([(flag, DATA), (False, DATA)]).take().is_there


@pytest.mark.parametrize(
    "item",
    [
        DATA,
        (torch.ones(3), torch.ones(3)),
        (DATA, torch.ones(3)),
        (torch.ones(1), torch.ones(1), torch.ones(1)),
        [False, DATA],
        (np.zeros(3), DATA),
        ("a", "b"),
        torch.ones(2),
        (DATA,),
    ],
    ids=repr,
)
def test_anything_else_is_data_as_it_is(item) -> None:
    batch = Batches([item]).take()
    assert batch.is_there
    assert repr(batch.data) == repr(item)


def test_a_dataloader_gives_its_first_batch() -> None:
    x, y = torch.arange(8.0), torch.arange(8)
    batch = Batches(DataLoader(TensorDataset(x, y), batch_size=4)).take()
    assert batch.is_there
    torch.testing.assert_close(batch.data[0], x[:4])
    torch.testing.assert_close(batch.data[1], y[:4])


def test_one_batch_is_taken_from_a_generator_and_no_more() -> None:
    taken = []

    def batches():
        for i in range(3):
            taken.append(i)
            yield {"x": i}

    assert Batches(batches()).take().data == {"x": 0}
    assert taken == [0]


@pytest.mark.parametrize("empty", [[], iter(()), (x for x in ()), {}])
def test_the_end_is_no_batch(empty) -> None:
    assert not Batches(empty).take().is_there


def test_none_may_be_a_batch() -> None:
    assert Batches([None]).take().is_there


@pytest.mark.parametrize("dataset", [None, 5, object()])
def test_what_cannot_be_iterated_is_refused(dataset) -> None:
    with pytest.raises(ModelError, match=f"dataset is a {type(dataset).__name__}, which cannot be iterated"):
        Batches(dataset).take()


class Arch(nn.Module):
    def __init__(self, fn) -> None:
        super().__init__()
        self.fn = fn
        self.weight = nn.Parameter(torch.ones(1))
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, data):
        return self.fn(self, data)


def run(fn, data=DATA):
    return run_sparse_arch(Arch(fn), data, sparse_model_name="sparse", finder=None)[0].tensors


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: d,
        lambda d: (d, torch.ones(1)),
        lambda d: [d],
        lambda d: (d, d),
        lambda d: (d, None),
        collections.OrderedDict,
        lambda d: (collections.OrderedDict(d), {"labels": 1}),
    ],
)
def test_a_dict_or_a_tuple_that_begins_with_one_is_taken(wrap) -> None:
    assert list(run(lambda _, data: wrap(data))) == ["x"]


@pytest.mark.parametrize("pair", [(DATA, DATA), [DATA, {}], (DATA, {"seq": torch.ones(1)})])
@pytest.mark.parametrize("wrap", [lambda p: (p, None), lambda p: [p], lambda p: (p, torch.ones(1), 3)])
def test_split_sequence_blocks_are_refused_with_the_reason(pair, wrap) -> None:
    with pytest.raises(ModelError, match="split_seq=True"):
        run(lambda *_: wrap(pair))


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (None, "a NoneType"),
        (torch.ones(2), "a Tensor"),
        ((), "a tuple of nothing"),
        ({}, "an empty dict"),
        ((torch.ones(1), DATA), "a tuple of Tensor, dict"),
        ({"x": None}, "'x' as NoneType"),
        ({"x": [1.0]}, "'x' as list"),
        ({"x": torch.eye(2).to_sparse()}, "'x' as a sparse"),
    ],
)
def test_other_outputs_are_refused(output, told) -> None:
    with pytest.raises(ModelError, match=told):
        run(lambda *_: output)


def test_it_runs_in_eval_mode_without_gradients_and_modes_are_put_back() -> None:
    seen = {}

    def look(arch, data):
        seen.update(training=arch.training, grad=torch.is_grad_enabled(), x=data["x"] * arch.weight)
        return data

    arch = Arch(look)
    assert arch.training
    run_sparse_arch(arch, DATA, sparse_model_name="sparse", finder=None)
    assert seen["training"] is seen["grad"] is False
    assert not seen["x"].requires_grad
    assert arch.training
    assert not arch.frozen.training


def test_modes_are_put_back_after_a_failure_too() -> None:
    arch = Arch(lambda _, data: data["y"])
    with pytest.raises(
        ModelError, match=r"the sparse arch fails on the sample batch: KeyError: 'y' at .*test_sample.py:\d+"
    ):
        run_sparse_arch(arch, DATA, sparse_model_name="sparse", finder=None)
    assert arch.training


def test_it_may_consume_its_input() -> None:
    def consume(_, data):
        inner = data["deep"].pop("y")
        data["list"].clear()
        return {"x": data.pop("x") + inner}

    data = {"x": torch.ones(2, 1), "deep": {"y": torch.ones(2, 1)}, "list": [1]}
    kept = copy.deepcopy(data)
    run(consume, data)
    assert data.keys() == kept.keys()
    assert data["deep"].keys() == kept["deep"].keys()
    assert data["list"] == [1]
    run(consume, data)  # the dataset may yield that very dict again

    first = (collections.defaultdict(list, x=torch.ones(2, 1)), torch.ones(1))
    run(lambda _, both: {"x": both[0].pop("x"), "y": torch.tensor(both[0]["none"] or [[1.0], [2.0]])}, first)
    assert list(first[0]) == ["x"]


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    owner: object = None


class Slotted:
    __slots__ = ("owner", "x")

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x
        self.owner = self

    def to(self, device: torch.device) -> Slotted:
        return self


class Pair(NamedTuple):
    x: torch.Tensor
    n: int


@pytest.mark.parametrize(
    ("wrap", "read"),
    [
        (lambda x: {"a": [x]}, lambda data: data["a"][0]),
        (lambda x: Pair(x, 1), lambda data: data.x),
        (Frozen, lambda data: data.x),
        (lambda x: {"a": Slotted(x)}, lambda data: data["a"].owner.x),
        (nn.Parameter, lambda data: data),
        (lambda x: x.numpy(), torch.from_numpy),
    ],
)
def test_a_batch_stays_what_it_is_when_the_loader_fills_its_buffer_again(wrap, read) -> None:
    def load():
        buffer = torch.zeros(4)
        batch = wrap(buffer)
        for number in range(3):
            buffer.fill_(number)
            yield batch

    batches = Batches(load())
    taken = [batches.take().data for _ in range(3)]
    assert [read(data).tolist() for data in taken] == [[0.0] * 4, [1.0] * 4, [2.0] * 4]


@pytest.mark.parametrize(
    "name", ["a-b", "1a", "", "a b", "class", "None", "self", "mod", "ªb", 3, "torch", "inf", "pytree"]
)
def test_names_that_cannot_be_keywords_are_refused(name) -> None:
    with pytest.raises(ModelError) as caught:
        check_input_names({name: torch.ones(1), "good": torch.ones(1), "x.y": torch.ones(1)})
    assert repr(name) in str(caught.value)
    assert "'x.y'" in str(caught.value)
    assert "'good'" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["input", "weight", "kwargs", "args", "call", "forward", "match", "User_Emb", "特征", "_x"]
)
def test_other_names_are_fine(name) -> None:
    check_input_names({name: torch.ones(1)})


def test_samples_are_cut_and_detached_in_their_order() -> None:
    inputs = {"b": torch.randn(200, 3, requires_grad=True), "a": torch.arange(400).reshape(2, 200).t()}
    cut = cut_sample(read_blocks(inputs), device=CPU, max_batch_size=1000).tensors
    assert list(cut) == ["b", "a"]
    assert cut["a"].shape == (128, 2)
    assert cut["a"].is_contiguous()
    assert torch.equal(cut["b"], inputs["b"][:128])
    assert not cut["b"].requires_grad
    assert cut["b"].untyped_storage().nbytes() == 128 * 3 * 4


def test_one_row_is_repeated_to_two() -> None:
    blocks = read_blocks({"a": torch.ones(1), "b": torch.ones(1, 2, 3), "c": torch.ones(1, 0)})
    cut = cut_sample(blocks, device=CPU, max_batch_size=9).tensors
    assert [tuple(tensor.shape) for tensor in cut.values()] == [(2,), (2, 2, 3), (2, 0)]


def test_a_sample_is_never_larger_than_serving_may_send() -> None:
    blocks = read_blocks({"a": torch.ones(100)})
    assert cut_sample(blocks, device=CPU, max_batch_size=7).tensors["a"].shape == (7,)


@pytest.mark.parametrize(
    "inputs",
    [{"a": torch.ones(3), "b": torch.ones(4)}, {"a": torch.ones(3), "b": torch.tensor(1.0)}, {"a": torch.tensor(1.0)}],
)
def test_first_dimensions_must_agree(inputs) -> None:
    with pytest.raises(ModelError, match=r"first dimension of every dense input is the batch.*found a \["):
        cut_sample(read_blocks(inputs), device=CPU, max_batch_size=9)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ModelError, match="no rows"):
        cut_sample(read_blocks({"a": torch.ones(0, 3)}), device=CPU, max_batch_size=9)
