"""``diff``: what two packages hold that is the same, changed, new and deleted, against rows that the test itself has written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export.api import Exporter
from dist_export.cli import main
from dist_export.diff.compare import diff
from dist_export.diff.text import render_diff
from dist_export.errors import UserError
from dist_export.manifest import MANIFEST
from tests.support import exports
from tests.support import score_models as models
from tests.support.recis_writer import split_table, write_checkpoint

DIM = 8
ROWS = {"item": 3000, "user": 500}


def rows_of(seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return ids and rows by table."""
    random = np.random.default_rng(seed)
    return {
        name: (random.choice(1 << 40, count, replace=False), random.normal(size=(count, DIM)).astype(np.float32))
        for name, count in ROWS.items()
    }


def write(folder: Path, tables: dict[str, tuple[np.ndarray, np.ndarray]], shards: int = 2, **settings: Any) -> Path:
    """Write a checkpoint of these rows, and export it."""
    parts = {name: split_table(ids, {"embedding": rows}, shards) for name, (ids, rows) in tables.items()}
    source = write_checkpoint(folder / "ckpt", parts)
    given = {
        "ckpt_dir": str(source),
        "export_dir": str(folder / "out"),
        "filter_sparse_opt": True,
        "num_shards": shards,
    }
    exports.export(given | settings)
    return folder / "out"


