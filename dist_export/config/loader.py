"""Settings from YAML, a mapping and the command line, by jsonargparse over the typed config. Errors in one line."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    get_loader,
    set_parsing_settings,
)

from dist_export.config.schema import FORMER_VALUES, ExportConfig
from dist_export.config.strict_yaml import load_yaml
from dist_export.errors import ConfigError

_FIELDS = {field.name: field for field in dataclasses.fields(ExportConfig)}

_LISTS = frozenset(
    name for name, hint in typing.get_type_hints(ExportConfig).items() if list[str] in (hint, *typing.get_args(hint))
)
"""Settings that are lists of texts: one plain value stands for a list of it."""

_SECRET = ("storage_options", "target_storage_options", "registry_options")
"""Settings whose values no message shows."""


_MAPPINGS = ("model_args", "dataset_args", "fg_args", *_SECRET)
"""What is handed on by name."""
_OPAQUE = (
    "model_args",
    "dataset_args",
    "fg_args",
    *_SECRET,
    "fg_conf_or_path",
    "mc_conf_or_path",
    "prune",
)

_NESTED = ("model_args", "dataset_args", "fg_args", *_SECRET)
"""Mappings whose keys may be given one by one, with dots."""
_LEVELS = 2
"""So deep the parser itself puts keys that are given one by one together."""
_load_yaml = get_loader("yaml")

_EXAMPLES = {
    "registry_options": '{"registry_uri": "http://HOST:PORT"}',
    "storage_options": '{"client_kwargs": {"endpoint_url": "http://HOST:PORT"}}',
    "target_storage_options": '{"client_kwargs": {"endpoint_url": "http://HOST:PORT"}}',
}

RENAMED = {
    "as_hash": "to_hash_tables",
    "on_unfit": "on_overflow",
    "on_emptied": "on_empty_table",
    "on_existing": "on_unfinished",
    "tables": "treat_as_tables",
}
"""Settings under the names that they had before."""

_USAGE = """\
dist_export --config FILE [--key value ...]        export (under torchrun: on all ranks); also dist_export export
       dist_export plan --config FILE [--key value ...]   show what an export would do; write nothing
       dist_export inspect PATH                           show a checkpoint or a package
       dist_export verify PATH                            check a package"""


def build_parser(prog: str = "dist_export", *, has_help: bool = False) -> ArgumentParser:
    """Return the parser of all settings; with ``has_help`` it explains each in ``--help``."""
    if has_help:  # changes jsonargparse for the whole process, so only where the process is ours
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, usage=_USAGE, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the settings below")
    parser.add_class_arguments(ExportConfig)
    return parser


def build_path_parser(prog: str, description: str) -> ArgumentParser:
    """Return the parser of a command that looks at one path, to which the command adds its own options."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("path", help="directory, file of a checkpoint, fsspec URL, or a registry's URI")
    parser.add_argument("--json", action="store_true", help="print JSON")
    for name, what in (
        ("storage_options", "the file system"),
        ("registry_options", "the registry of a URI, under its scheme or not"),
    ):
        text = f"options for {what}, as YAML, or one by one: --{name}.key value"
        parser.add_argument(f"--{name}", type=dict[str, Any], default={}, help=text)
    return parser


def parse_path(parser: ArgumentParser, argv: Sequence[str]) -> Any:
    """Parse the arguments of such a command, options as an export takes them. ConfigError for unknown or wrong ones."""
    argv = with_underscores(argv)
    for option, text in zip(argv, [*argv, ""][1:], strict=True):
        name, equals, value = option.removeprefix("--").partition("=")
        if option.startswith("--") and name in RENAMED:
            raise ConfigError(f"--{name} is no option of {parser.prog}{_nearest(name, ())}")
        if option.startswith("--") and name in _EXAMPLES and not _is_mapping(value if equals else text):
            raise ConfigError(f"--{name} is something else; expected {_expected(name)}")
    try:
        return parser.parse_args(join_nested(argv))
    except (ArgumentError, ValueError, TypeError) as error:
        if "are required: path" in str(error):
            raise ConfigError(f"which path? Usage: {parser.prog} PATH [--key value ...]") from None
        raise _translate(error) from None


def with_underscores(argv: Sequence[str]) -> list[str]:
    """Return the arguments with ``--drop-slots`` as ``--drop_slots``; values and keys behind a dot stay as they are."""
    found = []
    for argument in argv:
        name = re.match(r"--[^=.]*", argument)
        found.append(argument if name is None else f"--{name[0][2:].replace('-', '_')}{argument[name.end() :]}")
    return found


def _with_lists(argv: Sequence[str]) -> list[str]:
    """Return the arguments with one plain value as a list of it, where a setting is a list of texts."""
    found: list[str] = []
    rest = list(argv)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name.removeprefix("--") not in _LISTS or not name.startswith("--"):
            found.append(f"{name}{equals}{value}")
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                found.append(name)  # the parser says that its value is missing
                continue
            value = rest.pop(0)
        found.append(f"{name}={value if _is_structure(value) else json.dumps([value])}")
    return found


