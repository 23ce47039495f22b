"""An open package stays the one that it was, or says that it was replaced, whatever happens to its directory."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import dist_export
from dist_export.errors import PackageError, UserError
from dist_export.manifest import MANIFEST
from dist_export.package import file_pool, opened_files, slot_reader
from dist_export.package.reader import Package
from dist_export.storage.urls import open_directory
from dist_export.verify.verify import verify
from dist_export.workdir import swap
from dist_export.workdir.state import finish_commit
from tests.support.recis_writer import PartSpec, make_tables, write_checkpoint

IDS = np.arange(40)
SHARD = "model-000000-of-000004.safetensors"


def write_source(folder: Path, value: float) -> Path:
    """A checkpoint whose rows all hold one value: a lookup that mixes two packages shows both."""
    rows = np.full((len(IDS), 4), value, np.float32)
    write_checkpoint(folder, {"t": [PartSpec(IDS, {"embedding": rows}, (0, 65536, 65536))]})
    return folder


def export(source: Path, out: Path | str, **more: object) -> None:
    settings = {"ckpt_dir": str(source), "export_dir": str(out), "filter_sparse_opt": True, "num_shards": 4, **more}
    dist_export.export(settings)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    export(write_source(tmp_path / "ckpt-1", 1.0), tmp_path / "out")
    write_source(tmp_path / "ckpt-2", 2.0)
    return tmp_path / "out"


def values_of(package: Package) -> set[float]:
    rows, has_row = package.lookup("t", IDS)
    assert has_row.all()
    return set(rows.ravel().tolist())


def open_bare(out: Path | str) -> Package:
    """Open without holding files, as a package of more than can be held is open."""
    return Package(open_directory(str(out)))


def test_a_package_that_was_replaced_is_read_on(out: Path, tmp_path: Path) -> None:
    package = dist_export.open_package(out)
    export(tmp_path / "ckpt-2", out, overwrite=True)
    assert values_of(package) == {1.0}
    assert values_of(dist_export.open_package(out)) == {2.0}


def test_files_that_were_not_open_yet_say_that_they_were_replaced(out: Path, tmp_path: Path) -> None:
    package = open_bare(out)
    export(tmp_path / "ckpt-2", out, overwrite=True)
    with pytest.raises(PackageError, match=r"is gone since the package was opened, so it was replaced; open it again"):
        package.lookup("t", IDS)


def overwrite_in_place(file: Path) -> None:
    """Another content of the same size in the same inode, with the time set back."""
    before = file.stat()
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def put_another(file: Path) -> None:
    copy = file.with_suffix(".copy")
    shutil.copy2(file, copy)
    os.replace(copy, file)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 8)


@pytest.mark.parametrize("change", [overwrite_in_place, put_another, cut, os.unlink])
def test_a_file_that_changes_is_found_before_its_first_read(change: Callable[[Path], None], out: Path) -> None:
    package = open_bare(out)
    change(out / SHARD)
    with pytest.raises(
        PackageError, match=r"(is gone|has changed) since the package was opened.*replaced; open it again"
    ):
        package.lookup("t", IDS)


@pytest.mark.parametrize("change", [overwrite_in_place, cut])
def test_a_file_that_is_open_and_changes_is_found(change: Callable[[Path], None], out: Path) -> None:
    package = dist_export.open_package(out)
    assert values_of(package) == {1.0}
    change(out / SHARD)
    with pytest.raises(PackageError, match=r"has changed since the package was opened.*replaced; open it again"):
        package.lookup("t", IDS)


@pytest.mark.parametrize("change", [put_another, os.unlink])
def test_a_file_that_is_open_is_read_on_when_its_name_goes(change: Callable[[Path], None], out: Path) -> None:
    package = dist_export.open_package(out)
    change(out / SHARD)
    assert values_of(package) == {1.0}


def test_what_is_changed_while_it_is_read_is_no_answer(out: Path, monkeypatch) -> None:
    """Between the search for ids and the reading of rows: the rows may be of both."""
    package = dist_export.open_package(out)
    values_of(package)
    real = slot_reader.find_rows

    def find_rows(*columns, **numbers):
        found = real(*columns, **numbers)
        monkeypatch.setattr(slot_reader, "find_rows", real)
        overwrite_in_place(out / SHARD)
        return found

    monkeypatch.setattr(slot_reader, "find_rows", find_rows)
    with pytest.raises(PackageError, match=r"has changed since the package was opened"):
        package.lookup("t", IDS)


def export_again(out: Path, tmp_path: Path) -> None:
    for turn in range(12):
        export(tmp_path / f"ckpt-{2 - turn % 2}", out, overwrite=True)


def exchange_often(out: Path, tmp_path: Path) -> None:
    """Put whole packages in each other's place, as a commit does."""
    for number in (1, 2):
        export(tmp_path / f"ckpt-{number}", tmp_path / f"out-{number}")
    for turn in range(200):
        fresh = shutil.copytree(tmp_path / f"out-{2 - turn % 2}", swap.beside(str(out), "next"))
        swap.replace_directory(str(fresh), str(out))
        finish_commit(open_directory(out))


