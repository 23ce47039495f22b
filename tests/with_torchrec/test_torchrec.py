"""Checkpoints that torchrec itself writes here, on real ranks. Skipped where torchrec is not installed (extra ``torchrec``)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_export
from dist_export.checkpoint.dcp.dense import DcpDense
from dist_export.checkpoint.model_weights import merge_weights
from dist_export.storage.urls import open_directory
from tests.support.distributed.ranks import run_ranks
from tests.support.package_reader import read_row_tables

SIZES = {"t_rows": (101, 8), "t_columns": (60, 24), "t_whole": (33, 4), "t_table_rows": (50, 8), "t_copied": (21, 4)}
SEQUENCE = "ec.embeddings.t_sequence.weight"
REQUIRED = "DIST_EXPORT_REQUIRE_TORCHREC"
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.torchrec,
    pytest.mark.skipif(
        importlib.util.find_spec("torchrec") is None and os.environ.get(REQUIRED) != "1",
        reason="torchrec is not installed",
    ),
]


def save_on_rank(rank: int, path: str) -> Any:
    """Import torchrec on the ranks alone: it warns of much, and a warning is an error here."""
    from tests.support.with_torchrec.torchrec_writer import train_and_save

    return train_and_save(rank, path, SIZES)


def find_on_rank(rank: int) -> Any:
    from tests.support.with_torchrec.torchrec_writer import find_sharded

    return find_sharded(rank, SIZES)


def test_a_sharded_model_tells_its_tables(tmp_path: Path) -> None:
    """Each of them, whatever rank holds it: all ranks come to the same names."""
    found = run_ranks(find_on_rank, 2, tmp_path / "store", timeout=240)
    tables = {f"ebc.embedding_bags.{name}.weight" for name in SIZES} | {SEQUENCE}
    assert merge_weights(found).tables == tables


def put_together(ranks: list[Any]) -> dict[str, torch.Tensor]:
    """Return each tensor as a whole."""
    whole: dict[str, torch.Tensor] = {}
    for pieces in ranks:
        for name, (shape, held) in pieces.items():
            tensor = whole.setdefault(name, torch.full(shape, torch.nan))
            for offsets, values in held:
                tensor[tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))] = values
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_sharding_of_torchrec_exports(world_size: int, tmp_path: Path) -> None:
    """Rows, columns, whole tables, rows of one host, copies: weights, the state that goes with rows, and dense parameters."""
    found = run_ranks(save_on_rank, world_size, tmp_path / "store", str(tmp_path / "ckpt"), timeout=240)
    truth = put_together(found)
    tables = {f"ebc.embedding_bags.{name}.weight": name for name in SIZES} | {SEQUENCE: "t_sequence"}
    kept = [f"{table}.momentum1" for table, name in tables.items() if name not in ("t_columns", "t_copied")]
    for num_shards in (1, 2, 4, "source"):
        package = tmp_path / str(num_shards)
        dist_export.export(
            {
                "ckpt_dir": str(tmp_path / "ckpt"),
                "export_dir": str(package),
                "filter_sparse_opt": True,
                "num_shards": num_shards,
                "keep_slots": kept,
            }
        )
        exported = read_row_tables(package)
        assert set(exported) == {(t, "embedding") for t in tables} | {(k.rpartition(".")[0], "momentum1") for k in kept}
        for (table, slot), rows in exported.items():
            assert torch.equal(rows, truth[table if slot == "embedding" else f"{table}|{slot}"]), (table, slot)
    dense = DcpDense(open_directory(tmp_path / "ckpt")).load()
    assert {name: values.shape for name, values in dense.items()} == {
        name: truth[name].shape for name in ("mlp.weight", "mlp.bias")
    }
