"""The step of a package's rows apart from that of its dense part: which dumps go on top, and which would take rows back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export import cli
from dist_export.api import Exporter
from dist_export.errors import ConfigError, ExportError
from tests.support import score_models as models
from tests.support.deltas import manifest_of
from tests.support.tzrec_dumps import write_dump

KEY = "sparse_arch.user"
USER = f"{KEY}.weight"


def build() -> nn.Module:
    return models.Model(models.ThreeTables(), 3 * models.DIM + 1)


class Training:
    """A run with checkpoints at 100 and 150, and dumps at 120 (rows 1 and 2) and 180 (rows 5 and 6)."""

    def __init__(self, folder: Path) -> None:
        self.run, self.dumps = folder / "run", folder / "dumps"
        model = models.train(build())
        self._save(100, model)
        self.dump(120, model, [1, 2])
        with torch.no_grad():
            model.dense_arch.mlp[0].bias.add_(0.5)
        self._save(150, model)
        self.dump(180, model, [5, 6])
        self.rows = model.sparse_arch.user.weight.detach().numpy().copy()
        self.model = model

    def _save(self, step: int, model: nn.Module) -> None:
        (self.run / f"ckpt_{step}").mkdir(parents=True)
        models.save(copy.deepcopy(model), self.run / f"ckpt_{step}" / "state.pth")

    def dump(self, step: int, model: nn.Module, ids: Sequence[int]) -> None:
        """Train some rows, and dump them."""
        weight = model.sparse_arch.user.weight
        with torch.no_grad():
            weight[list(ids)] += 0.25
            write_dump(self.dumps, step, {KEY: (np.array(ids), weight[list(ids)].numpy().copy())})

    def export(self, step: int, out: Path | None, **settings: Any) -> dist_export.Manifest:
        given = [build(), "sparse_arch", "dense_arch", [models.batch_of()], str(self.run), str(out or "")]
        return Exporter(*given, step=step, score_program="off", **settings).export(progress=False)

    def export_dumps(self, out: Path | None, base: Path | str, **settings: Any) -> Any:
        given = {"ckpt_dir": str(self.dumps), "export_dir": str(out or ""), "format": "tzrec_delta", "base": str(base)}
        return dist_export.export({**given, "progress": False, **settings})


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


def rows_of(package: Path | str) -> np.ndarray:
    with dist_export.open_package(str(package)) as opened:
        return opened.lookup(USER, np.arange(models.ROWS))[0]


def test_dumps_on_a_compacted_refresh_begin_where_its_rows_end(training: Training, tmp_path: Path) -> None:
    training.export(100, tmp_path / "base")
    made = training.export(150, tmp_path / "refresh", base=str(tmp_path / "base"), need_export_sparse=False)
    assert (made.source.step, made.source.rows_step) == (150, 100)
    assert cli.main(["compact", str(tmp_path / "refresh"), str(tmp_path / "made"), "--progress", "false"]) == 0
    source = manifest_of(tmp_path / "made")["source"]
    assert (source["step"], source["rows_step"]) == (150, 100)
    training.export_dumps(tmp_path / "delta", tmp_path / "made")
    delta = manifest_of(tmp_path / "delta")
    assert delta["source"]["steps"] == [120, 180]
    assert "rows_step" not in delta["source"]
    assert (
        "the rows are those of step 180; all else is the base's (step 150), the dense arch included" in delta["notes"]
    )
    assert np.array_equal(rows_of(tmp_path / "delta"), training.rows)
    training.export_dumps(tmp_path / "since", tmp_path / "made", since_step=100)
    with pytest.raises(ConfigError, match="has rows of step 100"):
        training.export_dumps(tmp_path / "none", tmp_path / "made", since_step=99)


def test_a_refresh_of_a_compacted_refresh_says_how_old_its_rows_are(training: Training, tmp_path: Path, capsys) -> None:
    training.export(100, tmp_path / "base")
    training.export(150, tmp_path / "refresh", base=str(tmp_path / "base"), need_export_sparse=False)
    assert cli.main(["compact", str(tmp_path / "refresh"), str(tmp_path / "made"), "--progress", "false"]) == 0
    made = training.export(150, tmp_path / "again", base=str(tmp_path / "made"), need_export_sparse=False)
    assert made.source.rows_step == 100
    assert any(
        f"the tables are those of the base {tmp_path / 'made'}, with rows of step 100, older" in n for n in made.notes
    )
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "again")]) == 0
    assert "rows of step 100" in capsys.readouterr().out


def test_rows_of_which_no_step_is_known(training: Training, tmp_path: Path) -> None:
    """A base outside of a run says no step; the step of the refresh is none of its rows."""
    checkpoint = training.run / "ckpt_100"
    given = [build(), "sparse_arch", "dense_arch", [models.batch_of()], str(checkpoint), str(tmp_path / "base")]
    Exporter(*given, score_program="off").export(progress=False)
    made = training.export(150, tmp_path / "refresh", base=str(tmp_path / "base"), need_export_sparse=False)
    assert (made.source.step, made.source.rows_step) == (150, None)
    assert cli.main(["compact", str(tmp_path / "refresh"), str(tmp_path / "made"), "--progress", "false"]) == 0
    assert manifest_of(tmp_path / "made")["source"]["rows_step"] is None
    with pytest.raises(ConfigError, match=r"does not say the training step of its rows, .* set since_step"):
        training.export_dumps(tmp_path / "none", tmp_path / "made")
    training.export_dumps(tmp_path / "delta", tmp_path / "made", since_step=100)
    assert manifest_of(tmp_path / "delta")["source"]["steps"] == [120, 180]


def test_dumps_do_not_take_back_the_dense_part_of_the_current_version(training: Training, tmp_path: Path) -> None:
    """Neither that of a checkpoint's delta nor that of a refresh; a full package made of that is a base."""
    versions, publish = f"versions:{tmp_path / 'pub'}", {"publish": str(tmp_path / "pub")}
    training.export(100, None, **publish)
    training.export(150, None, base="latest", need_export_sparse=False, **publish)
    before = (tmp_path / "pub" / "current.json").read_bytes()
    with pytest.raises(
        ConfigError, match=r"has a dense part of step 150, and that of the base, .*, is of step 100"
    ) as told:
        training.export_dumps(None, "latest", **publish)
    assert f"`dist_export compact {versions} {versions}`, and give base: latest" in str(told.value)
    assert (tmp_path / "pub" / "current.json").read_bytes() == before
    assert cli.main(["compact", versions, versions, "--progress", "false"]) == 0
    training.export_dumps(None, "latest", **publish)
    assert np.array_equal(rows_of(versions), training.rows)
    (full,) = [path.name for path in (tmp_path / "pub" / "versions").iterdir() if path.name.startswith("100-")]
    with pytest.raises(ConfigError, match=r"has a dense part of step 150, .* is of step 100"):
        training.export_dumps(None, f"{versions}@{full}", **publish)


