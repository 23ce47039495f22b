"""Exchange Python objects over gloo, each with one collective where they are small."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

LENGTH_BYTES = 8
FIRST_BYTES = 256
"""What each rank gives to the first gather: the length of its pickled object, and the object's first bytes."""


def gather_objects(given: Any, world_size: int, group: Any) -> list[Any]:
    """Return the objects that all ranks give, in rank order. All ranks.

    Most of them fit into one gather of fixed size. For larger ones a second gather has the other bytes, padded to the
    largest. ``torch.distributed.all_gather_object`` takes two gathers always, the lengths first.

    Raises:
        RuntimeError: from gloo, if a rank is gone.
    """
    pickled = np.frombuffer(pickle.dumps(given), np.uint8)
    told = np.concatenate([np.array([pickled.size], np.int64).view(np.uint8), pickled])
    first = _gather(told[:FIRST_BYTES], FIRST_BYTES, world_size, group)
    ends = first[:, :LENGTH_BYTES].copy().view(np.int64)[:, 0] + LENGTH_BYTES
    rest_bytes = int(ends.max()) - FIRST_BYTES
    if rest_bytes <= 0:
        return [_read(row[LENGTH_BYTES:end]) for row, end in zip(first, ends, strict=True)]
    rest = _gather(told[FIRST_BYTES:], rest_bytes, world_size, group)
    return [
        _read(np.concatenate([row[LENGTH_BYTES:end], further[: max(0, end - FIRST_BYTES)]]))
        for row, further, end in zip(first, rest, ends, strict=True)
    ]


def broadcast_bytes(data: bytes | None, num_bytes: int, group: Any) -> bytes:
    """Return ``data`` of rank 0 on every rank; all know that it is ``num_bytes`` long. All ranks; raises as above."""
    import torch
    import torch.distributed as dist

    held = np.empty(num_bytes, np.uint8) if data is None else np.frombuffer(bytearray(data), np.uint8)
    dist.broadcast(torch.from_numpy(held), src=0, group=group)
    return held.tobytes()


def _gather(data: np.ndarray, num_bytes: int, world_size: int, group: Any) -> np.ndarray:
    """Return ``data`` of all ranks as uint8 [world_size, num_bytes]; shorter ones end with zeros. All ranks."""
    import torch
    import torch.distributed as dist

    own = np.zeros(num_bytes, np.uint8)
    own[: data.size] = data
    gathered = np.empty((world_size, num_bytes), np.uint8)  # numpy's, because torch's default device may be a GPU
    dist.all_gather(list(torch.from_numpy(gathered).unbind(0)), torch.from_numpy(own), group=group)
    return gathered


def _read(pickled: np.ndarray) -> Any:
    return pickle.loads(pickled.data)  # noqa: S301 -- it comes from a rank of this job, like all exchanged data
