"""Look at a training run and at the directory of versions, as often as every second. Rank 0 only."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import msgspec
import xxhash

from dist_export.checkpoint.model_weights import ModelWeights
from dist_export.config.source_needs import WatchedRun
from dist_export.errors import CheckpointError, ConfigError, DistExportError, UnaskedError
from dist_export.humanize import few
from dist_export.manifest import MANIFEST, decode_manifest
from dist_export.pipeline.locate import options_for_registries
from dist_export.pipeline.run_dir import LIST, find_checkpoint, is_checkpoint, list_children, read_list
from dist_export.redact import reason_of
from dist_export.registry.base import options_of
from dist_export.registry.versions import SCHEME, VERSIONS, Current, VersionDirectory, parse
from dist_export.storage.directory import Directory
from dist_export.storage.urls import open_directory, open_place
from dist_export.watch.decision import Checkpoint, Seen

_NANOSECONDS = 1e9
_NUM_RECENT = 3
"""How many of the newest checkpoints are looked at for changes each time."""


class _Found(NamedTuple):
    """What a run has."""

    checkpoint: Checkpoint | None
    problems: tuple[str, ...]


class Lookout:
    """Looks at one run. Files that have not changed are not read again."""

    def __init__(self, config: WatchedRun, *, needs_dense: bool, weights: ModelWeights | None) -> None:
        """Keep the settings. ``needs_dense`` and ``weights``: as for :func:`~dist_export.pipeline.run_dir.find_checkpoint`."""
        self._config = config
        self._needs_dense = needs_dense
        self._weights = weights
        self._registry = VersionDirectory(**options_of(SCHEME, options_for_registries(config)))
        self._stamp = ""
        self._found: _Found | None = None
        self._shares: dict[str, float] = {}
        self._first_seen = "", 0.0

    def look(self) -> Seen:
        """Return what is there now.

        Raises:
            ConfigError: ``ckpt_dir`` is no training run.
            UnaskedError: the settings do not fit the newest checkpoint.
        """
        try:
            current, _ = self._registry.read_current(self._config.export_dir)
        except ConfigError as error:
            return Seen(problems=(str(error),), is_readable=False)
        try:
            found = self._look_at_run(current)
        except UnaskedError:
            raise
        except (CheckpointError, OSError) as error:
            return Seen(current=current, problems=(f"the run cannot be read: {reason_of(error)}",), is_readable=False)
        return Seen(
            checkpoint=found.checkpoint,
            current=current,
            last_share=0.0 if current is None else self._share_of(current),
            problems=found.problems,
        )

    # ---- the run ----

    def _look_at_run(self, current: Current | None) -> _Found:
        """Return the latest complete checkpoint, once nobody writes it any more."""
        config = self._config
        directory = open_place(config.ckpt_dir or "", config.storage_options, follow_links=config.follow_links)
        children = sorted(list_children(directory), reverse=True)
        if not children:
            if is_checkpoint(directory, config.format, has_step=False):
                raise ConfigError(
                    f"ckpt_dir {directory.url} is a checkpoint; watch follows a training run, so give the directory above it"
                )
            if not directory.exists():
                return _Found(
                    None,
                    (f"there is no {directory.url} yet; it is waited for. If it is mistyped, stop and mend ckpt_dir",),
                )
            others = few(sorted(directory.folders()))
            apart = f" ({others} has no name such as ckpt_100 or 100, by which its step is known)" if others else ""
            return _Found(None, (f"{directory.url} has no checkpoint yet{apart}; it is waited for",))
        listed = read_list(directory)
        published = set() if current is None else {switch.step for switch in current.switches}
        recent = []
        for step, name in children[:_NUM_RECENT]:
            if step in published:
                break
            recent.append(name)
        stamps = {name: _stamp_of(directory.child(name)) for name in recent}
        stamp = _digest([children, listed, sorted(stamps.items()), sorted(map(str, published))])
        is_settled, self._stamp = stamp == self._stamp, stamp
        if is_settled and self._found is not None:
            return self._found
        self._found = None
        if not recent:  # the newest is published already
            self._found = _Found(None, ())
            return self._found
        found = self._find(directory, dict(children), stamps, listed)
        # a list of finished saves is a promise; without one, a file may still be missing that no header names
        is_promised = found.checkpoint is not None and not found.problems and listed is not None
        if not (is_settled or is_promised):
            return _Found(None, ())
        self._found = found
        return found

    def _find(
        self, directory: Directory, names: dict[int, str], stamps: dict[str, str], listed: list[str] | None
    ) -> _Found:
        try:
            found = find_checkpoint(
                self._config, self._config.ckpt_dir or "", needs_dense=self._needs_dense, weights=self._weights
            )
        except UnaskedError:
            raise
        except CheckpointError as error:
            return _Found(None, (str(error),))
        if found.step is None:
            return _Found(None, ())
        name = names[found.step]
        stamp = stamps.get(name) or _stamp_of(directory.child(name))
        checkpoint = Checkpoint(step=found.step, saved_at=self._saved_at(directory, name, stamp, listed), stamp=stamp)
        return _Found(checkpoint, found.notes)

    def _saved_at(self, directory: Directory, name: str, stamp: str, listed: list[str] | None) -> float:
        """Return when a save ended: the last change of its files, on a disk; else when it was first seen."""
        if self._first_seen[0] != stamp:
            self._first_seen = stamp, time.time()
        seen = self._first_seen[1]
        if not directory.is_local:
            return seen
        child = directory.child(name)
        times = [int(stat.version) for stat in child.find_many(child.names()).values()]
        if listed and listed[-1] == name:
            times += [int(stat.version) for stat in directory.find_many([LIST]).values()]
        return max(times, default=0) / _NANOSECONDS or seen

    # ---- the versions ----

    def _share_of(self, current: Current) -> float:
        """Return the rows of the current version as a share of its base's; 0 if it is full, or cannot be read."""
        if current.base is None:
            return 0.0
        if current.version not in self._shares:
            where = f"{parse(self._config.export_dir)[0]}/{VERSIONS}/{current.version}"
            directory = open_directory(where, self._config.options_of_target)
            try:
                manifest = decode_manifest(directory.read_text(MANIFEST), where=directory.describe(MANIFEST))
            except (DistExportError, OSError):
                return 0.0  # the export looks for the base again, and says what is wrong with it
            deltas: list[Any] = [table.delta for table in manifest.tables if table.delta is not msgspec.UNSET]
            rows = sum(delta.changed + delta.new for delta in deltas)
            self._shares = {current.version: rows / max(1, sum(delta.rows_base for delta in deltas))}
        return self._shares[current.version]


def _stamp_of(child: Directory) -> str:
    """Return a text that changes when a file of a checkpoint does."""
    stats = child.find_many(child.names())
    files = sorted((name, stat.size, stat.version) for name, stat in stats.items())
    return _digest([child.url, files, child.folders()])


def _digest(value: Any) -> str:
    return xxhash.xxh3_64_hexdigest(msgspec.json.encode(value))
