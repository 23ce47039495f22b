"""The dense arch of a model in memory is that of rank 0: all ranks must have the same one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dist_export.errors import DistExportError
from dist_export.formats.recis import Slice
from tests.support import exports
from tests.support.distributed.ranks import run_ranks
from tests.support.live_models import LiveTable

pytestmark = pytest.mark.distributed

ROWS = torch.arange(8, dtype=torch.float32).reshape(4, 2)


class Sparse(nn.Module):
    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        ids = torch.arange(4) * world_size + rank
        self.user = LiveTable("user", ids.numpy(), ROWS.numpy(), Slice(rank, rank + 1, world_size))

    def forward(self, batch):
        return {"x": self.user(batch["ids"])}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, blocks):
        return {"ctr": self.second(self.norm(self.first(blocks["x"])))}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse_arch = Sparse(dist.get_rank(), dist.get_world_size())
        self.dense_arch = Dense()

    def forward(self, batch):
        return self.dense_arch(self.sparse_arch(batch))


def parameter_apart(model: Model) -> None:
    if dist.get_rank() == 2:
        with torch.no_grad():
            model.dense_arch.second.bias += 1e-7


def parameter_of_another_shape(model: Model) -> None:
    if dist.get_rank() == 1:
        model.dense_arch.first.register_parameter("further", nn.Parameter(torch.ones(2)))


def statistics_apart(model: Model) -> None:
    model.dense_arch.norm.running_mean += dist.get_rank()


def sharded(model: Model) -> None:
    fully_shard(model.dense_arch.first, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


CASES = {f.__name__: f for f in (parameter_apart, parameter_of_another_shape, statistics_apart, sharded)}


def export_each(rank: int, folder: str) -> dict[str, list[str]]:
    found = {}
    for name, change in CASES.items():
        model = Model()
        change(model)
        batch = {"ids": torch.tensor([rank, rank + dist.get_world_size()])}
        out = Path(folder) / name
        try:
            manifest = exports.exporter(model, "sparse_arch", "dense_arch", [batch], None, out).export(progress=False)
            found[name] = list(manifest.notes)
        except DistExportError as error:
            found[name] = [f"exit {error.exit_code}: {error}", str(out.exists() and any(out.iterdir()))]
        dist.barrier()
    return found


def test_replicas_that_differ_are_named_on_all_ranks(tmp_path: Path) -> None:
    found = run_ranks(export_each, 3, tmp_path / "store", str(tmp_path), timeout=300)
    for its in found:
        error, is_written = its["parameter_apart"]
        assert error.startswith("exit 2: ")
        assert "the dense arch's second.bias differs between ranks 0 and 2" in error
        assert is_written == "False"
        assert "the dense arch's first.further differs between ranks 0 and 1" in its["parameter_of_another_shape"][0]
    notes = " ".join(found[0]["statistics_apart"])
    assert (
        "the dense arch's norm.running_mean differs between ranks 0 and 1; a buffer is exported as rank 0 has it"
        in notes
    )
    assert not any("differs between ranks" in note or "exit" in note for note in found[0]["sharded"])
