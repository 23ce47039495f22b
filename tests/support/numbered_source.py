"""Checkpoints in nobody's format, for tests of tables whose rows go by number: raw files, and a json file that describes them.

``plug_in`` lets an export open them, so that whole exports run without any one trainer's format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from dist_export.checkpoint import detect
from dist_export.checkpoint.dense import RecisDense
from dist_export.checkpoint.metadata import Blocks, Checkpoint, DenseTensor, Parts, SlotMeta, SourceFile, TableMeta
from dist_export.formats.dtypes import CODE_BY_NAME, DTYPES
from dist_export.pipeline import planning
from dist_export.storage.directory import Directory
from tests.support.recis_writer import PartSpec, Raw

LAYOUT = "layout.json"


class Numbered(NamedTuple):
    """A table whose rows go by number: ``slots`` of equal length, ``embedding`` first, cut where parts begin."""

    slots: Mapping[str, Any]
    begins: Sequence[int] = (0,)


Tables = Mapping[str, "Numbered | Sequence[PartSpec]"]


def write_source(
    directory: Path,
    tables: Tables,
    *,
    dense: Mapping[str, np.ndarray] | None = None,
    model_state: Any = None,
) -> Path:
    """Write a checkpoint: one file for each part number, each with the blocks of all tables."""
    directory.mkdir(parents=True)
    payloads: dict[str, bytearray] = {}
    listed = []

    def put(number: int, array: np.ndarray) -> tuple[str, int]:
        payload = payloads.setdefault(f"rank_{number}.bin", bytearray(b"head"))
        offset = len(payload)
        payload += np.ascontiguousarray(array).tobytes()
        return f"rank_{number}.bin", offset

    for name, table in tables.items():
        is_hashed = not isinstance(table, Numbered)
        parts = _cut(table) if isinstance(table, Numbered) else list(table)
        slots: dict[str, tuple[str, list[int]]] = {}
        found = []
        for number, part in enumerate(parts):
            columns = {"id": part.ids, **part.slots} if is_hashed else part.slots
            blocks = {}
            for slot, value in columns.items():
                dtype, array = (value.dtype, value.array) if isinstance(value, Raw) else (_name(value), value)
                slots[slot] = dtype, list(array.shape[1:])
                blocks[slot] = put(number, array)
            found.append({"slice": part.slice, "rows": len(part.ids), "blocks": blocks})
        listed.append({"name": name, "is_hashed": is_hashed, "slots": slots, "parts": found})
    tensors = [
        {"name": name, "dtype": _name(value), "shape": list(value.shape), "at": put(0, value)}
        for name, value in (dense or {}).items()
    ]
    for name, payload in payloads.items():
        (directory / name).write_bytes(payload)
    (directory / LAYOUT).write_text(json.dumps({"tables": listed, "dense": tensors, "files": sorted(payloads)}))
    if model_state is not None:
        import torch

        torch.save(model_state, directory / "model.pt")
    return directory


def _cut(table: Numbered) -> list[PartSpec]:
    """Return the parts, with the numbers of their rows in the place of ids."""
    rows = len(_plain(table.slots["embedding"]))
    ends = [*table.begins[1:], rows]
    parts = []
    for begin, end in zip(table.begins, ends, strict=True):
        slots = {
            name: Raw(value.dtype, value.array[begin:end]) if isinstance(value, Raw) else value[begin:end]
            for name, value in table.slots.items()
        }
        parts.append(PartSpec(np.arange(begin, end), slots, (begin, end if rows else 1, max(rows, 1))))
    return parts


def _plain(value: Any) -> np.ndarray:
    return value.array if isinstance(value, Raw) else value


def _name(array: np.ndarray) -> str:
    return next(dtype.name for dtype in DTYPES if np.dtype(dtype.numpy) == array.dtype and dtype.name != "BF16")


class LayoutReader:
    """Reads what ``write_source`` wrote. See :class:`~dist_export.checkpoint.metadata.CheckpointReader`."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._layout = json.loads(directory.read(LAYOUT))
        self.files = tuple(self._stat(name) for name in self._layout["files"])

    def _stat(self, name: str) -> SourceFile:
        found = self._directory.stat(name)
        return SourceFile(name=name, size=found.size, version=found.version)

    def read_headers(self, files: range) -> range:
        return files

    def assemble(self, shares: Sequence[range]) -> Checkpoint:
        assert [number for share in shares for number in share] == list(range(len(self.files)))
        number_of = {file.name: number for number, file in enumerate(self.files)}
        tables, rows = [], []
        for number, table in enumerate(self._layout["tables"]):
            known = table["slots"] if table["is_hashed"] else {"id": ("I64", []), **table["slots"]}
            slots = []
            for column, (name, (dtype, inner)) in enumerate(known.items()):
                code = CODE_BY_NAME[dtype]
                row_bytes = int(np.prod(inner, dtype=np.int64)) * DTYPES[code].itemsize
                slots.append(
                    SlotMeta(name=name, dtype=code, inner_shape=tuple(inner), row_bytes=row_bytes, column=column)
                )
            is_hashed = table["is_hashed"]
            tables.append(TableMeta(name=table["name"], slots=tuple(slots), is_hashed=is_hashed, has_ids=is_hashed))
            rows += [(number, *part["slice"], part["rows"], part["blocks"]) for part in table["parts"]]
        width = max((len(table.slots) for table in tables), default=0)
        file = np.full((len(rows), width), -1, np.int32)
        offset = np.zeros((len(rows), width), np.int64)
        key = np.full((len(rows), width), None, object)
        for part, (number, *_, blocks) in enumerate(rows):
            for slot in tables[number].slots:
                if slot.name in blocks:
                    where, position = blocks[slot.name]
                    file[part, slot.column], offset[part, slot.column] = number_of[where], position
                    key[part, slot.column] = f"{tables[number].name} {slot.name} {part}"
        columns = np.array([row[:5] for row in rows], np.int64).reshape(-1, 5).T
        return Checkpoint(
            format="layout",
            directory=self._directory,
            files=self.files,
            tables=tuple(tables),
            parts=Parts(
                table=columns[0],
                begin=columns[1],
                end=columns[2],
                size=columns[3],
                rows=columns[4],
                first_row=columns[1],
            ),
            blocks=Blocks(file=file, offset=offset, key=key),
            dense=tuple(
                DenseTensor(
                    name=tensor["name"],
                    dtype=CODE_BY_NAME[tensor["dtype"]],
                    shape=tuple(tensor["shape"]),
                    file=number_of[tensor["at"][0]],
                    offset=tensor["at"][1],
                    num_bytes=int(np.prod(tensor["shape"], dtype=np.int64))
                    * DTYPES[CODE_BY_NAME[tensor["dtype"]]].itemsize,
                )
                for tensor in self._layout["dense"]
            ),
            fingerprint=xxhash.xxh3_128_hexdigest(json.dumps(self._layout).encode()),
            copy_hindrances=("it is in a format of the tests",),
            verbatim={},
            warnings=(),
        )


def plug_in(monkeypatch: Any) -> None:
    """Let exports open such checkpoints; others are opened as ever."""
    original = detect.open_reader

    def open_reader(directory: Directory, **settings: Any) -> Any:
        return LayoutReader(directory) if directory.exists(LAYOUT) else original(directory, **settings)

    monkeypatch.setattr(planning, "open_reader", open_reader)
    entry = detect.Format(
        kind="a checkpoint of the tests",
        told_by=LAYOUT,
        open=lambda directory, *_: LayoutReader(directory),
        dense=lambda directory, *_: RecisDense(directory),
    )
    monkeypatch.setitem(detect.FORMATS, "layout", entry)


def make_rows(num_rows: int, dim: int = 4, seed: int = 0) -> np.ndarray:
    """Return float32 rows."""
    return np.random.default_rng(seed).standard_normal((num_rows, dim)).astype(np.float32)
