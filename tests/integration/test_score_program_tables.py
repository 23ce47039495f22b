"""The score program of models whose tables are hash tables, and of modules that are lookups as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export.api import Exporter
from dist_export.errors import ModelError, UserError
from dist_export.verify.verify import verify
from tests.support import score_models as models
from tests.support import sharded_model, tiny_model


def export(tmp_path: Path, model: nn.Module, dataset: Any, source: Path, **settings: Any) -> dist_export.Package:
    settings = {"score_program": "require", "filter_sparse_opt": True, **settings}
    Exporter(model, "sparse_arch", "dense_arch", dataset, source, tmp_path / "out", **settings).export(progress=False)
    return dist_export.open_package(tmp_path / "out")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_model.write_tiny_checkpoint(tmp_path / "source")


def expected(package: dist_export.Package, batch: dict[str, torch.Tensor]) -> np.ndarray:
    dense = tiny_model.DenseArch().eval()
    dense.load_state_dict({k.removeprefix("dense_arch."): v for k, v in tiny_model.trained_dense_state().items()})
    rows = {name: torch.from_numpy(package.lookup(f"{name}_emb", batch[name])[0]) for name in ("user", "item")}
    with torch.no_grad():
        return dense({**rows, "price": batch["price"]})["ctr"].numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"filter_sparse_opt": False},
        {"num_shards": 3, "default_row": {"user_emb": [0.5, -1.0, 2.0, 0.25]}},
        {"prune": [{"tables": "*", "norm_at_most": 1.0}], "default_row": {"*": [1.0, 1.0, 1.0, 1.0]}},
        {"rename_tables": {"*_emb": "{0}_emb"}, "archive_format": "legacy"},
    ],
    ids=["filter", "copy", "default_row", "prune", "legacy"],
)
def test_hash_tables_of_recis_are_lookups(tmp_path: Path, source: Path, settings: dict[str, Any]) -> None:
    package = export(tmp_path, tiny_model.build_model(), tiny_model.build_dataset(), source, **settings)
    (_, batch), *_ = tiny_model.build_dataset(9)
    batch = {**batch, "user": batch["user"].clone()}
    batch["user"][4] = 99999999  # without a row
    np.testing.assert_allclose(package.score(batch)["ctr"], expected(package, batch), rtol=1e-5, atol=1e-6)
    assert package.manifest.score.tables == ("item_emb", "user_emb")
    assert package.manifest.score.row_modules == {}
    assert verify(package.directory.path).findings == []


def test_it_is_in_a_package_that_is_made_in_place(tmp_path: Path, source: Path) -> None:
    Exporter(
        tiny_model.build_model(), "sparse_arch", "dense_arch", tiny_model.build_dataset(), source, source,
        filter_sparse_opt=False, score_program="require",
    ).export(progress=False)  # fmt: skip
    package = dist_export.open_package(source)
    (_, batch), *_ = tiny_model.build_dataset(4)
    np.testing.assert_allclose(package.score(batch)["ctr"], expected(package, batch), rtol=1e-5, atol=1e-6)


def test_children_of_a_coalesced_table_are_looked_up_in_their_own_tables(tmp_path: Path) -> None:
    source = sharded_model.write_source(tmp_path / "source")
    package = export(tmp_path, sharded_model.Model(), [(False, sharded_model.batch_of(7, 0))], source)
    for num_examples in (1, 2, 64):
        batch = sharded_model.batch_of(num_examples, num_examples)
        found = package.score(batch)
        for name, scores in sharded_model.expected_scores(batch).items():
            np.testing.assert_allclose(found[name], scores, rtol=1e-5, atol=1e-6)


class Listed(nn.Module):
    """Looks up one id after the other, which torch.export cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(models.ROWS, models.DIM)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.rows.weight[i] for i in ids.tolist()])


class Shifted(Listed):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward((ids + 1) % models.ROWS)


def untraceable(kind: type[nn.Module]) -> nn.Module:
    return models.Model(models.Lookups(kind(), lambda its, batch: its.table(batch["user"])), models.DIM + 1)


def export_plain(tmp_path: Path, kind: type[nn.Module], **settings: Any) -> tuple[dist_export.Package, nn.Module]:
    trained = models.train(untraceable(kind))
    checkpoint = Path(models.save(trained, tmp_path / "model.pth"))
    dataset = [models.batch_of()]
    return export(tmp_path, untraceable(kind), dataset, checkpoint, **settings), trained


