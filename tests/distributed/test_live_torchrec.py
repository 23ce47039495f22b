"""A live export of what torchrec itself has sharded; skipped where torchrec is not installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from live_models import bytes_of, read_rows
from ranks import run_ranks
from torch import nn

import dist_export

pytest.importorskip("torchrec")

pytestmark = pytest.mark.distributed


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
        self.sparse_arch = nn.Module()
        self.sparse_arch.ebc = torchrec.EmbeddingBagCollection(device=torch.device("cpu"), tables=tables)


def export_sharded(rank: int, out: Path) -> None:
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.sharding_plan import (
        column_wise,
        construct_module_sharding_plan,
        data_parallel,
        row_wise,
        table_wise,
    )
    from torchrec.distributed.types import ShardingPlan

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
        device=torch.device("cpu"),
        plan=ShardingPlan(plan={"sparse_arch.ebc": plan}),
        sharders=[EmbeddingBagCollectionSharder()],
    )
    for name, value in sharded.state_dict().items():
        if not hasattr(value, "local_shards"):
            value.detach().copy_(truth[name])
            continue
        for shard in value.local_shards():
            (row, column), (height, width) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            shard.tensor.detach().copy_(truth[name][row : row + height, column : column + width])
    for num_shards in (1, 3):
        dist_export.Exporter(
            sharded, "sparse_arch", "dense_arch", None, None, out / str(num_shards), num_shards=num_shards
        ).export()


def test_torchrecs_own_shards_leave_memory(tmp_path: Path) -> None:
    """Row-wise, column-wise, table-wise and replicated tables of a DistributedModelParallel give the rows of the whole."""
    run_ranks(export_sharded, 2, tmp_path / "store", tmp_path / "out")
    for num_shards in (1, 3):
        found = read_rows(tmp_path / "out" / str(num_shards))
        for name, rows in Model().state_dict().items():
            assert np.array_equal(found[name], bytes_of(rows)), (num_shards, name)