def _is_structure(text: str) -> bool:
    """Whether a value is a list or null in YAML, or was meant to be."""
    return text.lstrip().startswith(("[", "{", "- ")) or text.strip() in ("null", "~", "")


def join_nested(argv: Sequence[str]) -> list[str]:
    """Make one argument of those of a setting of which any lies two levels deep: of several the parser keeps the last alone.

    ``--storage_options.client_kwargs.a 1 --storage_options.client_kwargs.b 2`` becomes
    ``--storage_options={"client_kwargs": {"a": 1, "b": 2}}``. Later ones are laid over earlier ones, key by key.
    """
    deep = {path[0] for path in map(_path_of, argv) if len(path) > _LEVELS and path[0] in _NESTED}
    joined: list[str] = []
    places: dict[str, int] = {}
    values: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        option, equals, text = argument.partition("=")
        name, *keys = _path_of(argument) or [""]
        if name not in deep:
            joined.append(argument)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{option} needs a value")
            text = rest.pop(0)
        try:
            value = _load_yaml(text)
        except yaml.YAMLError:
            raise ConfigError(f"{option.removeprefix('--')} is no YAML") from None
        if not keys and not isinstance(value, Mapping):
            raise ConfigError(f"--{name} is something else; expected {_expected(name)}")
        above: Any = values.get(name, {})
        for key in keys[:-1]:
            above = above.get(key, {})
            if not isinstance(above, Mapping):
                raise ConfigError(f"{option.removeprefix('--')} lies below a value")
        for key in reversed(keys):
            value = {key: value}
        values[name] = lay_over(values.get(name, {}), value) if keys else value
        if name not in places:
            places[name] = len(joined)
            joined.append("")
    for name, place in places.items():
        joined[place] = f"--{name}={json.dumps(values[name], default=str)}"
    return joined


def lay_over(given: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``given`` with what ``value`` says in its place, key by key, also of the mappings within both."""
    found = dict(given)
    for key, its in value.items():
        old = found.get(key)
        found[key] = lay_over(old, its) if isinstance(old, Mapping) and isinstance(its, Mapping) else its
    return found


def _path_of(argument: str) -> list[str]:
    """Return the steps of an option's name, none of what is no option."""
    return argument.partition("=")[0].removeprefix("--").split(".") if argument.startswith("--") else []


def _is_mapping(text: str) -> bool:
    try:
        return isinstance(load_yaml(text), dict)
    except yaml.YAMLError:
        return False


def parse_settings(parser: ArgumentParser, argv: Sequence[str]) -> ExportConfig:
    """Parse command-line arguments, ``--config FILE`` among them; a file's settings give way to all others.

    Raises:
        ConfigError: an unknown or abbreviated key, a wrong type, a file that cannot be read.
    """
    return parse_with_extras(parser, argv)[0]


def parse_with_extras(parser: ArgumentParser, argv: Sequence[str]) -> tuple[ExportConfig, dict[str, Any]]:
    """Do as :func:`parse_settings`, and return the values of arguments that are no settings beside the config."""
    argv = with_underscores(argv)
    _refuse_unknown_options(parser, argv)
    files, rest = _split_config(_with_lists(argv))
    settings: dict[str, Any] = {}
    for path in files:
        settings |= _read_yaml(path)
    return _parse(parser, settings, rest)


def load_config(config: Mapping[str, Any] | str | os.PathLike[str]) -> ExportConfig:
    """Build the config from a mapping or the path of a YAML file. ConfigError for unknown keys and wrong types."""
    settings = dict(config) if isinstance(config, Mapping) else _read_yaml(os.fspath(config))
    if isinstance(config, Mapping) and settings.get("ckpt_dir", "") is None:
        # a None in Python is meant; in YAML it may be a key that was forgotten, and a fresh model would be exported
        settings.setdefault("format", "live")
    _refuse_unknown(settings, where="the config")
    settings = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in settings.items()}
    return _parse(_parser_of_mappings() if settings.get("export_dir") is not None else build_parser(), settings, [])[0]


@functools.cache
def _parser_of_mappings() -> ArgumentParser:
    """Return the parser of complete settings without arguments, which leave it as it is. Making one takes longer than parsing."""
    return build_parser()


