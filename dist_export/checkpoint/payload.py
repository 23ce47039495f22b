"""All tensors of a source, in tables or not: what the account of an export is held against. Pure.

The totals come from headers and metadata as they are, before anything is told apart: a tensor that is lost on the way to tables,
program and what is left behind is missing in the account, and the export fails.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

DENSE = "dense"
STATE = "optimizer"

_BITS = re.compile(r"\d+")


class OtherTensor(NamedTuple):
    """A tensor in no table."""

    name: str
    dtype: str
    """Torch's name; empty where it is not known."""
    shape: tuple[int, ...]
    num_bytes: int
    kind: str
    """``dense``, ``optimizer``, or a phrase that says why it is neither."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """The tensors of one source. A tensor that lies in several pieces, or in a block for each part, counts once."""

    tensors: int
    num_bytes: int
    """As dtypes and shapes say: a tensor that shares its storage with another one counts under its own name."""
    others: tuple[OtherTensor, ...] = ()
    """Those that are in no table, nor among the dense tensors of shards."""
    aliases: tuple[tuple[str, str], ...] = ()
    """(name, tensor): names that tables and dense parameters have besides those of the source."""


def size_of(dtype: str, shape: Iterable[int]) -> int:
    """Return the bytes of a tensor of torch's dtype of this name: the first number in it is the bits of an element."""
    found = _BITS.search(dtype)
    itemsize = 1 if found is None else max(1, int(found[0]) // 8)
    return math.prod(shape) * itemsize


def other_tensor(name: str, dtype: str, shape: tuple[int, ...], kind: str) -> OtherTensor:
    """Return a tensor in no table, with its size."""
    return OtherTensor(name, dtype, shape, size_of(dtype, shape), kind)


def count_payload(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[int, int]:
    """Return how many tensors there are and their bytes, from (dtype, shape) of each."""
    sizes = [size_of(dtype, shape) for dtype, shape in tensors]
    return len(sizes), sum(sizes)


def join_payloads(first: Payload | None, second: Payload | None) -> Payload | None:
    """Return the payload of two sources in one; None where that of one is not known."""
    if first is None or second is None:
        return None
    return Payload(
        tensors=first.tensors + second.tensors,
        num_bytes=first.num_bytes + second.num_bytes,
        others=(*first.others, *second.others),
        aliases=(*first.aliases, *second.aliases),
    )
