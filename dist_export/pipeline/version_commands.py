"""The commands ``versions`` and ``rollback``: what is in a directory of versions, and an earlier one made current again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dist_export.config.loader import PATH_OPTIONS
from dist_export.registry.versions import SCHEME, Version, VersionDirectory
from dist_export.reporting.printing import print_json, print_lines

USAGE = {
    "versions": (
        "usage: dist_export versions DIR [--key value ...]\n\nList the versions of a directory that exports are published to, "
        "the last published first. * is the current one. `published` (published_at with --json) is when a version became current "
        "for the last time. A delta is shown with its base, and a base that is gone is marked."
    ),
    "rollback": (
        "usage: dist_export rollback DIR [VERSION] [--key value ...]\n\nMake an earlier version the current one; without VERSION "
        "the one before it."
    ),
}
OPTIONS = {
    "versions": {name: PATH_OPTIONS[name] for name in ("json", "storage_options")},
    "rollback": {"storage_options": PATH_OPTIONS["storage_options"]},
}
NAMES = {"versions": ("dir",), "rollback": ("dir", "version")}


def run(command: str, arguments: Mapping[str, Any]) -> None:
    """Run a command and print what it says. ConfigError where there is no such version, ExportError where another was faster."""
    registry = VersionDirectory(storage_options=arguments["storage_options"])
    where = arguments["dir"].removeprefix(f"{SCHEME}:")
    if command == "rollback":
        print_lines([f"{where}: {registry.rollback(where, arguments['version'])} is the current version"])
        return
    found = registry.list_versions(where)
    print_json([{**version._asdict(), "kind": _kind(version)} for version in found]) if arguments[
        "json"
    ] else print_lines(_render(found))


def _render(found: Sequence[Version]) -> list[str]:
    width = max(len(version.name) for version in found)
    lines = []
    for version in found:
        step = "" if version.step is None else f"  step {version.step:,}"
        kind = _kind(version) if version.base is None else f"{_kind(version)} over {version.base}{_say_base(version)}"
        removed = "" if version.is_there else "  removed"
        mark = "*" if version.is_current else " "
        when = f"published {version.published_at[:19]}Z"
        lines.append(f"{mark} {version.name:{width}}  {when}{step}  {kind}{removed}")
    return lines


def _kind(version: Version) -> str:
    return "full" if version.base is None else "delta"


def _say_base(version: Version) -> str:
    if version.has_base is None:
        return ", which cannot be read"
    return ", which is gone" if version.is_there and not version.has_base else ""
