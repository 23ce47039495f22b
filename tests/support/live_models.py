"""Tables in memory for the tests of live exports: RecIS's surface in several shapes, and a judge of numbered tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.support.recis_writer import PartSpec

CHILD_BITS = 52


class RecisSlice:
    """RecIS's Slice."""

    def __init__(self, begin: int, end: int, size: int) -> None:
        self.slice_begin, self.slice_end, self.slice_size = begin, end, size


class LiveTable(nn.Module):
    """A hash table that gives its own tensors; rows in the order in which they came."""

    def __init__(self, name: str, ids: Any, rows: Any, part: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self._name = name
        self._ids = torch.as_tensor(ids)
        self._rows = torch.as_tensor(rows)
        if part is not None:
            self.slice = RecisSlice(*part)

    def ids(self) -> torch.Tensor:
        return self._ids

    def embeddings(self) -> torch.Tensor:
        return self._rows

    def insert(self, ids: torch.Tensor, embeddings: torch.Tensor) -> None:
        place = {number: row for row, number in enumerate(self._ids.tolist())}
        for number, row in zip(ids.tolist(), embeddings, strict=True):
            self._rows[place[number]] = row  # KeyError: a live export must put no new row into a table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        place = {number: row for row, number in enumerate(self._ids.tolist())}
        zero = torch.zeros(self._rows.shape[1:], dtype=self._rows.dtype)
        found = [self._rows[place[number]] if number in place else zero for number in ids.reshape(-1).tolist()]
        return torch.stack(found).reshape(*ids.shape, *self._rows.shape[1:])


class RecisImpl:
    """What RecIS's module asks of its C++ table, as far as an export uses it."""

    def __init__(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        self._place = {number: row for row, number in enumerate(ids.tolist())}
        self._rows = rows
        self.largest = 0
        """The most rows that one lookup asked for."""

    def embedding_lookup(self, ids: torch.Tensor, readonly: bool) -> tuple[torch.Tensor, torch.Tensor]:
        assert readonly, "a lookup that may insert"
        self.largest = max(self.largest, len(ids))
        places = torch.tensor([self._place[number] for number in ids.tolist()])
        return places, self._rows[places]


class CoalescedTable(nn.Module):
    """Several tables in one, as RecIS coalesces them: the child's number stands in the upper bits of an id."""

    def __init__(self, children: dict[str, PartSpec], part: tuple[int, int, int]) -> None:
        super().__init__()
        self._name = "a coalesced group"
        self.children_hashtable = list(children)
        self.coalesce = True
        self._slice = part
        ids = [
            spec.ids & ((1 << CHILD_BITS) - 1) | (child << CHILD_BITS) for child, spec in enumerate(children.values())
        ]
        rows = [spec.slots["embedding"] for spec in children.values()]
        # the children's rows are mixed, each child's in their own order
        turn = np.argsort(np.concatenate([np.arange(len(some)) for some in ids]), kind="stable")
        self._ids = torch.from_numpy(np.concatenate(ids)[turn])
        self._hashtable_impl = RecisImpl(self._ids, torch.from_numpy(np.concatenate(rows)[turn]))

    def ids(self, child: str | None = None) -> torch.Tensor:
        return self._ids.clone()

    def embeddings(self, child: str | None = None) -> torch.Tensor:
        return self._hashtable_impl._rows.clone()


class Tables(nn.Module):
    """A model of tables alone: each an attribute of ``sparse_arch``."""

    def __init__(self, **tables: nn.Module) -> None:
        super().__init__()
        self.sparse_arch = nn.Module()
        for name, table in tables.items():
            setattr(self.sparse_arch, name, table)


def embedding(rows: torch.Tensor, kind: type[nn.Module] = nn.Embedding) -> Any:
    """Return a module with this weight."""
    return kind(*rows.shape, _weight=rows.clone())


def read_rows(directory: Path) -> dict[str, np.ndarray]:
    """Return the rows (as bytes, (n, row_bytes)) of all blocks whose rows go by number, put together by their keys alone."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    for path in sorted(directory.glob("model-*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for key, entry in json.loads(data[8 : 8 + length]).items():
            table, _, part = key.rpartition("/part_")
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            count = entry["shape"][0]
            rows = np.frombuffer(data[begin:end], np.uint8).reshape(count, (end - begin) // max(count, 1))
            parts.setdefault(table, {})[int(part.split("_")[0])] = rows
    return {
        table: np.concatenate([rows for _, rows in sorted(its.items()) if rows.size])
        for table, its in parts.items()
        if table.endswith(".weight")
    }


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """Return the rows of a tensor as ``read_rows`` does."""
    return tensor.detach().contiguous().view(torch.uint8).numpy().reshape(len(tensor), -1)
