"""The contract of tables that share one coalesced table, and of ids that are looked up once a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dist_export
from dist_export.api import Exporter
from tests.integration.test_score_program import one_table, run
from tests.integration.test_serving_contract import assert_same_inputs, dense_inputs, known_inputs
from tests.support import score_models as models
from tests.support import sharded_model

CHILDREN = ("item", "age", "city")


@pytest.fixture(scope="module")
def coalesced(tmp_path_factory: pytest.TempPathFactory) -> dist_export.Package:
    path = tmp_path_factory.mktemp("coalesced")
    source = sharded_model.write_source(path / "source")
    Exporter(
        sharded_model.Model(), "sparse_arch", "dense_arch", [(False, sharded_model.batch_of(7, 0))], source,
        path / "out", score_program="require", filter_sparse_opt=True,
    ).export(progress=False)  # fmt: skip
    return dist_export.open_package(path / "out")


def row_of(name: str, number: int) -> np.ndarray:
    for part in sharded_model.tables()[f"{name}_emb"]:
        for row in np.flatnonzero(part.ids == number):
            return part.slots["embedding"][row]
    return np.zeros(sharded_model.DIM, np.float32)


def test_the_children_of_a_coalesced_table_are_tables_of_their_own(coalesced: dist_export.Package) -> None:
    assert known_inputs(coalesced) == ["age", "city", "clicks", "item"]
    batch = sharded_model.batch_of(40, 3)
    found = dense_inputs(coalesced, batch)
    for name in CHILDREN:
        expected = np.stack([row_of(name, number) for number in batch[name].tolist()])
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_bits_that_the_arch_takes_out_of_ids_are_taken_out_by_the_contract(coalesced: dist_export.Package) -> None:
    batch = sharded_model.batch_of(9, 4)
    high = {name: batch[name] | (5 << sharded_model.CHILD_SHIFT) if name in CHILDREN else batch[name] for name in batch}
    assert any((high[name] != batch[name]).all() for name in CHILDREN)
    for name, values in dense_inputs(coalesced, high).items():
        np.testing.assert_array_equal(values, dense_inputs(coalesced, batch)[name], err_msg=name)


def _once_a_batch(its: Any, batch: Any) -> torch.Tensor:
    unique, inverse = batch["user"].unique(return_inverse=True)
    return its.table(unique)[inverse]


def _by_how_often(its: Any, batch: Any) -> torch.Tensor:
    unique, inverse, counts = batch["user"].unique(return_inverse=True, return_counts=True)
    return (its.table(unique) * (counts < 300).unsqueeze(-1))[inverse]


def _by_place(its: Any, batch: Any) -> torch.Tensor:
    unique, inverse = batch["user"].unique(return_inverse=True)
    return its.table(unique)[inverse] * (inverse < 300).unsqueeze(-1)


def _apart_within_the_child(its: Any, batch: Any) -> torch.Tensor:
    low = batch["user"] & sharded_model.ID_MASK
    return its.table(low) * (low != 12).unsqueeze(-1)


def test_ids_that_are_looked_up_once_a_batch_are_plain_lookups(tmp_path: Path) -> None:
    package, trained = run(tmp_path, one_table(_once_a_batch))
    assert "block" in known_inputs(package)
    assert_same_inputs(package, trained, models.batch_of(40, seed=3))


@pytest.mark.parametrize("look", [_by_how_often, _by_place, _apart_within_the_child])
def test_what_no_made_up_batch_shows_of_them_is_unknown(tmp_path: Path, look: Any) -> None:
    package, _ = run(tmp_path, one_table(look))
    assert "block" not in known_inputs(package)
