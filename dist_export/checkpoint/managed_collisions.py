"""torchrec's managed-collision tables: which raw id has which row, so that they become hash tables keyed by raw id.

Source: ``mc_modules.py`` and ``hash_mc_modules.py`` of torchrec 1.8. A module ``..._managed_collision_modules.<table>`` beside an
embedding collection maps raw ids to rows. MCH: ``_mch_sorted_raw_ids`` and ``_mch_remapped_ids_mapping``, both (rows,) int64:
entry i says that this raw id has that row of the whole table; the largest int64 is no id. Both are sorted by raw id within each
shard of the trainer, and a shard's entries name its own rows. An id that is not there gets the last row of its shard. Where
shards begin is in ``_output_segments_tensor``, (1025,) int64: the first row of each, the number of rows, then -1. HashZCH:
``_hash_zch_identities``, (rows, 1) int64: entry i is the raw id of row i; -1 is no id. Counts, ages and other buffers of these
modules are for training alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dist_export.checkpoint.indexed_tables import TensorTable
from dist_export.checkpoint.metadata import SourceFile, TableMeta
from dist_export.checkpoint.raw_ids import CollisionState, StoredTensor, read_numbers
from dist_export.errors import CheckpointError
from dist_export.humanize import few
from dist_export.storage.directory import Directory
from dist_export.storage.range_reader import OpenReaders

SORTED_IDS = "_mch_sorted_raw_ids"
MAPPING = "_mch_remapped_ids_mapping"
IDENTITIES = "_hash_zch_identities"
SEGMENTS = "_output_segments_tensor"
MODULES = "_managed_collision_modules"
COLLECTION = "_managed_collision_collection"
EMBEDDINGS = "_embedding_module"
MCH_EMPTY = (1 << 63) - 1
ZCH_EMPTY = -1


class CollisionNames(NamedTuple):
    """The tensors that say which raw id has which row of one table."""

    ids: str
    mapping: str | None
    """None for HashZCH."""
    segments: str | None = None
    """Where the shards of MCH begin; None for HashZCH, and where the checkpoint does not say."""


def find_collisions(
    tables: Mapping[str, tuple[int, ...]], tensors: Mapping[str, tuple[str, tuple[int, ...]]], *, where: str
) -> dict[str, CollisionNames]:
    """Return for each table that has a managed-collision module the tensors of that. Pure.

    Args:
        tables: name of each table -> shape.
        tensors: name of every other tensor of the model -> dtype, shape.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: a module is there without the tensors that map ids, or without its table; or they do not fit each other.
    """
    owners: dict[str, dict[str, str]] = {}
    for name in tensors:
        owner, _, buffer = name.rpartition(".")
        if buffer in (SORTED_IDS, MAPPING, IDENTITIES):
            owners.setdefault(owner, {})[buffer] = name
    _refuse_without_map(tables, tensors, owners, where=where)
    found: dict[str, CollisionNames] = {}
    for owner, buffers in owners.items():
        table = find_table(owner, tables)
        if table is None:
            raise CheckpointError(
                f"{where}: {owner!r} maps raw ids to the rows of a table, but the checkpoint holds no weight of a table "
                f"{owner.rpartition('.')[2]!r}; its tables: {few(sorted(tables)) or 'none'}. Save the whole model"
            )
        if IDENTITIES not in buffers and len(buffers) < 2:
            missing = MAPPING if SORTED_IDS in buffers else SORTED_IDS
            raise CheckpointError(
                f"{where}: {owner}.{missing} is missing. Without it nobody knows which raw id has which row of table "
                f"{table!r}. Save the whole model"
            )
        ids = buffers.get(IDENTITIES) or buffers[SORTED_IDS]
        if table in found:
            raise CheckpointError(
                f"{where}: {found[table].ids!r} and {ids!r} both belong to the table {table!r}"
                ". Copy the checkpoint again, or take an earlier one"
            )
        for name in buffers.values():
            _check_tensor(name, *tensors[name], rows=tables[table][0], where=where)
        is_mch, segments = IDENTITIES not in buffers, f"{owner}.{SEGMENTS}" if owner else SEGMENTS
        found[table] = CollisionNames(
            ids, buffers[MAPPING] if is_mch else None, segments if is_mch and segments in tensors else None
        )
    return found


def _refuse_without_map(
    tables: Collection[str], tensors: Collection[str], mapped: Collection[str], *, where: str
) -> None:
    """Refuse a module of a table of which the checkpoint has counts or segments, and nothing that maps ids."""
    for name in tensors:
        owner, _, buffer = name.rpartition(".")
        is_of_module = buffer == SEGMENTS or buffer.startswith(("_mch_", "_hash_zch_"))
        if owner in mapped or not is_of_module or not owner.rpartition(".")[0].endswith(MODULES):
            continue
        table = find_table(owner, tables)
        if table is not None:
            missing = f"{owner}.{IDENTITIES}" if buffer.startswith("_hash_") else f"{owner}.{SORTED_IDS} and {MAPPING}"
            raise CheckpointError(
                f"{where}: {name} is there, and {missing} {'is' if buffer.startswith('_hash_') else 'are'} missing. Without "
                f"that nobody knows which raw id has which row of table {table!r}. Save the whole model"
            )


def read_state(names: CollisionNames | None, tensors: Mapping[str, StoredTensor]) -> CollisionState | None:
    """Return the located tensors of ``names``; None for a table without a managed-collision module. Pure."""
    if names is None:
        return None
    if names.mapping is None:
        return CollisionState(tensors[names.ids], None, ZCH_EMPTY)
    segments = None if names.segments is None else tensors[names.segments]
    return CollisionState(tensors[names.ids], tensors[names.mapping], MCH_EMPTY, segments)


class StoredCollision:
    """See :class:`~dist_export.checkpoint.metadata.RawIdSource`."""

    def __init__(
        self, directory: Directory, files: Sequence[SourceFile], state: CollisionState, names: CollisionNames
    ) -> None:
        """Read nothing yet."""
        self.names = tuple(name for name in (names.ids, names.mapping) if name is not None)
        self.empty = state.empty
        self._directory = directory
        self._files = files
        self._state = state

    def load(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the raw ids and the rows that they have; None where entry i is of row i."""
        state = self._state
        with OpenReaders(lambda number: self._directory.open_reader(self._files[number].name), max_open=4) as readers:
            ids, *mapping = (
                read_numbers(readers.__getitem__, tensor, 0, tensor.shape[0])
                for tensor in (state.ids, state.mapping)
                if tensor is not None
            )
        return ids, mapping[0] if mapping else None


