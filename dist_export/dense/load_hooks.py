"""What the caller's modules do of their own when a state is loaded into them. An export loads the dense arch alone.

A hook above the dense arch, or in the sparse arch, is not run: the package would have other values than the loaded model has, so
such a model is refused. A hook within the dense arch is run, on the copy that is exported and for the reference. Where it cannot
be run, because names are compared before or because the arch is sharded, the error names it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from dist_export.config.needs import ModelValues
from dist_export.errors import ConfigError, ModelError, ParityError
from dist_export.humanize import few
from dist_export.model.managed_collisions import is_collision_module
from dist_export.model.sparse_tables import keeps_tables
from dist_export.model.unwrap import find_arch

_LIBRARIES = ("torch.", "torchrec.", "fbgemm_gpu.", "dynamicemb.", "recis.")
_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_METHODS = ("load_state_dict", "_load_from_state_dict")
_EXTRA = "set_extra_state"
_WAY_OUT = "load the checkpoint into the model yourself, and export the model in memory (ckpt_dir=None, format: live)"


class LoadHook(NamedTuple):
    """A module that does something of the caller's own when a state is loaded into it."""

    path: str
    """Within the model; ``model`` is the model itself."""
    kind: str
    """Its class."""
    what: str
    """The hooks and methods."""
    changes_package: bool
    """Whether it is at or above an arch, or in the sparse arch, and more than the way to extra state."""
    is_run: bool
    """Whether an export runs it: it is the way to extra state of a module in the sparse arch, and nothing else."""

    def __str__(self) -> str:
        return f"{self.path} ({self.kind}): {self.what}"


def list_load_hooks(
    model: nn.Module, sparse_arch: nn.Module, dense_arch: nn.Module, *, exports_tables: bool = True
) -> list[LoadHook]:
    """Return the modules outside the dense arch with hooks or methods of the caller's own for loading. Nothing is run.

    They are hooks before and after ``load_state_dict``, and overridden ``load_state_dict``, ``_load_from_state_dict`` and
    ``set_extra_state``. Those of torch, torchrec, fbgemm, dynamicemb and recis do not count. Without ``exports_tables``, what
    the sparse arch loads is in no package.
    """
    loaded, of_sparse = _ids_within(dense_arch), _ids_within(sparse_arch)
    arches = {id(dense_arch), *([id(sparse_arch)] if exports_tables else [])}
    found = []
    for path, module in model.named_modules():
        told = [] if id(module) in loaded else _list_own(module)
        if told:
            counts = (exports_tables and id(module) in of_sparse) or bool(arches & _ids_within(module))
            hook = _describe(path or "model", module, told, counts=counts)
            is_run = id(module) in of_sparse and told == [f"its own {_EXTRA}"] and has_extra_state(module)
            found.append(hook._replace(is_run=is_run))
    return found


def check_load_hooks(model: nn.Module, config: ModelValues) -> list[str]:
    """Refuse hooks that an export does not run and that change what is exported, unless ``allow_load_hooks`` names them.

    Any rank. Returns notes on those that are let pass, and on those elsewhere.

    Raises:
        ModelError: it names the modules, their classes and their hooks.
        ConfigError: a pattern of ``allow_load_hooks`` matches none of them.
    """
    arches = (
        find_arch(model, config.sparse_model_name, "sparse_model_name"),
        find_arch(model, config.dense_model_name, "dense_model_name"),
    )
    hooks = list_load_hooks(model, *arches, exports_tables=config.need_export_sparse)
    for pattern in config.allow_load_hooks:
        if not any(fnmatchcase(hook.path, pattern) for hook in hooks):
            raise ConfigError(
                f"allow_load_hooks: the pattern {pattern!r} matches no module that has hooks or methods of its own for loading"
            )
    refused = [hook for hook in hooks if hook.changes_package and not _is_allowed(hook, config.allow_load_hooks)]
    if refused:
        raise ModelError(
            f"the model changes a state_dict while it is loaded ({few([str(hook) for hook in refused])}), and an export loads "
            "only the dense arch and does not run this, so scores could be others than those of the loaded model. Nothing was "
            f"written. Either {_WAY_OUT}; or, if the checkpoint's own values are to be served, set allow_load_hooks: "
            f"[{', '.join(repr(hook.path) for hook in refused[:3])}{', ...' if len(refused) > 3 else ''}]"
        )
    not_run = [hook for hook in hooks if not hook.is_run or _is_allowed(hook, config.allow_load_hooks)]
    if not not_run:
        return []
    note = (
        f"hooks or methods for loading a state_dict were not run, because only the dense arch is loaded: "
        f"{few([str(hook) for hook in not_run])}. Parameters that they would change are those of the checkpoint, and extra state "
        "is the model's own"
    )
    return [note]


