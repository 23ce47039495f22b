"""Allow one export at a time in a directory: a lock that all ranks share on a disk, a lease on stores without locks."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import msgspec

from dist_export.errors import CommitError, ConfigError
from dist_export.runtime.process_identity import identify
from dist_export.storage.directory import WORK_DIRECTORY, Directory
from dist_export.storage.local_io import close_quietly, make_directories, naming

if TYPE_CHECKING:
    from dist_export.storage.s3_directory import S3Directory

logger = logging.getLogger(__name__)

PATIENCE_SECS = 12.0
"""Ranks of a killed export end within ten seconds. An export that starts right after it waits for that long."""
LEASE_SECS = 30.0
"""A lease expires if it is not renewed for this long."""
RENEW_SECS = 5.0

_LOCK = f"{WORK_DIRECTORY}/lock"
_LEASE = f"{WORK_DIRECTORY}/lease"
_POLL_SECS = 0.2

Release = Callable[[], None]


def lock(directory: Directory, *, patience_secs: float | None = None) -> Release:
    """Lock a local or shared directory for this export; return the function that releases it. Rank 0, before the others.

    An exclusive ``flock`` comes first. It proves that no rank of another export is left, not even one whose launcher died.
    It then becomes a shared one for :func:`join_lock`. The descriptor belongs to this process: a child that is forked later
    does not keep the lock.

    Raises:
        ConfigError: another export has the lock.
    """
    directory.make()
    deadline = time.monotonic() + (PATIENCE_SECS if patience_secs is None else patience_secs)
    is_told = False
    while True:
        try:
            make_directories(directory.join(WORK_DIRECTORY))
            fd = _open(directory)
        except FileNotFoundError:  # an export that ended has removed the file or its directory
            continue
        if _try(fd, fcntl.LOCK_EX) and _is_current(directory, fd):
            with naming(directory.describe(_LOCK)):
                os.ftruncate(fd, 0)
                os.write(fd, str(identify()).encode())
            # this step is not atomic: if another export gets the lock in between, this one is refused
            if _try(fd, fcntl.LOCK_SH):
                return _closer(fd)
        holder = os.pread(fd, 200, 0).decode(errors="replace") or "unknown"
        os.close(fd)
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{directory.url}: another export ({holder}) is writing there; wait for it, or give another export_dir"
            )
        if not is_told:
            logger.info("%s is held by another export (%s); waiting for it", directory.url, holder)
            is_told = True
        time.sleep(_POLL_SECS)


def join_lock(directory: Directory) -> Release:
    """Share the lock of rank 0. Every other rank, after :func:`lock`."""
    fd = _open(directory)
    if not _try(fd, fcntl.LOCK_SH):
        holder = os.pread(fd, 200, 0).decode(errors="replace")
        os.close(fd)
        raise ConfigError(f"{directory.url}: another export ({holder}) has taken it over; run this export again")
    return _closer(fd)


def _open(directory: Directory) -> int:
    return os.open(directory.join(_LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _try(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def _is_current(directory: Directory, fd: int) -> bool:
    """Return whether the lock is still the file under its name: an export that has ended removes the file."""
    try:
        return os.path.samestat(os.stat(directory.join(_LOCK)), os.fstat(fd))
    except FileNotFoundError:
        return False


def _closer(fd: int) -> Release:
    is_open = [True]

    def close() -> None:
        if is_open.pop() if is_open else False:
            close_quietly(fd)  # this releases the lock even if the disk reports an error for the file's content

    os.register_at_fork(after_in_child=close)  # otherwise a child that outlives this rank would keep the lock
    return close


class _Holder(msgspec.Struct, frozen=True):
    """The content of a lease."""

    token: str
    who: str
    job: str
    renewed: int
    """The number of renewals. If it changes, the holder is alive; no clock is compared."""


_HOLDERS = msgspec.json.Decoder(_Holder)


class Lease:
    """Exclusive right to a directory of an object store: an object that is created only if absent, and renewed. Rank 0.

    A lease that is not renewed for :data:`LEASE_SECS` expires. If several exports want it then, one wins. On S3 it is the first
    to replace the object in the version that it read. On other stores it is the first to create the object that is named
    after the old lease's token.
    """

    def __init__(
        self, directory: Directory, *, lease_secs: float | None = None, renew_secs: float | None = None
    ) -> None:
        """Take the lease and keep it until :meth:`release`.

        Raises:
            ConfigError: another export has it and renews it.
        """
        self._directory = directory
        self._s3_directory = cast("S3Directory", directory) if directory.s3 is not None else None
        self._lease_secs = LEASE_SECS if lease_secs is None else lease_secs
        self._renew_secs = RENEW_SECS if renew_secs is None else renew_secs
        self._holder = _Holder(uuid.uuid4().hex, str(identify()), _job(), 0)
        self._garbage: list[str] = []
        self._version: str | None = None
        """On S3: the version of the lease that this export wrote last. The lease is renewed only if it still has that version."""
        self._found_version: str | None = None
        self._acquire()
        self._is_over = threading.Event()
        self._lost = ""
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def _acquire(self) -> None:
        deadline = time.monotonic() + self._lease_secs
        last: _Holder | None = None
        while not self._create():
            found = self._read()
            if found is None:
                continue  # it was released between the two requests
            if last is not None and found != last:
                raise ConfigError(
                    f"{self._directory.url}: another export ({found.who}) is writing there; wait for it, or give another "
                    "export_dir"
                )
            has_restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
            is_own_job = has_restarted and bool(found.job) and found.job == self._holder.job
            if is_own_job or (last is not None and time.monotonic() > deadline):
                if self._take_over(found):
                    return
                raise ConfigError(f"{self._directory.url}: another export has just begun to write there")
            if last is None:
                logger.info(
                    "%s is held by %s; waiting %.0f s to see whether it still runs",
                    self._directory.url,
                    found.who,
                    self._lease_secs,
                )
            last = found
            time.sleep(min(self._renew_secs / 2, 1.0))

    def _create(self) -> bool:
        if self._s3_directory is None:
            return self._directory.create(_LEASE, msgspec.json.encode(self._holder))
        return self._replace(None)

    def _replace(self, version: str | None) -> bool:
        """Write the lease on S3 if the present one has ``version`` (None: there is none); return whether it was written."""
        content = msgspec.json.encode(self._holder)
        assert self._s3_directory is not None
        written = self._s3_directory.write_if(_LEASE, content, version=version)
        if written is not None:
            self._version = written
        return written is not None

    def _take_over(self, old: _Holder) -> bool:
        if self._s3_directory is not None:
            return self._replace(self._found_version)
        token = old.token
        while not self._directory.create(heir := f"{_LEASE}-{token}", self._holder.token.encode()):
            # another export was first; if it died before it wrote the lease, look for the one that took over from it
            self._garbage.append(heir)
            time.sleep(self._lease_secs)
            if self._read() != old:
                return False
            token = self._directory.read(heir).decode(errors="replace")
        self._garbage.append(heir)
        self._directory.write(_LEASE, msgspec.json.encode(self._holder))
        return True

    def _read(self) -> _Holder | None:
        try:
            if self._s3_directory is not None:  # the version is read first, so that a newer lease is not replaced
                self._found_version = self._directory.stat(_LEASE).version
            return _HOLDERS.decode(self._directory.read(_LEASE))
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            raise ConfigError(
                f"{self._directory.describe(_LEASE)} is no lease ({error}); remove it if no export is running"
            ) from None

    def _keep(self) -> None:
        while not self._is_over.wait(self._renew_secs):
            try:
                if not self._renew():
                    return
            except Exception as error:  # noqa: BLE001 -- one failed request matters only if the lease is lost
                logger.warning("%s could not be renewed: %s", self._directory.describe(_LEASE), error)

    def _renew(self) -> bool:
        found = self._read()
        if found is None or found.token != self._holder.token:
            self._lost = "it is gone" if found is None else f"{found.who} has it"
            return False
        self._holder = msgspec.structs.replace(self._holder, renewed=self._holder.renewed + 1)
        if self._s3_directory is None:
            self._directory.write(_LEASE, msgspec.json.encode(self._holder))
        elif not self._replace(self._version):
            self._lost = "another export has replaced it"
            return False
        return True

    def refuse_if_lost(self) -> None:
        """Check once more, right before the commit, that this export still has the lease. CommitError if it does not."""
        found = self._read()
        if self._lost or found is None or found.token != self._holder.token:
            why = self._lost or ("it is gone" if found is None else f"{found.who} has it")
            raise CommitError(
                f"{self._directory.describe(_LEASE)}: this export has lost its claim ({why}), so another one may be writing "
                "there. No manifest was written; run the export again"
            )

    def release(self) -> None:
        """Release the lease."""
        self._is_over.set()
        self._thread.join(self._renew_secs)
        try:
            found = self._read()
            if found is not None and found.token == self._holder.token:
                for name in (*self._garbage, _LEASE):
                    self._directory.remove(name)
        except (ConfigError, OSError) as error:  # the lease expires by itself, and must not hide how the export ended
            logger.warning("%s could not be given back: %s", self._directory.describe(_LEASE), error)


def _job() -> str:
    """Return a name that only this torchrun job has; empty if there is none."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if run in ("", "none"):  # torchrun uses "none" for every job without a name
        return ""
    return f"{run} at {os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
