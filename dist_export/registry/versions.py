"""A directory of versions: packages under ``versions/``, and ``current.json``, which says which one is served.

``versions:DIR`` is its current version, and ``versions:DIR@NAME`` any other. DIR is a path or an fsspec URL.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

import msgspec

from dist_export.errors import ConfigError, ExportError
from dist_export.humanize import few
from dist_export.manifest import MANIFEST, decode_manifest
from dist_export.redact import reason_of
from dist_export.registry import bases
from dist_export.registry.base import LaterStepError, Registered, Resolved
from dist_export.storage.directory import Directory
from dist_export.storage.urls import open_directory

logger = logging.getLogger(__name__)

SCHEME = "versions"
CURRENT = "current.json"
VERSIONS = "versions"
GRACE_SECS = 600.0

_WAY_OUT = "Put a sound one there, or remove it: the next export begins it anew, and the packages stay"
_NAME = re.compile(r"[\w.-]+")


class Switch(msgspec.Struct, frozen=True, kw_only=True):
    """A version became the current one."""

    version: str
    at: str
    """UTC, as ISO 8601 with microseconds."""
    step: int | None = None
    base: str | None = None
    num_deltas: int = 0
    """How many deltas on top of the same full package were published with this one; 0 for a full package."""


class Current(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``current.json``."""

    version: str
    manifest_digest: str
    base: str | None = None
    """The version that a delta package needs, or the directory of a base elsewhere; null for a full package."""
    step: int | None = None
    """Of the checkpoint, where it is one of a training run."""
    created_at: str
    """When it became the current version."""
    data_timestamp: str | None = None
    """As the settings gave it: until when the training data reaches."""
    switches: tuple[Switch, ...] = ()
    """The newest first, this one included."""

    def list_last_switches(self) -> Sequence[Switch]:
        """Return the last switch to each version, the newest first."""
        last: dict[str, Switch] = {}
        for switch in self.switches:
            last.setdefault(switch.version, switch)
        return list(last.values())

    def is_later_than(self, step: int | None) -> bool:
        """Whether this is of a later step."""
        return step is not None and self.step is not None and step < self.step

    def count_deltas(self, base: str | None) -> int:
        """Return how many deltas were published on top of a full package, removed ones included. ``base`` may be one of them."""
        base_of = {switch.version: switch.base for switch in self.switches}
        below = {base, *bases.list_below(base_of, base)} - {None}
        its = (switch for switch in self.switches if not below.isdisjoint(bases.list_below(base_of, switch.version)))
        return max((switch.num_deltas for switch in its), default=0)


_CURRENTS = msgspec.json.Decoder(Current)


class Version(NamedTuple):
    """One version of a directory."""

    name: str
    published_at: str
    """When it became the current one for the last time."""
    step: int | None
    is_current: bool
    is_there: bool
    base: str | None = None
    """The version that a delta package needs, or the directory of a base elsewhere; None for a full package."""
    has_base: bool | None = True
    """Whether that base is there, or none is needed; None if the manifest of either cannot be read."""


