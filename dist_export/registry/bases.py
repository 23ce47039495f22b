"""Bases of deltas by their manifests alone: where the base of a delta is, and which versions are deltas on a package."""

from __future__ import annotations

import msgspec

from dist_export.errors import ConfigError, PackageError
from dist_export.manifest import MANIFEST, BaseEntry, Manifest, decode_manifest
from dist_export.redact import reason_of
from dist_export.storage.beside import list_candidates
from dist_export.storage.directory import Directory


def find_base(delta: Directory, entry: BaseEntry) -> tuple[Directory, Manifest] | None:
    """Return where the base of a delta is, and its manifest; None if it is not there.

    It is looked for beside the delta first, for it may have been copied with it, and then at its path.

    Raises:
        ConfigError: one of the places cannot be read.
    """
    for place in reversed(list_candidates(delta, entry.path, [])):
        found = read_manifest(place)
        if found is not None and found.digest == entry.digest and found.base is msgspec.UNSET:
            return place, found
    return None


def find_lack(version: Directory) -> str:
    """Return why nobody can open a package, as the end of a sentence about it; empty if its base is there, or it needs none.

    Raises:
        ConfigError: its manifest or its base cannot be read.
    """
    manifest = read_manifest(version)
    if manifest is None:
        return "is no package"
    entry = manifest.base
    if not isinstance(entry, BaseEntry) or find_base(version, entry) is not None:
        return ""
    return (
        f"is a delta of {entry.path}, and neither there nor beside it is that base, whose manifest has the digest "
        f"{entry.digest}"
    )


def has_base(delta: Directory) -> bool | None:
    """Return whether a delta and its base are there; None if the manifest of either cannot be read."""
    try:
        return not find_lack(delta)
    except ConfigError:
        return None


def list_deltas_on(base: Directory, versions: Directory) -> list[str]:
    """Return which packages in a directory of versions are deltas on one of them. ConfigError if one cannot be read."""
    names = []
    for name in sorted(versions.folders()):
        version = versions.child(name)
        manifest = read_manifest(version)
        if manifest is not None and isinstance(manifest.base, BaseEntry):
            found = find_base(version, manifest.base)
            if found is not None and found[0].is_same(base):
                names.append(name)
    return names


def read_manifest(place: Directory) -> Manifest | None:
    """Return the manifest of a package; None if there is none, or if it is damaged. ConfigError if it cannot be read."""
    where = place.describe(MANIFEST)
    try:
        return decode_manifest(place.read_text(MANIFEST), where=where)
    except (FileNotFoundError, NotADirectoryError, PackageError):
        return None
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {reason_of(error)}") from error
