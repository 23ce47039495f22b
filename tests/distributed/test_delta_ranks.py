"""Deltas on several real ranks: the bytes of one rank, whatever the shards of both sides are, also of a model in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.integration.test_delta_export import change, export, save, state_of, tables_of
from tests.support import dcp_writer, exports
from tests.support.deltas import manifest_of, put_together, read_package
from tests.support.distributed.ranks import run_ranks
from tests.support.live_models import LiveTable, Tables, embedding
from tests.support.recis_writer import gen_slice, split_table

pytestmark = pytest.mark.distributed

SHARDS = ((1, 3), (4, 1), (2, 3))
"""Of the base and of the delta."""


def deltas_of(folder: str, out: Path) -> None:
    """Write all deltas; any rank."""
    for of_base, of_delta in SHARDS:
        settings: dict[str, Any] = {"num_shards": of_delta, "threads": 2, "dtype": {"item": "float16"}}
        settings |= {"on_overflow": "clamp", "prune": [{"tables": ["item"], "slot": "step", "below": 300}]}
        export(Path(f"{folder}/after"), out / f"{of_base}-{of_delta}", base=f"{folder}/base{of_base}", **settings)
    numbered = {"treat_as_tables": ["sparse_arch.item.weight"], "num_shards": 2}
    export(Path(f"{folder}/grown"), out / "grown", base=f"{folder}/base_grown", **numbered)


def export_all(_: int, folder: str, out: str) -> None:
    deltas_of(folder, Path(out))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two states, the bases of each number of shards, full exports, and the deltas of one rank."""
    base, before = tmp_path_factory.mktemp("deltas"), tables_of()
    save(base / "before", before, 2)
    save(base / "after", change(before), 3)
    settings: dict[str, Any] = {"dtype": {"item": "float16"}, "on_overflow": "clamp"}
    for of_base, _ in SHARDS:
        export(base / "before", base / f"base{of_base}", num_shards=of_base, **settings)
    settings["prune"] = [{"tables": ["item"], "slot": "step", "below": 300}]
    export(base / "after", base / "full", **settings)
    numbered: dict[str, Any] = {"treat_as_tables": ["sparse_arch.item.weight"]}
    export(dcp_writer.save(base / "small", state_of()), base / "base_grown", num_shards=2, **numbered)
    export(dcp_writer.save(base / "grown", state_of(420, later=True)), base / "full_grown", **numbered)
    deltas_of(str(base), base / "one")
    return base


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_ranks(folder: Path, tmp_path: Path, world_size: int) -> None:
    run_ranks(export_all, world_size, tmp_path / "store", str(folder), str(tmp_path / "out"))
    for one in sorted((folder / "one").iterdir()):
        found = tmp_path / "out" / one.name
        names = sorted(path.name for path in one.iterdir())
        assert sorted(path.name for path in found.iterdir()) == names
        for name in set(names) - {"manifest.json"}:
            assert (found / name).read_bytes() == (one / name).read_bytes(), name
        manifests = [manifest_of(path) for path in (one, found)]
        assert manifests[0]["digest"] == manifests[1]["digest"]


def test_one_rank_s_deltas_are_the_full_export(folder: Path) -> None:
    for of_base, of_delta in SHARDS:
        delta = folder / "one" / f"{of_base}-{of_delta}"
        assert put_together(folder / f"base{of_base}", delta) == read_package(folder / "full")
    assert put_together(folder / "base_grown", folder / "one" / "grown") == read_package(folder / "full_grown")
    assert any(name.endswith(".deleted_ids") for name in os.listdir(folder / "one" / "4-1"))


def export_live(rank: int, out: Path) -> None:
    """Export a model in memory, train one step, write a delta, and export all of it."""
    world_size = dist.get_world_size()
    ids, slots = tables_of()["item"]
    part = split_table(ids, {"embedding": slots["embedding"]}, world_size)[rank]
    item = LiveTable("item", part.ids.copy(), part.slots["embedding"].copy(), gen_slice(rank, world_size))
    model = Tables(item=item, shop=embedding(torch.arange(800.0).reshape(100, 8)))

    def write(name: str, **settings: Any) -> None:
        exports.exporter(model, "sparse_arch", "dense_arch", None, None, out / name, num_shards=2, **settings).export()

    write("base")
    with torch.no_grad():
        item._rows[:7] += 1.0
        model.sparse_arch.shop.weight[[5, 99]] += 1.0
    write("delta", base=str(out / "base"))
    write("full")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_in_memory(tmp_path: Path, world_size: int) -> None:
    run_ranks(export_live, world_size, tmp_path / "store", tmp_path)
    assert put_together(tmp_path / "base", tmp_path / "delta") == read_package(tmp_path / "full")
    item, shop = manifest_of(tmp_path / "delta")["tables"]
    assert item["delta"]["changed"] >= 7 * world_size - 1  # a NaN stays one
    assert shop["delta"]["changed"] == 2