@pytest.mark.parametrize("replace", [export_again, exchange_often])
def test_a_writer_in_a_loop_and_readers_all_along(
    replace: Callable[[Path, Path], None], out: Path, tmp_path: Path
) -> None:
    """Each lookup gives the rows of one package, the one that is open, or says that it was replaced."""
    stop = threading.Event()
    wrong: list[object] = []
    counts = {"answers": 0, "replaced": 0}

    def look_up(open_it: Callable[[Path], Package]) -> None:
        while not stop.is_set():
            try:
                with open_it(out) as package:
                    first = values_of(package)
                    for _ in range(20):
                        found = values_of(package)
                        if len(found) > 1 or found != first:
                            wrong.append((first, found))
                        counts["answers"] += 1
            except PackageError as error:
                counts["replaced"] += 1
                if "replaced" not in str(error):
                    wrong.append(error)
            except BaseException as error:
                wrong.append(error)

    readers = [threading.Thread(target=look_up, args=(how,)) for how in (dist_export.open_package, open_bare)]
    for reader in readers:
        reader.start()
    try:
        replace(out, tmp_path)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert wrong == []
    assert counts["answers"] > 0


def test_threads_share_a_package_with_few_descriptors(out: Path, monkeypatch) -> None:
    monkeypatch.setattr(file_pool, "_MAX_HELD", 1)
    package = dist_export.open_package(out)
    found: list[object] = []

    def look_up() -> None:
        for _ in range(50):
            try:
                found.append(values_of(package))
            except BaseException as error:
                found.append(error)

    threads = [threading.Thread(target=look_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{1.0}] * 200
    shards = [fd for fd in open_files() if fd.startswith(f"{out}/model-")]
    assert len(shards) <= 2, "one file, and its mapping"


def open_files() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        if os.path.lexists(f"/proc/self/fd/{fd}"):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def test_another_process_opens_it_anew_or_hears_that_it_was_replaced(out: Path, tmp_path: Path) -> None:
    told = pickle.dumps(dist_export.open_package(out))
    assert values_of(pickle.loads(told)) == {1.0}
    export(tmp_path / "ckpt-1", out, overwrite=True)
    assert values_of(pickle.loads(told)) == {1.0}, "another export of the same content"
    export(tmp_path / "ckpt-2", out, overwrite=True)
    with pytest.raises(PackageError, match="was replaced since it was opened; open it again"):
        pickle.loads(told)


def test_descriptors_are_given_back(out: Path) -> None:
    package = dist_export.open_package(out)
    assert len([file for file in open_files() if file.startswith(str(out))]) == 9, (
        "directory, manifest, index, tensorkey.json, a row index, four shards"
    )
    package.close()
    assert not [file for file in open_files() if file.startswith(str(out))]
    package = dist_export.open_package(out)
    del package
    gc.collect()
    assert not [file for file in open_files() if file.startswith(str(out))]


def test_a_closed_package_says_that_it_is_closed(out: Path, tmp_path: Path) -> None:
    """Another package, or another file, may have its descriptors by then."""
    package, bare = dist_export.open_package(out), open_bare(out)
    table = package.manifest.tables[0].name
    package.lookup(table, [1])
    for one in (package, bare):
        one.close()
    other = dist_export.open_package(out)
    for one in (package, bare):
        with pytest.raises(PackageError, match=f"^{out}: the package was closed; open it again$"):
            one.lookup(table, [1])
    other.lookup(table, [1])


def test_a_package_that_is_replaced_while_it_is_opened_is_one_or_the_other(
    out: Path, tmp_path: Path, monkeypatch
) -> None:
    """Its directory is found, and then another one is there: the manifest would be of none, or of the other."""
    real = opened_files.OpenedFiles.anchor
    exports = [tmp_path / "ckpt-2", tmp_path / "ckpt-1"]

    def replace_and_read(self, name):
        if exports:
            export(exports.pop(0), out, overwrite=True)
        return real(self, name)

    monkeypatch.setattr(opened_files.OpenedFiles, "anchor", replace_and_read)
    package = dist_export.open_package(out)
    assert exports == []
    assert values_of(package) == {1.0}


def test_a_shard_that_was_missing_at_the_opening_is_called_missing(out: Path) -> None:
    (out / SHARD).unlink()
    package = dist_export.open_package(out)
    with pytest.raises(PackageError, match=rf"{SHARD} is missing$"):
        package.lookup("t", IDS)


def test_a_file_that_ends_too_early_is_the_packages_error_without_an_exporters_advice(out: Path, monkeypatch) -> None:
    """Where the disk gives less than it says that it has."""
    package = dist_export.open_package(out)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(PackageError, match=r"ended at byte \d+, .* before the end of a planned read") as caught:
        package.lookup("t", IDS)
    assert "xport" not in str(caught.value).replace(str(out), "")


def test_links_that_lead_out_are_refused_and_others_read(out: Path, tmp_path: Path) -> None:
    (out / SHARD).rename(tmp_path / "elsewhere")
    (out / SHARD).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackageError, match=r"is a link that leads out of the directory, to .*elsewhere"):
        dist_export.open_package(out).lookup("t", IDS)
    (tmp_path / "elsewhere").rename(out / "real")
    (out / SHARD).unlink()
    (out / SHARD).symlink_to("real")
    assert values_of(dist_export.open_package(out)) == {1.0}


