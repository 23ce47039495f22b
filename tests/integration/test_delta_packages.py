"""Delta packages: every lookup gives what a full package of the new state gives, and a wrong base or file is refused."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import dist_export
from dist_export.errors import PackageError, UserError
from dist_export.manifest import MANIFEST
from dist_export.package import layers
from dist_export.package.reader import Package
from dist_export.package.slot_reader import SlotReader
from dist_export.storage.urls import open_directory
from tests.support import delta_by_hand
from tests.support.delta_by_hand import DELETED, State, change_rows, edit, write_delta, write_full
from tests.support.exports import export
from tests.support.recis_writer import make_rows

SLOTS = ("sparse_adam_exp_avg",)


class Deltas(NamedTuple):
    """A state on two ways: as a full package, and as a delta on top of the package of an earlier state."""

    base: Path
    delta: Path
    full: Path


OLD: State = {
    "t": make_rows(500, 4, slots=SLOTS, seed=1),
    "u": make_rows(120, 6, slots=SLOTS, seed=2),
    "kept": make_rows(40, 4, slots=SLOTS, seed=3),
}
NEW: State = {
    "t": change_rows(OLD["t"], changed=30, new=25, deleted=40),
    "u": change_rows(OLD["u"], changed=10, new=0, deleted=0, seed=5),
    "kept": OLD["kept"],
    "added": make_rows(30, 4, slots=SLOTS, seed=4),
}


def write_all(folder: Path, **settings: Any) -> Deltas:
    base = write_full(folder / "base", OLD, num_shards=3, **settings)
    delta = write_delta(folder / "delta", base, OLD, NEW, num_shards=2, **settings)
    return Deltas(base, delta, write_full(folder / "full", NEW, num_shards=4, **settings))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Deltas:
    return write_all(tmp_path_factory.mktemp("deltas"))


@pytest.fixture
def copied(written: Deltas, tmp_path: Path) -> Deltas:
    """Copies to break. The delta finds its base beside it, because the manifest's path is made one that is not there."""
    found = Deltas(*(shutil.copytree(path, tmp_path / path.name) for path in written))
    edit(found.delta, lambda document: document["base"].update(path="/nowhere/base"))
    return found


def ids_of(table: str) -> np.ndarray:
    """Return the ids of both states, and some that neither has."""
    known = [state[table][0] for state in (OLD, NEW) if table in state]
    return np.random.default_rng(0).permutation(np.unique(np.concatenate([*known, np.arange(-20, 20)])))


def assert_same_rows(found: Package, expected: Package, *, raw: bool = True) -> None:
    """Compare lookups of all ids in all tables and slots, bit for bit."""
    assert [table.name for table in found.manifest.tables] == [table.name for table in expected.manifest.tables]
    for table in expected.manifest.tables:
        for slot in table.kept:
            rows, has_row = found.lookup(table.name, ids_of(table.name), slot=slot.name, raw=raw)
            stated, has_stated = expected.lookup(table.name, ids_of(table.name), slot=slot.name, raw=raw)
            assert np.array_equal(has_row, has_stated)
            assert has_row.sum() == len(NEW[table.name][0])
            assert rows.dtype == stated.dtype
            assert rows.tobytes() == stated.tobytes()


SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"dtype": {"*": "int8"}},
    "bfloat16": {"dtype": {"*": "bfloat16"}},
    "several slots": {"keep_slots": ["*"]},
    "no row index": {"row_index": False},
    "default rows": {"default_row": {"t": [0.5, 1.0, 1.5, 2.0]}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_lookup_is_that_of_the_full_package_of_the_new_state(name: str, tmp_path: Path) -> None:
    packages = write_all(tmp_path, **SETTINGS[name])
    with dist_export.open_package(packages.delta) as delta, dist_export.open_package(packages.full) as full:
        assert delta.base is not None
        assert full.base is None
        assert len(full.table("t").kept) == (3 if name == "several slots" else 2)
        assert_same_rows(delta, full)
        assert_same_rows(delta, full, raw=False)


def test_a_delta_too_large_for_a_sieve_gives_the_same_rows(written: Deltas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_MOST_IN_SIEVE", 0)
    with dist_export.open_package(written.delta) as delta, dist_export.open_package(written.full) as full:
        assert_same_rows(delta, full)


def test_the_rows_of_the_delta_are_asked_for_a_few_ids_alone(written: Deltas, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ids that the delta says nothing of, at most one in 16 is looked for in it."""
    asked: list[tuple[str, int]] = []
    fill = SlotReader.fill

    def count(reader: SlotReader, ids: np.ndarray, *more: Any) -> None:
        asked.append((reader._files.url, len(ids)))
        fill(reader, ids, *more)

    monkeypatch.setattr(SlotReader, "fill", count)
    with dist_export.open_package(written.delta) as package:
        foreign = np.random.default_rng(7).integers(-(1 << 63), (1 << 63) - 1, 10_000, np.int64)
        package.lookup("t", foreign)
    assert asked[0] == (str(written.base), 10_000)
    assert asked[1][0] == str(written.delta)
    assert asked[1][1] < 10_000 / 16 * 1.2


def test_a_deleted_id_has_no_row_and_gets_the_default_row(tmp_path: Path) -> None:
    base = write_full(tmp_path / "base", OLD, num_shards=2)
    delta = write_delta(tmp_path / "delta", base, OLD, NEW, num_shards=1, default_row={"t": [0.25, 0.5, 0.75, 1.0]})
    gone = np.setdiff1d(OLD["t"][0], NEW["t"][0])
    with dist_export.open_package(delta) as package:
        rows, has_row = package.lookup("t", gone)
        assert len(gone) == 40
        assert not has_row.any()
        assert (rows == [0.25, 0.5, 0.75, 1.0]).all()
        assert package.base.lookup("t", gone)[1].all()


def test_a_row_indexed_table_is_keyed_by_its_row_numbers_in_the_delta(tmp_path: Path) -> None:
    name, random = "ebc.embedding_bags.t.weight", np.random.default_rng(0)
    old = random.standard_normal((90, 4)).astype(np.float32)
    new = np.concatenate([old, random.standard_normal((15, 4)).astype(np.float32)])
    new[[0, 3, 50, 89]] += 1
    settings = {"format": "torch", "progress": False, "row_index": True}
    for folder, rows, shards in (("base", old, 3), ("full", new, 2)):
        torch.save({name: torch.from_numpy(rows)}, tmp_path / f"{folder}.pt")
        export(
            {
                **settings,
                "ckpt_dir": str(tmp_path / f"{folder}.pt"),
                "export_dir": str(tmp_path / folder),
                "num_shards": shards,
            }
        )
    state = [{name: (np.arange(len(rows)), {"embedding": rows})} for rows in (old, new)]
    write_delta(tmp_path / "delta", tmp_path / "base", *state, num_shards=2)
    ids = np.concatenate([np.arange(-3, len(new) + 3), [1 << 62, -(1 << 63), 2, 2]])
    with dist_export.open_package(tmp_path / "delta") as delta, dist_export.open_package(tmp_path / "full") as full:
        assert delta.base.manifest.tables[0].is_row_indexed
        assert delta.manifest.tables[0].rows_out == 19
        for found, expected in zip(delta.lookup(name, ids), full.lookup(name, ids), strict=True):
            assert found.tobytes() == expected.tobytes()


def test_runs_are_of_the_deltas_own_parts(written: Deltas) -> None:
    with dist_export.open_package(written.delta) as package:
        entry = package.table("t")
        found = [package.read_run("t", number, 0, part.rows).ids for number, part in enumerate(entry.parts)]
        assert sum(map(len, found)) == entry.rows_out == 55


# ---- the base ----


def test_a_base_that_was_moved_with_its_delta_is_found_beside_it(copied: Deltas) -> None:
    with dist_export.open_package(copied.delta) as package, dist_export.open_package(copied.full) as full:
        assert package.base.directory.path == str(copied.base)
        assert_same_rows(package, full)


def test_a_base_may_be_given(copied: Deltas, tmp_path: Path) -> None:
    elsewhere = copied.base.rename(tmp_path / "elsewhere")
    with dist_export.open_package(copied.delta, base=elsewhere) as package:
        assert package.lookup("t", NEW["t"][0])[1].all()
    with Package(open_directory(copied.delta), base_directory=open_directory(elsewhere)) as package:
        assert package.lookup("t", NEW["t"][0])[1].all()


def test_the_right_base_beside_the_delta_is_taken_where_another_package_has_its_path(copied: Deltas) -> None:
    edit(copied.delta, lambda document: document["base"].update(path=str(copied.full.parent / "x" / "base")))
    shutil.copytree(copied.full, copied.full.parent / "x" / "base")
    with dist_export.open_package(copied.delta) as package:
        assert package.base.directory.path == str(copied.base)


def test_a_missing_base_names_each_place_and_the_digest(copied: Deltas) -> None:
    digest = dist_export.open_package(copied.base).manifest.digest
    shutil.rmtree(copied.base)
    with pytest.raises(PackageError) as raised:
        dist_export.open_package(copied.delta)
    for told in (str(copied.delta), "/nowhere/base", str(copied.base), digest, "put the base back, or give base"):
        assert told in str(raised.value)


@pytest.mark.parametrize("given", [False, True])
def test_another_package_is_no_base(given: bool, copied: Deltas) -> None:
    stated, found = (dist_export.open_package(path).manifest.digest for path in (copied.base, copied.full))
    shutil.rmtree(copied.base)
    copied.full.rename(copied.base)
    with pytest.raises(PackageError, match=rf"base is another package, of the digest {found}") as raised:
        dist_export.open_package(copied.delta, base=copied.base if given else None)
    assert stated in str(raised.value)


def test_a_damaged_base_is_refused(copied: Deltas) -> None:
    (copied.base / MANIFEST).write_text((copied.base / MANIFEST).read_text().replace('"filter"', '"copy"'))
    with pytest.raises(PackageError, match=r"base/manifest.json is not what was committed"):
        dist_export.open_package(copied.delta)


def test_slots_that_differ_are_refused(tmp_path: Path) -> None:
    base = write_full(tmp_path / "base", OLD, num_shards=2, dtype={"t": "int8"})
    delta = write_delta(tmp_path / "delta", base, OLD, NEW, num_shards=2, dtype={"t": "float16"})
    with pytest.raises(
        PackageError, match=r"table 't' has the slots embedding float16 \[4\] in the delta, and embedding uint8"
    ):
        dist_export.open_package(delta)


def test_a_table_that_the_base_lacks_and_the_account_has_rows_of_is_refused(copied: Deltas) -> None:
    edit(
        copied.delta,
        lambda document: next(t for t in document["tables"] if t["name"] == "added")["delta"].update(rows_base=1),
    )
    with pytest.raises(PackageError, match=r"the base has no table 'added', of which the delta says 1 rows"):
        dist_export.open_package(copied.delta)


def test_a_full_package_takes_no_base(copied: Deltas) -> None:
    with pytest.raises(UserError, match="is a full package, which needs no base; leave base out"):
        dist_export.open_package(copied.full, base=copied.base)


def test_a_delta_that_was_opened_without_its_base_gives_no_rows(copied: Deltas) -> None:
    package = Package(open_directory(copied.delta), opens_base=False)
    with pytest.raises(PackageError, match="is a delta package, and was opened without its base"):
        package.lookup("t", [1])
    package.open_base()
    assert package.lookup("t", NEW["t"][0])[1].all()


def test_options_for_one_kind_of_store_are_not_sent_to_another(copied: Deltas, monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_export.storage import beside

    seen: list[Any] = []

    def record(url: str, options: Any, **more: Any) -> Any:
        seen.append((url, options))
        return open_directory(url, None, **more)

    edit(copied.delta, lambda document: document["base"].update(path="memory://elsewhere/base"))
    monkeypatch.setattr(beside, "open_directory", record)
    dist_export.open_package(copied.delta, storage_options={"key": "secret"})
    assert seen == [("memory://elsewhere/base", None), (str(copied.base), {"key": "secret"})]


# ---- deleted ids ----


def swap_two_ids(content: bytearray, offset: int) -> None:
    content[offset : offset + 16] = content[offset + 8 : offset + 16] + content[offset : offset + 8]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda content, _: content.__setitem__(slice(0, 4), b"oops"), "which no file of deleted ids does"),
        (swap_two_ids, "its ids are not in ascending order"),
        (lambda content, offset: content.__delitem__(slice(offset + 8, None)), "do not lie in its"),
    ],
)
def test_damaged_deleted_ids_are_refused_at_the_first_lookup_of_their_table(damage, told: str, copied: Deltas) -> None:
    offset = dist_export.open_package(copied.delta, base=copied.base).table("t").delta.deleted_ids[0].offset
    content = bytearray((copied.delta / DELETED).read_bytes())
    damage(content, offset)
    (copied.delta / DELETED).write_bytes(content)
    with dist_export.open_package(copied.delta) as package:
        assert package.lookup("u", NEW["u"][0])[1].all()
        with pytest.raises(PackageError, match=rf"delta/{DELETED}: the deleted ids of table 't' are damaged: .*{told}"):
            package.lookup("t", [1])


def test_lists_that_are_not_what_the_account_says_are_refused(copied: Deltas) -> None:
    edit(
        copied.delta,
        lambda document: next(t for t in document["tables"] if t["name"] == "t")["delta"].update(deleted=39),
    )
    with (
        dist_export.open_package(copied.delta) as package,
        pytest.raises(PackageError, match="the manifest says 39 deleted ids of table 't', and its files have 40"),
    ):
        package.lookup("t", [1])


# ---- processes, threads, stores, closing ----


def _look_up(package: Package, queue: Any) -> None:
    queue.put(package.lookup("t", NEW["t"][0])[0].tobytes())


def test_a_forked_and_a_pickled_reader_give_the_same_rows(copied: Deltas) -> None:
    with dist_export.open_package(copied.delta) as package:
        expected = package.lookup("t", NEW["t"][0])[0].tobytes()
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_look_up, args=(package, queue))
        child.start()
        assert queue.get(timeout=60) == expected
        child.join()
        again = pickle.loads(pickle.dumps(package))
        assert again.lookup("t", NEW["t"][0])[0].tobytes() == expected


def test_a_pickled_reader_keeps_the_base_that_was_given(copied: Deltas, tmp_path: Path) -> None:
    elsewhere = copied.base.rename(tmp_path / "elsewhere")
    package = pickle.loads(pickle.dumps(dist_export.open_package(copied.delta, base=elsewhere)))
    assert package.lookup("t", NEW["t"][0])[1].all()


def test_any_thread_may_look_up(copied: Deltas) -> None:
    with dist_export.open_package(copied.delta) as package, ThreadPoolExecutor(8) as pool:
        barrier = threading.Barrier(8)

        def look_up(_: int) -> bytes:
            barrier.wait()
            return package.lookup("t", ids_of("t"))[0].tobytes()

        assert len(set(pool.map(look_up, range(8)))) == 1


def test_both_directories_may_go_once_the_delta_is_open(copied: Deltas) -> None:
    with dist_export.open_package(copied.delta) as package, dist_export.open_package(copied.full) as full:
        shutil.rmtree(copied.base)
        shutil.rmtree(copied.delta)
        assert_same_rows(package, full)


def test_a_store_gives_the_same_rows_through_a_cache(copied: Deltas, tmp_path: Path) -> None:
    fs = MemoryFileSystem()
    for path in (copied.base, copied.delta):
        fs.put(str(path), f"/deltas/{path.name}", recursive=True)
    try:
        with (
            dist_export.open_package("memory://deltas/delta", cache_dir=tmp_path / "cache") as package,
            dist_export.open_package(copied.full) as full,
        ):
            assert package.base.directory.url == "memory://deltas/base"
            assert_same_rows(package, full)
            assert len(list((tmp_path / "cache").iterdir())) == 2
    finally:
        fs.rm("/deltas", recursive=True)


def is_open(package: Package) -> bool:
    try:
        return bool(package.lookup("kept", OLD["kept"][0])[1].all())
    except PackageError as error:
        assert "the package was closed" in str(error)
        return False


def test_a_base_is_closed_with_its_delta(copied: Deltas) -> None:
    package = dist_export.open_package(copied.delta)
    base = package.base
    package.close()
    assert not is_open(base)
    assert not is_open(package)


def test_a_base_of_two_deltas_is_closed_with_the_second_and_once(copied: Deltas) -> None:
    first = dist_export.open_package(copied.delta)
    second = Package(open_directory(copied.delta), opened=first)
    assert second.base is first.base
    first.close()
    first.close()
    assert is_open(second)
    second.close()
    assert not is_open(first.base)


def test_a_full_package_that_became_a_base_outlives_the_delta(copied: Deltas) -> None:
    base = dist_export.open_package(copied.base)
    delta = Package(open_directory(copied.delta), opened=base)
    assert delta.base is base
    delta.close()
    assert is_open(base)
    base.close()
    assert not is_open(base)


def test_a_delta_that_is_gone_closes_no_base_that_somebody_has(copied: Deltas) -> None:
    base = dist_export.open_package(copied.delta).base
    gc.collect()
    assert is_open(base)


def test_an_open_package_of_another_digest_is_no_base(copied: Deltas) -> None:
    full = dist_export.open_package(copied.full)
    with Package(open_directory(copied.delta), opened=full) as delta:
        assert delta.base.directory.path == str(copied.base)


def test_a_base_that_was_open_and_is_gone_is_not_taken(copied: Deltas) -> None:
    base = dist_export.open_package(copied.base)
    shutil.rmtree(copied.base)
    with pytest.raises(PackageError, match="needs that base"):
        Package(open_directory(copied.delta), opened=base)


def test_the_account_of_the_helper_is_that_of_the_states() -> None:
    _, account, gone = delta_by_hand._compare(OLD["t"], NEW["t"])
    assert account == {"rows_base": 500, "same": 430, "changed": 30, "new": 25, "deleted": 40}
    assert len(gone) == 40
