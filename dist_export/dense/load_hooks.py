"""What the caller's modules do when a state is loaded into them, and an export does not run: it loads the dense arch alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from dist_export.humanize import few

_LIBRARIES = ("torch.", "torchrec.", "fbgemm_gpu.", "dynamicemb.", "recis.")
_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_METHODS = ("load_state_dict", "_load_from_state_dict", "set_extra_state")


def list_load_hooks(model: nn.Module, dense_arch: nn.Module) -> list[str]:
    """Return the paths of modules outside the dense arch with hooks or methods of the caller's own for loading.

    They are hooks before and after ``load_state_dict``, and overridden ``load_state_dict``, ``_load_from_state_dict`` and
    ``set_extra_state``. Those of torch, torchrec, fbgemm, dynamicemb and recis do not count. The model itself is ``"model"``.
    """
    loaded = {id(module) for module in dense_arch.modules()}
    return [
        path or "model"
        for path, module in model.named_modules()
        if id(module) not in loaded and (_overrides_loading(module) or any(map(_is_callers, _hooks_of(module))))
    ]


def note_load_hooks(model: nn.Module, dense_arch: nn.Module) -> list[str]:
    """Return a note on what :func:`list_load_hooks` finds; nothing where that is nothing. Any rank; nothing is run."""
    names = list_load_hooks(model, dense_arch)
    if not names:
        return []
    note = (
        f"hooks or methods for loading a state_dict ({few(names)}) were not run, because only the dense arch is loaded: values "
        "that they would change, of tables or of the dense arch, are those of the checkpoint. Save the checkpoint with the "
        "values that serving needs"
    )
    return [note]


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    for name in _HOOKS:
        yield from getattr(module, name, {}).values()


def _is_callers(hook: Any) -> bool:
    """Return whether a hook is the caller's own, through what torch and functools wrap it in."""
    while isinstance(hook, functools.partial) or (hasattr(hook, "hook") and not hasattr(hook, "__func__")):
        hook = hook.func if isinstance(hook, functools.partial) else hook.hook
    function = getattr(hook, "__func__", hook)
    where = getattr(function, "__module__", None) or type(function).__module__
    return not _is_of_library(str(where))


def _overrides_loading(module: nn.Module) -> bool:
    own = vars(module)
    if any(name in own and _is_callers(own[name]) for name in _METHODS):
        return True
    kinds = [kind for kind in type(module).__mro__ if kind is not object and not _is_of_library(kind.__module__)]
    return any(name in vars(kind) for kind in kinds for name in _METHODS)


def _is_of_library(name: str) -> bool:
    return f"{name}.".startswith(_LIBRARIES)
