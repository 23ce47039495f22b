"""The demo's feature generator: raw examples become the ids and numbers that training and serving both start from."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

PAD = 0
"""Fills up a bag of ids; no feature hashes to it."""

COALESCED_FEATURES = frozenset({"age", "occupation", "gender"})
"""Their tables share one hash table in training, which leaves 52 bits for the id."""


@cache
def hash_id(feature: str, value: str) -> int:
    """Return the id of a raw value: a signed 64-bit hash, or its low 52 bits where the feature's table is coalesced."""
    digest = hashlib.blake2b(f"{feature}={value}".encode(), digest_size=8).digest()
    hashed = int.from_bytes(digest, "little", signed=True)
    return hashed & ((1 << 52) - 1) if feature in COALESCED_FEATURES else hashed


def generate_features(fg: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return feature name -> array of the features that ``fg`` (the content of fg.json) lists.

    A lookup feature becomes ids (B, L) int64, padded with ``PAD`` to the longest bag; a raw one numbers (B, 1) float32.
    """
    arrays = {}
    for entry in fg["features"]:
        name = entry["feature_name"]
        values = [example[name] for example in examples]
        if entry["gen_val_type"] == "lookup":
            arrays[name] = _hash_bags(name, [value if isinstance(value, list) else [value] for value in values])
        else:
            arrays[name] = np.array(values, np.float32).reshape(-1, 1)
    return arrays


def _hash_bags(feature: str, bags: list[list[str]]) -> np.ndarray:
    ids = np.full((len(bags), max(map(len, bags))), PAD, np.int64)
    for row, bag in zip(ids, bags, strict=True):
        row[: len(bag)] = [hash_id(feature, value) for value in bag]
    return ids
