"""The dense parameters of a DCP checkpoint: the tensors that are neither tables nor optimizer state, put together."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from dist_export.checkpoint.dcp import ChunkFinder, DcpCheckpoint, read_dcp
from dist_export.checkpoint.dcp_extra import Leaf
from dist_export.checkpoint.dcp_items import Item, open_range
from dist_export.checkpoint.dcp_metadata import Chunk, TensorMeta
from dist_export.checkpoint.extra_state import UnreadableError, UntakenState, load_object, rebuild
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.errors import CheckpointError, TransferError
from dist_export.layout.dtypes import CODE_BY_TORCH
from dist_export.readers import RangeReader
from dist_export.storage import Directory


class DcpDense:
    """See :class:`~dist_export.checkpoint.dense_parameters.DenseParameters`."""

    def __init__(
        self,
        directory: Directory,
        settings: TensorSettings = TensorSettings(),  # noqa: B008 -- immutable
        *,
        has_more_slots: bool = False,
    ) -> None:
        """Read nothing yet. Arguments as those of :func:`~dist_export.checkpoint.dcp.read_dcp`."""
        self.where = directory.url
        self._directory = directory
        self._finder = ChunkFinder(directory)
        self._settings = settings
        self._has_more_slots = has_more_slots

    @functools.cached_property
    def _found(self) -> DcpCheckpoint:
        return read_dcp(self._directory, self._settings, has_more_slots=self._has_more_slots)

    def describe(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return what the metadata says of them."""
        return [(name, tensor.dtype, tensor.shape) for name, tensor in self._found.dense]

    def load(self) -> dict[str, Any]:
        """Read them, each from all of its chunks, and the extra state of modules, which DCP took apart."""
        extra = self._found.extra_states
        leaves = {leaf.key for parts in extra.values() for leaf in parts}
        tensors = {name: self._read(tensor) for name, tensor in self._found.dense if tensor.name not in leaves}
        return tensors | {name: self._rebuild(parts) for name, parts in extra.items()}

    def _rebuild(self, leaves: Sequence[Leaf]) -> Any:
        """Return the extra state that these are the leaves of."""
        paths = [leaf.path for leaf in leaves if leaf.path is not None]
        if len(paths) < len(leaves):
            return UntakenState("it was taken apart, and .metadata has no planner_data to put it together by")
        try:
            return rebuild(zip(paths, map(self._read_leaf, leaves), strict=True))
        except (ValueError, UnreadableError) as error:
            return UntakenState(str(error))

    def _read_leaf(self, leaf: Leaf) -> Any:
        if isinstance(leaf.item, TensorMeta):
            if leaf.item.dtype not in CODE_BY_TORCH:
                raise UnreadableError(f"{leaf.key} is of {leaf.item.dtype}")
            return self._read(leaf.item)
        where = f"{self._directory.describe(leaf.item.file)}: {leaf.key!r}"
        if leaf.item.is_transformed:
            raise UnreadableError(f"{leaf.key} is compressed or encrypted")
        try:
            with self._directory.open_reader(leaf.item.file) as reader:
                return load_object(open_range(reader, leaf.item.begin, leaf.item.num_bytes), where=where)
        except OSError as error:
            raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from None

    def _read(self, tensor: TensorMeta) -> Any:
        import torch

        dtype = getattr(torch, tensor.dtype)
        pieces = []
        for chunk in tensor.chunks:
            if not math.prod(chunk.sizes):
                continue
            try:
                with self._directory.open_reader(chunk.file) as reader:
                    item = self._finder.locate(reader, tensor, chunk)
                    found = _read_chunk(reader, item, chunk, dtype)
            except TransferError as error:
                raise CheckpointError(str(error)) from None
            except OSError as error:
                where = self._directory.describe(chunk.file)
                raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from None
            pieces.append((chunk, found))
        whole = torch.empty(tensor.shape, dtype=dtype)  # as large as what was found
        for chunk, found in pieces:
            corner = tuple(slice(o, o + size) for o, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[corner] = found
        return whole


def _read_chunk(reader: RangeReader, item: Item, chunk: Chunk, dtype: Any) -> Any:
    """Return a chunk as a tensor over the bytes from its first element to its last."""
    import torch

    size = sum((n - 1) * stride for n, stride in zip(chunk.sizes, item.strides, strict=True)) + dtype.itemsize
    raw = bytearray(size)
    reader.read_into(memoryview(raw), item.offset)
    strides = tuple(stride // dtype.itemsize for stride in item.strides)
    return torch.frombuffer(raw, dtype=dtype).as_strided(chunk.sizes, strides)
