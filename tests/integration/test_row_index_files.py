"""The row indexes of a package: written with the shards, used by lookups, checked by verify."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

import dist_export
from dist_export.commit import row_indexes
from dist_export.errors import CommitError, PackageError
from dist_export.formats.digests import digest_bytes
from dist_export.formats.row_index import EMPTY, SLOT
from dist_export.manifest import Manifest, PartEntry, RowIndexEntry, decode_manifest, encode_manifest, seal
from dist_export.package import columns, local_cache, slot_reader
from dist_export.storage.staging import Staging
from dist_export.verify.verify import verify
from tests.support.recis_writer import make_tables, split_table, truth_of, write_checkpoint
from tests.support.sparse_cases import copy, export

INDEX = "model-000000-of-000002.row_index"
IDS = truth_of(make_tables({"a": 5_000, "b": 300, "empty": 0}, 3))["a"]["id"]
Change = Callable[[np.ndarray], None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "ckpt"
    write_checkpoint(folder, make_tables({"a": 5_000, "b": 300, "empty": 0}, 3))
    return folder


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export(source, out, num_shards=2)
    return out


@pytest.fixture
def package(exported: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(exported, tmp_path / "out")


def parts_of(manifest: Manifest) -> list[PartEntry]:
    return [part for table in manifest.tables for part in table.parts]


def entry_of(package: Path, place: int = 0) -> RowIndexEntry:
    entry = parts_of(dist_export.open_package(package).manifest)[place].row_index
    assert isinstance(entry, RowIndexEntry)
    return entry


def refuse_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(*_: object) -> None:
        raise AssertionError("the ids were read")

    monkeypatch.setattr(slot_reader.SlotReader, "_scan", scan)


def check_rows(package: Path | str, source: Path) -> None:
    """Compare each row with the truth, and ids without a row."""
    opened = dist_export.open_package(package)
    for name, truth in truth_of(make_tables({"a": 5_000, "b": 300, "empty": 0}, 3)).items():
        ids = np.concatenate([truth["id"], truth["id"][::-1], truth["id"] + (1 << 50)])
        found, has_row = opened.lookup(name, ids)
        count = len(truth["id"])
        assert has_row.tolist() == [True] * 2 * count + [False] * count
        assert np.array_equal(found[:count], truth["embedding"])
        assert np.array_equal(found[count : 2 * count], truth["embedding"][::-1])
        assert not found[2 * count :].any()


def test_each_id_is_found_without_reading_the_ids(source: Path, exported: Path, monkeypatch) -> None:
    refuse_scans(monkeypatch)
    check_rows(exported, source)


def test_each_shard_has_one_file_that_the_manifest_names(exported: Path) -> None:
    manifest = dist_export.open_package(exported).manifest
    names = sorted(path.name for path in exported.glob("*.row_index"))
    assert names == [INDEX, "model-000001-of-000002.row_index"]
    assert [file.path for file in manifest.files if file.path.endswith(".row_index")] == names
    for part in parts_of(manifest):
        if not part.rows:
            assert part.row_index is msgspec.UNSET
            continue
        assert isinstance(part.row_index, RowIndexEntry)
        assert part.row_index.file == part.file.replace(".safetensors", ".row_index")
        assert part.row_index.num_slots * 4 < 6 * part.rows + 100


def test_without_row_index_there_is_none_and_the_rows_are_the_same(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = export(source, tmp_path / "out", num_shards=2, row_index=False)
    assert all(part.row_index is msgspec.UNSET for part in parts_of(manifest))
    assert not list((tmp_path / "out").glob("*.row_index"))
    with caplog.at_level(logging.INFO, logger="dist_export"):
        check_rows(tmp_path / "out", source)
    told = [record.getMessage() for record in caplog.records if "has no row index" in record.getMessage()]
    assert len(told) == 2, "once for each table with rows"


def test_a_small_memory_gives_the_same_bytes(source: Path, exported: Path, tmp_path: Path, monkeypatch) -> None:
    """The ids of a part that does not fit are read in several passes."""
    real = row_indexes.RowIndexWriter.__init__
    passes = []

    def init(self, *args, held_ids, **more) -> None:
        real(self, *args, held_ids=100, **more)

    def collect(self, *args):
        passes.append(args)
        return real_collect(self, *args)

    real_collect = row_indexes.RowIndexWriter._collect
    monkeypatch.setattr(row_indexes.RowIndexWriter, "__init__", init)
    monkeypatch.setattr(row_indexes.RowIndexWriter, "_collect", collect)
    export(source, tmp_path / "out", num_shards=2)
    assert len(passes) > 50
    for name in (INDEX, "model-000001-of-000002.row_index"):
        assert (tmp_path / "out" / name).read_bytes() == (exported / name).read_bytes()


def test_crafted_ids_get_another_seed(tmp_path: Path, monkeypatch) -> None:
    inverse = np.uint64(pow(0xD6E8FEB86659FD93, -1, 1 << 64))
    mixed = np.uint64(77_777 << 32) | np.arange(3_000, dtype=np.uint64)
    mixed ^= (mixed >> np.uint64(29)) ^ (mixed >> np.uint64(58))
    for _ in range(2):
        mixed *= inverse
        mixed ^= mixed >> np.uint64(32)
    ids = mixed.view(np.int64)
    values = np.arange(3_000, dtype=np.float32)[:, None] * np.ones(4, np.float32)
    write_checkpoint(tmp_path / "ckpt", {"t": split_table(ids, {"embedding": values}, 2)})
    manifest = export(tmp_path / "ckpt", tmp_path / "out", num_shards=1)
    (part,) = parts_of(manifest)
    assert isinstance(part.row_index, RowIndexEntry)
    assert part.row_index.seed == 1
    refuse_scans(monkeypatch)
    rows, has_row = dist_export.open_package(tmp_path / "out").lookup("t", ids)
    assert has_row.all()
    assert np.array_equal(rows, values)
    assert not verify(str(tmp_path / "out")).findings


@pytest.mark.parametrize("held_ids", [100, 1_000_000])
def test_a_part_whose_ids_collide_for_all_seeds_has_none(source: Path, tmp_path: Path, monkeypatch, held_ids) -> None:
    monkeypatch.setattr(row_indexes, "MOST_PROBES", 0)
    manifest = export(source, tmp_path / "out", num_shards=2)
    assert all(part.row_index is msgspec.UNSET for part in parts_of(manifest) if part.rows > 10)
    assert any("4 parts have no row index" in note for note in manifest.notes)
    check_rows(tmp_path / "out", source)
    assert not verify(str(tmp_path / "out")).findings


def test_a_copy_has_row_indexes_beside_its_files(source: Path, tmp_path: Path, monkeypatch) -> None:
    manifest = copy(source, tmp_path / "out")
    assert all(isinstance(part.row_index, RowIndexEntry) == bool(part.rows) for part in parts_of(manifest))
    refuse_scans(monkeypatch)
    check_rows(tmp_path / "out", source)
    assert not verify(str(tmp_path / "out")).findings


def test_in_place_the_row_indexes_are_written_beside_the_files_of_the_checkpoint(
    source: Path, tmp_path: Path, monkeypatch
) -> None:
    folder = shutil.copytree(source, tmp_path / "ckpt")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    copy(folder, folder)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert len(list(folder.glob("*.row_index"))) == 3
    refuse_scans(monkeypatch)
    check_rows(folder, source)
    assert not verify(str(folder)).findings


def test_ids_at_any_byte_are_read(source: Path, tmp_path: Path, monkeypatch) -> None:
    """A header without padding: in a copy, ids and rows begin at any byte."""
    offsets = set()
    for length in range(8):
        tables = {"t" + "x" * length: split_table(np.arange(90) * 7, {"embedding": np.eye(90, 3, dtype=np.float32)}, 1)}
        write_checkpoint(tmp_path / f"ckpt-{length}", tables, header_padding=False)
        copy(tmp_path / f"ckpt-{length}", tmp_path / f"out-{length}")
        with monkeypatch.context() as patched:
            refuse_scans(patched)
            opened = dist_export.open_package(tmp_path / f"out-{length}")
            rows, has_row = opened.lookup("t" + "x" * length, np.arange(90 * 7))
        assert np.flatnonzero(has_row).tolist() == list(range(0, 630, 7))
        assert np.array_equal(rows[::7], np.eye(90, 3, dtype=np.float32))
        header = opened.header(opened.manifest.tables[0].parts[0].file)
        offsets |= set((header.begins % 8).tolist())
        assert not verify(str(tmp_path / f"out-{length}")).findings
    assert len(offsets) == 4


def test_a_store_is_read_by_ranges(source: Path, monkeypatch) -> None:
    url = "memory://row-index/out"
    export(source, url, num_shards=2)
    refuse_scans(monkeypatch)
    check_rows(url, source)
    assert not verify(url).findings


def find_by_specification(package: Path, part: PartEntry, sought: int) -> int | None:
    """Find a row as docs/reference/package-format.md says, section 8, with Python's numbers and the safetensors package."""
    entry = part.row_index
    assert isinstance(entry, RowIndexEntry)
    raw = (package / entry.file).read_bytes()
    assert raw[:16] == b"rowindex" + b"\x01" + bytes(7)
    mask, multiplier = (1 << 64) - 1, 0xD6E8FEB86659FD93
    h = (sought & mask) ^ (entry.seed * 0x9E3779B97F4A7C15 & mask)
    for _ in range(2):
        h = (h ^ h >> 32) * multiplier & mask
    hashed = (h ^ h >> 29) >> 32
    slot = hashed * -(-part.rows * 10 // 7) >> 32
    ids = load_file(package / part.file)[part.keys["id"]]
    for number in range(slot, slot + entry.longest_probe + 1):
        row = int.from_bytes(raw[entry.offset + 4 * number : entry.offset + 4 * number + 4], "little")
        if row == 0xFFFFFFFF:
            return None
        if ids[row] == sought:
            return row
    return None


def test_a_reader_that_knows_the_specification_alone_finds_each_row(exported: Path) -> None:
    table = dist_export.open_package(exported).table("b")
    found = 0
    for part in table.parts:
        ids = load_file(exported / part.file)[part.keys["id"]].tolist()
        assert [find_by_specification(exported, part, sought) for sought in ids] == list(range(part.rows))
        assert find_by_specification(exported, part, ids[0] + 1) is None
        found += len(ids)
    assert found == 300


# ---- interrupted exports ----


def interrupt_before_commit(source: Path, out: Path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise CommitError("interrupted")

    with monkeypatch.context() as patched:
        patched.setattr("dist_export.pipeline.small_files.render_indexes", fail)
        with pytest.raises(CommitError, match="interrupted"):
            export(source, out, num_shards=2)
    assert (out / INDEX).exists()


def test_a_rerun_takes_over_what_is_whole(source: Path, exported: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    interrupt_before_commit(source, out, monkeypatch)
    before = os.stat(out / INDEX).st_ino
    damaged = out / "model-000001-of-000002.row_index"
    data = bytearray(damaged.read_bytes())
    data[100] ^= 1
    damaged.write_bytes(data)
    export(source, out, num_shards=2)
    assert os.stat(out / INDEX).st_ino == before
    assert damaged.read_bytes() == (exported / damaged.name).read_bytes()
    assert not verify(str(out)).findings


def test_another_export_leaves_none_of_it(source: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    interrupt_before_commit(source, out, monkeypatch)
    manifest = export(source, out, num_shards=2, row_index=False)
    assert not list(out.glob("*.row_index"))
    assert not manifest.run["left_alone"]


def test_a_file_of_somebody_else_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / INDEX).write_text("mine")
    with pytest.raises(
        dist_export.errors.UserError, match=rf"{INDEX} is there already, and dist_export did not write it"
    ):
        export(source, tmp_path / "out", num_shards=2)
    assert (tmp_path / "out" / INDEX).read_text() == "mine"


# ---- damage ----


def edit(package: Path, change: Change, place: int = 0) -> None:
    """Change the slots of a part, and make all digests anew: verify must find it by the slots alone."""
    entry = entry_of(package, place)
    path = package / entry.file
    data = bytearray(path.read_bytes())
    end = entry.offset + entry.num_slots * 4
    slots = np.frombuffer(bytes(data[entry.offset : end]), SLOT).copy()
    change(slots)
    data[entry.offset : end] = slots.tobytes()
    path.write_bytes(data)
    reseal(package, entry.file)


def reseal(package: Path, name: str = "", change: Callable[[Manifest], Manifest] = lambda it: it) -> None:
    manifest = change(decode_manifest((package / "manifest.json").read_bytes(), where=""))
    files = tuple(
        msgspec.structs.replace(file, digest=digest_bytes((package / name).read_bytes())) if file.path == name else file
        for file in manifest.files
    )
    sealed = seal(msgspec.structs.replace(manifest, files=files))
    (package / "manifest.json").write_bytes(encode_manifest(sealed))


def exchange(slots: np.ndarray) -> None:
    first, second = (int(np.flatnonzero(slots == row)[0]) for row in (5, 6))
    slots[[first, second]] = slots[[second, first]]


def drop(slots: np.ndarray) -> None:
    slots[np.flatnonzero(slots == 5)] = EMPTY


def add(slots: np.ndarray) -> None:
    slots[np.flatnonzero(slots == EMPTY)[3]] = 5


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (exchange, "2 of 2,477 ids of 'a.id/part_0_2' are not found at their row"),
        (drop, "1 of 2,477 ids of 'a.id/part_0_2' are not found at their row"),
        (add, "holds 2,478 rows, and the part has 2,477"),
    ],
)
def test_verify_finds_slots_that_are_wrong(package: Path, change: Change, finding: str) -> None:
    edit(package, change)
    (found,) = verify(str(package)).found
    assert (found.file, found.check) == (INDEX, "row_index")
    assert re.search(finding, found.message), found.message


def set_entry(**changes: object) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        table, *others = manifest.tables
        part, *rest = table.parts
        assert isinstance(part.row_index, RowIndexEntry)
        part = msgspec.structs.replace(part, row_index=msgspec.structs.replace(part.row_index, **changes))
        table = msgspec.structs.replace(table, parts=(part, *rest))
        return msgspec.structs.replace(manifest, tables=(table, *others))

    return change


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"offset": 65}, "begin at byte 65"),
        ({"num_slots": 1 << 40}, "do not lie in a file"),
        ({"num_slots": 3}, "3 slots for"),
        ({"seed": 9}, "its seed is 9"),
        ({"longest_probe": 1 << 20}, "its longest probe is 1,048,576"),
        ({"file": "model-000000-of-000002.safetensors"}, "are not found at their row"),
        ({"file": "other.row_index"}, "which it does not list"),
        ({"seed": 2}, "are not found at their row"),
        ({"offset": 128}, "are not found at their row"),
    ],
)
def test_an_entry_that_cannot_be_is_a_finding_and_never_a_wrong_row(
    package: Path, source: Path, changes: dict[str, object], finding: str
) -> None:
    reseal(package, change=set_entry(**changes))
    messages = [found.message for found in verify(str(package)).found]
    assert any(finding in message for message in messages), messages
    truth = truth_of(make_tables({"a": 5_000, "b": 300, "empty": 0}, 3))["a"]
    try:
        rows, has_row = dist_export.open_package(package).lookup("a", truth["id"])
    except PackageError as error:
        assert "row" in str(error)
    else:  # the ids confirm each row, so at worst one is missing
        assert np.array_equal(rows[has_row], truth["embedding"][has_row])


