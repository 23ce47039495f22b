"""Rows of a row-indexed table with those of a delta on top are read from any byte on, as numpy puts them together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_export.delta.overlaid_rows import OverlaidRows, list_runs
from dist_export.errors import TransferError
from dist_export.package.reader import Package, open_package
from tests.integration.test_delta_export import export
from tests.support import dcp_writer

ROWS, NEW, DIM = 300, 40, 3
NAME = "sparse_arch.item.weight"


@pytest.fixture(scope="module")
def values() -> tuple[torch.Tensor, torch.Tensor]:
    before = torch.arange(float(ROWS * DIM)).reshape(ROWS, DIM)
    after = torch.cat([before, -torch.arange(float(NEW * DIM)).reshape(NEW, DIM) - 1])
    after[::7] += 0.5
    return before, after


@pytest.fixture(scope="module")
def delta(values, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, settings = tmp_path_factory.mktemp("overlaid"), {"treat_as_tables": [NAME], "num_shards": 3}
    places: list[Path] = [dcp_writer.save(folder / str(number), {NAME: its}) for number, its in enumerate(values)]
    base = export(places[0], folder / "base", **settings)
    with open_package(export(places[1], folder / "delta", base=str(base), **settings)) as package:
        yield package


def reader_of(delta: Package, **sizes: int) -> OverlaidRows:
    assert delta.base is not None
    runs = list_runs(delta.base.table(NAME))
    return OverlaidRows("here", delta.base.rows_of(NAME), runs, [delta.rows_of(NAME)], row_bytes=4 * DIM, **sizes)


@pytest.mark.parametrize("piece_bytes", [1, 50, 1 << 20])
def test_any_bytes(delta: Package, values, piece_bytes: int) -> None:
    expected, reader = values[1].numpy().tobytes(), reader_of(delta, piece_bytes=piece_bytes)
    random = np.random.default_rng(0)
    pairs = [(0, len(expected)), (0, 0), (len(expected), 0), (7, 1)]
    pairs += [(int(first), int(random.integers(0, 400))) for first in random.integers(0, len(expected), 40)]
    for first, length in pairs:
        view = memoryview(bytearray(min(length, len(expected) - first)))
        reader.read_into(view, first)
        assert view.tobytes() == expected[first : first + length], (first, length)


def test_a_row_of_neither_package(delta: Package, values) -> None:
    with pytest.raises(TransferError, match=f"row {ROWS + NEW} is in no package"):
        reader_of(delta).read_into(memoryview(bytearray(8)), (ROWS + NEW) * 4 * DIM)
