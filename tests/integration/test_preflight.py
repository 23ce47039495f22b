"""``plan`` finds what an export would refuse: all mistakes at once, and whether export_dir can be made. It leaves nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from dist_export.cli import main
from dist_export.config.loader import load_config
from dist_export.config.mistakes import Mistakes
from dist_export.errors import ConfigError, DistExportError, ExportError, PlanError, UserError
from dist_export.storage.local_io import why_no_directory
from tests.support import exports, tiny_model
from tests.support.dcp_writer import write_chunks
from tests.support.recis_writer import make_tables, write_checkpoint


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    return {
        "ckpt_dir": str(tmp_path / "ckpt"),
        "export_dir": str(tmp_path / "deep" / "below" / "out"),
        "filter_sparse_opt": True,
        "model": tiny_model.MODEL,
        "dataset": tiny_model.DATASET,
    }


def tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def plan(settings: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Return the exit code and what was said on standard error."""
    config = tmp_path / "plan.yaml"
    config.write_text(yaml.safe_dump(settings))
    before = tree(tmp_path)
    code = main(["plan", "--config", str(config)])
    assert tree(tmp_path) == before
    return code, capsys.readouterr().err.splitlines()


def test_without_a_mistake_nothing_is_said(settings: dict[str, object], tmp_path: Path, capsys) -> None:
    assert plan(settings, tmp_path, capsys) == (0, [])


MISTAKES = {
    "model": ({"model": "tests.support.tiny_model:no_model"}, "model: 'tests.support.tiny_model' has no 'no_model'"),
    "dataset": ({"dataset": "no_module:f"}, "dataset: there is no module 'no_module'"),
    "package": ({}, "manifest.json is there already: export_dir holds a committed package. Set overwrite"),
    "drop_slots": ({"drop_slots": ["no_slot"]}, "drop_slots: the pattern 'no_slot' matches no slot"),
    "keep_slots": ({"keep_slots": ["none"]}, "keep_slots: the pattern 'none' matches no slot"),
    "prune": ({"prune": [{"tables": "*", "deny": "/no/list.npy"}]}, "prune[0].deny"),
    "fg": ({"fg_conf_or_path": {"features": 3}}, "fg and mc: 1 finding"),
}


def test_all_mistakes_are_told_at_once(settings: dict[str, object], tmp_path: Path, capsys) -> None:
    exports.export({**settings, "model": None, "dataset": None}, progress=False)
    for change, _ in MISTAKES.values():
        settings |= change
    code, lines = plan(settings, tmp_path, capsys)
    assert code == 2
    assert lines[0] == f"dist_export: {len(MISTAKES)} mistakes:"
    for _, text in MISTAKES.values():
        assert sum(text in line for line in lines) == 1, (text, lines)


def test_patterns_of_tables_that_match_none_are_told_together(
    settings: dict[str, object], tmp_path: Path, capsys
) -> None:
    more = {
        "drop_tables": ["x*", "y*"],
        "rename_tables": {"z": "new"},
        "to_hash_tables": ["w"],
        "default_row": {"v": "zeros"},
    }
    code, lines = plan({**settings, **more, "export_dir": str(tmp_path / "ckpt" / "index")}, tmp_path, capsys)
    assert code == 2
    assert lines[0] == "dist_export: 6 mistakes:"
    assert "is a file, not a directory" in lines[1]
    assert [line.split("'")[1] for line in lines[2:]] == ["x*", "y*", "z", "w", "v"]


def test_settings_that_contradict_each_other_are_told_together(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"(?s)3 mistakes:.*threads is 0.*on_overflow says.*max_batch_size is 1"):
        load_config({**settings, "threads": 0, "on_overflow": "clamp", "max_batch_size": 1})
    with pytest.raises(ConfigError, match=r"^threads is 0"):
        load_config({**settings, "threads": 0})


