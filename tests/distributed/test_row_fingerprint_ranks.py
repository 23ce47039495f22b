"""Row fingerprints on two ranks: the bytes that one rank writes, and verify on two ranks finds a wrong one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dist_export
from dist_export.formats.tuning import Tuning
from tests.support import exports
from tests.support.distributed.ranks import run_ranks
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.row_fingerprints import read_fingerprints

pytestmark = pytest.mark.distributed

MODES = ({"filter_sparse_opt": True, "num_shards": 3}, {"filter_sparse_opt": False})


def export_all(_: int, source: str, out: str, threads: int) -> None:
    tuning = Tuning(fingerprint_rows=50)  # many pieces
    for number, mode in enumerate(MODES):
        given = {"ckpt_dir": source, "export_dir": f"{out}/{number}", "threads": threads, "row_fingerprints": True}
        exports.export(given | mode, tuning=tuning)


def verify_on_rank(_: int, package: str) -> list[str]:
    from dist_export.runtime.joining import join
    from dist_export.verify.verify import verify

    with join(timeout_secs=60) as ranks:
        return verify(package, ranks=ranks, tuning=Tuning(verified_fingerprints=40)).findings


def test_two_ranks_write_the_bytes_of_one(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", make_tables({"a": 900, "b": 70}, 4, dim=7), files_per_shard=2)
    run_ranks(export_all, 2, tmp_path / "store", str(source), str(tmp_path / "two"), 2, timeout=240)
    run_ranks(export_all, 1, tmp_path / "store1", str(source), str(tmp_path / "one"), 1, timeout=240)
    for number in range(len(MODES)):
        two, one = (tmp_path / name / str(number) for name in ("two", "one"))
        names = sorted(path.name for path in one.glob("*.row_fingerprints"))
        assert len(names) >= 3
        assert sorted(path.name for path in two.glob("*.row_fingerprints")) == names
        for name in names:
            assert (two / name).read_bytes() == (one / name).read_bytes()
        tables = [json.loads((folder / "manifest.json").read_text())["tables"] for folder in (two, one)]
        assert tables[0] == tables[1]
        for stored, expected in read_fingerprints(two).values():
            assert stored == expected


def test_verify_on_two_ranks_finds_a_wrong_row(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", make_tables({"a": 900}, 2, dim=7))
    settings = {"filter_sparse_opt": True, "num_shards": 2, "digest": "none", "row_fingerprints": True}
    dist_export.export({"ckpt_dir": str(source), "export_dir": str(tmp_path / "out"), **settings})
    assert run_ranks(verify_on_rank, 2, tmp_path / "store", str(tmp_path / "out")) == [[], []]
    shard = tmp_path / "out" / "model-000001-of-000002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for findings in run_ranks(verify_on_rank, 2, tmp_path / "store2", str(tmp_path / "out")):
        (found,) = findings
        assert found.startswith("model-000001-of-000002.row_fingerprints: 1 of ")
