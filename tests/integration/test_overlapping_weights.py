"""Parameters of the model that are partly the same memory: a state whose values differ there is refused.

``load_state_dict`` leaves the values of the last name, and others than the trainer's may be the last.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_export.dense import found_rows
from dist_export.errors import ModelError
from dist_export.manifest import Manifest
from tests.support import exports

ROWS, DIM = 30, 4


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ROWS, DIM)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"items": self.items(ids)}


class Dense(nn.Module):
    """``view`` makes the second parameter of the first one."""

    def __init__(self, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, 6, bias=False)
        self.again = nn.Parameter(view(self.up.weight.data))
        self.linear = nn.Linear(6, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = self.up(blocks["items"])
        return self.linear(hidden)[:, 0] + self.again.sum()


class Model(nn.Module):
    def __init__(self, view: Callable[[torch.Tensor], torch.Tensor], *, of_table: bool = False) -> None:
        super().__init__()
        self.sparse_arch = Sparse()
        self.dense_arch = Dense(view)
        if of_table:
            self.dense_arch.again = nn.Parameter(view(self.sparse_arch.items.weight.data))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.dense_arch(self.sparse_arch(ids))


VIEWS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...], int]] = {
    "transposed": (lambda weight: weight.t(), (1, 3), 3),
    "a slice of rows": (lambda weight: weight[2:5], (1, 2), 3),
    "a slice of columns": (lambda weight: weight[:, 1:3], (4, 1), 4),
    "flat": (lambda weight: weight.view(-1), (9,), 2),
    "bits": (lambda weight: weight.view(torch.complex64), (5, 1), 5),
}
"""The view, an element of it, and the row of the whole that it is in."""


def export(model: Model, state: dict[str, torch.Tensor], folder: Path, **settings: Any) -> Manifest:
    torch.save(state, folder / "model.pt")
    given = [model, "sparse_arch", "dense_arch", [torch.arange(9)], str(folder / "model.pt"), str(folder / "out")]
    return exports.exporter(*given, **settings).export(progress=False)


@pytest.mark.parametrize("name", VIEWS)
def test_two_values_for_common_memory_are_refused_by_name(name: str, tmp_path: Path) -> None:
    """The program had those of the name that is loaded last."""
    view, place, row = VIEWS[name]
    state = {key: value.clone() for key, value in Model(view).state_dict().items()}
    state["dense_arch.again"][place] += 1
    with pytest.raises(ModelError) as caught:
        export(Model(view), state, tmp_path)
    text = str(caught.value)
    assert "'dense_arch.again'" in text
    assert "'dense_arch.up.weight'" in text
    assert "are partly the same memory, but the checkpoint has different values there, first in row" in text
    assert f"row {row:,} of 'dense_arch.up.weight'" in text or "of 'dense_arch.again'" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", VIEWS)
def test_one_value_for_common_memory_is_taken(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = {key: value.clone() for key, value in Model(VIEWS[name][0]).state_dict().items()}
    manifest = export(Model(VIEWS[name][0]), state, tmp_path)
    assert manifest.parity is not None


@pytest.mark.parametrize("changed", [12, None])
def test_a_slice_of_a_table(changed: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which a piece is read at a time; other rows of the table are the shards' alone."""
    monkeypatch.setattr(found_rows, "_PIECES", (512 << 20) // (7 * 64 * DIM))
    view = lambda weight: weight[10:20]
    state = {key: value.clone() for key, value in Model(view, of_table=True).state_dict().items()}
    state["sparse_arch.items.weight"][25] += 1
    if changed is None:
        export(Model(view, of_table=True), state, tmp_path)
        return
    state["sparse_arch.items.weight"][changed] += 1
    with pytest.raises(ModelError, match=r"first in row 12 of 'sparse_arch.items.weight'"):
        export(Model(view, of_table=True), state, tmp_path)
