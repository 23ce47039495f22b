"""``diff`` of a checkpoint and a package: the counts of the package that an export of the checkpoint gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_export.cli import main
from dist_export.diff.compare import diff
from tests.integration.test_delta_export import SETTINGS, change, export, save, tables_of
from tests.integration.test_delta_refresh import export as export_model
from tests.integration.test_delta_scores import build, train_on
from tests.support import dcp_writer
from tests.support import score_models as models
from tests.support.recis_writer import PartSpec, gen_slice, write_checkpoint


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, before = tmp_path_factory.mktemp("sources"), tables_of()
    return save(folder / "before", before, 2), save(folder / "after", change(before), 3)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    code = main(["diff", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def counts(tables: Any) -> list[tuple[Any, ...]]:
    names = ("name", "same", "changed", "new", "deleted", "max_abs")
    return sorted(tuple(table[name] for name in names) for table in tables)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "pruned"])
def test_a_checkpoint_counts_as_its_package(sources, tmp_path: Path, name: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr("dist_export.diff.checkpoint.MOST_ROWS", 401)
    before, after = sources
    packages = [export(source, tmp_path / str(number), **SETTINGS[name]) for number, source in enumerate(sources)]
    expected = counts(diff(*packages).as_json()["tables"])
    assert run(capsys, packages[0], packages[0])[0] == 0
    for pair in ((packages[0], after), (before, packages[1])):
        code, found = run(capsys, *pair)
        assert code == 1
        assert counts(found["tables"]) == expected
    for source, package in zip(sources, packages, strict=True):
        code, found = run(capsys, source, package)
        assert (code, found["is_equal"]) == (0, True)
        assert not any(table["slots"] for table in found["tables"])
        assert (
            "no dense parameter" in found["not_compared"] or "not the code of the dense arch" in found["not_compared"]
        )


@pytest.mark.parametrize("kind", ["torch", "dcp"])
def test_the_dense_parameters_are_compared(tmp_path: Path, capsys, kind: str) -> None:
    def save_as(name: str) -> str:
        if kind == "torch":
            return models.save(model, tmp_path / name)
        return str(dcp_writer.save(tmp_path / name, model.state_dict()))

    model = models.train(build())
    before = save_as("before")
    train_on(model)
    after = save_as("after")
    packages = [tmp_path / "one", tmp_path / "two"]
    for checkpoint, package in zip((before, after), packages, strict=True):
        export_model(checkpoint, package, score_program="off")
    expected = diff(*map(str, packages)).as_json()["dense"]
    assert len(expected["changed"]) == 4
    for pair in ((packages[0], after), (before, packages[1])):
        code, found = run(capsys, *pair)
        assert (code, found["dense"]["changed"]) == (1, expected["changed"])
    code, found = run(capsys, before, packages[0])
    assert (code, found["dense"]["same"], found["dense"]["changed"]) == (0, 4, {})
    assert "not the code of the dense arch" in found["not_compared"]


def test_a_dense_parameter_that_the_checkpoint_lacks_is_a_difference(tmp_path: Path, capsys) -> None:
    model = models.train(build())
    package = tmp_path / "package"
    export_model(models.save(model, tmp_path / "whole.pth"), package, score_program="off")
    state = model.state_dict()
    name = next(name for name in state if name.startswith("dense_arch."))
    torch.save({key: value for key, value in state.items() if key != name}, tmp_path / "part.pth")
    code, found = run(capsys, tmp_path / "part.pth", package)
    assert (code, found["dense"]["only_in_b"], found["dense"]["only_in_a"]) == (1, [name], [])
    code, found = run(capsys, package, tmp_path / "part.pth")
    assert (code, found["dense"]["only_in_a"], found["dense"]["only_in_b"]) == (1, [name], [])


class Projected(nn.Module):
    """A sparse arch with a layer of its own, which the score program alone holds."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.layer = nn.Embedding(models.ROWS, models.DIM), nn.Linear(1, 1)

    def forward(self, batch: models.Batch) -> models.Batch:
        return {"user": self.user(batch["user"]), "price": self.layer(batch["price"])}


@pytest.mark.parametrize("has_name", [True, False])
def test_parameters_of_the_sparse_arch_are_compared(tmp_path: Path, capsys, has_name: bool) -> None:
    """Of a layer that was trained on, it was said that serving gets the same."""
    model = models.train(models.Model(Projected(), models.DIM + 1))
    package = tmp_path / "package"
    export_model(models.save(model, tmp_path / "a.pth"), package, model, score_program="require")
    assert run(capsys, tmp_path / "a.pth", package)[0] == 0
    state = model.state_dict()
    name = "sparse_arch.layer.weight"
    if has_name:
        state[name] = state[name] + 1
    else:
        del state[name]
    torch.save(state, tmp_path / "b.pth")
    code, found = run(capsys, tmp_path / "b.pth", package)
    assert (code, list(found["dense"]["changed"])) == (1, [name] if has_name else [])
    assert found["dense"]["only_in_b"] == ([] if has_name else [name])


