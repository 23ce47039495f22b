"""A table's weight that is read otherwise than by a call of its module: scores have the checkpoint's rows all the same.

The truth is the trained model itself, run on the same batch; for the drift, the trained model with its rows rounded.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import dist_export
from dist_export.dense.row_lookup import RowFinder
from dist_export.errors import DriftError, ModelError
from dist_export.reporting.summary import summarize
from tests.support import exports, tiny_model
from tests.support.table_cases import Sparse, open_finder, rows, run, table_of

ROWS, DIM = 20, 4
IDS = torch.tensor([3, 0, 19, 3, 7])


class Hashing(nn.Embedding):
    """Looks other rows up than it is asked for."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward((ids * 7) % self.num_embeddings)


class Unasked(nn.Embedding):
    """Is called with no tensor."""

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional.embedding(features["ids"], self.weight)


def bags(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(ids))


BY_ID: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "forward": lambda e, ids: e.forward(ids),
    "F.embedding": lambda e, ids: functional.embedding(ids, e.weight),
    "F.embedding of data": lambda e, ids: functional.embedding(ids, e.weight.data),
    "F.embedding, padded": lambda e, ids: functional.embedding(ids, e.weight, padding_idx=0),
    "F.embedding_bag": lambda e, ids: functional.embedding_bag(ids, e.weight, bags(ids), mode="sum"),
    "weight[ids]": lambda e, ids: e.weight[ids],
    "weight[-ids]": lambda e, ids: e.weight[ids - ROWS],
    "weight[ids, :2]": lambda e, ids: e.weight[:, :2][ids],
    "a shifted view": lambda e, ids: e.weight[1:][ids.clamp(max=18)],
    "every other row": lambda e, ids: e.weight[::2][ids // 2],
    "index_select": lambda e, ids: torch.index_select(e.weight, 0, ids),
    "take_along_dim": lambda e, ids: e.weight.gather(0, ids[:, None].expand(-1, DIM)),
    "one row after the other": lambda e, ids: torch.stack([e.weight[int(i)] for i in ids]),
    "in a thread of autocast": lambda e, ids: functional.embedding(ids, e.weight).bfloat16().float(),
}
WHOLE: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "one-hot": lambda e, ids: functional.one_hot(ids, ROWS).float() @ e.weight,
    "one-hot, sparse": lambda e, ids: torch.sparse.mm(functional.one_hot(ids, ROWS).float().to_sparse(), e.weight),
    "linear": lambda e, ids: functional.linear(functional.one_hot(ids, ROWS).float(), e.weight.t()),
    "norm": lambda e, ids: e.weight.norm(dim=0).expand(len(ids), DIM),
    "a copy": lambda e, ids: e.weight.clone()[ids],
    "another dtype": lambda e, ids: functional.embedding(ids, e.weight.to(torch.float64)).float(),
    "mask": lambda e, ids: e.weight[torch.arange(ROWS) % 3 == 0].sum(0).expand(len(ids), DIM),
    "numpy": lambda e, ids: torch.from_numpy(e.weight.detach().numpy()[ids.numpy()]),
    "tolist": lambda e, ids: torch.tensor(e.weight.tolist())[ids],
    "np.asarray": lambda e, ids: torch.from_numpy(np.asarray(e.weight.detach())[ids.numpy()]),
    "columns": lambda e, ids: e.weight.t()[:, ids].t(),
}


