"""A DCP checkpoint and the DynamicEmb dump beside it on several real ranks: exported by them, and written by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import dist_export
from dist_export.formats.tuning import Tuning
from tests.distributed.test_worlds import bare_manifest
from tests.support import exports
from tests.support.distributed.ranks import run_ranks
from tests.support.easyrec_writer import (
    CITY,
    DUMPED,
    SHOP,
    USER,
    assert_same,
    make_city,
    read_package,
    truth,
    write_dynamic,
    write_easyrec,
)

pytestmark = pytest.mark.distributed

Truth = dict[str, dict[str, np.ndarray]]


def to_hash_tables(found: Truth) -> Truth:
    for name in (CITY, SHOP):
        found[name]["id"] = np.arange(len(found[name]["embedding"]))
    return found


def cast(found: Truth) -> Truth:
    for rows in found.values():
        rows["embedding"] = rows["embedding"].astype(np.float16)
    return found


def keep_state(found: Truth) -> Truth:
    found[CITY]["momentum1"] = make_city()[1].numpy()
    for name, rows in DUMPED.items():
        found[name]["opt_values"] = rows["opt_values"][np.argsort(rows["keys"])]
    return found


CASES: dict[str, tuple[dict[str, Any], Callable[[Truth], Truth]]] = {
    "filter-1": ({"num_shards": 1}, lambda found: found),
    "reshard-3": ({"num_shards": 3, "format": "dcp+dynamicemb"}, lambda found: found),
    "source": ({"num_shards": "source", "keep_slots": ["momentum1", "opt_values"]}, keep_state),
    "to_hash_tables": ({"num_shards": 2, "to_hash_tables": ["*.city.weight", SHOP]}, to_hash_tables),
    "cast": ({"num_shards": 2, "dtype": {"*": "float16"}}, cast),
    "cast_as_hash": (
        {"num_shards": 3, "to_hash_tables": ["model.*"], "dtype": {"*": "float16"}},
        lambda f: to_hash_tables(cast(f)),
    ),
}


def export_all(_: int, source: Path, out: Path, threads: int) -> None:
    tuning = Tuning(unit_bytes=1 << 12)  # so that every table has many units, which any rank may take
    for name, (settings, _truth) in CASES.items():
        exports.export(
            {
                "ckpt_dir": str(source),
                "export_dir": str(out / name),
                "filter_sparse_opt": True,
                "threads": threads,
                **settings,
            },
            tuning=tuning,
        )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_easyrec(tmp_path_factory.mktemp("easyrec") / "in")


@pytest.fixture(scope="module")
def one_rank(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one_rank")
    run_ranks(export_all, 1, out / "store", source, out / "packages", 1)
    return out / "packages"


@pytest.mark.parametrize(("world_size", "threads"), [(1, 3), (2, 2), (3, 1)])
def test_every_row_is_there_whatever_the_number_of_ranks(
    world_size: int, threads: int, source: Path, one_rank: Path, tmp_path: Path
) -> None:
    """The truth row by row, and the bytes of one rank."""
    run_ranks(export_all, world_size, tmp_path / "store", source, tmp_path / "out", threads)
    for name, (_, change) in CASES.items():
        found, expected = tmp_path / "out" / name, one_rank / name
        assert_same(read_package(found), change(truth()))
        names = sorted(path.name for path in expected.iterdir())
        assert sorted(path.name for path in found.iterdir()) == names
        for file in names:
            if file == "manifest.json":
                assert bare_manifest(found) == bare_manifest(expected)
            else:
                assert (found / file).read_bytes() == (expected / file).read_bytes(), (name, file)


def save_as_dynamicemb(rank: int, folder: str) -> None:
    """Save a model with an ordinary table by rows, and what dynamicemb's state_dict has for one of its own."""
    from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards

    world_size = dist.get_world_size()

    def share_out(piece: torch.Tensor, first: int, size: tuple[int, ...]) -> Any:
        shard = Shard.from_tensor_and_offsets(piece, [first, 0], rank)
        return init_from_local_shards([shard], size)

    city = make_city()[0]
    first = rank * 60
    mine = city[first : first + 60].contiguous()
    state = {
        CITY: share_out(mine, first, tuple(city.shape)),
        USER: share_out(torch.empty(1, 1), rank, (world_size, 1)),
    }
    dcp.save(state, checkpoint_id=f"{folder}/model")


def test_what_stands_in_for_a_table_as_sharded_tensors_save_it(tmp_path: Path) -> None:
    run_ranks(save_as_dynamicemb, 2, tmp_path / "store", str(tmp_path / "in"))
    write_dynamic(tmp_path / "in", {"user": DUMPED["user"]}, world_size=2)
    out = tmp_path / "out"
    settings = {"filter_sparse_opt": True, "num_shards": 2}
    dist_export.export({"ckpt_dir": str(tmp_path / "in"), "export_dir": str(out), **settings})
    assert_same(read_package(out), {name: rows for name, rows in truth().items() if name in (CITY, "user")})
