"""Find the embedding tables of a model in memory, and what this rank holds of each. No collective of ours.

Tables are modules with the surface of RecIS's HashTable (``ids()`` and ``embeddings()``), ``nn.Embedding`` and
``nn.EmbeddingBag``, what torchrec's embedding collections hold, which its ``state_dict()`` tells, and matrices that modules of
the caller's own hold. A table has the name that it would have in a checkpoint: a hash table its own, any other the path of its
weight within the model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils.parametrize import is_parametrized

from dist_export.checkpoint.managed_collisions import IDENTITIES, SORTED_IDS
from dist_export.checkpoint.model_weights import WRAPPER_ELEMENTS
from dist_export.errors import CheckpointError, ModelError
from dist_export.formats.dtypes import CODE_BY_TORCH
from dist_export.formats.recis import CHILD_BITS, Slice, split_evenly
from dist_export.live.memory import FetchedRows, HeldTensors, LookedUpRows, RowSource, TensorRows
from dist_export.model.sparse_tables import plain_matrices, say_computed
from dist_export.model.unwrap import unwrap
from dist_export.model.user_errors import said

_COLLECTIONS = frozenset({"embedding_bags", "embeddings"})
"""What torchrec's embedding collections call the module that holds their tables."""

_SLICE_SIZE = 65536
"""RecIS's, everywhere in its Python layer."""

_ID_MASK = (1 << CHILD_BITS) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveShard:
    """What one rank holds of one table; travels between the ranks."""

    table: str
    is_hashed: bool
    dtype: int
    """Of the rows; index into ``layout.dtypes.DTYPES``."""
    shape: tuple[int, ...]
    """Of one row of a hash table; (rows, columns) of the whole of any other."""
    rows: int
    """That this rank holds; for a hash table, its ids."""
    first_row: int = 0
    first_column: int = 0
    columns: int = 0
    """What part of a table whose rows go by number this is; also the first number of its rows."""
    slice: Slice | None = None
    """Of a hash table."""

    @property
    def rectangle(self) -> tuple[int, int, int, int]:
        """First row and column, rows and columns; the same on ranks that hold replicas of each other."""
        return self.first_row, self.first_column, self.rows, self.columns


def key_of(shard: LiveShard, slot: str) -> Hashable:
    """Return the key of the row source of a slot of a shard: replicas have the same one."""
    return shard.table, slot, shard.rectangle


class LiveTables:
    """What this rank holds: ``shards``, and a row source by :func:`key_of` for each of their slots."""

    def __init__(self) -> None:
        self.shards: list[LiveShard] = []
        self.sources: dict[Hashable, RowSource] = {}

    def add(self, shard: LiveShard, **sources: RowSource) -> None:
        """Take in a shard with the sources of its slots."""
        if any(other.table == shard.table and other.rectangle == shard.rectangle for other in self.shards):
            raise ModelError(
                f"two tables of the model have the name {shard.table!r}; a package needs one name for each"
            )
        self.shards.append(shard)
        self.sources |= {key_of(shard, slot): source for slot, source in sources.items()}


def find_live_tables(sparse_arch: nn.Module, *, sparse_model_name: str, rank: int, world_size: int) -> LiveTables:
    """Look through the sparse arch. Every rank at once, for a sharded module's ``state_dict()`` may be collective.

    Raises:
        ModelError: a table that cannot be read as it is, with the reason.
    """
    found = LiveTables()
    held = HeldTensors()
    done: set[str] = set()
    hashed: set[int] = set()
    for path, module in sparse_arch.named_modules(remove_duplicate=False):
        if isinstance(module, FullyShardedDataParallel):
            raise ModelError(
                f"{_join(sparse_model_name, path) or 'the sparse arch'} is wrapped by FSDP (version 1), which flattens its "
                "tables into one tensor; wrap the dense arch alone, use fully_shard, or export a checkpoint"
            )
        if unwrap(module) is not module:
            continue
        name = _join(sparse_model_name, _plain(path))
        if any(isinstance(getattr(module, ids, None), torch.Tensor) for ids in (SORTED_IDS, IDENTITIES)):
            raise ModelError(
                f"{name or 'the sparse arch'} maps raw ids to rows (torchrec's managed collisions), which an export from memory "
                "does not read; save a checkpoint and export that, so that serving finds rows by raw id"
            )
        if callable(getattr(module, "ids", None)) and (
            _lookup_of(module) or callable(getattr(module, "embeddings", None))
        ):
            if id(module) not in hashed:  # under another path it is the same table, for its name is its own
                hashed.add(id(module))
                _add_hash_table(found, module, name, held, rank, world_size)
                held.let_go()
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and name not in done:
            done.add(name)
            _refuse_stale(module, name)
            _add_weight(found, f"{name}.weight", module.weight, (module.num_embeddings, module.embedding_dim))
    for name, value in _state_of(sparse_arch):
        full = _join(sparse_model_name, name)
        steps = full.split(".")
        if steps[-1] == "weight" and _COLLECTIONS & {*steps[-3:-2]} and full.removesuffix(".weight") not in done:
            done.add(full.removesuffix(".weight"))
            _add_weight(found, full, value, None)
    for full, matrix in plain_matrices(sparse_arch, sparse_model_name):
        if full not in done and full.removesuffix(".weight") not in done:
            done.add(full)
            _add_weight(found, full, matrix, None)
    return found


