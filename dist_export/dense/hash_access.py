"""Insert rows into a hash table of a model, and tell what its ``forward`` makes of them.

Its surface is ``ids()``, ``insert(ids, embeddings)`` and ``forward(ids)``. What ``forward`` gives need not be the row: it may
scale or pool rows, or keep what it gave before. Then a row that it gave is none that may be put back.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_export.dense.feeds import other_rows

_RUN_IDS = 1 << 20
_ROUNDING = 2.0**-7
"""How far, of its size, a value may be from what was inserted: a table may hold rows in bfloat16."""


@dataclass(slots=True)
class Learned:
    """What the runs of one export have learned of a hash table."""

    is_known: bool = False
    """Whether the following was looked at."""
    is_more_than_lookup: bool = False
    """Whether ``forward`` gives other rows than were inserted."""
    computes: bool = False
    """Whether ``forward`` was seen to give other values than those rows."""
    inserted: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Ids (int64, sorted) that the table did not have before."""


class HashAccess:
    """One hash table of a model. Any rank, for itself."""

    def __init__(self, module: nn.Module, lookup: Callable[..., Any], learned: Learned, *, max_bytes: int) -> None:
        """``lookup`` is the module's own ``forward``; a table of up to ``max_bytes`` may be copied."""
        self._module: Any = module
        self._lookup = lookup
        self._max_bytes = max_bytes
        self._own = dict(vars(module))
        """Its attributes before anything takes the place of its methods."""
        self.learned = learned
        self.keeps_rows = False
        """Whether ``forward`` gives the same rows whatever is inserted."""

    @property
    def device(self) -> torch.device:
        """Where the table takes ids and rows."""
        device: torch.device = self._module.ids().device
        return device

    def is_live(self, ids: torch.Tensor) -> torch.Tensor:
        """Return which of the ids (int64, (n,)) the table has: bool, (n,)."""
        found = torch.zeros_like(ids, dtype=torch.bool)
        for some in (
            self._module.ids().reshape(-1).split(_RUN_IDS)
        ):  # isin sorts what it is given, so never all of a table
            found |= torch.isin(ids, some)
        return found

    def has_own(self, ids: torch.Tensor) -> torch.Tensor:
        """Return which of the ids (int64, (n,)) the table had before the export: bool, (n,)."""
        mine = torch.from_numpy(np.isin(ids.cpu().numpy(), self.learned.inserted)).to(ids.device)
        return self.is_live(ids) & ~mine

    def insert(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Insert rows (n, ...)."""
        self._module.insert(ids, rows.to(self.device))

    def look_at(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
        """Look at what the table gives for rows that were just inserted; None where that is not a row for each id."""
        answer = _ask(self._lookup, ids)
        self.learned.is_known = True
        if answer is not None and (answer.shape[1:] != rows.shape[1:] or _is_near(answer, rows)):
            return answer
        self.learned.is_more_than_lookup = True
        if answer is not None:
            self.learned.computes = True
            others = other_rows(rows)
            self.insert(ids, others)
            again = _ask(self._lookup, ids)
            self.insert(ids, rows)
            is_changed = (others != rows).reshape(len(rows), -1).any(dim=1).to(answer.device)
            is_same = (answer == again).reshape(len(rows), -1).all(dim=1) if again is not None else ~is_changed
            self.keeps_rows |= bool((is_changed & is_same).any())
        return answer

    def ask(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Return what ``forward`` gives for ids (int64, (n,)), None where that is not a row for each."""
        return _ask(self._lookup, ids)

    def own_rows(self, ids: torch.Tensor, like: torch.Tensor) -> torch.Tensor | None:
        """Return the rows (n, ...) that the table holds for ids that it has, None where nothing tells them.

        ``like``: rows of the shape and dtype that are inserted.
        """
        impl = getattr(getattr(self._module, "_hashtable_impl", None), "embedding_lookup", None)
        if impl is not None:
            rows: torch.Tensor = impl(ids, True)[1].detach().clone()
            return rows
        if callable(getattr(self._module, "embeddings", None)):
            every, order = self._module.ids().reshape(-1).sort()
            whole = self._module.embeddings().detach()
            positions = order[torch.searchsorted(every, ids.to(every.dtype))]
            found: torch.Tensor = whole[positions.to(whole.device)].clone()
            return found
        if not self.learned.is_known:
            self._try_on_copy(ids, like)
        answer = None if self.learned.is_more_than_lookup else _ask(self._lookup, ids)
        return None if answer is None else answer.clone()

    def _try_on_copy(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Learn what ``forward`` does from a copy of the table, whose rows may be lost."""
        self.learned.is_more_than_lookup = True  # until shown otherwise
        if sum(tensor.numel() * tensor.element_size() for tensor in memory_of(self._module)) > self._max_bytes:
            return
        twin: Any = object.__new__(type(self._module))
        others = other_rows(rows)
        try:
            vars(twin).update(copy.deepcopy(self._own))
            twin.insert(ids, others.to(self.device))
            answer = _ask(twin.forward, ids)
        except Exception:  # noqa: BLE001 -- whatever it is, nothing is known of the table then, and its rows are left alone
            return
        self.learned.is_more_than_lookup = (
            answer is None or answer.shape != others.shape or not _is_near(answer, others)
        )


def memory_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors of floating-point numbers that a module holds, as far as Python shows them."""
    holders = [vars(module), module._parameters, module._buffers]  # noqa: SLF001 -- its memory
    for value in itertools.chain.from_iterable(holder.values() for holder in holders):
        inner = value.values() if type(value) is dict else value if type(value) in (list, tuple) else [value]
        yield from (item for item in inner if isinstance(item, torch.Tensor) and item.is_floating_point())


def _ask(lookup: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor | None:
    """Return what a table gives for ids (n,), None where it is not a row for each."""
    try:
        answer = lookup(ids)
    except Exception:  # noqa: BLE001 -- it may take bags of ids alone
        return None
    is_rows = isinstance(answer, torch.Tensor) and answer.dim() > 0 and len(answer) == len(ids)
    return answer.detach() if is_rows else None


def _is_near(answer: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether values differ by rounding alone; NaN equals NaN."""
    one, other = answer.cpu().double(), rows.cpu().double()
    return bool(torch.isclose(one, other, rtol=_ROUNDING, atol=0.0, equal_nan=True).all())
