"""What is served at one time: a package with its models. A watcher exchanges it for a newer one."""

from __future__ import annotations

import logging
import threading
from typing import Any

from dist_export.errors import DistExportError, PackageError, UserError
from dist_export.manifest import MANIFEST
from dist_export.package.reader import Package
from dist_export.redact import reason_of
from dist_export.registry import base as registry
from dist_export.serve.models import Model, list_models
from dist_export.storage.directory import Directory
from dist_export.storage.urls import open_directory
from dist_export.verify.verify import verify

logger = logging.getLogger(__name__)

_VERSION_LENGTH = 16


class Served:
    """One package with its models, loaded. Requests that began with it end with it. Any thread."""

    def __init__(self, package: Package) -> None:
        self.package = package
        self.version = package.manifest.digest.rpartition(":")[2][:_VERSION_LENGTH]
        self.models: dict[str, Model] = list_models(package)


class Watcher:
    """Serves the package at a path, and loads its successor beside it when the package is replaced."""

    def __init__(
        self,
        path: str,
        *,
        storage_options: dict[str, Any] | None = None,
        registry_options: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        base: str | None = None,
        poll_secs: float = 1.0,
        checks: bool = True,
    ) -> None:
        """Load the package.

        Raises the errors of :func:`dist_export.open_package`, PackageError if it is unsound, and UserError if it is no directory.

        Args:
            path: the package.
            storage_options: options for its file system.
            registry_options: options for the registry.
            cache_dir: as in :func:`dist_export.open_package`.
            base: the base of delta packages, as there. A full package needs none.
            poll_secs: how often the path is looked at.
            checks: whether ``verify`` must call a package sound before it is served.
        """
        self._path = path
        self._storage_options = storage_options
        self._registry_options = registry_options
        self._cache_dir = cache_dir
        self._base = base
        self._poll_secs = poll_secs
        self._checks = checks
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self.num_refused = 0
        """New packages that were not taken."""
        self.num_swaps = 0
        try:
            self._seen = self._look()
        except OSError as error:
            raise UserError(
                f"{path} cannot be read: {error.strerror or error}. Give the directory of a package"
            ) from error
        self.current = self._load()
        self._thread = threading.Thread(target=self._watch, name="watch-package", daemon=True)

    def start(self) -> None:
        """Watch the path from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def check_now(self) -> None:
        """Look at the path, and serve a new package if there is one. One that cannot be served is logged once. Any thread."""
        with self._lock:
            self._check()

    # ---- within ----

    def _check(self) -> None:
        seen = self._look_quietly()
        if seen is None or seen == self._seen:
            return
        try:
            served = self._load(self.current.package)
        except (DistExportError, OSError) as error:
            if self._look_quietly() == seen:  # else it is being replaced right now
                self._seen = seen
                self.num_refused += 1
                logger.error(  # noqa: TRY400 -- a fault of the package, not of this program
                    "the new package is not served, the old one is: %s", reason_of(error)
                )
            return
        self._seen = seen
        before, self.current = self.current, served
        if served.version != before.version:
            self.num_swaps += 1
            logger.info("serving package %s in place of %s", served.version, before.version)

    def _watch(self) -> None:
        while not self._ended.wait(self._poll_secs):
            self.check_now()

    def _look(self) -> tuple[str, ...] | None:
        """Return what changes with the package at the path; None if there is none."""
        directory = self._open(self._path)
        try:
            found = directory.stat(MANIFEST)
        except FileNotFoundError:
            return None
        return directory.url, str(found)

    def _open(self, path: str) -> Directory:
        where = registry.resolve(path, self._registry_options or {}).directory
        return open_directory(where, self._storage_options)

    def _look_quietly(self) -> tuple[str, ...] | None:
        """Return the same as ``_look``; None also if the store or the registry does not answer now."""
        try:
            return self._look()
        except (DistExportError, OSError) as error:
            logger.warning("the path of the package cannot be looked at: %s", reason_of(error))
            return None

    def _load(self, before: Package | None = None) -> Served:
        """Load the package at the path. The base of a delta is not opened anew if ``before`` is it or has it open."""
        below = None if self._base is None else self._open(self._base)
        package = Package(self._open(self._path), cache_dir=self._cache_dir, base_directory=below, opened=before)
        package.hold()
        package.merge_ids()  # no request waits for it
        if self._checks:
            self._refuse_unsound(package)
            known = () if before is None else before.layers
            for layer in package.layers[1:]:
                if layer not in known:  # each is checked once
                    self._refuse_unsound(layer)
        return Served(package)

    def _refuse_unsound(self, package: Package) -> None:
        below = None if package.base is None else package.base.directory.location.given
        report = verify(package.directory.location.given, self._storage_options, base=below)
        if report.count():
            raise PackageError(f"{package.directory.url} is unsound: {report.findings[0]} ({report.count()} findings)")
        if not package.files.is_current():
            raise PackageError(f"{package.directory.url} was replaced while it was checked")
