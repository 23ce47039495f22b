"""An export leaves the caller's model as it was, and exports one in memory as it was, whatever its forward writes into."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export.errors import ModelError
from dist_export.verify.verify import verify
from tests.support import exports

ROWS, DIM = 30, 4


class Counting(nn.Module):
    """Its lookups shorten rows (``max_norm``), and it counts its calls in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(ROWS, DIM, max_norm=1.0)
        self.register_buffer("saved", torch.zeros(1))
        self.register_buffer("unsaved", torch.zeros(1), persistent=False)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.saved += 1
        self.unsaved += 1
        return {"user": self.user(batch["user"])}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.linear(blocks["user"])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse_arch = Counting()
        self.dense_arch = Dense()

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.dense_arch(self.sparse_arch(batch))


def build(seed: int) -> Model:
    torch.manual_seed(seed)
    model = Model()
    with torch.no_grad():
        model.sparse_arch.user.weight.mul_(3)
    return model


def batches() -> Iterator[dict[str, torch.Tensor]]:
    for first in (0, 5, 10):
        yield {"user": torch.arange(first, first + 8)}


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def export(model: Model, out: Path, ckpt_dir: Path | None, **settings: Any) -> list[str]:
    """Export, and return the notes."""
    settings |= {} if ckpt_dir is None else {"filter_sparse_opt": True}
    manifest = exports.exporter(
        model, "sparse_arch", "dense_arch", batches(), None if ckpt_dir is None else str(ckpt_dir), str(out), **settings
    ).export(progress=False)
    return list(manifest.notes)


WRITES = "table 'sparse_arch.user.weight': the sparse arch writes into rows before it reads them ({})"


@pytest.mark.parametrize("score_program", ["off", "auto"])
@pytest.mark.parametrize("limit", [0.5, None])
def test_rows_that_a_lookup_shortens_have_a_note(limit: float | None, score_program: str, tmp_path: Path) -> None:
    """Of the package's rows the dense program makes other scores than the model: parity alone says that all is well."""
    model = build(1)
    model.sparse_arch.user.max_norm = limit
    torch.save(model.state_dict(), tmp_path / "ckpt.pt")
    notes = export(model, tmp_path / "out", tmp_path / "ckpt.pt", score_program=score_program)
    assert any(note.startswith(WRITES.format("max_norm=0.5")) for note in notes) == (limit is not None)


@pytest.mark.parametrize("is_live", [True, False])
def test_rows_that_a_lookup_shortens_and_buffers_that_a_forward_counts_in(is_live: bool, tmp_path: Path) -> None:
    trained = build(1)
    torch.save(trained.state_dict(), tmp_path / "ckpt.pt")
    model = trained if is_live else build(2)
    before, rows = values_of(model), trained.sparse_arch.user.weight.detach().clone().numpy()
    export(model, tmp_path / "out", None if is_live else tmp_path / "ckpt.pt")
    after = values_of(model)
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
    found, has_row = dist_export.open_package(tmp_path / "out").lookup("sparse_arch.user.weight", np.arange(ROWS))
    assert has_row.all()
    np.testing.assert_array_equal(found, rows)


