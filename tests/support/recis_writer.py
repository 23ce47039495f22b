"""Checkpoints in RecIS's format for tests, and an independent judge of exported directories.

Our own code, from the description of the format alone: numpy and json, nothing of dist_export, so that a mistake there
cannot hide behind the same mistake here. Writing is lenient: every knob can break the checkpoint in one place.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

INDEX = "index"
TENSORKEY = "tensorkey.json"
MERGED = "torch_rank_weights_embs_table_multi_shard.json"

_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
}
_NUMPY |= {"U8": "|u1", "BOOL": "|b1", "bool": "|b1"}
_NAMES = {"<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32", "<i2": "I16", "|i1": "I8", "|u1": "U8"}
_NAMES |= {"|b1": "bool"}  # as RecIS's writer does
_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
_TORCH |= {"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "bool": ""}


class Raw(NamedTuple):
    """An array under a dtype name that numpy does not have: ``Raw("BF16", bits)``."""

    dtype: str
    array: np.ndarray


@dataclass
class PartSpec:
    """One shard of a table: ``ids`` (n,) int64 and further slots of n rows; ``slice`` is (begin, end, size)."""

    ids: np.ndarray
    slots: dict[str, Any]
    slice: tuple[int, int, int]
    suffix: str | None = None
    """Ends the header keys; default ``/part_<i>_<n>``."""


class Block(NamedTuple):
    """One block as it is written; what the knobs see. ``internal`` is None for a dense tensor."""

    key: str
    internal: str | None
    dtype: str
    array: np.ndarray


@dataclass
class Files:
    """What is about to be written: a knob may change anything in place."""

    headers: dict[str, dict[str, Any]] = field(default_factory=dict)
    payloads: dict[str, bytes] = field(default_factory=dict)
    index: dict[str, Any] = field(default_factory=dict)
    tensorkey: dict[str, Any] = field(default_factory=dict)
    merged: dict[str, Any] | None = None


def gen_slice(shard: int, num_shards: int, size: int = 65536) -> tuple[int, int, int]:
    """RecIS's rule: the first ``size % num_shards`` shards get one more."""
    quotient, rest = divmod(size, num_shards)
    begin = shard * quotient + min(shard, rest)
    return begin, begin + quotient + (shard < rest), size


def owned_by(ids: np.ndarray, part: tuple[int, int, int]) -> np.ndarray:
    """Whether ``uint64(id) mod size`` lies in the slice; Python integers, so slow and beyond doubt."""
    begin, end, size = part
    return np.array([begin <= (int(i) % (1 << 64)) % size < end for i in ids], bool)


def split_table(ids: np.ndarray, slots: Mapping[str, np.ndarray], num_parts: int, size: int = 65536) -> list[PartSpec]:
    """Shard rows by RecIS's rule, in the order in which they come."""
    places = np.array([(int(i) % (1 << 64)) % size for i in ids], object)
    parts = []
    for shard in range(num_parts):
        part = gen_slice(shard, num_parts, size)
        mine = np.array([part[0] <= place < part[1] for place in places], bool)
        parts.append(PartSpec(ids[mine], {name: rows[mine] for name, rows in slots.items()}, part))
    return parts


