"""Check URLs of directories, and open them with the right back end."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from dist_export.errors import ConfigError
from dist_export.redact import first_line, note_secrets, redact_text
from dist_export.storage.directory import Directory, Location
from dist_export.storage.local_directory import LocalDirectory

_PACKAGES = {
    "s3": "s3fs (the extra [s3] of dist_export)",
    "s3a": "s3fs (the extra [s3] of dist_export)",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "oss": "ossfs",
    "hdfs": "pyarrow",
}
"""What pip installs for a protocol whose fsspec package is missing."""

STORES = tuple(sorted({"file", "memory", *_PACKAGES}))
"""Protocols of stores, for messages; fsspec has more."""


def known_protocols() -> set[str]:
    """Return the protocols of all fsspec URLs that could be opened, even if their package is missing."""
    import fsspec

    return {*fsspec.available_protocols(), *fsspec.registry}


def open_directory(
    url: str | os.PathLike[str],
    storage_options: dict[str, Any] | None = None,
    *,
    follow_links: bool = False,
    is_file: bool = False,
) -> Directory:
    """Return the directory at ``url``, which need not exist. Sends no request.

    With ``is_file`` the URL names a file: its directory then shows only that file, whatever else it holds.

    Raises:
        ConfigError: a URL or options that no store accepts, or a missing package.
    """
    given = os.fspath(url)
    shown = redact_text(given)
    if not isinstance(storage_options, (Mapping, type(None))):
        raise ConfigError(f"{shown}: storage_options is a {type(storage_options).__name__}, expected a mapping")
    note_secrets(storage_options)
    if "::" in given:
        # an alias could hide that the target is the source, whose files would then be overwritten
        raise ConfigError(f"{shown}: chained URLs are not taken; give the URL of the store itself")

    def locate(path: str) -> Location:
        parent, _, only = path.rpartition("/") if is_file else (path, "", None)
        return Location(given, parent, storage_options, follow_links, only)

    if "://" not in given:  # loading fsspec takes as long as half of numpy
        return LocalDirectory(locate(os.path.abspath(os.path.expanduser(given))))
    return _open_store(given, shown, storage_options, locate)


def _open_store(
    given: str, shown: str, storage_options: dict[str, Any] | None, locate: Callable[[str], Location]
) -> Directory:
    """Open a URL with a protocol. ``locate`` makes the location of a path on that store."""
    from fsspec.implementations.local import LocalFileSystem

    from dist_export.storage import s3
    from dist_export.storage.fsspec_directory import FsspecDirectory
    from dist_export.storage.s3_directory import S3Directory

    fs, path = _reach(given, shown, storage_options)
    if isinstance(fs, LocalFileSystem):
        return LocalDirectory(locate(os.path.abspath(path)))
    location = locate(path.rstrip("/"))
    if not s3.is_s3(fs):
        return FsspecDirectory(location, fs)
    if not location.path.partition("/")[0]:
        raise ConfigError(f"{shown}: names no bucket; expected {_protocol_of(given)}://BUCKET/PREFIX")
    return S3Directory(location, fs)


def _protocol_of(url: str) -> str:
    return url.partition("://")[0] if "://" in url else "file"


def _reach(given: str, shown: str, storage_options: dict[str, Any] | None) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path on it. ConfigError if there is none."""
    import fsspec

    from dist_export.storage import s3

    protocol = _protocol_of(given)
    try:
        fs, path = fsspec.core.url_to_fs(given, **s3.adapt_options(protocol, storage_options or {}))
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        advice = f"pip install {package}" if package else "install the fsspec package of this store"
        raise ConfigError(
            f"{shown}: the package that {protocol}:// needs is missing ({first_line(error)}): {advice}"
        ) from error
    except Exception as error:  # options go to a store's own code, which may raise anything
        raise ConfigError(f"{shown}: no file system for this URL: {first_line(error)}") from error
    return fs, path


def reopen_directory(directory: Directory) -> Directory:
    """Return the same directory with a file system of this process. fsspec's file systems do not survive a fork."""
    location = directory.location
    return open_directory(
        location.given, location.storage_options, follow_links=location.follow_links, is_file=location.only is not None
    )


def open_place(
    url: str | os.PathLike[str], storage_options: dict[str, Any] | None = None, *, follow_links: bool = False
) -> Directory:
    """Return the directory at ``url``. If ``url`` is a file, return its parent directory, which then shows only that file."""
    directory = open_directory(url, storage_options, follow_links=follow_links)
    if not directory.names_file():
        return directory
    return open_directory(url, storage_options, follow_links=follow_links, is_file=True)
