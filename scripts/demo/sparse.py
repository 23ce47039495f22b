"""Hash tables sharded over the ranks: an all-to-all lookup, and Adam on the rows that a step touched."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

SLICE_SIZE = 65536
CHILD_SHIFT = 52
ID_MASK = (1 << CHILD_SHIFT) - 1
EXP_AVG, EXP_AVG_SQ = "sparse_adam_exp_avg", "sparse_adam_exp_avg_sq"


def gen_slice(index: int, num: int, size: int = SLICE_SIZE) -> tuple[int, int]:
    """Return the range of ``uint64(id) mod size`` that shard ``index`` of ``num`` owns."""
    quotient, rest = divmod(size, num)
    begin = index * quotient + min(index, rest)
    return begin, begin + quotient + (index < rest)


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class HashTable(nn.Module):
    """This rank's rows of a table: an id -> row map that grows in training, and the slots of each row.

    A coalesced table holds several tables of one width, its children: child ``c`` has the ids
    ``(c << 52) | (id & (2**52 - 1))``. ``ids()`` and ``insert()`` speak these ids, ``snapshot()`` the children's own.
    """

    def __init__(self, name: str, dim: int, children: Sequence[str] = ()) -> None:
        super().__init__()
        self._name = name
        self._children = list(children) or [name]
        self._row_of: dict[int, int] = {}  # in order of insertion, which is the order of the rows
        self._slots = {slot: torch.zeros(0, dim) for slot in ("embedding", EXP_AVG, EXP_AVG_SQ)}
        self._lookups: list[tuple[Tensor, Tensor]] = []  # (rows, what forward returned for them) since the last step

    @property
    def name(self) -> str:
        return self._name

    @property
    def coalesce(self) -> bool:
        return len(self._children) > 1

    @property
    def children_hashtable(self) -> list[str]:
        return self._children

    def ids(self) -> Tensor:
        return torch.tensor(list(self._row_of), dtype=torch.int64)

    def embeddings(self) -> Tensor:
        return self.slot("embedding")

    def slot(self, name: str) -> Tensor:
        """Return a view of the slot's rows, in the order of ``ids()``."""
        return self._slots[name][: len(self._row_of)]

    def insert(self, ids: Tensor, embeddings: Tensor) -> None:
        """Set the rows of ``ids`` (n,) to ``embeddings`` (n, dim); ids not seen before get a row."""
        ids_list = ids.tolist()
        for id_ in ids_list:
            self._row_of.setdefault(id_, len(self._row_of))
        self._reserve(len(self._row_of))
        rows = torch.tensor([self._row_of[id_] for id_ in ids_list], dtype=torch.int64)
        self._slots["embedding"][rows] = embeddings

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ``ids`` (n,). A new id gets a random row in training, and zeros but no row otherwise."""
        rows = self._find_rows(ids)
        is_new = rows < 0
        if not self.training:
            found = torch.zeros(len(ids), self._dim)
            found[~is_new] = self._slots["embedding"][rows[~is_new]]
            return found
        if is_new.any():
            new_ids = ids[is_new].unique()
            self.insert(new_ids, torch.randn(len(new_ids), self._dim) * 0.05)
            rows = self._find_rows(ids)
        found = self._slots["embedding"][rows].requires_grad_()
        self._lookups.append((rows, found))
        return found

    def pop_gradients(self) -> tuple[Tensor, Tensor]:
        """Return the rows touched since the last call, each once, and the sum of the gradients of each."""
        rows = torch.cat([rows for rows, _ in self._lookups])
        grads = torch.cat([found.grad for _, found in self._lookups if found.grad is not None])
        self._lookups.clear()
        rows, inverse = rows.unique(return_inverse=True)
        return rows, grads.new_zeros(len(rows), self._dim).index_add_(0, inverse, grads)

    def snapshot(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield each child's name and its slots, ``id`` first, as a checkpoint stores them."""
        ids = self.ids()
        if not self.coalesce:
            yield self._name, {"id": ids} | {slot: self.slot(slot) for slot in self._slots}
            return
        for child, name in enumerate(self._children):
            mine = (ids >> CHILD_SHIFT) == child
            yield name, {"id": ids[mine] & ID_MASK} | {slot: self.slot(slot)[mine] for slot in self._slots}

    @property
    def _dim(self) -> int:
        return self._slots["embedding"].shape[1]

    def _find_rows(self, ids: Tensor) -> Tensor:
        return torch.tensor([self._row_of.get(id_, -1) for id_ in ids.tolist()], dtype=torch.int64)

    def _reserve(self, num_rows: int) -> None:
        for slot, old in self._slots.items():
            if num_rows > len(old):
                new = old.new_zeros(max(num_rows, 2 * len(old)), self._dim)
                new[: len(old)] = old
                self._slots[slot] = new


