"""Slots beside the embeddings of row-indexed tables go on where a package is the source, and where a delta is compacted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dist_export
from dist_export.diff.compare import diff
from dist_export.errors import CheckpointError
from dist_export.verify.verify import verify
from tests.support.dcp_writer import save
from tests.support.sparse_cases import export

KEPT = {"keep_slots": ["*momentum1"]}
TABLES = {"ebc.embedding_bags.user.weight": (11, 4), "ebc.embedding_bags.item.weight": (7, 3)}


def write(path: Path, added: float = 0.0, more: int = 0) -> dict[str, torch.Tensor]:
    """Write a DCP checkpoint whose tables have a momentum, of each value or of each row; return all rows by slot."""
    sizes = {name: (height + more, width) for name, (height, width) in TABLES.items()}
    rows = {name: torch.arange(float(height * width)).reshape(height, width) for name, (height, width) in sizes.items()}
    momentum = {
        "ebc.embedding_bags.user.weight": 100 + rows["ebc.embedding_bags.user.weight"],
        "ebc.embedding_bags.item.weight": 50 + torch.arange(7.0 + more),
    }
    for name in TABLES:
        rows[name][2] += added
        momentum[name][4] += added
    states = {name: {f"{name.split('.')[2]}.momentum1": value} for name, value in momentum.items()}
    save(
        path,
        {"model": {**rows, "mlp.weight": torch.ones(3, 4)}, "optim": {"state": states, "param_groups": [{"lr": 0.1}]}},
    )
    return rows | {f"{name}.momentum1": value for name, value in momentum.items()}


def read(package: Path) -> dict[str, torch.Tensor]:
    """Read the shards by themselves: the parts of each slot, put behind each other."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for shard in package.glob("*.safetensors"):
        for key, value in load_file(shard).items():
            found = re.fullmatch(r"(.*)/part_(\d+)_\d+", key)
            assert found is not None
            parts.setdefault(found[1], {})[int(found[2])] = value
    return {name: torch.cat([its[number] for number in sorted(its)]) for name, its in parts.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_package_that_is_exported_again_has_them(tmp_path: Path, num_shards: int) -> None:
    expected = write(tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "first", num_shards=2, **KEPT)
    manifest = export(tmp_path / "first", tmp_path / "again", num_shards=num_shards)
    assert_same(read(tmp_path / "again"), expected)
    assert manifest.account is not None
    assert manifest.account.num_bytes == manifest.account.exported == sum(t.nbytes for t in expected.values())
    assert verify(str(tmp_path / "again")).findings == []
    assert diff(tmp_path / "first", tmp_path / "again").is_equal


def test_they_are_dropped_cast_around_and_hashed_as_those_of_a_checkpoint(tmp_path: Path) -> None:
    expected = write(tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "first", num_shards=2, **KEPT)
    dropped = export(tmp_path / "first", tmp_path / "dropped", drop_slots=["*momentum1"])
    assert_same(read(tmp_path / "dropped"), {name: expected[name] for name in TABLES})
    assert [slot.name for table in dropped.tables for slot in table.dropped] == ["momentum1", "momentum1"]
    export(
        tmp_path / "first",
        tmp_path / "cast",
        dtype={"*": "float16"},
        rename_tables={"ebc.embedding_bags.user.weight": "people"},
    )
    found = read(tmp_path / "cast")
    assert torch.equal(found["people.momentum1"], expected["ebc.embedding_bags.user.weight.momentum1"])
    assert torch.equal(found["people"], expected["ebc.embedding_bags.user.weight"].half())
    export(tmp_path / "first", tmp_path / "hashed", to_hash_tables=["*"])
    with dist_export.open_package(tmp_path / "hashed") as package:
        for name, (height, _) in TABLES.items():
            values, has_row = package.lookup(name, range(height), slot="momentum1")
            assert has_row.all()
            assert values.reshape(-1).tolist() == expected[f"{name}.momentum1"].reshape(-1).tolist()


@pytest.mark.parametrize("is_chain", [False, True])
def test_a_compacted_delta_has_them(tmp_path: Path, is_chain: bool) -> None:
    """Changed rows, of which one has another embedding and one another momentum, and new rows."""
    write(tmp_path / "before")
    expected = write(tmp_path / "after", 0.5, more=3)
    base = tmp_path / "base"
    export(tmp_path / "before", base, num_shards=2, **KEPT)
    if is_chain:
        write(tmp_path / "between", 0.25, more=1)
        base = tmp_path / "middle"
        export(tmp_path / "between", base, base=str(tmp_path / "base"), delta_chain=8, **KEPT)
    chain = {"base": str(base), "delta_chain": 8}
    delta = export(tmp_path / "after", tmp_path / "delta", num_shards=3, **chain, **KEPT)
    assert [table.delta.changed for table in delta.tables] == [2, 2]
    assert [table.delta.new for table in delta.tables] == [2, 2] if is_chain else [3, 3]
    dist_export.compact(tmp_path / "delta", tmp_path / "full", progress=False)
    assert_same(read(tmp_path / "full"), expected)
    assert verify(str(tmp_path / "full")).findings == []


def test_a_part_of_a_slot_that_is_missing_is_told(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write(tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "first", num_shards=2, digest="none", **KEPT)
    shard = sorted((tmp_path / "first").glob("*.safetensors"))[1]
    save_file({k: v for k, v in load_file(shard).items() if "user.weight.momentum1" not in k}, shard)
    with pytest.raises(
        CheckpointError,
        match=r"the shards hold parts 0 of 2 of table 'ebc\.embedding_bags\.user\.weight', slot 'momentum1'",
    ):
        export(tmp_path / "first", tmp_path / "again", digest="none")
