"""A new dense part over the tables of a base on two ranks, of a sparse arch that is collective: what one rank makes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export.api import Exporter
from tests.support import sharded_model
from tests.support.deltas import manifest_of
from tests.support.distributed.ranks import run_ranks
from tests.support.recis_writer import write_checkpoint

pytestmark = pytest.mark.distributed


OWN = sharded_model.trained_dense


def trained_later() -> nn.Module:
    dense = OWN()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(0.125)
    return dense


def write_later(directory: Path) -> None:
    """Save a later checkpoint, with other rows and another dense arch."""
    tables = {
        name: [dataclasses.replace(part, slots={slot: rows + 1 for slot, rows in part.slots.items()}) for part in parts]
        for name, parts in sharded_model.tables().items()
    }
    state = {f"dense_arch.{name}": tensor for name, tensor in trained_later().state_dict().items()}
    write_checkpoint(directory, tables, model_state=state)


def export(rank: int, folder: str, name: str, *, is_base: bool) -> None:
    more = {"filter_sparse_opt": True} if is_base else {"base": f"{folder}/base", "need_export_sparse": False}
    source = "before" if is_base else "after"
    given = [sharded_model.Model(), "sparse_arch", "dense_arch", [(False, sharded_model.batch_of(7, 0))]]
    exporter = Exporter(*given, f"{folder}/{source}", f"{folder}/{name}", score_program="require", **more)
    exporter.export(progress=False)


def export_both(rank: int, folder: str) -> None:
    export(rank, folder, "base", is_base=True)
    export(rank, folder, "two", is_base=False)


def test_two_ranks_give_the_scores_of_the_new_dense_arch_on_the_base_s_rows(tmp_path: Path, monkeypatch) -> None:
    sharded_model.write_source(tmp_path / "before")
    write_later(tmp_path / "after")
    run_ranks(export_both, 2, tmp_path / "store", str(tmp_path), timeout=240)
    monkeypatch.setattr(sharded_model, "trained_dense", trained_later)
    batch = sharded_model.batch_of(9, 5)
    with dist_export.open_package(tmp_path / "two") as package:
        scores, expected = package.score(batch), sharded_model.expected_scores(batch)
    assert scores.keys() == expected.keys()
    for name, found in scores.items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=1e-6)
    for table in manifest_of(tmp_path / "two")["tables"]:
        assert table["rows_out"] == 0
        assert table["delta"]["same"] == table["delta"]["rows_base"] > 0
