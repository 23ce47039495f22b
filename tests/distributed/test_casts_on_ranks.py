"""Casts on several real ranks: the same bytes and the same manifest as on one, and one error for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dist_export
from dist_export.errors import DistExportError
from dist_export.formats.tuning import Tuning
from tests.support import exports
from tests.support.distributed.ranks import run_ranks
from tests.support.recis_writer import make_tables, write_checkpoint

pytestmark = pytest.mark.distributed

NUM_SHARDS = (1, 2, 3)
DTYPES = {"a": "float16", "b": "int8", "*": "bfloat16"}


def export_all(_: int, source: str, out: str) -> None:
    # every part has many blocks, and every table many units, which any rank may take
    tuning = Tuning(cast_values=64, unit_bytes=1 << 12)
    for num_shards in NUM_SHARDS:
        exports.export(settings(source, f"{out}/{num_shards}", num_shards), tuning=tuning)


def settings(source: str, target: str, num_shards: int) -> dict[str, Any]:
    return {
        "ckpt_dir": source,
        "export_dir": target,
        "filter_sparse_opt": True,
        "num_shards": num_shards,
        "threads": 2,
        "dtype": DTYPES,
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_and_errors_do_not_depend_on_the_number_of_ranks(tmp_path: Path, world_size: int) -> None:
    source = write_checkpoint(tmp_path / "in", make_tables({"a": 3000, "b": 500, "c": 50}, 4, dim=7))
    many = tmp_path / "many"
    run_ranks(export_all, world_size, tmp_path / "store", str(source), str(many), timeout=240)
    run_ranks(export_all, 1, tmp_path / "store1", str(source), str(tmp_path / "one"), timeout=240)
    paths = [path.relative_to(many) for path in many.rglob("*") if path.is_file()]
    assert len(paths) > 3 * 5
    for path in paths:
        found, expected = (folder / path for folder in (many, tmp_path / "one"))
        if path.name == "manifest.json":
            left, right = json.loads(found.read_bytes()), json.loads(expected.read_bytes())
            assert left["tables"] == right["tables"]
            assert left["digest"] == right["digest"]
        else:
            assert found.read_bytes() == expected.read_bytes(), path


def refuse(_: int, source: str, out: str) -> str:
    try:
        dist_export.export(settings(source, out, 2))
    except DistExportError as error:
        return f"{error.exit_code} {error}"
    return "exported"


def test_values_that_do_not_fit_are_everyones_error(tmp_path: Path) -> None:
    tables = make_tables({"a": 3000, "b": 500}, 4, dim=7)
    tables["a"][0].slots["embedding"][5, 1] = 1e6
    tables["a"][3].slots["embedding"][9] = np.nan
    source = write_checkpoint(tmp_path / "in", {**tables, "c": make_tables({"c": 9}, 4)["c"]})
    said = run_ranks(refuse, 2, tmp_path / "store", str(source), str(tmp_path / "out"))
    assert len(set(said)) == 1
    assert said[0].startswith("1 table 'a': 8 values do not fit float16 (1 beyond +-65504, 7 NaN), the first in row 5")
    assert not (tmp_path / "out" / "manifest.json").exists()
