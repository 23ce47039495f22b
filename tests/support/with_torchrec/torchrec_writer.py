"""Trains a small model with torchrec on several ranks and saves it with DCP. Needs torchrec; started by ``run_ranks``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from dist_export.checkpoint.model_weights import ModelWeights
from dist_export.model.sparse_tables import find_weights

Pieces = dict[str, tuple[tuple[int, ...], list[tuple[tuple[int, ...], torch.Tensor]]]]
"""Name -> (shape of the whole, [(offsets, values)])."""

KERNEL = EmbeddingComputeKernel.FUSED.value
SEQUENCE = "t_sequence"
"""A table of the collection that gives every row of a list."""


class Model(nn.Module):
    def __init__(self, sizes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=name, embedding_dim=dim, num_embeddings=rows, feature_names=[f"f_{name}"])
                for name, (rows, dim) in sizes.items()
            ],
            device=torch.device("cpu"),
        )
        self.ec = EmbeddingCollection(
            tables=[
                EmbeddingConfig(name=SEQUENCE, embedding_dim=4, num_embeddings=29, feature_names=[f"f_{SEQUENCE}"])
            ],
            device=torch.device("cpu"),
        )
        self.mlp = nn.Linear(sum(dim for _, dim in sizes.values()), 1)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        found: torch.Tensor = self.mlp(self.ebc(features).values())
        sequence: torch.Tensor = self.ec(features)[f"f_{SEQUENCE}"].values()
        return found.sum() + sequence.sum()


def shard_model(sizes: dict[str, tuple[int, int]]) -> DistributedModelParallel:
    """Shard a model with tables of these (rows, dim), which are named as ``by_table`` below, over all ranks."""
    world_size = dist.get_world_size()
    torch.manual_seed(3)
    model = Model(sizes)
    fused = [parameter for name, parameter in model.named_parameters() if "t_" in name and "t_copied" not in name]
    apply_optimizer_in_backward(RowWiseAdagrad, fused, {"lr": 0.1})
    by_table = {
        "t_rows": row_wise(),
        "t_columns": column_wise(ranks=list(range(world_size))),
        "t_whole": table_wise(rank=world_size - 1),
        "t_table_rows": table_row_wise(host_index=0),
        "t_copied": data_parallel(),
    }
    sharders = {"ebc": EmbeddingBagCollectionSharder(), "ec": EmbeddingCollectionSharder()}
    plans = {}
    for name, generators in {"ebc": by_table, "ec": {SEQUENCE: row_wise()}}.items():
        plans[name] = construct_module_sharding_plan(
            model.get_submodule(name),
            generators,
            sharder=sharders[name],
            local_size=world_size,
            world_size=world_size,
            device_type="cpu",
        )
        for table, sharding in plans[name].items():
            if table != "t_copied":
                sharding.compute_kernel = KERNEL  # on the CPU it is not found by itself
    return DistributedModelParallel(
        module=model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=torch.device("cpu"),
        plan=ShardingPlan(plans),
        sharders=list(sharders.values()),
    )


def find_sharded(_: int, sizes: dict[str, tuple[int, int]]) -> ModelWeights:
    """Return what this rank's sharded model says of its tables."""
    return find_weights(shard_model(sizes), sparse_model_name="", dense_model_name="mlp")


def train_and_save(rank: int, path: str, sizes: dict[str, tuple[int, int]]) -> Pieces:
    """Save to ``path`` a model of :func:`shard_model`.

    Return what this rank holds of the weights, and of optimizer state as ``<weight>|<slot>``.
    """
    sharded = shard_model(sizes)
    torch.manual_seed(10 + rank)
    keys = [*(f"f_{name}" for name in sizes), f"f_{SEQUENCE}"]
    for _ in range(2):
        values = torch.cat([torch.randint(rows, (6,)) for rows in (*(rows for rows, _ in sizes.values()), 29)])
        features = KeyedJaggedTensor(keys=keys, values=values, lengths=torch.full((len(keys) * 3,), 2))
        sharded(features).backward()
    state: dict[str, Any] = {
        "model": sharded.state_dict(),
        "fused_optimizer": sharded.fused_optimizer.state_dict(),
    }
    dcp.save(state, checkpoint_id=path)
    return _list_pieces(state)


def _list_pieces(state: dict[str, Any]) -> Pieces:
    found: Pieces = {}
    moments = {
        f"{name.removeprefix('model.')}|{slot.split('.')[-1]}": value
        for name, slots in state["fused_optimizer"]["state"].items()
        for slot, value in slots.items()
    }
    for name, value in {**state["model"], **moments}.items():
        if isinstance(value, ShardedTensor):
            shards = [(tuple(shard.metadata.shard_offsets), shard.tensor) for shard in value.local_shards()]
            found[name] = (tuple(value.size()), [(place, tensor.detach().clone()) for place, tensor in shards])
        else:
            found[name] = (tuple(value.shape), [((0,) * value.dim(), value.detach().clone())])
    return found
