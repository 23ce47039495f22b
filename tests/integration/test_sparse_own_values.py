"""Values that the sparse arch has from the model itself: with others it is not the same export again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_export
from dist_export.errors import ConfigError
from tests.support import exports, tiny_model


class Scaling(nn.Module):
    """Two plain tables, and a number that the dense arch gets as a constant."""

    def __init__(self, hold: Callable[[nn.Module, torch.Tensor], object], value: float) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(50, tiny_model.DIM), nn.Embedding(40, tiny_model.DIM)
        hold(self, torch.tensor(value))
        self.cache: dict[int, torch.Tensor] = {}
        self.locked = [torch.ones(1), threading.Lock()]

    def scale(self) -> float:
        held = next(its for its in (getattr(self, "own", None), getattr(self, "owns", None)) if its is not None)
        return float(held[0] if isinstance(held, list) else held)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        self.cache[len(self.cache)] = torch.ones(3)
        return {"user": self.user(batch["user"]), "item": self.item(batch["item"]), "scale": self.scale()}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(2 * tiny_model.DIM, 1)

    def forward(self, blocks: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"ctr": self.out(torch.cat([blocks["user"], blocks["item"]], 1)) * blocks["scale"]}


KINDS: dict[str, Callable[[nn.Module, torch.Tensor], object]] = {
    "attribute": lambda self, held: setattr(self, "own", held),
    "list": lambda self, held: setattr(self, "owns", [held]),
    "buffer": lambda self, held: self.register_buffer("own", held, persistent=False),
    "saved buffer": lambda self, held: self.register_buffer("own", held),
    "parameter": lambda self, held: setattr(self, "own", nn.Parameter(held)),
}


def build(kind: str, value: float) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Module()
    model.sparse_arch, model.dense_arch = Scaling(KINDS[kind], value), Dense()
    return model


def export(model: nn.Module, folder: Path, **more: object) -> dist_export.Manifest:
    batch = {"user": torch.arange(6), "item": torch.arange(6)}
    return exports.exporter(
        model, "sparse_arch", "dense_arch", [batch], str(folder / "ckpt"), str(folder / "out"), **more
    ).export()


def save(model: nn.Module, folder: Path, *, but: str = "") -> None:
    (folder / "ckpt").mkdir()
    state = {name: value for name, value in model.state_dict().items() if name != but}
    torch.save(state, folder / "ckpt" / "model.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_another_value_is_another_export(kind: str, tmp_path: Path) -> None:
    save(build(kind, 2.0), tmp_path, but="sparse_arch.own")
    allowed = {"allow_missing_dense": ["sparse_arch.own"]} if kind in ("saved buffer", "parameter") else {}
    first = export(build(kind, 2.0), tmp_path, **allowed)
    assert first.run["sparse_own_values"] == ["owns" if kind == "list" else "own"], "tables do not count, nor caches"
    assert "own_values" not in first.run
    assert export(build(kind, 2.0), tmp_path, **allowed) == first, "built again it is the same"
    with pytest.raises(ConfigError, match=r"sparse arch \(run\.sparse_own_values names them\), which are others now"):
        export(build(kind, 7.0), tmp_path, **allowed)
    assert export(build(kind, 7.0), tmp_path, overwrite=True, **allowed).digest != first.digest


@pytest.mark.parametrize("kind", ["saved buffer", "parameter"])
def test_what_the_checkpoint_gives_does_not_count(kind: str, tmp_path: Path) -> None:
    save(build(kind, 5.0), tmp_path)
    first = export(build(kind, 2.0), tmp_path)
    assert "sparse_own_values" not in first.run
    assert export(build(kind, 7.0), tmp_path) == first, "the program has the checkpoint's 5.0"


def test_a_cache_that_the_export_fills_does_not_count(tmp_path: Path) -> None:
    model = build("buffer", 2.0)
    save(model, tmp_path)
    first = export(model, tmp_path)
    assert model.sparse_arch.cache
    assert export(model, tmp_path) == first


def test_rows_of_hash_tables_do_not_count(tmp_path: Path) -> None:
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")

    def run(value: float) -> dist_export.Manifest:
        model = tiny_model.build_model()
        model.sparse_arch.user.insert(torch.tensor([1]), torch.full((1, tiny_model.DIM), value))
        return exports.exporter(
            model, "sparse_arch", "dense_arch", tiny_model.build_dataset(), source, tmp_path / "out", filter_sparse_opt=True
        ).export()  # fmt: skip

    first = run(1.0)
    assert "sparse_own_values" not in first.run
    assert run(2.0) == first
