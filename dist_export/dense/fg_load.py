"""Reading of the feature generator's configuration (fg) and of the dense arch's blocks (mc), from objects or JSON files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dist_export.errors import ConfigError
from dist_export.formats.strict_json import is_text, show
from dist_export.storage.urls import open_directory

ConfOrPath = Mapping[str, Any] | str | os.PathLike[str]

_MAX_DEPTH = 64


def collect_confs(
    fg: Any, fg_conf_or_path: ConfOrPath | None, mc_conf_or_path: ConfOrPath | None
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return the fg and mc configurations: a given conf or path wins over ``fg``'s method, None is neither.

    Args:
        fg: None, or an object with ``get_fg_conf()`` and ``get_mc_conf()``. Only the one that is needed is called.
        fg_conf_or_path: As for :func:`load_conf`.
        mc_conf_or_path: As for :func:`load_conf`.

    Raises:
        ConfigError: ``fg`` lacks a method or the method failed, or :func:`load_conf` refused what there is.
    """
    given = {
        "fg_conf_or_path": (fg_conf_or_path, "get_fg_conf"),
        "mc_conf_or_path": (mc_conf_or_path, "get_mc_conf"),
    }
    confs = []
    for name, (conf, getter) in given.items():
        what, found = name, conf
        if conf is None and fg is not None:
            what, found = f"fg.{getter}()", _ask(fg, getter)
        confs.append(None if found is None else load_conf(found, what=what))
    return confs[0], confs[1]


def has_hashed_input(fg: Any) -> bool:
    """Whether ``fg``, or the parser in it, says that ids come hashed: RecIS's ``already_hashed`` or ``hash_in_io``."""
    holders = (fg, getattr(fg, "fg_parser", None))
    return any(getattr(holder, flag, False) is True for holder in holders for flag in ("already_hashed", "hash_in_io"))


def load_conf(conf_or_path: ConfOrPath, *, what: str) -> dict[str, Any]:
    """Return a configuration as plain JSON values, a copy that shares nothing with ``conf_or_path``.

    Args:
        conf_or_path: A mapping, or the path or fsspec URL of a JSON file.
        what: What messages call it, such as ``fg_conf_or_path``.

    Raises:
        ConfigError: The file cannot be read or is not strict JSON (no key twice, no NaN or infinity), the top is not
            an object, or a mapping holds what JSON cannot. Names the file and the place.
    """
    if isinstance(conf_or_path, Mapping):
        return _as_object(conf_or_path, what)
    if not isinstance(conf_or_path, str | os.PathLike):
        raise ConfigError(f"{what}: {show(conf_or_path)} is neither a mapping nor a path")
    path = os.fsdecode(conf_or_path)
    where = f"{what}: {path}"
    try:
        data = _read(path)
    except Exception as error:  # each storage has exceptions of its own
        raise ConfigError(f"{where} cannot be read: {type(error).__name__}: {error}") from error
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_keep_twice,
            parse_constant=_NotJson,
            parse_float=_parse_float,
        )
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON that can be read: {error}") from error
    return _as_object(value, where)


def _read(path: str) -> bytes:
    if "::" not in path:
        folder, name = os.path.split(path)
        directory = open_directory(folder or ".", follow_links=True)  # the user has named this very file
        if directory.is_local:  # a pipe or a device would be read without end
            return directory.read_text(name)
    import fsspec

    with fsspec.open(path, "rb") as file:
        data: bytes = file.read()
    return data


def _ask(fg: Any, getter: str) -> Any:
    method = getattr(fg, getter, None)
    if not callable(method):
        raise ConfigError(f"fg: {type(fg).__name__} has no method {getter}()")
    try:
        return method()
    except Exception as error:  # whatever it was, it is the caller's object that cannot say its configuration
        raise ConfigError(f"fg.{getter}() failed: {type(error).__name__}: {error}") from error


class _NotJson(str):
    """A literal that Python's parser takes and JSON does not know. Refused when its place is known."""

    __slots__ = ()


class _Twice(dict[str, Any]):
    """An object with a key twice. Refused when its place is known."""

    key = ""


def _keep_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    seen: set[str] = set()
    twice = _Twice(value)
    twice.key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return twice


def _parse_float(text: str) -> float | _NotJson:
    value = float(text)
    return value if math.isfinite(value) else _NotJson(text)


def _as_object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: the top is {show(value)}, not an object")
    plain = _as_json(value, where, "$", 0)
    assert isinstance(plain, dict)
    return plain


def _as_json(value: object, where: str, place: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{where}: {place[:80]}... is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, _NotJson) or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{where}: {place} is {value}, which JSON does not know")
    if isinstance(value, _Twice):
        raise ConfigError(f"{where}: {place} has the key {show(value.key)} twice")
    if isinstance(value, str) and not is_text(value):
        raise ConfigError(f"{where}: {place} is {show(value)}, which has half a surrogate pair")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{where}: {place} has the key {show(key)}, which is not text")
            if not is_text(key):
                raise ConfigError(f"{where}: {place} has the key {show(key)}, which has half a surrogate pair")
        return {key: _as_json(item, where, f"{place}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_as_json(item, where, f"{place}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise ConfigError(f"{where}: {place} is {show(value)}, which JSON cannot hold")


# ---- the configuration by itself -----------------------------------------------------------------------------------
