"""Chains of deltas: lookups give what a full package of the last state gives, and each wrong link is refused by name."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dist_export
from dist_export import cli
from dist_export.errors import PackageError
from dist_export.inspect.describe import describe
from dist_export.manifest import MANIFEST
from dist_export.package import chain
from dist_export.package.reader import Package
from dist_export.package.slot_reader import SlotReader
from dist_export.storage.urls import open_directory
from dist_export.verify.verify import verify
from tests.support.delta_by_hand import Rows, State, change_rows, edit, write_delta, write_full
from tests.support.recis_writer import make_rows

SLOTS = ("sparse_adam_exp_avg",)


def put_back(rows: Rows, earlier: Rows, count: int) -> Rows:
    """Return a table with some rows again that an earlier state had and this one lacks."""
    gone = np.flatnonzero(~np.isin(earlier[0], rows[0]))[:count]
    assert len(gone) == count
    return np.concatenate([rows[0], earlier[0][gone]]), {
        name: np.concatenate([values, earlier[1][name][gone] * 2]) for name, values in rows[1].items()
    }


def drop_new(rows: Rows, earlier: Rows, count: int) -> Rows:
    """Return a table without some rows that an earlier state lacked."""
    is_kept = np.ones(len(rows[0]), bool)
    is_kept[np.flatnonzero(~np.isin(rows[0], earlier[0]))[:count]] = False
    assert np.count_nonzero(~is_kept) == count
    return rows[0][is_kept], {name: values[is_kept] for name, values in rows[1].items()}


def make_states() -> list[State]:
    """Return four states: in the later ones rows change twice, are gone and come again, are new and gone again."""
    first: dict[str, Rows] = {
        "t": make_rows(600, 4, slots=SLOTS, seed=1),
        "u": make_rows(120, 6, slots=SLOTS, seed=2),
        "kept": make_rows(40, 4, slots=SLOTS, seed=3),
    }
    added = make_rows(30, 4, slots=SLOTS, seed=4)
    second = {**first, "t": change_rows(first["t"], changed=60, new=25, deleted=40, seed=11), "added": added}
    third = {
        **second,
        "t": drop_new(
            put_back(change_rows(second["t"], changed=90, new=20, deleted=30, seed=12), first["t"], 15), first["t"], 9
        ),
        "u": change_rows(first["u"], changed=10, new=4, deleted=7, seed=13),
        "added": change_rows(added, changed=5, new=2, deleted=6, seed=14),
    }
    fourth = {**third, "t": put_back(change_rows(third["t"], changed=40, new=8, deleted=50, seed=15), second["t"], 12)}
    return [first, second, third, fourth]


STATES = make_states()


def write_chain(folder: Path, states: list[State] = STATES, **settings: Any) -> list[Path]:
    """Write the full package of the first state, and a delta on top of the one before for each later one."""
    links = [write_full(folder / "full", states[0], num_shards=3, **settings)]
    for number, (old, new) in enumerate(itertools.pairwise(states), 1):
        links.append(write_delta(folder / f"delta{number}", links[-1], old, new, num_shards=1 + number % 2, **settings))
    return links


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture
def links(written: list[Path], tmp_path: Path) -> list[Path]:
    """Copies to break; the paths in the manifests are those of the originals."""
    return [shutil.copytree(path, tmp_path / path.name) for path in written]


def ids_of(table: str) -> np.ndarray:
    """Return the ids of all states, and some that none has."""
    known = [state[table][0] for state in STATES if table in state]
    return np.random.default_rng(0).permutation(np.unique(np.concatenate([*known, np.arange(-20, 20)])))


def assert_serves(package: Package, state: State) -> None:
    """Compare lookups of all ids in all tables with the rows of a state."""
    assert {table.name for table in package.manifest.tables} == set(state)
    for name, (ids, slots) in state.items():
        asked = ids_of(name)
        place_of = {number: place for place, number in enumerate(ids.tolist())}
        places = np.array([place_of.get(number, -1) for number in asked.tolist()])
        rows, has_row = package.lookup(name, asked)
        assert np.array_equal(has_row, places >= 0)
        assert np.array_equal(package.contains(name, asked), has_row)
        assert has_row.sum() == len(ids)
        assert np.array_equal(rows[has_row], slots["embedding"][places[has_row]])
        assert not rows[~has_row].any()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_link_serves_its_own_state(written: list[Path], number: int) -> None:
    with dist_export.open_package(written[number]) as package:
        assert [layer.directory.path for layer in package.layers] == [str(path) for path in written[number::-1]]
        assert_serves(package, STATES[number])


@pytest.mark.parametrize("settings", [{"dtype": {"*": "int8"}}, {"keep_slots": ["*"]}, {"row_index": False}])
def test_all_slots_are_those_of_a_full_package(settings: dict[str, Any], tmp_path: Path) -> None:
    last = write_chain(tmp_path, **settings)[-1]
    full = write_full(tmp_path / "again", STATES[-1], num_shards=2, **settings)
    with dist_export.open_package(last) as package, dist_export.open_package(full) as expected:
        for table in expected.manifest.tables:
            for slot in table.kept:
                for found, stated in zip(
                    package.lookup(table.name, ids_of(table.name), slot=slot.name, raw=True),
                    expected.lookup(table.name, ids_of(table.name), slot=slot.name, raw=True),
                    strict=True,
                ):
                    assert found.tobytes() == stated.tobytes()


def test_links_too_large_to_merge_give_the_same_rows(written: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "_MOST_MERGED", -1)
    monkeypatch.setattr(chain.MergedIds, "__init__", None)
    with dist_export.open_package(written[-1]) as package:
        assert_serves(package, STATES[-1])


def test_a_lookup_asks_the_merged_ids_and_one_package(written: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many links there are; the rows that a link has are taken by their place."""
    asked: list[tuple[str, int]] = []
    fill = SlotReader.fill

    def count(reader: SlotReader, ids: np.ndarray, *more: Any) -> None:
        asked.append((reader._files.url, len(ids)))
        fill(reader, ids, *more)

    monkeypatch.setattr(SlotReader, "fill", count)
    with dist_export.open_package(written[-1]) as package:
        package.lookup("t", ids_of("t"))
    assert asked == [(str(written[0]), len(ids_of("t")))]


