"""A new version does not take the rows of the current one back, when its own step says nothing of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dist_export
from dist_export import cli
from dist_export.api import Exporter
from dist_export.errors import ConfigError
from tests.integration.test_rows_of_an_earlier_step import Training, build, training
from tests.support import score_models as models
from tests.support.deltas import manifest_of

__all__ = ["training"]  # a fixture

REFRESH: dict[str, Any] = {"need_export_sparse": False}


class Published:
    """A directory of versions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = {"publish": str(folder)}
        self.uri = f"versions:{folder}"

    @property
    def now(self) -> bytes:
        return (self.folder / "current.json").read_bytes()

    def step_of_rows(self) -> int | None:
        with dist_export.open_package(self.uri) as opened:
            return opened.manifest.source.step_of_rows


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return Published(tmp_path / "pub")


def test_a_dense_part_over_an_older_base_is_refused_where_the_current_version_has_later_rows(
    training: Training, published: Published, tmp_path: Path
) -> None:
    """It became current, because its dense part was no older."""
    training.export(100, tmp_path / "old")
    training.export(150, None, **published.settings)
    before = published.now
    with pytest.raises(ConfigError) as told:
        training.export(150, None, base=str(tmp_path / "old"), **REFRESH, **published.settings)
    assert f"base {tmp_path / 'old'} has rows of step 100, and the current version of {published.uri}, " in str(
        told.value
    )
    assert (
        "has rows of step 150: serving would go back to the earlier ones. Nothing was written. Give base: latest"
        in str(told.value)
    )
    assert published.now == before
    training.export(150, None, base="latest", **REFRESH, **published.settings)
    assert published.step_of_rows() == 150
    training.export(150, None, base="latest", **REFRESH, **published.settings)  # the same export again


def test_a_base_with_the_rows_of_the_current_version_is_taken(
    training: Training, published: Published, tmp_path: Path
) -> None:
    """A dense part alone over it is no hindrance."""
    training.export(100, None, **published.settings)
    (full,) = (published.folder / "versions").iterdir()
    training.export(150, None, base="latest", **REFRESH, **published.settings)
    training.export(150, None, base=str(full), dense_formats=[], max_batch_size=2048, **REFRESH, **published.settings)
    assert published.step_of_rows() == 100
    assert len(list((published.folder / "versions").iterdir())) == 3


def test_rows_of_a_delta_are_taken_back_by_no_other_spelling_of_the_base(
    training: Training, published: Published, tmp_path: Path
) -> None:
    """``latest`` was refused with the advice to give the full package, which took the rows back."""
    training.export(100, None, **published.settings)
    (full,) = (published.folder / "versions").iterdir()
    training.export_dumps(None, "latest", until_step=120, **published.settings)
    with pytest.raises(ConfigError, match=r"base latest is .*, a delta with 2 changed") as told:
        training.export(150, None, base="latest", **REFRESH, **published.settings)
    assert "or give base" not in str(told.value)
    before = published.now
    with pytest.raises(ConfigError, match=r"has rows of step 100, and .* has rows of step 120: serving would go back"):
        training.export(150, None, base=str(full), **REFRESH, **published.settings)
    assert published.now == before


def test_the_advice_to_compact_helps(training: Training, published: Published) -> None:
    training.export(100, None, **published.settings)
    training.export(150, None, base="latest", **published.settings)
    with pytest.raises(ConfigError) as told:
        training.export(150, None, base="latest", **REFRESH, **published.settings)
    advice = f"`dist_export compact {published.uri} {published.uri}`, and give base: latest"
    assert advice in str(told.value)
    assert cli.main(["compact", published.uri, published.uri, "--progress", "false"]) == 0
    training.export(150, None, base="latest", **REFRESH, **published.settings)
    assert published.step_of_rows() == 150


def test_a_delta_of_which_no_step_is_known_is_known_by_what_it_is_on(
    training: Training, published: Published, tmp_path: Path
) -> None:
    """Of another base nobody knows it, and a note says so."""

    def export_alone(step: int, out: str, **settings: Any) -> dist_export.Manifest:
        """Of a checkpoint at a path, which says no step."""
        given = [build(), "sparse_arch", "dense_arch", [models.batch_of()], str(training.run / f"ckpt_{step}"), out]
        return Exporter(*given, score_program="off", **settings).export(progress=False)

    export_alone(100, str(tmp_path / "other"))
    export_alone(100, "", **published.settings)
    (full,) = (published.folder / "versions").iterdir()
    made = export_alone(150, "", base=str(full), **REFRESH, **published.settings)
    assert not any("goes back" in note for note in made.notes)
    made = export_alone(150, "", base=str(tmp_path / "other"), **REFRESH, **published.settings)
    assert any("has rows of an unknown step, and this one of an unknown step: whether" in note for note in made.notes)
    export_alone(150, "", base=str(full), **published.settings)
    with pytest.raises(ConfigError, match=r"has rows of an unknown step: serving would go back to the earlier ones"):
        export_alone(150, "", base=str(full), max_batch_size=2048, **REFRESH, **published.settings)


def test_a_compacted_package_of_older_rows_is_refused(training: Training, published: Published, tmp_path: Path) -> None:
    """Its step is that of its dense part, which is no earlier one."""
    training.export(100, tmp_path / "old")
    training.export(150, tmp_path / "refresh", base=str(tmp_path / "old"), **REFRESH)
    training.export(150, None, **published.settings)
    before = published.now
    told = r"the package has rows of step 100, and the current version .* has rows of step 150: serving would go back"
    assert cli.main(["compact", str(tmp_path / "refresh"), str(tmp_path / "made"), "--progress", "false"]) == 0
    assert manifest_of(tmp_path / "made")["source"]["rows_step"] == 100
    with pytest.raises(ConfigError, match=told):
        dist_export.export(
            {"ckpt_dir": str(tmp_path / "made"), "num_shards": 2, "progress": False, **published.settings}
        )
    with pytest.raises(ConfigError, match=told):
        dist_export.compact(str(tmp_path / "refresh"), published.uri)
    assert published.now == before
