"""Dumps over a base must not take back what a later package has: rows between both, and a newer dense part.

A dump has the rows of the steps since the dump before it. So the rows that a later package changed are in the dumps if they
reach from the step of the base's rows to that of the later ones. Where nobody can know that, the export is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from dist_export.config.source_needs import DumpRange
from dist_export.config.sparse_settings import LATEST
from dist_export.errors import ConfigError
from dist_export.humanize import count
from dist_export.manifest import BaseEntry, DeltaEntry, Manifest
from dist_export.registry import base as registries
from dist_export.registry import bases
from dist_export.registry.versions import SCHEME, VersionDirectory
from dist_export.storage.urls import open_directory


class Dumps(NamedTuple):
    """Which steps there are, and which of them are taken."""

    listed: tuple[int, ...]
    """All steps of the directory, in order."""
    since: int
    """The step after which they are taken."""
    until: int | None
    """The last step that is taken; None takes all."""
    is_stated: bool
    """Whether the settings have ``since``, so that somebody vouches for the dumps after it."""

    @property
    def taken(self) -> tuple[int, ...]:
        """The steps that are taken, in order."""
        return tuple(step for step in self.listed if step > self.since and (self.until is None or step <= self.until))


class Later(NamedTuple):
    """A package that readers have, or that the settings name."""

    name: str
    """For messages, and as an argument of commands."""
    manifest: Manifest
    below: Manifest | None = None
    """Its base; None for a full package, and if the base is there no more."""


def refuse_taken_back(
    config: DumpRange,
    options: dict[str, Any],
    target_options: dict[str, Any],
    steps: tuple[int, ...],
    *,
    base: str,
    export_dir: str,
    publish: str,
) -> None:
    """Refuse dumps with which serving would go back to an earlier state. Rank 0. ConfigError.

    Args:
        config: the settings, with ``base`` as it was given.
        options: for registries.
        target_options: for the store of packages.
        steps: of all dumps.
        base: the directory of the full package below.
        export_dir: the directory of the new package.
        publish: the directory of versions that it becomes current in; empty for none.
    """
    below = bases.read_manifest(open_directory(base, target_options))
    if below is None:  # whoever opens the base says so
        return
    since = below.source.step_of_rows if config.since_step is None else config.since_step
    if since is None:  # the step is asked for later
        return
    dumps = Dumps(steps, since, config.until_step, is_stated=config.since_step is not None)
    others = [] if config.base in (None, LATEST) else [_open(str(config.base), options, target_options)]
    if publish:
        registry = VersionDirectory(**options[SCHEME])
        current, _ = registry.read_current(publish)
        name = export_dir.rstrip("/").rpartition("/")[2]
        if current is not None and all(switch.version != name for switch in current.switches):
            others.append(_open(publish, options, target_options))
    for later in others:
        if later is not None and (reason := find_taken_back(dumps, below, later)):
            raise ConfigError(f"base {base} with dumps after step {since}: {reason}. Nothing was written")


def _open(uri: str, options: dict[str, Any], target_options: dict[str, Any]) -> Later | None:
    """Return the package of a URI; None if it is not there."""
    place = open_directory(registries.resolve(uri, options).directory, target_options)
    manifest = bases.read_manifest(place)
    if manifest is None:
        return None
    found = bases.find_base(place, manifest.base) if isinstance(manifest.base, BaseEntry) else None
    return Later(uri, manifest, None if found is None else found[1])


def find_taken_back(dumps: Dumps, base: Manifest, later: Later) -> str:
    """Return what serving would lose, with what to do, if it went from a package to the dumps over a base; empty if nothing."""
    if later.manifest.digest == base.digest:
        return ""
    if reason := _find_dense(base, later) or _find_rows(dumps, base, later):
        return f"{later.name} {reason}. {_advise(later)}"
    return ""


def _find_dense(base: Manifest, later: Later) -> str:
    own = later.manifest
    if own.dense is None:
        return ""
    if isinstance(own.base, BaseEntry) and own.base.has_dense is True:
        if own.base.digest == base.digest:
            return ""
        step = None if later.below is None else later.below.source.dense_step
    else:
        step = own.source.dense_step
    mine = None if base.dense is None else base.source.dense_step
    if step is not None and mine is not None and step <= mine:
        return ""
    return f"has a dense part {_say(step)}, and that of the base, which dumps go with, is {_say(mine)}"


def _find_rows(dumps: Dumps, base: Manifest, later: Later) -> str:
    own, mine = later.manifest, base.source.step_of_rows
    step = own.source.step_of_rows
    mine = dumps.since if mine is None else mine
    if not own.tables or (step is not None and step <= mine):
        return ""
    accounts = [table.delta for table in own.tables if isinstance(table.delta, DeltaEntry)]
    is_on_base = isinstance(own.base, BaseEntry) and own.base.digest == base.digest
    if is_on_base and not any(its.changed or its.new or its.deleted for its in accounts):
        return ""
    has = f"has rows {_say(step)}, and the base {_say(mine)}"
    if not isinstance(own.source.steps, msgspec.UnsetType):
        return _find_other_dumps(dumps, mine, own.source.steps, later, has, is_on_base=is_on_base)
    if not is_on_base:
        return f"{has}, of which no dump tells all that changed"
    if deleted := sum(its.deleted for its in accounts):
        return f"deletes {count(deleted, 'row')} of the base, which no dump does"
    if step is None:
        return f"{has}, so nobody knows which dumps have its rows"
    return _find_gap(dumps, mine, step, has)


def _find_other_dumps(
    dumps: Dumps, mine: int, steps: tuple[int, ...], later: Later, has: str, *, is_on_base: bool
) -> str:
    """Return what a delta of dumps has that these dumps lack."""
    below = None if later.below is None else later.below.source.step_of_rows
    if not is_on_base and (below is None or below > mine):
        return f"{has}, and is over another base of a later or an unknown step"
    lacking = [step for step in steps if step > mine and step not in dumps.taken]
    return f"has the rows of the dump of step {lacking[0]}, which is not among those that are taken" if lacking else ""


def _find_gap(dumps: Dumps, mine: int, step: int, has: str) -> str:
    """Return why the dumps may lack rows between two steps."""
    taken = dumps.taken
    if dumps.since > mine or not taken or taken[0] > step:
        return f"{has}, and no dump between them is taken"
    if taken[-1] < step:
        return f"{has}, and the last dump that is taken is of step {taken[-1]}"
    if dumps.listed[0] > mine and not dumps.is_stated:
        return (
            f"{has}, and the first dump is of step {dumps.listed[0]}, so an earlier one may be gone; since_step: {mine} says "
            "that none is"
        )
    return ""


def _advise(later: Later) -> str:
    own = later.manifest
    if not isinstance(own.base, BaseEntry):
        return f"Give base: {later.name}" if not later.name.startswith(f"{SCHEME}:") else "Give base: latest"
    if own.base.has_dense is True and own.dense is not None:
        return "Give the dumps since the base, or export a full package of a later checkpoint first"
    is_current = later.name.startswith(f"{SCHEME}:") and "@" not in later.name
    out, base = (later.name, "latest") if is_current else ("OUT", "OUT")
    return (
        f"Make a full package of it first, `dist_export compact {later.name} {out}`, and give base: {base}; or export a full "
        "package of a later checkpoint"
    )


def _say(step: int | None) -> str:
    return "of an unknown step" if step is None else f"of step {step}"
