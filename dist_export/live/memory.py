"""Read rows out of the tensors of a model that is in memory: in chunks, through pinned buffers where they are on a GPU.

Every tensor is read as the bytes that it would have in a file, row after row, however it lies in memory. Nothing is written
to a tensor, and no copy of table size is made here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from dist_export.errors import CheckpointError, ModelError, TransferError
from dist_export.ids.thread_cache import HeldValues
from dist_export.model.user_errors import said
from dist_export.storage.range_reader import RangeReader

CHUNK_BYTES = 4 << 20
"""Of one copy from a GPU, and of one lookup in a hash table: a call costs little beside it."""


class RowSource(Protocol):
    """The rows of one slot of what one rank holds of a table, as bytes."""

    num_bytes: int

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from byte ``offset`` on. Any thread."""


class TensorRows:
    """A tensor of any device and strides; its bytes are those of its values, row after row."""

    def __init__(self, tensor: torch.Tensor, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        """``tensor``: of one dimension or more; what it holds is read when it is asked for."""
        self._chunk_bytes = chunk_bytes
        self._tensor = tensor.detach()
        self.num_bytes = tensor.numel() * tensor.element_size()

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from byte ``offset`` on. Any thread."""
        if len(view):
            copy_bytes(self._tensor, view, offset, chunk_bytes=self._chunk_bytes)


class FetchedRows:
    """Rows of a hash table that gives all of its embeddings at once: the tensor is asked for when it is read.

    A table may give its own tensor, or a copy; of copies each thread holds one, and threads at one table share it.
    """

    def __init__(
        self,
        fetch: Callable[[], torch.Tensor],
        num_rows: int,
        chosen: torch.Tensor | None,
        where: str,
        held: HeldTensors,
    ) -> None:
        """Look at what ``fetch`` gives once, for the kind of its rows.

        Args:
            fetch: returns (n, *inner), in the order of the table's ids.
            num_rows: of the table's ids.
            chosen: int64: the rows that are read, in this order; None for all.
            where: names the table in messages.
            held: shared by the tables of this rank.
        """
        self._fetch, self._num_rows, self._chosen, self._where, self._held = fetch, num_rows, chosen, where, held
        tensor = self._whole()
        self.inner_shape = tuple(tensor.shape[1:])
        self.dtype = tensor.dtype
        self._row_bytes = row_bytes_of(tensor)
        self.num_bytes = (num_rows if chosen is None else len(chosen)) * self._row_bytes

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from byte ``offset`` on. Any thread."""
        tensor = self._whole()
        if self._chosen is None or not len(view):
            if len(view):
                copy_bytes(tensor, view, offset)
            return
        first, last = offset // self._row_bytes, -(-(offset + len(view)) // self._row_bytes)
        step = max(1, CHUNK_BYTES // self._row_bytes)
        for begin in range(first, last, step):
            end = min(begin + step, last)
            rows = tensor.index_select(0, self._chosen[begin:end].to(tensor.device))
            copy_overlap(rows, begin * self._row_bytes, view, offset)

    def _whole(self) -> torch.Tensor:
        tensor = self._held.get(id(self._fetch), self._ask)
        if tensor.dim() < 2 or tensor.shape[0] != self._num_rows:
            raise CheckpointError(
                f"{self._where}: embeddings() gives {list(tensor.shape)}, but ids() gave {self._num_rows:,} ids; row i "
                "must belong to id i, so a table must not change while it is exported"
            )
        return tensor

    def _ask(self) -> torch.Tensor:
        try:
            tensor = self._fetch()
        except Exception as error:
            raise ModelError(f"{self._where}: embeddings() fails: {said(error)}") from error
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{self._where}: embeddings() gives a {type(tensor).__name__}, expected a tensor")
        return tensor.detach()


class LookedUpRows:
    """Rows of RecIS's hash table, which are looked up by id in chunks: its ``embeddings()`` would copy the whole table."""

    def __init__(
        self,
        lookup: Callable[[torch.Tensor], torch.Tensor],
        ids: torch.Tensor,
        device: torch.device,
        where: str,
        *,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """Look one row up, for the kind of the rows; ``ids`` (int64, on the CPU) has one at least."""
        self._lookup, self._ids, self._device, self._where = lookup, ids, device, where
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()  # whether its lookup may run twice at once is the table's own business
        one = self._rows(0, 1)
        self.inner_shape = tuple(one.shape[1:])
        self.dtype = one.dtype
        self._row_bytes = row_bytes_of(one)
        self.num_bytes = len(ids) * self._row_bytes

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from byte ``offset`` on. Any thread."""
        if not len(view):
            return
        first, last = offset // self._row_bytes, -(-(offset + len(view)) // self._row_bytes)
        step = max(1, self._chunk_bytes // self._row_bytes)
        for begin in range(first, last, step):
            copy_overlap(self._rows(begin, min(begin + step, last)), begin * self._row_bytes, view, offset)

    def _rows(self, begin: int, end: int) -> torch.Tensor:
        try:
            with self._lock, torch.no_grad():
                rows = self._lookup(self._ids[begin:end].to(self._device)).detach()
        except Exception as error:
            raise ModelError(f"{self._where}: a lookup of {end - begin:,} ids fails: {said(error)}") from error
        if rows.dim() < 2 or rows.shape[0] != end - begin:
            raise CheckpointError(f"{self._where}: a lookup of {end - begin:,} ids gives {list(rows.shape)}")
        return rows


class HeldTensors(HeldValues[torch.Tensor]):
    """What hash tables gave of themselves: each thread holds what it asked for last, and no longer."""

    def get(self, key: Hashable, fetch: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the tensor under ``key``, which ``fetch`` gives where no thread has it; without gradients."""
        return super().get(key, torch.no_grad()(fetch))


class MemoryFile(NamedTuple):
    """A run of bytes of a row source, which the rest of the export takes for a file."""

    key: Hashable
    """Of the row source, on the ranks that hold it."""
    offset: int
    num_bytes: int
    name: str


class ModelMemory:
    """The payload of a model's tables on this rank. See :class:`~dist_export.checkpoint.metadata.Memory`."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        owner: np.ndarray,
        files: Sequence[MemoryFile],
        sources: Mapping[Hashable, RowSource],
    ) -> None:
        """Take what is the same on all ranks, and the ``sources`` of this one."""
        self.rank = rank
        self.world_size = world_size
        self.owner = owner
        self._files = files
        self._sources = sources

    def holds(self, number: int) -> bool:
        """Whether this rank can read a file."""
        return self._files[number].key in self._sources

    def open(self, number: int) -> RangeReader:
        """Return a reader of a file that this rank holds."""
        file = self._files[number]
        return MemoryReader(self._sources[file.key], file)


class MemoryReader(RangeReader):
    """Reads a run of a row source at positions, as a file would be read."""

    def __init__(self, source: RowSource, file: MemoryFile) -> None:
        self._source = source
        self._run = file
        self.where = file.name

    def _fill(self, view: memoryview, offset: int) -> None:
        if offset + len(view) > self._run.num_bytes:
            raise TransferError(
                f"{self.where}: {offset + len(view):,} bytes were asked for, there are {self._run.num_bytes:,}"
            )
        try:
            self._source.read_into(view, self._run.offset + offset)
        except RuntimeError as error:  # of torch: a device that is lost, no memory left to pin
            raise TransferError(f"{self.where}: cannot be read at byte {offset:,}: {said(error)}") from error


def row_bytes_of(tensor: torch.Tensor) -> int:
    """Return the bytes of one row of (n, *inner)."""
    return int(np.prod(tensor.shape[1:], dtype=np.int64)) * tensor.element_size()


def copy_overlap(rows: torch.Tensor, begin: int, view: memoryview, offset: int) -> None:
    """Copy what ``rows``, whose first byte is byte ``begin``, shares with ``view``, whose first is byte ``offset``."""
    num_bytes = rows.numel() * rows.element_size()
    first, last = max(begin, offset), min(begin + num_bytes, offset + len(view))
    if first < last:
        copy_bytes(rows, view[first - offset : last - offset], first - begin)


def copy_bytes(tensor: torch.Tensor, view: memoryview, offset: int, *, chunk_bytes: int = CHUNK_BYTES) -> None:
    """Fill ``view`` (at least one byte) with bytes of a tensor's values, row after row, from ``offset`` on."""
    if not tensor.is_contiguous():
        row_bytes = row_bytes_of(tensor)
        first, last = offset // row_bytes, -(-(offset + len(view)) // row_bytes)
        step = max(1, chunk_bytes // row_bytes)
        for begin in range(first, last, step):
            copy_overlap(tensor[begin : min(begin + step, last)].contiguous(), begin * row_bytes, view, offset)
        return
    flat = tensor.reshape(-1).view(torch.uint8)[offset : offset + len(view)]
    out = torch.frombuffer(view, dtype=torch.uint8)
    if not flat.is_cuda:
        out.copy_(flat)  # also from devices that torch alone knows: they have no pinned memory
        return
    _copy_from_gpu(flat, out, _pinned_buffers())


_PINNED = threading.local()


def _copy_from_gpu(flat: torch.Tensor, out: torch.Tensor, buffers: Sequence[torch.Tensor]) -> None:
    """Copy bytes off a GPU through two pinned buffers of one size: while one is emptied, the other is filled."""
    chunk_bytes = len(buffers[0])
    with torch.cuda.device(flat.device):
        stream = torch.cuda.current_stream()  # behind whatever training still has to do
        pending: tuple[torch.Tensor, torch.Tensor, torch.cuda.Event] | None = None
        for turn, first in enumerate(range(0, len(flat), chunk_bytes)):
            piece = flat[first : first + chunk_bytes]
            pinned = buffers[turn % 2][: len(piece)]
            pinned.copy_(piece, non_blocking=True)
            done: torch.cuda.Event = torch.cuda.Event()
            done.record(stream)
            if pending is not None:
                _take(*pending)
            pending = (out[first : first + len(piece)], pinned, done)
        if pending is not None:
            _take(*pending)


def _pinned_buffers() -> list[torch.Tensor]:
    """Return the two buffers of this thread."""
    if getattr(_PINNED, "buffers", None) is None:
        _PINNED.buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    found: list[torch.Tensor] = _PINNED.buffers
    return found


def _take(out: torch.Tensor, pinned: torch.Tensor, done: torch.cuda.Event) -> None:
    done.synchronize()
    out.copy_(pinned)
