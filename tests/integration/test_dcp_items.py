"""Where a tensor lies in an item: told by its pickle and its zip, and the same as torch finds."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_export.checkpoint import torch_items
from dist_export.checkpoint.torch_items import Item, ItemFinder
from dist_export.errors import CheckpointError
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.torch_zip import check_state_archive
from dist_export.storage.directory import Directory
from dist_export.storage.urls import open_directory
from tests.support import ROOT

BASE = torch.arange(240)
VIEWS: dict[str, Any] = {
    "matrix": lambda t: t.reshape(20, 12),
    "transposed": lambda t: t.reshape(20, 12).t(),
    "columns": lambda t: t.reshape(20, 12)[3:, 2:5],
    "every third": lambda t: t[1::3],
    "scalar": lambda t: t[7],
    "expanded": lambda t: t[:1].expand(5, 4),
    "empty": lambda t: t[:0].reshape(0, 4),
    "one row": lambda t: t.reshape(20, 12)[4:5],
    "cube": lambda t: t.reshape(4, 5, 12).permute(2, 0, 1),
}


def save_item(folder: Path, value: Any, *, before: int = 100) -> tuple[Directory, int]:
    """Write a file that holds an item behind other bytes; return its size."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    (folder / "f").write_bytes(b"x" * before + buffer.getvalue() + b"y" * 50)
    return open_directory(folder), len(buffer.getvalue())


def locate(folder: Path, value: torch.Tensor, finder: ItemFinder | None = None) -> Item:
    directory, size = save_item(folder, value)
    dtype = str(value.dtype).removeprefix("torch.")
    with directory.open_reader("f") as reader:
        return (finder or ItemFinder()).locate(reader, 100, size, shape=tuple(value.shape), dtype=dtype, where="f")


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [dtype.torch for dtype in DTYPES])
def test_the_values_are_where_they_are_found(dtype: str, view: str, tmp_path: Path) -> None:
    """What is found is what torch says, and numpy finds the values there."""
    value = VIEWS[view](BASE.to(getattr(torch, dtype)))
    found = locate(tmp_path, value)
    assert found.strides == tuple(stride * value.element_size() for stride in value.stride())
    kind = np.dtype(next(d.numpy for d in DTYPES if d.torch == dtype))
    if value.numel():
        raw = (tmp_path / "f").read_bytes()
        read = np.ndarray(tuple(value.shape), kind, raw, found.offset, found.strides)
        assert torch.equal(torch.from_numpy(read.copy().astype(kind)).view(value.dtype), value)


def test_items_of_one_pickle_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks write many items of one shape; each still lies where its own zip says."""
    calls: list[bytes] = []
    decode = torch_items.decode_item
    monkeypatch.setattr(torch_items, "decode_item", lambda raw, where: calls.append(raw) or decode(raw, where))
    finder = ItemFinder()
    first = locate(tmp_path, torch.ones(3, 4), finder)
    assert locate(tmp_path, torch.zeros(3, 4), finder) == first
    locate(tmp_path, torch.zeros(4, 4), finder)
    assert len(calls) == 2


def test_dtypes_that_the_storage_does_not_tell(tmp_path: Path) -> None:
    value = torch.arange(12).reshape(3, 4).to(torch.uint16)
    raw = locate(tmp_path, value)
    found = np.ndarray((3, 4), np.uint16, (tmp_path / "f").read_bytes(), raw.offset, raw.strides)
    assert found.tolist() == value.tolist()


def test_a_plain_item_costs_two_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much it holds: what is said of it lies at its two ends."""
    value = torch.zeros(1000, 1000)
    directory, size = save_item(tmp_path, value)
    reads: list[int] = []
    with directory.open_reader("f") as reader:
        original = reader.read_into
        monkeypatch.setattr(type(reader), "read_into", lambda _, v, o: (reads.append(len(v)), original(v, o)))
        ItemFinder().locate(reader, 100, size, shape=(1000, 1000), dtype="float32", where="f")
    assert len(reads) == 2
    assert sum(reads) <= 8192


def test_the_compiler_of_torch_is_not_imported() -> None:
    """It would take seconds, on every rank."""
    program = (
        "import io, sys, tempfile, torch\n"
        "from dist_export.checkpoint.torch_items import ItemFinder\n"
        "from dist_export.storage.urls import open_directory\n"
        "folder = tempfile.mkdtemp()\n"
        "torch.save(torch.ones(2, 3), folder + '/f')\n"
        "directory = open_directory(folder)\n"
        "with directory.open_reader('f') as reader:\n"
        "    ItemFinder().locate(reader, 0, directory.stat('f').size, shape=(2, 3), dtype='float32', where='f')\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    root = str(ROOT)
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"PYTHONPATH": root}, timeout=120)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(2)], "is a list, expected a strided tensor"),
        ({"a": 1}, "is a dict, expected a strided tensor"),
        (torch.ones(2, 2).to_sparse(), r"is no strided tensor \(sparse_coo\)"),
        (torch._neg_view(torch.ones(2, 2)), "is stored negated or conjugated"),
        (torch.ones(3, 2), r"is torch.float32 \[3, 2\], but .metadata says torch.float32 \[2, 2\]"),
        (torch.ones(2, 2).half(), r"is torch.float16 \[2, 2\], but .metadata says torch.float32"),
    ],
)
def test_what_is_no_such_tensor_is_refused(value: Any, message: str, tmp_path: Path) -> None:
    directory, size = save_item(tmp_path, value)
    with directory.open_reader("f") as reader, pytest.raises(CheckpointError, match=message) as caught:
        ItemFinder().locate(reader, 100, size, shape=(2, 2), dtype="float32", where="f")
    assert "\n" not in str(caught.value)


def rewrite(source: bytes, change: Any) -> bytes:
    """Pack a zip anew, with members changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename.partition("/")[2], old.read(info)))
    return out.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, data: b"big" if name == "byteorder" else data, "big-endian bytes"),
        (lambda name, data: data[:-4] if name == "data/0" else data, "which has 12"),
        (
            lambda name, data: data.replace(b"K\x02K\x02\x86", b"K\x02K\x01\x86") if name == "data.pkl" else data,
            "metadata",
        ),
        (
            lambda name, data: data.replace(b"K\x02K\x01\x86", b"K\x63K\x01\x86") if name == "data.pkl" else data,
            "reaches beyond the 16 bytes that are stored",
        ),
    ],
)
def test_an_item_that_does_not_hold_what_it_says_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(torch.ones(2, 2), buffer)
    raw = rewrite(buffer.getvalue(), change)
    assert check_state_archive(io.BytesIO(rewrite(buffer.getvalue(), lambda _, data: data)), where="f").storages
    (tmp_path / "f").write_bytes(raw)
    with open_directory(tmp_path).open_reader("f") as reader, pytest.raises(CheckpointError, match=message):
        ItemFinder().locate(reader, 0, len(raw), shape=(2, 2), dtype="float32", where="f")
