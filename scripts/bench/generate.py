"""Write checkpoints in RecIS's format of any size: unique ids in their shards' slices, random rows, optimizer slots.

Nothing of dist_export is used, so that a mistake there cannot hide behind the same mistake here.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np

SLICE_SIZE = 65536
KEPT_SLOTS = ("id", "embedding")
OPTIMIZER_SLOTS = (
    "sparse_adamw_exp_avg",
    "sparse_adamw_exp_avg_sq",
    "sparse_adam_exp_avg",
    "sparse_adam_exp_avg_sq",
    "sparse_adagrad_state_sum",
)
"""Slots that an exporter drops, in the order in which a source takes them."""

MERGED = "torch_rank_weights_embs_table_multi_shard.json"
_IDS_AT_ONCE = 1 << 20
_RANDOM_BYTES = 8 << 20

Holes = Literal["none", "dropped", "all_but_ids"]
"""Which payload is left out as holes of sparse files, so that it takes no room: it reads as zeros."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a generated checkpoint holds. Every table has the same number of rows; every row is float32."""

    rows: int
    """Of each table, over all shards."""
    dim: int
    tables: int = 8
    num_dropped: int = 2
    """Optimizer slots of each table; each as wide as the embedding."""
    shards: int = 2
    files_per_shard: int = 2
    """Writers of each shard; blocks are dealt to them in turn, so ids and embeddings lie in different files."""
    holes: Holes = "dropped"

    @classmethod
    def of_size(cls, kept_bytes: float, *, dim: int, tables: int = 8, **further: object) -> Source:
        """Return a source whose ids and embeddings take about ``kept_bytes``."""
        rows = max(1, round(kept_bytes / tables / (8 + 4 * dim)))
        return cls(rows=rows, dim=dim, tables=tables, **further)  # type: ignore[arg-type]

    @property
    def kept_bytes(self) -> int:
        """Bytes of ids and embeddings, headers not counted."""
        return self.tables * self.rows * (8 + 4 * self.dim)

    @property
    def slots(self) -> tuple[str, ...]:
        """All slots of each table, in the order of the blocks."""
        return KEPT_SLOTS + OPTIMIZER_SLOTS[: self.num_dropped]

    @property
    def num_blocks(self) -> int:
        """Blocks over all files."""
        return self.shards * self.tables * len(self.slots)

    def table_name(self, table: int) -> str:
        """Return the name of a table; all are of equal length, so that sorted names are sorted tables."""
        return f"table_{table:04d}"

    def slice_of(self, shard: int) -> tuple[int, int]:
        """Return the shard's slice of 0 to ``SLICE_SIZE``: the first shards take the rest."""
        quotient, rest = divmod(SLICE_SIZE, self.shards)
        begin = shard * quotient + min(shard, rest)
        return begin, begin + quotient + (shard < rest)

    def rows_of(self, shard: int) -> int:
        """Return the rows of one part of any table."""
        quotient, rest = divmod(self.rows, self.shards)
        return quotient + (shard < rest)

    def ids_of(self, table: int, shard: int, first: int, count: int) -> np.ndarray:
        """Return ``count`` ids (int64) of a part from row ``first`` on.

        The high 48 bits are a bijection of the row's number, so ids are unique and in no order; the low 16 lie in the
        shard's slice.
        """
        begin, end = self.slice_of(shard)
        number = np.arange(first, first + count, dtype=np.uint64) + np.uint64((table * 1_000_003) << 20)
        mask = np.uint64((1 << 48) - 1)
        mixed = (number * np.uint64(0x9E3779B97F4B)) & mask  # odd, so one to one modulo 2**48
        mixed ^= mixed >> np.uint64(25)
        mixed = (mixed * np.uint64(0xBF58476D1CE5)) & mask
        mixed ^= mixed >> np.uint64(23)
        low = np.uint64(begin) + ((mixed ^ (mixed >> np.uint64(17))) * np.uint64(31)) % np.uint64(end - begin)
        found: np.ndarray = ((mixed << np.uint64(16)) | low).view(np.int64)
        return found


