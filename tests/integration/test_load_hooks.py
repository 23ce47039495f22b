"""Hooks and methods for loading are run in the dense arch. Elsewhere they are refused where they change what is exported."""

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
from dist_export.config.schema import ExportConfig
from dist_export.dense.load_hooks import check_load_hooks, list_load_hooks
from dist_export.errors import ConfigError, ModelError
from tests.support import exports, tiny_model

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


def settings(**more: Any) -> ExportConfig:
    return ExportConfig(ckpt_dir="/c", export_dir="/e", **more)


@pytest.mark.parametrize("case", CASES)
def test_modules_with_hooks_are_named(case: str) -> None:
    build, expected = CASES[case]
    model = build()
    hooks = list_load_hooks(model, model.sparse_arch, model.dense_arch)
    assert [hook.path for hook in hooks] == expected
    if not any(hook.changes_package for hook in hooks):
        assert bool(check_load_hooks(model, settings())) is any(not hook.is_run for hook in hooks)
        return
    with pytest.raises(
        ModelError, match=rf"{expected[0]} \({type(model.get_submodule(path_of(expected[0]))).__name__}\): "
    ):
        check_load_hooks(model, settings())
    assert len(check_load_hooks(model, settings(allow_load_hooks=expected))) == 1


def path_of(shown: str) -> str:
    return "" if shown == "model" else shown


def test_the_way_to_extra_state_alone_is_not_refused() -> None:
    model = with_extra_state()
    assert not any(hook.changes_package for hook in list_load_hooks(model, model.sparse_arch, model.dense_arch))


def test_a_module_beside_the_arches_is_not_refused() -> None:
    model = tiny_model.TinyModel()
    model.loss = OverridingTable(3, 2)
    (note,) = check_load_hooks(model, settings())
    assert "loss (OverridingTable): its own _load_from_state_dict" in note


def test_without_tables_the_sparse_arch_is_not_refused() -> None:
    model = put_table(tiny_model.TinyModel())
    assert len(check_load_hooks(model, settings(need_export_sparse=False))) == 1
    with pytest.raises(ModelError, match=r"sparse_arch\.table"):
        check_load_hooks(model, settings())


def test_a_pattern_that_allows_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"allow_load_hooks: the pattern 'sparse_arch\.\*'"):
        check_load_hooks(Overriding(), settings(allow_load_hooks=["model", "sparse_arch.*"]))


def test_what_torch_registers_itself_is_not_named() -> None:
    model = tiny_model.TinyModel()
    model.sparse_arch.normed = parametrizations.weight_norm(nn.Linear(2, 2))
    model.sparse_arch.lazy = nn.LazyLinear(2)
    model.sparse_arch.counted = nn.BatchNorm1d(2)
    assert model.sparse_arch.normed._load_state_dict_pre_hooks
    assert list_load_hooks(model, model.sparse_arch, model.dense_arch) == []
    assert list_load_hooks(nn.DataParallel(model), model.sparse_arch, model.dense_arch) == []


def export(model: nn.Module, tmp_path: Path, **more: Any) -> Any:
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    return exports.exporter(
        model, "sparse_arch", "dense_arch", tiny_model.build_dataset(), source, tmp_path / "out", filter_sparse_opt=True, **more
    ).export()  # fmt: skip


def exported(tmp_path: Path, name: str) -> torch.Tensor:
    program = dist_export.open_package(tmp_path / "out").load_program()
    (held,) = [its for key, its in program.state_dict.items() if key.endswith(name)]
    return held


@pytest.mark.parametrize("case", ["root override", "root before", "sparse override"])
def test_an_export_refuses_them(case: str, tmp_path: Path) -> None:
    """A program with the checkpoint's values would give other scores than the model that is loaded as it was trained."""
    build, (expected, *_) = CASES[case]
    with pytest.raises(
        ModelError, match=rf"(?s){expected} \(.*Nothing was written.*ckpt_dir=None.*allow_load_hooks"
    ) as caught:
        export(build(), tmp_path)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["none", "root override", "root before"])
def test_an_export_that_is_allowed_to_tells_of_them(case: str, tmp_path: Path) -> None:
    """The program has the checkpoint's values, and the manifest says so."""
    build, expected = CASES[case]
    manifest = export(build(), tmp_path, allow_load_hooks=expected)
    told = [note for note in manifest.notes if "were not run, because only the dense arch is loaded" in note]
    assert len(told) == len(expected)
    assert torch.equal(exported(tmp_path, "hidden.weight"), tiny_model.trained_dense_state()[WEIGHT])


def double_in_place(_: nn.Module, state: dict[str, Any], *__: object) -> None:
    for name in [name for name in state if name.endswith("hidden.weight")]:
        state[name].mul_(2)


def double_after(module: nn.Module, _: object) -> None:
    with torch.no_grad():
        module.weight.mul_(2)
    module.is_loaded = True


@pytest.mark.parametrize("hook", [(PRE, double), (PRE, double_in_place), (POST, double_after)])
def test_hooks_in_the_dense_arch_are_run(hook: tuple[str, Any], tmp_path: Path) -> None:
    """The program has what ``model.load_state_dict`` would give, the reference too, and the caller's model stays as it was."""
    model = with_hook("dense_arch.hidden", *hook)()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, tmp_path)
    assert torch.equal(exported(tmp_path, "hidden.weight"), 2 * tiny_model.trained_dense_state()[WEIGHT])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model.dense_arch.hidden, "is_loaded")


def test_a_hook_that_renames_is_named(tmp_path: Path) -> None:
    """Names are compared before hooks are run, and what does not fit is refused: the line says which hook may be the cause."""

    def rename(_: nn.Module, state: dict[str, Any], prefix: str, *__: object) -> None:
        state[f"{prefix}new.weight"] = state.pop(f"{prefix}hidden.weight")

    model = with_hook("dense_arch", "_register_load_state_dict_pre_hook", lambda *its: rename(model, *its))()
    model.dense_arch.new = model.dense_arch.hidden
    del model.dense_arch.hidden
    with pytest.raises(
        ModelError, match=r"missing: .*new.weight.*dense_arch \(DenseArch\): the hook .*lambda.*format: live"
    ):
        export(model, tmp_path)
