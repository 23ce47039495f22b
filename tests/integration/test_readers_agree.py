"""The readers against the libraries that wrote the files: both sides of every comparison of scores read through them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import torch as safetensors_torch

from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.source_rows import SourceRows
from dist_export.formats.dtypes import DTYPES
from dist_export.pipeline.planning import open_checkpoint
from dist_export.runtime.joining import join
from dist_export.storage.urls import open_place
from tests.support import dcp_writer
from tests.support.plain_cases import assert_same, dense_of

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "offset": lambda t: torch.cat([t[:3], t])[3:],
    "columns": lambda t: torch.cat([t, t], 1)[:, t.shape[1] :],
    "strided": lambda t: t.repeat_interleave(2, 0)[::2],
}


def values(dtype: torch.dtype, rows: int, dim: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    if dtype.is_floating_point:
        found = torch.randn(rows, dim, dtype=torch.float64).to(dtype)
        found[0, 0], found[1, 0], found[2, 0] = float("nan"), float("-inf"), -0.0
        return found
    return torch.randint(0, 2 if dtype == torch.bool else 120, (rows, dim)).to(dtype)


def make_state(layouts: list[str]) -> dict[str, torch.Tensor]:
    state = {}
    for seed, (dtype, layout) in enumerate((dtype, layout) for dtype in FLOATS + OTHERS for layout in layouts):
        kind = str(dtype).removeprefix("torch.")
        state[f"dense.{kind}.{layout}"] = LAYOUTS[layout](values(dtype, 5, 3, seed))
        if dtype in FLOATS:
            state[f"table.{kind}.{layout}"] = LAYOUTS[layout](values(dtype, 41 + seed, 2 + seed % 5, seed))
    shared = torch.randn(30, 4)
    state |= {"table.shared.first": shared[:10], "table.shared.rest": shared[10:], "dense.shared": shared[3]}
    return state | {
        "dense.scalar": torch.tensor(7.5),
        "dense.empty": torch.zeros(0, 3),
        "dense.vector": torch.arange(5),
    }


def write_torch(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    path = folder / "model.pth"
    torch.save(make_state(list(LAYOUTS)), path)
    return path, torch.load(path, weights_only=True)


def write_dcp(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    state = make_state(list(LAYOUTS))
    path = dcp_writer.save(folder / "ck", state)
    loaded = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in state.items()}
    dcp.load(loaded, checkpoint_id=path, no_dist=True)
    return path, loaded


def write_safetensors(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    path = folder / "model.safetensors"
    state = {name: t.contiguous().clone() for name, t in make_state(["plain"]).items()}
    safetensors_torch.save_file(state, path)
    return path, safetensors_torch.load_file(path)


WRITERS = {"torch": write_torch, "dcp": write_dcp, "safetensors": write_safetensors}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_tensor_is_what_its_own_library_loads(kind: str, tmp_path: Path) -> None:
    """Dense parameters whole; tables row by row, found as the sample finds them, in any order and number."""
    path, expected = WRITERS[kind](tmp_path)
    dense = dense_of(path, ["table.*"]).load()
    assert_same(dict(dense), {name: tensor for name, tensor in expected.items() if name.startswith("dense.")})
    tables = {name: tensor for name, tensor in expected.items() if name.startswith("table.")}
    with join(timeout_secs=60) as ranks:
        checkpoint = open_checkpoint(ranks, open_place(path), settings=TensorSettings(("table.*",)))
    assert sorted(table.name for table in checkpoint.tables) == sorted(tables)
    finder = RowFinder(SourceRows(checkpoint=checkpoint)).unmodified()
    for name, tensor in tables.items():
        slot = finder.embedding_of(name)
        assert DTYPES[slot.dtype].torch == str(tensor.dtype).removeprefix("torch.")
        assert slot.inner_shape == tensor.shape[1:]
        some = np.arange(0, len(tensor), 3)
        assert_same({name: read(finder, name, some)}, {name: tensor[torch.from_numpy(some)]})
        ids = np.arange(len(tensor) + 2)  # two more than there are
        has_row, _ = finder.find(name, ids)
        assert has_row.tolist() == [number < len(tensor) for number in ids.tolist()]
        assert_same({name: read(finder, name, ids[:-2])}, {name: tensor})


def read(finder: RowFinder, table: str, ids: np.ndarray) -> Any:
    has_row, rows = finder.find(table, ids)
    assert has_row.all()
    dtype = getattr(torch, DTYPES[finder.embedding_of(table).dtype].torch)
    return torch.from_numpy(rows).view(dtype)
