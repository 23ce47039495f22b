"""What a fleet's checkpoint says of itself, made up: metadata and counts of ids, for any number of parts; no file is there.

One table has half of all bytes; the others follow Zipf. Parts are RecIS's slices of 65,536 hash values, so that with
thousands of them they are uneven, as they are in truth.
"""

from __future__ import annotations

import numpy as np

from dist_export.checkpoint.metadata import Blocks, Checkpoint, Parts, SlotMeta, SourceFile, TableMeta
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.recis import split_evenly
from dist_export.formats.tuning import STANDARD
from dist_export.plan.census import Census
from dist_export.plan.plan import SparsePlan
from dist_export.plan.selection import select
from dist_export.plan.shard_layout import plan_shards
from dist_export.plan.target_slices import Targets, plan_targets
from dist_export.storage.urls import open_directory

SIZE = 65536
DIMS = (64, 16, 128, 32, 8, 64, 16, 32, 16, 8, 32, 64)
F32 = [dtype.name for dtype in DTYPES].index("F32")
I64 = [dtype.name for dtype in DTYPES].index("I64")


def make_plan(checkpoint: Checkpoint, census: Census, num_shards: int) -> SparsePlan:
    """Plan an export to ``num_shards`` files."""
    targets = plan_targets(checkpoint, num_shards)
    return plan_shards(checkpoint, select(checkpoint), targets, census, num_shards=num_shards)


def make_checkpoint(kept_bytes: int, num_parts: int) -> Checkpoint:
    """Return metadata: each trainer rank wrote one file with a part of each table; Adam's two slots beside the rows."""
    tables = tuple(_table(number, dim) for number, dim in enumerate(DIMS))
    shares = np.array([1.0, *(1 / np.arange(1, len(DIMS)))])
    shares[1:] /= shares[1:].sum()
    edges = np.asarray(split_evenly(SIZE, num_parts), np.int64)
    widths = np.diff(edges)
    generator = np.random.default_rng(7)
    rows = np.concatenate(
        [
            generator.poisson(
                kept_bytes / 2 * share / (8 + 4 * dim) * widths / SIZE
            )  # ids are hashed: slices fill by chance
            for share, dim in zip(shares, DIMS, strict=True)
        ]
    ).astype(np.int64)
    parts = Parts(
        table=np.repeat(np.arange(len(DIMS)), num_parts),
        begin=np.tile(edges[:-1], len(DIMS)),
        end=np.tile(edges[1:], len(DIMS)),
        size=np.full(len(rows), SIZE),
        rows=rows,
    )
    row_bytes = np.array([[slot.row_bytes for slot in tables[table].slots] for table in parts.table.tolist()])
    sizes = rows[:, None] * row_bytes
    file = np.repeat(np.tile(np.arange(num_parts, dtype=np.int32), len(DIMS))[:, None], row_bytes.shape[1], 1)
    offset = np.zeros_like(sizes)
    ends = np.full(num_parts, 4096)
    for table in range(len(DIMS)):
        mine = slice(table * num_parts, (table + 1) * num_parts)
        offset[mine] = ends[:, None] + np.cumsum(sizes[mine], 1) - sizes[mine]
        ends = ends + sizes[mine].sum(1)
    key = np.array(
        [[f"t{t}/part{p}/{s}" for s in range(4)] for t in range(len(DIMS)) for p in range(num_parts)], object
    )
    return Checkpoint(
        format="recis",
        directory=open_directory("memory://fleet"),
        files=tuple(SourceFile(name=f"model-{n:06}", size=int(end), version="1") for n, end in enumerate(ends)),
        tables=tables,
        parts=parts,
        blocks=Blocks(file=file, offset=offset, key=key),
        dense=(),
        fingerprint="made up",
        copy_hindrances=(),
        verbatim={},
        warnings=(),
    )


def _table(number: int, dim: int) -> TableMeta:
    shapes = {"id": (), "embedding": (dim,), "sparse_adam_exp_avg": (dim,), "sparse_adam_exp_avg_sq": (dim,)}
    return TableMeta(
        name=f"table_{number}",
        slots=tuple(
            SlotMeta(
                name=name,
                dtype=F32 if shape else I64,
                inner_shape=shape,
                row_bytes=4 * dim if shape else 8,
                column=column,
            )
            for column, (name, shape) in enumerate(shapes.items())
        ),
    )


def count(checkpoint: Checkpoint, targets: tuple[Targets, ...]) -> Census:
    """Return what a census would: the rows of each part, granule by granule, dealt out evenly over the part's hash values."""
    parts = checkpoint.parts
    borders = np.array([slice_.begin for slice_ in targets[0].slices] + [SIZE])
    runs: list[np.ndarray] = []
    for part, (begin, end, rows) in enumerate(
        zip(parts.begin.tolist(), parts.end.tolist(), parts.rows.tolist(), strict=True)
    ):
        first, last = np.searchsorted(borders, [begin, end - 1], side="right") - 1
        owners = np.arange(first, last + 1)
        widths = np.minimum(borders[owners + 1], end) - np.maximum(borders[owners], begin)
        for granule, start in enumerate(range(0, rows, STANDARD.granule_rows)):
            here = min(STANDARD.granule_rows, rows - start)
            counts = np.diff(np.concatenate([[0], np.cumsum(widths) * here // (end - begin)]))
            counts[0] += here - counts.sum()
            full = counts > 0
            runs.append(np.stack([np.full(full.sum(), part), np.full(full.sum(), granule), owners[full], counts[full]]))
    columns = np.concatenate(runs, 1)
    return Census(
        part=columns[0],
        granule=columns[1],
        target=columns[2],
        rows=columns[3],
        counted=np.arange(len(parts)),
        misplaced=np.zeros(len(parts), np.int64),
        id_sum=np.zeros(len(parts), np.uint64),
    )
