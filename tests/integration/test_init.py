"""``init``: a config made of what a checkpoint holds, which exports its tables as they are."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dist_export.cli import main
from dist_export.config.loader import load_config
from tests.support.dynamicemb_writer import make_table, write_dump
from tests.support.fixture_cases import CASES, TORCHREC_CASES
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.source_cases import SOURCES, export

ALL = [*SOURCES, *(f"recis/{case}" for case in CASES), *(f"torchrec/{case}" for case in TORCHREC_CASES)]
NEEDED = {
    "torchrec/dtensor_adam": {"treat_as_tables": TORCHREC_CASES["dtensor_adam"]},
    "recis/hostile_misplaced2": {"filter_sparse_opt": True},
    "recis/hostile_bool_dense": {"filter_sparse_opt": True},
}
"""What an export of these needs, which ``init`` has to find."""


@pytest.fixture
def fixtures(recis_fixtures: Path, torchrec_fixtures: Path) -> Path:
    assert recis_fixtures.parent == torchrec_fixtures.parent
    return recis_fixtures.parent


def make(name: str, fixtures: Path, folder: Path) -> Path:
    return SOURCES[name][0](fixtures, folder) if name in SOURCES else fixtures / name


def init(source: Path | str, out: Path, *options: object) -> dict[str, Any]:
    assert main(["init", str(source), "--out", str(out), *map(str, options)]) == 0
    settings: dict[str, Any] = yaml.safe_load(out.read_text())
    return settings


def shards_of(package: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in package.glob("*.safetensors")}


@pytest.mark.parametrize("name", ALL)
def test_its_file_exports_the_same_shards_as_no_file(name: str, fixtures: Path, tmp_path: Path) -> None:
    source = make(name, fixtures, tmp_path)
    settings = init(source, tmp_path / "export.yaml")
    assert main(["--config", str(tmp_path / "export.yaml"), "--export_dir", str(tmp_path / "with")]) == 0
    export(source, tmp_path / "without", **NEEDED.get(name, {}))
    assert shards_of(tmp_path / "with") == shards_of(tmp_path / "without") != {}
    assert settings["export_dir"] == "package"
    assert set(settings) <= {"ckpt_dir", "export_dir", "format", *NEEDED.get(name, {})}


@pytest.mark.parametrize("name", [*SOURCES, "recis/stepfilter2", "torchrec/dtensor_adam"])
def test_each_suggestion_can_be_taken(name: str, fixtures: Path, tmp_path: Path) -> None:
    """With its # taken away, alone and all together, an export is planned; the model's lines are of another's model."""
    file = tmp_path / "export.yaml"
    init(make(name, fixtures, tmp_path), file)
    text = file.read_text()
    suggested = [
        line for line in re.findall(r"^# (\w+: .*)$", text, re.MULTILINE) if line.split(":")[0] in load_fields()
    ]
    of_model = {"model", "dataset", "sparse_model_name", "dense_model_name", "export_outputs"}
    mine = [line for line in suggested if line.split(":")[0] not in of_model]
    assert (len(suggested) == len(mine)) == ("package" in name), "a package has no parameters for a model"
    assert any(line.startswith("num_shards") for line in mine)
    is_copied = not SOURCES.get(name, (None, "dtensor" in name))[1]
    assert any(line == "filter_sparse_opt: true" for line in mine) == is_copied
    for lines in (*([line] for line in mine), mine):
        more = ["filter_sparse_opt: true"] if is_copied and "filter_sparse_opt: true" not in lines else []
        file.write_text("\n".join([text, *lines, *more]))
        assert main(["plan", "--config", str(file), "--export_dir", str(tmp_path / "out")]) == 0, lines


def load_fields() -> list[str]:
    return list(vars(load_config({"ckpt_dir": "a", "export_dir": "b"})))


def test_it_describes_the_tables_and_prints_without_out(fixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(fixtures / "recis" / "small2")]) == 0
    shown = capsys.readouterr().out
    assert "is a RecIS checkpoint with 5 tables:" in shown
    assert "#   item_emb: hash table, 500 rows of 8 float32, 52.0 kB, with sparse_adamw_exp_avg" in shown
    assert "# Drop optimizer state (sparse_adamw_exp_avg, sparse_adamw_exp_avg_sq) and write new shards." in shown
    assert yaml.safe_load(shown) == {
        "ckpt_dir": str(fixtures / "recis" / "small2"),
        "export_dir": "package",
        "format": "recis",
    }