def test_merged_ids_say_how_much_memory_they_take(written: list[Path]) -> None:
    with dist_export.open_package(written[-1]) as package:
        found, _ = chain.list_links(package.layers, "t", "embedding")
        merged = chain.MergedIds(found)
        assert len(merged) <= chain.count_ids([link.table for link in found])
        assert 16 * len(merged) < merged.num_bytes <= chain.BYTES_OF_ID * len(merged)


def test_a_row_is_the_last_one_of_its_id_in_one_link_alone(written: list[Path]) -> None:
    with dist_export.open_package(written[-1]) as package:
        found, _ = chain.list_links(package.layers, "t", "embedding")
        merged, last = chain.MergedIds(found), []
        for link, its in enumerate(found):
            for part, entry in enumerate(its.table.parts):
                for first in range(0, entry.rows, 7):
                    ids = its.reader.read_ids(part, first, min(first + 7, entry.rows))
                    last += ids[merged.are_last(ids, link, part, first)].tolist()
        assert len(last) == len(set(last))
        asked = ids_of("t")
        positions, places = merged.find(asked)
        assert sorted(last) == sorted(asked[positions[places != chain.DELETED]].tolist())


# ---- where the links are ----


def test_links_that_were_moved_together_are_found_beside_each_other(written: list[Path], tmp_path: Path) -> None:
    moved = [shutil.copytree(path, tmp_path / path.name) for path in written]
    for path in moved[1:]:
        document = json.loads((path / MANIFEST).read_text())
        assert document["base"]["path"].startswith(str(written[0].parent))
    with dist_export.open_package(moved[-1]) as package:
        assert_serves(package, STATES[-1])
        again = pickle.loads(pickle.dumps(package))
        assert [layer.directory.path for layer in again.layers] == [layer.directory.path for layer in package.layers]
        assert_serves(again, STATES[-1])


def test_the_next_link_may_be_given(links: list[Path], tmp_path: Path) -> None:
    elsewhere = links[2].rename(tmp_path / "elsewhere")
    with dist_export.open_package(links[3], base=elsewhere) as package:
        assert package.layers[1].directory.path == str(elsewhere)
        assert_serves(package, STATES[3])


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("what", ["missing", "another", "damaged"])
def test_a_wrong_link_is_an_error_that_names_it(tmp_path: Path, number: int, what: str) -> None:
    links = write_chain(tmp_path)
    digest = json.loads((links[number] / MANIFEST).read_text())["digest"]
    if what == "missing":
        shutil.rmtree(links[number])
    if what == "another":
        edit(links[number], lambda document: document["notes"].append("another package"))
    if what == "damaged":
        (links[number] / MANIFEST).write_text((links[number] / MANIFEST).read_text().replace('"filter"', '"copy"'))
    with pytest.raises(PackageError) as raised:
        dist_export.open_package(links[3])
    told = str(raised.value)
    assert told.startswith(f"{links[number + 1]} is a delta package of {links[number]}")
    assert digest in told
    assert "\n" not in told
    if number == 2:  # what is directly below the package that is opened
        assert told.endswith("To read the delta, put the base back, or give base")
    else:  # which nobody can give: what is given is below the last one
        assert told.endswith("To read the delta and those on top of it, put its base back there or beside it")
        with pytest.raises(PackageError, match="To read the delta and those on top of it, put its base back"):
            dist_export.open_package(links[3], base=links[2])


