"""Hash tables whose ``forward`` does more than look rows up: the caller's rows stay, and no wrong drift is stated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dist_export
from dist_export.manifest import Manifest
from tests.support import exports, tiny_model

Base = tiny_model.LookalikeTable
USERS, ITEMS = (
    {int(i): row for part in parts for i, row in zip(part.ids, part.slots["embedding"], strict=True)}
    for parts in tiny_model.tables().values()
)


class Doubled(Base):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 2


class Normalised(Base):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.normalize(super().forward(ids), dim=-1)


class WithEmbeddings(Doubled):
    def embeddings(self) -> torch.Tensor:
        return torch.stack([self._rows[i] for i in self.ids().tolist()])


class Pooled(Base):
    """Takes bags of ids (n, m) and gives the sum of their rows."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).sum(dim=-2) if ids.dim() == 2 else super().forward(ids)


class BagsOnly(Base):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.dim() != 2:
            raise ValueError("bags of ids")
        return super().forward(ids).sum(dim=-2)


class Memo(Base):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.memo: dict[int, torch.Tensor] = {}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = super().forward(ids).reshape(-1, tiny_model.DIM)
        kept = [self.memo.setdefault(i, row) for i, row in zip(ids.reshape(-1).tolist(), rows, strict=True)]
        return torch.stack(kept).reshape(*ids.shape, tiny_model.DIM)


class Sparse(nn.Module):
    def __init__(self, kind: type[Base]) -> None:
        super().__init__()
        self.user, self.item = kind("user_emb"), Base("item_emb")

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"user": self.user(batch["user"]), "item": self.item(batch["item"]), "price": batch["price"]}


class Model(nn.Module):
    def __init__(self, kind: type[Base]) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.sparse_arch = Sparse(kind)
        self.dense_arch = tiny_model.DenseArch()


def batches(kind: type[Base], num: int = 2) -> list[dict[str, torch.Tensor]]:
    is_bags = kind in (Pooled, BagsOnly)
    found = []
    for number in range(num):
        chosen = np.random.default_rng(number)
        users = chosen.choice(list(USERS), (16, 3) if is_bags else 16)
        items = chosen.choice(list(ITEMS), 16)
        price = torch.linspace(0, 1, 16).reshape(16, 1)
        found.append({"user": torch.from_numpy(users), "item": torch.from_numpy(items), "price": price})
    return found


def export(model: Model, kind: type[Base], tmp_path: Path, **settings: Any) -> Manifest:
    tiny_model.write_tiny_checkpoint(tmp_path / "ck")
    data = iter(batches(kind))
    exporter = exports.exporter(
        model,
        "sparse_arch",
        "dense_arch",
        data,
        str(tmp_path / "ck"),
        str(tmp_path / "out"),
        filter_sparse_opt=True,
        **settings,
    )
    return exporter.export(progress=False)


@torch.no_grad()
def true_drift(model: Model, kind: type[Base], out: Path) -> float:
    """Return the difference of two models in plain torch, with the checkpoint's rows and with those of the package."""
    model.dense_arch.load_state_dict(
        {k.removeprefix("dense_arch."): v for k, v in tiny_model.trained_dense_state().items()}
    )
    model.eval()
    package = dist_export.open_package(out)
    own, served = kind("user_emb"), kind("user_emb")
    for number, row in USERS.items():
        own.insert(torch.tensor([number]), torch.from_numpy(row)[None])
        served.insert(
            torch.tensor([number]), torch.from_numpy(np.array(package.lookup("user_emb", [number])[0], np.float32))
        )
    worst = 0.0
    for batch in batches(kind):
        items = torch.from_numpy(np.stack([ITEMS[i] for i in batch["item"].tolist()]))
        scores = [
            model.dense_arch({"user": table(batch["user"]), "item": items, "price": batch["price"]})
            for table in (own, served)
        ]
        worst = max(worst, *(float((scores[0][name] - scores[1][name]).abs().max()) for name in scores[0]))
    return worst


PRUNE = {"prune": [{"tables": "user_emb", "norm_at_most": 1.8}], "default_row": {"user_emb": [1.0, 2.0, 3.0, 4.0]}}


@pytest.mark.parametrize("settings", [{"dtype": {"user_emb": "int8"}}, PRUNE], ids=["cast", "prune"])
@pytest.mark.parametrize("kind", [Base, Doubled, Normalised, Pooled, BagsOnly])
def test_the_drift_is_that_of_the_rows(kind: type[Base], settings: dict[str, Any], tmp_path: Path) -> None:
    """A pooled table with pruned ids ended in a ParityError: the reference had left their rows in the table."""
    model = Model(kind)
    manifest = export(model, kind, tmp_path, **settings)
    assert manifest.drift is not None
    expected = true_drift(model, kind, tmp_path / "out")
    assert expected > 1e-5
    assert max(drift.max_abs for drift in manifest.drift.outputs.values()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", [Base, Doubled, Normalised, WithEmbeddings, Pooled])
def test_the_callers_rows_stay(kind: type[Base], tmp_path: Path) -> None:
    """What ``forward`` had given was put back as the row: each export doubled the rows."""
    model = Model(kind)
    ids = torch.tensor(list(USERS)[:30])
    model.sparse_arch.user.insert(ids, torch.full((30, 4), 3.0))
    manifest = export(model, kind, tmp_path, dtype={"user_emb": "int8"})
    assert all(torch.equal(model.sparse_arch.user._rows[i], torch.full((4,), 3.0)) for i in ids.tolist())
    assert manifest.drift is not None
    if kind in (Doubled, Normalised):
        assert "no embeddings() that gives its own" in manifest.drift.not_measured
        assert any("'user_emb'" in note and "no embeddings()" in note for note in manifest.notes)
    else:
        expected = true_drift(model, kind, tmp_path / "out")
        assert max(drift.max_abs for drift in manifest.drift.outputs.values()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("is_warm", [False, True])
def test_a_table_that_keeps_what_it_gave(is_warm: bool, tmp_path: Path) -> None:
    """It gave the rows of the first run ever after: the drift was 0."""
    model = Model(Memo)
    if is_warm:
        model.sparse_arch.user(torch.tensor(list(USERS)))
    manifest = export(model, Memo, tmp_path, dtype={"user_emb": "int8"})
    assert manifest.drift is not None
    assert "'user_emb'" in manifest.drift.not_measured
    assert "rows that it keeps" in manifest.drift.not_measured
