"""Compaction on several real ranks: the bytes of one rank, whatever the shards of both packages are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dist_export
from tests.integration.test_compact import compare
from tests.integration.test_delta_export import change, export, save, state_of, tables_of
from tests.support import dcp_writer
from tests.support.deltas import manifest_of
from tests.support.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

NAMES = ("1-3", "4-1", "2-3", "grown")
"""Of the packages: the shards of the base and of the delta, or the kind of table."""


def compact_all(_: int, folder: str, out: str) -> None:
    """Compact all deltas; any rank."""
    for name in NAMES:
        dist_export.compact(f"{folder}/delta-{name}", f"{out}/{name}", threads=2, num_shards=2, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deltas with their bases, full exports, and what one rank makes of them."""
    base, before = tmp_path_factory.mktemp("compacted"), tables_of()
    save(base / "before", before, 2)
    save(base / "after", change(before), 3)
    settings: dict[str, Any] = {"dtype": {"item": "float16"}, "on_overflow": "clamp"}
    rules = {"prune": [{"tables": ["item"], "slot": "step", "below": 300}]}
    for name in NAMES[:-1]:
        of_base, of_delta = map(int, name.split("-"))
        below = export(base / "before", base / f"base-{name}", num_shards=of_base, **settings)
        export(base / "after", base / f"delta-{name}", num_shards=of_delta, base=str(below), **settings, **rules)
        export(base / "after", base / f"full-{name}", num_shards=2, **settings, **rules)
    numbered: dict[str, Any] = {"treat_as_tables": ["sparse_arch.item.weight"]}
    below = export(dcp_writer.save(base / "small", state_of()), base / "base-grown", num_shards=3, **numbered)
    grown = dcp_writer.save(base / "grown", state_of(420, later=True))
    export(grown, base / "delta-grown", base=str(below), **numbered)
    export(grown, base / "full-grown", num_shards=2, **numbered)
    compact_all(0, str(base), str(base / "one"))
    return base


def test_one_rank_makes_the_full_export(folder: Path) -> None:
    for name in NAMES:
        compare(folder / "one" / name, folder / f"full-{name}")


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_ranks(folder: Path, tmp_path: Path, world_size: int) -> None:
    run_ranks(compact_all, world_size, tmp_path / "store", str(folder), str(tmp_path / "out"))
    for name in NAMES:
        one, found = folder / "one" / name, tmp_path / "out" / name
        files = sorted(str(path.relative_to(one)) for path in one.rglob("*.*"))
        assert sorted(str(path.relative_to(found)) for path in found.rglob("*.*")) == files
        for file in set(files) - {"manifest.json"}:
            assert (found / file).read_bytes() == (one / file).read_bytes(), file
        assert manifest_of(found)["digest"] == manifest_of(one)["digest"]
