"""Whether all ranks hold the same dense arch, where it is exported from memory: rank 0's is what leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import xxhash
from torch import nn

from dist_export.errors import ModelError
from dist_export.humanize import few
from dist_export.model.unwrap import is_lazy
from dist_export.runtime.io_activity import ACTIVITY
from dist_export.runtime.ranks import Ranks


def compare_replicas(ranks: Ranks, copied: nn.Module) -> list[str]:
    """Compare the dense arch of all ranks, bit for bit. All ranks.

    What travels is one digest a rank; only where these differ, one for each tensor.

    Args:
        copied: this rank's plain copy, whose sharded parameters are whole.

    Returns notes: buffers may differ, as the running statistics of a batch norm do, which DDP takes from rank 0.

    Raises:
        ModelError: on all ranks, for parameters that differ; it names them and the ranks.
    """
    if ranks.world_size == 1:
        return []
    found = ranks.check("read the dense parameters", lambda: _Digests(copied))
    totals = ranks.all_gather("compare the dense parameters", lambda: found.total)
    if len(set(totals)) == 1:
        return []
    first = next(rank for rank, total in enumerate(totals) if total != totals[0])
    # of two ranks alone: what is wrong on others is wrong in the same way
    told = ranks.all_gather("tell the dense parameters", lambda: found if ranks.rank in (0, first) else None)
    mine, theirs = told[0], told[first]
    assert mine is not None
    assert theirs is not None
    ranks.check("compare the dense parameters by name", lambda: _refuse(mine.parameters, theirs.parameters, first))
    names = _differing(mine.buffers, theirs.buffers)
    return [f"the dense arch's {few(names)} differs between ranks 0 and {first}; a buffer is exported as rank 0 has it"]


class _Digests:
    """Digests of a module's tensors by name."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = _hash_all(module.named_parameters())
        self.buffers = _hash_all(module.named_buffers())
        self.total = xxhash.xxh3_128_hexdigest(repr((self.parameters, self.buffers)).encode())


def _hash_all(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    return {name: _hash(tensor) for name, tensor in named if not is_lazy(tensor)}


def _hash(tensor: torch.Tensor) -> str:
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    raw = values.reshape(-1).view(torch.uint8).numpy().data
    ACTIVITY.done += 1  # so that the watchdog sees a large arch get on
    return f"{values.dtype} {list(values.shape)} {xxhash.xxh3_128_hexdigest(raw)}"


def _differing(mine: Mapping[str, str], theirs: Mapping[str, str]) -> Sequence[str]:
    return [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]


def _refuse(mine: Mapping[str, str], theirs: Mapping[str, str], rank: int) -> None:
    if names := _differing(mine, theirs):
        raise ModelError(
            f"the dense arch's {few(list(names))} {'differ' if len(names) > 1 else 'differs'} between ranks 0 and {rank}, so "
            "training has not kept the replicas in step, and nothing tells which one is right. Nothing was written. Broadcast "
            "the right one to all ranks, or export a checkpoint of one rank"
        )
