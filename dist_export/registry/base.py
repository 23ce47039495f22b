"""Use model registries like paths: find the checkpoint of a URI, the directory of a package, and its new version.

A registry is found through the entry point group ``dist_export.registries``, under the scheme of its URIs: ``models`` for
``models:/ctr/3``. URIs of Alibaba's Mos have no scheme (``model.<project>.<name>``); their entry point is named ``mos``.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from dist_export.errors import ConfigError, DistExportError, ExportError
from dist_export.redact import first_line, note_secrets
from dist_export.storage.urls import STORES, known_protocols

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")

GROUP = "dist_export.registries"
MOS = "mos"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+._-]*):")
_ROOTED = re.compile(r"[A-Za-z][A-Za-z0-9+._-]*:/")
_LOCAL = ("file", "local")
"""Protocols that fsspec also accepts with one slash."""

_CLOSE = 0.75
"""Similarity from which an unknown scheme counts as a misspelt known one."""

_MOS = re.compile(r"model\.[\w-]+\.\w[^:]*")


class Resolved(NamedTuple):
    """The current meaning of a URI."""

    directory: str
    """A path or an fsspec URL."""
    uri: str
    """The URI with its exact version: an alias is replaced by the version."""


class Registered(NamedTuple):
    """The data of a committed package for a registry. Nothing is uploaded: the registry refers to ``directory``."""

    directory: str
    """An absolute path, or an fsspec URL."""
    source: str
    """The checkpoint: a URI if it came from a registry, otherwise as ``directory``; empty for a model in memory."""
    digest: str
    """The digest of the manifest."""
    inputs: tuple[tuple[str, str, tuple[int | str, ...]], ...]
    """(name, torch dtype name, shape with names for free dimensions) of the dense arch; empty without one."""
    outputs: tuple[tuple[str, str, tuple[int | str, ...]], ...]
    versions: dict[str, str]
    """The versions of the software that wrote the package."""
    step: int | None = None
    """Of the checkpoint, where it is one of a training run."""
    seen: str = ""
    """What the registry's ``look`` returned before the export began."""
    base: str = ""
    """Of a delta, the directory of its base, as ``directory``; empty for a full package."""


class LaterStepError(ExportError):
    """The current version is of a later step, so that the same export again would be refused, too."""


class Registry(Protocol):
    """The class that an entry point names. It is called with its ``registry_options`` as keywords, only on rank 0.

    Methods raise ConfigError for mistakes that the user can correct. Other exceptions are reported in one line, with their type.

    A registry may also have a method ``check(uri)``. It is called before anything is written, and raises ConfigError if no
    new version can be made under ``uri``. Another method, ``look(uri)``, returns the registry's state at that time as a text,
    which ``register`` gets as ``package.seen``, so that it can tell whether somebody else was faster.
    """

    def resolve(self, uri: str) -> Resolved:
        """Return the directory that a URI in ``ckpt_dir`` means. ConfigError if the registry does not have it."""

    def place(self, uri: str, *, key: str) -> str:
        """Return where the package of a new version under ``uri`` goes. The same ``key`` gives the same directory.

        A rerun of an unfinished export has the same key, so it resumes that export.
        """

    def register(self, uri: str, package: Registered) -> str:
        """Register a committed package as a new version and return its URI. If it is registered already, return that version."""


def find_registry(uri: str, options: Mapping[str, Any]) -> Registry | None:
    """Return the registry that a URI belongs to; None for a path or an fsspec URL.

    Raises:
        ConfigError: a Mos URI without a resolver, an unknown scheme, a missing package, or options that the registry does
            not take.
    """
    scheme = scheme_of(uri)
    if scheme is None:
        return None
    found = [entry for entry in _entry_points() if entry.name == scheme]
    if not found:
        if scheme != MOS:
            _refuse_unknown(uri, scheme)
            return None
        raise ConfigError(
            f"{uri} is a model of Alibaba's Mos, for which no resolver is installed. Write a class with resolve, place and "
            f"register (dist_export.registry.base.Registry), and name it in your package's pyproject.toml: "
            f'[project.entry-points."{GROUP}"] {MOS} = "your_package:YourResolver"'
        )
    if len(found) > 1:
        raise ConfigError(
            f"{uri}: {len(found)} installed packages have a resolver for {scheme!r} ({', '.join(e.value for e in found)}); "
            "remove all but one"
        )
    note_secrets(options)
    try:
        registry: Registry = found[0].load()(**options_of(scheme, options))
    except ConfigError:
        raise
    except Exception as error:  # a resolver is third-party code
        raise ConfigError(
            f"{uri}: the resolver {found[0].value} cannot be used: {_say(error)}. Options that only one registry takes stand "
            f"under its scheme: registry_options: {{{scheme}: {{...}}}}"
        ) from error
    return registry


