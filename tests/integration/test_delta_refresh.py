"""A delta without tables of its own: a new dense part over the base's rows, of which none is read to make it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export.api import Exporter
from dist_export.checkpoint.row_reader import RowReader
from dist_export.cli import main
from dist_export.diff.compare import diff
from dist_export.errors import ConfigError, ExportError, ModelError, PlanError
from dist_export.package.reader import Package
from dist_export.serve.served import Watcher
from dist_export.verify.verify import verify
from tests.integration.test_delta_scores import build, train_on
from tests.support import exports, tiny_model
from tests.support import score_models as models
from tests.support.deltas import manifest_of, put_together, read_package
from tests.support.recis_writer import write_checkpoint

DENSE = tiny_model.trained_dense_state
TINY: dict[str, Any] = {"model": tiny_model.MODEL, "dataset": tiny_model.DATASET}


def export(checkpoint: str, out: Path | str, model: nn.Module | None = None, **settings: Any) -> dist_export.Manifest:
    batch = models.inputs_of(build(), models.batch_of())
    given = [model or build(), "sparse_arch", "dense_arch", [batch]]
    return Exporter(*given, checkpoint, out, **settings).export(progress=False)


def refresh(checkpoint: str, out: Path, base: Path, **settings: Any) -> dist_export.Manifest:
    return export(checkpoint, out, base=str(base), need_export_sparse=False, **settings)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder, model = tmp_path_factory.mktemp("checkpoints"), models.train(build())
    before = models.save(model, folder / "before.pth")
    return before, models.save(train_on(model), folder / "after.pth")


@pytest.fixture(scope="module")
def base(checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of the first checkpoint, which no test changes."""
    out = tmp_path_factory.mktemp("packages") / "base"
    export(checkpoints[0], out)
    return out


@pytest.mark.parametrize(
    "settings", [{}, {"dtype": {"*": "int8"}}, {"dtype": {"*": "float16"}, "to_hash_tables": ["*"]}], ids=str
)
def test_the_dense_part_is_new_and_the_rows_are_those_of_the_base(checkpoints, tmp_path: Path, settings) -> None:
    before, after = checkpoints
    export(before, tmp_path / "base", **settings)
    made = refresh(after, tmp_path / "delta", tmp_path / "base", score_program="require")
    manifest = manifest_of(tmp_path / "delta")
    for table in manifest["tables"]:
        rows = table["delta"]["rows_base"]
        assert table["delta"] == {
            "rows_base": rows,
            "same": rows,
            "changed": 0,
            "new": 0,
            "deleted": 0,
            "deleted_ids": [],
        }
        assert (table["rows_in"], table["rows_out"], table["rows_dropped"]) == (rows, 0, {"same": rows})
        assert rows > 0
    assert put_together(tmp_path / "base", tmp_path / "delta") == read_package(tmp_path / "base")
    assert made.parity is not None
    assert made.parity.from_files is not None
    assert made.parity.from_files.reads_rows
    assert made.drift is not None
    assert made.drift.not_measured
    assert any("older than the dense part" in note for note in made.notes)
    assert not any("was not compared with the base" in note for note in made.notes)
    model = build()
    state = torch.load(after)
    with dist_export.open_package(tmp_path / "delta") as delta, dist_export.open_package(tmp_path / "base") as base:
        for table in delta.manifest.tables:
            ids = np.arange(-2, table.delta.rows_base + 2)
            rows, has_row = delta.lookup(table.name, ids)
            expected, had_row = base.lookup(table.name, ids)
            assert rows.tobytes() == expected.tobytes()
            assert (has_row == had_row).all()
            number = table.source_name or table.name if isinstance(table.source_name, str) else table.name
            state[number][:] = torch.from_numpy(expected[2:-2].astype(np.float32))
        model.load_state_dict(state)
        for size in (1, 2, 128):
            batch = models.batch_of(size, seed=size)
            with torch.no_grad():
                eager = model.eval()(batch)
            found = delta.score(models.inputs_of(model, batch))
            for name, scores in found.items():
                np.testing.assert_allclose(scores, eager[name].numpy(), rtol=1e-5, atol=1e-6)
    assert verify(str(tmp_path / "delta")).findings == []
    found = diff(tmp_path / "base", tmp_path / "delta")
    assert all(table.is_equal and table.same for table in found.tables)
    assert found.dense.changed
    assert found.scores.max_abs["ctr"] > 0