def has_extra_state(module: nn.Module) -> bool:
    """Return whether a module has extra state in a state_dict, and keeps no tables."""
    own = type(module).get_extra_state is not nn.Module.get_extra_state
    return own and not keeps_tables(module) and not is_collision_module(module)


def has_load_hooks(module: nn.Module) -> bool:
    """Return whether anything within ``module`` does something of the caller's own when a state is loaded into it."""
    return bool(_list_within(module, ""))


@contextlib.contextmanager
def naming_hooks(dense_arch: nn.Module, path: str) -> Iterator[None]:
    """Within this block, a ModelError or ParityError names the hooks for loading within the dense arch, if it has any."""
    try:
        yield
    except (ModelError, ParityError) as error:
        hooks = _list_within(dense_arch, path)
        if not hooks:
            raise
        raise type(error)(
            f"{error}. The dense arch does something of its own when a state is loaded, which may be the cause: {few(hooks)}. "
            "It runs after the names were compared, and where the dense arch is sharded it does not run for the model that "
            f"checks the scores. If it is the cause, {_WAY_OUT}"
        ) from error


def _list_within(dense_arch: nn.Module, path: str) -> list[str]:
    found = []
    for name, module in dense_arch.named_modules():
        told = [what for what in _list_own(module) if what != f"its own {_EXTRA}"]
        if told:
            found.append(str(_describe(".".join(part for part in (path, name) if part), module, told, counts=True)))
    return found


def _list_own(module: nn.Module) -> list[str]:
    """Return the hooks and methods of the caller's own by which this module loads a state."""
    hooks = [hook for name in _HOOKS for hook in getattr(module, name, {}).values()]
    told = [f"the hook {_name_of(hook)}" for hook in hooks if _is_callers(hook)]
    return told + [f"its own {name}" for name in (*_METHODS, _EXTRA) if _overrides(module, name)]


def _describe(path: str, module: nn.Module, told: Sequence[str], *, counts: bool) -> LoadHook:
    is_only_extra = list(told) == [f"its own {_EXTRA}"]
    return LoadHook(path, type(module).__qualname__, few(list(told)), counts and not is_only_extra, is_run=False)


def _is_allowed(hook: LoadHook, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(hook.path, pattern) for pattern in patterns)


def _ids_within(module: nn.Module) -> set[int]:
    return {id(child) for child in module.modules()}


def _function_of(hook: Any) -> Any:
    """Return a hook without what torch and functools wrap it in."""
    while isinstance(hook, functools.partial) or (hasattr(hook, "hook") and not hasattr(hook, "__func__")):
        hook = hook.func if isinstance(hook, functools.partial) else hook.hook
    return getattr(hook, "__func__", hook)


def _is_callers(hook: Any) -> bool:
    function = _function_of(hook)
    return not _is_of_library(str(getattr(function, "__module__", None) or type(function).__module__))


def _name_of(hook: Any) -> str:
    function = _function_of(hook)
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)


def _overrides(module: nn.Module, name: str) -> bool:
    own = vars(module)
    if name in own and _is_callers(own[name]):
        return True
    kinds = [kind for kind in type(module).__mro__ if kind is not object and not _is_of_library(kind.__module__)]
    return any(name in vars(kind) for kind in kinds)


def _is_of_library(name: str) -> bool:
    return f"{name}.".startswith(_LIBRARIES)
