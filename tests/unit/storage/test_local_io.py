from __future__ import annotations

import errno
import os

import pytest

from dist_export.errors import TransferError
from dist_export.storage.local_io import make_directories, naming, naming_any, refuse_zero, sync_directory, write_new


@pytest.mark.parametrize(
    ("error", "kind", "number", "reason"),
    [
        (FileNotFoundError("s3://x/y"), FileNotFoundError, errno.ENOENT, "No such file or directory"),
        (FileExistsError("s3://x/y"), FileExistsError, errno.EEXIST, "File exists"),
        (PermissionError("Access Denied"), PermissionError, errno.EACCES, "Access Denied"),
        (TimeoutError(), TimeoutError, errno.ETIMEDOUT, "TimeoutError"),
        (OSError(errno.ENOSPC, "No space left on device"), OSError, errno.ENOSPC, "No space left on device"),
        (OSError("two\nlines"), OSError, errno.EIO, "two"),
        (RuntimeError("rate\nlimit"), OSError, errno.EIO, "RuntimeError: rate"),
        (KeyError("x"), OSError, errno.EIO, "KeyError: 'x'"),
    ],
)
def test_whatever_a_store_raises_names_the_file(error, kind, number, reason):
    with pytest.raises(kind) as caught, naming_any("the/file"):
        raise error
    assert (caught.value.errno, caught.value.strerror, caught.value.filename) == (number, reason, "the/file")
    assert caught.value.__cause__ is error


def fail_as_torch_does():
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    finally:
        raise RuntimeError("unexpected pos 704 vs 598")


def test_a_library_that_noticed_a_failed_call_is_asked_for_it():
    with pytest.raises(OSError, match="No space left on device") as caught, naming_any("the/file"):
        fail_as_torch_does()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "the/file")


def test_what_names_its_file_stays_and_a_bug_stays_a_bug():
    with pytest.raises(OSError, match="gone") as caught, naming("the/file"):
        raise OSError(errno.EIO, "gone", "another")
    assert caught.value.filename == "another"
    with pytest.raises(KeyError), naming("the/file"):
        raise KeyError("x")
    with pytest.raises(TransferError), naming_any("the/file"):
        raise TransferError("ours")


def test_new_directories_survive_a_crash(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    make_directories(str(tmp_path / "a" / "b" / "c"))
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    make_directories(str(tmp_path / "a" / "b" / "c"))
    assert len(synced) == 3


@pytest.mark.parametrize(("number", "is_told"), [(errno.EIO, True), (errno.EINVAL, False), (errno.EOPNOTSUPP, False)])
def test_a_directory_that_cannot_be_synced(tmp_path, monkeypatch, number, is_told):
    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if not is_told:
        sync_directory(str(tmp_path))
        return
    with pytest.raises(OSError, match="Input/output") as caught:
        sync_directory(str(tmp_path))
    assert caught.value.filename == str(tmp_path)


def test_a_call_that_takes_nothing_is_an_error(tmp_path, monkeypatch):
    assert refuse_zero(3) == 3
    monkeypatch.setattr(os, "write", lambda *_: 0)
    with pytest.raises(OSError, match="took no bytes"):
        write_new(str(tmp_path / "f"), b"x")
    write_new(str(tmp_path / "empty"), b"")
    assert (tmp_path / "empty").read_bytes() == b""
