"""Files that vanish or change between the check and the commit: no manifest, and the next run writes them anew."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import dist_export
from dist_export.errors import CommitError
from dist_export.manifest import MANIFEST
from dist_export.pipeline import steps
from dist_export.verify.verify import verify
from tests.support import tiny_model
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.sparse_cases import content

SHARD = "model-000001-of-000003.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 60, "u": 30}, 3))
    return tmp_path / "ckpt"


def export(source: Path, out: Path | str, **more: object) -> dist_export.Manifest:
    settings = {"ckpt_dir": str(source), "export_dir": str(out), "filter_sparse_opt": True, "num_shards": 3, **more}
    return dist_export.export(settings)


def change_before_the_commit(monkeypatch, change: Callable[[], object]) -> None:
    real = steps.refuse_vanished

    def refuse_vanished(*arguments, **options):
        change()
        real(*arguments, **options)

    monkeypatch.setattr(steps, "refuse_vanished", refuse_vanished)


def put_another(file: Path) -> None:
    """Another content of the same size, with the same time."""
    before, data = file.stat(), file.read_bytes()
    other = file.with_suffix(".other")
    other.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, file)


def write_into(file: Path) -> None:
    data = file.read_bytes()
    with file.open("r+b") as written:
        written.write(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(file, ns=(1, 1))


@pytest.mark.parametrize("digest", ["xxh3", "none"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (os.unlink, "is gone"),
        (put_another, "was replaced or changed"),
        (write_into, "was replaced or changed"),
        (lambda file: os.truncate(file, 100), "was replaced or changed"),
    ],
    ids=["removed", "replaced", "written into", "cut"],
)
@pytest.mark.parametrize("name", [SHARD, "index"])
def test_what_is_not_there_is_not_committed(
    name: str, change: Callable[[Path], None], said: str, digest: str, source: Path, tmp_path: Path, monkeypatch
) -> None:
    out, expected = tmp_path / "out", tmp_path / "expected"
    export(source, expected, digest=digest)
    with monkeypatch.context() as patched:
        change_before_the_commit(patched, lambda: change(out / name))
        with pytest.raises(CommitError, match=rf"{name}: {said} since it was written.*No manifest was written"):
            export(source, out, digest=digest)
    assert not (out / MANIFEST).exists()
    export(source, out, digest=digest)
    assert content(out) == content(expected)
    assert verify(str(out)).findings == []


def test_an_old_package_stays_where_the_new_one_lost_a_shard(source: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    export(source, out)
    before = content(out)
    target = tmp_path / ".out.dist_export-next"
    change_before_the_commit(monkeypatch, (target / SHARD).unlink)
    with pytest.raises(CommitError, match="is gone since it was written"):
        export(source, out, overwrite=True)
    assert {name: data for name, data in content(out).items() if not name.startswith(".dist_export")} == before
    assert verify(str(out)).findings == []


def test_a_file_of_the_dense_arch(tmp_path: Path, monkeypatch) -> None:
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    out = tmp_path / "out"
    change_before_the_commit(monkeypatch, (out / "fx_user_model" / "output_info.json").unlink)
    with pytest.raises(CommitError, match=r"fx_user_model/output_info.json: is gone"):
        export(source, out, model=tiny_model.MODEL, dataset=tiny_model.DATASET)
    assert not (out / MANIFEST).exists()


@pytest.mark.parametrize("name", ["model-000000-of-000003.safetensors", "index"])
def test_in_the_checkpoint_itself(name: str, source: Path, monkeypatch) -> None:
    """A trainer's clean-up removes an old checkpoint while it is completed into a package."""
    copy = shutil.copytree(source, source.with_name("copy"))
    with monkeypatch.context() as patched:
        change_before_the_commit(patched, (copy / name).unlink)
        with pytest.raises(CommitError, match=rf"{name}: is gone since it was written"):
            export(copy, copy, filter_sparse_opt=False, num_shards=None)
    assert not (copy / MANIFEST).exists()
    assert not list((copy / ".dist_export").glob("model-*.json")), "a checkpoint's shards have no receipts"


def test_on_a_store(source: Path, monkeypatch) -> None:
    MemoryFileSystem.store.clear()
    for change in (
        lambda: MemoryFileSystem().rm_file(f"/written/out/{SHARD}"),
        lambda: MemoryFileSystem().pipe_file(f"/written/out/{SHARD}", MemoryFileSystem().cat(f"/written/out/{SHARD}")),
    ):
        with monkeypatch.context() as patched:
            change_before_the_commit(patched, change)
            with pytest.raises(CommitError, match="since it was written"):
                export(source, "memory://written/out")
        assert not MemoryFileSystem().exists(f"/written/out/{MANIFEST}")
    export(source, "memory://written/out")
    assert verify("memory://written/out").findings == []
    MemoryFileSystem.store.clear()


def test_a_file_that_is_gone_before_the_check(source: Path, tmp_path: Path, monkeypatch) -> None:
    real = steps.transfer

    def transfer(*arguments, **options):
        done = real(*arguments, **options)
        (tmp_path / "out" / SHARD).unlink()
        return done

    monkeypatch.setattr(steps, "transfer", transfer)
    with pytest.raises(CommitError, match=rf"{SHARD}: is gone since it was written"):
        export(source, tmp_path / "out")