def test_verify_says_nothing_of_a_package_that_was_replaced_meanwhile(out: Path, tmp_path: Path, monkeypatch) -> None:
    from dist_export.verify import verify as module

    real = module.conclude

    def replace(*arguments):
        export(tmp_path / "ckpt-2", out, overwrite=True)
        real(*arguments)

    monkeypatch.setattr(module, "conclude", replace)
    with pytest.raises(UserError, match=r"was replaced or changed while it was being checked.*run verify again"):
        verify(str(out))
    monkeypatch.undo()
    assert verify(str(out)).findings == []


OUT = "memory://opened/out"


def test_on_a_store_another_object_is_not_taken_for_the_packages(tmp_path: Path) -> None:
    MemoryFileSystem.store.clear()
    export(write_source(tmp_path / "ckpt-1", 1.0), OUT)
    package = dist_export.open_package(OUT)
    assert values_of(package) == {1.0}
    unread = dist_export.open_package(OUT)
    MemoryFileSystem().rm("/opened/out", recursive=True)
    with pytest.raises(PackageError, match=r"is gone since the package was opened, so it was replaced; open it again"):
        package.lookup("t", IDS)
    export(write_source(tmp_path / "ckpt-2", 2.0), OUT)
    for old in (package, unread):
        with pytest.raises(PackageError, match=r"has changed since the package was opened.*open it again"):
            old.lookup("t", IDS)
    assert values_of(dist_export.open_package(OUT)) == {2.0}
    MemoryFileSystem.store.clear()


