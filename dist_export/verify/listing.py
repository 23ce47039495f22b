"""Find files that a directory should not have: unnamed shards, leftovers, links that lead out, misleading names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from dist_export.formats.recis import MERGED
from dist_export.manifest import MANIFEST, Manifest
from dist_export.storage.directory import WORK_DIRECTORY, Directory
from dist_export.storage.local_io import naming_any
from dist_export.verify.report import Report

SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")
_LEFTOVER = re.compile(r"ckpt-.*\.(tmp|json|index)|.*\.tmp|\d+tensorkey\.json|\d+" + re.escape(MERGED))


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a directory: sorted paths relative to it, with forward slashes."""

    files: tuple[str, ...]
    links_out: dict[str, str]
    """Link (to a file or a directory) -> its target outside the directory."""

    def leads_out(self, path: str) -> bool:
        """Return whether a path goes through a link that leads out of the directory."""
        return bool(self.links_out) and any(path == link or path.startswith(f"{link}/") for link in self.links_out)

    def shards(self) -> list[str]:
        """Return the files that are named like shards, directly in the directory."""
        return [name for name in self.files if SHARD.fullmatch(name)]


def list_files(directory: Directory, *, is_deep: bool) -> Listing:
    """List a directory, with its subdirectories if ``is_deep``. Links to directories are not followed."""
    if not directory.is_local:
        if not is_deep:
            return Listing(tuple(directory.names()), {})
        with naming_any(directory.url):
            found = sorted(directory.walk())
        return Listing(tuple(path for path in found if not path.startswith(f"{WORK_DIRECTORY}/")), {})
    root = os.path.realpath(directory.path)
    links: dict[str, str] = {}
    return Listing(tuple(sorted(_walk(directory.path, "", root, links, is_deep=is_deep))), dict(sorted(links.items())))


def _walk(folder: str, prefix: str, root: str, links: dict[str, str], *, is_deep: bool) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if os.path.commonpath([root, target]) != root:
                    links[path] = target
                yield path
            elif entry.is_dir():
                if is_deep and path != WORK_DIRECTORY:
                    yield from _walk(entry.path, f"{path}/", root, links, is_deep=True)
            else:
                yield path


def check_listing(listing: Listing, report: Report) -> None:
    """Report links that lead out of the directory, and names that cannot be printed."""
    for link, target in listing.links_out.items():
        report.add(link, "link", f"is a link that leads out of the directory, to {target}; put the file itself there")
    for path in listing.files:
        if not path.isprintable():
            report.add(path, "name", "has characters in its name that cannot be printed")


def check_package_files(listing: Listing, manifest: Manifest, indexed: tuple[str, ...], report: Report) -> None:
    """Report files that the manifest does not name. A shard among them would mislead readers that list the directory."""
    named = {entry.path for entry in manifest.files} | {MANIFEST, *indexed}
    is_in_place = manifest.mode == "in_place"  # then other shards may be the trainer's
    for path in listing.files:
        if path in named or not path.isprintable():
            continue
        if SHARD.fullmatch(path) and not is_in_place:
            report.add(path, "stray", "is named like a shard, but neither manifest nor index names it")
        elif not listing.leads_out(path):
            report.note(path, "stray", "is not in the manifest; nothing vouches for it")


def check_recis_files(listing: Listing, indexed: tuple[str, ...], report: Report) -> None:
    """Report files that a crashed or an earlier save left in a directory that RecIS wrote."""
    for path in listing.files:
        if _LEFTOVER.fullmatch(path):
            report.add(path, "leftover", "is what a save that crashed leaves behind; the save may lack files")
    strays = [name for name in listing.shards() if name not in set(indexed)]
    if strays:
        report.note(
            strays[0], "stray", f"{len(strays)} shards are in no index, so nobody reads them (an earlier save?)"
        )
