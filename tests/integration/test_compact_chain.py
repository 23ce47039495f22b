"""A chain of deltas becomes the package that a full export gives, row for row and with its account."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_export.errors import CheckpointError, CommitError, ConfigError, PlanError
from dist_export.manifest import MANIFEST
from dist_export.pipeline import compacted_package
from tests.integration.test_compact import compare, make
from tests.integration.test_delta_chain_export import export_chain, save
from tests.integration.test_delta_chains import STATES
from tests.integration.test_delta_export import export
from tests.support.delta_by_hand import change_rows, edit
from tests.support.deltas import manifest_of, read_package
from tests.support.recis_writer import split_table, write_checkpoint

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "casts": {"dtype": {"t": "int8", "u": "bfloat16"}, "keep_slots": ["*"]},
    "prune and fingerprints": {"prune": [{"tables": ["*"], "norm_at_most": 2.0}], "row_fingerprints": True},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    return [save(folder / f"step-{step}", state, 1 + step % 3) for step, state in enumerate(STATES)]


@pytest.fixture
def links(sources: list[Path], tmp_path: Path) -> list[Path]:
    return export_chain(sources, tmp_path)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_chain_becomes_the_full_package(name: str, sources, tmp_path: Path) -> None:
    links = export_chain(sources, tmp_path, **SETTINGS[name])
    for number in (2, 3):
        shards = manifest_of(links[number])["num_shards"]
        full = export(sources[number], tmp_path / f"again{number}", num_shards=shards, **SETTINGS[name])
        made = make(links[number], tmp_path / f"made{number}")
        compare(made, full)
    compacted = manifest_of(made)["compacted"]
    assert compacted["delta"]["path"] == str(links[3])
    assert [its["path"] for its in compacted["between"]] == [str(links[2]), str(links[1])]
    assert compacted["base"]["path"] == str(links[0])
    for link in links:
        shutil.rmtree(link)
    assert read_package(made) == read_package(full)
    after = export(sources[2], tmp_path / "after", base=str(made), **SETTINGS[name])
    assert manifest_of(after)["base"]["path"] == str(made)


def test_a_chain_over_row_numbers_becomes_the_full_package(tmp_path: Path) -> None:
    name, random = "ebc.embedding_bags.t.weight", np.random.default_rng(0)
    rows, links = random.standard_normal((90, 4)).astype(np.float32), []
    for step in range(4):
        if step:
            rows = np.concatenate([rows, random.standard_normal((step * 5, 4)).astype(np.float32)])
            rows[random.integers(0, len(rows), 7)] += 1
        torch.save({name: torch.from_numpy(rows.copy())}, tmp_path / f"{step}.pt")
        base: dict[str, Any] = {"base": str(links[-1]), "delta_chain": 8} if links else {}
        links.append(export(tmp_path / f"{step}.pt", tmp_path / f"link{step}", format="torch", num_shards=3, **base))
    full = export(tmp_path / "3.pt", tmp_path / "full", format="torch", num_shards=3)
    compare(make(links[3], tmp_path / "made"), full)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_out_is_none_of_the_links(links: list[Path], number: int) -> None:
    before = [manifest_of(link) for link in links]
    with pytest.raises(ConfigError, match="whose place the new package would take"):
        make(links[3], links[number], overwrite=True)
    assert [manifest_of(link) for link in links] == before


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_damaged_link_is_named_before_anything_is_written(links: list[Path], tmp_path: Path, number: int) -> None:
    shard = next(links[number].glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=str(shard)):
        make(links[3], tmp_path / "made")
    assert not (tmp_path / "made" / MANIFEST).exists()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_link_is_named(links: list[Path], tmp_path: Path, number: int) -> None:
    shutil.rmtree(links[number])
    with pytest.raises(CheckpointError, match=rf"{links[number + 1]} is a delta package of {links[number]}, and needs"):
        make(links[3], tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_link_that_is_removed_meanwhile_is_named(links: list[Path], tmp_path: Path, monkeypatch) -> None:
    refuse = compacted_package.refuse_replaced_base

    def remove_and_refuse(package: Any) -> None:
        (links[1] / MANIFEST).unlink()
        refuse(package)

    monkeypatch.setattr(compacted_package, "refuse_replaced_base", remove_and_refuse)
    with pytest.raises(CommitError, match=f"{links[1]}/{MANIFEST}: the base had the manifest"):
        make(links[3], tmp_path / "made")
    assert not (tmp_path / "made" / MANIFEST).exists()


def test_deleted_ids_of_a_chain_are_within_max_memory(sources, tmp_path: Path, monkeypatch) -> None:
    from dist_export.delta import replaced_rows

    links = export_chain(sources, tmp_path)
    monkeypatch.setattr(replaced_rows, "_LISTED_BYTES", 1 << 30)
    with pytest.raises(PlanError, match="the ids that are deleted by all deltas take"):
        make(links[3], tmp_path / "made")
    assert not (tmp_path / "made" / MANIFEST).exists()


def test_a_wrong_account_of_a_link_is_found(links: list[Path], tmp_path: Path) -> None:
    """The manifests of all links are sealed anew, so that only the rows tell."""

    def change(document: Any) -> None:
        table = next(its for its in document["tables"] if its["name"] == "t")
        table["delta"].update(same=table["delta"]["same"] - 1, rows_base=table["delta"]["rows_base"] - 1)

    edit(links[3], change)
    with pytest.raises(CommitError, match=r"table 't': .* rows were written"):
        make(links[3], tmp_path / "made")


def test_tables_with_the_same_ids_are_not_taken_for_each_other(tmp_path: Path) -> None:
    """All small tables are searched at once for ids that stand twice in one layer."""
    state = {"a": STATES[0]["u"], "b": STATES[0]["u"]}
    links: list[Path] = []
    for step in range(3):
        tables = {name: split_table(*rows, 2) for name, rows in state.items()}
        source = write_checkpoint(tmp_path / f"step-{step}", tables)
        base: dict[str, Any] = {"base": str(links[-1]), "delta_chain": 8} if links else {}
        links.append(export(source, tmp_path / f"link{step}", num_shards=2, **base))
        state = {name: change_rows(rows, changed=9, new=3, deleted=4, seed=70 + step) for name, rows in state.items()}
    compare(make(links[2], tmp_path / "made"), export(source, tmp_path / "full", num_shards=2))
