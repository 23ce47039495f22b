"""A delta on a delta: what the chain serves is what a full export of the last checkpoint has, row for row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dist_export
from dist_export.api import Exporter
from dist_export.errors import CommitError, ConfigError, PlanError
from dist_export.formats.tuning import Tuning
from dist_export.pipeline import deltas
from dist_export.verify.verify import verify
from tests.integration.test_delta_chains import STATES
from tests.integration.test_delta_export import export
from tests.integration.test_delta_scores import build
from tests.support import score_models as models
from tests.support.delta_by_hand import State
from tests.support.deltas import Rows, manifest_of, put_chain_together, read_deleted, read_package
from tests.support.recis_writer import make_rows, split_table, write_checkpoint

TABLES = ("t", "u", "kept")


def save(folder: Path, state: State, shards: int) -> Path:
    return write_checkpoint(folder, {name: split_table(*state[name], shards) for name in TABLES})


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    return [save(folder / f"step-{step}", state, 1 + step % 3) for step, state in enumerate(STATES)]


def export_chain(sources: list[Path], folder: Path, **settings: Any) -> list[Path]:
    """Export the first checkpoint whole, and each later one as a delta on the one before, with other numbers of shards."""
    links = [export(sources[0], folder / "full", num_shards=3, **settings)]
    for number, source in enumerate(sources[1:], 1):
        chain = {"base": str(links[-1]), "delta_chain": 8, "num_shards": 1 + number % 3}
        links.append(export(source, folder / f"delta{number}", **chain, **settings))
        assert manifest_of(links[-1])["base"]["path"] == str(links[-2])
    return links


def looked_up(package: Path, rows: Rows) -> Rows:
    """Return what an open package has of these ids and of some others, by its kept slots."""
    found: Rows = {}
    with dist_export.open_package(package) as opened:
        for table in opened.manifest.tables:
            ids = np.array([*rows[table.name], *range(-50, 50)])
            slots = [slot.name for slot in table.kept if slot.name != "id"]
            both = [opened.lookup(table.name, ids, slot=slot, raw=True) for slot in slots]
            its = zip(*(map(bytes, stored) for stored, _ in both), strict=True)
            found[table.name] = {
                number: row for number, row, is_there in zip(ids.tolist(), its, both[0][1], strict=True) if is_there
            }
    return found


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fingerprints": {"row_fingerprints": True},
    "exact": {"row_fingerprints": True, "compare": "exact"},
    "casts": {"dtype": {"t": "int8", "u": "bfloat16"}, "keep_slots": ["*"]},
    "prune": {"prune": [{"tables": ["*"], "norm_at_most": 2.0}]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_chain_serves_what_a_full_export_has(name: str, sources, tmp_path: Path) -> None:
    settings = SETTINGS[name]
    exact = settings.get("compare") == "exact"
    first = {key: value for key, value in settings.items() if key != "compare"}
    links = export_chain(sources, tmp_path, **first)
    if exact:
        again = {"base": str(links[2]), "delta_chain": 8, "compare": "exact"}
        exactly = export(sources[3], tmp_path / "exact", **again, **first)
        assert read_package(exactly) == read_package(links[3])
    for number in range(1, len(links)):
        expected = read_package(export(sources[number], tmp_path / f"again{number}", **first))
        assert put_chain_together(links[: number + 1]) == expected
        assert looked_up(links[number], expected) == expected
    assert verify(str(links[-1])).findings == []
    # a delta on a delta holds less than one on the full package
    direct = manifest_of(export(sources[3], tmp_path / "direct", base=str(links[0]), **first))
    assert sum(t["rows_out"] for t in manifest_of(links[3])["tables"]) < sum(t["rows_out"] for t in direct["tables"])
    assert any(ids for ids in read_deleted(links[3]).values())


def test_by_default_a_delta_goes_on_the_full_package(sources, tmp_path: Path) -> None:
    links = export_chain(sources[:3], tmp_path)
    delta = export(sources[3], tmp_path / "next", base=str(links[2]))
    assert manifest_of(delta)["base"]["path"] == str(links[0])


def test_a_chain_that_is_long_enough_begins_anew_on_the_full_package(sources, tmp_path: Path) -> None:
    links = export_chain(sources[:3], tmp_path)
    delta = export(sources[3], tmp_path / "next", base=str(links[2]), delta_chain=2)
    assert manifest_of(delta)["base"]["path"] == str(links[0])
    delta = export(sources[3], tmp_path / "more", base=str(links[2]), delta_chain=3)
    assert manifest_of(delta)["base"]["path"] == str(links[2])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"delta_chain": 9}, "delta_chain is 9; give a number of deltas from 1 to 8"),
        ({"delta_chain": 0}, "delta_chain is 0; give a number of deltas from 1 to 8"),
        (
            {"delta_chain": 2, "base": None},
            "delta_chain says how many deltas may be on top of each other, but base is not",
        ),
        ({"delta_chain": 2, "format": "tzrec_delta"}, "delta_chain needs checkpoints: with format: tzrec_delta"),
        ({"delta_chain": 2, "need_export_sparse": False, "model": "m:M", "dataset": "m:d"}, "delta_chain is 2, but"),
    ],
)
def test_settings_that_make_no_chain(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        export(tmp_path / "none", tmp_path / "out", **{"base": str(tmp_path / "base")} | settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [0, 1])
def test_a_missing_link_is_named_before_anything_is_written(sources, tmp_path: Path, number: int) -> None:
    links = export_chain(sources[:3], tmp_path)
    shutil.rmtree(links[number])
    with pytest.raises(ConfigError, match=rf"is a delta of {links[number]}, and neither there nor beside it") as raised:
        export(sources[3], tmp_path / "out", base=str(links[2]), delta_chain=8)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    whole = export(sources[3], tmp_path / "out", base=str(links[2]), delta_chain=8, on_base_mismatch="full")
    assert "base" not in manifest_of(whole)


@pytest.mark.parametrize("settings", [{"delta_chain": 3}, {"compare": "exact"}])
def test_without_a_base_the_settings_about_it_do_not_count(sources, tmp_path: Path, settings: dict[str, Any]) -> None:
    given = {"base": str(tmp_path / "none"), "on_base_mismatch": "full", **settings}
    assert "base" not in manifest_of(export(sources[0], tmp_path / "out", **given))


def test_a_link_that_is_replaced_meanwhile_fails_the_export(sources, tmp_path: Path, monkeypatch) -> None:
    links = export_chain(sources[:3], tmp_path)
    write = deltas.write_deleted

    def write_and_replace(*arguments: Any, **more: Any) -> Any:
        written = write(*arguments, **more)
        shutil.rmtree(links[0])
        return written

    monkeypatch.setattr(deltas, "write_deleted", write_and_replace)
    with pytest.raises(CommitError, match=rf"{links[0]}/manifest.json: the base had the manifest"):
        export(sources[3], tmp_path / "out", base=str(links[2]), delta_chain=8)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_delta_takes_the_place_of_none_of_its_links(sources, tmp_path: Path, number: int) -> None:
    links = export_chain(sources[:3], tmp_path)
    before = [manifest_of(link) for link in links]
    with pytest.raises(ConfigError, match=r"place the delta would take|take its place"):
        export(sources[3], links[number], base=str(links[2]), delta_chain=8, overwrite=True)
    assert [manifest_of(link) for link in links] == before


def test_row_numbers_grow_along_a_chain(tmp_path: Path) -> None:
    import torch

    name, random = "ebc.embedding_bags.t.weight", np.random.default_rng(0)
    rows, links, sources = random.standard_normal((90, 4)).astype(np.float32), [], []
    for step in range(4):
        if step:
            rows = np.concatenate([rows, random.standard_normal((step * 5, 4)).astype(np.float32)])
            rows[random.integers(0, len(rows), 7)] += 1
        torch.save({name: torch.from_numpy(rows.copy())}, tmp_path / f"{step}.pt")
        sources.append(tmp_path / f"{step}.pt")
        base: dict[str, Any] = {"base": str(links[-1]), "delta_chain": 8} if links else {}
        links.append(export(sources[-1], tmp_path / f"link{step}", format="torch", num_shards=1 + step % 2, **base))
    full = read_package(export(sources[-1], tmp_path / "again", format="torch", num_shards=2))
    assert put_chain_together(links) == full
    assert looked_up(links[-1], full) == full
    assert verify(str(links[-1])).findings == []
    torch.save({name: torch.from_numpy(rows[:100].copy())}, tmp_path / "fewer.pt")
    with pytest.raises(PlanError, match=r"has 120 rows by number, and that of the checkpoint 100"):
        export(tmp_path / "fewer.pt", tmp_path / "out", format="torch", base=str(links[-1]), delta_chain=8)


def test_merged_ids_are_within_max_memory(sources, tmp_path: Path, monkeypatch) -> None:
    from dist_export.package import served_table

    links = export_chain(sources[:2], tmp_path)
    monkeypatch.setattr(served_table, "BYTES_OF_ID", 1 << 30)
    with pytest.raises(PlanError, match=r"max_memory leaves .* raise max_memory"):
        export(sources[2], tmp_path / "out", base=str(links[1]), delta_chain=8)
    assert not (tmp_path / "out" / "manifest.json").exists()
    export(sources[2], tmp_path / "out", base=str(links[0]), delta_chain=8)  # a full package has none


def test_many_small_pieces_give_the_same_chain(sources, tmp_path: Path, monkeypatch) -> None:
    from dist_export.package import chain

    links = export_chain(sources[:3], tmp_path)
    expected = export(sources[3], tmp_path / "expected", base=str(links[2]), delta_chain=8)
    monkeypatch.setattr(chain, "_RUN_ROWS", 11)
    tuning = Tuning(base_rows=13, compared_bytes=200)
    small = export(sources[3], tmp_path / "small", base=str(links[2]), delta_chain=8, tuning=tuning)
    assert read_package(small) == read_package(expected)
    assert read_deleted(small) == read_deleted(expected)
    keys = ("rows_base", "same", "changed", "new", "deleted")
    accounts = [
        [{key: table["delta"][key] for key in keys} for table in manifest_of(package)["tables"]]
        for package in (small, expected)
    ]
    assert accounts[0] == accounts[1]


def test_eight_links_are_written_and_the_ninth_delta_begins_anew(tmp_path: Path) -> None:
    from tests.support.delta_by_hand import change_rows

    state: State = {"t": make_rows(60, 4, seed=1)}
    links: list[Path] = []
    for step in range(10):
        source = write_checkpoint(tmp_path / f"step-{step}", {"t": split_table(*state["t"], 1)})
        base: dict[str, Any] = {"base": str(links[-1]), "delta_chain": 8} if links else {}
        links.append(export(source, tmp_path / f"link{step}", num_shards=1, **base))
        state = {"t": change_rows(state["t"], changed=4, new=2, deleted=2, seed=step + 50)}
    bases = [json.loads((link / "manifest.json").read_text())["base"]["path"] for link in links[1:]]
    assert bases == [*map(str, links[:8]), str(links[0])]
    expected = read_package(export(tmp_path / "step-8", tmp_path / "full8"))
    assert looked_up(links[8], expected) == expected


@pytest.mark.parametrize("settings", [{}, {"dtype": {"*": "bfloat16"}, "to_hash_tables": ["*"]}], ids=str)
def test_a_chain_of_a_model_in_memory(tmp_path: Path, settings: dict[str, Any]) -> None:
    model, places, more = models.train(build()), [tmp_path / str(number) for number in range(3)], {}
    for number, place in enumerate(places):
        if number:
            with torch.no_grad():
                model.sparse_arch.user.weight[number :: 5 + number] += number
            more = {"base": str(places[number - 1]), "delta_chain": 8}
        given = [model, "sparse_arch", "dense_arch", [models.batch_of()], None, place]
        Exporter(*given, num_shards=1 + number, score_program="off", **settings, **more).export(progress=False)
    Exporter(*given[:5], tmp_path / "full", num_shards=2, score_program="off", **settings).export(progress=False)
    dist_export.compact(places[2], tmp_path / "compacted", progress=False)
    full = read_package(tmp_path / "full")
    assert read_package(tmp_path / "compacted") == full
    with dist_export.open_package(places[2]) as chain, dist_export.open_package(tmp_path / "full") as whole:
        assert len(chain.layers) == 3
        for table in whole.manifest.tables:
            ids = np.arange(-3, models.ROWS + 3)
            found, expected = (opened.lookup(table.name, ids, raw=True) for opened in (chain, whole))
            assert np.array_equal(found[1], expected[1])
            assert [row.tobytes() for row in found[0]] == [row.tobytes() for row in expected[0]]
