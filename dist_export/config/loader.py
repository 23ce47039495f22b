"""Read settings from YAML files, a mapping and the command line. Errors have one line."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dist_export.config.arguments import read_arguments, say_nearest
from dist_export.config.describe import SETTINGS, Option
from dist_export.config.schema import CheckpointFormat, ExportConfig
from dist_export.config.values import read_value
from dist_export.errors import ConfigError

USAGE = """\
usage: dist_export --config FILE [--key value ...]        export (under torchrun: on all ranks); also dist_export export
       dist_export init CKPT [--out FILE]                 write a commented config that exports the tables of a checkpoint
       dist_export plan --config FILE [--key value ...]   show what an export would do; write nothing
       dist_export inspect PATH                           show a checkpoint or a package
       dist_export verify PATH                            check a package
       dist_export diff A B                               compare two packages
       dist_export compact DELTA OUT                      make a full package of a delta package and its base
       dist_export report PATH --out FILE.html            write one HTML page about a package
       dist_export score PATH --input F --output F        score the rows of a file
       dist_export serve PATH                             serve a package over HTTP
       dist_export watch --config FILE [--key value ...]  export each new checkpoint of a run to a directory of versions
       dist_export versions DIR                           list what was published to a directory
       dist_export rollback DIR [VERSION]                 make an earlier version the current one
       dist_export --version                              show the version, and whether compiled kernels are in use

FILE is a YAML file of settings. --key value goes before it; --print_config shows the settings that result."""

PATH_OPTIONS = {
    "json": Option(hint=bool, default=False, is_flag=True, text="Print JSON."),
    "storage_options": dataclasses.replace(
        SETTINGS["storage_options"], text="Options for the file system of PATH (fsspec)."
    ),
    "registry_options": dataclasses.replace(SETTINGS["registry_options"], text="Options for the registry of a URI."),
}
"""Options of each command that reads one path."""

SOURCE_OPTIONS = {
    name: dataclasses.replace(
        SETTINGS[name], adds=SETTINGS[name].hint == list[str], is_flag=SETTINGS[name].hint is bool
    )
    for name in ("follow_links", "treat_as_tables", "optimizer_slots", "state_root", "dynamicemb_dims")
} | {"format": dataclasses.replace(SETTINGS["format"], hint=CheckpointFormat)}
"""Options of each command that reads a checkpoint."""


_NOT_OF_TABLES = ("ckpt_dir", "need_export_sparse", "model", "model_args", "dataset", "dataset_args")

INIT_OPTIONS = {
    "out": Option(
        hint=str, default=None, text="File to write, which must not be there yet. Without it, the config is printed."
    ),
    **{name: option for name, option in SETTINGS.items() if name not in _NOT_OF_TABLES},
    "format": SOURCE_OPTIONS["format"],
}
"""Options of ``init``."""


def parse_path(
    command: str,
    argv: Sequence[str],
    options: Mapping[str, Option],
    *,
    has_defaults: bool = True,
    names: Sequence[str] = ("path",),
    num_needed: int | None = None,
) -> dict[str, Any]:
    """Return the values of a command that reads paths, with these under ``names``. ConfigError for a mistake.

    Without ``has_defaults``, options that are not in ``argv`` are left out. Of ``names`` the first ``num_needed`` must be given,
    None for all; the others are None.
    """
    defaults = {name: option.default for name, option in options.items() if has_defaults}
    values, paths = read_arguments(argv, options, values=defaults, kind=f"option of dist_export {command}")
    needed = names[:num_needed]
    words = [name.upper() if name in needed else f"[{name.upper()}]" for name in names]
    usage = f"Usage: dist_export {command} {' '.join(words)} [--key value ...]"
    if len(paths) > len(names):
        raise ConfigError(f"{paths[len(names)]!r} is one path too many. {usage}")
    if len(paths) < len(needed):
        raise ConfigError(f"which {'path' if len(needed) == 1 else f'{len(needed)} paths'}? {usage}")
    return {**values, **dict.fromkeys(names), **dict(zip(names, paths, strict=False))}


def parse_settings(argv: Sequence[str]) -> ExportConfig:
    """Parse command-line arguments, ``--config FILE`` among them. All other arguments override the settings of files.

    Raises:
        ConfigError: an unknown or abbreviated key, a wrong type, a file that cannot be read.
    """
    return parse_with_extras(argv, {})[0]


def parse_with_extras(
    argv: Sequence[str],
    extras: Mapping[str, Option],
    *,
    defaults: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
) -> tuple[ExportConfig, dict[str, Any]]:
    """Do as :func:`parse_settings`, and also return the values of ``extras``, which are options but no settings.

    ``defaults`` gets all values that are given, extras included, and returns those of settings that are not.
    """
    files, rest = _split_config(argv)
    settings: dict[str, Any] = {}
    for path in files:
        settings |= _read_yaml(path)
    values, others = read_arguments(rest, {**SETTINGS, **extras}, values=_to_types(settings), kind="setting")
    if others:
        raise ConfigError(
            f"{others[0]!r} belongs to no option; settings are given as --key value, and a command, such as verify, goes before "
            "all options"
        )
    extra_values = {name: values.pop(name, option.default) for name, option in extras.items()}
    more = {} if defaults is None else defaults({**dict.fromkeys(settings), **values, **extra_values})
    return _build({**more, **{name: value for name, value in values.items() if value is not None}}), extra_values


def load_config(config: Mapping[str, Any] | str | os.PathLike[str]) -> ExportConfig:
    """Build the config from a mapping or the path of a YAML file. ConfigError for unknown keys and wrong types."""
    settings = dict(config) if isinstance(config, Mapping) else _read_yaml(os.fspath(config))
    if isinstance(config, Mapping) and settings.get("ckpt_dir", "") is None:
        # None in Python is deliberate. In YAML it may be a forgotten value, and then a fresh model would be exported
        settings.setdefault("format", "live")
    _refuse_unknown(settings, where="the config")
    settings = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in settings.items()}
    return _build(_to_types(settings))


def _to_types(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file or a mapping in their types. An empty key in YAML means the default."""
    return {name: read_value(name, value, SETTINGS[name].hint) for name, value in settings.items() if value is not None}


def _build(values: Mapping[str, Any]) -> ExportConfig:
    values = {name: value for name, value in values.items() if value is not None}
    needed = ("export_dir",) if values.get("format") == "live" else ("ckpt_dir", "export_dir")
    missing = [name for name in needed if name not in values and not (name == "export_dir" and "publish" in values)]
    if missing:
        live = " (format: live exports the model in memory, without ckpt_dir)" if "ckpt_dir" in missing else ""
        raise ConfigError(f"{' and '.join(missing)} must be set, in the config file or as --key value{live}")
    return ExportConfig(**values)


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml  # here, because most commands read no YAML

    from dist_export.config.strict_yaml import load_yaml

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
        if key not in SETTINGS:
            raise ConfigError(f"{where}: {key!r} is no setting{say_nearest(str(key), SETTINGS)}")


def _split_config(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Remove the ``--config`` arguments; return their files and the other arguments."""
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
