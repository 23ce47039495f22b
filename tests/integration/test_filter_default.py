"""``filter_sparse_opt: null``: a copy for RecIS, new shards for every other format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_export.cli import main
from dist_export.errors import ConfigError, UserError
from tests.support.source_cases import SOURCES, copy_recis, export


@pytest.fixture
def fixtures(recis_fixtures: Path, torchrec_fixtures: Path) -> Path:
    assert recis_fixtures.parent == torchrec_fixtures.parent
    return recis_fixtures.parent


@pytest.mark.parametrize("name", SOURCES)
def test_null_is_what_the_format_decides(name: str, fixtures: Path, tmp_path: Path) -> None:
    """And the same export as with the value spelt out: a rerun with it finds its package and writes nothing."""
    make, is_filtered = SOURCES[name]
    source = make(fixtures, tmp_path)
    manifest = export(source, tmp_path / "out")
    assert manifest.mode == ("filter" if is_filtered else "copy")
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    again = export(source, tmp_path / "out", filter_sparse_opt=is_filtered)
    assert again.run["identity"] == manifest.run["identity"]
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError):
        export(source, tmp_path / "out", filter_sparse_opt=not is_filtered)


@pytest.mark.parametrize(
    "settings",
    [{"num_shards": 4}, {"dtype": {"*": "float16"}}, {"prune": [{"tables": "*", "norm_at_most": 0}]}],
    ids=["num_shards", "dtype", "prune"],
)
@pytest.mark.parametrize("name", SOURCES)
def test_what_needs_new_shards_is_checked_when_the_format_is_known(
    settings: dict[str, Any], name: str, fixtures: Path, tmp_path: Path
) -> None:
    make, is_filtered = SOURCES[name]
    source = make(fixtures, tmp_path)
    if is_filtered:
        has_row_numbers = "prune" in settings and name not in ("dynamicemb", "package")
        more = {"to_hash_tables": ["*weight"]} if has_row_numbers else {}
        assert export(source, tmp_path / "out", **settings, **more).mode == "filter"
        return
    (setting,) = settings
    with pytest.raises(
        ConfigError, match=f"{setting} needs new shards, but filter_sparse_opt is false, .*set filter_sparse_opt: true"
    ):
        export(source, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_it_too_and_writes_nothing(
    fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy_recis(fixtures, tmp_path)
    for command in ("export", "plan"):
        arguments = ["--ckpt_dir", str(source), "--export_dir", str(tmp_path / "out"), "--num_shards", "4"]
        assert main([command, *arguments]) == 2
        assert "num_shards needs new shards, but filter_sparse_opt is false" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_place_without_a_checkpoint_is_said_before_the_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    arguments = ["--ckpt_dir", str(tmp_path / "in"), "--export_dir", str(tmp_path / "out"), "--num_shards", "4"]
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert "looked for" in error
    assert "filter_sparse_opt" not in error
