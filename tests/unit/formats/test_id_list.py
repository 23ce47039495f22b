"""Lists of ids: what is in them is found, and the sieve lets few others pass."""

from __future__ import annotations

import numpy as np
import pytest

from dist_export.formats.id_list import IdSieve


@pytest.mark.parametrize("num_ids", [0, 1, 7, 1_000])
@pytest.mark.parametrize("is_sequence", [True, False])
def test_all_ids_of_a_sieve_pass_and_at_most_one_in_16_others(num_ids: int, is_sequence: bool) -> None:
    random = np.random.default_rng(num_ids)
    ids = np.arange(num_ids) if is_sequence else random.integers(-(1 << 63), (1 << 63) - 1, num_ids, np.int64)
    others = np.arange(num_ids, num_ids + 20_000) if is_sequence else random.integers(-(1 << 63), 0, 20_000, np.int64)
    sieve = IdSieve(num_ids, spread=4)
    sieve.add(ids)
    assert sieve.passes(ids).all()
    assert sieve.passes(others).mean() < 1.2 / 16
