"""Writes a training checkpoint in RecIS's format: sharded tables with their optimizer slots, and the dense state.

    <directory>/
      model-000000-of-000002.safetensors ...             one file a rank; the dense tensors lie in rank 0's
      index, tensorkey.json                              where each block is, and its internal name
      torch_rank_weights_embs_table_multi_shard.json     what serving reads
      model.pt, extra.pt                                 the dense arch's state dict; the global step
    <directory>/../checkpoint                            one checkpoint a line, the newest last

Each file takes its name only when it is whole, and ``index`` comes after all that it speaks of.
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from scripts.demo.sparse import SLICE_SIZE, gen_slice

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}


class Block(NamedTuple):
    """One tensor of a data file, and what the JSON files say of it."""

    key: str
    tensor: Tensor
    tensorkey: str | None = None
    """The internal name, ``table@slot^slice``; None for a dense tensor."""
    manifest: dict[str, Any] | None = None
    """None for ids and optimizer slots, which the manifest leaves out."""


def save_checkpoint(
    directory: Path,
    tables: Iterable[tuple[str, Mapping[str, Tensor]]],
    *,
    dense: Mapping[str, Tensor],
    state_dict: Mapping[str, Tensor],
    global_step: int,
) -> None:
    """Write the checkpoint. Every rank calls this; ``index`` appears when all other files are whole.

    Args:
        directory: By custom ``ckpt_<global step>``.
        tables: This rank's rows: the name and slots of each table, ``id`` (n,) int64 and ``embedding`` (n, dim) first.
        dense: The sparse optimizer's tensors that belong to no row.
        state_dict: The dense arch's state dict, which becomes ``model.pt``.
        global_step: Number of steps trained.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    directory.mkdir(parents=True, exist_ok=True)
    blocks = [block for name, slots in tables for block in make_table_blocks(name, slots, rank, world_size)]
    if rank == 0:
        blocks += [make_dense_block(name, tensor) for name, tensor in dense.items()]
    file_name = f"model-{rank:06}-of-{world_size:06}.safetensors"
    write_safetensors(directory / file_name, blocks)

    described = [(file_name, block._replace(tensor=torch.empty(0))) for block in blocks]  # rows stay on their rank
    by_rank: list[Any] = [None] * world_size
    dist.all_gather_object(by_rank, described)  # returns when every rank's file is whole
    if rank == 0:
        with replace_file(directory / "model.pt") as file:
            torch.save(dict(state_dict), file)
        with replace_file(directory / "extra.pt") as file:
            torch.save({"global_step": torch.tensor(global_step)}, file)
        write_json_files(directory, [pair for pairs in by_rank for pair in pairs], state_dict)
        with (directory.parent / "checkpoint").open("a") as file:
            file.write(f"{directory.name}\n")
    dist.barrier()


def make_table_blocks(table: str, slots: Mapping[str, Tensor], rank: int, world_size: int) -> Iterator[Block]:
    """Yield a block for each slot of this rank's part of a table."""
    begin, end = gen_slice(rank, world_size)
    for slot, tensor in slots.items():
        key = f"{table}.{slot}/part_{rank}_{world_size}"
        tensorkey = f"{table}@{slot}^{begin:05}@{end:05}@{SLICE_SIZE}"
        manifest = None
        if slot == "embedding":
            manifest = {
                "dense": False,
                "dimension": tensor.shape[-1],
                "dtype": name_dtype(tensor),
                "hashmap_key": f"{table}.id/part_{rank}_{world_size}",
                "hashmap_key_dtype": "int64",
                "hashmap_value": key,
                "is_hashmap": True,
                "name": key,
                "shape": list(tensor.shape),
            }
        yield Block(key, tensor, tensorkey, manifest)


def make_dense_block(name: str, tensor: Tensor) -> Block:
    """Return the block of a dense tensor, whose key ends in a caret and a space."""
    key = f"{name}^ "
    return Block(key, tensor, None, dict(sorted(describe_dense(key, tensor).items())))


def describe_dense(name: str, tensor: Tensor) -> dict[str, Any]:
    return {
        "name": name,
        "dense": True,
        "dimension": 0,
        "is_hashmap": False,
        "dtype": name_dtype(tensor),
        "shape": list(tensor.shape),
    }


def name_dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def write_safetensors(path: Path, blocks: Sequence[Block]) -> None:
    """Write the blocks in their order. The header has no ``__metadata__``, for RecIS would refuse the file."""
    header, end = {}, 0
    for block in blocks:
        begin, end = end, end + block.tensor.nbytes
        shape = list(block.tensor.shape)
        header[block.key] = {"dtype": DTYPES[block.tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (8 - len(encoded) % 8)  # one space to eight: RecIS pads a multiple of 8 too
    with replace_file(path) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for block in blocks:
            file.write(block.tensor.contiguous().numpy().tobytes())


def write_json_files(directory: Path, placed: Sequence[tuple[str, Block]], state_dict: Mapping[str, Tensor]) -> None:
    """Write what all ranks' blocks come to; ``placed`` pairs each with the name of its file."""
    file_index = {name: number for number, name in enumerate(sorted({name for name, _ in placed}))}
    index = {"block_index": {block.key: file_index[name] for name, block in placed}, "file_index": file_index}
    tensorkey = {block.key: block.tensorkey for _, block in placed if block.tensorkey}
    manifest = dict(sorted((block.key, block.manifest) for _, block in placed if block.manifest))
    manifest |= {name: describe_dense(name, tensor) for name, tensor in state_dict.items()}  # after the sorted part
    for name, text in (
        ("tensorkey.json", json.dumps(tensorkey, indent=4, sort_keys=True)),
        ("torch_rank_weights_embs_table_multi_shard.json", json.dumps(manifest, indent=4)),
        ("index", json.dumps(index, separators=(",", ":"), sort_keys=True)),
    ):
        with replace_file(directory / name) as file:
            file.write(text.encode())


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its name only when it is whole and on disk."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