class ExchangeRows(torch.autograd.Function):
    """All-to-all of rows; their gradients go back the way the rows came."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, num_sent: list[int], num_received: list[int]) -> Tensor:
        ctx.counts = num_sent, num_received
        return exchange(rows, num_sent, num_received)

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor, None, None]:
        num_sent, num_received = ctx.counts
        return exchange(grads, num_received, num_sent), None, None


def exchange(rows: Tensor, num_sent: list[int], num_received: list[int]) -> Tensor:
    """Send the next ``num_sent[r]`` rows to rank r, for each r, and return what all ranks sent here, in rank order."""
    received = rows.new_empty(sum(num_received), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), num_received, num_sent)
    return received


class ShardedTable(nn.Module):
    """A table whose rows lie on all ranks, each on the one whose slice its id falls in. Its forward is a collective."""

    def __init__(self, name: str, dim: int, children: Sequence[str] = ()) -> None:
        super().__init__()
        self.table = HashTable(name, dim, children)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows (n, dim) of ``ids`` (n,). Every rank calls this, if only with no ids."""
        unique, inverse = ids.unique(return_inverse=True)
        world_size = get_world_size()
        if world_size == 1:
            rows: Tensor = self.table(unique)
            return rows[inverse]

        ends = torch.tensor([gen_slice(rank, world_size)[1] for rank in range(world_size)])
        owner = torch.bucketize(unique & (SLICE_SIZE - 1), ends, right=True)
        order = owner.argsort(stable=True)
        counts = owner.bincount(minlength=world_size)
        counts_back = torch.empty_like(counts)
        dist.all_to_all_single(counts_back, counts)
        num_asked, num_served = counts.tolist(), counts_back.tolist()

        served = self.table(exchange(unique[order], num_asked, num_served))
        answers: Tensor = ExchangeRows.apply(served, num_served, num_asked)  # type: ignore[no-untyped-call]
        return answers[order.argsort()][inverse]


class SparseAdam:
    """Adam on the rows that a step touched, with its moments in the tables' slots."""

    def __init__(self, tables: Iterable[HashTable], *, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.tables = list(tables)
        self.lr = lr
        self.betas = betas
        self.num_steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.num_steps += 1
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**self.num_steps, 1 - beta2**self.num_steps
        for table in self.tables:
            rows, grads = table.pop_gradients()
            grads /= get_world_size()  # each rank's loss is the mean over its own batch
            exp_avg = table.slot(EXP_AVG)[rows].lerp(grads, 1 - beta1)
            exp_avg_sq = table.slot(EXP_AVG_SQ)[rows].lerp(grads * grads, 1 - beta2)
            table.slot(EXP_AVG)[rows] = exp_avg
            table.slot(EXP_AVG_SQ)[rows] = exp_avg_sq
            denominator = exp_avg_sq.sqrt() / math.sqrt(correction2) + 1e-8
            table.slot("embedding")[rows] -= self.lr / correction1 * exp_avg / denominator

    def dense_state(self) -> dict[str, Tensor]:
        """Return what RecIS's SparseAdam keeps beside the slots: the running products of the betas, and a step of 0."""
        return {
            "sparse_adam_beta2": torch.tensor([self.betas[1] ** self.num_steps], dtype=torch.float64),
            "sparse_adam_beta1": torch.tensor([self.betas[0] ** self.num_steps], dtype=torch.float64),
            "sparse_adam_step": torch.zeros(1, dtype=torch.int64),
        }
