"""What the tests of hostile input share: commands run in this process, what they may leave behind, damage in one line."""

from __future__ import annotations

import json
import os
import re
import resource
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_export.cli import main
from tests.support.recis_writer import TENSORKEY, make_tables, write_checkpoint

FIRST = "model-000000-of-000002.safetensors"
SECOND = "model-000001-of-000002.safetensors"
USER = "user.embedding/part_0_2"
USER_ID = "user.id/part_0_2"
_LOG = re.compile(r"\d\d:\d\d:\d\d rank 0 ")

Damage = Callable[[Path], object]


class Outcome(NamedTuple):
    """What a command returned and wrote."""

    code: int
    out: str
    lines: list[str]
    """Of stderr, without log lines."""


@contextmanager
def limited_memory(num_bytes: int) -> Iterator[None]:
    """Let this process take so much more address space; what would take more is a MemoryError, which nothing catches."""
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def write_base(folder: Path) -> Path:
    """Write a small sound checkpoint, with a dense tensor among the sparse files and no model.pt."""
    return write_checkpoint(folder, make_tables({"user": 20, "item": 10}, 2), dense={"w": np.ones(2)})


def run(capsys: Any, tmp_path: Path, *arguments: object) -> Outcome:
    """Run a command. Whatever it does, its output is printable, and no temporary file is left."""
    scratch = tmp_path / "tmp"
    scratch.mkdir(exist_ok=True)
    before, tempfile.tempdir = tempfile.tempdir, str(scratch)
    try:
        with limited_memory(2 << 30):
            code = main([str(argument) for argument in arguments])
    finally:
        tempfile.tempdir = before
    captured = capsys.readouterr()
    for line in captured.out.split("\n") + captured.err.split("\n"):
        assert line.isprintable(), line
    left = [
        path for path in scratch.iterdir() if not path.name.startswith("torchinductor")
    ]  # torch's, on its first import
    assert left == []
    return Outcome(code, captured.out, [line for line in captured.err.splitlines() if not _LOG.match(line)])


def run_all(capsys: Any, tmp_path: Path, *, settings: tuple[object, ...] = ()) -> dict[str, Outcome]:
    """Run both kinds of export, plan and inspect on ``tmp_path / "in"``; those that fail have written nothing."""
    source, target = tmp_path / "in", tmp_path / "out"
    places = ("--ckpt_dir", source, "--export_dir", target, *settings)
    found = {
        "plan": run(capsys, tmp_path, "plan", *places, "--filter_sparse_opt", "true"),
        "copy": run(capsys, tmp_path, *places),
        "inspect": run(capsys, tmp_path, "inspect", source),
    }
    assert found["copy"].code == 0 or not target.exists()
    found["export"] = run(capsys, tmp_path, *places[:3], tmp_path / "out2", *settings, "--filter_sparse_opt", "true")
    assert found["export"].code == 0 or not (tmp_path / "out2").exists()
    return found


def assert_refused(found: Outcome, said: str, *, code: int = 2) -> None:
    """Exit code 2 and one line that says this."""
    assert found.code == code, found
    assert len(found.lines) == 1, found
    assert found.lines[0].startswith("dist_export: ")
    assert said in found.lines[0]
    assert len(found.lines[0]) < 5_000
    assert found.out == ""


# ---- damage -------------------------------------------------------------------------------------------------------


def edit(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Change the bytes of a file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the document of a json file."""

    def apply(raw: bytes) -> bytes:
        document = json.loads(raw)
        change(document)
        return json.dumps(document).encode()

    return edit(name, apply)


def edit_header(change: Callable[[dict[str, Any]], object], *, name: str = FIRST) -> Damage:
    """Change the header of a shard."""

    def apply(text: bytes) -> bytes:
        document = json.loads(text)
        change(document)
        return json.dumps(document).encode()

    return edit_header_text(apply, name=name)


def edit_header_text(change: Callable[[bytes], bytes], *, name: str = FIRST) -> Damage:
    """Change the bytes of a shard's header; the length in front of it follows."""

    def apply(raw: bytes) -> bytes:
        (length,) = struct.unpack("<Q", raw[:8])
        text = change(raw[8 : 8 + length])
        return struct.pack("<Q", len(text)) + text + raw[8 + length :]

    return edit(name, apply)


def swap(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """Exchange a piece that is there."""

    def apply(raw: bytes) -> bytes:
        assert old in raw
        return raw.replace(old, new, 1)

    return apply


def sparse_header(length: int, begin: bytes = b"") -> Damage:
    """A shard whose header is a hole: much to read, nothing on disk."""

    def apply(folder: Path) -> None:
        with (folder / FIRST).open("wb") as file:
            file.write(struct.pack("<Q", length) + begin)
            file.truncate(length + 100)

    return apply


def sparse_file(name: str, size: int, begin: bytes = b"") -> Damage:
    """A file that is a hole."""

    def apply(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.write(begin)
            file.truncate(size)

    return apply


def instead(name: str, make: Callable[[Path], object]) -> Damage:
    """Put something else where a file is."""

    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return apply


def link_out(name: str) -> Damage:
    """Move a file out of the directory and leave a link to it."""

    def apply(folder: Path) -> None:
        (folder.parent / "elsewhere").mkdir(exist_ok=True)
        os.replace(folder / name, folder.parent / "elsewhere" / name)
        (folder / name).symlink_to(folder.parent / "elsewhere" / name)

    return apply


def rename_table(new: str, old: str) -> Damage:
    """Give a table another name, in tensorkey.json, where RecIS looks for it."""

    def change(names: dict[str, Any]) -> None:
        for key, internal in names.items():
            names[key] = new + internal.removeprefix(old) if internal.startswith(f"{old}@") else internal

    return edit_json(TENSORKEY, change)