def test_pruned_rows_are_only_in_the_checkpoint(sources, tmp_path: Path, capsys) -> None:
    package = export(sources[0], tmp_path / "out", prune=[{"tables": ["item"], "slot": "step", "below": 700}])
    code, found = run(capsys, sources[0], package)
    assert code == 1
    assert [its[1:5] for its in counts(found["tables"])] == [(2300, 0, 0, 700), (500, 0, 0, 0)]
    assert found["settings"]["prune"][0] == "no rules"


def test_a_delta_counts_with_its_base(sources, tmp_path: Path, capsys) -> None:
    base = export(sources[0], tmp_path / "base")
    delta = export(sources[1], tmp_path / "delta", base=str(base))
    assert run(capsys, sources[1], delta)[0] == 0
    found = run(capsys, delta, sources[0])[1]
    assert counts(found["tables"]) == counts(diff(delta, base).as_json()["tables"])


def test_tables_of_a_dcp_checkpoint_are_those_of_the_package(tmp_path: Path, capsys) -> None:
    """By number, and by number as ids; a slot of the optimizer is in no package."""
    weight = torch.arange(400 * 8, dtype=torch.float32).reshape(400, 8)
    before = dcp_writer.save(tmp_path / "before", {"sparse_arch.item.weight": weight, "dense_arch.bias": weight[0]})
    later = torch.cat([weight, weight[:5]])
    later[7] += 0.25
    after = dcp_writer.save(tmp_path / "after", {"sparse_arch.item.weight": later, "dense_arch.bias": weight[1]})
    for name, more in (("numbers", {}), ("ids", {"to_hash_tables": ["*"]})):
        package = export(before, tmp_path / name, treat_as_tables=["*.item.weight"], **more)
        assert run(capsys, before, package)[0] == 0
        code, found = run(capsys, package, after)
        assert code == 1
        assert counts(found["tables"]) == [("sparse_arch.item.weight", 399, 1, 5, 0, 0.25)]
        assert counts(run(capsys, after, package)[1]["tables"])[0][1:5] == (399, 1, 0, 5)


def test_what_cannot_be_compared_is_one_line(sources, tmp_path: Path, capsys) -> None:
    package = export(sources[0], tmp_path / "out")
    ids = np.array([5, 5, 9])
    part = PartSpec(ids, {"embedding": np.arange(24, dtype=np.float32).reshape(3, 8)}, gen_slice(0, 1))
    twice = write_checkpoint(tmp_path / "twice", {"item": [part]})
    for arguments, text in (
        ((sources[0], sources[1]), "A and B are checkpoints"),
        ((sources[0], package, "--base_a", package), "--base_a is for delta packages, and A is a checkpoint"),
        ((package, package, "--format", "recis"), "--format is for checkpoints"),
        ((twice, package), "item"),
        ((sources[0], tmp_path), "manifest.json"),
    ):
        assert main(["diff", *map(str, arguments)]) == 2
        message = capsys.readouterr().err
        assert text in message
        assert message.count("\n") == 1
    found = run(capsys, twice, package, "--on_duplicate", "first")[1]
    assert counts(found["tables"]) == [("item", 0, 0, 3000, 2, 0.0), ("user", 0, 0, 500, 0, 0.0)]


def test_other_tables_slots_and_widths_are_told(sources, tmp_path: Path, capsys) -> None:
    tables = tables_of()
    ids, slots = tables["item"]
    other = save(
        tmp_path / "other", {"item": (ids, {"embedding": slots["embedding"][:, :4].copy()}), "shop": tables["user"]}, 1
    )
    package = export(sources[0], tmp_path / "out")
    assert main(["diff", str(other), str(package)]) == 1
    told = capsys.readouterr().out
    assert "table item: the rows of both are of different kinds; 3,000 rows in A, 3,000 in B" in told
    assert "slot 'embedding' is float32 [4] in the checkpoint, float32 [8] in the package" in told
    assert "slot 'step' is only in the package" in told
    assert "the table is only in the checkpoint" in told
    assert "the table is only in the package" in told
    assert "not the code of the dense arch, and no scores" in told


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_table_that_the_checkpoint_lacks_is_a_difference(prefix: str, tmp_path: Path, capsys) -> None:
    """It was an error that named a setting which nobody had given."""
    weights = {f"sparse_arch.{name}.weight": torch.rand(rows, 4) for name, rows in (("item", 9), ("user", 5))}
    torch.save(weights, tmp_path / "whole.pth")
    package = export(tmp_path / "whole.pth", tmp_path / "out", treat_as_tables=["*.weight"])
    del weights["sparse_arch.user.weight"]
    torch.save({prefix + name: its for name, its in weights.items()}, tmp_path / "less.pth")
    code, found = run(capsys, tmp_path / "less.pth", package)
    assert code == 1
    assert counts(found["tables"]) == [
        ("sparse_arch.item.weight", 9, 0, 0, 0, 0.0),
        ("sparse_arch.user.weight", 0, 0, 5, 0, 0.0),
    ]
    assert [table["slots"] for table in found["tables"]] == [[], ["the table is only in the package"]]
