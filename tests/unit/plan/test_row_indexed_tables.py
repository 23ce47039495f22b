"""Tables whose rows go by number: any way of cutting and laying them, any shards, ranks and order of work give their rows.

Checkpoints are written item by item, with the strides that ``torch.save`` finds, and judged by numpy alone.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.config.schema import ExportConfig
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.pipeline.planning import open_checkpoint, plan_sparse
from dist_export.plan.plan import SparsePlan
from dist_export.runtime.joining import join
from dist_export.storage.urls import open_directory
from tests.support.dcp_writer import write_chunks
from tests.support.properties import examples
from tests.support.sparse_cases import run, tiny

PROPERTY = examples(150)
DTYPES = (torch.float32, torch.float16, torch.int8, torch.float64)
LAYOUTS = ("packed", "transposed", "padded", "within", "every second")


def lay(values: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the same values with other strides."""
    if layout == "packed" or values.dim() == 0:
        return values.clone()
    if values.dim() == 1:
        wide = torch.zeros(2 * len(values) + 3, dtype=values.dtype)
        found = wide[3::2] if layout in ("padded", "every second") else wide[3 : 3 + len(values)]
        return found.copy_(values)
    rows, columns = values.shape
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "padded":
        return torch.zeros(rows, columns + 2, dtype=values.dtype)[:, 1 : 1 + columns].copy_(values)
    if layout == "within":
        return torch.zeros(rows + 2, columns, dtype=values.dtype)[1 : 1 + rows].copy_(values)
    return torch.zeros(rows, 2 * columns, dtype=values.dtype)[:, ::2].copy_(values)


@st.composite
def matrices(draw: st.DrawFn, rows: int, columns: int | None, dtype: torch.dtype) -> Any:
    """Values of shape (rows, columns), or (rows,), and chunks of them in a grid whose columns differ by band."""
    shape = (rows,) if columns is None else (rows, columns)
    values = torch.arange(draw(st.integers(0, 50)), 1000)[: int(np.prod(shape))] % 120
    values = values.reshape(shape).to(dtype)
    cuts = sorted(draw(st.sets(st.integers(0, rows), max_size=3)) | {0, rows})
    chunks = []
    for first, last in itertools.pairwise(cuts):
        bands = [0, columns or 1]
        if columns:
            bands = sorted(draw(st.sets(st.integers(0, columns), max_size=2)) | {0, columns})
        for left, right in itertools.pairwise(bands):
            piece = values[first:last] if columns is None else values[first:last, left:right]
            chunks.append(((first, left)[: len(shape)], lay(piece, draw(st.sampled_from(LAYOUTS)))))
    if not rows and draw(st.booleans()):
        chunks = [((0, 0)[: len(shape)], values.clone())]
    return SimpleNamespace(values=values, chunks=draw(st.permutations(chunks)))


@st.composite
def cases(draw: st.DrawFn) -> SimpleNamespace:
    """Tables with their slots, and how to export them."""
    tables = []
    for _ in range(draw(st.integers(1, 2))):
        rows, dim, dtype = draw(st.integers(0, 23)), draw(st.integers(1, 4)), draw(st.sampled_from(DTYPES))
        kinds = draw(st.lists(st.sampled_from([None, 1, dim]), max_size=2))
        slots = [draw(matrices(rows, columns, torch.float32)) for columns in kinds]
        tables.append(SimpleNamespace(weight=draw(matrices(rows, dim, dtype)), slots=slots))
    return SimpleNamespace(
        tables=tables,
        num_shards=draw(st.one_of(st.just("source"), st.integers(1, 6))),
        world_size=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 1000)),
        keeps_slots=draw(st.booleans()),
    )


def write(case: SimpleNamespace, folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Write the checkpoint; return table and slot -> values."""
    tensors, truth = {}, {}
    for number, table in enumerate(case.tables):
        name = f"ebc.embeddings.t{number}.weight"
        tensors[name], truth[name, "embedding"] = (table.weight.values, table.weight.chunks), table.weight.values
        for place, slot in enumerate(table.slots):
            tensors[f"opt.state.{name}.s{place}"] = (slot.values, slot.chunks)
            truth[name, f"s{place}"] = slot.values
    write_chunks(folder, tensors)
    return truth


def plan_case(case: SimpleNamespace, folder: Path, tuning: Tuning) -> SparsePlan:
    """Plan as so many ranks do; each reads a share of the headers."""
    keep = ["s?"] if case.keeps_slots and any(table.slots for table in case.tables) else []
    config = ExportConfig(
        ckpt_dir=str(folder),
        export_dir="/nowhere",
        filter_sparse_opt=True,
        num_shards=case.num_shards,
        keep_slots=keep,
    )
    with join(timeout_secs=60) as ranks:
        checkpoint = open_checkpoint(ranks, open_directory(folder))
        return plan_sparse(ranks, checkpoint, config, world_size=case.world_size, tuning=tuning).plan


def read_rows(plan: SparsePlan, files: dict[str, bytes]) -> dict[tuple[str, str], torch.Tensor]:
    """Return table and slot -> rows of all blocks in the order of targets, as the safetensors library reads them."""
    blocks = {key: tensor for raw in files.values() for key, tensor in safetensors.torch.load(raw).items()}
    return {
        (table.name, slot.name): torch.cat(
            [blocks.pop(plan.blocks.key[block]) for block in plan.blocks_of(number, slot.column)]
        )
        for number, table in enumerate(plan.checkpoint.tables)
        for slot in plan.slots_of(number)
    } | {(key, "of no table"): tensor for key, tensor in blocks.items()}


def check(case: SimpleNamespace, tuning: Tuning = STANDARD) -> Checkpoint:
    with tempfile.TemporaryDirectory() as name:
        truth = write(case, Path(name, "ckpt"))
        plan = plan_case(case, Path(name, "ckpt"), tuning)
        files = run(plan, Path(name, "out"), world_size=case.world_size, seed=case.seed, tuning=tuning)
        found = read_rows(plan, files)
    kept = {key: values for key, values in truth.items() if key[1] == "embedding" or case.keeps_slots}
    assert set(found) == set(kept)
    for key, values in kept.items():
        assert found[key].dtype == values.dtype
        assert torch.equal(found[key], values), key
    for number, table in enumerate(case.tables):
        parts = plan.checkpoint.parts.of_table(number)
        assert int(plan.checkpoint.parts.rows[parts].sum()) == len(table.weight.values)
        blocks = plan.blocks_of(number, 1)
        assert [int(plan.blocks.begin[b]) for b in blocks[1:]] == [int(plan.blocks.end[b]) for b in blocks[:-1]]
    return plan.checkpoint


@PROPERTY
@given(case=cases())
def test_rows_come_out_in_order_however_they_lie(case: SimpleNamespace) -> None:
    check(case)


@PROPERTY
@given(case=cases())
def test_rows_come_out_in_order_where_work_is_cut_small(case: SimpleNamespace) -> None:
    """Granules, units, chunks of digests and buffers of a few rows: every edge is met."""
    check(case, tiny())
