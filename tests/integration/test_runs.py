"""A training run in the place of a checkpoint: the latest complete one is found, any other by its step."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from dist_export.cli import main
from dist_export.config.loader import load_config
from dist_export.config.schema import ExportConfig
from dist_export.errors import CheckpointError
from dist_export.pipeline.dry_run import make_report
from dist_export.pipeline.run_dir import find_checkpoint
from dist_export.pipeline.run_listing import describe_run
from tests.support import exports, tiny_model
from tests.support.dcp_writer import write_chunks
from tests.support.recis_writer import make_tables, write_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 5, 20 and 100, all complete and listed in the order of their saves."""
    for step in (5, 20, 100):
        write_checkpoint(tmp_path / "run" / f"ckpt_{step}", make_tables({"t": 10 + step}, num_parts=2))
    (tmp_path / "run" / "checkpoint").write_text("ckpt_5\nckpt_20\nckpt_100\n")
    return tmp_path / "run"


def find(run: Path, *, needs_dense: bool = False, **settings: object):
    config = ExportConfig(ckpt_dir=str(run), export_dir="out", **settings)
    return find_checkpoint(config, str(run), step=config.step, needs_dense=needs_dense)


def test_the_latest_is_by_number_not_by_name(run: Path) -> None:
    found = find(run)
    assert (Path(found.directory).name, found.step, found.notes) == ("ckpt_100", 100, ())


def test_a_step_is_picked(run: Path) -> None:
    assert Path(find(run, step=20).directory).name == "ckpt_20"
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 21; there are 100, 20, 5$"):
        find(run, step=21)


def test_what_the_list_lacks_did_not_finish(run: Path) -> None:
    (run / "checkpoint").write_text("ckpt_5\nckpt_20\n")
    found = find(run)
    assert found.step == 20
    assert "ckpt_100 is passed over: checkpoint does not list it" in found.notes[0]


@pytest.mark.parametrize("damage", ["no index", "no shard", "cut short"])
def test_an_incomplete_latest_one_is_passed_over_and_named(run: Path, damage: str) -> None:
    latest = run / "ckpt_100"
    shard = next(latest.glob("*.safetensors"))
    if damage == "no index":
        (latest / "index").unlink()
    elif damage == "no shard":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-8])
    found = find(run)
    assert found.step == 20
    assert len(found.notes) == 1
    assert "ckpt_100 is passed over" in found.notes[0]


@pytest.mark.parametrize("needs_dense", [False, True])
def test_dense_parameters_that_cannot_be_read_stop_every_export_and_so_are_passed_over(
    run: Path, needs_dense: bool
) -> None:
    for step in (20, 100):
        torch.save({"w": torch.ones(2)}, run / f"ckpt_{step}" / "model.pt")
    cut = run / "ckpt_100" / "model.pt"
    cut.write_bytes(cut.read_bytes()[:-30])
    found = find(run, needs_dense=needs_dense)
    assert found.step == 20
    assert re.search("ckpt_100 is passed over: .*model.pt is truncated", found.notes[0])


def test_dense_parameters_that_are_missing_count_where_they_are_needed(run: Path) -> None:
    torch.save({"w": torch.ones(2)}, run / "ckpt_20" / "model.pt")
    needed = find(run, needs_dense=True)
    assert needed.step == 20
    assert "ckpt_100/model.pt is missing, and the dense arch needs its parameters" in needed.notes[0]
    (note,) = find(run).notes
    assert find(run).step == 100
    assert "ckpt_100/model.pt is missing, which ckpt_20 has" in note
    assert "step: 20 takes the checkpoint before" in note


def test_an_export_of_the_tables_alone_says_so_of_a_run_cut_short(run: Path, tmp_path: Path) -> None:
    (run / "ckpt_100" / "model.pt").write_bytes(b"PK")
    manifest = exports.export({"ckpt_dir": str(run), "export_dir": str(tmp_path / "a")})
    assert manifest.source.step == 20
    assert any("ckpt_100 is passed over" in note for note in manifest.notes)


def test_a_run_cut_short_gives_its_dense_arch_from_the_save_before(tmp_path: Path) -> None:
    for step in (5, 9):
        tiny_model.write_tiny_checkpoint(tmp_path / "run" / f"ckpt_{step}")
    (tmp_path / "run" / "ckpt_9" / "model.pt").unlink()
    settings = {"ckpt_dir": str(tmp_path / "run"), "export_dir": str(tmp_path / "out")}
    dense = {"model": tiny_model.MODEL, "dataset": tiny_model.DATASET}
    assert make_report(load_config({**settings, **dense}), world_size=1)["source"].endswith("ckpt_5")
    assert exports.export({**settings, **dense}).source.step == 5


