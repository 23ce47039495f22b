"""Build the caller's objects: a model, a dataset, a feature generator, from ``package.module:callable``."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_export.config.mistakes import Mistakes
from dist_export.config.needs import UserCallables
from dist_export.errors import ConfigError, DistExportError, ModelError


@dataclass(frozen=True, slots=True)
class Objects:
    """The objects that an export takes besides its settings. All are None if only the tables are exported."""

    model: Any = None
    dataset: Any = None
    dense_optimizer: Any = None
    fg: Any = None


def build_objects(config: UserCallables, *, tells_all: bool = False) -> Objects:
    """Import and call what the config names. The working directory is importable. Every rank calls it for itself.

    With ``tells_all`` the mistakes of all objects are reported together.

    Raises:
        ConfigError: a module or callable does not exist, or does not take its arguments; a model has no dataset.
        ModelError: importing or calling the user's code failed, or it returned None.
    """
    if config.model is not None and config.dataset is None and not (config.is_live and config.need_export_sparse):
        raise ConfigError("model is set but dataset is not; the dense arch is traced with one batch of it")
    if config.model is None and not config.need_export_sparse:
        raise ConfigError("need_export_sparse is false and there is no model: nothing would be exported")
    mistakes = Mistakes()

    def build(setting: str, spec: str | None, arguments: Mapping[str, Any]) -> Any:
        if not tells_all:
            return _build(setting, spec, arguments)
        return mistakes.collect(lambda: _build(setting, spec, arguments), None)

    objects = Objects(
        model=build("model", config.model, config.model_args),
        dataset=build("dataset", config.dataset, config.dataset_args) if config.model is not None else None,
        fg=build("fg", config.fg, config.fg_args),
    )
    mistakes.refuse()
    return objects


def import_objects(config: UserCallables) -> None:
    """Import what the config names, and call nothing. Raises as :func:`build_objects`."""
    for setting, spec in (("model", config.model), ("dataset", config.dataset), ("fg", config.fg)):
        if spec is not None:
            _import(setting, spec)


def _import(setting: str, spec: str) -> Any:
    """Return the callable that a setting names."""
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)
    module_name, _, path = spec.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{setting}: there is no module {error.name!r} (looked in {directory} and on sys.path)"
            ) from None
        raise ModelError(f"{setting}: importing {module_name} failed: {_tell(error)}") from error
    except Exception as error:
        raise ModelError(f"{setting}: importing {module_name} failed: {_tell(error)}") from error
    for element in path.split("."):
        if not hasattr(found, element):
            raise ConfigError(f"{setting}: {module_name!r} has no {path!r}")
        found = getattr(found, element)
    if not callable(found):
        raise ConfigError(
            f"{setting}: {spec} is a {type(found).__name__}, expected a callable that returns the {setting}"
        )
    return found


def _build(setting: str, spec: str | None, arguments: Mapping[str, Any]) -> Any:
    if spec is None:
        return None
    found = _import(setting, spec)
    _check_arguments(setting, spec, found, arguments)
    try:
        built = found(**arguments)
    except DistExportError:
        raise
    except Exception as error:
        raise ModelError(f"{setting}: {spec} failed: {_tell(error)}") from error
    if built is None:
        raise ModelError(f"{setting}: {spec} returned None, expected the {setting}")
    return built


def _tell(error: BaseException) -> str:
    """Return the text of an error of the user's own code, and its innermost line."""
    frames = traceback.extract_tb(error.__traceback__)
    line = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} at {error.filename}:{error.lineno}"
    return f"{type(error).__name__}: {line} at {frames[-1].filename}:{frames[-1].lineno}"


def _check_arguments(setting: str, spec: str, found: Any, arguments: Mapping[str, Any]) -> None:
    import inspect

    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # some builtins have none; a call reports wrong arguments
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{setting}_args do not fit {spec}{signature}: {error}") from None
