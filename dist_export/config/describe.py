"""Describe settings: their groups and texts from ``schema.py``, their types, and ``--help``."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from dist_export.config.schema import ExportConfig

FIRST = (
    "ckpt_dir",
    "export_dir",
    "overwrite",
    "filter_sparse_opt",
    "num_shards",
    "treat_as_tables",
    "dtype",
    "model",
    "dataset",
    "storage_options",
)
"""The settings that most people need. ``--help`` explains only these."""

_WIDTH = 100


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An option of a command. Settings are options."""

    hint: Any
    """The type of its value."""
    default: Any
    text: str = ""
    is_flag: bool = False
    """The option takes no value."""
    adds: bool = False
    """The value is a list, and each further use adds to it."""


_HINTS = typing.get_type_hints(ExportConfig)

SETTINGS = {
    field.name: Option(
        hint=_HINTS[field.name],
        default=field.default if field.default_factory is dataclasses.MISSING else field.default_factory(),
    )
    for field in dataclasses.fields(ExportConfig)
}
"""Every setting as an option, without its text. ``MISSING`` is the default of a setting that must be set."""


def read_groups() -> dict[str, dict[str, Option]]:
    """Return title -> setting -> option from the source of ``schema.py``: a comment is a title, and the text is below a field."""
    lines = inspect.getsource(ExportConfig).splitlines()
    titles = {
        number: match[1] for number, line in enumerate(lines, 1) if (match := re.search(r"# ---- (.*) ----", line))
    }
    groups: dict[str, dict[str, Option]] = {title: {} for title in titles.values()}
    (definition,) = ast.parse("\n".join(lines)).body
    assert isinstance(definition, ast.ClassDef)
    for node, below in itertools.pairwise(definition.body):
        if isinstance(node, ast.AnnAssign):
            name, text = ast.unparse(node.target), " ".join(ast.literal_eval(below.value).split())  # type: ignore[attr-defined]
            title = titles[max(number for number in titles if number < node.lineno)]
            groups[title][name] = replace(SETTINGS[name], text=text)
    return groups


def say_type(hint: Any) -> str:
    """Return a type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(say_type(argument) for argument in arguments)
    if origin is list:
        return f"a list [{say_type(arguments[0])}, ...]"
    if origin is dict:
        return f"a mapping {{{say_type(arguments[0])}: {say_type(arguments[1])}}}"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return plain.get(hint, "anything" if hint is Any else str(hint))


def render_yaml(groups: Mapping[str, Mapping[str, Option]]) -> list[str]:
    """Return the lines of a YAML file with every setting, its text and its default, group by group."""
    import yaml

    lines: list[str] = []
    for title, options in groups.items():
        lines += ["", f"# ---- {title} ----"]
        for name, option in options.items():
            lines += textwrap.wrap(option.text, 130, initial_indent="# ", subsequent_indent="# ", **_WORDS)
            must_be_set = name in ("ckpt_dir", "export_dir")
            lines.append(f"{name}:" if must_be_set else yaml.safe_dump({name: option.default}).rstrip())
    return lines


def render_help(usage: str, groups: Mapping[str, Mapping[str, Option]], *, shows_all: bool) -> list[str]:
    """Return the lines of ``--help``: the texts of :data:`FIRST` and the names of all; with ``shows_all`` all texts."""
    lines = [*usage.splitlines(), ""]
    texts = {name: option.text for options in read_groups().values() for name, option in options.items()}
    groups = {
        title: {name: replace(option, text=option.text or texts[name]) for name, option in options.items()}
        for title, options in groups.items()
    }
    settings = {name: option for options in groups.values() for name, option in options.items()}
    if shows_all or not set(FIRST) <= set(settings):
        for title, options in groups.items():
            lines += [f"{title}:", *_render(options)]
        return lines
    lines += ["The settings that most people need:", *_render({name: settings[name] for name in FIRST})]
    lines += ["All settings (--help-all explains them):"]
    for title, options in groups.items():
        lines += [f"  {title}:", *_wrap(", ".join(options), indent=4)]
    return lines


_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _render(options: Mapping[str, Option]) -> Iterable[str]:
    import yaml

    for name, option in options.items():
        has_default = not option.is_flag and option.default not in (None, "", dataclasses.MISSING)
        default = "" if not has_default else yaml.safe_dump({name: option.default}, width=1000)
        kind = "" if option.is_flag else f"  {say_type(option.hint)}"
        yield f"  --{name}{kind}" + (f" (default{default.removeprefix(name).rstrip()})" if default else "")
        yield from _wrap(option.text, indent=6)
    yield ""


def _wrap(text: str, *, indent: int) -> list[str]:
    width = min(shutil.get_terminal_size((_WIDTH, 24)).columns, _WIDTH)
    return textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent, **_WORDS)