@pytest.mark.parametrize("settings", [{}, {"lookup_modules": ["sparse_arch.tab*"]}])
def test_a_module_that_cannot_be_traced_is_a_lookup_as_a_whole(tmp_path: Path, settings: dict[str, Any]) -> None:
    package, trained = export_plain(tmp_path, Listed, **settings)
    assert package.manifest.score.row_modules == {"table": "sparse_arch.table.rows.weight"}
    notes = [note for note in package.manifest.notes if "whole modules" in note]
    assert len(notes) == (0 if settings else 1)
    batch = models.batch_of(9, seed=2)
    with torch.no_grad():
        scores = trained(batch)["ctr"].numpy()
    np.testing.assert_allclose(package.score(batch)["ctr"], scores, rtol=1e-5, atol=1e-6)


def test_a_module_that_returns_other_rows_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"require.*tolist"):
        export_plain(tmp_path, Shifted)


class CappedList(Listed):
    """Ids from 20 on share a row. torch cannot export this."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids.clamp(max=19))


def test_a_module_that_is_a_lookup_for_the_samples_ids_alone_is_none(tmp_path: Path) -> None:
    small = models.batch_of() | {"user": torch.arange(6)}
    model, path = untraceable(CappedList), tmp_path / "model.pth"
    checkpoint = Path(models.save(models.train(model), path))
    with pytest.raises(ModelError, match="with other ids of the tables"):
        export(tmp_path, untraceable(CappedList), [small], checkpoint)
    (tmp_path / "auto").mkdir()
    package = export(tmp_path / "auto", untraceable(CappedList), [small], checkpoint, score_program="auto")
    assert package.manifest.score is msgspec.UNSET
    assert any("with other ids of the tables" in note for note in package.manifest.notes)


class Hashed(Listed):
    """Ids share rows by their remainder. torch cannot export this."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids % models.ROWS)


class TwoIds(nn.Module):
    """A module of hashed ids beside one that refuses row numbers that its table lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.user = Hashed()
        self.item = Listed()

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"block": self.user(batch["user"]) + self.item(batch["item"]), "price": batch["price"]}


@pytest.mark.parametrize("kind", [Hashed, TwoIds])
def test_a_module_that_hashes_ids_of_which_the_sample_has_none_beyond_the_rows_is_none(
    tmp_path: Path, kind: type[nn.Module]
) -> None:
    """The model has a row for each id, and lookups have none for those beyond the rows."""
    sample = models.batch_of() | {"user": torch.arange(6), "item": torch.arange(6)}
    build = (lambda: untraceable(Hashed)) if kind is Hashed else lambda: models.Model(TwoIds(), models.DIM + 1)
    checkpoint = Path(models.save(models.train(build()), tmp_path / "model.pth"))
    with pytest.raises(ModelError, match="with row numbers that the tables lack"):
        export(tmp_path, build(), [sample], checkpoint, score_program="require")


class CappedRows(nn.Module):
    """A table whose values are capped before rows are looked up, which changes few rows, and none of the sample's."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000, models.DIM))
        self.how = how

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.how == "clamp":
            return nn.functional.embedding(ids, self.weight.clamp(-6, 6))
        if self.how == "torch":
            return torch.clip(torch.nan_to_num(self.weight), max=6)[ids]
        bags = nn.functional.embedding_bag(ids.unsqueeze(1), self.weight.clamp_max(6), mode="sum")
        return torch.clamp_min(bags, -100)


@pytest.mark.parametrize("how", ["clamp", "torch", "bags"])
def test_a_table_whose_values_are_capped(tmp_path: Path, how: str) -> None:
    """The few rows beyond the cap are not among the ids that an export can try."""
    build = lambda: models.Model(
        models.Lookups(CappedRows(how), lambda its, batch: its.table(batch["user"])), models.DIM + 1
    )
    trained = models.train(build())
    with torch.no_grad():
        trained.sparse_arch.table.weight[501] = torch.tensor([7.0, -5.0, 2.0, 50.0])
        trained.dense_arch.mlp[0].weight *= 0.1
    checkpoint = Path(models.save(trained, tmp_path / "model.pth"))
    settings = {"treat_as_tables": ["sparse_arch.table.weight"]}
    package = export(tmp_path, build(), [models.batch_of()], checkpoint, **settings)
    assert package.manifest.score.row_modules == {}
    batch = models.batch_of(3) | {"user": torch.tensor([501, 3, 999])}
    with torch.no_grad():
        scores = trained(batch)["ctr"].numpy()
        trained.sparse_arch.table.weight[501] = 0
        assert abs(scores - trained(batch)["ctr"].numpy()).max() > 1e-3
    np.testing.assert_allclose(package.score(batch)["ctr"], scores, rtol=1e-5, atol=1e-6)