def test_none_complete_is_an_error_that_says_why(run: Path) -> None:
    for child in run.glob("ckpt_*"):
        (child / "index").unlink()
    with pytest.raises(CheckpointError, match=r"none of its 3 checkpoints is complete; .*ckpt_100 is passed over"):
        find(run)


def test_a_checkpoint_is_itself_whatever_lies_below_it(run: Path) -> None:
    (run / "ckpt_20" / "extra_1").mkdir()
    assert find(run / "ckpt_20").directory == str(run / "ckpt_20")
    assert find(run / "ckpt_20", step=20)[:2] == (str(run / "ckpt_20"), 20)
    with pytest.raises(CheckpointError, match=r"step is 21, but ckpt_dir .*/ckpt_20 is by its name .* of step 20"):
        find(run / "ckpt_20", step=21)
    with pytest.raises(CheckpointError, match=r"step is 20, but ckpt_dir .* is no run"):
        find((run / "ckpt_20").rename(run / "best"), step=20)


@pytest.mark.parametrize("name", ["step-{}", "step_{}", "checkpoint-{}", "global_step_{}", "model.ckpt-{}", "{}"])
def test_names_of_other_trainers(tmp_path: Path, name: str) -> None:
    for step in (9, 10):
        write_checkpoint(tmp_path / "run" / name.format(step), make_tables({"t": 3}, num_parts=1))
    (tmp_path / "run" / "logs-x").mkdir()
    assert find(tmp_path / "run").step == 10


@pytest.mark.parametrize("step", [None, 20])
def test_loose_tensors_beside_the_checkpoints_are_no_checkpoint(run: Path, step: int | None) -> None:
    torch.save({"a": torch.ones(2)}, run / "best_metric.pt")
    assert find(run, step=step).step == (step or 100)


