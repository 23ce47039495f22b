"""Tables that share a weight in the model, with settings of their own: the drift is that of two tables, or is not stated.

The truth is two separate tables in plain torch, one side with the trained rows, the other one with those of the package.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import dist_export
from dist_export.errors import DriftError, ModelError
from dist_export.manifest import Manifest
from tests.support import exports

ROWS, DIM = 50, 4
USER, ITEM = "sparse_arch.user.weight", "sparse_arch.item.weight"


class Two(nn.Module):
    """Looks the tables up in turns: what was put there for one is the other one's, too, if they are tied."""

    def __init__(self, *, is_tied: bool) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(ROWS, DIM), nn.Embedding(ROWS, DIM)
        if is_tied:
            self.item.weight = self.user.weight

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        self.user(ids)
        item = self.item(ids)
        return {"user": self.user(ids), "item": item}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * DIM, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.linear(torch.cat([blocks["user"], blocks["item"]], dim=1))


class Model(nn.Module):
    def __init__(self, *, is_tied: bool = True) -> None:
        super().__init__()
        self.sparse_arch = Two(is_tied=is_tied)
        self.dense_arch = Dense()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.dense_arch(self.sparse_arch(ids))


BATCHES = [torch.arange(first, first + 16) for first in (0, 10, 20)]


def build(seed: int) -> Model:
    torch.manual_seed(seed)
    return Model()


def export(model: Model, out: Path, ckpt_dir: str | None, **settings: Any) -> Manifest:
    more = {} if ckpt_dir is None else {"filter_sparse_opt": True}
    exporter = exports.exporter(
        model, "sparse_arch", "dense_arch", iter(BATCHES), ckpt_dir, str(out), **more, **settings
    )
    return exporter.export(progress=False)


def true_drift(trained: Model, out: Path) -> float:
    state = trained.state_dict()
    own, served = Model(is_tied=False), Model(is_tied=False)
    own.load_state_dict(copy.deepcopy(state))
    served.load_state_dict(copy.deepcopy(state))
    package = dist_export.open_package(out)
    with torch.no_grad():
        for name in (USER, ITEM):
            rows, _ = package.lookup(name, np.arange(ROWS))
            dict(served.named_parameters())[name].copy_(torch.from_numpy(np.array(rows, np.float32)))
        return max(float((own(ids) - served(ids)).abs().max()) for ids in BATCHES)


@pytest.mark.parametrize("table", ["*user*", "*item*"])
@pytest.mark.parametrize("how", ["cast", "prune"])
def test_the_drift_is_that_of_two_tables(how: str, table: str, tmp_path: Path) -> None:
    prune = {"to_hash_tables": ["*"], "prune": [{"tables": table, "norm_at_most": 1.8}]}
    settings = {"dtype": {table: "int8"}} if how == "cast" else prune
    trained = build(2)
    torch.save(trained.state_dict(), tmp_path / "ckpt.pt")
    manifest = export(build(7), tmp_path / "out", str(tmp_path / "ckpt.pt"), **settings)
    assert manifest.drift is not None
    ((_, drift),) = manifest.drift.outputs.items()
    expected = true_drift(trained, tmp_path / "out")
    assert expected > 1e-5
    assert drift.max_abs == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("table", ["*user*", "*item*"])
def test_a_model_in_memory_has_one_row_for_both(table: str, tmp_path: Path) -> None:
    """A pruned id's default row would be the other table's row too: the drift was stated as 0."""
    settings = {"to_hash_tables": ["*"], "prune": [{"tables": table, "norm_at_most": 1.8}]}
    manifest = export(build(2), tmp_path / "out", None, **settings)
    assert manifest.drift is not None
    assert not manifest.drift.outputs
    assert "no default row can be put in for pruned ids" in manifest.drift.not_measured
    with pytest.raises(DriftError, match="cannot be measured"):
        export(build(2), tmp_path / "bound", None, max_drift=10.0, **settings)
    assert not (tmp_path / "bound" / "manifest.json").exists()


@pytest.mark.parametrize("table", ["*user*", "*item*"])
def test_a_cast_of_one_name_of_a_model_in_memory(table: str, tmp_path: Path) -> None:
    """The second name was looked up in memory that had the first one's cast rows: a ParityError."""
    model = build(2)
    trained = copy.deepcopy(model)
    manifest = export(model, tmp_path / "out", None, dtype={table: "int8"})
    assert manifest.drift is not None
    ((_, drift),) = manifest.drift.outputs.items()
    expected = true_drift(trained, tmp_path / "out")
    assert expected > 1e-5
    assert drift.max_abs == pytest.approx(expected, rel=1e-3)
    assert torch.equal(model.sparse_arch.user.weight, trained.sparse_arch.user.weight)


@pytest.mark.parametrize("kept", [USER, ITEM])
@pytest.mark.parametrize("how", ["torch", "dcp"])
def test_a_checkpoint_that_has_one_of_the_names(how: str, kept: str, tmp_path: Path) -> None:
    """The account counted the tensor under neither name where the kept one sorts last: it asked for a report."""
    state = {name: value for name, value in build(2).state_dict().items() if name not in {USER, ITEM} - {kept}}
    if how == "torch":
        torch.save(state, tmp_path / "ckpt.pt")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state, checkpoint_id=tmp_path / "ckpt.pt", no_dist=True)
    manifest = export(build(7), tmp_path / "out", str(tmp_path / "ckpt.pt"))
    assert {table.name for table in manifest.tables} == {USER, ITEM}
    assert manifest.drift is not None
    assert [drift.max_abs for drift in manifest.drift.outputs.values()] == [0.0]


@pytest.mark.parametrize("row", [0, 49])
def test_two_values_for_one_weight_are_refused_by_name(row: int, tmp_path: Path) -> None:
    """The sample had the rows of either, as the lookups went; the trained model held one of them for both."""
    state = {name: value.clone() for name, value in build(2).state_dict().items()}
    state[ITEM][row, 2] += 1
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(ModelError, match=rf"'{ITEM}' and '{USER}', but .*first in row {row}:"):
        export(build(7), tmp_path / "out", str(tmp_path / "ckpt.pt"))
    assert not (tmp_path / "out").exists()


class Functional(Two):
    """Looks rows up past the modules: whose name they are read by is not to be seen."""

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"user": nn.functional.embedding(ids, self.user.weight), "item": self.item.weight[ids]}


@pytest.mark.parametrize("table", ["*user*", "*item*", "*"])
def test_a_read_past_the_modules_may_be_of_either_table(table: str, tmp_path: Path) -> None:
    """It was taken for one of the first table: the drift was that of its settings on both sides, or 0."""
    torch.save(build(2).state_dict(), tmp_path / "ckpt.pt")
    model = build(7)
    model.sparse_arch.__class__ = Functional
    manifest = export(model, tmp_path / "out", str(tmp_path / "ckpt.pt"), dtype={table: "int8"})
    assert manifest.drift is not None
    if table == "*":
        assert max(drift.max_abs for drift in manifest.drift.outputs.values()) > 1e-5
    else:
        assert "have one weight in the model" in manifest.drift.not_measured