def test_a_path_out_of_the_package_is_refused(package: Path) -> None:
    raw = (package / "manifest.json").read_bytes().replace(f'"{INDEX}"'.encode(), b'"../../etc/x.row_index"')
    (package / "manifest.json").write_bytes(raw)
    with pytest.raises(PackageError, match="does not lie in the package"):
        dist_export.open_package(package)


def overwrite(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def cut(path: Path) -> None:
    os.truncate(path, 100)


@pytest.mark.parametrize("change", [overwrite, cut, Path.unlink])
def test_a_damaged_file_is_an_error_at_the_first_lookup(change: Callable[[Path], None], package: Path) -> None:
    change(package / INDEX)
    with pytest.raises(PackageError, match=INDEX):
        dist_export.open_package(package).lookup("a", IDS)


@pytest.mark.parametrize("name", [INDEX, "model-000000-of-000002.safetensors"])
@pytest.mark.parametrize("change", [overwrite, cut])
def test_a_mapped_file_that_changes_is_an_error(change: Callable[[Path], None], name: str, package: Path) -> None:
    opened = dist_export.open_package(package)
    assert opened.lookup("a", IDS)[1].any()
    change(package / name)
    with pytest.raises(PackageError, match=r"has changed since the package was opened.*replaced; open it again"):
        opened.lookup("a", IDS)


def test_a_forked_child_reads_the_same_package(package: Path) -> None:
    opened = dist_export.open_package(package)
    ids = IDS
    expected = opened.lookup("a", ids)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        found = opened.lookup("a", ids)
        same = all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
        os.write(write, b"1" if same else b"0")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 1) == b"1"
    os.close(read)
    os.close(write)


