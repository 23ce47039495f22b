"""What a ``torch.distributed.checkpoint`` directory holds: tables, their optimizer slots, dense parameters.

Source: checkpoints that torchrec and plain torch write. TorchEasyRec keeps two of them, ``model/`` and ``optimizer/``,
below one directory; both are read as one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import xxhash

from dist_export.checkpoint.dcp_extra import Leaf, find_leaves
from dist_export.checkpoint.dcp_items import Item, ItemFinder
from dist_export.checkpoint.dcp_metadata import METADATA, Chunk, TensorMeta, decode_metadata
from dist_export.checkpoint.dcp_tensors import DcpTable, sort_dcp
from dist_export.checkpoint.payload import OtherTensor, count_payload
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.errors import CheckpointError
from dist_export.layout.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.readers import OpenReaders, RangeReader
from dist_export.storage import Directory

_MODEL, _OPTIMIZER = "model", "optimizer"
"""TorchEasyRec's two directories."""
METADATA_FILES = (METADATA, f"{_MODEL}/{METADATA}", f"{_OPTIMIZER}/{METADATA}")
"""All that a DCP checkpoint may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DcpCheckpoint:
    """All that a DCP directory says of itself, from its metadata alone. Chunks name files relative to ``directory``."""

    directory: Directory
    files: dict[str, int]
    """Payload file -> size in bytes."""
    versions: dict[str, str]
    """Payload file -> what changes when its content does."""
    metadata: dict[str, bytes]
    """Metadata file -> digest of its content."""
    tables: tuple[DcpTable, ...]
    dense: tuple[tuple[str, TensorMeta], ...]
    """(name within the model, tensor) of what is neither a table nor optimizer state."""
    other_state: tuple[str, ...]
    """Optimizer state that belongs to no table."""
    objects: tuple[str, ...]
    """What is no tensor, such as a step or a learning rate."""
    extra_states: dict[str, tuple[Leaf, ...]]
    """Name within the model of each module's extra state -> its leaves."""
    num_tensors: int
    num_bytes: int
    """Of all tensors, as dtypes and shapes say."""
    others: tuple[OtherTensor, ...] = ()
    """What is in no table: dense parameters, and optimizer state of no table."""
    aliases: tuple[tuple[str, str], ...] = ()
    """(name, tensor) of tables and dense parameters that the checkpoint holds under another name."""
    notes: tuple[str, ...] = ()
    """On tensors that may be taken for something else than they are, for people."""
    unmatched_slots: frozenset[str] = frozenset()
    """Patterns of ``optimizer_slots`` that match nothing here; only where more tables than these may have the slots."""


def find_metadata(directory: Directory) -> tuple[str, ...]:
    """Return the metadata files that are there: ``.metadata``, or those of TorchEasyRec; empty for no DCP checkpoint."""
    if directory.exists(METADATA):
        return (METADATA,)
    if not directory.exists(f"{_MODEL}/{METADATA}"):
        return ()
    return tuple(f"{part}/{METADATA}" for part in (_MODEL, _OPTIMIZER) if directory.exists(f"{part}/{METADATA}"))


