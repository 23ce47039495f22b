"""DCP checkpoints on several real ranks: exported by them, and written by them through DTensor and FSDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from dist_export.checkpoint.dcp.dense import DcpDense
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.storage.urls import open_directory
from tests.distributed.test_worlds import check_against_one_rank
from tests.support import exports
from tests.support.distributed.dcp_cases import NUM_SHARDS
from tests.support.distributed.ranks import run_ranks
from tests.support.fixture_cases import TORCHREC_CASES, share_pairs
from tests.support.package_reader import read_row_tables
from tests.support.warm import run_command

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def one_rank(torchrec_fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank writes, for all cases and shard counts."""
    out = tmp_path_factory.mktemp("one_rank")
    done = run_command(1, "tests/support/distributed/dcp_cases.py", str(torchrec_fixtures), str(out), "1")
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.fixtures
@pytest.mark.parametrize(("world_size", "threads"), [(2, 3), (3, 1), (4, 2)])
def test_bytes_do_not_depend_on_the_number_of_ranks_and_threads(
    world_size: int, threads: int, one_rank: Path, torchrec_fixtures: Path, tmp_path: Path
) -> None:
    """Shards, merged manifest and manifest (but for its run section) are those of one rank, and hold the truth."""
    done = run_command(
        world_size, "tests/support/distributed/dcp_cases.py", str(torchrec_fixtures), str(tmp_path), str(threads)
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for case, num_shards in share_pairs(list(TORCHREC_CASES), NUM_SHARDS, world_size):
        golden = torch.load(torchrec_fixtures / f"{case}.golden.pt", weights_only=True)
        found = tmp_path / case / str(num_shards)
        check_against_one_rank(found, one_rank / case / str(num_shards))
        for (table, slot), rows in read_row_tables(found).items():
            key = table if slot == "embedding" else f"optim.state.{table}.{slot}"
            assert torch.equal(rows, golden[key]), (case, num_shards, key)


def build_plain_model() -> nn.Module:
    torch.manual_seed(5)
    return nn.ModuleDict({"user": nn.EmbeddingBag(31, 8), "item": nn.Embedding(10, 6), "mlp": nn.Linear(8, 6)})


def save_sharded(rank: int, path: str) -> None:
    """Share a plain model out by rows (FSDP), by columns and not at all, and save it with its optimizer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = build_plain_model()
    by_columns = distribute_tensor(model["item"].weight.detach(), mesh, [Shard(1)])
    whole = distribute_tensor(model["item"].weight.detach(), mesh, [Replicate()])
    fully_shard(model["mlp"], mesh=mesh)
    fully_shard(model["user"], mesh=mesh)
    state: dict[str, Any] = {"model": {**model.state_dict(), "item.weight": by_columns, "copied.weight": whole}}
    moments = {"user.weight": {"exp_avg": model["user"].weight.detach() + 1}}
    state["optimizer"] = {"state": moments, "param_groups": [{"lr": 0.1}]}
    dcp.save(state, checkpoint_id=path)


@pytest.mark.parametrize("world_size", [2, 3])
def test_tables_and_dense_parameters_that_torch_shared_out(world_size: int, tmp_path: Path) -> None:
    """FSDP's row shards, some of them empty or short, DTensor's column shards and replicas come together again."""
    run_ranks(save_sharded, world_size, tmp_path / "store", str(tmp_path / "ckpt"))
    expected = build_plain_model().state_dict()
    expected["copied.weight"] = expected["item.weight"]
    tables = ["user.*", "item.*", "copied.*"]
    for num_shards in (1, 3, "source"):
        package = tmp_path / str(num_shards)
        exports.export(
            {
                "ckpt_dir": str(tmp_path / "ckpt"),
                "export_dir": str(package),
                "filter_sparse_opt": True,
                "treat_as_tables": tables,
                "num_shards": num_shards,
                "keep_slots": ["exp_avg"],
            }
        )
        found = read_row_tables(package)
        assert set(found) == {(f"{t}.weight", "embedding") for t in ("user", "item", "copied")} | {
            ("user.weight", "exp_avg")
        }
        assert torch.equal(found.pop(("user.weight", "exp_avg")), expected["user.weight"] + 1)
        for (table, _), rows in found.items():
            assert torch.equal(rows, expected[table]), table
    dense = DcpDense(open_directory(tmp_path / "ckpt"), TensorSettings(tuple(tables))).load()
    assert set(dense) == {"mlp.weight", "mlp.bias"}
    for name, values in dense.items():
        assert torch.equal(values, expected[name])