def _state_of(sparse_arch: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the names (without wrappers) and values of the state_dict, where a torchrec collection may be in it."""
    if not any(name.split(".")[-1] in _COLLECTIONS for name, _ in sparse_arch.named_modules()) and not any(
        type(module).__module__.startswith("torchrec") for module in sparse_arch.modules()
    ):
        return
    try:
        state = sparse_arch.state_dict()
    except Exception as error:
        raise ModelError(f"the sparse arch's state_dict() fails: {said(error)}") from error
    for name, value in state.items():
        yield _plain(name), value


def _refuse_stale(module: nn.Module, name: str) -> None:
    """Refuse an embedding whose weight is what the last forward has left: an optimizer has changed what it is made of since."""
    computed = say_computed(module)
    if computed and not is_parametrized(module, "weight"):
        raise ModelError(
            f"the weight of {name} is computed by {computed}, so in memory it is that of the last forward and not what training "
            "left. Nothing was written. Call torch.nn.utils.remove_weight_norm(module) before the export, or use "
            "torch.nn.utils.parametrizations"
        )


def _add_weight(found: LiveTables, table: str, weight: Any, expected: tuple[int, int] | None) -> None:
    """Take in what this rank holds of a table whose rows go by number."""
    if not isinstance(weight, torch.Tensor) and not hasattr(weight, "local_shards"):
        raise ModelError(f"table {table!r} is a {type(weight).__name__}, expected a tensor")
    # a ShardedTensor warns of being asked for its size like a tensor
    shape = tuple(weight.metadata().size if hasattr(weight, "local_shards") else weight.shape)
    if len(shape) != 2 or (expected is not None and shape != expected):
        raise ModelError(
            f"table {table!r} has a weight of {list(shape)}"
            + (f", expected {list(expected)}" if expected else ", expected rows and columns")
            + ": its wrapper holds it in another form. Export a checkpoint instead"
        )
    for tensor, (first_row, first_column) in _local_pieces(table, weight):
        if tensor.is_meta or tensor.layout != torch.strided:
            raise ModelError(f"table {table!r} is {tensor.layout} on {tensor.device}, so its rows are not in memory")
        rows, columns = (int(size) for size in tensor.shape)
        shard = LiveShard(
            table=table,
            is_hashed=False,
            dtype=_dtype_of(table, tensor),
            shape=shape,
            rows=rows,
            first_row=first_row,
            first_column=first_column,
            columns=columns,
        )
        if any(other.table == table and other.rectangle == shard.rectangle for other in found.shards):
            continue  # torchrec may name a shard twice
        found.add(shard, embedding=TensorRows(tensor))


def _local_pieces(table: str, weight: Any) -> Iterator[tuple[torch.Tensor, tuple[int, int]]]:
    """Yield the tensors that this rank holds of a weight, each with its first row and column."""
    if hasattr(weight, "local_shards"):  # torchrec's and torch's ShardedTensor
        for shard in weight.local_shards():
            first_row, first_column = shard.metadata.shard_offsets
            yield shard.tensor, (int(first_row), int(first_column))
        return
    if not hasattr(weight, "device_mesh"):
        yield weight, (0, 0)
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement.is_partial() for placement in weight.placements):
        raise ModelError(f"table {table!r} is a DTensor with partial sums, which no rank holds; redistribute it first")
    if weight.device_mesh.get_coordinate() is None:
        return  # this rank has no part in it
    local = weight._local_tensor  # noqa: SLF001 -- to_local() would hand out a view with a history
    if hasattr(local, "local_offsets"):  # torchrec's LocalShardsWrapper: several shards of one rank
        # a rank without a shard still states an offset
        for tensor, offsets in zip(local.local_shards(), local.local_offsets(), strict=False):
            yield tensor, (int(offsets[0]), int(offsets[1]))
        return
    sizes, offsets = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    if tuple(sizes) != tuple(local.shape):
        raise ModelError(
            f"table {table!r} is a DTensor of {list(local.shape)} on this rank, its placements say {list(sizes)}; export a "
            "checkpoint instead"
        )
    if local.numel() or 0 in weight.shape:
        yield local, (int(offsets[0]), int(offsets[1]))


def _add_hash_table(found: LiveTables, module: Any, path: str, held: HeldTensors, rank: int, world_size: int) -> None:
    """Take in a hash table; of a coalesced one each child."""
    try:
        with torch.no_grad():
            given = module.ids()
    except Exception as error:
        raise ModelError(f"the hash table at {path}: ids() fails: {said(error)}") from error
    if not isinstance(given, torch.Tensor) or given.is_floating_point():
        raise ModelError(f"the hash table at {path}: ids() gives {type(given).__name__}, expected a tensor of integers")
    # held for the whole export, 8 bytes a row: a table on a GPU may give its ids in another order the next time
    ids = given.detach().reshape(-1).to("cpu", torch.int64)
    children = list(getattr(module, "children_hashtable", None) or [])
    if not (children and getattr(module, "coalesce", len(children) > 1)):
        children = []
    where = f"the hash table at {path}"
    part = _slice_of(module, where, rank, world_size)
    fetch = getattr(module, "embeddings", None)
    lookup = _lookup_of(module)
    child_of = (ids.numpy().view(np.uint64) >> np.uint64(CHILD_BITS)).astype(np.int64) if children else None
    if child_of is not None and len(ids) and int(child_of.max()) >= len(children):
        raise ModelError(
            f"{where} holds ids of child {int(child_of.max())}, but has {len(children)} children: {children}"
        )
    for child, name in enumerate(children or [_name_of(module, path)]):
        chosen = None if child_of is None else torch.from_numpy(np.flatnonzero(child_of == child))
        own = ids if chosen is None else ids[chosen]
        rows: FetchedRows | LookedUpRows
        if lookup is not None and len(own):
            rows = LookedUpRows(lookup, own, given.device, where)
        elif fetch is not None:
            rows = FetchedRows(fetch, len(ids), chosen, where, held)
        else:
            raise ModelError(f"{where} is empty and has no embeddings(), so the shape of its rows is not known")
        shard = LiveShard(
            table=name,
            is_hashed=True,
            dtype=_dtype_of(name, rows),
            shape=rows.inner_shape,
            rows=len(own),
            first_row=rank,  # a hash table has no replicas: each rank's share is its own
            slice=part,
        )
        found.add(shard, id=TensorRows(own if chosen is None else own & _ID_MASK), embedding=rows)


def _lookup_of(module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return RecIS's own read-only lookup of ids (n,) on the table's device, None where a table has none."""
    lookup = getattr(getattr(module, "_hashtable_impl", None), "embedding_lookup", None)
    if lookup is None:
        return None
    return lambda ids: lookup(ids, True)[1]


def _slice_of(module: Any, where: str, rank: int, world_size: int) -> Slice:
    """Return the slice that a table states, else this rank's by RecIS's rule, which the count of its ids puts to the test."""
    stated = getattr(module, "slice", None)
    stated = getattr(module, "_slice", None) if stated is None or callable(stated) else stated
    if stated is None:
        edges = split_evenly(_SLICE_SIZE, world_size).tolist()
        return Slice(edges[rank], edges[rank + 1], _SLICE_SIZE)
    names = ("slice_begin", "slice_end", "slice_size")
    numbers: Any = [getattr(stated, name, None) for name in names] if hasattr(stated, names[0]) else stated
    try:
        begin, end, size = (int(number) for number in numbers)
    except (TypeError, ValueError):
        raise ModelError(f"{where}: its slice is {stated!r}; expected slice_begin, slice_end and slice_size") from None
    if not 0 <= begin <= end <= size or not size:
        raise ModelError(f"{where}: its slice {begin}:{end} of {size} is not valid")
    return Slice(begin, end, size)


def _dtype_of(table: str, rows: torch.Tensor | FetchedRows | LookedUpRows) -> int:
    name = str(rows.dtype).removeprefix("torch.")
    if name not in CODE_BY_TORCH:
        raise ModelError(f"table {table!r} is of {name}, which no package can hold")
    return CODE_BY_TORCH[name]


def _name_of(module: Any, path: str) -> str:
    for attribute in ("name", "_name"):
        name = getattr(module, attribute, None)
        if isinstance(name, str) and name:
            return name
    raise CheckpointError(f"the hash table at {path} has neither a name nor a _name, so the package cannot name it")


def _join(prefix: str, path: str) -> str:
    return ".".join(element for element in (_plain(prefix), path) if element)


def _plain(path: str) -> str:
    return ".".join(element for element in path.split(".") if element not in WRAPPER_ELEMENTS)
