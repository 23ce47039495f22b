"""Hooks and methods for loading that are outside the dense arch are not run, and a note names the modules that have them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import dist_export
from dist_export.dense.load_hooks import list_load_hooks, note_load_hooks
from tests.support import tiny_model

WEIGHT = "dense_arch.hidden.weight"


def double(_: nn.Module, state: dict[str, Any], *__: object) -> None:
    for name in [name for name in state if name.endswith("hidden.weight")]:
        state[name] = state[name] * 2


class Overriding(tiny_model.TinyModel):
    def load_state_dict(self, state: Any, *args: Any, **more: Any) -> Any:
        return super().load_state_dict({n: v * 2 if n == WEIGHT else v for n, v in state.items()}, *args, **more)


class OverridingTable(nn.Embedding):
    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict({n: v * 2 for n, v in state.items()}, prefix, *args)


class WithExtraState(nn.Module):
    def get_extra_state(self) -> int:
        return 1

    def set_extra_state(self, state: int) -> None:
        self.its = state


class Hook:
    def __call__(self, module: nn.Module, keys: object) -> None:
        """Do nothing."""


def put_table(model: Any) -> Any:
    model.sparse_arch.table = OverridingTable(3, 2)
    return model


def with_hook(place: str, register: str, hook: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = tiny_model.TinyModel()
        if place.endswith("plain"):
            model.sparse_arch.plain = nn.Embedding(3, 2)
        getattr(model.get_submodule(place), register)(hook)
        return model

    return build


def with_extra_state() -> nn.Module:
    model = tiny_model.TinyModel()
    model.sparse_arch.more = WithExtraState()
    return model


PRE, POST = "register_load_state_dict_pre_hook", "register_load_state_dict_post_hook"
CASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "none": (tiny_model.TinyModel, []),
    "root override": (Overriding, ["model"]),
    "root before": (with_hook("", PRE, double), ["model"]),
    "root after": (with_hook("", POST, lambda module, keys: None), ["model"]),
    "an old hook": (with_hook("", "_register_load_state_dict_pre_hook", double), ["model"]),
    "partial": (with_hook("sparse_arch", POST, functools.partial(lambda its, module, keys: None, 1)), ["sparse_arch"]),
    "an object": (with_hook("sparse_arch.user", POST, Hook()), ["sparse_arch.user"]),
    "on torch's own module": (with_hook("sparse_arch.plain", PRE, double), ["sparse_arch.plain"]),
    "sparse override": (lambda: put_table(tiny_model.TinyModel()), ["sparse_arch.table"]),
    "extra state": (with_extra_state, ["sparse_arch.more"]),
    "dense, which is loaded": (with_hook("dense_arch.hidden", PRE, double), []),
}


@pytest.mark.parametrize("case", CASES)
def test_modules_with_hooks_are_named(case: str) -> None:
    build, expected = CASES[case]
    model = build()
    assert list_load_hooks(model, model.dense_arch) == expected
    assert bool(note_load_hooks(model, model.dense_arch)) is bool(expected)


def test_what_torch_registers_itself_is_not_named() -> None:
    model = tiny_model.TinyModel()
    model.sparse_arch.normed = parametrizations.weight_norm(nn.Linear(2, 2))
    model.sparse_arch.lazy = nn.LazyLinear(2)
    model.sparse_arch.counted = nn.BatchNorm1d(2)
    assert model.sparse_arch.normed._load_state_dict_pre_hooks
    assert list_load_hooks(model, model.dense_arch) == []
    assert list_load_hooks(nn.DataParallel(model), model.dense_arch) == []


@pytest.mark.parametrize("case", ["none", "root override", "root before"])
def test_an_export_tells_of_them(case: str, tmp_path: Path) -> None:
    """The program has the checkpoint's values, and the manifest says so."""
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    build, expected = CASES[case]
    manifest = dist_export.Exporter(
        build(), "sparse_arch", "dense_arch", tiny_model.build_dataset(), source, tmp_path / "out", filter_sparse_opt=True
    ).export()  # fmt: skip
    told = [note for note in manifest.notes if "were not run, because only the dense arch is loaded" in note]
    assert len(told) == len(expected)
    program = dist_export.open_package(tmp_path / "out").load_program()
    (held,) = [its for name, its in program.state_dict.items() if name.endswith("hidden.weight")]
    assert torch.equal(held, tiny_model.trained_dense_state()[WEIGHT])
