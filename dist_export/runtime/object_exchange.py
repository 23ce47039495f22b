"""Python objects as bytes of equal length, so that small ones of all ranks need one gather."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np  # the help of the command does not need it

LENGTH_BYTES = 8
FIRST_BYTES = 256
"""What each rank gives to the first gather: the length of its pickled object, and the object's first bytes."""


def gather_objects(given: Any, gather: Callable[[np.ndarray], np.ndarray]) -> list[Any]:
    """Return the objects that all ranks give, in rank order. All ranks.

    Most of them fit into one gather of fixed size. For larger ones a second gather has the other bytes, padded to the
    largest. ``torch.distributed.all_gather_object`` takes two gathers always, the lengths first.

    Args:
        given: what this rank gives.
        gather: returns the bytes of all ranks (uint8, [ranks, length]); the length is the same on all.
    """
    import numpy as np

    pickled = np.frombuffer(pickle.dumps(given), np.uint8)
    told = np.concatenate([np.array([pickled.size], np.int64).view(np.uint8), pickled])
    first = gather(_padded(told[:FIRST_BYTES], FIRST_BYTES))
    ends = first[:, :LENGTH_BYTES].copy().view(np.int64)[:, 0] + LENGTH_BYTES
    rest_bytes = int(ends.max()) - FIRST_BYTES
    if rest_bytes > 0:
        first = np.concatenate([first, gather(_padded(told[FIRST_BYTES:], rest_bytes))], axis=1)
    return [pickle.loads(row[LENGTH_BYTES:end].data) for row, end in zip(first, ends, strict=True)]  # noqa: S301 -- of this job


def _padded(data: np.ndarray, num_bytes: int) -> np.ndarray:
    import numpy as np

    return np.pad(data, (0, num_bytes - data.size))
