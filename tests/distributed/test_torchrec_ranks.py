"""A torchrec-shaped job on real ranks: saved by DCP row-wise, exported by other numbers of ranks, scored as it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import dist_export
from dist_export.runtime.joining import join
from dist_export.verify.verify import verify
from tests.support import exports, torchrec_shape
from tests.support.distributed.ranks import run_ranks
from tests.support.sparse_cases import content

pytestmark = pytest.mark.distributed

PREFIX = "sparse_arch.ebc.embedding_bags."


def save(_: int, folder: str) -> None:
    """Save as torchrec's sharded model would: each rank its rows of every table and of the fused optimizer's state."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model: dict[str, Any] = torchrec_shape.build_trained().state_dict()
    fused = {}
    for table, rows in torchrec_shape.ROWS.items():
        name = f"{PREFIX}{table}.weight"
        model[name] = distribute_tensor(model[name], mesh, [Shard(0)])
        fused[name] = {f"{table}.momentum1": distribute_tensor(torch.ones(rows), mesh, [Shard(0)])}
    state = {"model": model, "fused_optimizer": {"state": fused, "param_groups": [{"lr": 0.1}]}}
    dcp.save(state, checkpoint_id=f"{folder}/ckpt")


def export(_: int, folder: str, out: str) -> dict[str, Any]:
    manifest = exports.export(
        {
            "ckpt_dir": f"{folder}/ckpt",
            "export_dir": f"{folder}/{out}",
            "filter_sparse_opt": True,
            "num_shards": 5,
            "model": torchrec_shape.MODEL,
            "dataset": torchrec_shape.DATASET,
        }
    )
    with join(timeout_secs=60) as ranks:
        findings = verify(f"{folder}/{out}", finite=True, ranks=ranks).findings
    assert manifest.parity is not None
    return {"digest": manifest.digest, "scores": manifest.parity.from_files, "findings": findings}


def test_any_number_of_ranks_exports_what_two_have_trained(tmp_path: Path) -> None:
    run_ranks(save, 2, tmp_path / "saving", str(tmp_path))
    for world_size in (1, 3):
        found = run_ranks(export, world_size, tmp_path / f"store{world_size}", str(tmp_path), f"out{world_size}")
        assert len({result["digest"] for result in found}) == 1
        assert found[0]["findings"] == []
        assert found[0]["scores"].reads_rows
        assert found[0]["scores"].max_ulp == {"ctr": 0, "like": 0}
        shards = {name: raw for name, raw in content(tmp_path / f"out{world_size}").items() if "fx_" not in name}
        assert shards == {name: raw for name, raw in content(tmp_path / "out1").items() if "fx_" not in name}
    package = dist_export.open_package(tmp_path / "out3")
    trained = torchrec_shape.build_trained().state_dict()
    for table, rows in torchrec_shape.ROWS.items():
        found_rows, is_there = package.lookup(f"{PREFIX}{table}.weight", range(rows))
        assert is_there.all()
        assert torch.equal(torch.from_numpy(found_rows), trained[f"{PREFIX}{table}.weight"])
