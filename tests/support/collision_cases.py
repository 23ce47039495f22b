"""Managed-collision tables as torchrec saves them, from the description of their buffers alone, and modules that look so."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

EMPTY = (1 << 63) - 1
ROOT = "sparse_arch.mc."
MODULES = f"{ROOT}_managed_collision_collection._managed_collision_modules."


def weight_of(table: str) -> str:
    """Return the name of a table's weight."""
    return f"{ROOT}_embedding_module.embedding_bags.{table}.weight"


def make_mch(shards: list[tuple[int, list[int]]], *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sorted raw ids and mapping of shards of (rows, ids): each sorted, its rows dealt out anyhow, its last row kept."""
    generator = torch.Generator().manual_seed(seed)
    raw, mapping, begin = [], [], 0
    for rows, ids in shards:
        its = torch.full((rows,), EMPTY)
        its[: len(ids)] = torch.tensor(sorted(ids))
        raw.append(its)
        mapping.append(torch.cat([torch.randperm(rows - 1, generator=generator), torch.tensor([rows - 1])]) + begin)
        begin += rows
    return torch.cat(raw), torch.cat(mapping)


def make_state(
    shards: list[tuple[int, list[int]]], *, table: str = "t", dim: int = 4, seed: int = 0, dtype: Any = torch.float32
) -> dict[str, torch.Tensor]:
    """Return the state of one MCH table; the last rows of all shards are the same."""
    raw, mapping = make_mch(shards, seed=seed)
    weight = torch.randn(len(raw), dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    ends = np.cumsum([rows for rows, _ in shards])
    for end in ends:
        weight[end - 1] = weight[ends[0] - 1]
    name = f"{MODULES}{table}"
    return {
        weight_of(table): weight,
        f"{name}._mch_sorted_raw_ids": raw,
        f"{name}._mch_remapped_ids_mapping": mapping,
        f"{name}._mch_counts": torch.arange(len(raw)),
        f"{name}._output_segments_tensor": torch.tensor([0, *ends.tolist()] + [-1] * (1024 - len(ends))),
    }


def make_zch_state(
    ids: list[int], *, table: str = "z", dim: int = 4, seed: int = 0, is_flat: bool = False
) -> dict[str, torch.Tensor]:
    """Return the state of one HashZCH table; -1 in ``ids`` is no id."""
    identities = torch.tensor(ids).reshape(-1) if is_flat else torch.tensor(ids).reshape(-1, 1)
    return {
        weight_of(table): torch.randn(len(ids), dim, generator=torch.Generator().manual_seed(seed)),
        f"{MODULES}{table}._hash_zch_identities": identities,
        f"{MODULES}{table}._hash_zch_metadata": torch.zeros(len(ids), 1, dtype=torch.int32),
    }


def rows_of(state: dict[str, torch.Tensor], table: str = "t") -> dict[int, np.ndarray]:
    """Return raw id -> row, by the definition of the two buffers."""
    name, weight = f"{MODULES}{table}", state[weight_of(table)].float().numpy()
    if f"{name}._hash_zch_identities" in state:
        identities = state[f"{name}._hash_zch_identities"].reshape(-1).tolist()
        return {number: weight[row] for row, number in enumerate(identities) if number != -1}
    pairs = zip(
        state[f"{name}._mch_sorted_raw_ids"].tolist(), state[f"{name}._mch_remapped_ids_mapping"].tolist(), strict=True
    )
    return {number: weight[row] for number, row in pairs if number != EMPTY}


class Mch(nn.Module):
    """Maps raw ids to rows as torchrec's MCH does in eval, from the description of its buffers."""

    _mch_sorted_raw_ids: torch.Tensor
    _mch_remapped_ids_mapping: torch.Tensor

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._input_hash_func: Any = None
        self.register_buffer("_mch_sorted_raw_ids", torch.full((rows,), EMPTY))
        self.register_buffer("_mch_remapped_ids_mapping", torch.arange(rows))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self._input_hash_func is not None:
            ids = self._input_hash_func(ids)
        place = torch.searchsorted(self._mch_sorted_raw_ids[:-1].contiguous(), ids)
        is_known = self._mch_sorted_raw_ids[place] == ids
        return torch.where(is_known, self._mch_remapped_ids_mapping[place], len(self._mch_sorted_raw_ids) - 1)


class Zch(nn.Module):
    """Maps raw ids to slots; one that it does not know falls back to a slot, whosever it is."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._hash_zch_identities = nn.Parameter(torch.full((rows, 1), -1), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        is_own = self._hash_zch_identities.reshape(1, -1) == ids.reshape(-1, 1)
        return torch.where(is_own.any(1), is_own.int().argmax(1), ids % len(self._hash_zch_identities))


class _Module(nn.Module):
    """Holds children under names with an underscore, as torchrec's modules do."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class SparseArch(nn.Module):
    def __init__(self, sizes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self._names = list(sizes)
        bags = nn.ModuleDict({name: nn.EmbeddingBag(*size, mode="sum") for name, size in sizes.items()})
        kinds = nn.ModuleDict({name: (Zch if name == "z" else Mch)(rows) for name, (rows, _) in sizes.items()})
        self.mc = _Module(
            _embedding_module=_Module(embedding_bags=bags),
            _managed_collision_collection=_Module(_managed_collision_modules=kinds),
        )

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bags: Any = self.mc.get_submodule("_embedding_module").embedding_bags
        modules: Any = self.mc.get_submodule("_managed_collision_collection")._managed_collision_modules
        return {name: bags[name](modules[name](batch[name]).reshape(-1, 1)) for name in self._names}


class DenseArch(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
        scores: torch.Tensor = self.linear(torch.cat(list(blocks.values()), dim=1))
        return scores


class Model(nn.Module):
    def __init__(self, sizes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.sparse_arch = SparseArch(sizes)
        self.dense_arch = DenseArch(sum(dim for _, dim in sizes.values()))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        scores: torch.Tensor = self.dense_arch(self.sparse_arch(batch))
        return scores
