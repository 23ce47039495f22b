"""A copy of the dense arch has functions that close over the copy, and not over the caller's own modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dist_export.model.unwrap import copy_dense_arch


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.state: Any = None
        self.apply_all: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.apply_all(x)


def as_lambda(its: Base) -> Any:
    return lambda x: 1 * its.linear(x)


def as_forward(its: Base) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return its.linear(x)

    its.forward = forward
    return None


def as_partial(its: Base) -> Any:
    return functools.partial(lambda times, x: its.linear(x) * times, 1)


def of_a_weight(its: Base) -> Any:
    weight, bias = its.linear.weight, its.linear.bias
    return lambda x: x @ weight.T + bias


def of_a_view(its: Base) -> Any:
    row, bias = its.linear.weight.detach()[0], its.linear.bias
    return lambda x: torch.stack([x @ row, x @ its.linear.weight[1]], dim=-1) + bias


def as_default(its: Base) -> Any:
    return lambda x, linear=its.linear: linear(x)


def as_keyword(its: Base) -> Any:
    def call(x: torch.Tensor, *, linear: nn.Module = its.linear) -> torch.Tensor:
        return linear(x)

    return call


def of_functions(its: Base) -> Any:
    steps = {"first": [lambda x: 1 * its.linear(x)], "method": (its.linear.forward,)}
    return lambda x: (steps["first"][0](x) + steps["method"][0](x)) / 2


def of_itself(its: Base) -> Any:
    def call(x: torch.Tensor, times: int = 1) -> torch.Tensor:
        return call(x, times - 1) if times else its.linear(x)

    return call


def of_a_decorated(its: Base) -> Any:
    def plain(x: torch.Tensor) -> torch.Tensor:
        return its.linear(x)

    @functools.wraps(plain)
    def wrapped(*args: Any) -> torch.Tensor:
        return plain(*args)

    return wrapped


WAYS: list[Callable[[Base], Any]] = [
    as_lambda, as_forward, as_partial, of_a_weight, of_a_view, as_default, as_keyword, of_functions, of_itself, of_a_decorated
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_computes_with_its_own_parameters(way: Callable[[Base], Any]) -> None:
    own = Base().eval()
    own.apply_all = way(own)
    copied = copy_dense_arch(own)
    x = torch.randn(3, 2)
    before = own(x)
    assert torch.equal(copied(x), before)
    with torch.no_grad():
        copied.linear.weight.fill_(2.0)
        copied.linear.bias.fill_(1.0)
    assert torch.allclose(copied(x), 2 * x.sum(1, keepdim=True) + torch.ones(1, 2))
    assert torch.equal(own(x), before)


def test_functions_that_hold_nothing_of_the_module_are_shared() -> None:
    """They may be compared, or be known to a library."""
    held = {"a": [1]}

    def call(x: torch.Tensor) -> torch.Tensor:
        return x * held["a"][0]

    own = Base()
    own.apply_all, own.state = call, torch.relu
    copied = copy_dense_arch(own)
    assert copied.apply_all is call
    assert copied.state is torch.relu


def test_two_functions_share_what_they_close_over() -> None:
    own = Base()
    total = 0

    def add(x: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += 1
        return own.linear(x)

    def count() -> tuple[int, Base]:
        return total, own

    own.apply_all, own.state = add, count
    copied = copy_dense_arch(own)
    copied(torch.ones(1, 2))
    assert copied.state() == (1, copied)
    assert own.state() == (0, own)
