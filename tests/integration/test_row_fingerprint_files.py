"""The row fingerprints of a package: written with the shards, read by rows, checked by verify."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import dist_export
from dist_export.config.loader import load_config
from dist_export.errors import CommitError, PackageError, UserError
from dist_export.formats.digests import digest_bytes
from dist_export.formats.tuning import Tuning
from dist_export.inspect.describe import describe, render
from dist_export.manifest import Manifest, PartEntry, RowFingerprintsEntry, decode_manifest, encode_manifest, seal
from dist_export.package.row_fingerprints import open_fingerprints
from dist_export.pipeline.dry_run import make_report, render_report
from dist_export.storage.staging import Staging
from dist_export.verify.verify import verify
from tests.support import sparse_cases
from tests.support.numbered_cases import numbered_tables, write_numbered
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.row_fingerprints import read_fingerprints

A = "model-000000-of-000002.row_fingerprints"
B = "model-000001-of-000002.row_fingerprints"


def export(source: Path, target: Path | str, **settings: Any) -> Manifest:
    return sparse_cases.export(source, target, **{"row_fingerprints": True, **settings})


def copy(source: Path, target: Path, **settings: Any) -> Manifest:
    return sparse_cases.copy(source, target, **{"row_fingerprints": True, **settings})


TABLES = make_tables({"a": 900, "b": 70, "empty": 0}, 3, dim=5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "ckpt"
    write_checkpoint(folder, TABLES)
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


def check_all(package: Path) -> None:
    """Compare each fingerprint with the specification, and let verify do so."""
    found = read_fingerprints(package)
    assert found
    for stored, expected in found.values():
        assert stored == expected
    report = verify(str(package))
    assert not report.findings
    assert any(line.startswith(f"row fingerprints of {len(found)} part") for line in report.checked)


def test_each_row_has_the_fingerprint_of_the_specification(exported: Path) -> None:
    check_all(exported)
    manifest = dist_export.open_package(exported).manifest
    assert [file.path for file in manifest.files if file.path.endswith(".row_fingerprints")] == [A, B]
    assert (exported / A).stat().st_size == next(file.num_bytes for file in manifest.files if file.path == A)


def test_all_kept_slots_count_in_their_order(source: Path, tmp_path: Path) -> None:
    manifest = export(source, tmp_path / "out", num_shards=2, keep_slots=["*"])
    assert len(manifest.tables[0].kept) == 4
    check_all(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_fingerprints_are_of_the_bytes_after_a_cast(source: Path, tmp_path: Path, dtype: str) -> None:
    export(source, tmp_path / "out", num_shards=2, dtype={"a": dtype})
    check_all(tmp_path / "out")


def test_a_row_indexed_table_has_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = numbered_tables(t=60, u=9)
    write_numbered(tmp_path / "in", tables, monkeypatch, (20, 25, 15))
    export(tmp_path / "in", tmp_path / "out", num_shards=2)
    assert set(read_fingerprints(tmp_path / "out")) == {("t", 0), ("t", 1), ("u", 0), ("u", 1)}
    check_all(tmp_path / "out")


def test_a_copy_has_them_also_of_slots_in_other_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", TABLES, files_per_shard=3)
    copy(tmp_path / "in", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    check_all(tmp_path / "out")


def test_in_place_they_are_written_beside_the_files_of_the_checkpoint(source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "ckpt")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    copy(folder, folder)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert len(list(folder.glob("*.row_fingerprints"))) == 3
    check_all(folder)


@pytest.mark.parametrize("settings", [{"threads": 1, "digest": "none"}, {"threads": 3}])
def test_threads_and_memory_change_no_byte(source: Path, exported: Path, tmp_path: Path, settings) -> None:
    export(source, tmp_path / "out", num_shards=2, tuning=Tuning(fingerprint_bytes=300), **settings)
    for name in (A, B):
        assert (tmp_path / "out" / name).read_bytes() == (exported / name).read_bytes()


def test_the_setting_says_where_they_are_written(source: Path, tmp_path: Path) -> None:
    manifest = export(source, tmp_path / "off", num_shards=2, row_fingerprints=False)
    assert not list((tmp_path / "off").glob("*.row_fingerprints"))
    assert all(part.row_fingerprints is msgspec.UNSET for part in parts_of(manifest))
    assert not verify(str(tmp_path / "off")).findings
    on_store = "memory://row-fingerprints/{}"
    for name in (str(tmp_path / "auto"), on_store.format("auto"), "versions:" + on_store.format("versions")):
        manifest = export(source, name, num_shards=2, row_fingerprints="auto")
        assert all(part.row_fingerprints is msgspec.UNSET for part in parts_of(manifest))
    manifest = export(source, f"versions:{tmp_path / 'versions'}", num_shards=2, row_fingerprints="auto")
    assert all((part.row_fingerprints is msgspec.UNSET) == (not part.rows) for part in parts_of(manifest))
    base = {"base": f"versions:{tmp_path / 'versions'}"}
    manifest = export(source, f"versions:{tmp_path / 'versions'}", num_shards=2, row_fingerprints="auto", **base)
    assert all(part.row_fingerprints is msgspec.UNSET for part in parts_of(manifest))  # nobody takes a delta for a base
    manifest = export(source, on_store.format("true"), num_shards=2, row_fingerprints=True)
    assert all((part.row_fingerprints is msgspec.UNSET) == (not part.rows) for part in parts_of(manifest))
    assert not verify(on_store.format("true")).findings


def test_a_package_that_is_exported_again_has_them_anew(exported: Path, tmp_path: Path) -> None:
    export(exported, tmp_path / "three", num_shards=3)
    check_all(tmp_path / "three")
    copy(exported, tmp_path / "copied")
    check_all(tmp_path / "copied")
    for name in (A, B):
        assert (tmp_path / "copied" / name).read_bytes() == (exported / name).read_bytes()


def test_plan_and_inspect_say_their_bytes(source: Path, exported: Path, tmp_path: Path) -> None:
    settings = {
        "ckpt_dir": str(source),
        "export_dir": str(tmp_path / "out"),
        "filter_sparse_opt": True,
        "num_shards": 2,
        "row_fingerprints": True,
    }
    num_bytes = sum((exported / name).stat().st_size for name in (A, B))
    planned = make_report(load_config(settings), world_size=3)
    assert planned["row_fingerprints"] == num_bytes
    assert any(line.startswith("  row fingerprints: ") for line in render_report(planned))
    without = make_report(load_config({**settings, "row_fingerprints": False}), world_size=3)
    assert without["row_fingerprints"] == 0
    assert not any("row fingerprints" in line for line in render_report(without))
    found = describe(str(exported))
    assert found["row_fingerprints"] == num_bytes
    assert f"  row fingerprints: {num_bytes:,} of these bytes" in render(found)


def test_plan_refuses_a_file_of_somebody_else_too(source: Path, tmp_path: Path) -> None:
    settings = {"ckpt_dir": str(source), "export_dir": str(tmp_path), "filter_sparse_opt": True, "num_shards": 2}
    settings["row_fingerprints"] = True
    for name in (A, A.replace("fingerprints", "index")):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match=rf"{name} is there already, and dist_export did not write it"):
            make_report(load_config(settings), world_size=1)
        (tmp_path / name).unlink()


# ---- reading ----


@pytest.mark.parametrize("where", ["disk", "store"])
def test_rows_are_read_in_any_order(source: Path, exported: Path, where: str) -> None:
    place = str(exported)
    if where == "store":
        place = "memory://row-fingerprints/read"
        export(source, place, num_shards=2, row_fingerprints=True)
    opened = dist_export.open_package(place)
    for (table, number), (stored, _) in read_fingerprints(exported).items():
        part = open_fingerprints(opened, table, number)
        assert part is not None
        assert part.num_rows == len(stored)
        everything = part.fingerprints(np.arange(len(stored)))
        assert everything.dtype == np.uint64
        assert everything.tolist() == stored
        rows = np.random.default_rng(4).integers(0, len(stored), 500)
        assert part.fingerprints(rows).tolist() == [stored[row] for row in rows]
        assert part.fingerprints(np.zeros(0, np.int64)).shape == (0,)
        for row in (-1, len(stored)):
            with pytest.raises(IndexError):
                part.fingerprints(np.array([0, row]))


def test_a_part_without_them_has_none(source: Path, exported: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out", num_shards=2, row_fingerprints=False)
    assert open_fingerprints(dist_export.open_package(tmp_path / "out"), "a", 0) is None
    assert open_fingerprints(dist_export.open_package(exported), "empty", 0) is None
    with pytest.raises(PackageError, match=r"table 'a' has 2 parts, and no part 2"):
        open_fingerprints(dist_export.open_package(exported), "a", 2)


# ---- interrupted exports ----


@contextlib.contextmanager
def ended_after(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    """Let the export end right after a file got its name, as a kill would."""
    real = Staging.publish

    def publish(self: Staging, published: str) -> None:
        real(self, published)
        if published == name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Staging, "publish", publish)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_a_rerun_takes_over_what_is_whole(source: Path, exported: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    with ended_after(monkeypatch, B):
        export(source, out, num_shards=2, threads=1)
    before = os.stat(out / A).st_ino
    data = bytearray((out / B).read_bytes())
    data[100] ^= 1
    (out / B).write_bytes(data)
    export(source, out, num_shards=2, threads=1)
    assert os.stat(out / A).st_ino == before
    assert (out / B).read_bytes() == (exported / B).read_bytes()
    check_all(out)


def test_a_killed_export_leaves_none_that_the_next_one_does_not_know(source: Path, tmp_path: Path, monkeypatch) -> None:
    with ended_after(monkeypatch, A):
        export(source, tmp_path / "out", num_shards=2)
    assert (tmp_path / "out" / A).exists()
    manifest = export(source, tmp_path / "out", num_shards=2, row_fingerprints=False)
    assert not list((tmp_path / "out").glob("*.row_fingerprints"))
    assert not manifest.run["left_alone"]


def test_a_file_of_somebody_else_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / A).write_text("mine")
    with pytest.raises(UserError, match=rf"{A} is there already, and dist_export did not write it"):
        export(source, tmp_path / "out", num_shards=2)
    assert (tmp_path / "out" / A).read_text() == "mine"


def test_what_a_disk_changes_is_no_package(source: Path, tmp_path: Path, monkeypatch) -> None:
    real = Staging.open_reader

    def open_reader(self: Staging, name: str):
        if name == A:
            with open(self.path(name), "r+b") as file:
                file.seek(70)
                file.write(b"\0\0\0")
        return real(self, name)

    monkeypatch.setattr(Staging, "open_reader", open_reader)
    with pytest.raises(CommitError, match=rf"{A}: what was read back is not what was written"):
        export(source, tmp_path / "out", num_shards=2)
    assert not (tmp_path / "out" / A).exists()


# ---- damage ----


def reseal(package: Path, name: str = "", change: Callable[[Manifest], Manifest] = lambda it: it) -> None:
    """Make size and digest of a file anew in the manifest: verify must find what is wrong by the fingerprints alone."""
    manifest = change(decode_manifest((package / "manifest.json").read_bytes(), where=""))
    raw = (package / name).read_bytes() if name else b""
    files = tuple(
        msgspec.structs.replace(file, digest=digest_bytes(raw), num_bytes=len(raw)) if file.path == name else file
        for file in manifest.files
    )
    sealed = seal(msgspec.structs.replace(manifest, files=files))
    (package / "manifest.json").write_bytes(encode_manifest(sealed))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def entry_of(package: Path) -> tuple[PartEntry, RowFingerprintsEntry]:
    part = parts_of(dist_export.open_package(package).manifest)[0]
    assert isinstance(part.row_fingerprints, RowFingerprintsEntry)
    return part, part.row_fingerprints


def test_verify_finds_a_flipped_bit_of_a_fingerprint(package: Path) -> None:
    part, entry = entry_of(package)
    flip(package / A, entry.offset + 8 * 7 + 3)
    reseal(package, A)
    (found,) = verify(str(package)).found
    assert (found.file, found.check) == (A, "row_fingerprints")
    assert f"1 of {part.rows} rows of 'a.id/part_0_2' have another fingerprint, the first is row 7" in found.message


def test_verify_finds_a_flipped_bit_of_a_row(package: Path) -> None:
    part, _ = entry_of(package)
    header = dist_export.open_package(package).header(part.file)
    begin = int(header.begins[header.keys.index(part.keys["embedding"])])
    flip(package / part.file, begin + 20 * 9)
    (found,) = verify(str(package)).found
    assert (found.file, found.check) == (part.file, "digest"), "what follows from it is not reported"
    reseal(package, part.file)
    (found,) = verify(str(package)).found
    assert (found.file, found.check) == (A, "row_fingerprints")
    assert "have another fingerprint, the first is row 9" in found.message


def add_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def overwrite_magic(path: Path) -> None:
    path.write_bytes(b"rowindex" + path.read_bytes()[8:])


@pytest.mark.parametrize(
    ("change", "finding", "refusal"),
    [
        (add_byte, "and its last fingerprint ends at byte", ""),
        (cut, "do not lie in a file of", "are damaged: its .* do not lie in a file"),
        (
            overwrite_magic,
            "cannot be checked: it is no file of row fingerprints",
            "which no file of row fingerprints does",
        ),
    ],
)
def test_a_file_that_cannot_be_is_found_and_not_read(
    package: Path, change: Callable[[Path], None], finding: str, refusal: str
) -> None:
    change(package / A)
    (found,) = {(its.file, its.check) for its in verify(str(package)).found}
    assert found[0] == A
    assert found[1] in ("size", "digest")
    reseal(package, A)
    messages = [its.message for its in verify(str(package)).found if its.check == "row_fingerprints"]
    assert any(finding in message for message in messages), messages
    opened = dist_export.open_package(package)
    if refusal:
        with pytest.raises(PackageError, match=refusal):
            open_fingerprints(opened, "b", 0)


def test_a_missing_file_is_found(package: Path) -> None:
    (package / A).unlink()
    (found,) = verify(str(package)).found
    assert (found.file, found.check) == (A, "size")
    with pytest.raises(PackageError, match=A):
        open_fingerprints(dist_export.open_package(package), "a", 0)


def set_entry(**changes: object) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        table, *others = manifest.tables
        part, *rest = table.parts
        assert isinstance(part.row_fingerprints, RowFingerprintsEntry)
        entry = msgspec.structs.replace(part.row_fingerprints, **changes) if changes else msgspec.UNSET
        part = msgspec.structs.replace(part, row_fingerprints=entry)
        table = msgspec.structs.replace(table, parts=(part, *rest))
        return msgspec.structs.replace(manifest, tables=(table, *others))

    return change


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"offset": 65}, "begin at byte 65"),
        ({"offset": 0}, "begin at byte 0"),
        ({"offset": 1 << 60}, "do not lie in a file"),
        ({"offset": 128}, "have another fingerprint"),
        ({"file": B}, "have another fingerprint"),
        ({"file": "model-000000-of-000002.safetensors"}, "and its last fingerprint ends at byte"),
        ({"file": "other.row_fingerprints"}, "which it does not list"),
        ({}, "1 part without row fingerprints, the first is 'a.id/part_0_2'"),
    ],
)
def test_an_entry_that_cannot_be_is_a_finding(package: Path, changes: dict[str, object], finding: str) -> None:
    reseal(package, change=set_entry(**changes))
    messages = [found.message for found in verify(str(package)).found]
    assert any(finding in message for message in messages), messages


def test_a_path_out_of_the_package_is_refused(package: Path) -> None:
    reseal(package, change=set_entry(file="../../etc/x.row_fingerprints"))  # among the files it is refused anyway
    with pytest.raises(PackageError, match="does not lie in the package"):
        dist_export.open_package(package)


def test_a_link_out_of_the_package_is_not_read(package: Path, tmp_path: Path) -> None:
    (package / A).rename(tmp_path / "elsewhere")
    (package / A).symlink_to(tmp_path / "elsewhere")
    report = verify(str(package))
    assert [(found.file, found.check) for found in report.found] == [(A, "link")]
    with pytest.raises(PackageError, match=A):
        open_fingerprints(dist_export.open_package(package), "a", 0)


@pytest.mark.parametrize("change", [cut, overwrite_magic])
def test_a_mapped_file_that_changes_is_an_error(change: Callable[[Path], None], package: Path) -> None:
    part = open_fingerprints(dist_export.open_package(package), "a", 0)
    assert part is not None
    part.fingerprints(np.arange(3))
    change(package / A)
    with pytest.raises(PackageError, match=r"has changed since the package was opened.*replaced; open it again"):
        part.fingerprints(np.arange(3))
