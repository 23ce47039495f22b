"""A DCP checkpoint beside a DynamicEmb dump: which tables of the one only stand in for tables of the other.

Source: dynamicemb of NVIDIA's recsys-examples. In a model's state_dict each of its tables has an uninitialised value for each
rank of the trainer (``batched_dynamicemb_compute_kernel.py``: a ShardedTensor of shape (world_size, 1), one value a shard;
without a process group a tensor of shape (1, 1)), under the name that an ordinary table would have. Rows are in the dump
alone, whose directories are called ``model.`` and the path of the collection in the model. TorchEasyRec saves both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from dist_export.checkpoint.dcp.classify import DcpTable
from dist_export.checkpoint.dcp.tables import DcpCheckpoint, read_dcp
from dist_export.checkpoint.dynamicemb import DumpedTable, list_dumped
from dist_export.checkpoint.payload import other_tensor
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.checkpoint.tensors.classify import listed, split_collection
from dist_export.errors import CheckpointError
from dist_export.storage.directory import Directory

STAND_IN = "stands for a table of the dump"

_MODEL = "model"
"""What DynamicEmbDump calls the model itself."""
_ALONE = "To export one of the two alone, set format: dcp or format: dynamicemb"


class DcpBeside(NamedTuple):
    """What a DCP checkpoint holds, in view of the dump beside it."""

    checkpoint: DcpCheckpoint
    """Without the tables that are stand-ins."""
    stand_ins: tuple[str, ...]
    """The names of those."""
    notes: tuple[str, ...]
    """What stays behind, for people."""


def read_beside(
    directory: Directory,
    settings: TensorSettings = TensorSettings(),  # noqa: B008 -- immutable
    *,
    with_dump: bool = False,
) -> DcpBeside:
    """Read what a DCP checkpoint says of itself, and leave out what only stands in for a table of a dump beside it.

    Args:
        directory: both of them.
        settings: what they say of the tensors of the DCP checkpoint.
        with_dump: whether the dump is exported with it. A pattern of ``optimizer_slots`` may name slots of the dump then.

    Raises:
        CheckpointError: as ``read_dcp``; with the dump also a table that both hold, and one that the dump lacks.
    """
    found = read_dcp(directory, settings, has_more_slots=with_dump)
    dumped = list_dumped(directory)
    stand_ins = find_stand_ins(found.tables, dumped)
    notes: tuple[str, ...] = ()
    if with_dump:
        check_sides(directory, found.tables, dumped, stand_ins)
    else:
        notes = tuple(_note_behind(directory, found.tables, dumped, stand_ins))
    kept = tuple(table for table in found.tables if table.name not in stand_ins)
    behind = tuple(
        other_tensor(tensor.name, tensor.dtype, tensor.shape, STAND_IN)
        for table in found.tables
        if table.name in stand_ins
        for tensor in (table.weight, *(slot.tensor for slot in table.slots))
    )
    kept_found = replace(found, tables=kept, others=(*found.others, *behind))
    return DcpBeside(kept_found, tuple(sorted(stand_ins)), notes)


def find_stand_ins(tables: Sequence[DcpTable], dumped: Sequence[DumpedTable]) -> frozenset[str]:
    """Return the names of the tables that only stand in for one of the dump. Pure."""
    found = set()
    for table in tables:
        rows, dim = table.weight.shape
        path, name = split_collection(table.name) or ("", "")
        # saved anew in one piece it still has as many values as the trainer had ranks
        is_one = dim == 1 and any(rows in its.world_sizes and _is_same(its, path, name) for its in dumped)
        if is_one or (_looks_like_one(table) and any(its.table == name for its in dumped)):
            found.add(table.name)
    return frozenset(found)


def check_sides(
    directory: Directory, tables: Sequence[DcpTable], dumped: Sequence[DumpedTable], stand_ins: frozenset[str]
) -> None:
    """Refuse what cannot be exported together: a table whose rows are in both, or in neither.

    The same name in two collections of a model is that of two tables. Pure.

    Raises:
        CheckpointError: with both places.
    """
    world_sizes = {size for its in dumped for size in its.world_sizes}
    for table in tables:
        if table.name in stand_ins:
            continue
        path, name = split_collection(table.name) or ("", table.name)
        shape = list(table.weight.shape)
        held = directory.describe(table.weight.chunks[0].file) if table.weight.chunks else directory.url
        for its in dumped:
            if _is_same(its, path, name):
                raise CheckpointError(
                    f"table {name!r} is there twice: as {table.name!r} of shape {shape} in {held}, and in "
                    f"{directory.describe(its.pattern)}; nothing says which one is valid. {_ALONE}, or remove the one "
                    "that is not of this save"
                )
        if _looks_like_one(table) and table.weight.shape[0] in world_sizes:
            raise CheckpointError(
                f"{held}: {table.name!r} has shape {shape}, one value for each rank, so it is the placeholder of a "
                f"DynamicEmb table. But the dump beside it has no {name}_emb_keys.rank_*: the dump did not finish, or only a "
                f"part of it was copied. Copy the whole dump. {_ALONE}"
            )


def _note_behind(
    directory: Directory, tables: Sequence[DcpTable], dumped: Sequence[DumpedTable], stand_ins: frozenset[str]
) -> Iterator[str]:
    if dumped:
        more = f", with {len(stand_ins)} placeholders for its tables" if stand_ins else ""
        yield (
            f"{directory.url} also holds a DynamicEmb dump, which stays behind{more}, for format is dcp; format: auto takes "
            "both"
        )
        return
    doubtful = [table.name for table in tables if _looks_like_one(table) and table.weight.shape[0] > 1]
    if doubtful:
        yield (
            f"tables with one value for each rank: {listed(doubtful)}. They may be placeholders of DynamicEmb tables, but no "
            "dump is beside them. If they are, their rows are not in this package"
        )


def _is_same(dumped: DumpedTable, path: str, name: str) -> bool:
    """Whether a table of the dump is that of this collection and name; by name alone where the dump tells no collection."""
    if dumped.table != name:
        return False
    module = dumped.folder.rpartition("/")[2]
    tells_collection = module == _MODEL or module.startswith(f"{_MODEL}.")
    return not tells_collection or path in (module, module.removeprefix(_MODEL).removeprefix("."))


def _looks_like_one(table: DcpTable) -> bool:
    chunks = table.weight.chunks
    return bool(chunks) and all(chunk.sizes == (1, 1) for chunk in chunks) and table.weight.shape[1] == 1
