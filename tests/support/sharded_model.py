"""The demo's hash tables, whose lookup is an all-to-all over the ranks, in a small model with a coalesced table."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.support.recis_writer import PartSpec, make_tables, write_checkpoint

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.append(ROOT)

from scripts.demo.sparse import CHILD_SHIFT, ID_MASK, ShardedTable, gen_slice  # noqa: E402 -- the root must be on the path

DIM = 4
ROWS = {"user_emb": 60, "item_emb": 40, "age_emb": 20, "city_emb": 20}


class SparseArch(nn.Module):
    """One table by itself, and three that are the children of a coalesced one. Lists are padded with -1."""

    def __init__(self) -> None:
        super().__init__()
        self.user = ShardedTable("user_emb", DIM)
        self.profile = ShardedTable("profile", DIM, ["item_emb", "age_emb", "city_emb"])

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        is_id = batch["clicks"] != -1
        rows = self.user(batch["clicks"][is_id])
        clicks = rows.new_zeros(*is_id.shape, DIM).index_put((is_id,), rows).sum(1)
        blocks = {"clicks": clicks}
        for child, name in enumerate(("item", "age", "city")):
            blocks[name] = self.profile((child << CHILD_SHIFT) | (batch[name] & ID_MASK))
        return blocks


class DenseArch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4 * DIM, 2)

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = torch.sigmoid(self.head(torch.cat([blocks[name] for name in ("clicks", "item", "age", "city")], dim=1)))
        return {"ctr": x[:, :1], "like": x[:, 1:]}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse_arch, self.dense_arch = SparseArch(), DenseArch()

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.dense_arch(self.sparse_arch(batch))


def tables() -> dict[str, list[PartSpec]]:
    made = make_tables(ROWS, 2, dim=DIM, seed=3)
    for name in ("item_emb", "age_emb", "city_emb"):  # the ids of children have 52 bits
        for part in made[name]:
            part.ids &= ID_MASK
    return made


def trained_dense() -> DenseArch:
    torch.manual_seed(11)
    return DenseArch().eval()


def write_source(directory: Path) -> Path:
    state = {f"dense_arch.{name}": tensor for name, tensor in trained_dense().state_dict().items()}
    write_checkpoint(directory, tables(), model_state=state)
    return directory


def ids_of(name: str) -> np.ndarray:
    return np.concatenate([part.ids for part in tables()[name]])


def batch_of(num_examples: int, seed: int) -> dict[str, torch.Tensor]:
    """Return a batch in which some ids have no row."""
    random = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return random.choice(np.append(ids_of(name), 1234567), shape)

    clicks = draw("user_emb", (num_examples, 3))
    clicks[random.random(clicks.shape) < 0.3] = -1
    batch = {"clicks": clicks} | {f: draw(f"{f}_emb", (num_examples,)) for f in ("item", "age", "city")}
    return {name: torch.from_numpy(ids) for name, ids in batch.items()}


def expected_scores(batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Return the scores by numpy lookups in what the checkpoint was written from."""
    rows = {
        name: {int(i): row for part in parts for i, row in zip(part.ids, part.slots["embedding"], strict=True)}
        for name, parts in tables().items()
    }
    zero = np.zeros(DIM, np.float32)
    clicks = [sum((rows["user_emb"].get(i, zero) for i in its if i != -1), zero) for its in batch["clicks"].tolist()]
    blocks = {"clicks": torch.from_numpy(np.stack(clicks).astype(np.float32))}
    for name in ("item", "age", "city"):
        by_id = rows[f"{name}_emb"]
        blocks[name] = torch.from_numpy(np.stack([by_id.get(i, zero) for i in batch[name].tolist()]).astype(np.float32))
    with torch.no_grad():
        return {name: value.numpy() for name, value in trained_dense()(blocks).items()}


def fill(model: Model, rank: int, world_size: int) -> None:
    """Put those rows into the tables that a rank owns."""
    begin, end = gen_slice(rank, world_size)
    holders = {"user_emb": (model.sparse_arch.user.table, 0)}
    for child, name in enumerate(("item_emb", "age_emb", "city_emb")):
        holders[name] = model.sparse_arch.profile.table, child << CHILD_SHIFT
    for name, parts in tables().items():
        table, high = holders[name]
        for part in parts:
            is_own = (part.ids & 65535 >= begin) & (part.ids & 65535 < end)
            rows = torch.from_numpy(np.ascontiguousarray(part.slots["embedding"][is_own]))
            table.insert(torch.from_numpy(part.ids[is_own] | high), rows)
