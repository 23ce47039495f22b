"""What a model in memory holds besides its tables: named, as the tensors of a checkpoint are. Reads no values."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.model_weights import is_below, plain_name
from dist_export.checkpoint.payload import DENSE, OtherTensor, Payload, other_tensor
from dist_export.humanize import count, few
from dist_export.model.sparse_tables import keeps_tables
from dist_export.model.unwrap import is_lazy, unwrap


def list_others(model: nn.Module, tables: Collection[str], *, dense_model_name: str | None) -> list[OtherTensor]:
    """Return the parameters and persistent buffers of this rank's model that are in no table. Any rank, for itself.

    Args:
        model: the whole model, with whatever wraps it.
        tables: names of the tables of all ranks.
        dense_model_name: the path of the dense arch, whose tensors the program has; None where no program is exported.
    """
    taken = {id(tensor) for name, tensor in _tensors_of(model) if _is_taken(name, tables, dense_model_name)}
    found: dict[str, OtherTensor] = {}
    seen: set[int] = set()
    for name, tensor in _tensors_of(model):
        if id(tensor) in taken or id(tensor) in seen or _is_taken(name, tables, dense_model_name):
            continue
        seen.add(id(tensor))
        found[name] = other_tensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), DENSE)
    return list(found.values())


def add_others(checkpoint: Checkpoint, told: Sequence[Sequence[OtherTensor]]) -> Checkpoint:
    """Return the source with what all ranks tell of, and a note on it. Pure; the same on all ranks."""
    every = {other.name: other for its in reversed(told) for other in its}
    others = tuple(every[name] for name in sorted(every))
    payload = checkpoint.payload
    if not others or payload is None:
        return checkpoint
    note = (
        f"{count(len(others), 'tensor')} of the model ({few([other.name for other in others])}) in no shard: neither a table of "
        "the sparse arch nor within an exported dense arch; the account says whether a score program has them"
    )
    whole = Payload(
        tensors=payload.tensors + len(others),
        num_bytes=payload.num_bytes + sum(other.num_bytes for other in others),
        others=(*payload.others, *others),
        aliases=payload.aliases,
    )
    return replace(checkpoint, payload=whole, warnings=(*checkpoint.warnings, note))


def _is_taken(name: str, tables: Collection[str], dense_model_name: str | None) -> bool:
    is_table = name in tables or name.removesuffix(".weight") in tables
    return is_table or (dense_model_name is not None and is_below(name, plain_name(dense_model_name)))


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (plain name within the model, tensor) of parameters and persistent buffers, each under all of its names."""
    tables: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=False):
        place = plain_name(path)
        if keeps_tables(module):
            tables = (*tables, place)
        if unwrap(module) is not module or any(is_below(place, table) for table in tables):
            continue
        passing = module._non_persistent_buffers_set  # noqa: SLF001 -- what state_dict() passes over
        buffers = ((name, tensor) for name, tensor in module._buffers.items() if name not in passing)  # noqa: SLF001
        for name, tensor in (*module._parameters.items(), *buffers):  # noqa: SLF001 -- its own alone
            if isinstance(tensor, torch.Tensor) and not is_lazy(tensor):
                yield f"{place}.{name}".removeprefix("."), tensor