def options_of(scheme: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for the registry of one scheme.

    A mapping under the scheme of an installed resolver is only for that resolver. All other options are for every registry.
    """
    schemes = list_schemes()
    own = {key: value for key, value in options.items() if key in schemes and isinstance(value, Mapping)}
    common = {key: value for key, value in options.items() if key not in own}
    return common | dict(own.get(scheme, {}))


def list_schemes() -> list[str]:
    """Return the schemes that have a resolver."""
    return sorted({entry.name for entry in _entry_points()})


def _entry_points() -> Iterable[EntryPoint]:
    """Return the resolvers: what installed packages offer, and the directory of versions, which needs no other package."""
    from importlib import metadata

    own = metadata.EntryPoint(name="versions", value="dist_export.registry.versions:VersionDirectory", group=GROUP)
    return [*metadata.entry_points(group=GROUP), own]


def scheme_of(uri: str) -> str | None:
    """Return the entry point name for the registry of a URI; None if the text can only be a path."""
    if os.path.exists(uri):
        return None
    if _MOS.fullmatch(uri):
        return MOS
    match = _SCHEME.match(uri)
    return None if match is None else match[1].lower()


def _refuse_unknown(uri: str, scheme: str) -> None:
    """Refuse a misspelt scheme, which would otherwise become the name of a local directory."""
    if _ROOTED.match(uri) is None:
        return
    protocols, schemes = known_protocols(), list_schemes()
    if scheme in protocols:
        if "://" in uri or scheme in _LOCAL:
            return
        raise ConfigError(f"{uri}: a store's URL has two slashes: {scheme}:/{uri.partition(':')[2]}")
    close = difflib.get_close_matches(scheme, [*schemes, *sorted(protocols)], n=1, cutoff=_CLOSE)
    hint = f"; did you mean {close[0]}:?" if close else "."
    advice = "" if "://" in uri else f". A directory of this name is written ./{uri}"
    raise ConfigError(
        f"{uri}: no file system and no registry is called {scheme}, nor is this a path that is there{hint} Known are the "
        f"registries {', '.join(schemes) or '(none)'} and the stores {', '.join(STORES)} and others of fsspec{advice}"
    )


def resolve(uri: str, options: Mapping[str, Any]) -> Resolved:
    """Return the meaning of a URI; a path or an fsspec URL means itself. One rank. ConfigError from the registry."""
    registry = find_registry(uri, options)
    if registry is None:
        return Resolved(uri, uri)
    return _asking(f"{uri} cannot be resolved", lambda: registry.resolve(uri))


def place(registry: Registry, uri: str, *, key: str) -> str:
    """Return where the package of a new version goes. One rank. ConfigError from the registry."""
    return _asking(f"{uri}: its registry has no place for a package", lambda: registry.place(uri, key=key))


def require(uri: str, options: Mapping[str, Any]) -> Registry:
    """Return the registry of a URI. ConfigError if it already knows that it cannot make a new version there."""
    registry = find_registry(uri, options)
    if registry is None:
        names = ", ".join(list_schemes()) or "none"
        raise ConfigError(f"{uri} is no URI of a registry; there are resolvers for {names}")
    check = getattr(registry, "check", None)  # the method is optional
    if check is not None:
        _asking(f"{uri}: its registry makes no version there", lambda: check(uri))
    return registry


def look(uri: str, options: Mapping[str, Any]) -> str:
    """Return the state of a registry before an export, empty if it has no ``look``. One rank. ConfigError from the registry."""
    seeing = getattr(find_registry(uri, options), "look", None)
    return "" if seeing is None else str(_asking(f"{uri} cannot be looked at", lambda: seeing(uri)))


def register(uri: str, options: Mapping[str, Any], package: Registered, *, advice: str) -> str:
    """Register a committed package and return the URI of its version; ``advice`` says what to do if that fails. One rank.

    Raises:
        ExportError: the registry refuses it. The package is committed nevertheless.
    """
    try:
        return require(uri, options).register(uri, package)
    except Exception as error:
        if isinstance(error, LaterStepError):
            advice = "The same export again would be refused, too"
        raise ExportError(
            f"the package {package.directory} is whole and committed, but could not be registered as {uri}: "
            f"{_say(error)}. {advice}"
        ) from error


def _asking(what: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except ConfigError:
        raise
    except Exception as error:  # a resolver is third-party code
        raise ConfigError(f"{what}: {_say(error)}") from error


def _say(error: Exception) -> str:
    """Return the text of an error. If it is not one of ours, add its type: the text of a KeyError is only the key."""
    return first_line(error) if isinstance(error, DistExportError) else f"{type(error).__name__}: {first_line(error)}"
