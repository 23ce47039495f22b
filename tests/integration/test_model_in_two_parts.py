"""A model in one piece is given a sparse and a dense arch as docs/reference/model.md says, and its checkpoint stays."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export.errors import ModelError
from tests.support import exports

PAGE = Path(__file__).parents[2] / "docs/reference/model.md"


class Shop(nn.Module):
    """The model of the page before it had two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.user_emb = nn.Embedding(50, 4)
        self.item_emb = nn.Embedding(60, 4)
        self.head = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        rows = torch.cat([self.user_emb(batch["user"]), self.item_emb(batch["item"])], dim=1)
        return torch.sigmoid(self.head(rows))


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    torch.manual_seed(7)
    trained = Shop().eval()
    torch.save({"model": trained.state_dict()}, tmp_path / "model.pt")
    return trained


def draw(count: int, seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randint(rows, (count,), generator=random) for name, rows in (("user", 50), ("item", 60))}


def test_the_model_of_the_page_scores_as_the_one_that_was_trained(shop: Shop, tmp_path: Path) -> None:
    """Its tables and parameters have the names of the checkpoint."""
    section = PAGE.read_text().split("## A model without the two parts")[1]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    names = {"nn": nn, "torch": torch}
    exec(found[1], names)
    dist_export.Exporter(
        model=names["Model"](),
        dataset=[draw(6, 0)],
        ckpt_dir=str(tmp_path / "model.pt"),
        export_dir=str(tmp_path / "out"),
        sparse_model_name="tables",
        dense_model_name="head",
    ).export()
    batch = draw(40, 1)
    with dist_export.open_package(str(tmp_path / "out")) as package:
        (scores,) = package.score({name: ids.numpy() for name, ids in batch.items()}).values()
    np.testing.assert_allclose(scores, shop(batch).detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize(("sparse", "says"), [("sparse_arch", "give the model these two parts"), ("user_emb", None)])
def test_a_model_in_one_piece_is_told_what_to_do(shop: Shop, tmp_path: Path, sparse: str, says: str | None) -> None:
    """Whether the name is wrong or is that of a table."""
    exporter = exports.exporter(
        model=shop,
        dataset=[draw(6, 0)],
        ckpt_dir=str(tmp_path / "model.pt"),
        export_dir=str(tmp_path / "out"),
        sparse_model_name=sparse,
        dense_model_name="head",
    )
    with pytest.raises(
        ModelError, match=says or "sparse_model_name is to name the one around it, which gets the batch"
    ):
        exporter.export()
    assert not (tmp_path / "out").exists()
