"""A package is the source of another one, and that of a third, on several real ranks: the same bytes as on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dist_export
from dist_export.errors import DistExportError
from dist_export.formats.tuning import Tuning
from dist_export.verify.verify import verify
from tests.support import exports, tiny_model
from tests.support.distributed.ranks import run_ranks
from tests.support.plain_cases import TABLES, make_model

pytestmark = pytest.mark.distributed


def export_chain(_: int, source: str, out: str) -> None:
    tuning = Tuning(cast_values=64, unit_bytes=1 << 10)  # so that every part has many blocks
    steps = [
        {"treat_as_tables": TABLES, "num_shards": 3, "dtype": {"*": "int8"}, "to_hash_tables": ["*item*"]},
        {"num_shards": 2, "rename_tables": {"*item*": "item"}, "prune": [{"tables": ["*item*"], "norm_at_most": 1.0}]},
        {"num_shards": 4, "dtype": {"item": "float16", "*": "float32"}},
    ]
    for number, settings in enumerate(steps):
        target = f"{out}/{number}"
        values = {"ckpt_dir": source, "export_dir": target, "filter_sparse_opt": True, "threads": 2, **settings}
        exports.export(values, tuning=tuning)
        source = target


def test_the_bytes_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    torch.save(make_model(), tmp_path / "ckpt.pt")
    one, two = tmp_path / "one", tmp_path / "two"
    run_ranks(export_chain, 2, tmp_path / "store", str(tmp_path / "ckpt.pt"), str(two), timeout=240)
    run_ranks(export_chain, 1, tmp_path / "store1", str(tmp_path / "ckpt.pt"), str(one), timeout=240)
    paths = [path.relative_to(two) for path in two.rglob("*") if path.is_file()]
    assert len(paths) > 3 * 4
    for path in paths:
        if path.name == "manifest.json":
            left, right = (json.loads((folder / path).read_bytes()) for folder in (two, one))
            assert left["tables"] == right["tables"]
        else:
            assert (two / path).read_bytes() == (one / path).read_bytes(), path
    last = dist_export.open_package(two / "2").manifest
    assert {table.name: table.kept[-1].dtype for table in last.tables} == {
        "item": "float16",
        "sparse_arch.ebc.embedding_bags.user.weight": "float32",
    }
    assert 0 < next(table.rows_out for table in last.tables if table.name == "item") < 61


def export_again(_: int, source: str, target: str) -> list[str]:
    manifest = dist_export.export(
        {"ckpt_dir": source, "export_dir": target, "filter_sparse_opt": True, "num_shards": 2, "threads": 2}
    )
    return [note for note in manifest.notes if "were taken over from" in note]


def test_the_program_is_taken_over_by_one_rank_for_all(tmp_path: Path) -> None:
    tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    first = tmp_path / "first"
    settings = {
        "model": tiny_model.MODEL,
        "dataset": tiny_model.DATASET,
        "filter_sparse_opt": True,
    }
    before = dist_export.export({"ckpt_dir": str(tmp_path / "ckpt"), "export_dir": str(first), **settings})
    again = tmp_path / "again"
    notes = run_ranks(export_again, 2, tmp_path / "store", str(first), str(again), timeout=240)
    assert all(len(its) == 1 for its in notes), notes
    after = dist_export.open_package(again).manifest
    assert (after.dense, after.parity) == (before.dense, before.parity)
    names = [path.relative_to(first) for path in (first / before.dense.folder).rglob("*") if path.is_file()]
    assert len(names) > 8
    assert all((again / name).read_bytes() == (first / name).read_bytes() for name in names)
    assert verify(str(again)).findings == []


def try_again(_: int, source: str, target: str) -> str:
    try:
        return str(export_again(0, source, target))
    except DistExportError as error:
        return f"{error.exit_code} {error}"


def test_all_ranks_refuse_a_damaged_package(tmp_path: Path) -> None:
    """Each reads its share of the files, and what one has found ends all of them before anything is written."""
    torch.save(make_model(), tmp_path / "ckpt.pt")
    first = {"ckpt_dir": str(tmp_path / "ckpt.pt"), "export_dir": str(tmp_path / "first"), "treat_as_tables": TABLES}
    exports.export({**first, "filter_sparse_opt": True, "num_shards": 3})
    shard = max((tmp_path / "first").glob("model-*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-2] ^= 1
    shard.write_bytes(raw)
    told = run_ranks(try_again, 2, tmp_path / "store", str(tmp_path / "first"), str(tmp_path / "again"), timeout=240)
    assert all(its.startswith("2 ") and f"{shard.name}: its content is not what was written" in its for its in told)
    assert not (tmp_path / "again").exists()
