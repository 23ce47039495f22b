"""Where no setting changes a row, batches after the sample must give the model's own scores; else they are drift."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dist_export.dense import hash_feed
from dist_export.errors import ParityError
from tests.integration.test_drift_export import ITEM_IDS, USER_IDS, batch_of, batches, export
from tests.support import tiny_model

WRONG = r"'ctr': the written program on batch 2 differs from the dense arch in model\(batch\)"


class OddFromSeven(tiny_model.DenseArch):
    """Takes another way for batches of seven or more, which neither the trace nor the sample sees."""

    def forward(self, blocks):
        scores = super().forward(blocks)
        if not torch.compiler.is_compiling() and blocks["price"].shape[0] >= 7 and not blocks["price"][6, 0] <= 1:
            return {name: score + 0.1 for name, score in scores.items()}
        return scores


class Whole(tiny_model.TinyModel):
    def between(self, blocks):
        return blocks

    def forward(self, batch):
        return self.dense_arch(self.between(self.sparse_arch(batch)))["ctr"].mean()


class Clipping(Whole):
    """Changes the blocks where a price is high, as it is in the second batch alone."""

    def between(self, blocks):
        return {**blocks, "price": blocks["price"].clamp(max=1.5)}


def model_of(kind=Whole, dense: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(7)
    model = kind()
    model.dense_arch = dense or model.dense_arch
    return model


def data(highest: float) -> list[dict[str, torch.Tensor]]:
    later = batch_of(USER_IDS[6:14])
    return [batch_of(USER_IDS[:6]), {**later, "price": later["price"] * highest}]


@pytest.mark.parametrize("highest", [1.0, 3.0])
def test_a_branch_that_a_later_batch_takes_fails_the_export(highest: float, tmp_path: Path) -> None:
    model = model_of(dense=OddFromSeven())
    if highest == 1.0:
        assert export(tmp_path, data(highest), model=model).drift.batches == 2
        return
    with pytest.raises(ParityError, match=WRONG) as caught:
        export(tmp_path, data(highest), model=model)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_it_is_drift_where_a_setting_changes_rows(tmp_path: Path) -> None:
    drift = export(tmp_path, data(3.0), model=model_of(dense=OddFromSeven()), dtype={"user_emb": "bfloat16"}).drift
    assert drift.outputs["ctr"].max_abs > 0.09


def test_the_error_says_what_the_model_does_between_its_arches(tmp_path: Path) -> None:
    with pytest.raises(
        ParityError, match=WRONG + r".*In the model, 'price' is changed between the sparse arch and the"
    ):
        export(tmp_path, data(3.0), model=model_of(Clipping))


def test_rows_of_a_later_batch_that_the_package_gives_otherwise_fail_the_export(tmp_path: Path, monkeypatch) -> None:
    """Ids that the sample has not, so that no row of the sample tells."""
    real = hash_feed.HashFeed._insert

    def insert(self, name, held, rows):
        is_written = self._finder._source.is_written
        return real(
            self, name, held, torch.where(torch.from_numpy(held == USER_IDS[9])[:, None] & is_written, -rows, rows)
        )

    monkeypatch.setattr(hash_feed.HashFeed, "_insert", insert)
    with pytest.raises(ParityError, match=WRONG):
        export(tmp_path, data(1.0), model=model_of())


def test_a_later_batch_without_tables_in_the_package_is_held_to_it_too(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=WRONG):
        export(tmp_path, data(3.0), model=model_of(dense=OddFromSeven()), need_export_sparse=False)


class OverTheBatch(tiny_model.DenseArch):
    """Scores that depend on all rows of their batch."""

    def forward(self, blocks):
        return {name: score / score.mean(0, keepdim=True) for name, score in super().forward(blocks).items()}


def test_a_part_of_a_batch_proves_nothing_where_scores_depend_on_all_of_it(tmp_path: Path) -> None:
    sizes = [batch_of(USER_IDS[:6]), batch_of(USER_IDS[6:18])]
    drift = export(tmp_path, sizes, model=model_of(dense=OverTheBatch()), max_batch_size=8).drift
    assert drift.batches == 2
    assert drift.outputs["ctr"].max_abs > 1e-4
    with pytest.raises(ParityError, match="differs from the dense arch"):  # of the sample it is known
        export(tmp_path, sizes[::-1], model=model_of(dense=OverTheBatch()), max_batch_size=8, overwrite=True)


class Cancelling(tiny_model.DenseArch):
    """Logits of up to a thousand, and some near zero whose last bits are rounding."""

    def forward(self, blocks):
        scores = super().forward(blocks)
        nudge = 1e-4 if torch.compiler.is_compiling() or torch.compiler.is_exporting() else 0.0
        price = blocks["price"]
        return {"ctr": (price - 1) * 1000 + nudge * (price > 0.9), "like": scores["like"]}


@pytest.mark.parametrize("atol", [1e-3, 1e-6])
def test_rounding_near_zero_is_allowed_by_the_usual_size_and_by_atol(atol: float, tmp_path: Path) -> None:
    first, later = batch_of(USER_IDS[:6], ITEM_IDS[:6]), batches(2)[1]
    first["price"] = first["price"] / 2
    manifest = export(tmp_path, [first, later], model=model_of(dense=Cancelling()), atol=atol)
    assert 1e-5 < manifest.drift.outputs["ctr"].max_abs < 2e-4
