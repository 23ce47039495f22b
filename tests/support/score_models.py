"""Plain torch models whose tables are looked up in many ways, a checkpoint of each, and their trained scores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

DIM = 4
ROWS = 30
Batch = dict[str, torch.Tensor]


class Head(nn.Module):
    """A dense arch: a layer over the blocks side by side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"ctr": torch.sigmoid(self.mlp(torch.cat(list(blocks.values()), dim=1)))}


class Model(nn.Module):
    def __init__(self, sparse_arch: nn.Module, width: int) -> None:
        super().__init__()
        self.sparse_arch = sparse_arch
        self.dense_arch = Head(width)

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        return self.dense_arch(self.sparse_arch(batch))


class ThreeTables(nn.Module):
    """An embedding of one id, a padded list that is averaged, and a bag with offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(ROWS, DIM)
        self.clicks = nn.Embedding(ROWS, DIM, padding_idx=0)
        self.tags = nn.EmbeddingBag(ROWS, DIM, mode="sum")

    def forward(self, batch: Batch) -> Batch:
        clicks = self.clicks(batch["clicks"])
        is_there = (batch["clicks"] != 0).unsqueeze(-1)
        mean = (clicks * is_there).sum(1) / is_there.sum(1).clamp(min=1)
        tags = self.tags(batch["tags_values"], batch["tags_offsets"])
        return {"user": self.user(batch["user"]), "clicks": mean, "tags": tags, "price": batch["price"]}


class Lookups(nn.Module):
    """One table, which ``look(module, batch)`` reads."""

    def __init__(self, table: nn.Module, look: Callable[[Any, Batch], torch.Tensor]) -> None:
        super().__init__()
        self.table = table
        self.look = look

    def forward(self, batch: Batch) -> Batch:
        return {"block": self.look(self, batch), "price": batch["price"]}


def batch_of(num_examples: int = 6, seed: int = 0) -> Batch:
    """Return a batch with a label; among its lists is an empty one."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (num_examples,), generator=random)
    lengths[num_examples // 2] = 0
    return {
        "user": torch.randint(0, ROWS, (num_examples,), generator=random),
        "clicks": torch.randint(0, ROWS, (num_examples, 3), generator=random),
        "tags_values": torch.randint(0, ROWS, (int(lengths.sum()),), generator=random),
        "tags_offsets": lengths.cumsum(0) - lengths,
        "tags_weights": torch.rand(int(lengths.sum()), generator=random),
        "tags_bounds": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        "price": torch.rand(num_examples, 1, generator=random),
        "factor": torch.tensor(1.5),
        "label": torch.randint(0, 2, (num_examples,), generator=random),
    }


class _Noted(dict[str, torch.Tensor]):
    """A batch that notes what is read of it."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.seen.add(name)
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        self.seen |= self.keys()
        return super().__iter__()

    def items(self) -> Any:
        self.seen |= self.keys()
        return super().items()


def inputs_of(model: nn.Module, batch: Batch) -> Batch:
    """Return what the model reads of a batch, for tests of other matters: for what it does not, torch traces once more."""
    noted = _Noted(batch)
    with torch.no_grad():
        copy.deepcopy(model).eval()(noted)
    return {name: tensor for name, tensor in batch.items() if name in noted.seen}


def train(model: nn.Module, seed: int = 5) -> nn.Module:
    """Give a model other parameters than a fresh one has."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    return model.eval()


def save(model: nn.Module, path: Path) -> str:
    """Save a model as trainers do, and return the path."""
    torch.save(model.state_dict(), path)
    return str(path)


def _embedding(**settings: Any) -> nn.Module:
    return nn.Embedding(ROWS, DIM, **settings)


def _bag(**settings: Any) -> nn.Module:
    return nn.EmbeddingBag(ROWS, DIM, **settings)


def _functional(its: Any, batch: Batch) -> torch.Tensor:
    return nn.functional.embedding(batch["user"], its.table.weight)


def _with_gradients(its: Any, batch: Batch) -> torch.Tensor:
    with torch.enable_grad():
        return its.table(batch["user"]) * batch["factor"]


def _weights(its: Any, batch: Batch) -> torch.Tensor:
    return its.table(batch["tags_values"], batch["tags_offsets"], batch["tags_weights"])


def _bounds(its: Any, batch: Batch) -> torch.Tensor:
    return its.table(batch["tags_values"], batch["tags_bounds"])


def _starts(its: Any, batch: Batch) -> torch.Tensor:
    return its.table(batch["tags_values"], batch["tags_offsets"])


def _rows(its: Any, batch: Batch) -> torch.Tensor:
    return its.table(batch["clicks"])


WAYS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Batch], torch.Tensor]]] = {
    "embedding": (_embedding, lambda its, batch: its.table(batch["user"])),
    "functional": (_embedding, _functional),
    "index": (_embedding, lambda its, batch: its.table.weight[batch["user"]]),
    "with_gradients": (_embedding, _with_gradients),
    "from_the_end": (_embedding, lambda its, batch: its.table.weight[batch["user"] - 5]),
    "index_select": (_embedding, lambda its, batch: torch.index_select(its.table.weight, 0, batch["user"])),
    "padded": (lambda: _embedding(padding_idx=0), lambda its, batch: its.table(batch["clicks"]).flatten(1)[:, :DIM]),
    "bag": (_bag, _rows),
    "bag_padded": (lambda: _bag(mode="sum", padding_idx=3), _rows),
    "bag_max": (lambda: _bag(mode="max"), _rows),
    "offsets": (_bag, _starts),
    "offsets_max": (lambda: _bag(mode="max", padding_idx=2), _starts),
    "offsets_padded": (lambda: _bag(padding_idx=-1), _starts),
    "weights": (lambda: _bag(mode="sum"), _weights),
    "last_offset": (lambda: _bag(mode="sum", include_last_offset=True), _bounds),
}
"""Each way in which torch looks rows up: what makes the table, and what reads it."""


class AllWays(nn.Module):
    """One table for each way."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleDict({name: Lookups(make(), look) for name, (make, look) in WAYS.items()})

    def forward(self, batch: Batch) -> Batch:
        return {name: way(batch)["block"] for name, way in self.ways.items()} | {"price": batch["price"]}