def attach_collisions(
    tables: Sequence[TableMeta],
    named: Sequence[TensorTable],
    collisions: Mapping[str, CollisionNames],
    directory: Directory,
    files: Sequence[SourceFile],
) -> tuple[TableMeta, ...]:
    """Return the tables, those with a managed-collision module with what it knows of raw ids. Pure."""
    found = []
    for meta, table in zip(tables, named, strict=True):
        state = table.collision
        source = None if state is None else StoredCollision(directory, files, state, collisions[table.name])
        found.append(replace(meta, raw_ids=source))
    return tuple(found)


def note_collisions(collisions: Mapping[str, CollisionNames], tables: Collection[str]) -> list[str]:
    """Return what is to be told of tables that become hash tables keyed by raw id, and of those that lack what maps ids. Pure.

    ``tables``: the names of all tables of the checkpoint.
    """
    mch = sorted(table for table, names in collisions.items() if names.mapping is not None)
    zch = sorted(table for table, names in collisions.items() if names.mapping is None)
    notes = []
    if mch:
        notes.append(
            f"{few(mch)}: written as hash tables keyed by raw id, as the managed-collision modules map them; rows without "
            "an id stay behind. An id that has no row gets default_row, which is the trained last row unless it is set"
        )
    if zch:
        notes.append(
            f"{few(zch)}: written as hash tables keyed by raw id, by _hash_zch_identities; rows without an id stay behind. In "
            "training an id without a row of its own may fall back to the row of another id; serving gives it default_row "
            "or zeros, so scores of such ids change"
        )
    if unmapped := sorted(name for name in tables if name not in collisions and EMBEDDINGS in name.split(".")):
        notes.append(
            f"{few(unmapped)}: the name is that of a collection with managed-collision modules, and the checkpoint has nothing "
            "that maps raw ids to rows. So these rows are found by row number, not by raw id. Give the state of the whole model, "
            "with its buffers, for a table that is keyed by raw id"
        )
    return notes


def find_table(owner: str, tables: Collection[str]) -> str | None:
    """Return the table of a module's path: of the same name, and where there are several beside the same collection."""
    path, _, name = owner.rpartition(".")
    root = path.removesuffix(f".{MODULES}").removesuffix(MODULES)
    root = root.removesuffix(f".{COLLECTION}").removesuffix(COLLECTION)
    called = [table for table in tables if table.removesuffix(".weight").rpartition(".")[2] == name]
    beside = [table for table in called if not root or table.startswith(f"{root}.")]
    found = beside or called
    return found[0] if len(found) == 1 else None


def _check_tensor(name: str, dtype: str, shape: tuple[int, ...], *, rows: int, where: str) -> None:
    expected: Sequence[tuple[int, ...]] = ((rows,), (rows, 1)) if name.endswith(IDENTITIES) else ((rows,),)
    if dtype != "int64" or shape not in expected:
        raise CheckpointError(
            f"{where}: {name!r} is {dtype} {list(shape)}, but its table has {rows:,} rows; expected int64 {list(expected[-1])}"
            ". Copy the checkpoint again, or take an earlier one"
        )
