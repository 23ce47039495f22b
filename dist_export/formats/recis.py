"""Names, slices and index files of a RecIS directory. Pure: strings and numbers in and out.

Source: RecIS's C++ writer and reader (1.0 to 1.2), and checkpoints that they wrote.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import numpy as np

from dist_export.formats.dtypes import DTYPES
from dist_export.kernels.numpy_id_sweep import find_positions, mix_ids

INDEX = "index"
TENSORKEY = "tensorkey.json"
MERGED = "torch_rank_weights_embs_table_multi_shard.json"
FILTER_STEP = "@filter_global_step"
"""End of the name under which RecIS's filter hook saves its step in ``model.pt``: ``<child>@filter_global_step``, int64, [1]."""
DENSE_STATE = "model.pt"
DENSE_SUFFIX = "^ "
"""End of the key of every dense tensor among the sparse files: a caret and one space."""

_MAX_NAME_BYTES = 200

ID_SLOT = "id"
EMBEDDING_SLOT = "embedding"
HASH_SIZE = 65536
"""The size of the slice space of RecIS's hash tables."""
CHILD_BITS = 52
"""A coalesced table keeps its child's index in the 12 bits above these, but only in memory."""


class Slice(NamedTuple):
    """The ids of one part: those with ``begin <= uint64(id) mod size < end``."""

    begin: int
    end: int
    size: int


def parse_slice(text: str) -> Slice | None:
    """Parse ``BEGIN@END@SIZE``, zero-padded or not. Return None if it is no slice, or an impossible one."""
    numbers = text.split("@")
    if len(numbers) != 3 or not all(number.isascii() and number.isdigit() and len(number) < 32 for number in numbers):
        return None  # the length is limited because Python refuses to convert thousands of digits
    found = Slice(*(int(number) for number in numbers))
    return found if 0 <= found.begin <= found.end <= found.size < 1 << 62 and found.size > 0 else None


def format_slice(part: Slice) -> str:
    """Return the slice as RecIS writes it: begin and end are padded to the width of the size."""
    width = len(str(part.size))
    return f"{part.begin:0{width}}@{part.end:0{width}}@{part.size}"


def split_evenly(size: int, num_shards: int) -> np.ndarray:
    """Return the ``num_shards + 1`` boundaries (int64) of RecIS's ``gen_slice``: the first shards get the remainder."""
    quotient, rest = divmod(size, num_shards)
    shard = np.arange(num_shards + 1, dtype=np.int64)
    boundaries: np.ndarray = shard * quotient + np.minimum(shard, rest)
    return boundaries


def hash_slots(ids: np.ndarray, size: int) -> np.ndarray:
    """Return ``uint64(id) mod size`` (uint64) of int64 ids. It decides which slice owns a row."""
    return find_positions(ids, size)


def mix(ids: np.ndarray) -> np.ndarray:
    """Map int64 ids one to one to uint64, spread over all 64 bits."""
    return mix_ids(ids)


def is_place_in(positions: np.ndarray, part: Slice) -> np.ndarray:
    """Return which values of ``uint64(id) mod size`` (uint64) are in the slice (bool)."""
    inside: np.ndarray = (positions >= np.uint64(part.begin)) & (positions < np.uint64(part.end))
    return inside


def is_in_slice(ids: np.ndarray, part: Slice) -> np.ndarray:
    """Return which int64 ids the slice owns (bool)."""
    return is_place_in(hash_slots(ids, part.size), part)


def key_stem(table: str, slot: str) -> str:
    """Return ``<table>@<slot>`` with its *first* ``@`` replaced by a dot, as RecIS does (also inside a table's name)."""
    return f"{table}@{slot}".replace("@", ".", 1)


def row_key_stem(table: str, slot: str) -> str:
    """Return the key of a row-indexed table, without its part: as in TorchEasyRec, the parameter's name."""
    return table if slot == EMBEDDING_SLOT else f"{table}.{slot}"


