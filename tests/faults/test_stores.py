"""Faults of an object store, as source and as target: whatever it raises is told in one line, and the next export completes."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dist_export.errors import ConfigError, DistExportError, ExportError, UserError
from dist_export.storage.urls import open_directory
from dist_export.verify.verify import verify
from dist_export.workdir import lock
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.sparse_cases import content, copy, export


class ClientError(Exception):
    """As botocore raises it: no OSError."""


@dataclass
class Fault:
    """Calls of ``operation`` on paths that contain ``part`` raise ``error``, from the ``at``-th on."""

    operation: str
    part: str
    error: Exception
    at: int = 1
    is_done: bool = False
    """The store does what was asked, and only its answer is lost."""
    met: int = 0
    seen: int = field(default=0)

    def strikes(self, operation: str, path: str) -> bool:
        if operation != self.operation or self.part not in path:
            return False
        self.seen += 1
        self.met += self.seen >= self.at
        return self.seen >= self.at


class FaultyFile:
    """A file opened for reading, whose reads may fail."""

    def __init__(self, file: Any, path: str) -> None:
        self._file, self._path = file, path

    def read(self, *arguments: Any) -> bytes:
        with FaultyFileSystem.faults_of("read", self._path):
            return self._file.read(*arguments)

    def seek(self, *arguments: Any) -> int:
        return self._file.seek(*arguments)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> FaultyFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def faulty(operation: str) -> Any:
    """Return a method that does what the memory store does, and meets faults."""

    def call(its: FaultyFileSystem, path: str, *arguments: Any, **options: Any) -> Any:
        on = str(arguments[0]) if operation == "put_file" else path
        with its.faults_of(operation, on):
            return getattr(MemoryFileSystem, operation)(its, path, *arguments, **options)

    return call


class FaultyFileSystem(MemoryFileSystem):
    """A store in memory whose calls fail when they are told to. Calls of itself meet no faults."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults: ClassVar[list[Fault]] = []
    inside = threading.local()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.removeprefix("faulty://"))

    @classmethod
    @contextmanager
    def faults_of(cls, operation: str, path: str) -> Iterator[None]:
        """Run a call; raise before or after it where a fault strikes."""
        if getattr(cls.inside, "is_so", False):
            yield
            return
        fault = next((fault for fault in cls.faults if fault.strikes(operation, path)), None)
        if fault is not None and not fault.is_done:
            raise fault.error
        cls.inside.is_so = True
        try:
            yield
        finally:
            cls.inside.is_so = False
        if fault is not None:
            raise fault.error

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        with self.faults_of("open", path):
            file = super().open(path, mode, **options)
        return FaultyFile(file, path) if mode == "rb" and not getattr(self.inside, "is_so", False) else file

    pipe_file = faulty("pipe_file")
    put_file = faulty("put_file")
    cat_file = faulty("cat_file")
    ls = faulty("ls")
    info = faulty("info")
    exists = faulty("exists")
    rm_file = faulty("rm_file")
    rm = faulty("rm")
    makedirs = faulty("makedirs")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[type[FaultyFileSystem]]:
    """The store, with a checkpoint in ``faulty://in`` (and the same in tmp_path / "in")."""
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    write_checkpoint(tmp_path / "in", make_tables({"a": 90, "b": 30}, 3), dense={"w": np.ones(9, np.float32)})
    FaultyFileSystem.clear_instance_cache()
    source = open_directory("faulty://in")
    for path in (tmp_path / "in").iterdir():
        source.fs.pipe_file(source.join(path.name), path.read_bytes())
    yield FaultyFileSystem
    FaultyFileSystem.faults.clear()
    FaultyFileSystem.store.clear()
    FaultyFileSystem.pseudo_dirs[:] = [""]


def files_of(url: str) -> dict[str, bytes]:
    """Return all files of a directory of the store but the manifest."""
    directory = open_directory(url)
    paths = directory.fs.find(directory.path) if directory.exists() else []
    found = {path.removeprefix(f"{directory.path}/"): directory.fs.cat_file(path) for path in paths}
    return {name: data for name, data in sorted(found.items()) if name != "manifest.json"}


ERRORS = {
    "client": ClientError(
        "An error occurred (SlowDown) when calling the PutObject operation:\nPlease reduce your rate."
    ),
    "denied": PermissionError("Access Denied"),
    "reset": ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    "late": TimeoutError(),
    "broken": RuntimeError(""),
}
TOLD = {
    "client": "ClientError: An error occurred (SlowDown) when calling the PutObject operation:",
    "denied": "Access Denied",
    "reset": "Connection reset by peer",
    "late": "TimeoutError",
    "broken": "RuntimeError",
}

