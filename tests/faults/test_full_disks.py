"""Real file systems that are too small, or that somebody else fills: a tmpfs, and an ext4 in a file, where root can mount."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_export.errors import ExportError
from dist_export.pipeline import steps
from dist_export.transfer.output_files import StagedFiles
from dist_export.verify.verify import verify
from tests.support.faults.fault_cases import source_state
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.sparse_cases import content, export


def mount(place: Path, *arguments: str) -> None:
    """Mount a file system on ``place``; skip the test where that cannot be done."""
    place.mkdir()
    done = subprocess.run(["mount", *arguments, str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no {arguments[1]} can be mounted here: {done.stderr.strip()}")


def make_tmpfs(folder: Path) -> None:
    mount(folder / "disk", "-t", "tmpfs", "-o", "size=600k", "none")


def make_ext4(folder: Path) -> None:
    tool = shutil.which("mkfs.ext4") or shutil.which("mkfs.ext4", path="/usr/sbin:/sbin")
    if tool is None:
        pytest.skip("there is no mkfs.ext4 here")
    with open(folder / "image", "wb") as image:
        image.truncate(1 << 20)
    subprocess.run([tool, "-q", "-O", "^has_journal", "-m", "0", str(folder / "image")], check=True)
    mount(folder / "disk", "-t", "ext4", "-o", "loop", str(folder / "image"))


KINDS: dict[str, Callable[[Path], None]] = {"tmpfs": make_tmpfs, "ext4": make_ext4}


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small disk, empty, and a checkpoint beside it in tmp_path / "in", whose package takes half of it."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    KINDS[request.param](tmp_path)
    try:
        write_checkpoint(tmp_path / "in", make_tables({"a": 8000, "b": 3000}, 3))
        yield tmp_path / "disk"
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def fill(disk: Path) -> None:
    """Be somebody else who takes all the space that is left."""
    with open(disk / "somebody_else", "ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def assert_full(tmp_path: Path, disk: Path, word: str) -> None:
    """The export fails with one line; when there is room again the next one completes, as on a large disk."""
    before = source_state(tmp_path / "in")
    with pytest.raises(ExportError) as caught:
        export(tmp_path / "in", disk / "out", num_shards=2, threads=1)
    text = str(caught.value)
    assert "\n" not in text
    assert word in text
    assert f"{disk}/out" in text
    assert "run the export again" in text
    assert caught.value.exit_code == 1
    assert not os.path.exists(disk / "out" / "manifest.json")
    left = [path.name for path in (disk / "out").rglob("*.partial")]
    assert not left, "the space of what did not become whole is free again"
    (disk / "somebody_else").unlink()
    export(tmp_path / "in", disk / "out", num_shards=2, threads=1)
    export(tmp_path / "in", tmp_path / "reference", num_shards=2, threads=1)
    assert content(disk / "out") == content(tmp_path / "reference")
    assert verify(str(disk / "out")).findings == []
    assert source_state(tmp_path / "in") == before


def test_no_room_from_the_start(tmp_path: Path, disk: Path) -> None:
    """It shows before a byte of data is written."""
    (disk / "out").mkdir()
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "somebody_else").write_bytes(bytes(free - (150 << 10)))
    assert_full(tmp_path, disk, "no room for")


def once(call: Callable[..., Any], disk: Path) -> Callable[..., Any]:
    """Return a function that fills the disk before it is called for the first time."""
    calls = []

    def filling(*arguments: Any, **settings: Any) -> Any:
        if not calls:
            fill(disk)
        calls.append(call)
        return call(*arguments, **settings)

    return filling


def test_somebody_else_fills_it_while_shards_are_written(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was reserved on a disk is safe; a tmpfs reserves nothing, so there the data themselves find no room."""
    monkeypatch.setattr(StagedFiles, "write", once(StagedFiles.write, disk))
    assert_full(tmp_path, disk, "No space left on device")


def test_somebody_else_fills_it_before_the_small_files(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards are whole then, and are taken over."""
    monkeypatch.setattr(steps, "check", once(steps.check, disk))
    assert_full(tmp_path, disk, "No space left on device")
    manifest = json.loads((disk / "out" / "manifest.json").read_bytes())
    assert manifest["run"]["reused_shards"] == 2
