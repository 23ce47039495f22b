"""What a ``torch.distributed.checkpoint`` directory holds: tables, their optimizer slots, dense parameters.

Source: checkpoints that torchrec and plain torch write. TorchEasyRec keeps two of them, ``model/`` and ``optimizer/``,
below one directory; both are read as one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import xxhash

from dist_export.checkpoint.dcp_extra import Leaf, find_leaves
from dist_export.checkpoint.dcp_items import Item, ItemFinder
from dist_export.checkpoint.dcp_metadata import METADATA, Chunk, TensorMeta, decode_metadata
from dist_export.checkpoint.row_layout import fits_table
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.checkpoint.tensors import is_in_collection, listed
from dist_export.errors import CheckpointError, UnaskedError
from dist_export.layout.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.layout.recis import EMBEDDING_SLOT, ID_SLOT
from dist_export.readers import OpenReaders, RangeReader
from dist_export.storage import Directory

_MODEL, _OPTIMIZER = "model", "optimizer"
"""TorchEasyRec's two directories."""
METADATA_FILES = (METADATA, f"{_MODEL}/{METADATA}", f"{_OPTIMIZER}/{METADATA}")
"""All that a DCP checkpoint may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DcpSlot:
    """Optimizer state of one table."""

    name: str
    tensor: TensorMeta
    fits: bool
    """Whether it has a value for each row of the table: else what was saved is not the whole of it, or is laid out otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DcpTable:
    """One table, whose rows go by number."""

    name: str
    """Within the model."""
    weight: TensorMeta
    """Of shape (rows, dim)."""
    slots: tuple[DcpSlot, ...]
    sharding: str
    """How its rows and columns were shared out, for people."""


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
    found_tables, dense, other, unmatched = _classify(
        directory, tensors, names, optimizers, settings, has_more_slots=has_more_slots
    )
    return DcpCheckpoint(
        directory=directory,
        files=dict(sorted(files.items())),
        versions=versions,
        metadata=digests,
        tables=found_tables,
        dense=dense,
        other_state=other,
        objects=tuple(objects),
        extra_states={name: tuple(leaves) for name, leaves in extra.items()},
        unmatched_slots=unmatched,
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


def describe_sharding(tensor: TensorMeta) -> str:
    """Return how a matrix was shared out over ranks, for people."""
    solid = [chunk for chunk in tensor.chunks if math.prod(chunk.sizes)]
    if len(solid) <= 1:
        return "in one piece"
    full = [all(_spans(chunk, tensor, dim) for chunk in solid) for dim in (0, 1)]
    how = "by rows" if full[1] else "by columns" if full[0] else "by rows and columns"
    return f"{how}, {len(solid)} pieces"


def _classify(
    directory: Directory,
    tensors: dict[str, TensorMeta],
    names: dict[str, str],
    roots: set[tuple[str, ...]],
    settings: TensorSettings,
    *,
    has_more_slots: bool,
) -> tuple[tuple[DcpTable, ...], tuple[tuple[str, TensorMeta], ...], tuple[str, ...], frozenset[str]]:
    """Return ``tables``, ``dense``, ``other_state`` and ``unmatched_slots`` of a :class:`DcpCheckpoint`."""
    tables, optimizer_slots = settings.tables, settings.optimizer_slots
    known = {*tensors, *names.values()}
    state: dict[str, str] = {}
    weights: list[str] = []
    dense: list[str] = []
    unmatched = {("tables", pattern) for pattern in tables} | {("optimizer_slots", p) for p in optimizer_slots}

    def matches(setting: str, patterns: Sequence[str], name: str) -> bool:
        hits = [p for p in patterns if fnmatchcase(name, p) or fnmatchcase(names[name], p)]
        unmatched.difference_update((setting, p) for p in hits)
        return bool(hits)

    for name, tensor in tensors.items():
        tail = _state_tail(name, roots, known)
        is_asked = matches("optimizer_slots", optimizer_slots, name)
        if tail is not None or is_asked:
            state[name] = tail if tail is not None else name.partition(".state.")[2] or name
        elif matches("tables", tables, name):
            if len(tensor.shape) != 2:
                raise CheckpointError(
                    f"{directory.url}: tables names {name!r}, which has shape {list(tensor.shape)}; a table has two "
                    "dimensions"
                )
            weights.append(name)
        else:
            (weights if is_in_collection(name, tensor.shape) else dense).append(name)
    for name in weights:
        if tensors[name].dtype not in CODE_BY_TORCH:
            raise CheckpointError(
                f"{directory.url}: table {name!r} is of {tensors[name].dtype}, which no package can hold"
            )
    final = _unique_names([*weights, *dense], names)
    owner = _Owners({name: final[name] for name in weights}, {n for d in dense for n in (d, final[d])})
    slots: dict[str, list[DcpSlot]] = {name: [] for name in weights}
    other: list[str] = []
    for name, tail in state.items():
        found = owner.find(tail)
        if found is None:
            other.append(name)
            continue
        weight, slot = found
        shape, whole = tensors[name].shape, tensors[weight].shape
        fits = fits_table(shape, whole)
        slots[weight].append(DcpSlot(name=slot, tensor=tensors[name], fits=fits))
        for pattern in optimizer_slots:  # as the plan has them
            if fnmatchcase(slot, pattern) or fnmatchcase(f"{final[weight]}.{slot}", pattern):
                unmatched.discard(("optimizer_slots", pattern))
    elsewhere = frozenset(p for setting, p in unmatched if setting == "optimizer_slots" and has_more_slots)
    unmatched -= {("optimizer_slots", pattern) for pattern in elsewhere}
    if unmatched:
        setting, pattern = min(unmatched)
        matrices = [names[name] for name in dense if len(tensors[name].shape) == 2]
        raise UnaskedError(
            f"{directory.url}: {setting}: the pattern {pattern!r} matches no tensor; its matrices besides tables: "
            f"{listed(matrices)}"
        )
    found_tables = tuple(
        DcpTable(
            name=final[name],
            weight=tensors[name],
            slots=_name_once(slots[name]),
            sharding=describe_sharding(tensors[name]),
        )
        for name in sorted(weights, key=final.__getitem__)
    )
    return found_tables, tuple((final[name], tensors[name]) for name in dense), tuple(other), elsewhere


def _optimizer_roots(names: Iterable[str]) -> set[tuple[str, ...]]:
    """Return what stands before ``param_groups``: the roots that optimizers were saved under."""
    roots: set[tuple[str, ...]] = set()
    for name in names:
        steps = name.split(".")
        if "param_groups" in steps:
            roots.add(tuple(steps[: steps.index("param_groups")]))
    return roots


def _state_tail(name: str, roots: set[tuple[str, ...]], known: set[str]) -> str | None:
    """Return what stands behind ``state``, for optimizer state; None for anything else.

    It is optimizer state under a root that also has ``param_groups``, and where the name of another tensor stands behind
    ``state``: torchrec's fused optimizers have groups, but nothing in them that would be saved.
    """
    steps = name.split(".")
    for place, step in enumerate(steps[:-1]):
        behind = steps[place + 1 :]
        if step == "state" and (
            tuple(steps[:place]) in roots or any(".".join(behind[:n]) in known for n in range(1, len(behind)))
        ):
            return ".".join(behind)
    return None


class _Owners:
    """Finds the table that optimizer state belongs to: its name is that of the table, or ends it, then the slot's."""

    def __init__(self, weights: dict[str, str], dense: set[str]) -> None:
        self._dense = dense
        self._weights: dict[str, set[str]] = {}
        for name, within in weights.items():
            for spelling in (name, within):
                steps = spelling.split(".")
                for first in range(max(1, len(steps) - 1)):
                    self._weights.setdefault(".".join(steps[first:]), set()).add(name)

    def find(self, tail: str) -> tuple[str, str] | None:
        """Return the weight and the slot's name; None where no table, or none alone, has the name."""
        steps = tail.split(".")
        for length in range(len(steps) - 1, 0, -1):
            name = ".".join(steps[:length])
            found = self._weights.get(name, set())
            if name in self._dense:
                return None
            if len(found) == 1:
                weight = next(iter(found))
                slot = steps[length:]
                table = weight.split(".")[-2:-1]  # torchrec names the table once more
                return weight, ".".join(slot[1:] if len(slot) > 1 and slot[:1] == table else slot)
        return None


def _unique_names(kept: list[str], names: dict[str, str]) -> dict[str, str]:
    """Return the names within the model; the full ones where two models in one checkpoint have the same."""
    found = {name: names[name] for name in kept}
    return found if len(set(found.values())) == len(found) else {name: name for name in kept}


def _name_once(slots: list[DcpSlot]) -> tuple[DcpSlot, ...]:
    """Order a table's slots by name; of those whose name another one has, or stands for something else, take the tensor's."""
    counts = Counter([slot.name for slot in slots] + [ID_SLOT, EMBEDDING_SLOT])
    once = [slot if counts[slot.name] == 1 else replace(slot, name=slot.tensor.name) for slot in slots]
    return tuple(sorted(once, key=lambda slot: slot.name))


def _spans(chunk: Chunk, tensor: TensorMeta, dim: int) -> bool:
    return chunk.sizes[dim] == tensor.shape[dim]
