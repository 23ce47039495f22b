"""Sizes in the score program: which of them are inputs, which are free, and how this is compared with the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export.api import Exporter
from dist_export.dense.used_inputs import find_used_inputs
from dist_export.errors import ModelError
from dist_export.score import trace
from tests.support import score_models as models

Batch = dict[str, torch.Tensor]


class Listed(nn.Module):
    """Two tables; ``divide`` gives the number by which the sum of a list is divided."""

    def __init__(self, divide: Callable[[Batch], Any]) -> None:
        super().__init__()
        self.user = nn.Embedding(models.ROWS, models.DIM)
        self.clicks = nn.Embedding(models.ROWS, models.DIM)
        self.divide = divide

    def forward(self, batch: Batch) -> Batch:
        clicks = self.clicks(batch["clicks"]).sum(1) / self.divide(batch)
        return {"user": self.user(batch["user"]), "clicks": clicks, "price": batch["price"]}


def batch_of(num_examples: int, length: int) -> Batch:
    random = torch.Generator().manual_seed(num_examples)
    return {
        "user": torch.randint(0, models.ROWS, (num_examples,), generator=random),
        "clicks": torch.randint(0, models.ROWS, (num_examples, length), generator=random),
        "mask": torch.ones(num_examples, length, dtype=torch.int64),
        "weights": torch.ones(num_examples, length),
        "price": torch.rand(num_examples, 1, generator=random),
    }


def run(tmp_path: Path, divide: Callable[[Batch], Any], dataset: list[Batch]) -> tuple[dist_export.Package, nn.Module]:
    build = lambda: models.Model(Listed(divide), 2 * models.DIM + 1)
    trained = models.train(build())
    checkpoint = models.save(trained, tmp_path / "model.pth")
    Exporter(
        build(), "sparse_arch", "dense_arch", dataset, checkpoint, tmp_path / "out", score_program="require"
    ).export(progress=False)
    return dist_export.open_package(tmp_path / "out"), trained


def assert_scores(package: dist_export.Package, trained: nn.Module, batch: Batch) -> None:
    with torch.no_grad():
        expected = trained(batch)["ctr"].numpy()
    np.testing.assert_allclose(package.score(batch)["ctr"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mask", "weights"])
def test_an_input_stays_if_only_its_size_is_used(tmp_path: Path, name: str) -> None:
    package, trained = run(tmp_path, lambda batch: batch[name].shape[1], [batch_of(6, 3)])
    assert name not in package.manifest.score.dropped_inputs
    for length in (1, 5, 9):
        assert_scores(package, trained, batch_of(4, length))


def test_an_input_stays_if_the_code_only_compares_its_size(tmp_path: Path) -> None:
    package, trained = run(tmp_path, lambda batch: 2 if batch["mask"].shape[1] > 4 else 1, [batch_of(6, 3)])
    assert package.manifest.score.dropped_inputs == ("weights",)
    assert package.manifest.score.conditions == ("mask_size_1 <= 4",)
    assert_scores(package, trained, batch_of(3, 2))
    with pytest.raises(dist_export.UserError, match="refuses inputs of these shapes"):
        package.score(batch_of(3, 9))


@pytest.mark.parametrize(
    ("dataset", "told"),
    [([batch_of(6, 3)], "with longer lists"), ([batch_of(6, 3), batch_of(4, 5)], "on batch 2")],
    ids=["one", "two"],
)
def test_a_wrong_size_contradicts_the_program(tmp_path: Path, monkeypatch, dataset: list[Batch], told: str) -> None:
    """Further batches are compared also where the sample can be cut; of one batch, the lists get other lengths."""
    monkeypatch.setattr(trace, "find_needed", lambda program, *_, **__: find_used_inputs(program, {}))
    if len(dataset) > 1:
        monkeypatch.setattr("dist_export.score.stage.find_free_lists", lambda *_: [])
    with pytest.raises(ModelError, match=f"output 'ctr' {told}: the score program differs from the model"):
        run(tmp_path, lambda batch: batch["mask"].shape[1], dataset)


def test_a_branch_on_sizes_is_stated_and_other_sizes_are_refused(tmp_path: Path) -> None:
    def divide(batch: Batch) -> int:
        is_longer = batch["clicks"].shape[1] < batch["mask"].shape[1]
        return (2 if batch["user"].shape[0] > 1000 else 1) + is_longer

    package, trained = run(tmp_path, divide, [batch_of(6, 3)])
    conditions = package.manifest.score.conditions
    assert conditions == ("batch <= 1000", "clicks_size_1 >= mask_size_1")
    assert any("takes only sizes with batch <= 1000, clicks_size_1" in note for note in package.manifest.notes)
    assert_scores(package, trained, batch_of(1000, 2))
    with pytest.raises(dist_export.UserError, match="refuses inputs of these shapes"):
        package.score(batch_of(1001, 2))


def test_sizes_without_a_branch_have_no_condition(tmp_path: Path) -> None:
    package, _ = run(tmp_path, lambda _: 1, [batch_of(6, 3)])
    assert package.manifest.score.conditions == ()
    assert not any("takes only sizes" in note for note in package.manifest.notes)


class Broadcast(nn.Module):
    """``change`` makes the price of the batch."""

    def __init__(self, change: Callable[[Batch], torch.Tensor]) -> None:
        super().__init__()
        self.user, self.clicks = (nn.Embedding(models.ROWS, models.DIM) for _ in range(2))
        self.change = change

    def forward(self, batch: Batch) -> Batch:
        clicks = self.clicks(batch["clicks"]).sum(1)
        return {"user": self.user(batch["user"]), "clicks": clicks, "price": self.change(batch)}


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: (batch["price"][:, 0] * batch["weight_of_all"])[:, None],
        lambda batch: batch["price"] * batch["weight_of_all"],
        lambda batch: batch["price"] * len(batch["clicks"][batch["clicks"] > 3]),
        lambda batch: batch["price"] * batch["price"][batch["price"] > 0.5].shape[0],
        lambda batch: batch["price"] / len(torch.nonzero(batch["clicks"] > 3)),
    ],
    ids=["of one vector", "of one matrix", "length of a mask", "size of a mask", "nonzero"],
)
def test_sizes_of_values_and_of_one_are_scored_as_the_model_does_or_not_at_all(change, tmp_path: Path) -> None:
    """A note says why there is no program."""
    batch = lambda *sizes: {**batch_of(*sizes), "weight_of_all": torch.tensor([1.7])}
    build = lambda: models.Model(Broadcast(change), 2 * models.DIM + 1)
    trained = models.train(build())
    checkpoint = models.save(trained, tmp_path / "model.pth")
    given = [build(), "sparse_arch", "dense_arch", [batch(6, 3)], checkpoint, tmp_path / "out"]
    manifest = Exporter(*given).export(progress=False)
    package = dist_export.open_package(tmp_path / "out")
    if not manifest.score:
        assert any(note.startswith("the package has no score program: ") for note in manifest.notes)
        return
    for num_examples, length in ((6, 3), (1, 3), (2, 5), (9, 1), (1, 1)):
        assert_scores(package, trained, batch(num_examples, length))
