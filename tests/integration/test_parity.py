"""The written program against the eager dense arch, at the batch sizes that models trip over."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_export.dense.blocks import read_blocks
from dist_export.dense.eager import run_dense_arch
from dist_export.dense.parity import check_parity
from dist_export.dense.trace import output_shapes, trace_dense
from dist_export.errors import ParityError


class Net(nn.Module):
    def __init__(self, fn) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, inputs):
        return self.fn(inputs)


class Drifting(nn.Module):
    """Is traced with one weight and has another one afterwards: as if the written program were wrong by ``by``."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.by = by

    def forward(self, inputs):
        return {"ctr": inputs["x"].double() * self.weight, "like": inputs["x"] * 2}


def compare(net, inputs=None, *, atol=1e-6, rtol=1e-5, max_batch_size=204800, after=None):
    net = (net if isinstance(net, nn.Module) else Net(net)).eval()
    inputs = inputs or {"x": torch.arange(1.0, 16.0).reshape(5, 3)}
    sample = run_dense_arch(net, read_blocks(inputs), export_outputs=None)
    traced = trace_dense(sample, max_batch_size=max_batch_size, dynamic_dims={})
    if after is not None:
        after(net)
    shapes = output_shapes(traced, {})
    return check_parity(
        sample, traced.inputs, traced.program, shapes=shapes, atol=atol, rtol=rtol, max_batch_size=max_batch_size
    )


def drift(by: float, **settings):
    def change(net) -> None:
        net.weight = nn.Parameter(net.weight.detach() + by)

    return compare(Drifting(by), after=change, **settings)


def test_it_runs_at_the_samples_size_and_at_1_2_and_301() -> None:
    seen = []

    def look(inputs):
        seen.append(inputs["x"].shape[0])  # a symbol in the trace
        return inputs["x"] * 2

    entry = compare(look)
    assert entry.batch_sizes == (5, 1, 2, 301)
    assert seen[-4:] == [5, 1, 2, 301]
    assert entry.max_abs == entry.max_rel == {"torch_output_0": 0.0}


@pytest.mark.parametrize(("max_batch_size", "sizes"), [(5, (5, 1, 2)), (300, (5, 1, 2)), (301, (5, 1, 2, 301))])
def test_no_batch_is_larger_than_serving_may_send(max_batch_size, sizes) -> None:
    assert compare(lambda i: i["x"] * 2, max_batch_size=max_batch_size).batch_sizes == sizes


def test_a_sample_of_two_is_run_once() -> None:
    assert compare(lambda i: i["x"] * 2, {"x": torch.ones(2, 3)}).batch_sizes == (2, 1, 301)


@pytest.mark.parametrize(
    "fn",
    [
        lambda i: i["x"] + 1 if i["x"].shape[0] == 1 else i["x"] * 2,
        lambda i: i["x"] * (2 if i["x"].shape[0] == 1 else 1),
        lambda i: {"y": i["x"]} if i["x"].shape[0] != 1 else {"z": i["x"]},
        lambda i: (i["x"], i["x"]) if i["x"].shape[0] != 1 else (i["x"],),
        lambda i: i["x"] if i["x"].shape[0] != 1 else i["x"][0],
        lambda i: i["x"] if i["x"].shape[0] != 1 else i["x"].double(),
    ],
    ids=["value", "factor", "key", "count", "shape", "dtype"],
)
def test_another_branch_for_a_batch_of_one_is_caught(fn) -> None:
    with pytest.raises(ParityError, match=r"at batch size 1.*[Nn]o manifest was written"):
        compare(fn)


@pytest.mark.parametrize("fn", [lambda i: i["x"][:, :1].squeeze(), lambda i: i["x"].squeeze() * 2])
def test_a_bare_squeeze_is_caught(fn) -> None:
    with pytest.raises(ParityError, match=r"at batch size 1 has the shape \[.*\], but \[batch.*\] was traced.*squeeze"):
        compare(fn)


def test_a_squeeze_of_one_dimension_is_fine() -> None:
    assert compare(lambda i: i["x"][:, :1].squeeze(1)).max_abs == {"torch_output_0": 0.0}


def test_outputs_without_a_batch_or_with_a_multiple_of_it_are_fine() -> None:
    compare(lambda i: (i["x"].sum(), torch.cat([i["x"], i["x"]]), i["x"].reshape(-1), i["x"].mean(0)))


def test_a_dense_arch_that_fails_at_a_batch_of_one_is_told_with_its_line() -> None:
    def fail(inputs):
        if inputs["x"].shape[0] == 1:
            raise ValueError("too few")
        return inputs["x"]

    with pytest.raises(
        ParityError, match=r"dense arch itself fails at batch size 1: ValueError: too few at .*test_parity.py"
    ):
        compare(fail)


@pytest.mark.parametrize("by", [1e-3, float("inf"), float("nan")])
def test_a_difference_is_told_by_output(by: float) -> None:
    with pytest.raises(ParityError, match=r"output 'ctr' at batch size 5: .*allowed is atol 1e-06 \+ rtol 1e-05"):
        drift(by)


def test_tolerances_are_those_given() -> None:
    entry = drift(1e-3, rtol=1e-2)
    assert entry.rtol == 1e-2
    assert entry.max_abs["ctr"] == pytest.approx(15e-3)
    assert entry.max_rel["ctr"] == pytest.approx(1e-3, rel=1e-2)
    assert entry.max_abs["like"] == 0
    assert drift(1e-3, rtol=0, atol=1).atol == 1
    with pytest.raises(ParityError):
        drift(1e-3, rtol=0, atol=1e-3)


def test_the_default_tolerance_is_relative_to_the_value() -> None:
    assert drift(5e-6).max_rel["ctr"] == pytest.approx(5e-6, rel=1e-2)
    with pytest.raises(ParityError):
        drift(5e-5)


def test_nan_equals_nan_and_infinities_equal_themselves() -> None:
    entry = compare(lambda i: (i["x"] * float("nan"), i["x"] * float("inf"), i["x"].log() * 0))
    assert set(entry.max_abs.values()) == {0.0}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.bfloat16, torch.complex64])
def test_outputs_of_any_dtype(dtype) -> None:
    assert compare(lambda i: i["x"].to(dtype)).max_abs == {"torch_output_0": 0.0}


def test_randomness_in_eval_mode_is_caught() -> None:
    with pytest.raises(ParityError, match="randomness in eval mode"):
        compare(lambda i: nn.functional.dropout(i["x"], 0.5, training=True))


def test_state_outside_of_tensors_is_caught() -> None:
    calls = []

    def drifting(inputs):
        calls.append(1)
        return inputs["x"] + len(calls)

    with pytest.raises(ParityError):
        compare(drifting)


def test_inputs_that_the_forward_changes_are_fresh_in_each_run() -> None:
    def change(inputs):
        inputs["x"].add_(1)
        return inputs["x"] * 2

    inputs = {"x": torch.ones(5, 3)}
    compare(change, inputs)
    assert torch.equal(inputs["x"], torch.ones(5, 3))