def test_the_manifest_alone_is_read_at_the_opening(out: Path, monkeypatch) -> None:
    """Of the shards only their states are looked at: a package of terabytes opens at once."""
    read: list[str] = []
    real = os.preadv

    def note(fd, buffers, offset):
        read.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", note)
    dist_export.open_package(out)
    assert set(read) == {MANIFEST}


def test_tables_of_several_parts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 60, "u": 30}, 3))
    export(tmp_path / "ckpt", tmp_path / "many")
    package = dist_export.open_package(tmp_path / "many")
    shutil.rmtree(tmp_path / "many")
    assert package.lookup("u", [1])[0].shape[0] == 1


def touch(file: Path) -> None:
    os.utime(file, ns=(1, 1))


def change_mode(file: Path) -> None:
    file.chmod(0o640)


def rewrite(file: Path) -> None:
    """The same bytes in the same inode."""
    file.write_bytes(file.read_bytes())


@pytest.mark.parametrize("digest", ["xxh3", "sha256"])
@pytest.mark.parametrize("name", [SHARD, MANIFEST, "index"])
@pytest.mark.parametrize("open_it", [open_bare, dist_export.open_package], ids=["bare", "held"])
@pytest.mark.parametrize("change", [touch, change_mode, rewrite])
def test_a_file_whose_times_alone_change_is_the_packages(
    change, open_it, name: str, digest: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(write_source(tmp_path / "ckpt", 1.0), out, digest=digest)
    package = open_it(out)
    change(out / name)
    assert values_of(package) == {1.0}
    assert package.files.is_current()
    change(out / name)
    assert values_of(package) == {1.0}
    overwrite_in_place(out / SHARD)
    with pytest.raises(PackageError, match="has changed since the package was opened"):
        package.lookup("t", IDS)


def test_its_content_is_read_once_for_a_change(out: Path, monkeypatch) -> None:
    package = dist_export.open_package(out)
    read: list[int] = []
    real = opened_files.read_pieces_of
    monkeypatch.setattr(opened_files, "read_pieces_of", lambda fd: (read.append(fd), real(fd))[1])
    values_of(package)
    assert not read
    change_mode(out / SHARD)
    for _ in range(3):
        assert values_of(package) == {1.0}
    assert len(read) == 1


def test_without_a_digest_a_change_of_times_is_a_change(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(write_source(tmp_path / "ckpt", 1.0), out, digest="none")
    package = dist_export.open_package(out)
    change_mode(out / SHARD)
    with pytest.raises(PackageError, match="has changed since the package was opened"):
        package.lookup("t", IDS)


def test_whether_it_is_current_goes_by_content_too(out: Path) -> None:
    package = open_bare(out)
    touch(out / SHARD)
    assert package.files.is_current()
    overwrite_in_place(out / SHARD)
    assert not package.files.is_current()


def test_an_id_between_the_slices_of_a_copy_has_no_row(tmp_path: Path) -> None:
    """Two parts, and a gap between and behind their slices."""
    parts = [
        PartSpec(np.arange(first, first + 50), {"embedding": np.ones((50, 4), np.float32)}, (first, first + 100, 65536))
        for first in (0, 1000)
    ]
    source = write_checkpoint(tmp_path / "ckpt", {"t": parts})
    export(source, tmp_path / "out", filter_sparse_opt=False, num_shards=None)
    with dist_export.open_package(tmp_path / "out") as package:
        _, has_row = package.lookup("t", [60_000, 1049, 500, 49, 0, 1050])
        assert has_row.tolist() == [False, True, False, True, True, False]
