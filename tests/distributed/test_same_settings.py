"""Ranks that were started with different settings, as two machines with two commands are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_export.errors import DistExportError
from tests.support import exports, tiny_model
from tests.support.distributed.ranks import run_ranks
from tests.support.recis_writer import make_tables, write_checkpoint

pytestmark = pytest.mark.distributed


def export_all(rank: int, rounds: list[list[dict[str, Any]]]) -> list[tuple[int, str]]:
    """Export with each round's settings of this rank; return exit codes and what was said."""
    outcomes = []
    for settings in rounds:
        try:
            exports.export(settings[rank])
        except DistExportError as error:
            outcomes.append((error.exit_code, str(error)))
        else:
            outcomes.append((0, ""))
    return outcomes


def test_the_setting_that_differs_is_named_with_its_values_and_ranks(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", make_tables({"t": 50}, 2))
    base = {"ckpt_dir": str(source), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True, "num_shards": 2}
    other = {**base, "export_dir": str(tmp_path / "other"), "num_shards": 3}
    own = [
        {**base, "timeout": 60 + rank, "storage_options": {"auto_mkdir": bool(rank)}, "dataset_args": {"rank": rank}}
        for rank in range(3)
    ]
    model = {"model": tiny_model.MODEL, "dataset": tiny_model.DATASET}
    live = {**base, **model, "ckpt_dir": None, "format": "live"}
    rounds = [
        [base, {**base, "num_shards": 3}, base],
        [base, other, other],
        [{**base, "dtype": {"a*": "int8", "*": "float16"}}, base, {**base, "dtype": {"*": "float16", "a*": "int8"}}],
        [{**base, **model}, live, live],
        [base, {**base, "threads": 3}, {**base, "max_memory": "1GiB"}],
        own,
    ]
    told = run_ranks(export_all, 3, tmp_path / "store", rounds)
    assert told[0] == told[1] == told[2], "every rank ends alike"
    shards, places, order, sources, limits, machines = told[0]
    assert limits[0] == 2, "those of rank 0 would be all ranks', and the others' passed over in silence"
    assert "max_memory is " in limits[1]
    assert "threads is null (rank 0, 2), 3 (rank 1)" in limits[1]
    assert sources[0] == 2
    assert 'format is "auto" (rank 0), "live" (rank 1, 2)' in sources[1]
    assert shards[0] == 2
    assert shards[1] == (
        "the ranks were started with different settings: num_shards is 2 (rank 0, 2), 3 (rank 1). Nothing was written. Start "
        "every machine with the same config and the same options"
    )
    assert places[0] == 2
    assert f'export_dir is "{tmp_path / "out"}"'[:50] in places[1]
    assert "; num_shards is 2 (rank 0), 3 (rank 1, 2)." in places[1]
    assert order[0] == 2, "the order of patterns counts"
    assert "dtype is " in order[1]
    assert machines == (0, "")
    assert not (tmp_path / "other").exists()
