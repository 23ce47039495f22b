"""A live export of what torchrec itself has sharded; skipped where torchrec is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support import exports
from tests.support.distributed.ranks import run_ranks
from tests.support.live_models import bytes_of, read_rows

pytest.importorskip("torchrec")

pytestmark = [pytest.mark.distributed, pytest.mark.torchrec]


class Model(nn.Module):
    def __init__(self) -> None:
        import torchrec
        from torchrec.modules.embedding_configs import EmbeddingBagConfig

        super().__init__()
        torch.manual_seed(0)
        tables = [
            EmbeddingBagConfig(name=name, embedding_dim=16, num_embeddings=101 + number, feature_names=[f"f_{name}"])
            for number, name in enumerate(("rows", "columns", "whole", "replicated"))
        ]
        self.sparse_arch = Sparse(torchrec.EmbeddingBagCollection(device=torch.device("cpu"), tables=tables))
        self.dense_arch = Dense()


class Sparse(nn.Module):
    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.ebc = collection

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        from torchrec import KeyedJaggedTensor

        keys = [f"f_{name}" for name in ("rows", "columns", "whole", "replicated")]
        features = KeyedJaggedTensor(keys, ids.repeat(4), lengths=torch.ones(4 * len(ids), dtype=torch.int64))
        return dict(self.ebc(features).to_dict())


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(64, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"ctr": self.out(torch.cat([blocks[name] for name in sorted(blocks)], 1))}


def export_sharded(rank: int, out: Path, as_dtensor: bool) -> None:
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.sharding_plan import (
        column_wise,
        construct_module_sharding_plan,
        data_parallel,
        row_wise,
        table_wise,
    )
    from torchrec.distributed.types import ShardingEnv, ShardingPlan

    model = Model()
    truth = model.state_dict()
    ranks = list(range(dist.get_world_size()))
    kinds = {"rows": row_wise(), "columns": column_wise(ranks=ranks), "whole": table_wise(rank=ranks[-1])}
    plan = construct_module_sharding_plan(
        model.sparse_arch.ebc,
        kinds | {"replicated": data_parallel()},
        local_size=len(ranks),
        world_size=len(ranks),
        device_type="cpu",
    )
    for name in kinds:
        plan[name].compute_kernel = "fused"
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv(len(ranks), rank, dist.group.WORLD, output_dtensor=as_dtensor),
        device=torch.device("cpu"),
        plan=ShardingPlan(plan={"sparse_arch.ebc": plan}),
        sharders=[EmbeddingBagCollectionSharder()],
    )
    for name, value in sharded.state_dict().items():
        for shard, (row, column) in pieces_of(value):
            height, width = shard.shape if shard.dim() == 2 else (len(shard), 0)
            rows = truth[name][row : row + height]
            shard.detach().copy_(rows[:, column : column + width] if width else rows)
    batch = torch.arange(6) + 10 * rank
    for num_shards in (1, 3):
        manifest = exports.exporter(
            sharded, "sparse_arch", "dense_arch", [batch], None, out / str(num_shards), num_shards=num_shards
        ).export()
        assert manifest.parity is not None


def pieces_of(value: Any) -> list[tuple[torch.Tensor, Any]]:
    local = getattr(value, "_local_tensor", None)
    if local is not None:
        return list(zip(local.local_shards(), local.local_offsets(), strict=False))
    if hasattr(value, "local_shards"):
        return [(shard.tensor, shard.metadata.shard_offsets) for shard in value.local_shards()]
    return [(value, (0, 0))]


@pytest.mark.parametrize("as_dtensor", [False, True], ids=["ShardedTensor", "DTensor"])
def test_torchrecs_own_shards_leave_memory(tmp_path: Path, as_dtensor: bool) -> None:
    """Row-wise, column-wise, table-wise and replicated tables of a DistributedModelParallel give the rows of the whole."""
    run_ranks(export_sharded, 2, tmp_path / "store", tmp_path / "out", as_dtensor)
    for num_shards in (1, 3):
        found = read_rows(tmp_path / "out" / str(num_shards))
        for name, rows in Model().sparse_arch.state_dict(prefix="sparse_arch.").items():
            assert np.array_equal(found[name], bytes_of(rows)), (num_shards, name)
