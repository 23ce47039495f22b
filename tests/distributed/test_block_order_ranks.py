"""Blocks, their order and their constants, where every rank's sparse arch gives its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_export.errors import DistExportError
from tests.distributed.test_dense_ranks import CollectiveSparse, Dense, Model, batches, make_exporter, write_source
from tests.support.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed


class Changed(CollectiveSparse):
    """Collective, and its blocks go through a function of the rank and the batch."""

    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        blocks = super().forward(batch)
        return self.fn(blocks, dist.get_rank())


class Concatenates(Dense):
    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scores = self.last(self.norm(self.first(torch.cat([x for x in inputs.values() if torch.is_tensor(x)], 1))))
        return {"ctr": scores[:, 0]}


def by_rank(blocks: dict[str, Any], rank: int) -> dict[str, Any]:
    return blocks if rank == 0 else dict(reversed(blocks.items()))


CASES = {
    "order matters": (by_rank, Concatenates, "batch 0 of rank 1 in the order price, user"),
    "order does not matter": (by_rank, Dense, ""),
    "constant": (lambda blocks, rank: {**blocks, "scale": 2.0}, Concatenates, ""),
    "rank": (lambda blocks, rank: {**blocks, "rank": rank}, Concatenates, "'rank' as 0 for one batch and as 1"),
    "size": (
        lambda blocks, rank: {**blocks, "n": len(blocks["user"])},
        Concatenates,
        "'n' as 5 for one batch and as 2",
    ),
    "one rank alone": (
        lambda blocks, rank: {**blocks, "more": blocks["price"]} if rank else blocks,
        Dense,
        "'more' for one batch and not for another",
    ),
}


def export_each(rank: int, folder: str) -> dict[str, str]:
    """Return by case what the export said, nothing where it went well."""
    found = {}
    for place, (name, (fn, dense, _)) in enumerate(CASES.items()):
        model: nn.Module = Model()
        model.sparse, model.dense = Changed(fn), dense()
        try:
            manifest = make_exporter(model, batches(rank), folder, f"out{place}").export()
            found[name] = ""
            assert manifest.dense is not None
            assert manifest.dense.input_order == ("user", "price")
        except DistExportError as error:
            found[name] = str(error)
            assert error.exit_code == 2
    return found


def test_every_rank_and_batch_must_give_the_same(tmp_path: Path) -> None:
    write_source(tmp_path / "ckpt", "dense.")
    for found in run_ranks(export_each, 2, tmp_path / "store", str(tmp_path), timeout=300):
        for name, (_, _, told) in CASES.items():
            assert (told in found[name]) if told else found[name] == "", f"{name}: {found[name]}"
