"""What an ending says of the target is what is there at that moment, and is said also where the disk hangs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import dist_export
from dist_export.errors import ExportError
from dist_export.manifest import MANIFEST
from dist_export.pipeline import steps, target_state
from dist_export.pipeline.target_state import OnDisk
from dist_export.runtime.ranks import Ranks
from dist_export.storage.directory import Directory
from dist_export.storage.urls import open_directory
from tests.support.recis_writer import make_tables, write_checkpoint


def test_a_new_package(tmp_path: Path) -> None:
    final = open_directory(tmp_path)
    say = OnDisk(final, final)
    assert say() == (
        f"No manifest was written, so {tmp_path} is no package; shards that are whole are kept there for the next run"
    )
    (tmp_path / MANIFEST).touch()
    assert say() == f"{tmp_path} holds the committed package"


def test_a_package_that_is_replaced(tmp_path: Path) -> None:
    final, target = tmp_path / "out", tmp_path / "next"
    for folder in (final, target):
        folder.mkdir()
    (final / MANIFEST).write_text("old")
    say = OnDisk(open_directory(final), open_directory(target))
    (target / MANIFEST).write_text("new")
    assert say() == f"{final} still holds the old package; shards that are whole are kept in {target} for the next run"
    (final / MANIFEST).rename(tmp_path / "old")
    assert say().startswith(f"Nothing is in {final} at this moment")
    (target / MANIFEST).rename(final / MANIFEST)
    assert say() == f"{final} holds the new, committed package"


def test_a_disk_that_hangs_or_fails_does_not_keep_the_end_from_being_told(tmp_path: Path, monkeypatch) -> None:
    final = open_directory(tmp_path)
    say = OnDisk(final, final)
    monkeypatch.setattr(target_state, "LOOK_SECS", 0.05)
    with monkeypatch.context() as patched:
        patched.setattr(Directory, "exists", lambda *_: time.sleep(1))
        assert "has not answered" in say()
        assert f"it holds a package if {MANIFEST} is there" in say()
    monkeypatch.setattr(target_state, "LOOK_SECS", 10)

    def fail(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Directory, "exists", fail)
    assert say() == f"{tmp_path} cannot be looked at (Permission denied): it holds a package if {MANIFEST} is there"


def export(source: Path, out: Path, **more: object) -> dist_export.Manifest:
    return dist_export.export({"ckpt_dir": str(source), "export_dir": str(out), "filter_sparse_opt": True, **more})


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_stop_that_was_asked_for_during_the_commit_tells_what_came_of_it(
    overwrite: bool, tmp_path: Path, monkeypatch
) -> None:
    """The commit is not cut off: its end is what is on disk when the export ends, not what was there at the signal."""
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 40}, 2))
    out = tmp_path / "out"
    if overwrite:
        export(tmp_path / "ckpt", out)
    real = steps.publish

    def publish(*arguments):
        joined[0].request_stop("stopped by SIGTERM, which came in 'commit'")
        real(*arguments)

    joined: list[Ranks] = []
    begin = Ranks.note_on_disk
    monkeypatch.setattr(Ranks, "note_on_disk", lambda self, say: (joined.append(self), begin(self, say)))
    monkeypatch.setattr(steps, "publish", publish)
    with pytest.raises(ExportError) as caught:
        export(tmp_path / "ckpt", out, overwrite=overwrite)
    assert (out / MANIFEST).exists()
    new = "new, " if overwrite else ""
    assert str(caught.value) == (
        f"stopped by SIGTERM, which came in 'commit'. {out} holds the {new}committed package. Run the same command again "
        "to go on"
    )


def test_an_error_of_the_disk_after_the_commit_says_that_the_package_is_there(tmp_path: Path, monkeypatch) -> None:
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 40}, 2))

    def fail(*_, **__):
        raise OSError(28, os.strerror(28), "somewhere")

    monkeypatch.setattr(steps, "commit_paths", fail)
    with pytest.raises(ExportError, match=rf"somewhere: No space left.*{tmp_path / 'out'} holds the committed package"):
        export(tmp_path / "ckpt", tmp_path / "out")