def _parse(
    parser: ArgumentParser, settings: dict[str, Any], argv: Sequence[str]
) -> tuple[ExportConfig, dict[str, Any]]:
    # What a user's own code or a file system takes keeps its types: to a parser, '0123' in an untyped mapping is a number.
    opaque = {name: settings[name] for name in _OPAQUE if isinstance(settings.get(name), (Mapping, list))}
    for name in _MAPPINGS:
        value = opaque.get(name, {})
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            what = "has keys that are no text" if isinstance(value, Mapping) else f"is a {type(value).__name__}"
            raise ConfigError(f"{name} {what}; expected {_expected(name)}")
    settings = {
        name: [value] if name in _LISTS and isinstance(value, str) else value for name, value in settings.items()
    }
    # A key that was left empty in YAML means its default.
    typed = {name: value for name, value in settings.items() if name not in opaque and value is not None}
    try:
        # defaults are taken as they are, so the file's settings are checked on their own first
        parsed = parser.parse_object({"export_dir": "", **typed}, defaults=False)
        if argv or "export_dir" not in typed:
            parser.set_defaults({name: parsed[name] for name in typed})
            parsed = parser.parse_args(join_nested(argv))
    except (ArgumentError, ValueError, TypeError) as error:
        raise _translate(error) from None
    values: dict[str, Any] = {}
    for name in _FIELDS:
        value = parsed.get(name)
        if hasattr(value, "as_dict"):
            value = value.as_dict()
        if name in opaque and not any(
            argument == f"--{name}" or argument.startswith(f"--{name}=") for argument in argv
        ):
            given = opaque[name]
            value = lay_over(given, value or {}) if isinstance(given, Mapping) else [*given, *(value or [])]
        if value is not None:
            values[name] = value
    needed = ("export_dir",) if values.get("format") == "live" else ("ckpt_dir", "export_dir")
    missing = [name for name in needed if name not in values]
    if missing:
        live = " (format: live exports the model in memory, without ckpt_dir)" if "ckpt_dir" in missing else ""
        raise ConfigError(f"{' and '.join(missing)} must be set, in the config file or as --key value{live}")
    return ExportConfig(**values), {name: value for name, value in vars(parsed).items() if name not in _FIELDS}


def _refuse_unknown_options(parser: ArgumentParser, argv: Sequence[str]) -> None:
    actions = parser._actions  # noqa: SLF001 -- argparse has no public list of its options
    options = {option.lstrip("-").split(".")[0] for action in actions for option in action.option_strings}
    for argument in argv:
        if argument.startswith("--"):
            key = argument[2:].split("=")[0].removesuffix("+").split(".")[0]
            if key not in options:
                raise ConfigError(f"--{key} is no setting{_nearest(key, options)}")


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            settings = load_yaml(file.read())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text file") from None
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f" in line {place.line + 1}" if place is not None else ""
        hint = "; quote a pattern that begins with *" if "*" in str(error) or "alias" in str(error) else ""
        raise ConfigError(
            f"{path} is no YAML{line}: {getattr(error, 'problem', None) or 'it cannot be parsed'}{hint}"
        ) from None
    if settings is None:
        raise ConfigError(f"{path} is empty; expected settings as key: value")
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} should hold settings as key: value, found a {type(settings).__name__}")
    _refuse_unknown(settings, where=path)
    return settings


def _refuse_unknown(settings: Mapping[Any, Any], *, where: str) -> None:
    for key in settings:
        if key not in _FIELDS:
            raise ConfigError(f"{where}: {key!r} is no setting{_nearest(str(key), _FIELDS)}")


def _nearest(key: str, names: typing.Iterable[str]) -> str:
    if key in RENAMED:
        return f"; it is called {RENAMED[key]} now"
    close = difflib.get_close_matches(key, sorted(names), n=1)
    return f"; did you mean {close[0]}?" if close else "; dist_export --help lists them"


def _split_config(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the ``--config`` arguments out; return their files and the other arguments."""
    files: list[str] = []
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key != "--config":
            rest.append(argument)
            continue
        path = value if equals else next(arguments, "")
        if not path:
            raise ConfigError("--config needs the path of a YAML file")
        files.append(path)
    return files, rest


def _translate(error: Exception) -> ConfigError:
    """Make one line of what jsonargparse says in many."""
    text = str(error)
    required = re.search(r"arguments are required: (.*)", text)
    if required:
        return ConfigError(f"{required[1].strip()} must be set, in the config file or as --key value")
    key = re.search(r'[Kk]ey "([^"]+)"', text)
    if key is None:
        return ConfigError(" ".join(text.split()))
    value = re.search(r"Given value: (.*)", text) or re.search(r"Got value: (.*)", text)
    name = key[1]
    if value is not None and (former := FORMER_VALUES.get((name, value[1].strip()))):
        return ConfigError(former)
    is_shown = value is not None and name.split(".", maxsplit=1)[0] not in _SECRET
    found = f" is {value[1].strip()!r}" if value is not None and is_shown else " has the wrong type"
    hint = ""
    if _expected(name).startswith("a list"):
        hint = f""", such as ["a", "*_b"]; on the command line --{name} '["*_b"]'"""
    return ConfigError(f"{name}{found}; expected {_expected(name)}{hint}")


def _expected(name: str) -> str:
    if name in _EXAMPLES:
        return f"a YAML mapping such as '{_EXAMPLES[name]}'"
    field = _FIELDS.get(name.split(".", maxsplit=1)[0])
    if field is None:
        return "another type"
    return _say_type(typing.get_type_hints(ExportConfig)[field.name])


def _say_type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_say_type(argument) for argument in arguments)
    if origin is list:
        return f"a list [{_say_type(arguments[0])}, ...]"
    if origin is dict:
        return f"a mapping {{{_say_type(arguments[0])}: {_say_type(arguments[1])}}}"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return plain.get(hint, "anything" if hint is Any else str(hint))
