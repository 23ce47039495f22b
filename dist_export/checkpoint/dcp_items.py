"""Where a tensor's elements lie in an item of a ``.distcp`` file, which is a ``torch.save`` zip. Reads no payload.

The item's own pickle says so: its strides and where in its storage it begins; the zip's directory says where the storage
is. A guess from the shape would give wrong values for a tensor that was saved transposed.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from typing import IO, Any, NamedTuple, cast

from dist_export.checkpoint.state_archive import check_state_archive, say_refusal
from dist_export.errors import CheckpointError
from dist_export.layout.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.readers import RangeReader

_END_BYTES = 4096
"""What a zip says of itself lies in its first and its last bytes: two reads are enough, which counts on object stores."""


_MAX_REPEATED_BYTES = 1 << 30
"""An expanded tensor repeats what its item holds, up to this size; more is no parameter but a trap."""

_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class Item(NamedTuple):
    """A tensor within a file."""

    offset: int
    """Absolute position of its first element in the file, in bytes."""
    strides: tuple[int, ...]
    """In bytes."""


class _Layout(NamedTuple):
    """A tensor within its storage, as a pickle says."""

    shape: tuple[int, ...]
    dtype: str
    """As ``str`` of a torch dtype."""
    strides: tuple[int, ...]
    first: int
    """Where the first element begins, in bytes."""
    end: int
    """Behind the last element, in bytes."""
    itemsize: int


class _View(io.RawIOBase):
    """A range of a file, as a file. Its ends are read once, for that is where a zip says what it holds."""

    def __init__(self, reader: RangeReader, begin: int, num_bytes: int) -> None:
        self._reader = reader
        self._begin = begin
        self._size = num_bytes
        self._position = 0
        self._ends: dict[int, memoryview] = {}

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
        if not count:
            return 0
        for begin in (0, max(0, self._size - _END_BYTES)):
            at = self._position - begin
            if 0 <= at < _END_BYTES:  # what is asked for beyond it is asked for again
                end = self._end(begin)[at : at + count]
                view[: len(end)] = end
                self._position += len(end)
                return len(end)
        self._reader.read_into(view[:count], self._begin + self._position)
        self._position += count
        return count

    def _end(self, begin: int) -> memoryview:
        if begin not in self._ends:
            self._ends[begin] = memoryview(bytearray(min(_END_BYTES, self._size - begin)))
            self._reader.read_into(self._ends[begin], self._begin + begin)
        return self._ends[begin]


def open_range(reader: RangeReader, begin: int, num_bytes: int) -> IO[bytes]:
    """Return a range of an open file as a file."""
    return cast("IO[bytes]", io.BufferedReader(_View(reader, begin, num_bytes), _END_BYTES))


class ItemFinder:
    """Finds tensors in items. Items of one shape have one pickle, which is looked at once."""

    def __init__(self) -> None:
        self._layouts: dict[bytes, _Layout] = {}

    def locate(
        self, reader: RangeReader, begin: int, num_bytes: int, *, shape: tuple[int, ...], dtype: str, where: str
    ) -> Item:
        """Find the tensor in the item at ``begin``, of ``num_bytes`` bytes, of an open file.

        Raises:
            CheckpointError: it is no ``torch.save`` of one tensor, or not of this shape and torch dtype.
        """
        file = open_range(reader, begin, num_bytes)
        archive = check_state_archive(file, where=where)
        found = self._layouts.get(archive.pickled)
        if found is None:
            found = _decode_plain(archive.pickled) or _ask_torch(file, where)
            self._layouts[archive.pickled] = found
        if found.shape != shape or found.dtype != f"torch.{dtype}":
            raise CheckpointError(
                f"{where} is {found.dtype} {list(found.shape)}, but .metadata says torch.{dtype} {list(shape)}"
            )
        if not math.prod(shape):
            return Item(begin, found.strides)
        if len(archive.storages) != 1:
            raise CheckpointError(f"{where} holds {len(archive.storages)} storages, a tensor has one; it is damaged")
        ((start, size),) = archive.storages
        if archive.is_big_endian:
            raise CheckpointError(f"{where} was written on a machine of big-endian bytes; save it again on another one")
        if found.end > size:
            raise CheckpointError(f"{where} reaches beyond the {size:,} bytes that are stored of it")
        num_bytes = math.prod(shape) * found.itemsize
        if num_bytes > max(size, _MAX_REPEATED_BYTES):
            raise CheckpointError(
                f"{where} has shape {list(shape)}, {num_bytes:,} bytes, made of {size:,} that are stored; save it again, "
                "contiguous"
            )
        return Item(begin + start + found.first, found.strides)


def _decode_plain(pickled: bytes) -> _Layout | None:
    """Return what the pickle of a plain tensor says; None for anything else, which is torch's to judge. Runs no code of it.

    Torch's own way costs the import of its compiler.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return _Rebuilt
            if (module, name) == ("collections", "OrderedDict"):
                return dict
            if module == "torch" and name in _STORAGE_DTYPES:
                return name
            raise pickle.UnpicklingError(name)

        def persistent_load(self, pid: Any) -> Any:
            return pid

    try:
        found = Unpickler(io.BytesIO(pickled)).load()
        (_, storage, _, _, _), first, shape, strides, _, _ = found.arguments
        numbers = [first, *shape, *strides]
        if len(shape) != len(strides) or not all(type(number) is int and number >= 0 for number in numbers):
            return None
        dtype = DTYPES[CODE_BY_TORCH[_STORAGE_DTYPES[storage]]]
    except Exception:  # noqa: BLE001 -- a damaged pickle can raise anything; torch finds words for it
        return None
    last = first + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    itemsize = dtype.itemsize
    return _Layout(
        shape=tuple(shape),
        dtype=f"torch.{dtype.torch}",
        strides=tuple(stride * itemsize for stride in strides),
        first=first * itemsize,
        end=(last + 1) * itemsize,
        itemsize=itemsize,
    )


class _Rebuilt:
    """Stands for the call that puts a tensor together."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


def _ask_torch(file: IO[bytes], where: str) -> _Layout:
    """Let torch say of what shape the tensor in an item is; what it holds is not read."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    file.seek(0)
    try:
        with warnings.catch_warnings(), FakeTensorMode():
            warnings.simplefilter("ignore")
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 -- a damaged pickle can make torch's reader raise anything
        raise CheckpointError(
            f"{where} cannot be read (torch.load with weights_only=True): {say_refusal(error)}"
        ) from None
    if not isinstance(found, torch.Tensor) or found.layout != torch.strided:
        what = f"{found.layout} tensor" if isinstance(found, torch.Tensor) else type(found).__name__
        raise CheckpointError(f"{where} is a {what}, expected a strided tensor")
    if found.is_conj() or found.is_neg():
        raise CheckpointError(f"{where} is stored negated or conjugated; save it again as it is meant")
    itemsize = found.element_size()
    first = int(found.storage_offset())
    last = first + sum((size - 1) * stride for size, stride in zip(found.shape, found.stride(), strict=True))
    return _Layout(
        shape=tuple(found.shape),
        dtype=str(found.dtype),
        strides=tuple(int(stride) * itemsize for stride in found.stride()),
        first=first * itemsize,
        end=(last + 1) * itemsize,
        itemsize=itemsize,
    )