# ---- stores ----


def test_a_cache_asks_the_store_for_rows_alone(source: Path, tmp_path: Path, monkeypatch) -> None:
    url = "memory://row-index/cached"
    export(source, url, num_shards=2)
    expected = dist_export.open_package(url).lookup("a", IDS)
    opened = dist_export.open_package(url, cache_dir=tmp_path / "cache")
    found = opened.lookup("a", IDS)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    again = dist_export.open_package(url, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(local_cache.LocalCache, "_fetch", None)
    monkeypatch.setattr(columns.StoredColumn, "take", None)
    found = again.lookup("a", IDS)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_another_package_is_not_read_from_the_cache(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_checkpoint(other, make_tables({"a": 5_000, "b": 300, "empty": 0}, 3, seed=9))
    for number, folder in enumerate((source, other)):
        url = f"memory://row-index/{number}"
        export(folder, url, num_shards=2)
        has_row = dist_export.open_package(url, cache_dir=tmp_path / "cache").lookup("a", IDS)[1]
        assert has_row.all() == (folder is source)


def zero(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(bytes(len(data) - 16) + data[-16:])


@pytest.mark.parametrize("change", [cut, zero])
def test_a_cache_that_was_damaged_is_fetched_again(
    change: Callable[[Path], None], source: Path, tmp_path: Path
) -> None:
    url = f"memory://row-index/{change.__name__}"
    export(source, url, num_shards=2)
    expected = dist_export.open_package(url, cache_dir=tmp_path / "cache").lookup("a", IDS)
    for path in (tmp_path / "cache").rglob("*-*"):
        change(path)
    found = dist_export.open_package(url, cache_dir=tmp_path / "cache").lookup("a", IDS)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_cache_that_cannot_be_written_is_a_mistake(source: Path, tmp_path: Path) -> None:
    url = "memory://row-index/unwritable"
    export(source, url, num_shards=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(dist_export.errors.UserError, match=r"cache_dir: .*file.* cannot be used"):
        dist_export.open_package(url, cache_dir=tmp_path / "file").lookup("a", IDS)


def test_a_killed_export_leaves_no_index_that_the_next_one_does_not_know(
    source: Path, tmp_path: Path, monkeypatch
) -> None:
    """It ends right after the file got its name."""
    real = Staging.publish

    def publish(self: Staging, name: str) -> None:
        real(self, name)
        if name == INDEX:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Staging, "publish", publish)
        with pytest.raises(KeyboardInterrupt):
            export(source, tmp_path / "out", num_shards=2)
    assert (tmp_path / "out" / INDEX).exists()
    manifest = export(source, tmp_path / "out", num_shards=2, row_index=False)
    assert not list((tmp_path / "out").glob("*.row_index"))
    assert not manifest.run["left_alone"]