def test_it_names_the_next_command_which_reads_the_file(
    fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, also where the path has a space."""
    out = tmp_path / "my export.yaml"
    init(fixtures / "recis" / "small2", out)
    shown, errors = capsys.readouterr()
    assert errors == ""
    assert shown == f"{out} is written. Next: python -m dist_export plan --config '{out}'\n"
    program, _, package, *arguments = shlex.split(shown.partition("Next: ")[2])
    assert (program, package) == ("python", "dist_export")
    assert main(arguments) == 0


def test_settings_that_are_given_go_into_the_file(fixtures: Path, tmp_path: Path) -> None:
    options = ("--export_dir", "there", "--num-shards", 3, "--drop_tables", "item*", "--filter_sparse_opt=true")
    settings = init(fixtures / "recis" / "small2", tmp_path / "e.yaml", *options, "--storage_options.key", "hunter2")
    assert settings == {
        "ckpt_dir": str(fixtures / "recis" / "small2"),
        "export_dir": "there",
        "num_shards": 3,
        "drop_tables": ["item*"],
        "filter_sparse_opt": True,
        "storage_options": {"key": "hunter2"},
        "format": "recis",
    }
    assert "user_emb" in (tmp_path / "e.yaml").read_text()
    assert "item_emb:" not in (tmp_path / "e.yaml").read_text()
    assert (tmp_path / "e.yaml").stat().st_mode & 0o077 == 0, "it may hold credentials"


def test_a_run_is_kept_as_a_run_and_its_step_named(fixtures: Path, tmp_path: Path) -> None:
    source = make("a run of recis", fixtures, tmp_path)
    assert init(source, tmp_path / "e.yaml") == {"ckpt_dir": str(source), "export_dir": "package"}
    assert "\n# step: 2\n" in (tmp_path / "e.yaml").read_text()


def test_a_run_of_plain_checkpoints_gets_the_tables_of_its_newest(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / "run" / f"step-{step}").mkdir(parents=True)
        tensors = {f"emb{step}.weight": torch.ones(9, 2), "mlp.weight": torch.ones(9, 2), "mlp.bias": torch.ones(9)}
        torch.save(tensors, tmp_path / "run" / f"step-{step}" / "model.pt")
    assert init(tmp_path / "run", tmp_path / "e.yaml")["treat_as_tables"] == ["emb2.weight"]


def test_the_path_is_absolute_and_the_file_is_of_any_directory(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(fixtures / "recis" / "small2", tmp_path / "ckpt")
    monkeypatch.chdir(tmp_path)
    assert init("ckpt", tmp_path / "e.yaml")["ckpt_dir"] == str(tmp_path / "ckpt")


@pytest.mark.parametrize("out", ["there.yaml", "no/folder.yaml"])
def test_a_file_that_is_there_stays(
    out: str, fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.yaml").write_text("mine")
    assert main(["init", str(fixtures / "recis" / "small2"), "--out", str(tmp_path / out)]) == 2
    assert f"{tmp_path / out}: " in capsys.readouterr().err
    assert (tmp_path / "there.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("tensors", "tables"),
    [
        ({"t.weight": (9, 4), "mlp.weight": (8, 4), "mlp.bias": (8,), "out.weight": (1, 8)}, ["t.weight"]),
        ({"my_emb.w": (3, 4), "wide.weight": (9, 2)}, ["my_emb.w"]),
        ({"a[0].weight": (9, 4)}, ["a[[]0].weight"]),
        ({"mlp.weight": (8, 4), "mlp.bias": (8,)}, None),
        ({"b": (8,)}, None),
    ],
)
def test_matrices_that_look_like_tables_are_named(
    tensors: dict[str, Any], tables: list[str] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name first, else longer than wide and without a bias. Without any, the error of an export is told."""
    torch.save({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "m.pt")
    if tables is None:
        assert main(["init", str(tmp_path / "m.pt"), "--out", str(tmp_path / "e.yaml")]) == 2
        assert "name those that are tables with treat_as_tables" in capsys.readouterr().err
        assert not (tmp_path / "e.yaml").exists()
        return
    assert init(tmp_path / "m.pt", tmp_path / "e.yaml")["treat_as_tables"] == tables


def test_what_no_setting_of_its_own_mends_is_the_error_of_an_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = make_tables({"a": 20}, 1)
    part = tables["a"][0]
    part.ids = np.concatenate([part.ids[:-1], part.ids[:1]])
    write_checkpoint(tmp_path / "in", tables)
    assert main(["init", str(tmp_path / "in"), "--out", str(tmp_path / "e.yaml")]) == 2
    assert "on_duplicate: first" in capsys.readouterr().err
    assert not (tmp_path / "e.yaml").exists()
    settings = init(tmp_path / "in", tmp_path / "e.yaml", "--on_duplicate", "first", "--filter_sparse_opt", "true")
    assert settings["on_duplicate"] == "first"


def test_names_of_others_stay_in_their_comment(tmp_path: Path) -> None:
    """A name with a line break adds no setting, and one that is no YAML breaks no file."""
    names = [
        "x\noverwrite: true\n.embedding_bags.u.weight",
        "a: *b}.embedding_bags.{0}.weight",
        "\x1b[2J'\".embeddings.v.weight",
    ]
    torch.save({name: torch.ones(3, 2) for name in names}, tmp_path / "m.pt")
    settings = init(tmp_path / "m.pt", tmp_path / "e.yaml")
    assert set(settings) == {"ckpt_dir", "export_dir", "format"}
    assert (tmp_path / "e.yaml").read_text().replace("\n", "").isprintable()
    assert main(["--config", str(tmp_path / "e.yaml"), "--export_dir", str(tmp_path / "out")]) == 0


def test_dimensions_that_nothing_confirms_are_suggested(tmp_path: Path) -> None:
    rows = {name: column for name, column in make_table([3, 8], 4).items() if name in ("keys", "values")}
    write_dump(tmp_path / "dump", "user", rows, 1)
    (tmp_path / "dump" / "user_opt_args.json").unlink()
    init(tmp_path / "dump", tmp_path / "e.yaml")
    assert "# dynamicemb_dims: {user: 4}" in (tmp_path / "e.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which path? Usage: dist_export init PATH"),
        (["a", "b"], "'b' is one path too many"),
        (["/nowhere/at/all"], "/nowhere/at/all"),
        (["a", "--model", "m:f"], "--model is no option of dist_export init"),
        (["a", "--format", "live"], "format is 'live'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
