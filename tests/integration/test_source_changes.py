"""A source that changes is never taken for what it was: by a rerun, during the export, though sizes and times are the same."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import dist_export
from dist_export.checkpoint.detect import open_reader
from dist_export.errors import ExportError
from dist_export.manifest import MANIFEST
from dist_export.pipeline import run, steps
from dist_export.storage.urls import open_directory
from tests.support import exports, tiny_model
from tests.support.recis_writer import make_tables, write_checkpoint

SHARD = "model-000001-of-000003.safetensors"
ROWS = torch.arange(80.0).reshape(20, 4) + 0.5


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 60, "u": 30}, 3))
    return tmp_path / "ckpt"


def export(source: Path, out: Path, **more: object) -> dist_export.Manifest:
    settings = {"ckpt_dir": str(source), "export_dir": str(out), "filter_sparse_opt": True, "num_shards": 3, **more}
    return exports.export(settings)


def interrupt(source: Path, out: Path, monkeypatch, **more: object) -> None:
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error", "manifest.json")

    with monkeypatch.context() as patched:
        patched.setattr(steps, "publish", fail)
        with pytest.raises(ExportError):
            export(source, out, **more)


def write_anew(file: Path) -> None:
    """Other content of the same size, in the same inode, with the time set back."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[content.find(ROWS.numpy().tobytes())] ^= 1  # of shards of RecIS, where these rows are not, the last byte
    file.write_bytes(content)
    assert (file.stat().st_size, file.stat().st_ino) == (before.st_size, before.st_ino)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def put_another(file: Path) -> None:
    """Another file of the same size and time under the name."""
    shutil.copy2(file, file.with_suffix(".copy"))
    write_anew(file.with_suffix(".copy"))
    os.replace(file.with_suffix(".copy"), file)


def put_a_copy(file: Path) -> None:
    shutil.copy2(file, file.with_suffix(".copy"))
    os.replace(file.with_suffix(".copy"), file)


def save_torch(folder: Path) -> Path:
    folder.mkdir()
    torch.save({"emb.weight": ROWS, "bias": torch.ones(3)}, folder / "last.ckpt")
    return folder / "last.ckpt"


def save_dcp(folder: Path) -> Path:
    state = {"emb.weight": ROWS, "bias": torch.ones(3)}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return next(folder.glob("*.distcp"))


def save_recis(folder: Path) -> Path:
    write_checkpoint(folder, make_tables({"t": 60, "u": 30}, 3))
    return folder / SHARD


SWAPS = [pytest.param(change, id=change.__name__) for change in (write_anew, put_another)]
SAVES = [pytest.param(save, id=save.__name__) for save in (save_torch, save_dcp, save_recis)]


def settings_for(save) -> dict[str, object]:
    return {} if save is save_recis else {"treat_as_tables": ["emb.weight"]}


@pytest.mark.parametrize("change", SWAPS)
@pytest.mark.parametrize("save", SAVES)
def test_a_source_swapped_at_its_size_and_time_is_not_resumed(
    save, change, tmp_path: Path, monkeypatch, caplog
) -> None:
    file, out, more = save(tmp_path / "swapped"), tmp_path / "out", settings_for(save)
    interrupt(file.parent, out, monkeypatch, **more)
    change(file)
    with caplog.at_level("INFO"):
        again = export(file.parent, out, **more)
    assert again.run["reused_shards"] == 0
    assert f"{out}: an unfinished export has left 3 shards for another state of the checkpoint's files" in caplog.text
    fresh = export(file.parent, tmp_path / "fresh", **more)
    assert [its.digest for its in fresh.files] == [its.digest for its in again.files]
    assert fresh.digest == again.digest


@pytest.mark.parametrize("change", SWAPS)
@pytest.mark.parametrize("when", ["transfer", "check"])
@pytest.mark.parametrize("save", SAVES)
def test_a_source_swapped_during_the_export_stops_it(save, when: str, change, tmp_path: Path, monkeypatch) -> None:
    if save is save_recis and when == "check":
        pytest.skip("its small files tell of a save after the transfer")
    file, real = save(tmp_path / "swapped"), getattr(steps, when)

    def swapping(*arguments, **named):
        change(file)
        return real(*arguments, **named)

    monkeypatch.setattr(steps, when, swapping)
    with pytest.raises(ExportError, match=rf"{file.name}: changed while it was being exported"):
        export(file.parent, tmp_path / "out", **settings_for(save))
    assert not (tmp_path / "out" / MANIFEST).exists()


@pytest.mark.parametrize("save", [save_torch, save_dcp])
def test_a_source_without_tables_is_looked_at_too(save, tmp_path: Path, monkeypatch) -> None:
    """The dense arch alone is exported, from a format whose files are all of payload."""
    model = {
        "model": tiny_model.MODEL,
        "dataset": tiny_model.DATASET,
        "need_export_sparse": False,
    }
    state = {f"dense_arch.{name}": its for name, its in tiny_model.build_model().dense_arch.state_dict().items()}
    if save is save_torch:
        (tmp_path / "ckpt").mkdir()
        file = tmp_path / "ckpt" / "last.ckpt"
        torch.save(state, file)
    else:
        dcp.save(state, checkpoint_id=tmp_path / "ckpt", no_dist=True)
        file = next((tmp_path / "ckpt").glob("*.distcp"))
    real = steps.count_requests
    monkeypatch.setattr(run, "STEPS", tuple(_swap_at(file) if its is real else its for its in steps.STEPS))
    with pytest.raises(ExportError, match=rf"{file.name}: changed while it was being exported"):
        exports.export({"ckpt_dir": str(file.parent), "export_dir": str(tmp_path / "out"), **model})


def _swap_at(file: Path):
    def step(export):
        put_a_copy(file)
        return export

    return step


def test_a_link_to_a_file_of_the_source_is_no_change(source: Path, tmp_path: Path, monkeypatch) -> None:
    """``cp -al`` of the checkpoint during the export changes the inodes, and no content."""
    real = steps.check

    def link(*arguments, **more):
        (tmp_path / "linked").mkdir()
        for file in source.iterdir():
            os.link(file, tmp_path / "linked" / file.name)
        return real(*arguments, **more)

    monkeypatch.setattr(steps, "check", link)
    export(source, tmp_path / "out")


def test_ranks_that_mount_the_source_in_different_ways_have_one_plan(source: Path, tmp_path: Path, monkeypatch) -> None:
    """What a disk says besides size and time is of one machine: only the first rank's view is in the digest of the plan."""
    first = open_reader(open_directory(str(source)))
    monkeypatch.setattr("dist_export.storage.local_io.file_system_of", lambda path: "fuse.mounted")
    monkeypatch.setattr("dist_export.storage.file_systems._kinds", {})
    other = open_reader(open_directory(str(source)))
    assert [file.trace for file in other.files] == [()] * len(other.files) != [file.trace for file in first.files]
    headers = [reader.read_headers(range(len(reader.files))) for reader in (first, other)]
    whole = [reader.assemble([its]) for reader, its in zip((first, other), headers, strict=True)]
    assert whole[0].fingerprint == whole[1].fingerprint
    assert whole[0].digest_traces() != whole[1].digest_traces() == ""
