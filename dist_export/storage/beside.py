"""Find a directory that a package names by the path of another time: there, or beside the package."""

from __future__ import annotations

from dist_export.errors import DistExportError
from dist_export.storage.directory import Directory
from dist_export.storage.urls import open_directory


def list_candidates(package: Directory, path: str, misses: list[str]) -> list[Directory]:
    """Return the directories that ``path`` may mean, that path first. One that nothing can open goes to ``misses``."""
    location = package.location
    candidates: list[Directory] = []
    name = path.rstrip("/").rpartition("/")[2]
    where = location.path if package.is_local else location.given
    beside = f"{where.rstrip('/').rpartition('/')[0]}/{name}"
    for url in (path, beside) if name not in ("", ".", "..") else (path,):
        # credentials for the package's store go to no other kind of store, because anybody may have written the manifest
        options = location.storage_options if _protocol_of(url) == _protocol_of(location.given) else None
        try:
            place = open_directory(url, options, follow_links=location.follow_links)
        except DistExportError as error:
            misses.append(str(error))
            continue
        if place.path not in [known.path for known in candidates]:
            candidates.append(place)
    return candidates


def _protocol_of(url: str) -> str:
    return url.partition("://")[0] if "://" in url else "file"
