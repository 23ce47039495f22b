from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_export.errors import ConfigError, ExportError, TransferError
from dist_export.formats.digests import digest_bytes, root_digest
from dist_export.storage import directory as storage
from dist_export.storage.directory import WORK_DIRECTORY, Directory, digest_file, local_tree
from dist_export.storage.local_io import is_in_memory
from dist_export.storage.staging import Staging
from dist_export.storage.urls import open_directory
from tests.support.directory_contract import DirectoryContract
from tests.support.recis_writer import make_tables, truth_of, write_checkpoint
from tests.support.sparse_cases import assert_exact, export


@pytest.fixture(params=["local", "memory"])
def directory(request, tmp_path):
    found = open_directory(str(tmp_path / "dir") if request.param == "local" else f"memory://{tmp_path.name}/dir")
    yield found
    if request.param == "memory" and found.exists():
        found.fs.rm(found.path, recursive=True)


class TestLocal(DirectoryContract):
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Directory:
        return open_directory(tmp_path / "dir")


class TestMemory(DirectoryContract):
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Iterator[Directory]:
        directory = open_directory(f"memory://{tmp_path.name}/dir")
        yield directory
        open_directory(f"memory://{tmp_path.name}").remove_tree("dir")


def test_a_new_file_is_never_seen_without_its_content(tmp_path, monkeypatch):
    """Readers look for ``current.json`` while the first version is published."""
    directory, real, seen = open_directory(tmp_path), os.write, []

    def look(fd, data):
        seen.append([directory.read(name) for name in directory.names() if name in ("f1", "f2")])
        return real(fd, data)

    monkeypatch.setattr(os, "write", look)
    assert directory.replace_if("f1", b"one", expected=None)
    assert directory.create("f2", b"two")
    assert not directory.create("f2", b"three")
    assert seen == [[], [b"one"]]
    assert directory.read("f2") == b"two"


@pytest.mark.parametrize("kind", ["file", "link", "directory", "pipe", "unreadable"])
def test_a_hard_link_is_made_to_regular_files_alone(tmp_path, kind, monkeypatch):
    old, new = open_directory(tmp_path / "old"), open_directory(tmp_path / "new")
    old.write("real", b"data")
    path = tmp_path / "old" / "f"
    make = {
        "file": lambda: path.write_bytes(b"data"),
        "link": lambda: path.symlink_to("real"),
        "directory": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "unreadable": lambda: path.write_bytes(b"data"),
    }
    make[kind]()
    if kind == "unreadable":  # root may read all
        real_open = os.open
        refuse = PermissionError(errno.EACCES, "denied")

        def deny(name, flags, *more):
            if os.path.exists(name) and os.path.samefile(name, path) and not flags & os.O_WRONLY:
                raise refuse
            return real_open(name, flags, *more)

        monkeypatch.setattr(os, "open", deny)
    new.write_again("f", "f", b"data", old)
    monkeypatch.undo()
    assert new.read("f") == b"data"
    assert not (tmp_path / "new" / "f").is_symlink()
    assert (tmp_path / "new" / "f").stat().st_nlink == (2 if kind == "file" else 1)
    assert [name.name for name in (tmp_path / "new").iterdir()] == ["f"]


def test_what_is_written_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    directory = open_directory(tmp_path)
    directory.write("f", b"old")

    def fail(*_):
        raise OSError(errno.EIO, "disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk"):
            directory.write("f", b"new")
    assert directory.read("f") == b"old"
    order = []
    original_sync, original_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), original_sync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), original_replace(*paths)))
    directory.write("f", b"new")
    assert order == ["sync", "replace", "sync"]
    assert directory.names() == ["f"]


def test_the_same_directory_by_any_name(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "up").symlink_to(tmp_path)
    for other in (f"{real}/", f"{tmp_path}/x/../real", f"{tmp_path}/link", f"{tmp_path}/up/real", f"file://{real}"):
        assert open_directory(str(real)).is_same(open_directory(other)), other
    assert not open_directory(str(real)).is_same(open_directory(str(tmp_path)))
    missing = tmp_path / "link" / "missing"
    assert open_directory(str(real / "missing")).is_same(open_directory(str(missing)))
    assert open_directory("memory://a/b").is_same(open_directory("memory://a/b/"))
    assert not open_directory("memory://a/b").is_same(open_directory("memory://a/c"))
    assert not open_directory("memory:///a").is_same(open_directory("/a"))


