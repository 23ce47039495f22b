"""Sparse archs whose blocks are not made of the rows that an export puts in: no drift is stated, or the export is refused.

Each keeps rows from one call to the next, reads them past torch, or holds a table that it does not register.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace as Holder
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_export.errors import DistExportError, ModelError
from dist_export.manifest import Manifest
from tests.support import exports

USER, ITEM = "sparse_arch.user.weight", "sparse_arch.item.weight"
BATCHES = [torch.arange(first, first + 16) % 40 for first in (0, 10, 20)]
INT8 = {"dtype": {"*": "int8"}}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(50, 4), nn.Embedding(40, 4)
        self.build()

    def build(self) -> None:
        """Add what a kind needs."""

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        return self.user(ids)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"user": self.look_up(ids), "item": self.item(ids)}


class LeastRecentlyUsed(Plain):
    def build(self) -> None:
        self.row: Callable[[int], torch.Tensor] = functools.lru_cache(1000)(
            lambda number: self.user.weight.detach()[number].clone()
        )

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.row(number) for number in ids.tolist()])


class FewKept(Plain):
    def build(self) -> None:
        self.kept: dict[int, torch.Tensor] = {}

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.row(number) for number in ids.tolist()])

    def row(self, number: int) -> torch.Tensor:
        if number in self.kept:
            return self.kept[number]
        row = self.user.weight.detach()[number].clone()
        if len(self.kept) < 3:
            self.kept[number] = row
        return row


class Normalised(Plain):
    def build(self) -> None:
        self.kept: torch.Tensor | None = None

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        if self.kept is None:
            self.kept = F.normalize(self.user.weight.detach(), dim=1)
        return self.kept[ids]


class KeptBefore(Normalised):
    """It was kept before the export began: nothing reads the table any more."""

    def build(self) -> None:
        self.kept = self.user.weight.detach().clone()


class BlocksKept(Plain):
    """Reads the rows, and returns what it returned for these ids before."""

    def build(self) -> None:
        self.kept: dict[tuple[int, ...], torch.Tensor] = {}

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        return self.kept.setdefault(tuple(ids.tolist()), self.user(ids))


class NumpyView(Plain):
    def build(self) -> None:
        self.view = self.user.weight.detach().numpy()

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.view[ids.numpy()])


class InThread(Plain):
    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(F.embedding, ids, self.user.weight.detach()).result()


class IntoBuffer(Plain):
    """The thread writes into memory that the call has made."""

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        rows = torch.empty(len(ids), 4)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: rows.copy_(self.user.weight.detach()[ids])).result()
        return rows


class HalfKept(Plain):
    """A second lookup of the table is fed, this one is not."""

    def build(self) -> None:
        self.view = self.user.weight.detach().numpy()

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        return self.user(ids[:2]).mean(dim=0) + torch.from_numpy(self.view[ids.numpy()])


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.linear(torch.cat([blocks["user"], blocks["item"]], dim=1))


class Model(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.sparse_arch = kind()
        self.dense_arch = Dense()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.dense_arch(self.sparse_arch(ids))


def export(
    kind: Callable[[], nn.Module], tmp_path: Path, *, out: str = "out", num_batches: int = 2, **settings: Any
) -> Manifest:
    torch.manual_seed(2)
    torch.save({name: value * 3 for name, value in Model(kind).state_dict().items()}, tmp_path / "ckpt.pt")
    torch.manual_seed(7)
    model = Model(kind)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    exporter = exports.exporter(
        model,
        "sparse_arch",
        "dense_arch",
        iter(BATCHES[:num_batches]),
        str(tmp_path / "ckpt.pt"),
        str(tmp_path / out),
        filter_sparse_opt=True,
        **settings,
    )
    try:
        return exporter.export(progress=False)
    finally:
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name  # bits that were flipped are put back


KEEPS = [LeastRecentlyUsed, Normalised, BlocksKept, KeptBefore]
READS_PAST = [NumpyView, InThread, IntoBuffer, HalfKept]


@pytest.mark.parametrize("num_batches", [1, 2])
@pytest.mark.parametrize("kind", [*KEEPS, *READS_PAST], ids=lambda kind: kind.__name__)
def test_no_drift_is_stated(kind: type[Plain], num_batches: int, tmp_path: Path) -> None:
    """The drift was 0 or that of the other table alone; max_drift let the package pass."""
    manifest = export(kind, tmp_path, num_batches=num_batches, **INT8)
    assert manifest.drift is not None
    assert not manifest.drift.outputs
    assert USER in manifest.drift.not_measured
    assert ITEM not in manifest.drift.not_measured
    with pytest.raises(DistExportError, match=r"max_drift.*cannot be measured.*user\.weight"):
        export(kind, tmp_path, out="bound", num_batches=num_batches, **INT8, max_drift=10.0)
    assert not (tmp_path / "bound" / "manifest.json").exists()


@pytest.mark.parametrize("kind", [NumpyView, InThread, IntoBuffer, KeptBefore], ids=lambda kind: kind.__name__)
def test_a_note_says_that_the_sample_has_other_rows(kind: type[Plain], tmp_path: Path) -> None:
    manifest = export(kind, tmp_path, num_batches=1)
    assert any(USER in note and "the model's own rows" in note for note in manifest.notes)


def test_a_cache_that_keeps_few_rows_is_seen(tmp_path: Path) -> None:
    manifest = export(FewKept, tmp_path, num_batches=2, **INT8)
    assert manifest.drift is not None
    assert USER in manifest.drift.not_measured


class Listed(Plain):
    def build(self) -> None:
        self.tables = [nn.Embedding(50, 4)]

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        return self.user(ids) + self.tables[0](ids)


class InDict(Listed):
    def build(self) -> None:
        self.tables: Any = {0: nn.Embedding(50, 4)}


class InClosure(Plain):
    def build(self) -> None:
        table = nn.Embedding(50, 4)
        self.look = lambda ids: table.weight.data[ids]

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        return self.user(ids) + self.look(ids)


class InObject(Plain):
    def build(self) -> None:
        self.holder = Holder(weight=nn.Parameter(torch.randn(50, 4)))

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        return self.user(ids) + F.embedding(ids, self.holder.weight)


class ListedInThread(Listed):
    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        with ThreadPoolExecutor(1) as pool:
            return self.user(ids) + pool.submit(self.tables[0], ids).result()


HIDDEN = {
    Listed: r"sparse_arch\.tables\[0\]\.weight",
    InDict: r"sparse_arch\.tables\[0\]\.weight",
    InClosure: r"sparse_arch\.look\.table\.weight",
    InObject: r"sparse_arch\.holder\.weight",
    ListedInThread: r"sparse_arch\.tables\[0\]\.weight",
}


@pytest.mark.parametrize("kind", list(HIDDEN), ids=lambda kind: kind.__name__)
def test_a_table_that_is_not_registered_is_refused_by_name(kind: type[Plain], tmp_path: Path) -> None:
    """Its rows were the model's own random ones, with parity 0 and drift 0."""
    with pytest.raises(ModelError, match=HIDDEN[kind] + r" \(float32 \[50, 4\]\).*does not register"):
        export(kind, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_setting_lets_it_pass(tmp_path: Path) -> None:
    manifest = export(Listed, tmp_path, allow_missing_tables=["*tables*"])
    assert any("tables[0].weight" in note and "the model's own values" in note for note in manifest.notes)


class Legal(Plain):
    """Odd, and right: constants of the code, copies made within the call, a module called in a thread."""

    def build(self) -> None:
        self.scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
        self.unused = [nn.Linear(7, 7)]
        self.array = np.ones(4, np.float32)

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        with ThreadPoolExecutor(1) as pool:
            rows = pool.submit(self.user, ids).result()
        again = copy.deepcopy(self.user)(ids)
        return (rows + again) * self.scale + torch.from_numpy(self.array) + torch.tensor([0.5, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("kind", [Plain, Legal])
def test_what_is_right_is_measured(kind: type[Plain], tmp_path: Path) -> None:
    manifest = export(kind, tmp_path, **INT8)
    assert manifest.drift is not None
    assert max(drift.max_abs for drift in manifest.drift.outputs.values()) > 1e-4
