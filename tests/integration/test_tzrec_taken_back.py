"""Dumps over a base, where readers have later rows than that base: they must not go back to earlier ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dist_export
from dist_export import cli
from dist_export.errors import ConfigError
from tests.support import exports
from tests.support.recis_writer import split_table, write_checkpoint
from tests.support.tzrec_dumps import write_dump

DIM, ROWS = 4, 20
IDS = np.arange(100, 100 + ROWS)


class Training:
    """Tables alone: row n of ``item`` is trained before the dump of step 110 + 10 * n, and no other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pub = folder, folder / "pub"

    def rows_at(self, step: int) -> np.ndarray:
        values = np.arange(ROWS, dtype=np.float32)
        values[: max(0, (step - 100) // 10)] += 0.5
        return np.repeat(values[:, None], DIM, axis=1)

    def dump(self, *steps: int) -> None:
        for step in steps:
            row = (step - 110) // 10
            write_dump(self.folder / "dumps", step, {"item": (IDS[row : row + 1], self.rows_at(step)[row : row + 1])})

    def full(self, step: int, *, kept: slice = slice(None), **settings: Any) -> Path:
        source = self.folder / "run" / f"ckpt_{step}"
        if not source.exists():
            write_checkpoint(source, {"item": split_table(IDS[kept], {"embedding": self.rows_at(step)[kept]}, 2)})
            (self.folder / "run" / "checkpoint").write_text(f"ckpt_{step}\n")
        out = self.folder / f"{step}{'-delta' if 'base' in settings else ''}"
        where = {"export_dir": ""} if "publish" in settings else {"export_dir": str(out)}
        given = {"ckpt_dir": str(self.folder / "run"), "step": step, "filter_sparse_opt": True}
        exports.export({**given, **where, **settings})
        return out

    def dumps(self, base: Path | str, **settings: Any) -> Any:
        where = {"export_dir": ""} if "publish" in settings else {"export_dir": str(self.folder / "made")}
        given = {"ckpt_dir": str(self.folder / "dumps"), "format": "tzrec_delta", "base": str(base)}
        return exports.export({**given, **where, **settings})

    def check(self, package: str, step: int) -> None:
        with dist_export.open_package(package) as opened:
            assert np.array_equal(opened.lookup("item", IDS)[0], self.rows_at(step))


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


def test_dumps_that_begin_after_the_current_version(training: Training) -> None:
    versions, publish = f"versions:{training.pub}", {"publish": str(training.pub)}
    training.full(100, **publish)
    training.full(150, base="latest", **publish)
    training.dump(160, 170)
    with pytest.raises(
        ConfigError, match="has rows of step 150, and the base of step 100, and no dump between them"
    ) as told:
        training.dumps("latest", **publish)
    assert f"`dist_export compact {versions} {versions}`, and give base: latest" in str(told.value)
    with pytest.raises(ConfigError, match="no dump between them is taken"):
        training.dumps("latest", since_step=100, **publish)
    training.check(versions, 150)
    assert cli.main(["compact", versions, versions, "--progress", "false"]) == 0
    training.dumps("latest", **publish)
    training.check(versions, 170)


def test_dumps_that_reach_back_to_the_base_have_the_rows_of_the_current_version(training: Training) -> None:
    versions, publish = f"versions:{training.pub}", {"publish": str(training.pub)}
    training.full(100, **publish)
    training.full(150, base="latest", **publish)
    training.dump(120, 130, 140, 150, 160)
    with pytest.raises(
        ConfigError, match=r"the first dump is of step 120, so an earlier one may be gone; since_step: 100"
    ):
        training.dumps("latest", **publish)
    training.dump(110)
    with pytest.raises(ConfigError, match="the last dump that is taken is of step 140"):
        training.dumps("latest", since_step=100, until_step=140, **publish)
    training.dumps("latest", since_step=100, **publish)
    training.check(versions, 160)


def test_an_older_dump_says_that_none_is_gone(training: Training) -> None:
    publish = {"publish": str(training.pub)}
    training.full(110, **publish)
    training.full(130, base="latest", **publish)
    training.dump(110, 120, 130, 140)
    training.dumps("latest", **publish)
    training.check(f"versions:{training.pub}", 140)


def test_a_delta_of_dumps_is_current(training: Training) -> None:
    """It says which dumps it has. The same export again is what it was, also after later versions."""
    versions, publish = f"versions:{training.pub}", {"publish": str(training.pub)}
    training.full(100, **publish)
    training.dump(120, 130)
    first = training.dumps("latest", until_step=120, **publish)
    training.dumps("latest", until_step=130, **publish)
    assert training.dumps("latest", until_step=120, **publish).digest == first.digest
    training.dump(140)
    (training.folder / "dumps" / "delta_embedding_step_120.parquet").unlink()
    with pytest.raises(
        ConfigError, match=r"has the rows of the dump of step 120, which is not among those that are taken"
    ):
        training.dumps("latest", **publish)
    training.dump(120)
    training.dumps("latest", **publish)
    with dist_export.open_package(versions) as package:
        assert package.manifest.source.steps == (120, 130, 140)


def test_a_delta_that_is_named_as_base(training: Training) -> None:
    base = training.full(100)
    delta = training.full(150, base=str(base))
    training.dump(160)
    with pytest.raises(ConfigError, match=f"compact {delta} OUT`, and give base: OUT"):
        training.dumps(delta)
    training.dumps(base)  # nobody has said anything of later rows


def test_an_older_full_package_is_named_as_base(training: Training) -> None:
    publish = {"publish": str(training.pub)}
    old = training.full(100)
    training.full(150, **publish)
    training.dump(160)
    with pytest.raises(ConfigError, match=r"has rows of step 150, and the base of step 100, .* Give base: latest"):
        training.dumps(old, **publish)
    training.dumps("latest", **publish)
    training.check(f"versions:{training.pub}", 160)


def test_deleted_rows_do_not_come_back(training: Training) -> None:
    publish = {"publish": str(training.pub)}
    training.full(110, **publish)
    training.full(130, kept=slice(0, -2), base="latest", **publish)
    training.dump(110, 120, 130, 140)
    with pytest.raises(ConfigError, match="deletes 2 rows of the base, which no dump does"):
        training.dumps("latest", **publish)