def test_an_export_of_a_package_says_how_old_its_rows_are(training: Training, tmp_path: Path) -> None:
    """It said no step at all, or the one that was asked for, and dumps between were lost."""
    training.export(100, tmp_path / "base")
    training.export(150, tmp_path / "refresh", base=str(tmp_path / "base"), need_export_sparse=False)
    made = tmp_path / "full" / "150"
    assert cli.main(["compact", str(tmp_path / "refresh"), str(made), "--progress", "false"]) == 0
    given = {"progress": False, "num_shards": 3}
    for name, source, more in (
        ("again", made, {}),
        ("of_step", made, {"step": 150}),
        ("of_a_run", made.parent, {}),
    ):
        out = tmp_path / name
        dist_export.export({"ckpt_dir": str(source), "export_dir": str(out), **given, **more})
        source_entry = manifest_of(out)["source"]
        assert (source_entry["step"], source_entry["rows_step"]) == (150, 100), name
        training.export_dumps(tmp_path / f"{name}_delta", out)
        assert manifest_of(tmp_path / f"{name}_delta")["source"]["steps"] == [120, 180]
    dist_export.export({"ckpt_dir": str(tmp_path / "base"), "export_dir": str(tmp_path / "plain"), **given})
    plain = manifest_of(tmp_path / "plain")["source"]
    assert (plain["step"], "rows_step" in plain) == (100, False)


def test_a_package_in_a_directory_of_another_step_keeps_that_of_its_rows(training: Training, tmp_path: Path) -> None:
    training.export(100, tmp_path / "run" / "ckpt_150")
    dist_export.export({"ckpt_dir": str(tmp_path / "run"), "export_dir": str(tmp_path / "out"), "progress": False})
    source = manifest_of(tmp_path / "out")["source"]
    assert (source["step"], source["rows_step"]) == (150, 100)


def test_a_package_of_an_earlier_step_does_not_become_current(training: Training, tmp_path: Path) -> None:
    """As a checkpoint of that step does not."""
    publish = {"publish": str(tmp_path / "pub")}
    training.export(100, tmp_path / "old")
    training.export(150, None, **publish)
    before = (tmp_path / "pub" / "current.json").read_bytes()
    with pytest.raises(ExportError, match=r"is of step 150, and this one of step 100"):
        dist_export.export({"ckpt_dir": str(tmp_path / "old"), "progress": False, "num_shards": 2, **publish})
    assert (tmp_path / "pub" / "current.json").read_bytes() == before