def change(tables: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return other rows: of ``item`` 3 changed, by 0.5 at most, one of them by the sign of a zero; 4 new and 5 deleted."""
    ids, rows = (array.copy() for array in tables["item"])
    rows[10, 3] += 0.5
    rows[2000] -= 0.25
    rows[700, 0] = -0.0
    ids, rows = ids[:-5], rows[:-5]
    fresh = np.arange(4) + (1 << 41)
    return {**tables, "item": (np.concatenate([ids, fresh]), np.concatenate([rows, np.ones((4, DIM), np.float32)]))}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("pair")
    before = rows_of()
    before["item"][1][700, 0] = 0.0
    return write(base / "a", before), write(base / "b", change(before), shards=3)


def test_each_row_is_counted_once(pair) -> None:
    found = diff(*pair)
    item, user = (next(table for table in found.tables if table.name == name) for name in ("item", "user"))
    assert (item.same, item.changed, item.new, item.deleted) == (3000 - 3 - 5, 3, 4, 5)
    assert item.max_abs == pytest.approx(0.5, abs=1e-6)
    assert (user.same, user.changed, user.new, user.deleted) == (500, 0, 0, 0)
    assert user.is_equal
    assert not found.is_equal
    assert found.settings["num_shards"] == ("2", "3")


def test_the_other_way_round_new_rows_are_gone(pair) -> None:
    item = next(table for table in diff(*reversed(pair)).tables if table.name == "item")
    assert (item.same, item.changed, item.new, item.deleted) == (2992, 3, 5, 4)


def test_a_small_memory_gives_the_same(pair) -> None:
    """Runs of a few rows each."""
    assert diff(*pair, max_memory=20_000) == diff(*pair)


def test_a_package_equals_itself_and_its_reshard(pair, tmp_path: Path) -> None:
    first, _ = pair
    again = shutil.copytree(first, tmp_path / "again")
    assert diff(first, again).is_equal
    exports.export({"ckpt_dir": str(first), "export_dir": str(tmp_path / "more"), "num_shards": 5})
    found = diff(first, tmp_path / "more")
    assert found.is_equal
    assert sum(table.same for table in found.tables) == sum(ROWS.values())


def test_shards_of_one_digest_are_not_read(pair, tmp_path: Path, monkeypatch) -> None:
    from dist_export.package.reader import Package

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a row was read")

    monkeypatch.setattr(Package, "read_run", refuse)
    first, _ = pair
    assert diff(first, shutil.copytree(first, tmp_path / "again")).is_equal


def test_a_package_without_row_indexes_is_compared_too(pair, tmp_path: Path) -> None:
    before = rows_of()
    before["item"][1][700, 0] = 0.0
    plain = write(tmp_path, before, row_index=False)
    item = next(table for table in diff(plain, pair[1]).tables if table.name == "item")
    assert (item.same, item.changed, item.new, item.deleted) == (2992, 3, 4, 5)


def test_another_dtype_compares_values_and_says_so(pair, tmp_path: Path) -> None:
    tables = rows_of()
    tables["item"] = (tables["item"][0], np.round(tables["item"][1]))  # whole numbers are float16 without loss
    plain = write(tmp_path / "a", tables)
    half = write(tmp_path / "b", tables, dtype={"*": "float16"})
    item, user = diff(plain, half).tables
    assert (item.same, item.changed) == (3000, 0)
    assert item.slots == (f"slot 'embedding' is float32 [{DIM}] in A, float16 [{DIM}] in B",)
    assert not item.is_equal
    assert user.changed > 400
    assert 0 < user.max_abs < 1e-2


def test_tables_that_one_side_lacks(pair, tmp_path: Path) -> None:
    tables = rows_of()
    del tables["user"]
    tables["shop"] = (np.arange(7), np.ones((7, DIM), np.float32))
    found = {table.name: table for table in diff(pair[0], write(tmp_path, tables)).tables}
    assert (found["user"].deleted, found["shop"].new) == (500, 7)
    assert found["user"].slots == ("the table is only in A",)


def test_a_default_row_is_a_difference(pair, tmp_path: Path) -> None:
    exports.export({"ckpt_dir": str(pair[0]), "export_dir": str(tmp_path / "b"), "default_row": {"item": [1.0] * DIM}})
    item, user = diff(pair[0], tmp_path / "b").tables
    assert item.default_row
    assert not item.is_equal
    assert user.is_equal


@pytest.mark.parametrize(("default", "is_other"), [(None, False), ([0.5] * DIM, False), ([0.1] * DIM, True)])
def test_a_default_row_of_another_dtype_is_compared_by_its_values(
    default, is_other: bool, pair, tmp_path: Path
) -> None:
    """A cast of the rows is no other default row, unless it rounds this one, too."""
    settings = {} if default is None else {"default_row": {"item": default}}
    for name, more in (("wide", {}), ("narrow", {"dtype": {"item": "float16"}})):
        exports.export({"ckpt_dir": str(pair[0]), "export_dir": str(tmp_path / name), **settings, **more})
    item, user = diff(tmp_path / "wide", tmp_path / "narrow").tables
    assert (item.name, item.default_row, user.default_row) == ("item", is_other, False)


# ---- the dense arch ----


def train(base: Path, name: str, *, nudge: float = 0.0, look: str = "embedding") -> Path:
    model = models.train(models.Model(models.ThreeTables(), 3 * models.DIM + 1))
    with torch.no_grad():
        model.dense_arch.mlp[0].weight[0, 0] += nudge
    checkpoint = models.save(model, base / f"{name}.pth")
    build = models.Model(models.ThreeTables(), 3 * models.DIM + 1)
    batch = models.inputs_of(model, models.batch_of())
    Exporter(build, "sparse_arch", "dense_arch", [batch], checkpoint, base / name).export(progress=False)
    return base / name


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of three tables, which no test changes."""
    return train(tmp_path_factory.mktemp("three"), "a")


def test_dense_parameters_and_scores(three: Path, tmp_path: Path) -> None:
    first, second = three, train(tmp_path, "b", nudge=0.5)
    found = diff(first, second)
    assert all(table.is_equal for table in found.tables)
    assert list(found.dense.changed.values()) == [pytest.approx(0.5, abs=1e-6)]
    assert found.dense.same == 3
    batch = models.batch_of()
    before, after = (dist_export.open_package(path).score(batch)["ctr"] for path in (first, second))
    assert found.scores.max_abs["ctr"] == pytest.approx(float(np.abs(before - after).max()), rel=1e-5)
    assert any("scores of A's sample differ: ctr" in line for line in render_diff(found))
    assert diff(first, first).is_equal
    third = train(tmp_path, "c")
    assert diff(first, third).is_equal


class Wider(nn.Module):
    """Another output, and inputs of other names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(models.DIM, 1)

    def forward(self, blocks: Any) -> Any:
        return {"cvr": self.layer(blocks["block"])}


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse_arch = models.Lookups(nn.Embedding(models.ROWS, models.DIM), models.WAYS["embedding"][1])
        self.dense_arch = Wider()

    def forward(self, batch: Any) -> Any:
        return self.dense_arch(self.sparse_arch(batch))


def test_other_models_differ_in_words(three: Path, tmp_path: Path) -> None:
    model = models.train(Other())
    given = Other(), "sparse_arch", "dense_arch", [models.inputs_of(model, models.batch_of())]
    Exporter(*given, models.save(model, tmp_path / "other.pth"), tmp_path / "b").export(progress=False)
    found = diff(three, tmp_path / "b")
    assert "output 'ctr' is only in A" in found.dense.others
    assert "input 'block' is only in B" in found.dense.others
    assert "layer.weight" in " ".join(found.dense.only_in_b)
    assert not found.is_equal


class Clamped(models.Model):
    """What the sample does not show is in the score program alone."""

    def __init__(self, most: float) -> None:
        super().__init__(
            models.Lookups(nn.Embedding(models.ROWS, models.DIM), models.WAYS["embedding"][1]), models.DIM + 1
        )
        self.most = most

    def forward(self, batch: Any) -> Any:
        return super().forward({**batch, "price": batch["price"].clamp(max=self.most)})


def test_the_score_program_is_compared_though_the_sample_has_the_same_scores(tmp_path: Path) -> None:
    checkpoint = models.save(models.train(Clamped(5.0)), tmp_path / "c.pth")
    for most in (5.0, 7.0):
        arches = "sparse_arch", "dense_arch"
        model = Clamped(most)
        batch = models.inputs_of(model, models.batch_of())
        Exporter(model, *arches, [batch], checkpoint, tmp_path / str(most)).export(progress=False)
    found = diff(tmp_path / "5.0", tmp_path / "7.0")
    assert not any(found.scores.max_abs.values())
    assert "the code of the score program differs" in found.others
    assert not found.is_equal
    assert any("the code of the score program differs" in line for line in render_diff(found))


# ---- the same model, exported in other ways ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("trained")
    pack(base, "first")
    return base


def pack(base: Path, name: str, batch: Any = None, **settings: Any) -> Path:
    """Export one model of one training."""
    model = models.Model(models.Lookups(nn.Embedding(models.ROWS, models.DIM), models.WAYS["embedding"][1]), 5)
    checkpoint = base / "c.pth" if (base / "c.pth").exists() else models.save(models.train(model), base / "c.pth")
    batch = models.inputs_of(model, models.batch_of() if batch is None else batch)
    Exporter(model, "sparse_arch", "dense_arch", [batch], checkpoint, base / name, **settings).export(progress=False)
    return base / name


def test_other_digests_of_the_files_are_no_difference(trained: Path) -> None:
    """Then both programs are loaded, each bound to its package."""
    assert diff(trained / "first", pack(trained, "sha", digest="sha256")).is_equal


def test_another_sample_size_is_no_difference(trained: Path) -> None:
    assert diff(trained / "first", pack(trained, "more", models.batch_of(40))).is_equal


@pytest.mark.parametrize(
    ("more", "less", "what"),
    [
        ({"dense_formats": ["onnx"]}, {}, "the format 'onnx' is only in {}"),
        (
            {"dense_formats": ["onnx"], "layouts": ["triton"]},
            {"dense_formats": ["onnx"]},
            "the layout 'triton' is only in {}",
        ),
        ({}, {"score_program": "off"}, "only {} has a score program"),
    ],
)
def test_a_file_for_servers_that_one_side_lacks_is_a_difference(trained: Path, more, less, what: str) -> None:
    """A server that loads model.onnx was told that it gets the same from a package without it."""

    def packed(settings: dict[str, Any]) -> Path:
        name = "serve " + " ".join(map(str, settings.values()))
        return trained / name if (trained / name).exists() else pack(trained, name, serving="off", **settings)

    pair = packed(more), packed(less)
    for one, two, side in ((*pair, "A"), (*reversed(pair), "B")):
        found = diff(one, two)
        assert [*found.dense.others, *found.others] == [what.format(side)]
        assert not found.is_equal


def test_other_dtypes_of_ids_are_a_difference(trained: Path) -> None:
    """A program that takes int32 has no ids above 2**31."""
    batch = models.batch_of()
    found = diff(trained / "first", pack(trained, "short", {**batch, "user": batch["user"].int()}))
    assert "score program: input 'user' is int64 [batch] in A, int32 [batch] in B" in found.others
    assert not found.is_equal


def test_a_smaller_largest_batch_is_a_difference(trained: Path) -> None:
    found = diff(trained / "first", pack(trained, "few", max_batch_size=100))
    assert "the largest batch is 204,800 in A, 100 in B" in found.dense.others
    assert "the code of the score program differs" not in found.others


def test_a_default_row_of_zeros_is_none(trained: Path) -> None:
    pack(trained, "hash", to_hash_tables=["*"])
    assert diff(trained / "hash", pack(trained, "zeros", to_hash_tables=["*"], default_row={"*": "zeros"})).is_equal
    others: dict[str, Any] = {"to_hash_tables": ["*"], "default_row": {"*": [1.0] * 4}, "score_program": "off"}
    found = diff(trained / "hash", pack(trained, "ones", **others))
    assert [table.default_row for table in found.tables] == [True]


class Branches(nn.Module):
    """Another branch than the sample's scores otherwise."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.layer, self.most = nn.Linear(models.DIM + 1, 1), most

    def forward(self, blocks: Any) -> Any:
        ctr = self.layer(torch.cat(list(blocks.values()), dim=1))
        return {"ctr": torch.cond(ctr.sum() > 1e6, lambda its: its * self.most, lambda its: its * 1.0, (ctr,))}


def test_branches_of_the_dense_program_are_compared(tmp_path: Path) -> None:
    def build(most: float) -> nn.Module:
        model = models.Model(models.Lookups(nn.Embedding(models.ROWS, models.DIM), models.WAYS["embedding"][1]), 1)
        model.dense_arch = Branches(most)
        return model

    checkpoint = models.save(models.train(build(2.0)), tmp_path / "c.pth")
    for most in (2.0, 3.0):
        arches = "sparse_arch", "dense_arch"
        given = build(most), *arches, [models.batch_of()], checkpoint, tmp_path / str(most)
        Exporter(*given, score_program="off").export(progress=False)
    assert "the code of the dense program differs" in diff(tmp_path / "2.0", tmp_path / "3.0").dense.others


def test_parts_without_rows_are_equal(tmp_path: Path) -> None:
    few = {
        "item": (np.arange(3), np.ones((3, DIM), np.float32)),
        "none": (np.zeros(0, np.int64), np.ones((0, DIM), np.float32)),
    }
    first = write(tmp_path / "a", few, shards=4)
    again = shutil.copytree(first, tmp_path / "again")
    assert diff(first, again).is_equal
    second = write(tmp_path / "b", {**few, "none": (np.arange(2), np.ones((2, DIM), np.float32))}, shards=4)
    assert {table.name: table.new for table in diff(first, second).tables} == {"item": 0, "none": 2}


# ---- the command ----


def test_exit_codes_and_json(pair, tmp_path: Path, capsys) -> None:
    first, second = map(str, pair)
    assert main(["diff", first, first]) == 0
    assert "equal: serving gets the same from both (2 tables, 3,500 rows)" in capsys.readouterr().out
    assert main(["diff", first, second, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told == diff(first, second).as_json()
    assert told["is_equal"] is False
    assert main(["diff", first, second, "--max-memory", "1MiB"]) == 1
    shown = capsys.readouterr().out
    assert "table item: 2,992 rows are the same, 3 changed by up to 0.5, 4 are new, 5 are deleted" in shown
    assert "1 other table is equal" in shown
    assert "num_shards: 2 in A, 3 in B" in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{a}"], "which 2 paths? Usage: dist_export diff A B"),
        (["{a}", "{b}", "{b}"], "is one path too many"),
        (["{a}", "nowhere"], "nowhere"),
        (["{a}", "{empty}"], "no manifest.json"),
        (["{a}", "{b}", "--timeout", "0"], "--timeout is 0"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_exit_code_2(pair, tmp_path: Path, capsys, arguments, told) -> None:
    (tmp_path / "empty").mkdir()
    places = {"a": pair[0], "b": pair[1], "empty": tmp_path / "empty"}
    assert main(["diff", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_damaged_package_is_unreadable_and_not_different(pair, tmp_path: Path) -> None:
    broken = shutil.copytree(pair[1], tmp_path / "broken")
    shard = next(broken.glob("model-*.safetensors"))
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(UserError):
        diff(pair[0], broken)
    (broken / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"no manifest\.json"):
        diff(pair[0], broken)
