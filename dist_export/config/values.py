"""Convert values of settings to their types, from text of the command line, from YAML and from Python."""

from __future__ import annotations

import numbers
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

import msgspec

from dist_export.config.describe import say_type
from dist_export.config.mistakes import FORMER_VALUES
from dist_export.errors import ConfigError

SECRET = ("storage_options", "target_storage_options", "registry_options")
"""Settings whose values are never shown in a message."""

_EXAMPLES = {
    "registry_options": '{"registry_uri": "http://HOST:PORT"}',
    "storage_options": '{"client_kwargs": {"endpoint_url": "http://HOST:PORT"}}',
    "target_storage_options": '{"client_kwargs": {"endpoint_url": "http://HOST:PORT"}}',
}

_EXPONENT = re.compile(r"[-+]?(?:\.\d+|\d+(?:\.\d*)?)[eE][-+]?\d+", re.ASCII)
"""A number in JSON and YAML 1.2, but text in YAML 1.1, which requires a dot and a sign."""


def read_value(name: str, value: Any, hint: Any) -> Any:
    """Return a value of YAML or Python as the type of a setting.

    If the setting takes no text, a text becomes a list of one text, or is read as on the command line. Values that are passed
    to the caller's code and to file systems (``Any``) keep their types.

    Raises:
        ConfigError: it cannot be converted to this type. The message hides the value if it may be a secret.
    """
    kinds = _kinds_of(hint)
    if isinstance(value, str) and str not in kinds:
        return [value] if list[str] in kinds else read_text(name, value, hint)
    return _to_type(name, value, hint)


def read_text(name: str, text: str, hint: Any) -> Any:
    """Return the value of an argument: the text itself if the setting takes text, otherwise the text read as YAML.

    If the setting takes a list of texts, one plain text becomes a list of one text.

    Raises:
        ConfigError: it is neither.
    """
    kinds = _kinds_of(hint)
    if list[str] in kinds and not text.lstrip().startswith(("[", "{", "- ")) and text.strip() not in ("null", "~", ""):
        return [text]
    import yaml  # here, because most commands read no YAML

    from dist_export.config.strict_yaml import load_yaml

    try:
        value = load_yaml(text, has_exponents=True)
    except yaml.YAMLError:
        value = text
    if isinstance(value, str) and str in kinds:
        return text
    try:
        return _to_type(name, value, hint)
    except ConfigError:
        if str in kinds:  # YAML made a date or a number of it
            return text
        raise


def lay_over(below: Any, value: Any) -> Any:
    """Return ``value``; if both are mappings, add the keys that only ``below`` has, at every depth."""
    if not isinstance(below, Mapping) or not isinstance(value, Mapping):
        return value
    return {**below, **{key: lay_over(below.get(key), inner) for key, inner in value.items()}}


def describe_expected(name: str, hint: Any) -> str:
    """Return a description of the values that a setting takes, for some settings with an example."""
    if name in _EXAMPLES:
        return f"a YAML mapping such as '{_EXAMPLES[name]}'"
    text = say_type(hint)
    return text + (
        f', such as ["a", "*_b"]; on the command line --{name} \'["*_b"]\'' if text.startswith("a list") else ""
    )


def _kinds_of(hint: Any) -> tuple[Any, ...]:
    """Return the types that a value may have."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _to_type(name: str, value: Any, hint: Any) -> Any:
    keys_are_text = not isinstance(value, Mapping) or all(isinstance(key, str) for key in value)
    for candidate in (value, _with_numbers(value), *(("off",) if value is False else ())):  # YAML reads off as false
        try:
            converted = msgspec.convert(candidate, hint, str_keys=True)
        except msgspec.ValidationError:
            continue
        return converted if "Any" not in str(hint) or isinstance(candidate, str) else value
    shown = " has the wrong type" if name in SECRET else f" is {value!r}"
    shown = " has keys that are no text" if not keys_are_text and dict[str, Any] in _kinds_of(hint) else shown
    former = FORMER_VALUES.get((name, value)) if isinstance(value, str) else None
    raise ConfigError(former or f"{name}{shown}; expected {describe_expected(name, hint)}")


def _with_numbers(value: Any) -> Any:
    """Return a value with numbers of other libraries as Python's own, and texts such as 1e-7 as numbers."""
    if isinstance(value, Mapping):
        return {key: _with_numbers(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_numbers(item) for item in value]
    if isinstance(value, str):
        return float(value) if _EXPONENT.fullmatch(value) else value
    if isinstance(value, (bool, int)) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)