def test_what_a_trainer_keeps_beside_safetensors_is_no_other_checkpoint(tmp_path: Path) -> None:
    for place in ("run/checkpoint-5", "run/checkpoint-9", "run"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        save_file({"m.embedding_bags.u.weight": torch.randn(6, 4)}, tmp_path / place / "model.safetensors")
        torch.save({"lr": 1.0}, tmp_path / place / "training_args.bin")
    assert find(tmp_path / "run").step == 9
    assert find(tmp_path / "run", format="safetensors").step is None  # the last save, asked for
    assert find(tmp_path / "run", format="safetensors", step=5).step == 5


def test_a_newest_one_that_the_settings_do_not_fit_is_an_error_and_no_older_one_is_taken(tmp_path: Path) -> None:
    for step, name in ((1, "old"), (2, "new")):
        weight = torch.randn(5, 4)
        write_chunks(tmp_path / "run" / f"step-{step}", {f"m.{name}.weight": (weight, [((0, 0), weight)])})
    with pytest.raises(CheckpointError, match=r"step-2: treat_as_tables: the pattern '\*old\*' matches no tensor"):
        find(tmp_path / "run", treat_as_tables=["*old*"])


def test_a_run_without_tables_is_found_for_its_dense_arch(tmp_path: Path) -> None:
    for step in (1, 2):
        weight = torch.randn(5, 4)
        write_chunks(tmp_path / "run" / f"step-{step}", {"dense_arch.w": (weight, [((0, 0), weight)])})
    assert find(tmp_path / "run", need_export_sparse=False, model="a:b").step == 2


def test_one_step_under_two_names_must_be_said(run: Path) -> None:
    shutil.copytree(run / "ckpt_20", run / "step-20")
    with pytest.raises(CheckpointError, match="step 20 is that of ckpt_20, step-20; give one of these"):
        find(run, step=20)


def test_a_latest_step_under_two_names_must_be_said(run: Path) -> None:
    """Neither name tells which one training has saved last. One that is not complete, or that the list lacks, is not meant."""
    shutil.copytree(run / "ckpt_20", run / "old_ckpt_100")
    assert Path(find(run).directory).name == "ckpt_100", "the list lacks the other"
    (run / "checkpoint").unlink()
    with pytest.raises(CheckpointError, match="step 100 is that of old_ckpt_100, ckpt_100; give one of these"):
        find(run)
    (run / "ckpt_100" / "index").unlink()
    assert Path(find(run).directory).name == "old_ckpt_100"


def test_an_export_of_a_run_is_that_of_the_checkpoint(run: Path, tmp_path: Path) -> None:
    settings = {"filter_sparse_opt": True, "num_shards": 2}
    (run / "ckpt_100" / "index").unlink()
    whole = exports.export({"ckpt_dir": str(run), "export_dir": str(tmp_path / "a"), **settings})
    alone = exports.export({"ckpt_dir": str(run / "ckpt_20"), "export_dir": str(tmp_path / "b"), **settings})
    assert whole.source.step == 20
    assert whole.source.path == str(run / "ckpt_20")
    assert alone.source.step is msgspec.UNSET
    assert [file.digest for file in whole.files] == [file.digest for file in alone.files]
    assert any("passed over" in note for note in whole.notes)


def test_a_whole_fixture_run(recis_fixtures: Path, tmp_path: Path) -> None:
    """RecIS's own run directory, with its list."""
    manifest = exports.export(
        {"ckpt_dir": str(recis_fixtures / "fullckpt"), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True}
    )
    assert manifest.source.step == 3


# ---- inspect ----


def inspect(capsys, *arguments: object) -> str:
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_inspect_lists_a_run_and_marks_what_is_complete(run: Path, capsys) -> None:
    next((run / "ckpt_20").glob("*.safetensors")).unlink()
    write_checkpoint(run / "ckpt_300", make_tables({"t": 10}, num_parts=2))
    (run / "ckpt_5" / "model.pt").write_bytes(b"PK cut short")
    (run / "best").mkdir()
    lines = inspect(capsys, run).splitlines()
    assert lines[0] == f"training run: {run}"
    assert [line.split(":")[0] for line in lines[1:]] == [
        "  step 300  ckpt_300  incomplete",
        "  step 100  ckpt_100  complete, the latest",
        "  step  20  ckpt_20   incomplete",
        "  step   5  ckpt_5    incomplete",
    ]
    assert "checkpoint does not list it" in lines[1]
    assert "model.pt is missing, and the dense arch needs" in lines[2]
    assert "is missing; index names it" in lines[3]
    assert "model.pt" in lines[4]
    found = json.loads(inspect(capsys, run, "--json"))
    assert (found["kind"], found["latest"]) == ("training run", "ckpt_100")
    assert [(each["step"], each["is_complete"]) for each in found["checkpoints"]] == [
        (300, False),
        (100, True),
        (20, False),
        (5, False),
    ]


@pytest.mark.parametrize("damage", ["none", "no index", "no shard", "cut short", "not listed"])
def test_what_inspect_calls_the_latest_is_what_an_export_takes(run: Path, damage: str) -> None:
    latest = run / "ckpt_100"
    shard = next(latest.glob("*.safetensors"))
    if damage == "no index":
        (latest / "index").unlink()
    elif damage == "no shard":
        shard.unlink()
    elif damage == "cut short":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "not listed":
        (run / "checkpoint").write_text("ckpt_5\nckpt_20\n")
    found = describe_run(str(run))
    assert found is not None
    assert run / str(found["latest"]) == Path(find(run).directory)
    assert found["latest"] == ("ckpt_100" if damage == "none" else "ckpt_20")


def test_inspect_lists_a_run_of_other_formats_with_patterns(tmp_path: Path, capsys) -> None:
    state = {"emb.weight": torch.randn(8, 4), "out.weight": torch.randn(2, 2)}
    for step in (1, 2):
        write_chunks(tmp_path / f"step-{step}", {name: (value, [((0, 0), value)]) for name, value in state.items()})
    (tmp_path / "step-3").mkdir()
    assert [line.split(":")[0].split()[2:] for line in inspect(capsys, tmp_path).splitlines()[1:]] == [
        ["step-3", "incomplete"],
        ["step-2", "complete,", "the", "latest"],
        ["step-1", "complete"],
    ]
    lines = inspect(capsys, tmp_path, "--treat_as_tables", "nothing*").splitlines()
    assert "step-2  unclear: " in lines[2]
    assert "nothing*" in lines[2]


def test_inspect_of_a_checkpoint_with_numbered_directories_shows_the_checkpoint(run: Path, capsys) -> None:
    (run / "ckpt_5" / "ckpt_1").mkdir()
    assert inspect(capsys, run / "ckpt_5").startswith("RecIS checkpoint: ")
