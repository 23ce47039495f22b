"""Zips of ``torch.save`` that another program packed: any layout of stored members is read as torch reads it."""

from __future__ import annotations

import io
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_export.checkpoint.recis.model_pt import load_dense_state
from dist_export.checkpoint.tensors.torch_file import read_torch_file
from dist_export.checkpoint.torch_items import ItemFinder
from dist_export.errors import CheckpointError
from dist_export.storage.urls import open_directory, open_place
from tests.support.plain_cases import assert_same, read_numbered
from tests.support.sparse_cases import export
from tests.support.zip_layouts import LAYOUTS, read_members, write_zip


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def bytes_of(tensor: torch.Tensor) -> list[int]:
    found: list[int] = tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
    return found


def make_packed_state() -> dict[str, Any]:
    """Storages of many sizes, views, tied and empty tensors, dtypes that only newer torch stores."""
    base = torch.arange(60, dtype=torch.float32).reshape(12, 5)
    return {
        "ebc.embeddings.a.weight": torch.randn(7, 3),
        "ebc.embeddings.b.weight": torch.randn(300, 4).half(),
        "ebc.embeddings.c.weight": base,
        "view.weight": base[3:9, 1:4],
        "tied.weight": base,
        "flipped.weight": torch.arange(35).reshape(5, 7).t(),
        "empty.weight": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "step": torch.tensor(3, dtype=torch.int16),
        "small": torch.arange(9).to(torch.uint16),
        "eighth": torch.randn(5, 3).to(torch.float8_e4m3fn),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_was_packed_anew_is_what_torch_load_says(layout: str, tmp_path: Path) -> None:
    """Where a member lies is told by the zip, and by nothing that torch's own writer would have done."""
    sound = save(tmp_path / "sound.pt", make_packed_state())
    path = tmp_path / "ckpt.pt"
    path.write_bytes(LAYOUTS[layout](read_members(sound.read_bytes())))
    expected = torch.load(path, weights_only=True)
    with open_place(tmp_path).open_reader("ckpt.pt") as reader:
        found = read_torch_file(reader, path.stat().st_size, 0).tensors
    assert [(tensor.name, tensor.dtype, tensor.piece.sizes) for tensor in found] == [
        (name, str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in expected.items()
    ]
    raw = bytearray(path.read_bytes())
    for tensor in found:
        want, (_, sizes, _, offset, strides) = expected[tensor.name], tensor.piece
        itemsize = want.element_size()
        if want.numel():
            count = sum((n - 1) * stride // itemsize for n, stride in zip(sizes, strides, strict=True)) + 1
            flat = torch.frombuffer(raw[offset : offset + count * itemsize], dtype=want.dtype)
            read = flat.as_strided(sizes, [stride // itemsize for stride in strides])
            assert bytes_of(read) == bytes_of(want), tensor
    export(path, tmp_path / "out", treat_as_tables=["ebc.*"])
    assert_same(read_numbered(tmp_path / "out"), {name: value for name, value in expected.items() if "ebc" in name})


def point_elsewhere(raw: bytes) -> bytes:
    """Let the directory say of one storage that it lies where another one does."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        first, second = (archive.getinfo(f"archive/data/{key}").header_offset for key in (0, 1))
    place = raw.rindex(struct.pack("<L", second), 0, raw.rindex(b"PK\x05\x06"))
    return raw[:place] + struct.pack("<L", first) + raw[place + 4 :]


NO_LAYOUTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "compressed": (lambda raw: repack(raw, zipfile.ZIP_DEFLATED), "is compressed or encrypted"),
    "bytes before it": (lambda raw: b"PK\x03\x04" + raw, "does not begin where its zip says"),
    "bytes behind it": (lambda raw: raw + b"x", "is truncated"),
    "a second end in the comment": (
        lambda raw: write_zip(read_members(raw), comment=b"PK\x05\x06" + bytes(30)),
        "is truncated",
    ),
    "two members in one place": (point_elsewhere, "overlaps the member before it"),
    "a name of its own": (
        lambda raw: raw.replace(b"archive/data/1", b"archive/data/7", 1),
        "'archive/data/1' is not where the zip's directory says",
    ),
    "no header": (
        lambda raw: raw.replace(
            raw[: raw.index(b"archive/data.pkl")], b"QK" + raw[2 : raw.index(b"archive/data.pkl")], 1
        ),
        "is no file of torch.save",
    ),
    "an order of bytes that is none": (
        lambda raw: write_zip([(n, b"middle" if n == "byteorder" else c) for n, c in read_members(raw)]),
        "expected b'little' or b'big'",
    ),
}


def repack(raw: bytes, compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in read_members(raw):
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


@pytest.mark.parametrize("case", NO_LAYOUTS)
def test_a_zip_that_two_readers_could_read_differently_is_refused(case: str, tmp_path: Path) -> None:
    change, said = NO_LAYOUTS[case]
    path = save(tmp_path / "ckpt.pt", make_packed_state())
    path.write_bytes(change(write_zip(read_members(path.read_bytes()))))
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        export(path, tmp_path / "out", treat_as_tables=["ebc.*"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_model_pt_and_items_of_dcp_in_any_layout(layout: str, tmp_path: Path) -> None:
    state = make_packed_state()
    sound = save(tmp_path / "sound.pt", state).read_bytes()
    (tmp_path / "model.pt").write_bytes(LAYOUTS[layout](read_members(sound)))
    for name, value in load_dense_state(open_directory(tmp_path)).items():
        assert bytes_of(value) == bytes_of(state[name]), name
    value = torch.arange(12, dtype=torch.int32).reshape(3, 4).t()
    item = LAYOUTS[layout](read_members(save(tmp_path / "item", value).read_bytes()))
    (tmp_path / "f").write_bytes(bytes(11) + item + bytes(5))
    with open_directory(tmp_path).open_reader("f") as reader:
        found = ItemFinder().locate(reader, 11, len(item), shape=(4, 3), dtype="int32", where="f")
    raw = bytearray((tmp_path / "f").read_bytes())
    first = torch.frombuffer(raw[found.offset : found.offset + 48], dtype=torch.int32)
    assert first.as_strided((4, 3), [stride // 4 for stride in found.strides]).equal(value)