class WritesRows(nn.Module):
    """Its forward writes into its table, as a renormalisation in place does."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.user = nn.Embedding(ROWS, DIM)
        self.how = how

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight = self.user.weight.data
        if self.how == "all rows":
            weight.clamp_(-0.1, 0.1)
        elif self.how == "through a view":
            weight[:, 1:].div_(3)
        else:
            ids = batch["user"].unique()
            weight[ids] = nn.functional.normalize(weight[ids], dim=1)
        return {"user": self.user(batch["user"])}


@pytest.mark.parametrize("how", ["all rows", "through a view", "rows that are looked up"])
@pytest.mark.parametrize("is_live", [True, False])
def test_a_forward_that_writes_into_its_table(how: str, is_live: bool, tmp_path: Path) -> None:
    model = build(1)
    model.sparse_arch = WritesRows(how)
    torch.save(model.state_dict(), tmp_path / "ckpt.pt")
    before = values_of(model)
    if is_live:
        with pytest.raises(
            ModelError, match=r"'sparse_arch.user.weight': the sparse arch writes into it while it runs"
        ):
            export(model, tmp_path / "out", None)
        assert not (tmp_path / "out").exists()
    else:
        notes = export(model, tmp_path / "out", tmp_path / "ckpt.pt")
        assert any(note.startswith(WRITES.format("aten::")[:-1]) for note in notes)
        found, _ = dist_export.open_package(tmp_path / "out").lookup("sparse_arch.user.weight", np.arange(ROWS))
        np.testing.assert_array_equal(found, before["sparse_arch.user.weight"].numpy())
    after = values_of(model)
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []


class Merging(nn.Module):
    """Adds a low-rank product to its weight in eval mode, and takes it off again in training mode, as loralib's layers do."""

    is_merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.is_merged:
            self.weight.data += (-1 if mode else 1) * (self.low @ self.rank)
            self.is_merged = not mode
        return self


class Lora(Merging, nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.low = nn.Parameter(torch.randn(outputs, 1))
        self.rank = nn.Parameter(torch.randn(1, inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        more = 0 if self.is_merged else nn.functional.linear(x, self.low @ self.rank)
        return super().forward(x) + more


def build_lora(seed: int, *, is_eval: bool) -> Model:
    model = build(seed)
    model.dense_arch.linear = Lora(DIM, 1)
    return model.eval() if is_eval else model


@pytest.mark.parametrize("is_eval", [True, False])
@pytest.mark.parametrize("is_live", [True, False])
def test_a_layer_that_merges_in_eval_mode_is_scored_merged_and_left_as_it_was(
    is_live: bool, is_eval: bool, tmp_path: Path
) -> None:
    trained = build_lora(1, is_eval=False)
    torch.save(trained.state_dict(), tmp_path / "ckpt.pt")
    batch = next(batches())
    expected = trained(batch).detach()
    model = build_lora(1, is_eval=is_eval) if is_live else build_lora(2, is_eval=is_eval)
    before, mode, is_merged = values_of(model), model.training, model.dense_arch.linear.is_merged
    export(model, tmp_path / "out", None if is_live else tmp_path / "ckpt.pt")
    after = values_of(model)
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
    assert (model.training, model.dense_arch.linear.is_merged) == (mode, is_merged)
    package = dist_export.open_package(tmp_path / "out")
    rows, _ = package.lookup("sparse_arch.user.weight", np.arange(ROWS))
    block = nn.functional.embedding(batch["user"], torch.from_numpy(rows), max_norm=1.0)
    scores = package.load_program().module()(user=block)
    torch.testing.assert_close(scores, expected)
    assert verify(str(tmp_path / "out")).findings == []


class LoraEmbedding(Merging, nn.Embedding):
    def __init__(self, rows: int, dim: int) -> None:
        super().__init__(rows, dim)
        self.low = nn.Parameter(torch.randn(rows, 1))
        self.rank = nn.Parameter(torch.randn(1, dim))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        more = 0 if self.is_merged else self.low[ids] @ self.rank
        return super().forward(ids) + more


@pytest.mark.parametrize("is_eval", [True, False])
def test_a_table_that_merges_in_eval_mode_is_refused(is_eval: bool, tmp_path: Path) -> None:
    model = build(1)
    model.sparse_arch.user = LoraEmbedding(ROWS, DIM)
    torch.save(model.state_dict(), tmp_path / "ckpt.pt")
    model.train(not is_eval)
    before = values_of(model)
    with pytest.raises(ModelError, match=r"sparse_arch.user.weight is changed by train\(\) or eval\(\)"):
        export(model, tmp_path / "out", tmp_path / "ckpt.pt")
    after = values_of(model)
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
