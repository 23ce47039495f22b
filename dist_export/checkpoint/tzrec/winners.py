"""Of the rows that dumps have of one key, the last step's counts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Keyed(NamedTuple):
    """The rows of one table in one file, without their values."""

    step: int
    keys: np.ndarray
    """int64."""
    fingerprints: np.ndarray
    """uint64."""


class Conflict(Exception):  # noqa: N818 -- whoever knows the files makes an error of it
    """Two rows of one key and step that differ."""

    def __init__(self, key: int, step: int, files: tuple[int, int]) -> None:
        """``files`` are places in the sequence of files."""
        super().__init__(key)
        self.key = key
        self.step = step
        self.files = files


def choose_rows(files: Sequence[Keyed]) -> list[np.ndarray]:
    """Return the rows that count of each file (int64, sorted): each key once, by its last step.

    Several ranks of one step may have a key, if their rows are equal: then one of these counts.

    Raises:
        Conflict: they differ.
    """
    if not files:
        return []
    lengths = [len(file.keys) for file in files]
    keys = np.concatenate([file.keys for file in files])
    steps = np.repeat([file.step for file in files], lengths)
    order = np.lexsort((steps, keys))  # stable: by key, then by step, then in the order of the files
    keys, steps = keys[order], steps[order]
    fingerprints = np.concatenate([file.fingerprints for file in files])[order]
    is_same_key = keys[1:] == keys[:-1]
    is_conflict = is_same_key & (steps[1:] == steps[:-1]) & (fingerprints[1:] != fingerprints[:-1])
    begins = np.concatenate([[0], np.cumsum(lengths)])
    if is_conflict.any():
        place = int(np.flatnonzero(is_conflict)[0])
        its = np.searchsorted(begins, order[place : place + 2], side="right") - 1
        raise Conflict(int(keys[place]), int(steps[place]), (int(its[0]), int(its[1])))
    chosen = np.sort(order[np.append(~is_same_key, True)]) if len(keys) else order
    edges = np.searchsorted(chosen, begins)
    return [chosen[first:last] - begin for first, last, begin in zip(edges[:-1], edges[1:], begins[:-1], strict=True)]
