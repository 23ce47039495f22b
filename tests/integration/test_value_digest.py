"""The digest of values: equal content has one digest in any process, other content another, what hides its content none."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import functools
import logging
import pathlib
import random
import re
import subprocess
import sys
import threading
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dist_export.model.value_digest import digest_value
from tests.support import ROOT


@dataclasses.dataclass
class Config:
    dim: int
    values: Any = None


class Plain:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class Slotted:
    __slots__ = ("empty", "value")

    def __init__(self, value: Any) -> None:
        self.value = value


class Forgetful(Plain):
    """Leaves its value out when it is pickled."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Listed(list[Any]):
    def __init__(self, values: list[Any], name: str) -> None:
        super().__init__(values)
        self.name = name


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


def scale(value: float, *, by: float = 1.0) -> float:
    return value * by


def closing(over: Any) -> Callable[[], Any]:
    def call() -> Any:
        return over

    return call


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value

    def method(self) -> Any:
        return self.value


def module_with(value: float) -> torch.nn.Module:
    module = torch.nn.Linear(2, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "numbers": (lambda: 1, lambda: 2),
    "an int and a float": (lambda: 1, lambda: 1.0),
    "a text and bytes": (lambda: "a", lambda: b"a"),
    "members": (lambda: [1, [2]], lambda: [1, [3]]),
    "where a list ends": (lambda: [[1], 2], lambda: [[1, 2]]),
    "keys": (lambda: {"a": 1}, lambda: {"b": 1}),
    "sets": (lambda: {"a", "b", "c", ("d", 1)}, lambda: {"a", "b", "c", ("d", 2)}),
    "a dataclass": (lambda: Config(1), lambda: Config(2)),
    "an array in a dataclass": (lambda: Config(1, np.arange(3.0)), lambda: Config(1, np.arange(3.0) + 1)),
    "a plain object": (lambda: Plain(a=1), lambda: Plain(a=2)),
    "an object deep down": (lambda: {"x": [Plain(a=Config(1))]}, lambda: {"x": [Plain(a=Config(2))]}),
    "slots": (lambda: Slotted(1), lambda: Slotted(2)),
    "what pickling leaves out": (lambda: Forgetful(a=1), lambda: Forgetful(a=2)),
    "a list of a class of its own": (lambda: Listed([1], "a"), lambda: Listed([2], "a")),
    "its attribute": (lambda: Listed([1], "a"), lambda: Listed([1], "b")),
    "an enum": (lambda: Colour.RED, lambda: Colour.BLUE),
    "a partial": (lambda: functools.partial(scale, by=1.0), lambda: functools.partial(scale, by=2.0)),
    "a partial's function": (lambda: functools.partial(scale, by=1.0), lambda: functools.partial(max, by=1.0)),
    "a closure": (lambda: closing([1]), lambda: closing([2])),
    "a lambda": (lambda: lambda x: x + 1, lambda: lambda x: x + 2),
    "a bound method": (lambda: Holder(1).method, lambda: Holder(2).method),
    "a function": (lambda: scale, lambda: closing),
    "a class": (lambda: Config, lambda: Plain),
    "a tensor": (lambda: torch.arange(4), lambda: torch.arange(4) + 1),
    "its dtype": (lambda: torch.zeros(2), lambda: torch.zeros(2, dtype=torch.int32)),
    "its shape": (lambda: torch.zeros(4), lambda: torch.zeros(2, 2)),
    "a view": (lambda: torch.arange(6).reshape(2, 3).T, lambda: torch.arange(6).reshape(3, 2)),
    "an array of objects": (lambda: np.array([1, "a"], object), lambda: np.array([1, "b"], object)),
    "a module": (lambda: module_with(1.0), lambda: module_with(2.0)),
    "a path": (lambda: pathlib.Path("a"), lambda: pathlib.Path("b")),
    "a date": (lambda: dt.date(2026, 1, 1), lambda: dt.date(2026, 1, 2)),
    "a decimal": (lambda: decimal.Decimal("1.0"), lambda: decimal.Decimal("1.00")),
    "a pattern": (lambda: re.compile("a"), lambda: re.compile("a", re.IGNORECASE)),
    "a namespace": (lambda: types.SimpleNamespace(a=1), lambda: types.SimpleNamespace(a=2)),
    "an ordered dict": (lambda: OrderedDict(a=1), lambda: OrderedDict(a=2)),
    "a default dict": (lambda: defaultdict(int, a=1), lambda: defaultdict(float, a=1)),
    "a deque": (lambda: deque([1]), lambda: deque([2])),
    "a range": (lambda: range(3), lambda: range(4)),
    "random numbers": (lambda: random.Random(1), lambda: random.Random(2)),
    "numpy's random numbers": (lambda: np.random.default_rng(1), lambda: np.random.default_rng(2)),
    "torch's random numbers": (lambda: torch.Generator().manual_seed(1), lambda: torch.Generator().manual_seed(2)),
    "a dtype": (lambda: torch.float32, lambda: torch.float16),
    "a logger": (lambda: logging.getLogger("a"), lambda: logging.getLogger("b")),
}


def warmed(value: Any) -> Any:
    """Some objects keep what was asked of them."""
    str(value)
    return value


@pytest.mark.parametrize("name", PAIRS)
def test_content_tells(name: str) -> None:
    one, other = PAIRS[name]
    first = digest_value(one())
    if name == "torch's random numbers" and first.unknown:
        assert digest_value(other()).digest is None
        return
    assert first.unknown == ""
    assert first.digest == digest_value(warmed(one())).digest
    assert first.digest != digest_value(other()).digest


def test_another_process_says_the_same() -> None:
    """Sets are in another order there, and objects at other addresses."""
    names = [name for name in PAIRS if "random" not in name]
    code = f"from {__name__} import PAIRS, digest_value; print([digest_value(PAIRS[n][0]()).digest for n in {names!r}])"
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
    assert "None" not in told.pop()


def circle() -> list[Any]:
    found: list[Any] = [1]
    found.append(found)
    return found


def test_what_holds_itself_has_a_digest() -> None:
    assert digest_value(circle()).digest == digest_value(circle()).digest is not None


def deep() -> list[Any]:
    found: list[Any] = []
    for _ in range(100_000):
        found = [found]
    return found


@pytest.mark.parametrize(
    "make",
    [
        threading.Lock,
        lambda: (number for number in range(3)),
        lambda: Plain(a=[threading.Lock()]),
        lambda: {Slotted(threading.Lock())},
        lambda: open(__file__),  # noqa: SIM115 -- an open file is what is tried
        lambda: torch.zeros(2, device="meta"),
        lambda: torch.eye(2).to_sparse(),
        lambda: closing(threading.Lock()),
        deep,
        lambda: [[number] for number in range(200_000)],
    ],
    ids=["lock", "generator", "attribute", "member", "file", "meta", "sparse", "closure", "deep", "many"],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_hides_its_content_has_none(make: Callable[[], Any]) -> None:
    found = digest_value(make())
    assert found.digest is None
    assert found.unknown


def test_arrays_are_seen_wherever_they_are() -> None:
    held = torch.zeros(1)
    for value in (Config(1, [held]), closing(held), functools.partial(scale, by=held), Plain(a={"b": np.zeros(1)})):
        assert digest_value(value).has_arrays
    assert digest_value({Slotted(held)}).has_arrays
    assert digest_value([threading.Lock(), held]).has_arrays
    assert not digest_value([Config(1, [1.0]), closing(1), scale]).has_arrays
    assert not digest_value([held], skip=[id(held)]).has_arrays