def test_relative_paths_stand_against_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_directory("x/y").path == str(tmp_path / "x/y")
    assert open_directory("x/y/").describe("f") == "x/y/f"
    assert open_directory("x").is_shared
    assert not open_directory("memory://x").is_shared


def test_an_unknown_protocol_is_the_users_mistake():
    with pytest.raises(ConfigError, match="nosuch://x: no file system"):
        open_directory("nosuch://x")


def test_links_to_files_are_files(tmp_path):
    tables = make_tables({"a": 20}, 2)
    write_checkpoint(tmp_path / "store", tables)
    (tmp_path / "in").mkdir()
    for path in (tmp_path / "store").iterdir():
        (tmp_path / "in" / path.name).symlink_to(path)
    (tmp_path / "in" / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in" / "folder").mkdir()
    assert open_directory(tmp_path / "in").names() == open_directory(tmp_path / "store").names()
    export(tmp_path / "in", tmp_path / "out", num_shards=3, follow_links=True)
    assert_exact(tmp_path / "out", truth_of(tables))


def test_a_link_in_the_target_is_replaced_not_written_through(tmp_path):
    tables = make_tables({"a": 20}, 2)
    write_checkpoint(tmp_path / "in", tables)
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    (tmp_path / "out" / WORK_DIRECTORY).mkdir(parents=True)  # as an interrupted export leaves it
    (tmp_path / "out" / WORK_DIRECTORY / "small_files.json").write_text('["index"]')
    (tmp_path / "out" / WORK_DIRECTORY / "model-000000-of-000002.safetensors.json").write_text("{}")
    name = "model-000000-of-000002.safetensors"
    for link in (name, f".{name}.partial", "index", "index.partial", "manifest.json.partial"):
        (tmp_path / "out" / link).symlink_to(tmp_path / "in" / name)
    (tmp_path / "out" / ".model-000001-of-000002.safetensors.partial").symlink_to(tmp_path / "in" / "new")
    export(tmp_path / "in", tmp_path / "out", num_shards=2)
    assert_exact(tmp_path / "out", truth_of(tables))
    assert {path: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


# ---- staging -------------------------------------------------------------------------------------------------------


def test_staged_files_get_their_names_when_they_are_whole(directory):
    directory.make()
    staging = Staging(directory)
    try:
        staging.create("f", 5)
        staging.create("empty", 0)
        assert directory.names() in ([], [".empty.partial", ".f.partial"])
        with open(staging.path("f"), "r+b") as file:
            file.write(b"12345")
        with staging.open_reader("f") as reader:
            buffer = bytearray(5)
            reader.read_into(memoryview(buffer), 0)
            assert buffer == b"12345"
        staging.publish("f")
        staging.publish("empty")
        assert directory.names() == ["empty", "f"]
        assert directory.read("f") == b"12345"
        staging.create("gone", 3)
        staging.remove("gone")
        staging.remove("gone")
        staging.remove("f")  # published: nothing is being built under that name
        assert directory.names() == ["empty", "f"]
    finally:
        staging.close()
    assert staging._temporary is None or not os.path.exists(staging._temporary)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_shows_before_anything_is_written(tmp_path, monkeypatch, code):
    write_checkpoint(tmp_path / "in", make_tables({"a": 20}, 2))
    calls = []

    def full(fd, offset, length):
        calls.append(length)
        if len(calls) == 2:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ExportError) as caught:
        export(tmp_path / "in", tmp_path / "out", num_shards=3)
    text = str(caught.value)
    assert str(tmp_path / "out" / "model-000001-of-000003.safetensors") in text
    assert os.strerror(code) in text
    assert "\n" not in text
    assert caught.value.exit_code == 1
    assert os.listdir(tmp_path / "out") == [WORK_DIRECTORY]  # what was reserved is free again


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_cannot_reserve_is_no_hindrance(tmp_path, monkeypatch, code):
    tables = make_tables({"a": 20}, 2)
    write_checkpoint(tmp_path / "in", tables)

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    export(tmp_path / "in", tmp_path / "out", num_shards=3)
    assert_exact(tmp_path / "out", truth_of(tables))


def test_an_error_of_the_disk_while_writing(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "in", make_tables({"a": 20}, 2))

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(ExportError, match=r"out/\.model-0.*Input/output error.*No manifest was written") as caught:
        export(tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "out") == [WORK_DIRECTORY]


def test_memory_exports_read_back(tmp_path):
    tables = make_tables({"a": 40}, 2)
    write_checkpoint(tmp_path / "in", tables)
    source, target = open_directory(f"memory://{tmp_path.name}/in"), open_directory(f"memory://{tmp_path.name}/out")
    for path in (tmp_path / "in").iterdir():
        source.write(path.name, path.read_bytes())
    export(source.url, target.url, num_shards=3)
    (tmp_path / "out").mkdir()
    for name in target.names():
        (tmp_path / "out" / name).write_bytes(target.read(name))
    assert_exact(tmp_path / "out", truth_of(tables))
    export(tmp_path / "in", tmp_path / "local", num_shards=3)
    for path in (tmp_path / "local").glob("*.safetensors"):
        assert target.read(path.name) == path.read_bytes()
    target.fs.rm(f"/{tmp_path.name}", recursive=True)


# ---- digests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 99, 100])
def test_digests_agree_whoever_computes_them(tmp_path, size):
    data = os.urandom(size)
    directory = open_directory(tmp_path)
    directory.write("f", data)
    assert digest_file(directory, "f", chunk_bytes=10) == digest_bytes(data, chunk_bytes=10)
    import xxhash

    chunks = [data[i : i + 10] for i in range(0, max(size, 1), 10)]
    assert digest_bytes(data, chunk_bytes=10) == root_digest([xxhash.xxh3_128_digest(chunk) for chunk in chunks])
    assert digest_bytes(data).startswith("xxh3:")
    if size:
        assert digest_bytes(data[:-1], chunk_bytes=10) != digest_bytes(data, chunk_bytes=10)


def test_a_file_of_several_buffers(tmp_path):
    data = os.urandom((9 << 20) + 5)
    open_directory(tmp_path).write("f", data)
    assert digest_file(open_directory(tmp_path), "f") == digest_bytes(data)


def test_local_tree(tmp_path):
    for name in ("b", "a/x", "a/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert local_tree(tmp_path) == ["a/.hidden", "a/x", "b"]


# ---- room ----------------------------------------------------------------------------------------------------------


def in_memory_folder():
    folder = Path("/dev/shm")
    if not is_in_memory(str(folder)):
        pytest.skip("/dev/shm is no tmpfs here")
    return tempfile.TemporaryDirectory(dir=folder)


def test_a_tmpfs_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "in", make_tables({"a": 200}, 2))
    with in_memory_folder() as folder:
        real = os.statvfs
        monkeypatch.setattr(
            storage.os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=real(path).f_frsize)
        )
        with pytest.raises(TransferError, match=r"no room for [\d,]+ bytes: the tmpfs has [\d,]+ left"):
            export(tmp_path / "in", f"{folder}/out", num_shards=3)
        assert [path.name for path in Path(folder, "out").iterdir()] == [WORK_DIRECTORY]
        monkeypatch.undo()
        export(tmp_path / "in", f"{folder}/out", num_shards=3)


def test_what_lies_in_memory():
    assert not is_in_memory("/proc/self")
    assert not is_in_memory("/nowhere/at/all")


def test_a_disk_is_asked_for_its_space_beforehand(tmp_path, monkeypatch):
    if is_in_memory(str(tmp_path)):
        pytest.skip("the temporary directory is a tmpfs")
    write_checkpoint(tmp_path / "in", make_tables({"a": 200}, 2))
    asked = []
    real = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, *range: (asked.append(range), real(fd, *range))[1])
    export(tmp_path / "in", tmp_path / "out", num_shards=3)
    assert sorted(asked) == sorted((0, path.stat().st_size) for path in (tmp_path / "out").glob("*.safetensors"))