class VersionDirectory:
    """The registry of ``versions:`` URIs; see :class:`~dist_export.registry.base.Registry`."""

    def __init__(
        self,
        keep_versions: int | None = None,
        grace_secs: float = GRACE_SECS,
        data_timestamp: str | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        """Keep the options. Nothing is read.

        Args:
            keep_versions: how many versions stay; None keeps all. The current one and the one before it stay in any case.
            grace_secs: a version stays for this long after it ceased to be the current one.
            data_timestamp: goes into ``current.json`` as it is.
            storage_options: for the directory's file system.
        """
        if keep_versions is not None and keep_versions < 1:
            raise ConfigError(f"keep_versions is {keep_versions}; give a number from 1 up, or null to keep all")
        if not grace_secs >= 0:
            raise ConfigError(f"grace_secs is {grace_secs}; give seconds from 0 up")
        self._keep_versions = keep_versions
        self._grace_secs = grace_secs
        self._data_timestamp = data_timestamp
        self._storage_options = storage_options

    # ---- what a registry does ----

    def resolve(self, uri: str) -> Resolved:
        """Return the directory of a version. ConfigError if there is none."""
        where, version = parse(uri)
        if version is None:
            version = self._require(where)[0].version
        return Resolved(f"{where}/{VERSIONS}/{version}", f"{SCHEME}:{where}@{version}")

    def check(self, uri: str) -> None:
        """Refuse a URI with a version, and a directory whose ``current.json`` is none. ConfigError."""
        where, version = parse(uri)
        if version is not None:
            raise ConfigError(f"{uri}: a package becomes a new version, so leave @{version} out")
        self._read(where)

    def place(self, uri: str, *, key: str) -> str:
        """Return where the package of a new version goes."""
        where, _ = parse(uri)
        return f"{where}/{VERSIONS}/{key}"

    def look(self, uri: str) -> str:
        """Return the content of ``current.json`` now, for :meth:`register`; empty if there is none."""
        return self._read(parse(uri)[0])[1]

    def read_current(self, uri: str) -> tuple[Current | None, str]:
        """Return ``current.json`` and its text; None and nothing if it does not exist. ConfigError if it is damaged."""
        return self._read(parse(uri)[0])

    def register(self, uri: str, package: Registered) -> str:
        """Make a committed package the current version. One that has been so before stays what it is, unless it was overwritten.

        Raises:
            ExportError: another publisher was faster, the current version is of a later step, or a delta's base is gone.
        """
        where, _ = parse(uri)
        version = package.directory.rstrip("/").rpartition("/")[2]
        named = f"{SCHEME}:{where}@{version}"
        current, _ = self._read(where)
        if current is not None:
            is_overwritten = current.version == version and current.manifest_digest != package.digest
            if not is_overwritten and any(switch.version == version for switch in current.switches):
                return named
            if current.is_later_than(package.step):
                raise LaterStepError(
                    f"the current version, {current.version}, is of step {current.step:,}, and this one of step "
                    f"{package.step:,}. {self._say_way(where, version)}"
                )
        directory = self._open(package.directory)
        if package.base and (lack := bases.find_lack(directory)):
            raise ExportError(f"it {lack}. {CURRENT} is as it was")
        base = self._name_base(where, directory) if package.base else None
        self._switch(where, version, package.digest, package.step, base, expected=package.seen)
        if base is not None:
            self._refuse_removed(where, version, current)
        self._remove_old(where)
        return named

    # ---- what the commands do ----

    def list_versions(self, where: str) -> list[Version]:
        """Return the versions of a directory, the last published first. ConfigError if it has none."""
        current, _ = self._require(where)
        packages = self._open(where).child(VERSIONS)
        return [
            Version(
                last.version,
                last.at,
                last.step,
                is_current=last.version == current.version,
                is_there=packages.exists(f"{last.version}/{MANIFEST}"),
                base=last.base,
                has_base=last.base is None or bases.has_base(packages.child(last.version)),
            )
            for last in current.list_last_switches()
        ]

    def rollback(self, where: str, version: str | None = None) -> str:
        """Make an earlier version the current one, None the one before; return its name.

        Raises:
            ConfigError: there is no such version.
            ExportError: another publisher was faster.
        """
        current, raw = self._require(where)
        if version is None:
            before = [switch.version for switch in current.switches if switch.version != current.version]
            if not before:
                raise ConfigError(f"{where}: {current.version} is the only version; there is none before it")
            version = before[0]
        if version == current.version:
            return version
        package = self._open(f"{where}/{VERSIONS}/{version}")
        if not package.exists(MANIFEST):
            names = [found.name for found in self.list_versions(where) if found.is_there]
            raise ConfigError(f"{package.url} is no package; the versions of {where} are {few(names)}")
        manifest = decode_manifest(package.read_text(MANIFEST), where=package.describe(MANIFEST))
        if lack := bases.find_lack(package):
            there = [its for its in self.list_versions(where) if its.is_there and not its.is_current]
            names = [its.name for its in there if its.has_base]
            others = f"Other versions of {where} are {few(names)}" if names else f"{where} has no other version"
            raise ConfigError(
                f"{package.url} {lack}. {current.version} is still the current version; put the base back. {others}"
            )
        step = next((switch.step for switch in current.switches if switch.version == version), None)
        self._switch(where, version, manifest.digest, step, self._name_base(where, package), expected=raw)
        self._refuse_removed(where, version, current)
        return version

    # ---- within ----

    def _switch(
        self, where: str, version: str, digest: str, step: int | None, base: str | None, *, expected: str
    ) -> None:
        """Write ``current.json`` if it still is what it was. ExportError if it is not."""
        directory = self._open(where)
        before = _decode(expected, directory) if expected else None
        now = datetime.now(timezone.utc).isoformat(timespec="microseconds")
        kept = before.switches if before is not None else ()
        there = {version, *directory.child(VERSIONS).folders()}
        again = next((old.num_deltas for old in kept if old.version == version), None)
        num_deltas = before.count_deltas(base) + 1 if before is not None and base else int(base is not None)
        switch = Switch(
            version=version, at=now, step=step, base=base, num_deltas=num_deltas if again is None else again
        )
        content = Current(
            version=version,
            manifest_digest=digest,
            base=base,
            step=step,
            created_at=now,
            data_timestamp=self._data_timestamp,
            switches=(switch, *(old for old in kept if old.version in there)),
        )
        data = msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"
        if not directory.replace_if(CURRENT, data, expected=expected.encode() if expected else None):
            found, _ = self._read(where)
            kind = LaterStepError if found is not None and found.is_later_than(step) else ExportError
            raise kind(
                f"{directory.describe(CURRENT)} has changed since this export began: the current version is "
                f"{found.version if found else 'none'} now. {self._say_way(where, version)}"
            )

    def _refuse_removed(self, where: str, version: str, before: Current | None) -> None:
        """Go back to the current version of before if this one or its base was removed by others meanwhile. ExportError."""
        if not bases.find_lack(self._open(f"{where}/{VERSIONS}/{version}")):
            return
        if before is not None:
            last = before.version, before.manifest_digest, before.step, before.base
            self._switch(where, *last, expected=self._read(where)[1])
        again = f"{before.version} is the current version again" if before is not None else "there is no other version"
        raise ExportError(f"{version} or its base was removed at this very moment; {again}")

    def _say_way(self, where: str, version: str) -> str:
        """Return how a version that is not the current one becomes it, for messages."""
        if lack := bases.find_lack(self._open(f"{where}/{VERSIONS}/{version}")):
            return f"{version} cannot become current: it {lack}"
        return f"`dist_export rollback {where} {version}` makes {version} current all the same"

    def _remove_old(self, where: str) -> None:
        """Remove versions that nobody needs any more. A failure is logged: the new version is published all the same."""
        if self._keep_versions is None:
            return
        directory = self._open(where)
        for name in self._list_old(where, self._require(where)[0]):
            try:
                self._remove(directory, where, name)
            except OSError as error:
                logger.warning("version %s could not be removed: %s", name, reason_of(error))

    def _remove(self, directory: Directory, where: str, name: str) -> None:
        """Remove a version, its manifest first: what is left by a crash is then no package, and no version to go back to."""
        manifest = f"{VERSIONS}/{name}/{MANIFEST}"
        content = directory.read(manifest) if directory.exists(manifest) else None
        directory.remove(manifest)
        if name not in self._list_old(where, self._require(where)[0]):  # somebody has gone back to it
            if content is not None:
                directory.write(manifest, content)
            return
        directory.remove_tree(f"{VERSIONS}/{name}")

    def _list_old(self, where: str, current: Current) -> list[str]:
        """Return the versions that may go: neither among the newest, nor the one before this one, nor within the grace.

        Nor one that a delta among these needs, or what that is on top of.
        """
        assert self._keep_versions is not None
        now = datetime.now(timezone.utc)
        ended: dict[str, float] = {}
        following = now
        for switch in current.switches:  # the newest first
            age = (now - following).total_seconds()
            ended[switch.version] = min(age, ended.get(switch.version, age))
            following = datetime.fromisoformat(switch.at)
        newest = list(ended)
        kept = {*newest[: max(self._keep_versions, 1)], *newest[:2]}
        kept |= {name for name, age in ended.items() if age < self._grace_secs}
        base_of = {switch.version: switch.base for switch in current.switches}
        needed = bases.list_needed(base_of, kept, self._open(where).child(VERSIONS))
        return [name for name in ended if name not in kept and name not in needed]

    def _name_base(self, where: str, package: Directory) -> str | None:
        """Return which version the base of a package is, or its directory if it is elsewhere; None for a full package."""
        entry = decode_manifest(package.read_text(MANIFEST), where=package.describe(MANIFEST)).base
        if entry is msgspec.UNSET:
            return None
        name = entry.path.rstrip("/").rpartition("/")[2]
        found = bases.find_base(package, entry)
        is_version = found is not None and found[0].is_same(self._open(f"{where}/{VERSIONS}/{name}"))
        return name if is_version else entry.path

    def _require(self, where: str) -> tuple[Current, str]:
        current, raw = self._read(where)
        if current is None:
            raise ConfigError(f"{self._open(where).describe(CURRENT)} does not exist, so no version is published")
        return current, raw

    def _read(self, where: str) -> tuple[Current | None, str]:
        """Return ``current.json`` and its text; None and nothing if it does not exist. ConfigError if it is damaged."""
        directory = self._open(where)
        try:
            raw = directory.read_text(CURRENT).decode()
        except FileNotFoundError:
            return None, ""
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{directory.describe(CURRENT)} cannot be read: {reason_of(error)}") from error
        return _decode(raw, directory), raw

    def _open(self, where: str) -> Directory:
        return open_directory(where, self._storage_options)


def refuse_needed(directory: Directory) -> None:
    """Refuse to replace a version of which others are deltas. Of a package that is no version nothing is asked. ConfigError."""
    folder, _, name = directory.location.given.rstrip("/").rpartition("/")
    where, _, last = folder.rpartition("/")
    if last != VERSIONS or not directory.exists(MANIFEST):
        return
    location = directory.location
    if not open_directory(where or "/", location.storage_options).exists(CURRENT):
        return
    if names := bases.list_deltas_on(directory, open_directory(folder, location.storage_options)):
        raise ConfigError(
            f"{directory.url} is the base of {few(names)}, which nobody could read if overwrite replaced it, so it was not "
            f"replaced. Leave overwrite out: the same export again leaves {name} as it is. Or publish a full package (without "
            "base), and remove these versions first"
        )


def parse(uri: str) -> tuple[str, str | None]:
    """Return the directory and the version of a URI; None for the current version. ConfigError if it is no such URI."""
    scheme, _, rest = uri.partition(":")
    where, at, version = rest.rpartition("@")
    if not at or "/" in version:
        where, version = rest, ""
    where = where.rstrip("/") or ("/" if where else "")
    if scheme.lower() != SCHEME or not where or (at and version and not _NAME.fullmatch(version)):
        raise ConfigError(f"{uri}: give {SCHEME}:DIRECTORY, or {SCHEME}:DIRECTORY@VERSION")
    return where, version or None


def _decode(raw: str, directory: Directory) -> Current:
    where = directory.describe(CURRENT)
    try:
        current = _CURRENTS.decode(raw)
        for switch in current.switches:
            datetime.fromisoformat(switch.at)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is damaged: {error}. {_WAY_OUT}") from None
    names = [current.version, *(switch.version for switch in current.switches)]
    if wrong := [name for name in names if not _NAME.fullmatch(name) or set(name) == {"."}]:
        raise ConfigError(f"{where} is damaged: {wrong[0]!r} is no name of a version. {_WAY_OUT}")
    return current
