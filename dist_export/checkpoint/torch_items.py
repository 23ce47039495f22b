"""Where a tensor's elements lie in an item of a ``.distcp`` file, which is a ``torch.save`` zip. Reads no payload.

The item's own pickle says so: its strides and where in its storage it begins; the zip's directory says where the storage
is. A guess from the shape would give wrong values for a tensor that was saved transposed.
"""

from __future__ import annotations

import io
import math
from typing import IO, NamedTuple, cast

from dist_export.errors import CheckpointError
from dist_export.formats.pickle_values import PickleError
from dist_export.formats.pickled_tensor import PickledTensor, itemsize_of
from dist_export.formats.torch_pickle import as_tensor, load_pickled
from dist_export.formats.torch_zip import check_state_archive
from dist_export.storage.range_file import RangeFile
from dist_export.storage.range_reader import RangeReader

_END_BYTES = 4096
"""What a zip says of itself lies in its first and its last bytes: two reads are enough, which counts on object stores."""


_MAX_EXPANDED_BYTES = 1 << 30
"""An expanded tensor repeats what its item holds, up to this size; more is no parameter but a trap."""


class NotPlainError(CheckpointError):
    """An item is a tensor, but none whose values lie in its storage as they are."""


class Item(NamedTuple):
    """A tensor within a file."""

    offset: int
    """Absolute position of its first element in the file, in bytes."""
    strides: tuple[int, ...]
    """In bytes."""


class _View(RangeFile):
    """An item, as a file. Its ends are read once, for that is where a zip says what it holds."""

    def __init__(self, reader: RangeReader, begin: int, num_bytes: int) -> None:
        super().__init__(reader, begin, num_bytes)
        self._ends: dict[int, memoryview] = {}

    def _fill(self, view: memoryview, position: int) -> int:
        for begin in (0, max(0, self._size - _END_BYTES)):
            at = position - begin
            if 0 <= at < _END_BYTES:  # what is asked for beyond it is asked for again
                end = self._end(begin)[at : at + len(view)]
                view[: len(end)] = end
                return len(end)
        return super()._fill(view, position)

    def _end(self, begin: int) -> memoryview:
        if begin not in self._ends:
            self._ends[begin] = memoryview(bytearray(min(_END_BYTES, self._size - begin)))
            super()._fill(self._ends[begin], begin)
        return self._ends[begin]


def open_range(reader: RangeReader, begin: int, num_bytes: int) -> IO[bytes]:
    """Return a range of an open file as a file."""
    return cast("IO[bytes]", io.BufferedReader(_View(reader, begin, num_bytes), _END_BYTES))


class ItemFinder:
    """Finds tensors in items. Items of one shape have one pickle, which is looked at once."""

    def __init__(self) -> None:
        self._found: dict[bytes, PickledTensor] = {}

    def locate(
        self, reader: RangeReader, begin: int, num_bytes: int, *, shape: tuple[int, ...], dtype: str, where: str
    ) -> Item:
        """Find the tensor in the item at ``begin``, of ``num_bytes`` bytes, of an open file.

        Raises:
            CheckpointError: it is no ``torch.save`` of one tensor, or not of this shape and torch dtype.
        """
        archive = check_state_archive(open_range(reader, begin, num_bytes), where=where)
        found = self._found.get(archive.pickled)
        if found is None:
            found = self._found[archive.pickled] = decode_item(archive.pickled, where)
        if found.shape != shape or found.dtype != dtype:
            raise CheckpointError(
                f"{where} is torch.{found.dtype} {list(found.shape)}, but .metadata says torch.{dtype} {list(shape)}"
                ". Copy the checkpoint again, or take an earlier one"
            )
        itemsize = itemsize_of(dtype)
        strides = tuple(stride * itemsize for stride in found.strides)
        if not math.prod(shape) or found.storage is None:
            return Item(begin, strides)
        start, size = archive.storages.get(found.storage.key, (0, 0))
        if archive.is_big_endian:
            raise CheckpointError(f"{where} was written on a machine of big-endian bytes; save it again on another one")
        if found.storage.num_bytes != size:
            raise CheckpointError(
                f"{where}: a tensor lies in {found.storage.num_bytes:,} bytes of '{archive.root}data/{found.storage.key}', "
                f"which has {size:,}; it is damaged or forged"
                ". Copy the checkpoint again, or take an earlier one"
            )
        num_bytes = math.prod(shape) * itemsize
        if num_bytes > max(size, _MAX_EXPANDED_BYTES):
            raise CheckpointError(
                f"{where} has shape {list(shape)}, {num_bytes:,} bytes, made of {size:,} that are stored; save it again, "
                "contiguous"
            )
        return Item(begin + start + found.first * itemsize, strides)


def decode_item(pickled: bytes, where: str) -> PickledTensor:
    """Return the tensor that the pickle of an item describes. CheckpointError for anything else."""
    try:
        value, _ = load_pickled(pickled, lambda _: None)
    except PickleError as error:
        raise CheckpointError(f"{where} cannot be read (torch.load with weights_only=True): {error}") from None
    found = as_tensor(value)
    if found is None:
        raise CheckpointError(
            f"{where} is a {type(value).__name__}, expected a strided tensor; save it as a plain tensor"
        )
    if found.reason in ("negated", "conjugated"):
        raise NotPlainError(
            f"{where} is stored negated or conjugated; save it again after resolve_neg() or resolve_conj()"
        )
    if found.reason:
        raise NotPlainError(f"{where} is no strided tensor ({found.reason}), and cannot be read")
    return found
