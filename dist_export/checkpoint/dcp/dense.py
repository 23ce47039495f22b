"""The dense parameters of a DCP checkpoint: the tensors that are neither tables nor optimizer state, put together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dist_export.checkpoint.dcp.extra_state import Leaf
from dist_export.checkpoint.dcp.metadata import Chunk, TensorMeta
from dist_export.checkpoint.dcp.tables import ChunkFinder, DcpCheckpoint, read_dcp
from dist_export.checkpoint.extra_state import UnreadableError, UntakenState, load_object, rebuild
from dist_export.checkpoint.metadata import SourceFile
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.checkpoint.tensors.classify import Skipped
from dist_export.checkpoint.torch_items import Item, NotPlainError, open_range
from dist_export.errors import CheckpointError, TransferError
from dist_export.formats.dtypes import CODE_BY_TORCH
from dist_export.storage.directory import Directory
from dist_export.storage.range_reader import RangeReader


def _same(value: Any) -> Any:
    return value


class _Parameters(Mapping[str, Any]):
    """Values by name, each read when it is asked for."""

    def __init__(self, readers: Mapping[str, Callable[[], Any]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Any:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


class DcpDense:
    """See :class:`~dist_export.checkpoint.dense.DenseParameters`."""

    def __init__(
        self,
        directory: Directory,
        settings: TensorSettings = TensorSettings(),  # noqa: B008 -- immutable
        *,
        has_more_slots: bool = False,
    ) -> None:
        """Read nothing yet. Arguments as those of :func:`~dist_export.checkpoint.dcp.tables.read_dcp`."""
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

    @property
    def notes(self) -> tuple[str, ...]:
        """What was chosen, and what is skipped."""
        return self._found.notes

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What would be dense, and cannot be read."""
        return self._found.skipped

    @property
    def left_out(self) -> tuple[Skipped, ...]:
        """Tensors of other states than the model's."""
        return self._found.left_out

    def list_files(self) -> tuple[SourceFile, ...]:
        """Return all files of the checkpoint."""
        return tuple(SourceFile.of(name, its) for name, its in self._found.stats.items())

    def load(self) -> Mapping[str, Any]:
        """Return them, each read from all of its chunks when asked for; of what is skipped, why.

        The extra state of modules, which DCP took apart, is among them.
        """
        extra = self._found.extra_states
        leaves = {leaf.key for parts in extra.values() for leaf in parts}
        tensors = {name: tensor for name, tensor in self._found.dense if tensor.name not in leaves}
        skipped = {its.name: UntakenState(f"it is {its.reason}") for its in self._found.skipped}
        readers: dict[str, Callable[[], Any]] = {
            **{name: functools.partial(self._read_known, tensor) for name, tensor in tensors.items()},
            **{name: functools.partial(_same, its) for name, its in skipped.items()},
            **{name: functools.partial(self._rebuild, parts) for name, parts in extra.items()},
        }
        return _Parameters(readers)

    def _read_known(self, tensor: TensorMeta) -> Any:
        """Return a tensor; why not, where torch does not know its dtype or its values are not in its storage."""
        import torch

        if getattr(torch, tensor.dtype, None) is None:
            return UntakenState(f"it is of dtype {tensor.dtype}, which torch {torch.__version__} does not have")
        try:
            return self._read(tensor)
        except NotPlainError as error:
            return UntakenState(str(error))

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
