"""A hash table outside of both arches has no rows of the checkpoint, so scores that it is part of are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_export.errors import ModelError
from tests.support import exports, tiny_model


class Wide(tiny_model.TinyModel):
    """A third table, which each subclass looks up in another place. The checkpoint has it too."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = tiny_model.LookalikeTable("item_emb")

    def bias(self, batch: Any) -> Any:
        return self.wide(batch["item"]).sum(dim=1, keepdim=True)


class Between(Wide):
    def forward(self, batch: Any) -> Any:
        blocks = self.sparse_arch(batch)
        return self.dense_arch({**blocks, "price": blocks["price"] + self.bias(batch)})


class Before(Wide):
    def forward(self, batch: Any) -> Any:
        return self.dense_arch(self.sparse_arch({**batch, "price": batch["price"] + self.bias(batch)}))


class Branch(Wide):
    """Its rows decide by what way the scores are made; fresh, they are zeros."""

    def forward(self, batch: Any) -> Any:
        blocks = self.sparse_arch(batch)
        factor = 2.0 if self.bias(batch).sum().item() > 0 else 1.0
        return self.dense_arch({**blocks, "price": blocks["price"] * factor})


class Gate(Wide):
    """They count only for prices that no sample has."""

    def forward(self, batch: Any) -> Any:
        blocks = self.sparse_arch(batch)
        price = blocks["price"]
        return self.dense_arch({**blocks, "price": torch.where(price > 1e6, price + self.bias(batch), price)})


class PastForward(Wide):
    """Another method of the table gives rows."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = Averaged("item_emb")

    def forward(self, batch: Any) -> Any:
        blocks = self.sparse_arch(batch)
        return self.dense_arch({**blocks, "price": blocks["price"] + self.wide.average()})


class Averaged(tiny_model.LookalikeTable):
    def average(self) -> torch.Tensor:
        return torch.stack([torch.zeros(tiny_model.DIM), *self._rows.values()]).mean()


def export(tmp_path: Path, model: Any) -> Any:
    source = tiny_model.write_tiny_checkpoint(tmp_path / "in")
    batches = [batch for _, batch in tiny_model.build_dataset()]
    settings = {"export_dir": tmp_path / "out", "filter_sparse_opt": True}
    exporter = exports.exporter(model, "sparse_arch", "dense_arch", batches, source, **settings)
    return exporter.export(progress=False)


@pytest.mark.parametrize("kind", [Between, Before, Branch, Gate, PastForward])
def test_scores_that_it_is_part_of_are_refused(kind: type[Wide], tmp_path: Path) -> None:
    model = kind()
    methods = set(vars(model.wide))
    with pytest.raises(ModelError, match=r"forward computes with wide \(table 'item_emb'\) outside of the sparse arch"):
        export(tmp_path, model)
    assert not (tmp_path / "out").exists()
    assert set(vars(model.wide)) == methods


class Auxiliary(Wide):
    """Its rows are part of another output, and of a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, batch: Any) -> Any:
        other = self.bias(batch)
        self.seen += other.sum()
        return {**self.dense_arch(self.sparse_arch(batch)), "other": other}


class Forgotten(Auxiliary):
    """New numbers, which no operator makes, get the memory that the counter's had."""

    def forward(self, batch: Any) -> Any:
        blocks, other = self.sparse_arch(batch), self.bias(batch)
        for _ in range(100):
            address = other.sum().data_ptr()
            one = torch.tensor(1.0)
            if one.data_ptr() == address:
                break
        return {**self.dense_arch({name: block * one for name, block in blocks.items()}), "other": other}


class Shared(Wide):
    """The sparse arch has the table too, so it has its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = self.sparse_arch.item

    def forward(self, batch: Any) -> Any:
        return self.dense_arch(self.sparse_arch(batch))


@pytest.mark.parametrize("kind", [Auxiliary, Forgotten, Shared])
def test_scores_that_it_is_no_part_of_are_exported(kind: type[Wide], tmp_path: Path) -> None:
    manifest = export(tmp_path, kind())
    assert manifest.parity.reference == "model"
