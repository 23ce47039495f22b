"""Layers over sequences in the dense arch: torch's own code of them looks at sizes of 1, and the score program takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export.api import Exporter
from dist_export.errors import ModelError

ROWS, DIM = 50, 4
Batch = dict[str, torch.Tensor]


class Sparse(nn.Module):
    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.items = nn.Embedding(ROWS, DIM)
        self.change = change

    def forward(self, batch: Batch) -> Batch:
        return {"clicks": self.change(self.items(batch["clicks"])), "item": self.items(batch["item"])}


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.linear = kind(DIM, DIM, batch_first=True), nn.Linear(DIM, 1)

    def forward(self, blocks: Batch) -> torch.Tensor:
        return self.linear(self.layer(blocks["clicks"])[0][:, -1])[:, 0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.linear = nn.MultiheadAttention(DIM, 2, batch_first=True), nn.Linear(DIM, 1)

    def forward(self, blocks: Batch) -> torch.Tensor:
        clicks = blocks["clicks"]
        return self.linear(self.layer(clicks, clicks, clicks)[0].mean(1))[:, 0]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(DIM, 2, 8, batch_first=True)
        self.layer, self.linear = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(DIM, 1)

    def forward(self, blocks: Batch) -> torch.Tensor:
        return self.linear(self.layer(blocks["clicks"])[:, 0])[:, 0]


class Model(nn.Module):
    def __init__(self, dense_arch: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.sparse_arch, self.dense_arch = Sparse(change), dense_arch

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.dense_arch(self.sparse_arch(batch))


class Target(nn.Module):
    """Puts the item beside each click, as in a deep interest network."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * DIM, 1)

    def forward(self, blocks: Batch) -> torch.Tensor:
        clicks = blocks["clicks"]
        item = blocks["item"].unsqueeze(1).expand_as(clicks)
        return self.linear(torch.cat([item, clicks], dim=-1)).sum((1, 2))


def batch_of(num_examples: int, length: int = 6) -> Batch:
    random = torch.Generator().manual_seed(num_examples)
    clicks = torch.randint(0, ROWS, (num_examples, length), generator=random)
    return {"clicks": clicks, "item": torch.arange(num_examples) % ROWS}


def run(
    tmp_path: Path, dense: Callable[[], nn.Module], change: Callable[[torch.Tensor], torch.Tensor] = torch.clone
) -> tuple[dist_export.Package, nn.Module]:
    torch.manual_seed(3)
    trained = Model(dense(), change).eval()
    torch.save(trained.state_dict(), tmp_path / "model.pth")
    fresh, ckpt = Model(dense(), change), str(tmp_path / "model.pth")
    Exporter(fresh, "sparse_arch", "dense_arch", [batch_of(5)], ckpt, tmp_path / "out", score_program="require").export(
        progress=False
    )
    return dist_export.open_package(tmp_path / "out"), trained


@pytest.mark.parametrize(
    "dense",
    [lambda: Recurrent(nn.GRU), lambda: Recurrent(nn.LSTM), Attention, Encoder],
    ids=["gru", "lstm", "attention", "encoder"],
)
def test_the_program_takes_batches_of_all_sizes(dense: Callable[[], nn.Module], tmp_path: Path) -> None:
    """There was none: traced for sizes of 0 and 1 too, it refused a batch of one example."""
    package, trained = run(tmp_path, dense)
    is_fixed = isinstance(trained.dense_arch, Recurrent)  # its steps are written out
    lengths = (6,) if is_fixed else (1, 6, 9)
    told = [note for note in package.manifest.notes if "takes lists of one length alone" in note]
    assert len(told) == is_fixed
    assert all("that of the sample: 'clicks' of shape (batch, 6). " in note for note in told)
    for batch in [batch_of(size, length) for size in (0, 1, 4, 9) for length in lengths]:
        with torch.no_grad():
            expected = trained(batch).numpy()
        (found,) = package.score(batch).values()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert {0, 1} < set(package.manifest.score.parity.batch_sizes)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows * (2 if rows.shape[1] == 1 else 1),
        lambda rows: rows if rows.shape[1] else rows.new_ones(len(rows), 1, DIM),
        lambda rows: rows if rows.shape[0] else rows.new_ones(1, 6, DIM),
    ],
    ids=["one in a list", "none in a list", "no example"],
)
def test_a_branch_on_the_least_sizes_is_not_lost(
    change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    """A trace that takes each size for 2 or more does not see it."""
    with pytest.raises(ModelError, match="score_program is require, but there can be none: the "):
        run(tmp_path, Attention, change)


def test_a_condition_that_always_holds_is_none(tmp_path: Path) -> None:
    """``expand_as`` gave ``batch == batch or batch == 1``: a note told of refused inputs, and the contract knew no input."""
    package, trained = run(tmp_path, Target)
    assert package.manifest.score.conditions == ()
    assert not any("takes only sizes" in note for note in package.manifest.notes)
    assert [entry.unknown for entry in package.manifest.serving.inputs] == [msgspec.UNSET] * 2
    for batch in [batch_of(size, length) for size in (0, 1, 9) for length in (1, 6, 8)]:
        with torch.no_grad():
            expected = trained(batch).numpy()
        (found,) = package.score(batch).values()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