def test_what_follows_from_a_missing_model_is_not_told(tmp_path: Path, capsys) -> None:
    """Only the model says which tensors of a plain checkpoint are tables."""
    import torch

    weight = torch.randn(8, 4)
    write_chunks(tmp_path / "ckpt", {"sparse_arch.emb.weight": (weight, [((0, 0), weight)])})
    settings = {
        "ckpt_dir": str(tmp_path / "ckpt"),
        "export_dir": str(tmp_path / "out"),
        "filter_sparse_opt": True,
        "model": "tests.support.tiny_model:no_model",
        "dataset": tiny_model.DATASET,
    }
    code, lines = plan(settings, tmp_path, capsys)
    assert (code, len(lines)) == (2, 1)
    assert "has no 'no_model'" in lines[0]


@pytest.mark.parametrize("kind", ["no directory", "proc", "too long", "dangling link"])
def test_an_export_dir_that_cannot_be_made_is_told(
    kind: str, settings: dict[str, object], tmp_path: Path, capsys
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at all")
    export_dir = {
        "no directory": str(tmp_path / "file" / "out"),
        "proc": "/proc/out",  # the root user may write there, as far as its permissions tell
        "too long": str(tmp_path / "/".join(["a" * 200] * 25)),
        "dangling link": str(tmp_path / "link" / "out"),
    }[kind]
    code, lines = plan({**settings, "export_dir": export_dir}, tmp_path, capsys)
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith(f"dist_export: export_dir {tmp_path if kind != 'proc' else '/proc/out'}")
    if kind == "too long":
        assert lines[0].endswith("it is too long: a path may have 4,096 bytes")


def test_a_directory_is_tried_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_no_directory(str(tmp_path / "a" / "b")) is None
    assert tree(tmp_path) == []

    def refuse(*_: object, **__: object) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(os, "mkdir", refuse)
    assert why_no_directory(str(tmp_path / "a" / "b")) == f"{tmp_path} cannot be written to: Disk quota exceeded"


def test_foreign_files_under_the_names_of_shards_are_told(tmp_path: Path, settings: dict[str, object], capsys) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-000000-of-000001.safetensors").touch()
    code, lines = plan({**settings, "export_dir": str(out), "num_shards": 1}, tmp_path, capsys)
    assert code == 2
    assert "is there already, and dist_export did not write it" in lines[0]


def test_a_dataset_that_fails_is_told(settings: dict[str, object], tmp_path: Path, capsys) -> None:
    code, lines = plan({**settings, "dataset_args": {"nothing_like_it": 1}}, tmp_path, capsys)
    assert (code, len(lines)) == (2, 1)
    assert "dataset_args do not fit tests.support.tiny_model:build_dataset" in lines[0]


def test_mistakes_keep_their_lines_and_are_told_once() -> None:
    mistakes = Mistakes()
    mistakes.refuse()

    def fail(error: DistExportError) -> None:
        raise error

    mistakes.collect(lambda: fail(ConfigError("a", "a1")), None)
    with pytest.raises(ConfigError, match=r"^a\n  a1$"):
        mistakes.refuse()
    mistakes.collect(lambda: fail(ConfigError("a", "a1")), None)
    mistakes.collect(lambda: fail(PlanError("2 mistakes:", "b", "  b1", "c")), None)
    with pytest.raises(UserError) as told:
        mistakes.refuse()
    assert str(told.value).splitlines() == ["3 mistakes:", "  a", "    a1", "  b", "    b1", "  c"]
    with pytest.raises(ExportError):
        mistakes.collect(lambda: fail(ExportError("no mistake of the user's")), None)


def test_a_table_only_plan_needs_no_model(tmp_path: Path, capsys) -> None:
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 10}, 1))
    settings = {"ckpt_dir": str(tmp_path / "ckpt"), "export_dir": str(tmp_path / "out")}
    assert plan(settings, tmp_path, capsys) == (0, [])
