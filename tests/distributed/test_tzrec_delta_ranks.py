"""A trainer's dumps on several real ranks: the bytes of one rank, and conflicts between files that different ranks have read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_export.errors import StepFailedError
from tests.integration.test_tzrec_deltas import (
    ITEM,
    export,
    export_dump,
    hashed_state,
    named,
    save_hashed,
    train,
)
from tests.support.deltas import manifest_of, put_together, read_package
from tests.support.distributed.ranks import run_ranks
from tests.support.tzrec_dumps import write_dump

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, the dumps of three trainer ranks at two steps, the full export, and the delta of one rank."""
    base, before = tmp_path_factory.mktemp("dumps"), hashed_state()
    middle, first = train(before, 1)
    after, second = train(middle, 2)
    for step, looked_up in ((110, first), (120, second)):
        write_dump(base / "dumps", step, *(named(looked_up, rank, 3) for rank in range(3)))
    settings = {"dtype": {"item": "float16"}}
    export(save_hashed(base / "before", before), base / "base", **settings)
    export(save_hashed(base / "after", after), base / "full", **settings)
    export_dump(base / "dumps", base / "one", base / "base", num_shards=2)
    return base


def write_delta(_: int, folder: str, dumps: str, out: str) -> None:
    export_dump(Path(dumps), Path(out), f"{folder}/base", num_shards=2, threads=2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_ranks(folder: Path, tmp_path: Path, world_size: int) -> None:
    run_ranks(write_delta, world_size, tmp_path / "store", str(folder), str(folder / "dumps"), str(tmp_path / "out"))
    assert put_together(folder / "base", tmp_path / "out") == read_package(folder / "full")
    names = sorted(path.name for path in (folder / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in set(names) - {"manifest.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (folder / "one" / name).read_bytes(), name
    assert manifest_of(tmp_path / "out")["digest"] == manifest_of(folder / "one")["digest"]


def meet_conflict(_: int, folder: str, dumps: str, out: str) -> None:
    with pytest.raises((StepFailedError, ValueError), match="different rows of key"):
        export_dump(Path(dumps), Path(out), f"{folder}/base")


def test_ranks_find_rows_that_differ_in_files_that_each_has_read(folder: Path, tmp_path: Path) -> None:
    ids, rows = hashed_state()["item"]
    write_dump(tmp_path / "dumps", 110, {ITEM: (ids[:9], rows[:9])}, {ITEM: (ids[8:12], rows[8:12] + 1)})
    run_ranks(meet_conflict, 2, tmp_path / "store", str(folder), str(tmp_path / "dumps"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
