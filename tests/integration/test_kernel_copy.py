"""Copies inside the kernel: what they fall back to, what they report, and that bytes are the same whichever way they go."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from dist_export.errors import ExportError, TransferError
from dist_export.storage.range_reader import RangeReader
from dist_export.storage.urls import open_directory
from dist_export.transfer import output_files
from dist_export.transfer.output_files import StagedFiles
from tests.support.recis_writer import make_tables, truth_of, write_checkpoint
from tests.support.sparse_cases import assert_exact, content, copy, export, tiny


@pytest.fixture
def tables(tmp_path):
    found = make_tables({"a": 120, "b": 40}, 3)
    write_checkpoint(tmp_path / "in", found, dense={"w": np.ones(9)})
    return found


def refuse(number):
    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


def ways(monkeypatch):
    """Ways in which a kernel, a file system or a container may not do what was asked, by name."""
    real_range, real_send = os.copy_file_range, os.sendfile
    short_range = lambda source, output, count, at, to: real_range(source, output, min(count, 7), at, to)
    short_send = lambda output, source, offset, count: real_send(output, source, offset, min(count, 5))
    calls = []

    def two_then_exdev(*args):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return short_range(*args)

    return {
        "as it is": {},
        "EXDEV": {"copy_file_range": refuse(errno.EXDEV)},
        "EXDEV half-way": {"copy_file_range": two_then_exdev},
        "short counts": {"copy_file_range": short_range},
        "EPERM of a container, short sendfile": {"copy_file_range": refuse(errno.EPERM), "sendfile": short_send},
        "neither": {"copy_file_range": refuse(errno.ENOSYS), "sendfile": refuse(errno.EINVAL)},
        "both say the end is there": {"copy_file_range": lambda *_: 0, "sendfile": lambda *_: 0},
    }


WAYS = list(ways(None))


@pytest.mark.parametrize("kind", [export, copy])
@pytest.mark.parametrize("way", WAYS)
def test_the_bytes_are_the_same_whichever_way_they_go(tmp_path, tables, monkeypatch, way, kind):
    settings = {"num_shards": 1} if kind is export else {}
    kind(tmp_path / "in", tmp_path / "hashed", **settings)
    for name, call in ways(monkeypatch)[way].items():
        monkeypatch.setattr(os, name, call)
    manifest = kind(tmp_path / "in", tmp_path / "out", digest="none", **settings)
    assert content(tmp_path / "out") == content(tmp_path / "hashed")
    assert {file.digest for file in manifest.files if file.path.endswith("safetensors")} == {""}


def test_what_needs_no_digest_is_neither_read_nor_written_here(tmp_path, tables, monkeypatch):
    reads, writes = [], []
    read_into, write = RangeReader.read_into, StagedFiles.write
    monkeypatch.setattr(
        RangeReader, "read_into", lambda its, view, offset: (reads.append(len(view)), read_into(its, view, offset))[1]
    )
    monkeypatch.setattr(
        StagedFiles, "write", lambda its, number, view, at: (writes.append(len(view)), write(its, number, view, at))[1]
    )
    export(tmp_path / "in", tmp_path / "out", num_shards=1, digest="none", row_index=False)
    assert_exact(tmp_path / "out", truth_of(tables))
    headers = sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little") for path in (tmp_path / "out").glob("model*.safetensors")
    )
    assert sum(writes) == headers
    whole = sum(path.stat().st_size for path in (tmp_path / "in").iterdir())
    ids = 2 * 8 * 160
    assert sum(reads) < whole - sum(r.nbytes for t in truth_of(tables).values() for r in t.values()) + ids + 2 * headers


def test_a_whole_unchanged_file_is_one_call(tmp_path, tables, monkeypatch):
    calls = []
    real = os.copy_file_range

    def count(source, output, number, *offsets):
        calls.append((number, *offsets))
        return real(source, output, number, *offsets)

    monkeypatch.setattr(os, "copy_file_range", count)
    copy(tmp_path / "in", tmp_path / "out", digest="none")
    sizes = [path.stat().st_size for path in (tmp_path / "in").glob("model*.safetensors")]
    assert sorted(calls) == sorted((size, 0, 0) for size in sizes)


@pytest.mark.parametrize("way", ["copy_file_range", "sendfile"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_at_once(tmp_path, tables, monkeypatch, way, number):
    if way == "sendfile":
        monkeypatch.setattr(os, "copy_file_range", refuse(errno.EXDEV))
    monkeypatch.setattr(os, way, refuse(number))
    with pytest.raises(TransferError, match=rf"model-.*cannot be written: {os.strerror(number)}\. No manifest"):
        export(tmp_path / "in", tmp_path / "out", num_shards=1, digest="none")
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.undo()
    export(tmp_path / "in", tmp_path / "out", num_shards=1, digest="none")
    assert_exact(tmp_path / "out", truth_of(tables))


def test_an_error_of_the_source_names_the_source(tmp_path, tables, monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", refuse(errno.EIO))
    monkeypatch.setattr(os, "sendfile", refuse(errno.EIO))
    real = StagedFiles.copy

    def copy_then_fail(*args):
        monkeypatch.setattr(os, "preadv", refuse(errno.EIO))
        return real(*args)

    monkeypatch.setattr(StagedFiles, "copy", copy_then_fail)
    with pytest.raises(ExportError, match=rf"{tmp_path}/in/model-.*Input/output error at byte 0"):
        copy(tmp_path / "in", tmp_path / "out", digest="none")


@pytest.mark.parametrize("kernel", [True, False])
def test_a_source_that_shrank_is_an_error_and_no_loop(tmp_path, tables, monkeypatch, kernel):
    if not kernel:
        monkeypatch.setattr(output_files, "KERNEL_COPIES", ())
    original = StagedFiles.copy

    def shrink_first(its, *args):
        for path in (tmp_path / "in").glob("model*.safetensors"):
            os.truncate(path, min(700, path.stat().st_size))
        return original(its, *args)

    monkeypatch.setattr(StagedFiles, "copy", shrink_first)
    with pytest.raises(TransferError, match=r"in/model-.* it shrank while it was being read"):
        export(tmp_path / "in", tmp_path / "out", num_shards=1, digest="none")
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("num_shards", [1, 2, 4, "source"])
@pytest.mark.parametrize("digest", ["none", "sha256", "blake3"])
def test_no_digest_changes_the_shards(tmp_path, tables, digest, num_shards):
    export(tmp_path / "in", tmp_path / "xxh3", num_shards=num_shards)
    cut = tiny(chunk=256, unit=512)
    export(tmp_path / "in", tmp_path / "out", num_shards=num_shards, digest=digest, threads=3, tuning=cut)
    assert content(tmp_path / "out") == content(tmp_path / "xxh3")


def test_a_store_without_descriptors_is_copied_through_here(tmp_path, tables):
    source = open_directory(f"memory://{tmp_path.name}/in")
    for path in (tmp_path / "in").iterdir():
        source.fs.pipe_file(source.join(path.name), path.read_bytes())
    export(source.url, tmp_path / "out", num_shards=1, digest="none")
    export(tmp_path / "in", tmp_path / "local", num_shards=1)
    assert content(tmp_path / "out") == content(tmp_path / "local")
    source.fs.rm(f"/{tmp_path.name}", recursive=True)
