"""Train the demo's model and leave a checkpoint, and its scores for three users to compare the package with.

usage: torchrun --standalone --nproc-per-node 2 -m scripts.demo.train --config scripts/demo/export.yaml --out demo_run

The model's arguments and the data come from the exporter's own config: what is exported is what was trained.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy

from scripts.demo.data import Batch, Example, load_examples, make_batch, split_examples
from scripts.demo.model import OUTPUTS, DeepFM, build_model
from scripts.demo.recis_format import save_checkpoint
from scripts.demo.sparse import SparseAdam

BATCH_SIZE = 512
"""On each rank."""
LEARNING_RATE = 5e-3


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
    sparse_optimizer = SparseAdam(model.sparse_arch.hash_tables(), lr=LEARNING_RATE)
    dense_optimizer = torch.optim.Adam(model.dense_arch.parameters(), lr=LEARNING_RATE)

    for epoch in range(args.epochs):
        start, losses = time.monotonic(), []
        model.train()
        for examples in iterate_share(train):
            loss = compute_loss(model(make_batch(fg, examples)), examples)
            loss.backward()
            average_over_ranks([param.grad for param in model.dense_arch.parameters() if param.grad is not None])
            dense_optimizer.step()
            dense_optimizer.zero_grad()
            sparse_optimizer.step()
            losses.append(loss.detach())
        average_over_ranks([buffer for buffer in model.dense_arch.buffers() if buffer.is_floating_point()])
        loss = torch.stack(losses).mean()
        average_over_ranks([loss])
        auc = evaluate(model, fg, test)
        if dist.get_rank() == 0:
            aucs = ", ".join(f"AUC({name}) {value:.3f}" for name, value in auc.items())
            print(f"epoch {epoch + 1}: loss {loss:.3f}, test {aucs}, {time.monotonic() - start:.1f} s")

    directory = args.out / "checkpoints" / f"ckpt_{sparse_optimizer.num_steps}"
    save_checkpoint(
        directory,
        (part for table in model.sparse_arch.hash_tables() for part in table.snapshot()),
        dense=sparse_optimizer.dense_state(),
        state_dict=model.state_dict(),
        global_step=sparse_optimizer.num_steps,
    )
    requests = choose_requests(test)
    scores = predict(model, make_batch(fg, requests))
    if dist.get_rank() == 0:
        for index, request in enumerate(requests):
            request["scores"] = {name: column[index].item() for name, column in scores.items()}
        (args.out / "requests.json").write_text(json.dumps(requests, indent=1))
        print(f"checkpoint: {directory}")
    dist.destroy_process_group()


def iterate_share(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """Yield this rank's batches. Each rank has equally many: the lookup is a collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = examples[rank : len(examples) // world_size * world_size : world_size]
    for start in range(0, len(share), BATCH_SIZE):
        yield share[start : start + BATCH_SIZE]


def get_labels(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return output name -> labels (B, 1): a click is a rating of 4 or 5, a like one of 5."""
    ratings = torch.tensor([[example["rating"]] for example in examples])
    return {"ctr": (ratings >= 4).float(), "like": (ratings == 5).float()}


def compute_loss(outputs: dict[str, Tensor], examples: Sequence[Example]) -> Tensor:
    labels = get_labels(examples)
    return torch.stack([binary_cross_entropy(outputs[name], labels[name]) for name in OUTPUTS]).mean()


def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, all of them in one collective."""
    flat = nn.utils.parameters_to_vector(tensors)
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / dist.get_world_size(), tensors)


@torch.no_grad()
def predict(model: DeepFM, batch: Batch) -> dict[str, Tensor]:
    model.eval()
    scores: dict[str, Tensor] = model(batch)
    return scores


def evaluate(model: DeepFM, fg: dict[str, Any], test: Sequence[Example]) -> dict[str, float]:
    """Return output name -> area under the ROC curve over all ranks' shares of the test set."""
    pairs = defaultdict(list)
    for examples in iterate_share(test):
        scores, labels = predict(model, make_batch(fg, examples)), get_labels(examples)
        for name in OUTPUTS:
            pairs[name].append(torch.cat([scores[name], labels[name]], dim=1))
    result = {}
    for name in OUTPUTS:
        mine = torch.cat(pairs[name])
        shares = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, mine)
        result[name] = compute_auc(*torch.cat(shares).numpy().T)
    return result


def compute_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the probability that a positive outranks a negative."""
    positives = np.flatnonzero(labels[scores.argsort()] == 1)
    num_positives, num_negatives = len(positives), len(labels) - len(positives)
    return float((positives - np.arange(num_positives)).sum() / (num_positives * num_negatives))


def choose_requests(test: Sequence[Example], *, num_users: int = 3, num_movies: int = 5) -> list[Example]:
    """Return test ratings of the first users that have enough of them: raw features, with no id hashed yet."""
    by_user = defaultdict(list)
    for example in test:
        by_user[example["user_id"]].append(example)
    users = sorted((user for user, examples in by_user.items() if len(examples) >= num_movies), key=int)
    return [dict(example) for user in users[:num_users] for example in by_user[user][:num_movies]]


if __name__ == "__main__":
    main()
