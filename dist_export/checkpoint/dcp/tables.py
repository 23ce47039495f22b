"""What a ``torch.distributed.checkpoint`` directory holds: tables, their optimizer slots, dense parameters.

Source: checkpoints that torchrec and plain torch write. TorchEasyRec keeps two of them, ``model/`` and ``optimizer/``,
below one directory; both are read as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from dist_export.checkpoint.dcp.classify import (
    DcpTable,
    list_large,
    note_large,
    optimizer_roots,
    say_objects,
    sort_dcp,
    state_tail,
)
from dist_export.checkpoint.dcp.extra_state import Leaf, find_leaves
from dist_export.checkpoint.dcp.metadata import Chunk, TensorMeta, decode_metadata
from dist_export.checkpoint.dcp_files import METADATA, MODEL, OPTIMIZER, find_metadata
from dist_export.checkpoint.payload import OtherTensor, count_payload
from dist_export.checkpoint.state_keys import Member
from dist_export.checkpoint.state_roots import choose_state
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.checkpoint.tensors.classify import PatternMatches, Skipped
from dist_export.checkpoint.torch_items import Item, ItemFinder
from dist_export.errors import CheckpointError, UnaskedError
from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.storage.directory import Directory, FileStat
from dist_export.storage.range_reader import OpenReaders, RangeReader


@dataclass(frozen=True, slots=True, kw_only=True)
class DcpCheckpoint:
    """All that a DCP directory says of itself, from its metadata alone. Chunks name files relative to ``directory``."""

    directory: Directory
    files: dict[str, int]
    """Payload file -> size in bytes."""
    stats: dict[str, FileStat]
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
    """What is in no table: dense parameters, optimizer state of no table, and what is not read."""
    aliases: tuple[tuple[str, str], ...] = ()
    """(name, tensor) of tables and dense parameters that the checkpoint holds under another name."""
    skipped: tuple[Skipped, ...] = ()
    """What would be dense, and cannot be read."""
    left_out: tuple[Skipped, ...] = ()
    """Tensors of other states than the model's."""
    several: str = ""
    """The states that the checkpoint holds, for errors; empty where it holds one."""
    notes: tuple[str, ...] = ()
    """What was chosen, and what is skipped, each a sentence."""
    unmatched_slots: frozenset[str] = frozenset()
    """Patterns of ``optimizer_slots`` that match nothing here; only where more tables than these may have the slots."""


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
    found = _read_all_metadata(directory)
    tensors, extra = found.tensors, found.extra_states
    optimizers = optimizer_roots([*tensors, *found.objects])
    if f"{OPTIMIZER}/{METADATA}" in found.digests:
        optimizers.add((OPTIMIZER,))  # what lies in a directory of its own is an optimizer's, groups or not
    members = [Member(name, found.paths[name] or (name,), tensor.shape) for name, tensor in tensors.items()]
    members += [Member(name, path, ()) for path in extra if (name := ".".join(path)) not in tensors]
    patterns = PatternMatches(settings)

    def find_optimizer(spellings: Mapping[str, set[str]]) -> set[str]:
        known = {spelling for its in spellings.values() for spelling in its}
        is_asked = {name: patterns.match("optimizer_slots", *its) for name, its in spellings.items()}
        return {name for name in spellings if is_asked[name] or state_tail(name, optimizers, known) is not None}

    objects = say_objects(found.objects)
    if objects and not tensors and not has_more_slots:
        raise UnaskedError(f"{directory.url}: this DCP checkpoint has no tensor{objects}")
    state = choose_state(members, settings, where=directory.url, find_optimizer=find_optimizer)
    kinds = sort_dcp(
        directory.url, tensors, state, optimizers, settings, patterns, objects=objects, has_more_slots=has_more_slots
    )
    counted = count_payload((tensor.dtype, tensor.shape) for tensor in tensors.values())
    large = list_large(found.objects, {leaf.key for leaves in extra.values() for leaf in leaves})
    kinds = kinds._replace(others=(*kinds.others, *large), notes=(*kinds.notes, *note_large(large, directory.url)))
    return DcpCheckpoint(
        directory=directory,
        files=dict(sorted(found.files.items())),
        stats=found.stats,
        several=state.several,
        metadata=found.digests,
        objects=tuple(found.objects),
        extra_states={
            state.names[name]: tuple(leaves)
            for path, leaves in extra.items()
            if (name := ".".join(path)) in state.names
        },
        num_tensors=counted[0] + len(large),
        num_bytes=counted[1] + sum(its.num_bytes for its in large),
        **kinds._asdict(),
    )


class _AllMetadata(NamedTuple):
    """What the metadata files say together; names are full ones."""

    digests: dict[str, bytes]
    files: dict[str, int]
    stats: dict[str, FileStat]
    tensors: dict[str, TensorMeta]
    paths: dict[str, tuple[str, ...]]
    """Of each tensor, the keys that lead to it; none where they are not told."""
    objects: dict[str, int]
    """Name -> size in bytes of what is no tensor."""
    extra_states: dict[tuple[str, ...], list[Leaf]]
    """Keys that lead to the extra state of a module -> its leaves."""


def _read_all_metadata(directory: Directory) -> _AllMetadata:
    paths = find_metadata(directory)
    if not paths:
        raise CheckpointError(
            f"{directory.url}: no {METADATA} and no {MODEL}/{METADATA}; this is no DCP checkpoint"
            "; give the directory that holds it as ckpt_dir"
        )
    found = _AllMetadata({}, {}, {}, {}, {}, {}, {})
    for path in paths:
        folder = path.removesuffix(METADATA)
        prefix = "" if folder != f"{OPTIMIZER}/" else f"{OPTIMIZER}."

        def size_of(name: str, folder: str = folder) -> int | None:
            try:
                stat = directory.stat(folder + name)
            except FileNotFoundError:
                return None
            found.files[folder + name], found.stats[folder + name] = stat.size, stat
            return stat.size

        where = directory.describe(path)
        try:
            raw = directory.read(path)
            found.digests[path] = xxhash.xxh3_128_digest(raw)
            metadata = decode_metadata(raw, where=where, file_sizes=size_of)
        except OSError as error:
            raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from None
        for name, tensor in metadata.tensors.items():
            key = prefix + name
            chunks = tuple(chunk._replace(file=folder + chunk.file) for chunk in tensor.chunks)
            found.tensors[key] = tensor._replace(name=key, chunks=chunks)
            found.paths[key] = () if prefix else tuple(map(str, metadata.paths.get(name, ())))
        found.objects.update((prefix + name, its.num_bytes) for name, its in metadata.objects.items())
        if not prefix:
            for within, leaf in find_leaves(metadata, folder, found.tensors):
                found.extra_states.setdefault(tuple(map(str, within)), []).append(leaf)
    return found


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
