"""Bases of deltas by their manifests alone: where the base of a delta is, and which versions are deltas on a package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dist_export.errors import ConfigError, PackageError
from dist_export.formats.delta_entries import MOST_LINKS
from dist_export.manifest import MANIFEST, BaseEntry, Manifest, decode_manifest
from dist_export.redact import reason_of
from dist_export.storage.beside import list_candidates
from dist_export.storage.directory import Directory
from dist_export.storage.urls import open_directory


def find_base(delta: Directory, entry: BaseEntry) -> tuple[Directory, Manifest] | None:
    """Return where the base of a delta is, and its manifest; None if it is not there.

    It is looked for beside the delta first, for it may have been copied with it, and then at its path.

    Raises:
        ConfigError: one of the places cannot be read.
    """
    for place in reversed(list_candidates(delta, entry.path, [])):
        found = read_manifest(place)
        if found is not None and found.digest == entry.digest:
            return place, found
    return None


def follow(package: Directory, manifest: Manifest) -> tuple[list[tuple[Directory, Manifest]], str]:
    """Return a package and all that is below it down to a full package, and why that is not all, as the end of a sentence.

    The sentence is about the package, and empty if nothing lacks.

    Raises:
        ConfigError: a manifest cannot be read.
    """
    links = [(package, manifest)]
    while isinstance(entry := links[-1][1].base, BaseEntry):
        place = links[-1][0]
        whose = "is" if len(links) == 1 else f"needs {place.url}, which is"
        if len(links) > MOST_LINKS:
            return links, f"{whose} the {len(links)}th delta on top of each other, and at most {MOST_LINKS} can be"
        found = find_base(place, entry)
        if found is None:
            return links, (
                f"{whose} a delta of {entry.path}, and neither there nor beside it is that base, whose manifest has the digest "
                f"{entry.digest}"
            )
        links.append(found)
    return links, ""


def find_lack(version: Directory) -> str:
    """Return why nobody can open a package, as the end of a sentence about it; empty if all is there that it needs.

    Raises:
        ConfigError: its manifest or one below it cannot be read.
    """
    manifest = read_manifest(version)
    return "is no package" if manifest is None else follow(version, manifest)[1]


def has_base(delta: Directory) -> bool | None:
    """Return whether a delta and its base are there; None if the manifest of either cannot be read."""
    try:
        return not find_lack(delta)
    except ConfigError:
        return None


def list_deltas_on(base: Directory, versions: Directory) -> list[str]:
    """Return which packages in a directory of versions need one of them. ConfigError if one cannot be read."""
    names = []
    for name in sorted(versions.folders()):
        version = versions.child(name)
        manifest = read_manifest(version)
        if manifest is not None and any(its.is_same(base) for its, _ in follow(version, manifest)[0][1:]):
            names.append(name)
    return names


def list_below(base_of: Mapping[str, str | None], name: str | None) -> list[str]:
    """Return what a version is on top of, as far as ``base_of`` tells: the version or directory below each version."""
    found: list[str] = []
    while (below := base_of.get(name or "")) and below not in found:
        found.append(below)
        name = below
    return found


def list_needed(base_of: Mapping[str, str | None], names: Iterable[str], versions: Directory) -> set[str]:
    """Return all that some versions are on top of: versions, and directories elsewhere. ConfigError if one cannot be read.

    What was never published is in no ``base_of``, as a delta elsewhere is not: its manifest and those below it tell.
    """
    needed = {below for name in names for below in list_below(base_of, name)}
    for where in needed - base_of.keys():
        place = open_directory(where, versions.location.storage_options) if "/" in where else versions.child(where)
        manifest = read_manifest(place)
        links = [place] if manifest is None else [link for link, _ in follow(place, manifest)[0]]
        for name in versions.folders():  # a link to a version may have any name
            if any(link.is_same(versions.child(name)) for link in links):
                needed = {*needed, name, *list_below(base_of, name)}
    return needed


def read_manifest(place: Directory) -> Manifest | None:
    """Return the manifest of a package; None if there is none, or if it is damaged. ConfigError if it cannot be read."""
    where = place.describe(MANIFEST)
    try:
        return decode_manifest(place.read_text(MANIFEST), where=where)
    except (FileNotFoundError, NotADirectoryError, PackageError):
        return None
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {reason_of(error)}") from error