def read_dcp(
    directory: Directory,
    settings: TensorSettings = TensorSettings(),  # noqa: B008 -- immutable
    *,
    has_more_slots: bool = False,
) -> DcpCheckpoint:
    """Read the metadata, check that the checkpoint is complete, and tell tables, state and dense parameters apart.

    Args:
        directory: the checkpoint.
        settings: what they say of its tensors.
        has_more_slots: whether ``optimizer_slots`` may name slots of other tables than these.

    Raises:
        CheckpointError: the metadata is no such file, what it names is not all there, or a pattern matches nothing.
    """
    found = find_metadata(directory)
    if not found:
        raise CheckpointError(f"{directory.url}: no {METADATA} and no {_MODEL}/{METADATA}; this is no DCP checkpoint")
    files: dict[str, int] = {}
    versions: dict[str, str] = {}
    digests: dict[str, bytes] = {}
    tensors: dict[str, TensorMeta] = {}
    objects: list[str] = []
    names: dict[str, str] = {}
    extra: dict[str, list[Leaf]] = {}
    for path in found:
        folder = path.removesuffix(METADATA)
        prefix = "" if folder != f"{_OPTIMIZER}/" else f"{_OPTIMIZER}."

        def size_of(name: str, folder: str = folder) -> int | None:
            try:
                found = directory.stat(folder + name)
            except FileNotFoundError:
                return None
            files[folder + name], versions[folder + name] = found.size, found.version
            return found.size

        where = directory.describe(path)
        try:
            raw = directory.read(path)
            digests[path] = xxhash.xxh3_128_digest(raw)
            metadata = decode_metadata(raw, where=where, file_sizes=size_of)
        except OSError as error:
            raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from None
        paths = [path for path in metadata.paths.values() if len(path) > 2 and "state" not in path[:-1]]
        roots = {path[:-1] for path in paths if "." in str(path[-1])}
        for name, tensor in metadata.tensors.items():
            key = prefix + name
            chunks = tuple(chunk._replace(file=folder + chunk.file) for chunk in tensor.chunks)
            tensors[key] = tensor._replace(name=key, chunks=chunks)
            names[key] = key if prefix else _name_in_model(name, metadata.paths.get(name, ()), roots)
        objects += [prefix + name for name in metadata.objects]
        if not prefix:
            for within, leaf in find_leaves(metadata, folder, tensors):
                extra.setdefault(_name_in_model(".".join(map(str, within)), within, roots), []).append(leaf)
    optimizers = _optimizer_roots([*tensors, *objects])
    if f"{_OPTIMIZER}/{METADATA}" in found:
        optimizers.add((_OPTIMIZER,))  # what lies in a directory of its own is an optimizer's, groups or not
    counted = count_payload((tensor.dtype, tensor.shape) for tensor in tensors.values())
    kinds = sort_dcp(directory, tensors, names, optimizers, settings, has_more_slots=has_more_slots)
    return DcpCheckpoint(
        directory=directory,
        files=dict(sorted(files.items())),
        versions=versions,
        metadata=digests,
        objects=tuple(objects),
        extra_states={name: tuple(leaves) for name, leaves in extra.items()},
        num_tensors=counted[0],
        num_bytes=counted[1],
        **kinds._asdict(),
    )


class ChunkFinder:
    """Finds chunks of tensors in the files of one checkpoint."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._items = ItemFinder()

    def locate(self, reader: RangeReader, tensor: TensorMeta, chunk: Chunk) -> Item:
        """Find a chunk of a tensor in ``reader``, its open file.

        Raises:
            CheckpointError: the item is compressed or encrypted, or is not what the metadata says of it.
        """
        where = f"{self._directory.describe(chunk.file)}: {tensor.name!r} at {list(chunk.offsets)}"
        if chunk.is_transformed:
            raise CheckpointError(
                f"{where} is compressed or encrypted (transform_descriptors); save the checkpoint without extensions"
            )
        try:
            return self._items.locate(
                reader, chunk.begin, chunk.num_bytes, shape=chunk.sizes, dtype=tensor.dtype, where=where
            )
        except OSError as error:
            raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from None


def locate_tables(checkpoint: DcpCheckpoint) -> dict[str, int]:
    """Find each chunk of each table in its file; return by table how many chunks do not lie row after row.

    Raises:
        CheckpointError: an item is compressed or encrypted, or is not what the metadata says of it.
    """
    numbers = {name: number for number, name in enumerate(checkpoint.files)}
    order = list(checkpoint.files)
    strided = {table.name: 0 for table in checkpoint.tables}
    finder = ChunkFinder(checkpoint.directory)
    with OpenReaders(lambda number: checkpoint.directory.open_reader(order[number])) as readers:
        for table in checkpoint.tables:
            for chunk in table.weight.chunks:
                item = finder.locate(readers[numbers[chunk.file]], table.weight, chunk)
                itemsize = DTYPES[CODE_BY_TORCH[table.weight.dtype]].itemsize
                strided[table.name] += item.strides != (chunk.sizes[1] * itemsize, itemsize)
    return strided


def _name_in_model(name: str, path: tuple[object, ...], roots: set[tuple[object, ...]]) -> str:
    """Return a tensor's name without the keys that the model's state_dict was saved under.

    ``roots`` are longer paths of keys that a state_dict was saved under, as ``app.model`` of an application's own state:
    the names in one have dots, which keys of nested dicts have not.
    """
    is_below = len(path) == 2 or (len(path) > 2 and path[:-1] in roots)
    return str(path[-1]) if is_below and name == ".".join(map(str, path)) else name


def _optimizer_roots(names: Iterable[str]) -> set[tuple[str, ...]]:
    """Return what stands before ``param_groups``: the roots that optimizers were saved under."""
    roots: set[tuple[str, ...]] = set()
    for name in names:
        steps = name.split(".")
        if "param_groups" in steps:
            roots.add(tuple(steps[: steps.index("param_groups")]))
    return roots