def is_plain_name(name: str) -> bool:
    """Return whether ``name`` is a plain file name: no separator, no parent, no control character."""
    return bool(name) and name not in (".", "..") and "/" not in name and "\\" not in name and name.isprintable()


def is_payload_name(name: str) -> bool:
    """Return whether ``name`` can be the name of a data file: plain, and not a name that the small files have.

    A copy keeps the name. With the name ``manifest.json`` it would commit an unfinished package. A name of the maximum
    length leaves no room for the suffix of an unfinished file.
    """
    is_taken = name == INDEX or name.startswith(".") or name.endswith((".json", ".pt"))
    return is_plain_name(name) and not is_taken and len(name.encode()) <= _MAX_NAME_BYTES


def shard_name(shard: int, num_shards: int) -> str:
    """Return the name of one sparse file."""
    return f"model-{shard:06d}-of-{num_shards:06d}.safetensors"


def encode_index(file_by_key: dict[str, str]) -> bytes:
    """Return the content of ``index``. File numbers are contiguous from 0, because RecIS's reader uses them as indices."""
    names = sorted(set(file_by_key.values()))
    number = {name: i for i, name in enumerate(names)}
    blocks = {key: number[file_by_key[key]] for key in sorted(file_by_key)}
    return msgspec.json.encode({"block_index": blocks, "file_index": number})


def encode_sorted(entries: Mapping[str, object]) -> bytes:
    """Return a JSON object with sorted keys and four spaces of indentation, like RecIS's JSON files."""
    return encode_indented({key: entries[key] for key in sorted(entries)})


def encode_indented(document: Mapping[str, object]) -> bytes:
    """Return a JSON object with four spaces of indentation, like RecIS's JSON files."""
    return msgspec.json.format(msgspec.json.encode(document), indent=4)


class MergedEntry(msgspec.Struct, forbid_unknown_fields=True, gc=False, kw_only=True):
    """One entry of the merged manifest, in any style. The fields have the order in which RecIS writes them."""

    data_offsets: tuple[int, int] | msgspec.UnsetType = msgspec.UNSET
    dense: bool
    dimension: int | msgspec.UnsetType = msgspec.UNSET
    dtype: str
    hashmap_key: str | msgspec.UnsetType = msgspec.UNSET
    hashmap_key_dtype: str | msgspec.UnsetType = msgspec.UNSET
    hashmap_value: str | msgspec.UnsetType = msgspec.UNSET
    is_hashmap: bool | msgspec.UnsetType = msgspec.UNSET
    memory: int | msgspec.UnsetType = msgspec.UNSET
    """Bytes. TorchEasyRec's entries have it, RecIS's do not."""
    name: str | msgspec.UnsetType = msgspec.UNSET
    shape: tuple[int, ...]


def embedding_entry(key: str, id_key: str | None, code: int, shape: tuple[int, ...]) -> MergedEntry:
    """Return the merged manifest's entry of one embedding block; ``shape`` is that of this part.

    ``id_key`` is None for a row-indexed table, in the form that TorchEasyRec uses.
    """
    return MergedEntry(
        dense=False,
        dimension=shape[-1],
        dtype=DTYPES[code].torch,
        hashmap_key=msgspec.UNSET if id_key is None else id_key,
        hashmap_key_dtype=msgspec.UNSET if id_key is None else "int64",
        hashmap_value=msgspec.UNSET if id_key is None else key,
        is_hashmap=id_key is not None,
        memory=math.prod(shape) * DTYPES[code].itemsize if id_key is None else msgspec.UNSET,
        name=key,
        shape=shape,
    )


def dense_entry(name: str, torch_dtype: str, shape: tuple[int, ...]) -> MergedEntry:
    """Return the merged manifest's entry of a dense tensor; ``name`` ends with ``^ `` if it is among the sparse files."""
    return MergedEntry(dense=True, dimension=0, dtype=torch_dtype, is_hashmap=False, name=name, shape=shape)
