"""Plain checkpoints and dumps on several real ranks: exported by them, and written by them through torch's own writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.distributed.test_worlds import bare_manifest
from tests.support import exports
from tests.support.distributed.ranks import run_ranks
from tests.support.dynamicemb_writer import make_table, truth_of, write_dump
from tests.support.plain_cases import ITEM, TABLES, USER, assert_same, dense_of, make_model, read_numbered
from tests.support.recis_writer import read_back

pytestmark = pytest.mark.distributed

CASES: dict[str, dict[str, Any]] = {
    "several": {"treat_as_tables": TABLES},
    "transposed.pt": {"treat_as_tables": ["*"], "keep_slots": ["sum"]},
    "dump": {"on_duplicate": "first"},
}


def write_sources(folder: Path) -> None:
    """Several files with an index, one file with tables that lie by column, a dump with keys that two ranks have."""
    model = make_model()
    (folder / "several").mkdir(parents=True)
    weight_map = {name: f"pytorch_model-{place + 1:05}-of-00004.bin" for place, name in enumerate(model)}
    for name, file in weight_map.items():
        torch.save({name: model[name]}, folder / "several" / file)
    (folder / "several" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    table = torch.randn(301, 6)
    optimizer = {"state": {"a.weight": {"sum": torch.rand(301)}}, "param_groups": []}
    torch.save({"model": {"a.weight": table.t().contiguous().t()}, "optim": optimizer}, folder / "transposed.pt")
    rows = make_table(np.arange(-200, 200) * 997, 5)
    twice = {
        what: np.concatenate([column, column[:7] + 1 if what == "values" else column[:7]])
        for what, column in rows.items()
    }
    write_dump(folder / "dump", "user", twice, 5, ranks=np.arange(407) % 5)


def export_all(_: int, sources: Path, out: Path, threads: int) -> None:
    for name, settings in CASES.items():
        for num_shards in (1, 3):
            exports.export(
                {
                    "ckpt_dir": str(sources / name),
                    "export_dir": str(out / f"{name}-{num_shards}"),
                    "filter_sparse_opt": True,
                    "num_shards": num_shards,
                    "threads": threads,
                    **settings,
                }
            )


def test_bytes_do_not_depend_on_the_number_of_ranks_and_threads(tmp_path: Path) -> None:
    """Two and three ranks write what one writes."""
    write_sources(tmp_path / "in")
    export_all(0, tmp_path / "in", tmp_path / "1", 1)
    for world_size, threads in ((2, 2), (3, 1)):
        out = tmp_path / str(world_size)
        run_ranks(export_all, world_size, tmp_path / f"store{world_size}", tmp_path / "in", out, threads)
        for package in sorted((tmp_path / "1").iterdir()):
            found = out / package.name
            names = sorted(path.name for path in package.iterdir())
            assert sorted(path.name for path in found.iterdir()) == names
            for name in names:
                if name == "manifest.json":
                    assert bare_manifest(found) == bare_manifest(package)
                else:
                    assert (found / name).read_bytes() == (package / name).read_bytes(), (package.name, name)
    model = make_model()
    assert_same(read_numbered(tmp_path / "1" / "several-3"), {name: model[name] for name in (USER, ITEM)})
    rows = read_back(tmp_path / "1" / "dump-3")["user"]
    truth = truth_of(make_table(np.arange(-200, 200) * 997, 5), "id", "score")
    assert all(rows[slot].tobytes() == column.tobytes() for slot, column in truth.items())


def save_shards(rank: int, path: str) -> None:
    """Write tables shared out by rows and by columns, and a dense parameter, as torch's writer for Hugging Face does."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = make_model()
    placements = {USER: [Shard(0)], ITEM: [Shard(1)]}
    state = {name: distribute_tensor(t, mesh, placements.get(name, [Replicate()])) for name, t in model.items()}
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(path, save_distributed=True))


def test_shards_that_torch_writes_come_together(tmp_path: Path) -> None:
    """Rows of two ranks follow each other, columns of two ranks stand beside each other."""
    run_ranks(save_shards, 2, tmp_path / "store", str(tmp_path / "in"))
    assert len(list((tmp_path / "in").glob("shard-*.safetensors"))) == 2
    model = make_model()
    for num_shards in (1, 2, 3):
        out = tmp_path / str(num_shards)
        settings = {"filter_sparse_opt": True, "treat_as_tables": TABLES, "num_shards": num_shards}
        exports.export({"ckpt_dir": str(tmp_path / "in"), "export_dir": str(out), **settings})
        assert_same(read_numbered(out), {name: model[name] for name in (USER, ITEM)})
    dense = dense_of(tmp_path / "in", TABLES).load()
    assert_same(dict(dense), {name: tensor for name, tensor in model.items() if name not in (USER, ITEM)})
