"""Where a tensor's elements lie in an item of a ``.distcp`` file, which is a ``torch.save`` zip. Reads no payload.

The item's own pickle says so: its strides and where in its storage it begins; the zip's directory says where the storage
is. A guess from the shape would give wrong values for a tensor that was saved transposed.
"""

from __future__ import annotations

import io
import warnings
from typing import IO, Any, NamedTuple, cast

from dist_export.checkpoint.state_archive import check_state_archive, say_refusal
from dist_export.errors import CheckpointError
from dist_export.readers import RangeReader


class Item(NamedTuple):
    """A tensor within a file."""

    offset: int
    """Absolute position of its first element in the file, in bytes."""
    strides: tuple[int, ...]
    """In bytes."""


class _View(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, reader: RangeReader, begin: int, num_bytes: int) -> None:
        self._reader = reader
        self._begin = begin
        self._size = num_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast("bytearray", buffer)).cast("B")
        count = max(0, min(len(view), self._size - self._position))
        self._reader.read_into(view[:count], self._begin + self._position)
        self._position += count
        return count


def locate_item(
    reader: RangeReader, begin: int, num_bytes: int, *, shape: tuple[int, ...], dtype: str, where: str
) -> Item:
    """Find the tensor in the item at ``begin``, of ``num_bytes`` bytes, of an open file.

    Raises:
        CheckpointError: it is no ``torch.save`` of one tensor, or not of this shape and torch dtype.
    """
    import torch

    found = load_without_payload(reader, begin, num_bytes, where=where)
    if not isinstance(found, torch.Tensor) or found.layout != torch.strided:
        raise CheckpointError(f"{where} is a {type(found).__name__}, expected a strided tensor")
    if tuple(found.shape) != shape or str(found.dtype) != f"torch.{dtype}":
        raise CheckpointError(
            f"{where} is {found.dtype} {list(found.shape)}, but .metadata says torch.{dtype} {list(shape)}"
        )
    return place_of(found, begin, num_bytes, where=where)


def load_without_payload(reader: RangeReader, begin: int, num_bytes: int, *, where: str) -> Any:
    """Return what the ``torch.save`` zip in a range of an open file holds, with tensors that know their place alone.

    Raises:
        CheckpointError: it is no such zip, is damaged, or asks for code.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    file = cast("IO[bytes]", io.BufferedReader(_View(reader, begin, num_bytes), 8192))
    check_state_archive(file, where=where)
    file.seek(0)
    try:
        with warnings.catch_warnings(), FakeTensorMode():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 -- a damaged pickle can make torch's reader raise anything
        raise CheckpointError(
            f"{where} cannot be read (torch.load with weights_only=True): {say_refusal(error)}"
        ) from None


def place_of(found: Any, begin: int, num_bytes: int, *, where: str) -> Item:
    """Return where a tensor lies that :func:`load_without_payload` found in this range. CheckpointError where none is told."""
    itemsize = found.element_size()
    storage = found.untyped_storage()
    first = int(found.storage_offset())
    last = first + sum((size - 1) * stride for size, stride in zip(found.shape, found.stride(), strict=True))
    if found.numel() and (last + 1) * itemsize > storage.nbytes():
        raise CheckpointError(f"{where} reaches beyond the {storage.nbytes():,} bytes that are stored of it")
    in_item = int(getattr(storage, "_checkpoint_offset", None) or 0)
    if found.numel() and not 0 < in_item <= num_bytes - storage.nbytes():
        raise CheckpointError(f"{where}: torch.load does not tell where its {storage.nbytes():,} bytes lie")
    return Item(begin + in_item + first * itemsize, tuple(int(stride) * itemsize for stride in found.stride()))