TARGET = {
    "making the directory": ("makedirs", "out"),
    "looking for a package": ("info", "out/manifest.json"),
    "taking the lease": ("open", "out/.dist_export/lease"),
    "asking for the lease": ("cat_file", "out/.dist_export/lease"),
    "listing": ("ls", "/out"),
    "putting a shard up": ("put_file", "out/model-000001"),
    "a receipt": ("pipe_file", "000001-of-000002.safetensors.json"),
    "the list of small files": ("pipe_file", "out/.dist_export/small_files.json"),
    "tensorkey.json": ("pipe_file", "out/tensorkey.json"),
    "index": ("pipe_file", "out/index"),
    "the marker of the commit": ("pipe_file", "out/.dist_export/committing"),
    "manifest.json": ("pipe_file", "out/manifest.json"),
    "reading a header back": ("open", "out/model-000000"),
    "reading ids back": ("read", "out/model-000000"),
    "looking at a shard": ("info", "out/model-000000"),
    "removing what was there": ("rm_file", "out/model-000000"),
}


def shorten_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a lease that nobody renews be over soon."""
    monkeypatch.setattr(lock, "LEASE_SECS", 2.0)
    monkeypatch.setattr(lock, "RENEW_SECS", 0.4)


def assert_fails(url: str, word: str, part: str, **settings: Any) -> DistExportError:
    """An export to ``url`` fails with one line that names the file and the error; there is no manifest."""
    with pytest.raises(DistExportError) as caught:
        export("faulty://in", url, num_shards=2, threads=1, **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert word in text
    assert part.rsplit("/", maxsplit=1)[-1] in text
    return caught.value


def assert_completes(tmp_path: Path, url: str) -> None:
    """Without faults the export completes, as one to a local directory does."""
    export("faulty://in", url, num_shards=2, threads=1)
    export("faulty://in", tmp_path / "reference", num_shards=2, threads=1)
    assert files_of(url) == content(tmp_path / "reference")
    assert verify(url).findings == []


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("case", TARGET)
def test_a_target_that_fails(
    tmp_path: Path, store: type[FaultyFileSystem], monkeypatch: pytest.MonkeyPatch, case: str, error: str
) -> None:
    """Whatever class of error it is: exit code 1, one line with the file, no manifest, and the next export completes.

    Except where nothing was tried yet and the store lets nobody in: that is a mistake of the settings.
    """
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")  # else it would wait for a lease that could not be given back
    shorten_leases(monkeypatch)
    operation, part = TARGET[case]
    before = files_of("faulty://in")
    fault = Fault(operation, part, ERRORS[error])
    store.faults[:] = [fault]
    failed = assert_fails("faulty://out", TOLD[error], part)
    assert fault.met
    if (case, error) == ("looking for a package", "denied"):
        assert isinstance(failed, ConfigError)
        assert "Nothing was written" in str(failed)
    else:
        assert isinstance(failed, ExportError)
        assert failed.exit_code == 1
        assert "un the export again" in str(failed)
    store.faults.clear()
    assert not open_directory("faulty://out").exists("manifest.json")
    assert files_of("faulty://in") == before
    assert_completes(tmp_path, "faulty://out")


def test_a_manifest_whose_answer_was_lost_is_taken_back(tmp_path: Path, store: type[FaultyFileSystem]) -> None:
    """The store has it, but said that it failed: what the export says of the disk must be true."""
    store.faults[:] = [Fault("pipe_file", "out/manifest.json", ERRORS["client"], is_done=True)]
    assert "No manifest was written" in str(assert_fails("faulty://out", "SlowDown", "manifest.json"))
    store.faults.clear()
    assert not open_directory("faulty://out").exists("manifest.json")
    assert_completes(tmp_path, "faulty://out")


def test_a_manifest_that_cannot_be_taken_back_is_told(store: type[FaultyFileSystem]) -> None:
    store.faults[:] = [
        Fault("pipe_file", "out/manifest.json", ERRORS["client"], is_done=True),
        Fault("rm_file", "out/manifest.json", ERRORS["denied"]),
    ]
    text = str(assert_fails("faulty://out", "SlowDown", "manifest.json"))
    assert "what may be there of it cannot be removed (Access Denied). Remove it and run the export again" in text
    assert "No manifest" not in text


def test_a_package_that_cannot_be_looked_at_is_not_overwritten(store: type[FaultyFileSystem]) -> None:
    """fsspec's own ``exists`` takes any error for an absence."""
    export("faulty://in", "faulty://out", num_shards=2)
    before = files_of("faulty://out")
    store.faults[:] = [Fault("info", "out/manifest.json", ERRORS["denied"]), Fault("exists", "out", ERRORS["denied"])]
    assert_fails("faulty://out", "Access Denied", "manifest.json")
    store.faults.clear()
    assert files_of("faulty://out") == before
    with pytest.raises(ConfigError, match="is there already"):
        export("faulty://in", "faulty://out", num_shards=3)


