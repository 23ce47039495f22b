"""Checkpoints as TorchEasyRec leaves them: ``model/`` and ``optimizer/`` of DCP, and a DynamicEmb dump beside them.

From the description of the formats alone. ``truth`` says what a package of all tables must hold.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from tests.support.dcp_writer import Chunks, write_chunks
from tests.support.dynamicemb_writer import Rows, make_table, write_dump

PATH = "model.embedding_group.emb_impls.__BASE__"
"""Of the modules that hold the embedding collections."""
CITY = f"{PATH}.ebc.embedding_bags.city.weight"
SHOP = f"{PATH}.ec_dict.16.embeddings.shop.weight"
USER = f"{PATH}.ebc.embedding_bags.user.weight"
ITEM = f"{PATH}.ec_dict.16.embeddings.item.weight"
MLP = "model.mlp.0.weight"
EBC, EC = f"model.{PATH}.ebc", f"model.{PATH}.ec_dict.16"
"""What the dump calls the two collections."""
WORLD_SIZE = 3
DUMPED: dict[str, dict[str, np.ndarray]] = {
    "user": make_table([0, -1, 1 << 62, -(1 << 63), *range(5, 2_000, 7)], 8, seed=1),
    "item": make_table(list(range(100, 151)), 16, seed=2),
}


def make_city() -> tuple[torch.Tensor, torch.Tensor]:
    """A table that is shared out by rows, and its row-wise optimizer state."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(103, 4, generator=generator), torch.rand(103, generator=generator)


def make_shop() -> torch.Tensor:
    """A table that is shared out by columns."""
    return torch.randn(41, 16, generator=torch.Generator().manual_seed(4))


def by_rows(tensor: torch.Tensor, count: int = WORLD_SIZE) -> tuple[torch.Tensor, Chunks]:
    pieces = tensor.tensor_split(count)
    begins = np.cumsum([0, *(len(piece) for piece in pieces)]).tolist()
    tail = (0,) * (tensor.dim() - 1)
    return tensor, [((begin, *tail), piece) for begin, piece in zip(begins, pieces, strict=False)]


def by_columns(tensor: torch.Tensor, count: int = 2) -> tuple[torch.Tensor, Chunks]:
    pieces = tensor.tensor_split(count, dim=1)
    begins = np.cumsum([0, *(piece.shape[1] for piece in pieces)]).tolist()
    return tensor, [((0, begin), piece) for begin, piece in zip(begins, pieces, strict=False)]


def stand_in(world_size: int = WORLD_SIZE) -> tuple[torch.Tensor, Chunks]:
    """What dynamicemb puts into the state_dict for a table of its own: a value for each rank, which means nothing."""
    return by_rows(torch.full((world_size, 1), 7.0), world_size)


def write_easyrec(folder: Path, **changes: Any) -> Path:
    """Write the checkpoint. ``changes``: tensors of the model by name, each with its chunks; None takes one out."""
    city, momentum = make_city()
    model = {CITY: by_rows(city), SHOP: by_columns(make_shop()), USER: stand_in(), ITEM: stand_in()}
    model[MLP] = by_rows(torch.ones(3, 12), 1)
    model = {name: its for name, its in {**model, **changes}.items() if its is not None}
    write_chunks(folder / "model", model, num_files=WORLD_SIZE)
    write_chunks(folder / "optimizer", {f"state.{CITY}.city.momentum1": by_rows(momentum)}, num_files=2)
    write_dynamic(folder, DUMPED)
    (folder / "plan").write_text(json.dumps({"a": 1}))
    return folder


def write_dynamic(folder: Path, tables: dict[str, Any], world_size: int = WORLD_SIZE) -> None:
    """Write the dump of tables called ``user`` and ``item``."""
    for name, rows in tables.items():
        write_dump(folder / "dynamicemb" / (EBC if name == "user" else EC), name, rows, world_size)


def truth(**dumped: Rows) -> dict[str, dict[str, np.ndarray]]:
    """Return table and slot -> rows, of all that an export keeps by itself; hash tables sorted by id."""
    found = {CITY: {"embedding": make_city()[0].numpy()}, SHOP: {"embedding": make_shop().numpy()}}
    for name, rows in {**DUMPED, **dumped}.items():
        order = np.argsort(rows["keys"])
        found[name] = {"id": rows["keys"][order], "embedding": rows["values"][order], "score": rows["scores"][order]}
    return found


def read_package(package: Path) -> dict[str, dict[str, np.ndarray]]:
    """Return table and slot -> rows by manifest and shards alone: tables by number in order, others sorted by id."""
    manifest = json.loads((package / "manifest.json").read_text())
    found: dict[str, dict[str, np.ndarray]] = {}
    for table in manifest["tables"]:
        columns: dict[str, list[np.ndarray]] = {}
        for part in table["parts"]:
            with safe_open(package / part["file"], "pt") as file:
                for slot, key in part["keys"].items():
                    tensor = file.get_tensor(key)
                    assert len(tensor) == part["rows"]
                    columns.setdefault(slot, []).append(tensor.numpy())
        rows = {slot: np.concatenate(pieces) for slot, pieces in columns.items()}
        if "id" in rows:
            assert len(np.unique(rows["id"])) == len(rows["id"]) == table["rows_out"]
            order = np.argsort(rows["id"])
            rows = {slot: column[order] for slot, column in rows.items()}
        found[table["name"]] = rows
    return found


def assert_same(found: dict[str, dict[str, np.ndarray]], expected: dict[str, dict[str, np.ndarray]]) -> None:
    """Compare all tables, slots and rows, bit for bit."""
    assert sorted(found) == sorted(expected)
    for table, rows in expected.items():
        assert sorted(found[table]) == sorted(rows), table
        for slot, column in rows.items():
            got = found[table][slot]
            assert (got.dtype, got.shape) == (column.dtype, column.shape), (table, slot)
            assert got.tobytes() == np.ascontiguousarray(column).tobytes(), (table, slot)
