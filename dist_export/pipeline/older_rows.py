"""A new version must not take the rows of the current one back: a dense part over an older base, or a package of older rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dist_export.errors import ConfigError
from dist_export.manifest import BaseEntry, DeltaEntry, Manifest
from dist_export.registry import bases
from dist_export.registry.versions import SCHEME, VersionDirectory
from dist_export.storage.urls import open_directory


class NewRows(NamedTuple):
    """What is known of the rows of a new package before it is written."""

    step: int | None
    """None if it is not known."""
    base: str = ""
    """The directory of the base whose rows these are; empty if the package has its own."""
    digest: str = ""
    """Of that base."""


def refuse_older_rows(
    rows: NewRows, publish: str, options: dict[str, Any], target_options: dict[str, Any] | None, *, export_dir: str
) -> list[str]:
    """Refuse a package with which serving would go back to earlier rows. Rank 0.

    Args:
        rows: those of the new package.
        publish: the directory of versions that it becomes current in.
        options: for registries.
        target_options: for the file system of packages.
        export_dir: the directory of the new package. One that has been the current version before stays what it is.

    Returns:
        A note if nobody knows which rows are later.

    Raises:
        ConfigError: the current version has later rows, or its manifest cannot be read.
    """
    registry = VersionDirectory(**options[SCHEME])
    current, _ = registry.read_current(publish)
    name = export_dir.rstrip("/").rpartition("/")[2]
    if current is None or any(switch.version == name for switch in current.switches):
        return []
    place = open_directory(registry.resolve(publish).directory, target_options)
    manifest = bases.read_manifest(place)
    if manifest is None or not manifest.tables:
        return []
    links, _ = bases.follow(place, manifest)
    known = [its for _, its in links]
    step = manifest.source.step_of_rows
    if rows.digest and rows.digest in _list_with_same_rows(known):
        return []
    is_below = rows.digest in {its.digest for its in known}
    if step is not None and rows.step is not None:
        if step <= rows.step:
            return []
    elif not is_below:
        told = f"the current version of {publish}, {current.version}, has rows {_say(step)}, and this one {_say(rows.step)}"
        return [f"{told}: whether serving goes back to earlier rows was not compared"] if rows.base else []
    whose = f"base {rows.base} has" if rows.base else "the package has"
    advice = _advise(known, publish) if rows.base else "Publish a package of later rows"
    raise ConfigError(
        f"{whose} rows {_say(rows.step)}, and the current version of {publish}, {current.version}, has rows {_say(step)}: "
        f"serving would go back to the earlier ones. Nothing was written. {advice}"
    )


def find_own_rows(delta: Manifest) -> tuple[str, DeltaEntry] | None:
    """Return a table of which a delta has rows of its own, or deletes some, with its account; None if all rows are the base's."""
    for table in delta.tables:
        its = table.delta
        if isinstance(its, DeltaEntry) and (its.changed or its.new or its.deleted):
            return table.name, its
    return None


def _list_with_same_rows(links: Sequence[Manifest]) -> set[str]:
    """Return the digests of a package and of what is below it, as far as all of these have the same rows."""
    same = set()
    for manifest in links:
        same.add(manifest.digest)
        if not isinstance(manifest.base, BaseEntry) or find_own_rows(manifest) is not None:
            break
    return same


def advise_compact(links: Sequence[Manifest], name: str, *, is_latest: bool) -> str:
    """Return how a new dense part goes on top of the rows of a package, for messages. ``name`` is that of the package."""
    if any(its.base.has_dense is True and its.dense is not None for its in links if isinstance(its.base, BaseEntry)):
        return "Export the tables too"  # no full package can be made of it
    out, base = (name, "latest") if is_latest else ("OUT", "OUT")
    return f"Export the tables too; or make a full package of it, `dist_export compact {name} {out}`, and give base: {base}"


def _advise(links: Sequence[Manifest], publish: str) -> str:
    if all(find_own_rows(its) is None for its in links):
        return "Give base: latest, or export the tables too"
    return advise_compact(links, publish, is_latest=True)


def _say(step: int | None) -> str:
    return "of an unknown step" if step is None else f"of step {step}"