class Arch(nn.Module):
    def __init__(self, read: Callable[[nn.Module, torch.Tensor], torch.Tensor], kind: type[nn.Embedding]) -> None:
        super().__init__()
        self.read = read
        self.user = kind(ROWS, DIM)
        self.item = nn.EmbeddingBag(ROWS, DIM, mode="sum")

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"user": self.read(self.user, batch["ids"]), "item": self.item(batch["ids"][:, None])}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.LazyLinear(1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.sigmoid(self.out(torch.cat(list(blocks.values()), 1)))


class Model(nn.Module):
    def __init__(
        self,
        read: Callable[[nn.Module, torch.Tensor], torch.Tensor],
        seed: int,
        kind: type[nn.Embedding] = nn.Embedding,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.sparse_arch, self.dense_arch = Arch(read, kind), Dense()
        with torch.no_grad():
            self.dense_arch(self.sparse_arch({"ids": IDS}))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.dense_arch(self.sparse_arch(batch))


BATCHES = [{"ids": IDS}, {"ids": torch.tensor([5, 6, 11])}]


def export(tmp_path: Path, model: nn.Module, trained: nn.Module | None, **settings: Any) -> dist_export.Manifest:
    if trained is not None:
        (tmp_path / "ck").mkdir(parents=True)
        torch.save(trained.state_dict(), tmp_path / "ck" / "model.pt")
    return exports.exporter(
        model,
        "sparse_arch",
        "dense_arch",
        BATCHES,
        None if trained is None else tmp_path / "ck",
        tmp_path / "out",
        filter_sparse_opt=True,
        **settings,
    ).export()


def true_drift(trained: nn.Module) -> float:
    """The largest difference that bfloat16 makes, by the trained model itself."""
    rounded = copy.deepcopy(trained)
    for table in (rounded.sparse_arch.user, rounded.sparse_arch.item):
        table.weight.data = table.weight.data.bfloat16().float()
    with torch.no_grad():
        return max(float((trained.eval()(b) - rounded.eval()(b)).abs().max()) for b in BATCHES)


CASES = {
    "F.embedding": (BY_ID["F.embedding"], nn.Embedding),
    "index_select": (BY_ID["index_select"], nn.Embedding),
    "one-hot": (WHOLE["one-hot"], nn.Embedding),
    "numpy": (WHOLE["numpy"], nn.Embedding),
    "ids that the module changes": (lambda e, ids: e(ids), Hashing),
    "no tensor of ids": (lambda e, ids: e({"ids": ids}), Unasked),
}


@pytest.mark.parametrize("case", CASES)
def test_the_drift_is_the_true_one_and_the_model_stays(case: str, tmp_path: Path) -> None:
    read, kind = CASES[case]
    trained, fresh = Model(read, 1, kind), Model(read, 2, kind)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    truth = true_drift(trained)
    assert truth > 1e-4
    manifest = export(tmp_path, fresh, trained, dtype={"*": "bfloat16"})
    entry = manifest.drift.outputs["torch_output_0"]
    assert entry.max_abs == pytest.approx(truth, rel=1e-3)
    assert manifest.drift.batches == 2
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    is_whole = case in WHOLE
    asked = manifest.run["sample"]["asked"]
    assert asked.get("sparse_arch.user.weight", 0) == (0 if is_whole else 4)
    assert asked["sparse_arch.item.weight"] == 4
    notes = [note for note in manifest.notes if "is read as a whole by the sparse arch" in note]
    assert len(notes) == is_whole


def test_the_bound_holds_for_it(tmp_path: Path) -> None:
    read = BY_ID["F.embedding"]
    trained = Model(read, 1)
    with pytest.raises(DriftError, match="by up to"):
        export(tmp_path, Model(read, 2), trained, dtype={"*": "bfloat16"}, max_drift=true_drift(trained) * 0.99)


@pytest.mark.parametrize("how", ["F.embedding", "one-hot"])
def test_a_row_that_is_pruned_drifts_however_it_is_read(how: str, tmp_path: Path) -> None:
    trained = Model((BY_ID | WHOLE)[how], 1)
    without = copy.deepcopy(trained)
    without.sparse_arch.user.weight.data[[3, 6]] = 0.0
    with torch.no_grad():
        truth = max(float((trained.eval()(b) - without.eval()(b)).abs().max()) for b in BATCHES)
    np.save(tmp_path / "deny.npy", np.array([3, 6]))
    manifest = export(
        tmp_path,
        Model((BY_ID | WHOLE)[how], 2),
        trained,
        to_hash_tables=["*user*"],
        prune=[{"tables": "*user*", "deny": str(tmp_path / "deny.npy")}],
    )
    assert manifest.drift.outputs["torch_output_0"].max_abs == pytest.approx(truth, rel=1e-3)
    assert manifest.run["drift"]["pruned"] == (2 if how == "F.embedding" else 0)
    assert manifest.parity.from_files.reference == "copy"


@pytest.mark.parametrize("how", ["F.embedding", "one-hot", "norm"])
def test_a_model_in_memory_drifts_by_what_the_package_has(how: str, tmp_path: Path) -> None:
    """Also by a matrix that no module looks up, and whose own values stay."""
    model = Model((BY_ID | WHOLE)[how], 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    manifest = export(tmp_path, model, None, dtype={"*": "bfloat16"})
    assert manifest.drift.outputs["torch_output_0"].max_abs == pytest.approx(true_drift(model), rel=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_table_that_is_read_whole_and_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Large(Model):
        def __init__(self, seed: int) -> None:
            super().__init__(lambda e, ids: e(ids), seed)
            self.sparse_arch.large = nn.Parameter(torch.full((300_000, 64), float(seed)))
            self.sparse_arch.read = lambda e, ids: e(ids) + self.sparse_arch.large.mean(0)[:DIM]

    with pytest.raises(
        ModelError, match=r"'sparse_arch.large' is read as a whole .*aten::mean.*76,800,000 bytes .* max_memory"
    ) as caught:
        export(tmp_path, Large(2), Large(1), max_memory="64MiB")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
    manifest = export(tmp_path / "fits", Large(2), Large(1))
    assert manifest.drift.outputs["torch_output_0"].max_abs == 0
    with (tmp_path / "fits/out/fx_user_model/output_base.pkl").open("rb") as file, torch.no_grad():
        torch.testing.assert_close(pickle.load(file), Large(1).eval()(BATCHES[0]))


# ---- what cannot be seen is not measured -----------------------------------------------------------------------------


class HashArch(tiny_model.SparseArch):
    """Reads the users' rows in a way of its own."""

    how = ""

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        user, item = self.user, self.item(batch["item"])
        if self.how == "forward":
            return {"user": user.forward(batch["user"]), "item": item, "price": batch["price"]}
        user(batch["user"][:1])  # so that some rows are there
        if self.how == "embeddings":
            rows = user.embeddings()
        elif self.how == "ids":
            rows = torch.ones(1, 4) * len(user.ids())
        else:
            rows = torch.stack(list(user._rows.values()))
        return {"user": rows[:1].expand(len(item), -1), "item": item, "price": batch["price"]}


class Table(tiny_model.LookalikeTable):
    def embeddings(self) -> torch.Tensor:
        return torch.stack([self._rows[number] for number in self.ids().tolist()])


def hash_model(how: str) -> nn.Module:
    model = tiny_model.build_model()
    model.sparse_arch = HashArch()
    model.sparse_arch.how = how
    model.sparse_arch.user = Table("user_emb")
    return model


def export_hashed(tmp_path: Path, how: str, **settings: Any) -> dist_export.Manifest:
    if not (tmp_path / "ck").exists():
        tiny_model.write_tiny_checkpoint(tmp_path / "ck")
    data = [batch for _, batch in tiny_model.build_dataset()]
    return exports.exporter(
        hash_model(how), "sparse_arch", "dense_arch", data, tmp_path / "ck", tmp_path / "out", filter_sparse_opt=True,
        dtype={"*": "bfloat16"}, **settings,
    ).export()  # fmt: skip


def test_a_hash_table_whose_forward_is_called_is_fed(tmp_path: Path) -> None:
    one = export_hashed(tmp_path, "forward")
    assert one.run["sample"]["asked"] == {"item_emb": 5, "user_emb": 5}
    assert one.drift.outputs["ctr"].max_abs > 0
    assert one.drift.not_measured is msgspec.UNSET


READ_BY = {"embeddings": r"embeddings\(\)", "ids": r"ids\(\)", "memory": "aten::stack|aten::cat"}


@pytest.mark.parametrize("how", READ_BY)
def test_a_hash_table_that_is_read_otherwise_is_not_measured(how: str, tmp_path: Path) -> None:
    manifest = export_hashed(tmp_path, how)
    assert (manifest.drift.batches, manifest.drift.outputs) == (0, {})
    assert re.search(
        f"of table 'user_emb' the model has used its own rows: .* reads by ({READ_BY[how]})",
        manifest.drift.not_measured,
    )
    told = "\n".join(summarize(manifest, [], "out"))
    assert f"drift    not measured: {manifest.drift.not_measured}" in told
    assert "and rows of the model's own (see the drift)" in told
    assert any("of table 'user_emb' the sample used the model's own rows" in note for note in manifest.notes)


def test_a_bound_for_what_is_not_measured_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match="max_drift bounds the drift, which cannot be measured: of table 'user_emb'"
    ) as caught:
        export_hashed(tmp_path, "embeddings", max_drift=1.0)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_read_that_only_a_later_batch_shows_fails_the_bound_too(tmp_path: Path) -> None:
    tiny_model.write_tiny_checkpoint(tmp_path / "ck")
    ((_, batch),) = tiny_model.build_dataset()

    class Later(HashArch):
        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            self.how = "ids" if "late" in batch else "forward"
            return super().forward(batch)

    model = hash_model("")
    model.sparse_arch.__class__ = Later
    data = [batch, batch | {"late": torch.ones(5)}]
    exporter = exports.exporter(
        model,
        "sparse_arch",
        "dense_arch",
        data,
        tmp_path / "ck",
        tmp_path / "out",
        filter_sparse_opt=True,
        max_drift=1.0,
    )
    with pytest.raises(ModelError, match="which cannot be measured: of table 'user_emb'"):
        exporter.export()
    assert not (tmp_path / "out").exists()


class Scripted(nn.Module):
    """Looks rows up in one table, and in code that is scripted in another."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.user = nn.Embedding(ROWS, DIM)
        self.item = nn.EmbeddingBag(ROWS, DIM, mode="sum")

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = batch["ids"]
        return {"user": self.user(ids) + self.user.weight[ids], "item": self.item(ids.unsqueeze(1))}


def scripted_model(seed: int, how: str) -> nn.Module:
    model = Model(BY_ID["forward"], seed)
    arch = torch.jit.script(Scripted(seed).eval())
    model.sparse_arch = torch.jit.freeze(arch) if how == "frozen" else arch
    return model


@pytest.mark.parametrize("is_live", [False, True])
def test_a_scripted_sparse_arch_has_the_checkpoints_rows(is_live: bool, tmp_path: Path) -> None:
    trained = scripted_model(1, "")
    plain = Model(BY_ID["forward"], 1)
    plain.sparse_arch, plain.dense_arch = Scripted(1), trained.dense_arch
    model = trained if is_live else scripted_model(2, "")
    manifest = export(tmp_path, model, None if is_live else trained, dtype={"*": "bfloat16"})
    assert {table.name for table in manifest.tables} == {"sparse_arch.user.weight", "sparse_arch.item.weight"}
    assert manifest.drift.outputs["torch_output_0"].max_abs == pytest.approx(true_drift(plain), rel=1e-3)


def test_a_frozen_one_does_not(tmp_path: Path) -> None:
    trained = Model(BY_ID["forward"], 1)
    model = scripted_model(2, "frozen")
    tables = ["sparse_arch.*.weight"]
    manifest = export(tmp_path, model, trained, dtype={"*": "bfloat16"}, treat_as_tables=tables)
    assert "sparse_arch is scripted and has a constant of its shape" in manifest.drift.not_measured
    with pytest.raises(ModelError, match="cannot be measured"):
        export(tmp_path / "bounded", model, trained, treat_as_tables=tables, max_drift=1.0)


def test_batches_that_look_nothing_up_measure_nothing(tmp_path: Path) -> None:
    class Blind(nn.Module):
        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            ids = batch["ids"][:, None]
            return {"user": ids.expand(-1, DIM) / 7, "item": ids.expand(-1, DIM) / 5}

    trained, model = Model(BY_ID["forward"], 1), Model(BY_ID["forward"], 1)
    model.sparse_arch = Blind()
    manifest = export(tmp_path, model, trained, treat_as_tables=["sparse_arch.*.weight"])
    assert manifest.drift.not_measured == "no batch was seen to look up a table of the package"


@pytest.mark.parametrize("how", [*BY_ID, *WHOLE])
@pytest.mark.parametrize("is_scripted", [False, True])
def test_every_way_of_reading_gives_the_checkpoints_rows(how: str, is_scripted: bool, tmp_path: Path) -> None:
    read = (BY_ID | WHOLE)[how]
    embedding = nn.Embedding(ROWS, DIM)
    sparse: nn.Module = Sparse(lambda s, ids: read(s.user, ids), user=embedding)
    if is_scripted:
        if how not in {"F.embedding", "index_select", "one-hot", "weight[ids]"}:
            pytest.skip("the same operators")
        sparse = torch.jit.trace(Traced(embedding, read), IDS, strict=False)
    before = embedding.weight.detach().clone()
    finder = open_finder(tmp_path / "ck", {"sparse.user": table_of(list(range(ROWS)), dim=DIM, num_parts=1)})
    found, counts = run(sparse, IDS, as_numbers(finder), name="sparse")
    truth = nn.Embedding(ROWS, DIM, _weight=rows(*range(ROWS), dim=DIM))
    with torch.no_grad():
        assert torch.equal(found, read(truth, IDS))
    assert torch.equal(embedding.weight, before)
    assert bool(counts.whole) == (how in WHOLE)
    if how in BY_ID:
        assert counts.num_found == counts.asked["sparse.user"] <= 5
    else:
        assert not counts.asked
        assert counts.num_found == ROWS
    assert not counts.unseen


class Traced(nn.Module):
    def __init__(self, user: nn.Module, read: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.user = user
        self.read = read

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": self.read(self.user, ids)}


def as_numbers(finder: RowFinder) -> RowFinder:
    """RecIS's ids are the numbers of the rows here: let the finder say so, as it does of other formats."""
    finder.rows_by_number = lambda _: ROWS  # type: ignore[method-assign]
    return finder