def count_denied(source: Source) -> int:
    """Return the rows of each table that :func:`list_denied` names."""
    return sum(source.rows_of(shard) // 2 for shard in range(source.shards))


def list_denied(source: Source) -> np.ndarray:
    """Return the ids (int64) of the first half of each part."""
    parts = [(table, shard) for table in range(source.tables) for shard in range(source.shards)]
    return np.concatenate([source.ids_of(table, shard, 0, source.rows_of(shard) // 2) for table, shard in parts])


class Block(NamedTuple):
    """One tensor of one data file."""

    table: int
    slot: str
    shard: int
    key: str
    rows: int
    num_bytes: int


def blocks_of(source: Source, shard: int, writer: int) -> Iterator[Block]:
    """Yield the blocks of one data file, in file order."""
    rows = source.rows_of(shard)
    names = [(table, slot) for table in range(source.tables) for slot in source.slots]
    for table, slot in names[writer :: source.files_per_shard]:
        key = f"{source.table_name(table)}.{slot}/part_{shard}_{source.shards}"
        yield Block(table, slot, shard, key, rows, rows * (8 if slot == "id" else 4 * source.dim))


def file_name(source: Source, shard: int, writer: int) -> str:
    """Return the name of one data file."""
    number, total = shard * source.files_per_shard + writer, source.shards * source.files_per_shard
    return f"model-{number:06d}-of-{total:06d}.safetensors"


def generate(directory: Path, source: Source) -> Path:
    """Write the checkpoint, durably, and return its directory. Needs some MB of memory whatever the size."""
    directory.mkdir(parents=True)
    # such values as embeddings have, so that they can be cast
    pool = (np.random.default_rng(7).standard_normal(_RANDOM_BYTES // 4, np.float32) * np.float32(0.05)).view(np.uint8)
    for shard in range(source.shards):
        for writer in range(source.files_per_shard):
            blocks = list(blocks_of(source, shard, writer))
            if blocks:  # a writer without a block leaves no file
                with (directory / file_name(source, shard, writer)).open("wb", buffering=0) as file:
                    _write_file(file, source, blocks, memoryview(pool))
    _write_indexes(directory, source)
    return directory


def encode_header(blocks: list[Block], dim: int) -> bytes:
    """Return length and header as RecIS writes them: compact, padded with one to eight spaces."""
    entries, position = [], 0
    for block in blocks:
        end = position + block.num_bytes
        kind = f'"I64","shape":[{block.rows}]' if block.slot == "id" else f'"F32","shape":[{block.rows},{dim}]'
        entries.append(f'"{block.key}":{{"dtype":{kind},"data_offsets":[{position},{end}]}}')
        position = end
    header = ("{" + ",".join(entries) + "}").encode()
    header += b" " * (8 - len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def _write_file(file: IO[bytes], source: Source, blocks: list[Block], pool: memoryview) -> None:
    header = encode_header(blocks, source.dim)
    _write_all(file, memoryview(header))
    position = len(header)
    for block in blocks:
        if block.slot == "id":
            for first in range(0, block.rows, _IDS_AT_ONCE):
                count = min(_IDS_AT_ONCE, block.rows - first)
                _write_all(file, source.ids_of(block.table, block.shard, first, count).data.cast("B"))
        elif source.holes == "all_but_ids" or (source.holes == "dropped" and block.slot not in KEPT_SLOTS):
            file.seek(position + block.num_bytes)
        else:
            _write_random(file, block, pool)
        position += block.num_bytes
    file.truncate(position)  # a hole at the end needs it
    os.fsync(file.fileno())


def _write_random(file: IO[bytes], block: Block, pool: memoryview) -> None:
    start = 1024 * (1009 * block.table + 101 * block.shard) % len(pool)  # so that no two parts begin alike
    written = 0
    while written < block.num_bytes:
        piece = pool[start : start + block.num_bytes - written]
        _write_all(file, piece)
        written += len(piece)
        start = 0


def _write_all(file: IO[bytes], view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]


def _write_indexes(directory: Path, source: Source) -> None:
    """Write the three json files line by line, in the order of sorted keys: a million blocks do not fit in a dict."""
    placed = {
        (table, slot): writer
        for writer in range(source.files_per_shard)
        for table, slot in [(block.table, block.slot) for block in blocks_of(source, 0, writer)]
    }
    writers = sorted(set(placed.values()))
    names = [(shard, writer) for shard in range(source.shards) for writer in writers]
    number = {name: i for i, name in enumerate(names)}
    # "/" sorts before "_" and the parts sort as text
    parts = sorted(range(source.shards), key=lambda shard: f"{shard}_{source.shards}")

    def keys(slots: tuple[str, ...]) -> Iterator[tuple[str, int, str, int]]:
        for table in range(source.tables):
            for slot in sorted(slots):
                for shard in parts:
                    yield f"{source.table_name(table)}.{slot}/part_{shard}_{source.shards}", table, slot, shard

    tensorkeys = (
        f'    "{key}": "{source.table_name(table)}@{slot}^{_format_slice(source.slice_of(shard))}"'
        for key, table, slot, shard in keys(source.slots)
    )
    _write_text(directory / "tensorkey.json", "{\n", ",\n", tensorkeys, "\n}")
    entries = (
        "    "
        + json.dumps(key)
        + ": "
        + json.dumps(_merged_entry(source, key, table, shard), indent=4).replace("\n", "\n    ")
        for key, table, _, shard in keys(("embedding",))
    )
    _write_text(directory / MERGED, "{\n", ",\n", entries, "\n}")
    blocks = (f'"{key}":{number[shard, placed[table, slot]]}' for key, table, slot, shard in keys(source.slots))
    files = json.dumps({file_name(source, *name): i for name, i in number.items()}, separators=(",", ":"))
    _write_text(directory / "index", '{"block_index":{', ",", blocks, '},"file_index":' + files + "}")


def _format_slice(part: tuple[int, int]) -> str:
    return f"{part[0]:05d}@{part[1]:05d}@{SLICE_SIZE}"


def _merged_entry(source: Source, key: str, table: int, shard: int) -> dict[str, object]:
    return {
        "dense": False,
        "dimension": source.dim,
        "dtype": "float32",
        "hashmap_key": f"{source.table_name(table)}.id/part_{shard}_{source.shards}",
        "hashmap_key_dtype": "int64",
        "hashmap_value": key,
        "is_hashmap": True,
        "name": key,
        "shape": [source.rows_of(shard), source.dim],
    }


def _write_text(path: Path, begin: str, between: str, lines: Iterator[str], end: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(begin)
        for place, line in enumerate(lines):
            file.write(between + line if place else line)
        file.write(end)
        file.flush()
        os.fsync(file.fileno())


METADATA_SCALE = Source(rows=1024 * 16, dim=16, tables=250, shards=1024, files_per_shard=4, holes="all_but_ids")
"""A million blocks in 4,096 files, 16 rows a part: what is slow with it is slow for the metadata's sake."""
