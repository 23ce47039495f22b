"""Read the arguments of a command: ``--name value``, ``--name=value``, ``--name.key value``, ``--name+ value``, and flags."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dist_export.config.describe import Option
from dist_export.config.values import lay_over, read_text, read_value
from dist_export.errors import ConfigError

RENAMED = {
    "as_hash": "to_hash_tables",
    "on_unfit": "on_overflow",
    "on_emptied": "on_empty_table",
    "on_existing": "on_unfinished",
    "tables": "treat_as_tables",
}
"""Former names of settings -> their names now."""


def read_arguments(
    argv: Sequence[str], options: Mapping[str, Option], *, values: Mapping[str, Any], kind: str = "option"
) -> tuple[dict[str, Any], list[str]]:
    """Return ``values`` overridden by the arguments, and the arguments that are no options.

    Later arguments override earlier ones: a whole value replaces the one before, ``--name.key`` is merged into it, and
    ``--name+`` is added to it. In names a dash means an underscore.

    Raises:
        ConfigError: an option is unknown, abbreviated, without its value, or its value has another type.
    """
    result, others, rest = dict(values), [], list(argv)
    while rest:
        argument = rest.pop(0)
        option, equals, text = argument.partition("=")
        if not option.startswith("--"):
            others.append(argument)
            continue
        first, *keys = option[2:].split(".")
        adds, name = first.endswith("+"), first.removesuffix("+").replace("-", "_")
        if name not in options:
            command = kind.removeprefix("option of ") if kind.startswith("option of ") else "dist_export"
            names = options if command != "dist_export" else [*options, "config"]  # that one was taken out before
            raise ConfigError(f"--{name} is no {kind}{say_nearest(name, names, command)}")
        known = options[name]
        if known.is_flag:
            result[name] = read_text(name, text, bool) if equals else True
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{option} needs a value")
            text = rest.pop(0)
        before = result.get(name, known.default)
        if keys:
            value = lay_over(before, _nest(option, before, keys, text))
            result[name] = read_value(name, value, known.hint)
        else:
            one_more = adds and text.lstrip().startswith("{")  # a rule of prune
            result[name] = value = read_text(name, f"[{text}]" if one_more else text, known.hint)
            if adds and not (isinstance(value, list) and isinstance(before, (list, type(None)))):
                raise ConfigError(f"{option} adds to a list, and {name} is none")
            if adds or known.adds:
                result[name] = [*(before or []), *value]
    return result, others


def say_nearest(name: str, names: Iterable[str], command: str = "dist_export") -> str:
    """Return a suggestion for an unknown name, for a message. The help of ``command`` lists all names."""
    if name in RENAMED:
        return f"; it is called {RENAMED[name]} now"
    close = difflib.get_close_matches(name, sorted(names), n=1)
    return f"; did you mean {close[0]}?" if close else f"; {command} --help lists them"


def _nest(option: str, before: Any, keys: Sequence[str], text: str) -> Any:
    """Return the value of ``--name.a.b text`` as ``{a: {b: value}}``."""
    import yaml  # here, because most commands read no YAML

    from dist_export.config.strict_yaml import UnsafeYamlError, load_yaml

    for key in keys[:-1]:
        before = before.get(key, {}) if isinstance(before, Mapping) else before
        if not isinstance(before, Mapping):
            raise ConfigError(f"{option[2:]} lies below a value")
    try:
        value = load_yaml(text, has_exponents=True)
    except yaml.YAMLError as error:
        reason = f": {error.problem}" if isinstance(error, UnsafeYamlError) else ""
        raise ConfigError(f"{option[2:]} is no YAML{reason}") from None
    for key in reversed(keys):
        value = {key: value}
    return value