def test_no_row_of_the_checkpoint_is_read(checkpoints, base: Path, tmp_path: Path, monkeypatch) -> None:
    _, after = checkpoints

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("rows are read")

    monkeypatch.setattr(Package, "read_run", fail)
    for name in ("read_into", "read_each_into"):
        monkeypatch.setattr(RowReader, name, fail)
    monkeypatch.setattr("dist_export.checkpoint.id_reader.read_ids", fail)
    refresh(after, tmp_path / "delta", base, score_program="require")


def test_files_of_the_base_that_are_repeated_are_no_second_time_on_the_disk(checkpoints, tmp_path: Path) -> None:
    """A package of the base that is open meanwhile stays so."""
    export(checkpoints[0], tmp_path / "base")
    with dist_export.open_package(tmp_path / "base") as package:
        before = package.score(models.batch_of())
        made = refresh(checkpoints[1], tmp_path / "delta", tmp_path / "base")
        repeated = set(made.files) & set(package.manifest.files)
        assert 2 < len(repeated) < len(made.files) - 2
        for file in made.files:
            pair = [tmp_path / name / file.path for name in ("base", "delta")]
            assert (pair[0].exists() and pair[0].samefile(pair[1])) == (file in repeated), file.path
        for name, values in package.score(models.batch_of()).items():
            assert np.array_equal(values, before[name])
    assert verify(tmp_path / "base").findings == verify(tmp_path / "delta").findings == []


def test_names_and_default_rows_are_those_of_the_base(checkpoints, tmp_path: Path) -> None:
    before, after = checkpoints
    settings: dict[str, Any] = {
        "rename_tables": {"sparse_arch.user.weight": "people[1]"},
        "default_row": {"*tags*": [0.5, 1.0, 1.5, 2.0], "*user*": "zeros"},
        "to_hash_tables": ["*"],
    }
    export(before, tmp_path / "base", **settings)
    made = refresh(after, tmp_path / "delta", tmp_path / "base")
    before_tables = {table["name"]: table for table in manifest_of(tmp_path / "base")["tables"]}
    for table in manifest_of(tmp_path / "delta")["tables"]:
        for name in ("source_name", "default_row"):
            assert table.get(name) == before_tables[table["name"]].get(name)
    assert {table.name for table in made.tables} == {
        "people[1]",
        "sparse_arch.clicks.weight",
        "sparse_arch.tags.weight",
    }
    assert verify(str(tmp_path / "delta")).findings == []


def test_names_that_are_those_of_another_package_are_refused(checkpoints, tmp_path: Path) -> None:
    """Two tables that changed names would be looked up for each other, and nothing else would tell."""
    before, after = checkpoints
    user, clicks = "sparse_arch.user.weight", "sparse_arch.clicks.weight"
    export(before, tmp_path / "first", rename_tables={user: clicks, clicks: user})
    refresh(after, tmp_path / "of-first", tmp_path / "first", serving="off")
    for number, last in enumerate(("first", "second")):
        out = tmp_path / ("second", "third")[number]
        exports.export({"ckpt_dir": str(tmp_path / last), "export_dir": str(out), "num_shards": 2})
        assert manifest_of(out)["source"]["earlier"] == ["rename_tables"]
        with pytest.raises(PlanError, match="some of whose tables had been renamed, so nobody knows which tables"):
            refresh(after, tmp_path / "delta", out, serving="off")