def test_at_most_eight_links_are_opened(tmp_path: Path) -> None:
    states: list[State] = [{"t": make_rows(40, 4, slots=SLOTS, seed=1)}]
    for seed in range(9):
        states.append({"t": change_rows(states[-1]["t"], changed=3, new=1, deleted=1, seed=seed + 20)})
    links = write_chain(tmp_path, states)
    with dist_export.open_package(links[8]) as package:
        rows, has_row = package.lookup("t", states[8]["t"][0])
        assert has_row.all()
        assert np.array_equal(rows, states[8]["t"][1]["embedding"])
        with pytest.raises(PackageError, match=r"at most 8 deltas can be"):
            Package(open_directory(links[9]), opened=package)
        assert package.lookup("t", states[8]["t"][0])[1].all()
    with pytest.raises(
        PackageError, match=rf"{links[1]} is a delta package with 8 others .*at most 8 deltas can be"
    ) as raised:
        dist_export.open_package(links[9])
    assert "\n" not in str(raised.value)


def test_a_link_that_names_a_later_one_is_refused(tmp_path: Path) -> None:
    """A circle would need two manifests that have the digests of each other."""
    links = write_chain(tmp_path)
    digest = json.loads((links[3] / MANIFEST).read_text())["digest"]
    edit(links[1], lambda document: document["base"].update(path=str(links[3]), digest=digest))
    mine = json.loads((links[1] / MANIFEST).read_text())["digest"]
    edit(links[2], lambda document: document["base"].update(path=str(links[1]), digest=mine))
    with pytest.raises(PackageError, match=rf"^{links[3]} is a delta package of {links[2]}, and needs that base"):
        dist_export.open_package(links[2])


# ---- closing ----


def is_open(package: Package) -> bool:
    try:
        return bool(package.lookup("kept", STATES[0]["kept"][0])[1].all())
    except PackageError as error:
        assert "the package was closed" in str(error)
        return False


def test_all_links_are_closed_with_the_last_one(links: list[Path]) -> None:
    package = dist_export.open_package(links[3])
    layers = package.layers
    assert all(map(is_open, layers))
    package.close()
    assert not any(map(is_open, layers))


def test_links_that_are_open_are_taken_and_outlive_the_one_that_opened_them(links: list[Path]) -> None:
    first = dist_export.open_package(links[2])
    second = Package(open_directory(links[3]), opened=first)
    assert second.base is first
    first.close()
    first.close()
    assert_serves(second, STATES[3])
    second.close()
    assert not any(map(is_open, second.layers))


def test_all_directories_may_go_once_the_chain_is_open(links: list[Path]) -> None:
    with dist_export.open_package(links[3]) as package:
        for path in links:
            shutil.rmtree(path)
        assert_serves(package, STATES[3])


# ---- verify ----


@pytest.mark.parametrize("number", [1, 2, 3])
def test_each_link_is_sound_against_the_state_below_it(written: list[Path], number: int) -> None:
    report = verify(str(written[number]))
    assert report.findings == []
    assert f"delta of {written[number - 1]}: " in report.checked[-1]


def test_verify_counts_against_what_the_chain_serves(tmp_path: Path) -> None:
    """Ids that came with an earlier link are changed, and those that it took away are new."""
    links = write_chain(tmp_path)
    delta = next(its for its in json.loads((links[3] / MANIFEST).read_text())["tables"] if its["name"] == "t")["delta"]
    assert delta["rows_base"] == len(STATES[2]["t"][0])

    def swap(document: Any) -> None:
        entry = next(entry for entry in document["tables"] if entry["name"] == "t")
        its = entry["delta"]
        its.update(changed=its["changed"] + 1, new=its["new"] - 1, same=its["same"] - 1)
        entry.update(rows_in=entry["rows_in"] - 1, rows_dropped={"same": its["same"]})

    edit(links[3], swap)
    (finding,) = verify(str(links[3])).findings
    assert f"{delta['changed']:,} of its {delta['changed'] + delta['new']:,} rows are in the base" in str(finding)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_verify_names_a_link_that_is_not_there(tmp_path: Path, number: int) -> None:
    links = write_chain(tmp_path)
    shutil.rmtree(links[number])
    (finding,) = verify(str(links[3])).findings
    assert f"{links[number + 1]} is a delta package of {links[number]}, and needs that base" in str(finding)


# ---- inspect ----


def test_inspect_shows_all_links_and_what_lacks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    links = write_chain(tmp_path)
    assert describe(str(links[3]))["chain"] == [str(link) for link in reversed(links)]
    assert "chain" not in describe(str(links[1]))
    assert "chain" not in describe(str(links[0]))
    assert cli.main(["inspect", str(links[3])]) == 0
    assert f"  chain      {links[3]} on {links[2]} on {links[1]} on {links[0]}\n" in capsys.readouterr().out
    shutil.rmtree(links[0])
    assert cli.main(["inspect", str(links[3])]) == 0
    out = capsys.readouterr().out
    assert f"  chain      {links[3]} on {links[2]} on {links[1]}\n" in out
    assert f"  lack       it needs {links[1]}, which is a delta of {links[0]}, and neither there nor beside it" in out