def make_rows(
    num_rows: int, dim: int = 4, *, slots: Sequence[str] = (), seed: int = 0, dtype: Any = np.float32
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return unique ids over the whole int64 range, negative ones included, and random rows of each slot."""
    random = np.random.default_rng(seed)
    ids = np.unique(random.integers(-(1 << 63), (1 << 63) - 1, 2 * num_rows + 8, np.int64))
    ids = random.permutation(ids)[:num_rows]
    rows = {name: random.standard_normal((num_rows, dim)).astype(dtype) for name in ("embedding", *slots)}
    return ids, rows


def make_tables(
    rows_by_table: Mapping[str, int],
    num_parts: int,
    *,
    dim: int = 4,
    slots: Sequence[str] = ("sparse_adam_exp_avg", "sparse_adam_exp_avg_sq"),
    size: int = 65536,
    seed: int = 0,
) -> dict[str, list[PartSpec]]:
    """Return random tables, each sharded into ``num_parts`` by RecIS's rule."""
    return {
        name: split_table(*make_rows(rows, dim, slots=slots, seed=seed + i), num_parts, size)
        for i, (name, rows) in enumerate(rows_by_table.items())
    }


def truth_of(tables: Mapping[str, Sequence[PartSpec | None]]) -> dict[str, dict[str, np.ndarray]]:
    """Return what ``read_back`` should find: each table's slots, ``id`` included, with rows sorted by id."""
    truth = {}
    for name, specs in tables.items():
        parts = [part for part in specs if part is not None]
        ids = np.concatenate([part.ids for part in parts])
        order = np.argsort(ids, kind="stable")
        truth[name] = {"id": ids[order]}
        for slot in parts[0].slots:
            truth[name][slot] = np.concatenate([_plain(part.slots[slot])[1] for part in parts])[order]
    return truth


def write_checkpoint(
    directory: str | os.PathLike[str],
    tables: Mapping[str, Sequence[PartSpec | None]],
    *,
    dense: Mapping[str, Any] | None = None,
    files_per_shard: int = 1,
    num_shards: int | None = None,
    manifest: str | None = "new",
    model_state: Mapping[str, Any] | None = None,
    rename: Callable[[str, str], str] | None = None,
    internal_keys: bool = False,
    header_padding: bool = True,
    change: Callable[[Files], object] | None = None,
    omit: Sequence[str] = (),
    extra_files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a checkpoint as RecIS's Saver does: blocks dealt round-robin over the files of a shard.

    Args:
        tables: For each table its parts; the i-th lies on shard i, None where the shard left it out.
        dense: Tensors among the sparse files, on shard 0; arrays, or ``Raw`` for what numpy lacks.
        num_shards: Default: as many as the longest list of parts.
        manifest: ``new`` or ``v1`` style, ``null`` as some versions leave it, None for no file.
        model_state: Written to ``model.pt`` and, in the new style, listed in the manifest.
        rename: (key, internal name) -> header key, for arbitrary keys that only tensorkey.json maps.
        internal_keys: Header keys are internal names, and tensorkey.json is ``{}``.
        change: Gets all contents before they are written, to break them.
        omit: Files that are not written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    num_shards = num_shards or max([len(parts) for parts in tables.values()] + [1])
    files = Files(merged={} if manifest in ("new", "v1") else None)
    index_keys: dict[str, str] = {}
    for shard in range(num_shards):
        blocks = _blocks_of_shard(tables, shard, rename, internal_keys)
        if shard == 0:
            blocks += [_dense_block(name, value) for name, value in (dense or {}).items()]
        for writer in range(files_per_shard):
            mine = blocks[writer::files_per_shard]
            if not mine:
                continue
            number = shard * files_per_shard + writer
            name = f"model-{number:06d}-of-{num_shards * files_per_shard:06d}.safetensors"
            header, position = {}, 0
            for block in mine:
                assert block.key not in header, block.key
                end = position + block.array.nbytes
                header[block.key] = {
                    "dtype": block.dtype,
                    "shape": list(block.array.shape),
                    "data_offsets": [position, end],
                }
                position = end
                index_key = block.key if block.internal or block.key.endswith("^ ") else block.key + "^ "
                index_keys[index_key] = name
                if block.internal and block.internal != block.key:
                    files.tensorkey[block.key] = block.internal
                if files.merged is not None:
                    _list_block(files.merged, index_key, block, header[block.key], manifest == "v1")
            files.headers[name] = header
            files.payloads[name] = b"".join(block.array.tobytes() for block in mine)
    numbers = {name: i for i, name in enumerate(sorted(files.headers))}
    files.index = {
        "block_index": {key: numbers[name] for key, name in sorted(index_keys.items())},
        "file_index": numbers,
    }
    if files.merged is not None:
        files.merged = dict(sorted(files.merged.items()))
        if manifest == "new":
            for name, tensor in (model_state or {}).items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                files.merged[name] = _dense_entry(name, dtype, list(tensor.shape))
    if change is not None:
        change(files)
    contents = {name: _encode(files.headers[name], header_padding) + files.payloads[name] for name in files.headers}
    contents[INDEX] = json.dumps(files.index, separators=(",", ":")).encode()
    contents[TENSORKEY] = json.dumps(dict(sorted(files.tensorkey.items())), indent=4).encode()
    if files.merged is not None or manifest == "null":
        contents[MERGED] = json.dumps(files.merged, indent=4).encode()
    contents |= extra_files or {}
    for name, content in contents.items():
        if name not in omit:
            (directory / name).write_bytes(content)
    if model_state is not None:
        import torch

        torch.save(dict(model_state), directory / "model.pt")
    return directory


def header_key(table: str, slot: str, suffix: str) -> str:
    """Return the key of a block: the first ``@`` of ``<table>@<slot>`` replaced, then the suffix."""
    return f"{table}@{slot}".replace("@", ".", 1) + suffix


def internal_name(table: str, slot: str, part: tuple[int, int, int]) -> str:
    """Return ``<table>@<slot>^BEGIN@END@SIZE``, padded as RecIS pads."""
    width = len(str(part[2]))
    return f"{table}@{slot}^{part[0]:0{width}d}@{part[1]:0{width}d}@{part[2]}"


def _blocks_of_shard(
    tables: Mapping[str, Sequence[PartSpec | None]],
    shard: int,
    rename: Callable[[str, str], str] | None,
    internal_keys: bool,
) -> list[Block]:
    blocks = []
    for table, parts in tables.items():
        part = parts[shard] if shard < len(parts) else None
        if part is None:
            continue
        suffix = f"/part_{shard}_{len(parts)}" if part.suffix is None else part.suffix
        for slot, values in {"id": part.ids, **part.slots}.items():
            internal = internal_name(table, slot, part.slice)
            key = internal if internal_keys else header_key(table, slot, suffix)
            blocks.append(Block(rename(key, internal) if rename else key, internal, *_plain(values)))
    return blocks


def _dense_block(name: str, value: Any) -> Block:
    # RecIS leaves the suffix out of the header where the name looks like a part; its index has it all the same
    return Block(name if "/part_" in name else f"{name}^ ", None, *_plain(value))


def _plain(value: Any) -> tuple[str, np.ndarray]:
    if isinstance(value, Raw):
        return value.dtype, np.asarray(value.array).astype(_NUMPY[value.dtype])
    array = np.asarray(value)
    return _NAMES[array.dtype.str], array


def _list_block(merged: dict[str, Any], key: str, block: Block, entry: dict[str, Any], is_v1: bool) -> None:
    shape = entry["shape"]
    if block.internal is None:
        merged[key] = _dense_entry(key, _TORCH[block.dtype], shape)
    elif ".embedding" in key:
        merged[key] = {
            "dense": False,
            "dimension": shape[-1],
            "dtype": _TORCH[block.dtype],
            "hashmap_key": key.replace(".embedding", ".id", 1),
            "hashmap_key_dtype": "int64",
            "hashmap_value": key,
            "is_hashmap": True,
            "name": key,
            "shape": shape,
        }
    elif is_v1:
        merged[key] = {"dense": False, **entry}


def _dense_entry(name: str, dtype: str, shape: list[int]) -> dict[str, Any]:
    return {"dense": True, "dimension": 0, "dtype": dtype, "is_hashmap": False, "name": name, "shape": shape}


def _encode(header: dict[str, Any], padding: bool) -> bytes:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if padding:
        text += b" " * (8 - len(text) % 8)
    return struct.pack("<Q", len(text)) + text


# ---- judging a directory ----------------------------------------------------------------------------------------


class FoundBlock(NamedTuple):
    """One sparse block as RecIS's loader would find it."""

    table: str
    slot: str
    slice: tuple[int, int, int]
    key: str
    file: str
    array: np.ndarray


def read_header(path: str | os.PathLike[str]) -> tuple[int, dict[str, Any]]:
    """Return where the data begin, and the header; the file must be covered without hole, overlap or rest."""
    raw = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert "__metadata__" not in header, f"{path}: RecIS refuses __metadata__"
    position = 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        size = np.dtype(_NUMPY[entry["dtype"]]).itemsize
        for length_of_axis in entry["shape"]:
            size *= length_of_axis
        assert begin == position, f"{path}: hole or overlap before {key}"
        assert end - begin == size, f"{path}: {key} spans {end - begin} bytes, needs {size}"
        assert entry["dtype"] != "bool", f"{path}: {key} has a dtype that RecIS cannot read"
        position = end
    assert 8 + length + position == len(raw), f"{path}: {len(raw)} bytes, header says {8 + length + position}"
    return 8 + length, header


def read_blocks(directory: str | os.PathLike[str]) -> list[FoundBlock]:
    """Return the sparse blocks of a directory by RecIS's rules; AssertionError where its loader would trip or lose."""
    return _read(directory)[0]


def read_dense(directory: str | os.PathLike[str]) -> dict[str, tuple[str, np.ndarray]]:
    """Return name -> (dtype name, values) of the dense tensors among the sparse files."""
    return _read(directory)[1]


def read_back(directory: str | os.PathLike[str], *, merged: bool = True) -> dict[str, dict[str, np.ndarray]]:
    """Return {table: {slot: rows sorted by id}}; ids are unique and in their slices, parts have all slots.

    ``merged``: whether the merged manifest must list the embedding blocks in the new style and nothing else sparse.
    """
    blocks = read_blocks(directory)
    tables: dict[str, dict[tuple[int, int, int], dict[str, np.ndarray]]] = {}
    for block in blocks:
        part = tables.setdefault(block.table, {}).setdefault(block.slice, {})
        assert block.slot not in part, f"{block.key}: two blocks of one internal name, RecIS keeps one"
        part[block.slot] = block.array
    found = {}
    for table, parts in tables.items():
        assert len({part[2] for part in parts}) == 1, f"{table}: several slice sizes"
        slots = {tuple(part) for part in parts.values()}
        assert len({frozenset(names) for names in slots}) == 1, f"{table}: parts differ in their slots: {slots}"
        for slice_, arrays in parts.items():
            assert {"id", "embedding"} <= set(arrays), f"{table} {slice_}: no id or no embedding"
            assert {len(array) for array in arrays.values()} == {len(arrays["id"])}, f"{table} {slice_}: rows differ"
            assert owned_by(arrays["id"], slice_).all(), f"{table} {slice_}: ids outside the slice, RecIS loses them"
        ids = np.concatenate([arrays["id"] for arrays in parts.values()])
        assert len(np.unique(ids)) == len(ids), f"{table}: an id stands twice"
        order = np.argsort(ids, kind="stable")
        found[table] = {
            slot: np.concatenate([arrays[slot] for arrays in parts.values()])[order]
            for slot in next(iter(parts.values()))
        }
    if merged:
        _check_merged(Path(directory), blocks)
    return found


def _read(directory: str | os.PathLike[str]) -> tuple[list[FoundBlock], dict[str, tuple[str, np.ndarray]]]:
    directory = Path(directory)
    index = json.loads((directory / INDEX).read_bytes())
    internal = json.loads((directory / TENSORKEY).read_bytes())
    numbers = index["file_index"]
    assert sorted(numbers.values()) == list(range(len(numbers))), "file_index has gaps, RecIS crashes"
    seen: set[str] = set()
    blocks: list[FoundBlock] = []
    dense: dict[str, tuple[str, np.ndarray]] = {}
    for file, number in numbers.items():
        start, header = read_header(directory / file)
        raw = (directory / file).read_bytes()
        for key, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            array = np.frombuffer(raw[begin:end], _NUMPY[entry["dtype"]]).reshape(entry["shape"])
            assert index["block_index"].get(key) == number, f"{key}: not where index says"
            assert key not in seen, f"{key}: in two files"
            seen.add(key)
            name = internal.get(key, key)
            if name.endswith("^ "):
                dense[name[:-2]] = entry["dtype"], array
                continue
            table_and_slot, _, part = name.rpartition("^")
            table, _, slot = table_and_slot.rpartition("@")
            begin, end, size = (int(number) for number in part.split("@"))
            assert table, f"{key}: in no map, RecIS's loader does not see it"
            blocks.append(FoundBlock(table, slot, (begin, end, size), key, file, array))
    assert set(index["block_index"]) == seen, f"in index, in no file: {set(index['block_index']) - seen}"
    assert set(internal) <= seen, f"in tensorkey.json, in no file: {set(internal) - seen}"
    return blocks, dense


def _check_merged(directory: Path, blocks: list[FoundBlock]) -> None:
    merged = json.loads((directory / MERGED).read_bytes())
    key_of = {(block.table, block.slot, block.slice): block.key for block in blocks}
    sparse = {key: entry for key, entry in merged.items() if not entry["dense"]}
    embeddings = {block.key for block in blocks if block.slot == "embedding"}
    assert set(sparse) == embeddings, f"merged manifest: {set(sparse) ^ embeddings}"
    for block in blocks:
        if block.slot != "embedding":
            continue
        entry = merged[block.key]
        assert entry["shape"] == list(block.array.shape), block.key
        assert entry["dimension"] == block.array.shape[-1], block.key
        assert entry["hashmap_key"] == key_of[block.table, "id", block.slice], block.key
        assert entry["name"] == entry["hashmap_value"] == block.key
        assert entry["is_hashmap"] is True
        assert entry["hashmap_key_dtype"] == "int64"
    for name, entry in merged.items():
        if entry["dense"]:
            assert entry["name"] == name
            assert entry["dimension"] == 0
            assert entry["is_hashmap"] is False