class Capped(nn.Module):
    """Ids from 20 on share a row. torch can export this."""

    def __init__(self, rows: nn.Module) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.rows(ids.clamp(max=19))


class TwoModules(nn.Module):
    """Two tables, and the modules that look them up."""

    def __init__(self, user: nn.Module, item: nn.Module) -> None:
        super().__init__()
        self.user, self.item = user, item

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"user": self.user(batch["user"]), "item": self.item(batch["item"]), "price": batch["price"]}


@pytest.mark.parametrize("is_inside", [False, True], ids=["beside", "inside"])
def test_only_the_module_that_cannot_be_traced_is_a_lookup(tmp_path: Path, *, is_inside: bool) -> None:
    """The sample has no id from 20 on, so that the module gives exactly the rows of its ids; its code stays all the same."""

    def build() -> nn.Module:
        plain = nn.Embedding(models.ROWS, models.DIM)
        user, item = (Capped(Listed()), plain) if is_inside else (Capped(plain), Listed())
        return models.Model(TwoModules(user, item), 2 * models.DIM + 1)

    def batch_of(first: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(first, first + 6)
        return {"user": ids, "item": ids, "price": torch.rand(6, 1, generator=torch.Generator().manual_seed(first))}

    trained = models.train(build())
    checkpoint = Path(models.save(trained, tmp_path / "model.pth"))
    package = export(tmp_path, build(), [batch_of(0)], checkpoint)
    assert list(package.manifest.score.row_modules) == ["user.rows" if is_inside else "item"]
    for first in (0, 18, 24):
        with torch.no_grad():
            scores = trained(batch_of(first))["ctr"].numpy()
        np.testing.assert_allclose(package.score(batch_of(first))["ctr"], scores, rtol=1e-5, atol=1e-6)


def test_a_module_that_is_wrongly_named_as_a_lookup_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"on the sample: the score program differs from the model"):
        export_plain(tmp_path, Shifted, lookup_modules=["table"])


@pytest.mark.parametrize(
    ("pattern", "told"), [("nothing", "names no module"), ("*", "does not hold exactly one table")]
)
def test_patterns_that_fit_no_lookup_are_told(tmp_path: Path, pattern: str, told: str) -> None:
    model = models.Model(models.ThreeTables(), 3 * models.DIM + 1)
    checkpoint = Path(models.save(models.train(model), tmp_path / "model.pth"))
    with pytest.raises(UserError, match=f"lookup_modules: .*{told}"):
        export(tmp_path, model, [models.batch_of()], checkpoint, lookup_modules=[pattern])


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    """The stand-ins are gone, also after a trace that failed."""
    model = untraceable(Shifted)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    checkpoint = Path(models.save(models.train(untraceable(Shifted)), tmp_path / "model.pth"))
    export(tmp_path, model, [models.batch_of()], checkpoint, score_program="auto")
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model.sparse_arch.table.rows.weight, nn.Parameter)
    assert "weight" not in vars(model.sparse_arch.table.rows)
    assert "forward" not in vars(model.sparse_arch.table)


def test_a_package_as_the_source_keeps_its_score_program(tmp_path: Path, source: Path) -> None:
    first = export(tmp_path, tiny_model.build_model(), tiny_model.build_dataset(), source)
    dist_export.export(
        {"ckpt_dir": first.directory.path, "export_dir": str(tmp_path / "again"), "num_shards": 4, "progress": False}
    )
    again = dist_export.open_package(tmp_path / "again")
    (_, batch), *_ = tiny_model.build_dataset(6)
    np.testing.assert_array_equal(first.score(batch)["ctr"], again.score(batch)["ctr"])
    assert verify(again.directory.path).findings == []
