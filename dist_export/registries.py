"""Model registries in the place of paths: which checkpoint a URI means, where a package goes, and its new version.

A registry is found by the entry point group ``dist_export.registries``, under the scheme of its URIs: ``models`` for
``models:/ctr/3``. Alibaba's Mos has none in its URIs (``model.<project>.<name>``); there the name is ``mos``.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from dist_export.disk import first_line
from dist_export.errors import ConfigError, ExportError

GROUP = "dist_export.registries"
MOS = "mos"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+._-]*):")
_MOS = re.compile(r"model\.[\w-]+\.\w[^:]*")


class Resolved(NamedTuple):
    """What a URI means now."""

    directory: str
    """Path or fsspec URL."""
    uri: str
    """The URI with what was open in it filled in: a version instead of an alias."""


class Registered(NamedTuple):
    """What a registry is told of a committed package. Nothing is uploaded: the registry refers to ``directory``."""

    directory: str
    source: str
    """The checkpoint, as a URI where it came from a registry."""
    digest: str
    """Of the manifest."""
    inputs: tuple[tuple[str, str, tuple[int | str, ...]], ...]
    """(name, torch dtype name, shape with names for free dimensions) of the dense arch; empty without one."""
    outputs: tuple[tuple[str, str, tuple[int | str, ...]], ...]
    versions: dict[str, str]
    """Of what wrote the package."""


class Registry(Protocol):
    """What an entry point gives, called with ``registry_options`` as keywords. Called on rank 0 alone."""

    def resolve(self, uri: str) -> Resolved:
        """Return the directory that a URI in ``ckpt_dir`` means. ConfigError where the registry has no such thing."""

    def place(self, uri: str, *, key: str) -> str:
        """Return where the package of a new version under ``uri`` goes; the same for the same ``key``.

        A rerun of an unfinished export has the same key, and so goes on with what is there.
        """

    def register(self, uri: str, package: Registered) -> str:
        """Register a committed package as a new version and return its URI; the one that is there if it is already."""


def find_registry(uri: str, options: Mapping[str, Any]) -> Registry | None:
    """Return the registry that a URI belongs to; None for a path or an fsspec URL.

    Raises:
        ConfigError: a Mos URI without a resolver, a package that is missing, options that the registry does not take.
    """
    scheme = scheme_of(uri)
    if scheme is None:
        return None
    found = [entry for entry in importlib.metadata.entry_points(group=GROUP) if entry.name == scheme]
    if not found:
        if scheme != MOS:
            return None
        raise ConfigError(
            f"{uri} is a model of Alibaba's Mos, for which no resolver is installed. Write a class with resolve, place and "
            f"register (dist_export.registries.Registry), and name it in your package's pyproject.toml: "
            f'[project.entry-points."{GROUP}"] {MOS} = "your_package:YourResolver"'
        )
    if len(found) > 1:
        raise ConfigError(
            f"{uri}: {len(found)} installed packages have a resolver for {scheme!r} ({', '.join(e.value for e in found)}); "
            "remove all but one"
        )
    try:
        registry: Registry = found[0].load()(**options)
    except ConfigError:
        raise
    except Exception as error:  # a resolver is anybody's code
        raise ConfigError(f"{uri}: the resolver {found[0].value} cannot be used: {first_line(error)}") from error
    return registry


def scheme_of(uri: str) -> str | None:
    """Return the name under which the registry of a URI is looked for; None for what can only be a path."""
    if os.path.exists(uri):
        return None
    if _MOS.fullmatch(uri):
        return MOS
    match = _SCHEME.match(uri)
    return None if match is None else match[1].lower()


def resolve(uri: str, options: Mapping[str, Any]) -> Resolved:
    """Return what a URI means; a path or an fsspec URL means itself. One rank. ConfigError as the registry says."""
    registry = find_registry(uri, options)
    if registry is None:
        return Resolved(uri, uri)
    try:
        return registry.resolve(uri)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{uri} cannot be resolved: {first_line(error)}") from error


def require(uri: str, options: Mapping[str, Any]) -> Registry:
    """Return the registry of a URI that must have one. ConfigError."""
    registry = find_registry(uri, options)
    if registry is None:
        names = sorted({entry.name for entry in importlib.metadata.entry_points(group=GROUP)})
        raise ConfigError(f"{uri} is no URI of a registry; there are resolvers for {', '.join(names) or 'none'}")
    return registry


def register(uri: str, options: Mapping[str, Any], package: Registered, *, advice: str) -> str:
    """Register a committed package and return the URI of its version; ``advice`` says what to do if that fails. One rank.

    Raises:
        ExportError: the registry does not take it; the package is committed all the same.
    """
    try:
        return require(uri, options).register(uri, package)
    except Exception as error:
        raise ExportError(
            f"the package {package.directory} is whole and committed, but could not be registered as {uri}: "
            f"{first_line(error)}. {advice}"
        ) from error