class Other(models.ThreeTables):
    """Gives its blocks otherwise than the model of the base."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, batch: models.Batch) -> models.Batch:
        blocks = super().forward(batch)
        if self.how == "order":
            return {name: blocks[name] for name in ("clicks", "user", "tags", "price")}
        if self.how == "name":
            return {"buyer" if name == "user" else name: block for name, block in blocks.items()}
        if self.how == "dtype":
            return {**blocks, "price": blocks["price"].double()}
        if self.how == "shape":
            return {**blocks, "price": blocks["price"].expand(-1, 2)}
        if self.how == "columns":
            return {**blocks, "user": blocks["clicks"], "clicks": blocks["user"]}
        if self.how == "pooling":
            ids = batch["clicks"]
            return {**blocks, "clicks": (self.clicks(ids) * (ids != 0).unsqueeze(-1)).sum(1)}
        if self.how == "ids":
            return {**blocks, "user": self.user((batch["user"] + 1) % models.ROWS)}
        return blocks


class OtherHead(models.Head):
    def __init__(self, width: int, how: str) -> None:
        super().__init__(width)
        self.how = how

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        blocks = {name: block.float()[:, :1] if name == "price" else block for name, block in blocks.items()}
        outputs = super().forward(blocks)
        if self.how == "output":
            return {"cvr": outputs["ctr"]}
        return {"more": outputs["ctr"] * 2, **outputs} if self.how == "outputs" else outputs


def other(how: str) -> nn.Module:
    model = models.Model(Other(how), 3 * models.DIM + 1)
    model.dense_arch = OtherHead(3 * models.DIM + 1, how)
    return model


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("order", "the blocks of the dense arch are in another order: number 1 is 'clicks', and 'user' in the base"),
        ("name", "the blocks of the dense arch lack 'user', which the base has"),
        ("dtype", r"input 'price' is float64 \[batch, 1\], and float32 \[batch, 1\] in the base"),
        ("shape", r"input 'price' is float32 \[batch, 2\], and float32 \[batch, 1\] in the base"),
        ("columns", "of input 'clicks', columns 0 to 3 are of 'user', and number 1 of the base is of 'clicks'"),
        ("pooling", 'feature \'clicks\' has the pooling "sum", and "mean" in the base'),
        ("ids", r"feature 'user' has the transforms of ids \[.*\], and none in the base"),
        ("output", "the outputs lack 'ctr', which the base has"),
        ("outputs", "the outputs have 'more', which the base lacks"),
    ],
)
def test_other_inputs_and_outputs_are_refused_before_anything_is_written(
    checkpoints, base: Path, tmp_path: Path, how: str, text: str
) -> None:
    _, after = checkpoints
    with pytest.raises(PlanError, match=text):
        refresh(after, tmp_path / "delta", base, model=other(how))
    assert not (tmp_path / "delta").exists()


def test_other_tables_are_refused(checkpoints, base: Path, tmp_path: Path) -> None:
    before, after = checkpoints
    state = torch.load(after)
    torch.save(state | {"sparse_arch.user.weight": torch.zeros(models.ROWS + 1, models.DIM)}, tmp_path / "grown.pth")
    with pytest.raises(
        PlanError, match=r"'sparse_arch.user.weight' has 30 rows by number, and that of the checkpoint 31"
    ):
        refresh(str(tmp_path / "grown.pth"), tmp_path / "delta", base)
    exports.export({"ckpt_dir": before, "export_dir": str(tmp_path / "rows"), "treat_as_tables": ["*.weight"]})
    with pytest.raises(PlanError, match="it has no dense arch"):
        refresh(after, tmp_path / "delta", tmp_path / "rows")
    assert not (tmp_path / "delta").exists()


def test_rows_of_a_delta_are_not_taken_back(checkpoints, base: Path, tmp_path: Path) -> None:
    """A delta over the same base without rows is no hindrance."""
    (before, after), off = checkpoints, exports.SCORES_OFF
    refresh(after, tmp_path / "first", base, **off)
    refresh(before, tmp_path / "second", tmp_path / "first", **off)
    taken = manifest_of(tmp_path / "second")["base"]
    assert (taken["path"], taken["dense_only"]) == (str(base), True)
    export(after, tmp_path / "rows", base=str(base), **off)
    with pytest.raises(ConfigError, match=r"3 changed, 0 new and 0 deleted rows .* would go back to the rows of"):
        refresh(after, tmp_path / "third", tmp_path / "rows")
    assert not (tmp_path / "third").exists()


def test_what_a_chain_would_go_back_to_is_the_full_package(checkpoints, base: Path, tmp_path: Path) -> None:
    """The delta with rows is named, and not the one above it; the rows would be those of the full one, not of the next."""
    (before, after), off = checkpoints, exports.SCORES_OFF
    export(after, tmp_path / "first", base=str(base), **off)
    export(before, tmp_path / "second", base=str(tmp_path / "first"), delta_chain=2, **off)
    refresh_of = tmp_path / "second"
    with pytest.raises(ConfigError) as told:
        refresh(after, tmp_path / "third", refresh_of)
    assert f"base {refresh_of} is a delta with 3 changed" in str(told.value)
    assert f"serving would go back to the rows of {base}. " in str(told.value)
    assert f"`dist_export compact {refresh_of} OUT`, and give base: OUT; or give base: {base}, if" in str(told.value)
    export(after, tmp_path / "same", base=str(tmp_path / "first"), delta_chain=2, **off)
    with pytest.raises(
        ConfigError, match=rf"base {tmp_path / 'same'} is on top of {tmp_path / 'first'}, a delta with 3"
    ):
        refresh(after, tmp_path / "third", tmp_path / "same")


def test_a_checkpoint_without_tables_gives_a_dense_part(checkpoints, base: Path, tmp_path: Path) -> None:
    _, after = checkpoints
    state = {name: value for name, value in torch.load(after).items() if name.startswith("dense_arch")}
    torch.save(state, tmp_path / "dense.pth")
    refresh(str(tmp_path / "dense.pth"), tmp_path / "delta", base, score_program="require")
    refresh(after, tmp_path / "whole", base)
    inputs = models.inputs_of(build(), models.batch_of(9, seed=3))
    with dist_export.open_package(tmp_path / "delta") as one, dist_export.open_package(tmp_path / "whole") as two:
        assert one.score(inputs)["ctr"].tobytes() == two.score(inputs)["ctr"].tobytes()


def test_versions(checkpoints, tmp_path: Path) -> None:
    before, after = checkpoints
    versions, now = f"versions:{tmp_path / 'pub'}", {"base": "latest", "need_export_sparse": False}
    export(before, versions)
    batch = models.inputs_of(build(), models.batch_of(5, seed=2))
    inputs = {name: value.numpy() for name, value in batch.items()}
    watcher = Watcher(versions)
    first = watcher.current.models["score"].infer(inputs)["ctr"]
    made = export(after, versions, **now)
    watcher.check_now()
    assert (watcher.num_swaps, watcher.num_refused) == (1, 0)
    with dist_export.open_package(versions) as current:
        assert current.manifest.digest == made.digest
        assert current.base is not None
        served = watcher.current.models["score"].infer(inputs)["ctr"]
        assert np.array_equal(served, current.score(inputs)["ctr"])
        assert not np.array_equal(served, first)
    assert export(after, versions, **now).digest == made.digest
    assert len(list((tmp_path / "pub" / "versions").iterdir())) == 2


def test_settings_that_a_refresh_cannot_follow(checkpoints, tmp_path: Path) -> None:
    for settings, text in (
        ({"on_base_mismatch": "full"}, "full would export the tables"),
        ({"compare": "exact"}, "no row is compared"),
        ({"max_drift": 0.1}, "no row of the checkpoint is read to measure a drift"),
        ({"num_shards": 2}, "num_shards says how to export the tables"),
        ({"filter_sparse_opt": False}, "base needs new shards"),
    ):
        with pytest.raises(ConfigError, match=text):
            refresh(checkpoints[0], tmp_path / "out", tmp_path / "base", **settings)


def test_recis_files_and_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dense tensors among the sparse files are those of the new checkpoint."""
    source = tiny_model.write_tiny_checkpoint(tmp_path / "before")
    state = {name: tensor + 0.125 if tensor.is_floating_point() else tensor for name, tensor in DENSE().items()}
    tables = {
        name: [dataclasses.replace(part, slots={slot: rows + 1 for slot, rows in part.slots.items()}) for part in parts]
        for name, parts in tiny_model.tables().items()
    }
    write_checkpoint(tmp_path / "after", tables, model_state=state)
    base, delta, model = (
        tmp_path / "base",
        tmp_path / "delta",
        ["--model", tiny_model.MODEL, "--dataset", tiny_model.DATASET],
    )
    exports.export({"ckpt_dir": str(source), "export_dir": str(base), "filter_sparse_opt": True, **TINY})
    command = ["--ckpt_dir", str(tmp_path / "after"), "--export_dir", str(delta), "--base", str(base), *model]
    command += ["--need_export_sparse", "false"]
    assert main(["plan", *command]) == 0
    told = capsys.readouterr().out
    assert f"delta against {base}" in told.replace("file://", "")
    assert "older than the dense part" in told
    assert not delta.exists()
    assert main(command) == 0
    told = capsys.readouterr().out
    assert f"delta    a new dense part over 100 rows of {base}" in told
    assert "with rows of the base and program as written" in told
    assert "0 not in the base" in told
    assert put_together(base, delta) == read_package(base)
    account = manifest_of(delta)["account"]
    assert account["left_out"]["need_export_sparse"] > 0
    assert account["in_program"] > 0
    for line in (["verify", str(delta)], ["inspect", str(delta)], command):
        assert main(line) == 0
        capsys.readouterr()
    assert main([*command[:1], str(source), *command[2:]]) == 2  # another checkpoint
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    loaded = [dist_export.open_package(path).load_program().state_dict for path in (base, delta)]
    for name, tensor in loaded[0].items():
        assert torch.equal(loaded[1][name], tensor + 0.125 if tensor.is_floating_point() else tensor)


