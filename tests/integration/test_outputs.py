"""What a dense arch may return, how its outputs are named, and what the traced program makes of it."""

from __future__ import annotations

import collections
from typing import NamedTuple

import pytest
import torch

from dist_export.dense.blocks import read_blocks
from dist_export.dense.eager import run_dense_arch
from dist_export.dense.trace import trace_dense
from dist_export.errors import ModelError
from tests.support.dense_nets import Net, some_inputs


def outputs_of(fn, outputs=None):
    sample = run_dense_arch(Net(fn).eval(), read_blocks(some_inputs()), export_outputs=outputs)
    return sample, trace_dense(sample, max_batch_size=100, dynamic_dims={}).program.module()(**some_inputs())


def two(i):
    return i["a"] + i["b"], i["a"] - i["b"]


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@pytest.mark.parametrize(
    ("fn", "names"),
    [
        (lambda s, i: i["a"] + i["b"], ["torch_output_0"]),
        (lambda s, i: two(i), ["torch_output_0", "torch_output_1"]),
        (lambda s, i: list(two(i)), ["torch_output_0", "torch_output_1"]),
        (lambda s, i: Pair(*two(i)), ["torch_output_0", "torch_output_1"]),
        (lambda s, i: two(i)[:1], ["torch_output_0"]),
        (lambda s, i: dict(zip(("like", "ctr"), two(i), strict=True)), ["like", "ctr"]),
        (lambda s, i: collections.OrderedDict(z=two(i)[0], y=two(i)[1]), ["z", "y"]),
        (lambda s, i: {"ctr": two(i)[0]}, ["ctr"]),
    ],
)
def test_the_program_returns_a_tensor_or_a_flat_tuple(fn, names) -> None:
    sample, found = outputs_of(fn)
    assert list(sample.output_names) == names
    assert isinstance(found, torch.Tensor) == sample.is_single
    if not sample.is_single:
        assert type(found) is tuple
    for eager, written in zip(sample.outputs, [found] if sample.is_single else found, strict=True):
        torch.testing.assert_close(eager, written)


def test_given_names_go_by_place() -> None:
    assert outputs_of(lambda s, i: two(i)[0], ["score"])[0].output_names == ("score",)
    assert outputs_of(lambda s, i: two(i), ["x", "y"])[0].output_names == ("x", "y")
    sample, _ = outputs_of(lambda s, i: dict(zip("ab", two(i), strict=True)), ["a", "other"])
    assert sample.output_names == ("a", "other")


def test_the_keys_of_a_dict_in_another_order_are_an_order() -> None:
    inputs = some_inputs()
    sample, found = outputs_of(lambda s, i: dict(zip(("like", "ctr"), two(i), strict=True)), ["ctr", "like"])
    assert sample.output_names == ("ctr", "like")
    torch.testing.assert_close(found[0], inputs["a"] - inputs["b"])
    torch.testing.assert_close(sample.outputs[0], found[0])


def test_a_key_given_to_another_output_is_refused() -> None:
    with pytest.raises(ModelError, match="gives the name 'ctr' to another output"):
        outputs_of(lambda s, i: dict(zip(("like", "ctr"), two(i), strict=True)), ["ctr", "other"])


@pytest.mark.parametrize(
    ("fn", "outputs", "told"),
    [
        (lambda s, i: two(i), ["one"], r"export_outputs has 1 names \['one'\], but the dense arch returns 2 outputs"),
        (lambda s, i: i["a"], ["one", "two"], "has 2 names .* returns 1 outputs"),
        (
            lambda s, i: two(i),
            ["x", "x"],
            "output 1 of the dense arch is named 'x'; names must be unique and not empty",
        ),
        (lambda s, i: {"": i["a"]}, None, "named ''"),
        (lambda s, i: {0: i["a"]}, None, "named 0"),
        (lambda s, i: (i["a"], two(i)), None, "output 1 of the dense arch is a tuple"),
        (lambda s, i: {"x": {"y": i["a"]}}, None, "output x of the dense arch is a dict"),
        (lambda s, i: (i["a"], None), None, "output 1 of the dense arch is a NoneType"),
        (lambda s, i: {"x": 1.5}, None, "output x of the dense arch is a float"),
        (lambda s, i: None, None, "returns a NoneType"),
        (lambda s, i: "x", None, "returns a str"),
        (lambda s, i: (), None, "returns an empty tuple"),
        (lambda s, i: {}, None, "returns an empty dict"),
    ],
)
def test_other_outputs_are_refused(fn, outputs, told) -> None:
    with pytest.raises(ModelError, match=told):
        outputs_of(fn, outputs)


def test_a_dense_arch_that_fails_is_told_with_its_line() -> None:
    with pytest.raises(
        ModelError, match=r"fails on the sample batch: KeyError: 'gone' at .*test_outputs.py:\d+ \(.*gone"
    ):
        outputs_of(lambda s, i: i["gone"])