@pytest.mark.parametrize("operation", ["rm", "rm_file"])
def test_what_cannot_be_cleared_away_does_not_undo_a_commit(
    store: type[FaultyFileSystem], caplog: pytest.LogCaptureFixture, operation: str
) -> None:
    """The package is committed: a leftover is a warning."""
    fault = Fault(operation, "out/.dist_export", ERRORS["client"])
    store.faults[:] = [fault, Fault("rm", "out/.dist_export", ERRORS["client"])]
    with caplog.at_level(logging.WARNING):
        export("faulty://in", "faulty://out", num_shards=2)
    assert fault.met
    assert "could not be" in caplog.text
    store.faults.clear()
    assert verify("faulty://out").findings == []


def test_a_lease_that_cannot_be_given_back_hides_no_error(
    tmp_path: Path, store: type[FaultyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What failed first is told; a later attempt of the same job takes the lease over."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    shorten_leases(monkeypatch)
    lease = Fault("rm_file", "lease", ERRORS["denied"])
    store.faults[:] = [Fault("pipe_file", "out/index", ERRORS["client"]), lease]
    assert_fails("faulty://out", "SlowDown", "index")
    assert lease.met
    store.faults.clear()
    assert_completes(tmp_path, "faulty://out")


SOURCE = {
    "listing": ("ls", "/in", UserError),
    "index": ("cat_file", "in/index", UserError),
    "looking at a shard": ("info", "in/model-000001", UserError),
    "opening a shard": ("open", "in/model-000001", UserError),
    "headers": ("read", "in/model-000001", UserError),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("case", SOURCE)
def test_a_source_that_cannot_be_read(store: type[FaultyFileSystem], case: str, error: str) -> None:
    """Nothing is written, and the exit code is 2."""
    operation, part, kind = SOURCE[case]
    store.faults[:] = [Fault(operation, part, ERRORS[error])]
    failed = assert_fails("faulty://out", TOLD[error], part)
    assert isinstance(failed, kind)
    assert failed.exit_code == 2
    store.faults.clear()
    assert not open_directory("faulty://out").exists()


@pytest.mark.parametrize("error", ERRORS)
def test_a_source_that_fails_later(tmp_path: Path, store: type[FaultyFileSystem], error: str) -> None:
    """Each read of a shard in turn: one line, no manifest, and the next export completes."""
    counting = Fault("read", "in/model-", ERRORS[error], at=1 << 30)
    store.faults[:] = [counting]
    copy("faulty://in", "faulty://counted", threads=1)
    for at in range(1, counting.seen + 1, 3):
        store.faults[:] = [Fault("read", "in/model-", ERRORS[error], at=at)]
        with pytest.raises(DistExportError) as caught:
            copy("faulty://in", f"faulty://out{at}", threads=1)
        text = str(caught.value)
        assert "\n" not in text
        assert TOLD[error] in text
        assert "in/model-" in text
        store.faults.clear()
        assert not open_directory(f"faulty://out{at}").exists("manifest.json")
        copy("faulty://in", f"faulty://out{at}", threads=1)
        assert files_of(f"faulty://out{at}") == files_of("faulty://counted")


def test_a_package_on_a_store_that_fails_is_unsound_in_one_line(store: type[FaultyFileSystem]) -> None:
    """``verify`` reports; it does not break off."""
    export("faulty://in", "faulty://out", num_shards=2)
    store.faults[:] = [Fault("read", "out/model-000001", ERRORS["client"])]
    findings = verify("faulty://out").findings
    assert any("model-000001" in finding and "SlowDown" in finding for finding in findings)
    assert not any("\n" in finding for finding in findings)


def test_options_that_a_store_refuses_are_the_users_mistake(
    store: type[FaultyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ClientError("no credentials")

    monkeypatch.setattr(store, "__init__", refuse)
    with pytest.raises(ConfigError, match="faulty://x: no file system for this URL: no credentials"):
        open_directory("faulty://x", {"key": "1"})


def test_no_temporary_directory_for_staging(
    tmp_path: Path, store: type[FaultyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards for a store are built on the local disk; without one it is an error in one line."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    failed = assert_fails("faulty://out", "No such file or directory", "nowhere")
    assert failed.exit_code == 1