def test_export_dir_that_is_the_checkpoint_or_the_base_stays(tmp_path: Path) -> None:
    source = tiny_model.write_tiny_checkpoint(tmp_path / "before")
    settings = {"ckpt_dir": str(source), "export_dir": str(tmp_path / "base"), **TINY}
    exports.export({**settings, "filter_sparse_opt": True})
    now = {**settings, "base": str(tmp_path / "base"), "need_export_sparse": False}
    with pytest.raises(ConfigError, match="would take its place"):
        exports.export({**now, "overwrite": True})
    with pytest.raises(ConfigError, match="export_dir is ckpt_dir"):
        exports.export({**now, "export_dir": str(source)})
    assert verify(str(tmp_path / "base")).findings == []


def test_a_model_that_maps_raw_ids_is_refused(checkpoints, base: Path, tmp_path: Path) -> None:
    """Its maps are those of the new checkpoint, and the rows are those of the base."""
    model = build()
    model.sparse_arch.register_buffer("_mch_sorted_raw_ids", torch.arange(5), persistent=False)
    with pytest.raises(ModelError, match="sparse_arch maps raw ids to rows"):
        refresh(checkpoints[1], tmp_path / "delta", base, model=model)
    assert not (tmp_path / "delta").exists()


def test_a_dense_arch_that_shares_the_weight_of_a_table_is_refused(tmp_path: Path) -> None:
    """The program would have the checkpoint's weight, and lookups the base's rows."""

    def tied() -> nn.Module:
        model = build()
        model.dense_arch = TiedHead(3 * models.DIM + 1)
        model.dense_arch.items.weight = model.sparse_arch.user.weight
        return model

    model = models.train(tied())
    before = models.save(model, tmp_path / "before.pth")
    after = models.save(train_on(model), tmp_path / "after.pth")
    export(before, tmp_path / "base", tied())
    told = r"dense_arch\.items\.weight of the dense arch is the weight of table 'sparse_arch\.user\.weight', .* Nothing was"
    with pytest.raises(ModelError, match=told):
        refresh(after, tmp_path / "delta", tmp_path / "base", model=tied())
    assert not (tmp_path / "delta").exists()


