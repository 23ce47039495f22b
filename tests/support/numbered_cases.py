"""A checkpoint whose tables' rows go by number, over raw files: a format of the tests' own, behind ``CheckpointReader``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_export.checkpoint import detect
from dist_export.checkpoint.metadata import (
    IN_STRIPS,
    Blocks,
    Checkpoint,
    Parts,
    SlotMeta,
    SourceFile,
    Strips,
    TableMeta,
)
from dist_export.formats.dtypes import CODE_BY_TORCH, I64
from dist_export.pipeline import planning as source_room
from dist_export.storage.directory import Directory

FLOAT = CODE_BY_TORCH["float32"]
RAW = "rows.bin"


class NumberedReader:
    """Lays each table out in parts of so many rows; the last part of a table in two shards by columns."""

    def __init__(self, directory: Directory, tables: dict[str, np.ndarray], rows_by_part: tuple[int, ...]) -> None:
        self._directory = directory
        self._tables = tables
        self._rows_by_part = rows_by_part
        self.files: tuple[SourceFile, ...] = (SourceFile(name=RAW, size=0, version=""),)

    def read_headers(self, files: range) -> list[int]:
        return list(files)

    def assemble(self, shares: Any) -> Checkpoint:
        payload = b"head"
        metas, file, offset, strips = [], [], [], []
        key: list[list[str | None]] = []
        parts: list[tuple[int, ...]] = []
        for number, (name, values) in enumerate(self._tables.items()):
            width = 4 * values.shape[1]
            slots = (
                SlotMeta(name="id", dtype=I64, inner_shape=(), row_bytes=8, column=0),
                SlotMeta(name="embedding", dtype=FLOAT, inner_shape=values.shape[1:], row_bytes=width, column=1),
            )
            metas.append(TableMeta(name=name, slots=slots, is_hashed=False, has_ids=False))
            edges = np.minimum(np.cumsum([0, *self._rows_by_part]), len(values)).tolist()
            edges[-1] = len(values)
            for place, (begin, end) in enumerate(itertools.pairwise(edges)):
                rows = values[begin:end]
                is_last = place == len(edges) - 2
                file.append([-1, IN_STRIPS if is_last else 0])
                offset.append([0, 0 if is_last else len(payload)])
                key.append([None, name])
                if is_last:
                    for first, piece in ((0, rows[:, :1]), (4, rows[:, 1:])):
                        strips.append((len(parts), 1, first, piece.shape[1] * 4, piece.shape[1] * 4, 0, len(payload)))
                        payload += np.ascontiguousarray(piece).tobytes()
                else:
                    payload += rows.tobytes()
                parts.append((number, begin, end, max(len(values), 1), end - begin, begin))
        Path(self._directory.join(RAW)).write_bytes(payload)
        columns = np.array(parts, np.int64).T
        names = ("part", "column", "first_byte", "width", "row_stride", "file", "offset")
        return Checkpoint(
            format="recis",
            directory=self._directory,
            files=(SourceFile(name=RAW, size=len(payload), version=self._directory.stat(RAW).version),),
            tables=tuple(metas),
            parts=Parts(
                table=columns[0],
                begin=columns[1],
                end=columns[2],
                size=columns[3],
                rows=columns[4],
                first_row=columns[5],
            ),
            blocks=Blocks(file=np.array(file, np.int32), offset=np.array(offset, np.int64), key=np.array(key, object)),
            strips=Strips(**dict(zip(names, np.array(strips, np.int64).T, strict=True))),
            dense=(),
            fingerprint="numbered",
            copy_hindrances=("its rows go by number",),
            verbatim={},
            warnings=(),
        )


def write_numbered(
    folder: Path, tables: dict[str, np.ndarray], patch: pytest.MonkeyPatch, rows_by_part: tuple[int, ...] = (40, 25, 0)
) -> Path:
    """Let ``folder`` be a checkpoint of these tables (float32, (rows, dim)) for as long as the patch holds."""
    folder.mkdir()

    def open_reader(directory: Directory, **settings: Any) -> Any:
        if directory.url.endswith(str(folder)):
            return NumberedReader(directory, tables, rows_by_part)
        return detect.open_reader(directory, **settings)

    patch.setattr(source_room, "open_reader", open_reader)
    return folder


def numbered_tables(**rows: int) -> dict[str, np.ndarray]:
    """Random tables of so many rows of 3 values."""
    random = np.random.default_rng(4)
    return {name: random.standard_normal((count, 3)).astype(np.float32) for name, count in rows.items()}
