"""The shards of a plan as a source: for tables whose rows go by number, which RecIS's index does not name."""

from __future__ import annotations

import dataclasses

import numpy as np

from dist_export.checkpoint.reader import ABSENT, Blocks, Checkpoint, Parts, SourceFile, TableMeta
from dist_export.layout.recis import ID_SLOT
from dist_export.plan.shards import SparsePlan
from dist_export.storage import Directory


def describe_written(plan: SparsePlan, target: Directory) -> Checkpoint:
    """Return the metadata of what ``target`` holds, by the plan: the check has found the files' headers equal to it. Any rank."""
    blocks = plan.blocks
    tables, columns, files, offsets = [], [], [], []
    width = 1 + max((len(plan.slots_of(table)) for table in range(len(plan.checkpoint.tables))), default=0)
    for number, meta in enumerate(plan.checkpoint.tables):
        kept = [slot for slot in plan.slots_of(number) if slot.name != ID_SLOT]
        first = plan.blocks_of(number, kept[0].column)
        slots = [meta.slots[0], *(slot for slot in kept)]
        tables.append(
            TableMeta(
                name=meta.name,
                slots=tuple(dataclasses.replace(slot, column=column) for column, slot in enumerate(slots)),
                is_hashed=meta.is_hashed,
                has_ids=meta.is_hashed,
            )
        )
        begin = blocks.begin[first]
        columns.append(
            np.stack([np.full_like(begin, number), begin, blocks.end[first], blocks.size[first], blocks.rows[first]])
        )
        file = np.full((len(first), width), ABSENT, np.int32)
        offset = np.zeros((len(first), width), np.int64)
        for column, slot in enumerate(slots):
            if column or meta.is_hashed:
                its = plan.blocks_of(number, slot.column)
                file[:, column], offset[:, column] = blocks.file[its], blocks.offset[its]
        files.append(file)
        offsets.append(offset)
    table, begin, end, size, rows = np.concatenate(columns, axis=1)
    place = np.concatenate(files)
    return Checkpoint(
        format="recis",
        directory=target,
        files=tuple(
            SourceFile(name=file.name, size=file.num_bytes, version=target.stat(file.name).version)
            for file in plan.files
        ),
        tables=tuple(tables),
        parts=Parts(table=table, begin=begin, end=end, size=size, rows=rows, first_row=begin),
        blocks=Blocks(file=place, offset=np.concatenate(offsets), key=np.full(place.shape, None, object)),
        dense=(),
        fingerprint="",
        copy_hindrances=(),
        verbatim={},
        warnings=(),
    )