class TiedHead(models.Head):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.items = nn.Linear(models.DIM, models.ROWS, bias=False)

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits = self.items(blocks["user"])
        return {"items": logits, **super().forward(blocks)}


def test_a_run_that_ended_before_the_commit_is_completed(checkpoints, base: Path, tmp_path: Path, monkeypatch) -> None:
    _, after = checkpoints
    refresh(after, tmp_path / "whole", base)

    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr("dist_export.pipeline.steps.publish", fail)
        with pytest.raises(ExportError, match="the disk is gone"):
            refresh(after, tmp_path / "delta", base)
    assert not (tmp_path / "delta" / "manifest.json").exists()
    refresh(after, tmp_path / "delta", base)
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "delta")]
    assert names[0] == names[1]
    assert verify(str(tmp_path / "delta")).findings == []


def test_columns_that_cannot_be_compared_are_named(checkpoints, tmp_path: Path) -> None:
    before, after = checkpoints
    export(before, tmp_path / "base", serving="off")
    made = refresh(after, tmp_path / "delta", tmp_path / "base")
    [note] = [note for note in made.notes if "was not compared with the base" in note]
    assert note.startswith("which features are in the columns of clicks, price, tags and 1 more, neither mc")


def test_a_model_in_memory_is_no_source_of_it() -> None:
    with pytest.raises(ConfigError, match="format is live; save a checkpoint"):
        dist_export.ExportConfig(export_dir="out", format="live", base="base", need_export_sparse=False)
