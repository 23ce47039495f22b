"""Exports from and to a real S3 server: the same bytes as on a disk, and as few of them through the export as can be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import dist_export
from dist_export.cli import main
from dist_export.config.loader import load_config
from dist_export.errors import CommitError, ConfigError, PackageError, TransferError
from dist_export.formats.digests import digest_of_parts
from dist_export.inspect.describe import describe
from dist_export.package.reader import open_package
from dist_export.package.row_fingerprints import open_fingerprints
from dist_export.pipeline.dry_run import make_report, render_report
from dist_export.storage.traffic import TRAFFIC
from dist_export.transfer import multipart_upload
from dist_export.verify.verify import verify
from dist_export.workdir import lock
from tests.support.distributed.ranks import run_ranks
from tests.support.fixture_cases import CASES
from tests.support.s3.s3_cases import (
    MIB,
    Store,
    export_and_die,
    export_on_rank,
    files_of,
    without_manifest,
    write_large,
    write_small,
)
from tests.support.s3.s3_server import S3Server

pytestmark = pytest.mark.s3


@pytest.fixture
def store(s3_server: S3Server) -> Store:
    return Store(s3_server)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("small") / "ckpt")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_large(tmp_path_factory.mktemp("large") / "ckpt")


@pytest.fixture(scope="module")
def remote(large: Path, s3_server: S3Server) -> Iterator[str]:
    """The large checkpoint on the store. Tests must not change it."""
    store = Store(s3_server)
    yield store.put_tree(large, "ckpt")
    assert store.files("ckpt") == files_of(large)


@pytest.mark.parametrize("num_shards", [2, 3])
def test_the_same_bytes_wherever_they_come_from_and_go_to(
    num_shards: int, small: Path, store: Store, tmp_path: Path
) -> None:
    """Two shards of three parts gather rows on a disk first; three are sent as they are read."""
    settings = {"filter_sparse_opt": True, "num_shards": num_shards, "row_fingerprints": False}
    dist_export.export({"ckpt_dir": str(small), "export_dir": str(tmp_path / "local"), **settings})
    expected = without_manifest(files_of(tmp_path / "local"))
    remote = store.put_tree(small, "ckpt")
    store.export(remote, tmp_path / "from_s3", num_shards=num_shards)
    assert without_manifest(files_of(tmp_path / "from_s3")) == expected
    for name, source in (("to_s3", small), ("within", remote)):
        store.export(source, store.url(name), num_shards=num_shards)
        assert without_manifest(store.files(name)) == expected, name
        assert verify(store.url(name), store.options).findings == []
        assert store.uploads(name) == []


@pytest.mark.fixtures
@pytest.mark.parametrize("case", CASES)
def test_reference_checkpoints(case: str, recis_fixtures: Path, store: Store, tmp_path: Path) -> None:
    """What RecIS's own code wrote, within a store and on a disk."""
    settings = {"filter_sparse_opt": True, "num_shards": 3, "row_fingerprints": True}
    dist_export.export({"ckpt_dir": str(recis_fixtures / case), "export_dir": str(tmp_path / "local"), **settings})
    store.export(store.put_tree(recis_fixtures / case, "ckpt"), store.url("out"), **settings)
    assert without_manifest(store.files("out")) == without_manifest(files_of(tmp_path / "local"))
    assert verify(store.url("out"), store.options).findings == []


@pytest.mark.parametrize("filter_sparse_opt", [True, False])
def test_two_ranks_write_what_one_does(filter_sparse_opt: bool, small: Path, store: Store, tmp_path: Path) -> None:
    remote = store.put_tree(small, "ckpt")
    more = {"filter_sparse_opt": filter_sparse_opt, "num_shards": 2 if filter_sparse_opt else None}
    store.export(remote, tmp_path / "one", **more)
    run_ranks(export_on_rank, 2, tmp_path / "store", store.settings(remote, store.url("two"), **more))
    assert without_manifest(store.files("two")) == without_manifest(files_of(tmp_path / "one"))
    assert verify(store.url("two"), store.options).findings == []


def test_long_runs_are_copied_by_the_store(remote: str, store: Store, tmp_path: Path) -> None:
    """Of each shard what comes through the export is what fills one part, and the ids."""
    store.export(remote, tmp_path / "local")
    config = load_config(store.settings(remote, store.url("out")))
    planned = make_report(config, world_size=2)
    before = TRAFFIC.snapshot()
    manifest = store.export(remote, store.url("out"))
    moved = TRAFFIC.since(before)
    written = store.files("out")
    assert without_manifest(written) == without_manifest(files_of(tmp_path / "local"))
    shards = [file for file in manifest.files if file.path.endswith(".safetensors")]
    total = sum(file.num_bytes for file in shards)
    id_bytes = 8 * sum(table.rows_in for table in manifest.tables)
    # others are too short to be parts of their own
    assert moved["copied"] == planned["store"]["copied"] > total / 2
    assert moved["uploaded"] < planned["store"]["uploaded"] + planned["store"]["row_indexes"] + 20_000
    assert moved["downloaded"] < planned["store"]["downloaded"] + 2 * id_bytes + 10 * 65536
    assert manifest.run["store"]["copied"] == moved["copied"]
    assert any("copied within the store" in line for line in render_report(planned))
    for file in shards:
        data = memoryview(written[file.path])
        begin, sha256s = 0, []
        for part in file.parts:
            sha256s.append(hashlib.sha256(data[begin : begin + part.num_bytes]).digest())
            assert part.sha256 == sha256s[-1].hex()
            assert part.num_bytes >= 5 * MIB or begin + part.num_bytes == file.num_bytes
            begin += part.num_bytes
        assert begin == file.num_bytes
        assert file.digest == digest_of_parts(sha256s)
    assert verify(store.url("out"), store.options).findings == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_parts_ways_is_built_and_the_rest_is_copied(ranks: int, remote: str, store: Store, tmp_path: Path) -> None:
    """Four parts become three shards: the first and the last part stay whole, the rows of the two others are gathered."""
    store.export(remote, tmp_path / "local", num_shards=3)
    settings = store.settings(remote, store.url("out"), num_shards=3)
    report = make_report(load_config(settings), world_size=ranks)
    runs = [export_on_rank(0, settings)] if ranks == 1 else run_ranks(export_on_rank, 2, tmp_path / "store", settings)
    assert runs[0]["store"]["copied"] == report["store"]["copied"] > 10 * MIB
    assert report["gathered_rows"] > 50_000
    assert without_manifest(store.files("out")) == without_manifest(files_of(tmp_path / "local"))
    assert verify(store.url("out"), store.options).findings == []
    assert store.uploads("out") == []


def test_two_ranks_share_the_parts(remote: str, store: Store, tmp_path: Path) -> None:
    store.export(remote, store.url("one"))
    runs = run_ranks(export_on_rank, 2, tmp_path / "store", store.settings(remote, store.url("two")))
    assert without_manifest(store.files("two")) == without_manifest(store.files("one"))
    assert runs[0]["store"]["copied"] > 20 * MIB


def test_a_rank_that_is_killed(remote: str, store: Store, tmp_path: Path, monkeypatch) -> None:
    """The other rank ends too, nothing is committed, and a rerun goes on to the same package."""
    monkeypatch.setattr(lock, "LEASE_SECS", 1.0)
    monkeypatch.setattr(lock, "RENEW_SECS", 0.2)
    store.export(remote, store.url("expected"))
    settings = store.settings(remote, store.url("out"), threads=1)
    with pytest.raises(AssertionError, match="rank 1: ended: -9"):
        run_ranks(export_and_die, 2, tmp_path / "store", settings, may_end=(0,))
    assert "manifest.json" not in store.files("out")
    assert store.uploads("out")
    store.export(remote, store.url("out"))
    assert without_manifest(store.files("out")) == without_manifest(store.files("expected"))
    assert store.uploads("out") == []


def test_a_copy_that_rots_is_found(remote: str, store: Store) -> None:
    """Who changes a byte of a part that the store has copied is told which part it is."""
    store.export(remote, store.url("out"))
    name = "model-000001-of-000002.safetensors"
    data = bytearray(store.files("out")[name])
    data[-1000] ^= 1
    store.fs.pipe_file(f"{store.root}/out/{name}", bytes(data))
    (finding,) = verify(store.url("out"), store.options).findings
    assert name in finding
    assert "are not what was written (sha256" in finding


def test_parts_that_do_not_fit_their_digest(remote: str, store: Store) -> None:
    manifest = store.export(remote, store.url("out"))
    from dist_export.manifest import encode_manifest, seal

    first = manifest.files[0]
    short = msgspec.structs.replace(first, parts=first.parts[:-1])
    changed = seal(msgspec.structs.replace(manifest, files=(short, *manifest.files[1:])))
    store.fs.pipe_file(f"{store.root}/out/manifest.json", encode_manifest(changed))
    (finding,) = verify(store.url("out"), store.options).findings
    assert "its parts do not add up" in finding


def test_init_writes_a_config_for_a_checkpoint_on_the_store(small: Path, store: Store, tmp_path: Path) -> None:
    """Its file exports the same shards as no file, with the options of the store that were given."""
    remote, file = store.put_tree(small, "ckpt"), str(tmp_path / "export.yaml")
    options = f"--storage_options={json.dumps(store.options)}"
    assert main(["init", remote, "--out", file, options]) == 0
    assert main(["--config", file, "--export_dir", store.url("with")]) == 0
    dist_export.export({"ckpt_dir": remote, "export_dir": store.url("without"), "storage_options": store.options})
    shards = {name: data for name, data in store.files("with").items() if name.endswith(".safetensors")}
    assert shards
    assert shards.items() <= store.files("without").items()


@pytest.mark.parametrize(
    ("settings", "digest", "is_copied"),
    [
        ({"server_side_copy": False}, "xxh3", False),
        ({"server_side_copy": False, "digest": "sha256"}, "sha256", False),
        ({"server_side_copy": False, "digest": "none"}, "", False),
        ({"digest": "none"}, "", True),
    ],
)
def test_settings_decide_who_copies(
    settings: dict[str, Any], digest: str, is_copied: bool, remote: str, store: Store
) -> None:
    before = TRAFFIC.snapshot()
    manifest = store.export(remote, store.url("out"), **settings)
    copied = TRAFFIC.since(before)["copied"]
    shard = manifest.files[0]
    assert shard.parts is msgspec.UNSET
    assert (copied > 0, shard.digest.partition(":")[0]) == (is_copied, digest)
    if not is_copied:
        assert any("nothing copied within the store" in line for line in dist_export_summary(manifest))
    assert verify(store.url("out"), store.options).findings == []


def test_what_is_said_of_bytes_fits_the_way_they_went(small: Path, store: Store, tmp_path: Path) -> None:
    """The plan speaks of the shards' bytes, the summary of all that was exchanged, and neither of a way that is none."""
    remote = store.put_tree(small, "ckpt")
    for source, target, ways in (
        (remote, tmp_path / "local", ["downloaded"]),
        (small, store.url("up"), ["uploaded"]),
        (remote, store.url("within"), ["downloaded", "uploaded", "copied within the store"]),
    ):
        report = render_report(make_report(load_config(store.settings(source, target)), world_size=1))
        summary = dist_export_summary(store.export(source, target))
        (plan,) = [line for line in report if "store: " in line]
        (done,) = [line for line in summary if "  store " in line]
        said = [way for way in ("downloaded", "uploaded", "copied within the store") if way in plan]
        assert said == ways
        assert [way for way in ways if way in done] == ways
        assert ("copied" in done) is ("copied within the store" in ways)
        assert "of the shards' " in plan
        assert "which only the summary counts" in plan
        assert "all of it, ids, headers, indexes and receipts too" in done
        assert "%" not in done


def dist_export_summary(manifest: dist_export.Manifest) -> list[str]:
    from dist_export.reporting.summary import summarize

    return summarize(manifest, [], "s3://somewhere")


@pytest.mark.parametrize("server_side_copy", [True, False])
def test_a_rerun_takes_over_parts_and_shards(server_side_copy: bool, remote: str, store: Store, monkeypatch) -> None:
    """Cut off before its last file is made of its parts: the next run sends no part again that the store still has."""
    store.export(remote, store.url("expected"), server_side_copy=server_side_copy)
    real, completed = multipart_upload.Uploads.complete, []

    def cut_off(self, number, parts) -> None:
        if completed:
            raise OSError(5, "cut off")
        completed.append(number)
        real(self, number, parts)

    with monkeypatch.context() as patched:
        patched.setattr(multipart_upload.Uploads, "complete", cut_off)
        with pytest.raises(Exception, match="cut off"):
            store.export(remote, store.url("out"), server_side_copy=server_side_copy, threads=1)
    assert len(store.uploads("out")) == 1
    before = TRAFFIC.snapshot()
    manifest = store.export(remote, store.url("out"), server_side_copy=server_side_copy, threads=1)
    assert manifest.run["reused_shards"] == 1
    indexes = sum(file.num_bytes for file in manifest.files if file.path.endswith(".row_index"))
    assert TRAFFIC.since(before)["uploaded"] < MIB + indexes, "parts are compared, not sent"
    assert without_manifest(store.files("out")) == without_manifest(store.files("expected"))
    assert store.uploads("out") == []


def test_uploads_of_another_plan_are_given_up(remote: str, store: Store, monkeypatch) -> None:

    def cut_off(*_) -> None:
        raise OSError(5, "cut off")

    with monkeypatch.context() as patched:
        patched.setattr(multipart_upload.Uploads, "complete", cut_off)
        with pytest.raises(Exception, match="cut off"):
            store.export(remote, store.url("out"), num_shards=4)
    assert len(store.uploads("out")) == 4
    foreign = store.fs.call_s3("create_multipart_upload", Bucket="bucket", Key=f"{store.root[7:]}/out/somebody.bin")
    store.export(remote, store.url("out"))
    assert [key.rpartition("/")[2] for key in store.uploads("out")] == ["somebody.bin"], (
        "what is another's is left alone"
    )
    store.fs.call_s3(
        "abort_multipart_upload",
        Bucket="bucket",
        Key=f"{store.root[7:]}/out/somebody.bin",
        UploadId=foreign["UploadId"],
    )
    assert verify(store.url("out"), store.options).findings == []


def test_a_source_that_changes_is_not_copied(large: Path, store: Store, monkeypatch) -> None:
    """Each copy names the content that was planned; the store refuses another one."""
    remote = store.put_tree(large, "ckpt")
    real = multipart_upload.Uploads.join

    def change(self, begun) -> None:
        path = f"{store.root}/ckpt/model-000000-of-000004.safetensors"
        data = bytearray(store.fs.cat_file(path))
        data[-1] ^= 1
        store.fs.pipe_file(path, bytes(data))
        real(self, begun)

    monkeypatch.setattr(multipart_upload.Uploads, "join", change)
    with pytest.raises(
        TransferError, match=r"model-000000-of-000004\.safetensors: changed while it was being exported"
    ):
        store.export(remote, store.url("out"))
    assert "manifest.json" not in store.files("out")


def test_a_package_is_not_overwritten(small: Path, store: Store) -> None:
    store.export(small, store.url("out"))
    before = store.files("out")
    with pytest.raises(
        ConfigError, match="overwrite would destroy it before the new one is whole; give a new export_dir"
    ):
        store.export(small, store.url("out"), overwrite=True, num_shards=3)
    assert store.files("out") == before


def test_whoever_commits_second_does_not_commit(small: Path, store: Store, monkeypatch) -> None:
    from dist_export.pipeline import steps

    real = steps.refuse_changed_files

    def be_slower(*arguments) -> None:
        store.fs.pipe_file(f"{store.root}/out/manifest.json", b"another's")
        real(*arguments)

    monkeypatch.setattr(steps, "refuse_changed_files", be_slower)
    with pytest.raises(CommitError, match="another export has committed a package there"):
        store.export(small, store.url("out"))
    assert store.files("out")["manifest.json"] == b"another's"


def test_a_package_is_read_from_the_store_as_far_as_it_is_asked(large: Path, store: Store, tmp_path: Path) -> None:
    store.export(large, store.url("out"))
    store.export(large, tmp_path / "local")
    before = TRAFFIC.snapshot()
    package = dist_export.open_package(store.url("out"), storage_options=store.options)
    table = package.table("other")
    opened = TRAFFIC.since(before)
    assert opened["downloaded"] < 100_000
    local = dist_export.open_package(tmp_path / "local")
    some = local.lookup("other", np.arange(100))[1]
    held = np.flatnonzero(some)
    ids = np.concatenate([held, [1 << 60]])
    before = TRAFFIC.snapshot()
    rows, has_row = package.lookup("other", ids)
    looked = TRAFFIC.since(before)
    np.testing.assert_array_equal(rows, local.lookup("other", ids)[0])
    np.testing.assert_array_equal(has_row, local.lookup("other", ids)[1])
    assert looked["downloaded"] < table.rows_in * 8 + 65536 * (len(ids) + 6)
    assert looked["requests"] < 30 + len(ids)


def test_opening_takes_few_requests(remote: str, store: Store) -> None:
    """A header is one request, and all sizes are one listing."""
    from dist_export.checkpoint.detect import open_reader
    from dist_export.storage.urls import open_directory

    before = TRAFFIC.snapshot()
    reader = open_reader(open_directory(remote, store.options), asked="recis")
    reader.assemble([reader.read_headers(range(len(reader.files)))])
    assert TRAFFIC.since(before)["requests"] <= 2 * len(reader.files) + 10


def test_a_package_is_described_from_its_manifest(large: Path, store: Store) -> None:
    store.export(large, store.url("out"))
    before = TRAFFIC.snapshot()
    assert len(describe(store.url("out"), store.options)["tables"]) == 3
    moved = TRAFFIC.since(before)
    assert moved["downloaded"] < 20_000
    assert moved["requests"] < 10


@pytest.mark.parametrize("num_shards", [2, 12])
def test_an_open_package_takes_no_other_object_for_its_own(num_shards: int, small: Path, store: Store) -> None:
    """Each read asks for the object that was there at the opening, by ``If-Match``; of many files the store lists them."""
    store.export(small, store.url("out"), num_shards=num_shards)
    package = open_package(store.url("out"), storage_options=store.options)
    table = package.manifest.tables[0].name
    ids = np.arange(2000)
    before, _ = package.lookup(table, ids)
    shard = f"{store.root}/out/{package.manifest.tables[0].parts[0].file}"
    content = store.fs.cat_file(shard)
    store.fs.pipe_file(shard, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        PackageError, match=r"has changed since the package was opened, so it was replaced; open it again"
    ):
        package.lookup(table, ids)
    store.fs.pipe_file(shard, content)
    assert np.array_equal(package.lookup(table, ids)[0], before), "the ETag is the content's"
    store.fs.rm_file(shard)
    with pytest.raises(PackageError, match=r"is gone since the package was opened, so it was replaced; open it again"):
        package.lookup(table, ids)


def test_row_fingerprints_on_a_store_are_those_on_a_disk(small: Path, store: Store, tmp_path: Path) -> None:
    """``auto`` writes none there."""
    remote = store.put_tree(small, "ckpt")
    store.export(small, tmp_path / "local", row_fingerprints=True)
    manifest = store.export(remote, store.url("auto"), row_fingerprints="auto")
    assert not any(file.path.endswith(".row_fingerprints") for file in manifest.files)
    planned = make_report(load_config(store.settings(remote, store.url("out"), row_fingerprints=True)), world_size=2)
    before = TRAFFIC.snapshot()
    manifest = store.export(remote, store.url("out"), row_fingerprints=True)
    moved = TRAFFIC.since(before)
    assert without_manifest(store.files("out")) == without_manifest(files_of(tmp_path / "local"))
    written = sum(file.num_bytes for file in manifest.files if file.path.endswith(".row_fingerprints"))
    assert planned["row_fingerprints"] == planned["store"]["row_fingerprints"] == written
    assert planned["store"]["read_back"] == sum(table.kept[1].num_bytes for table in manifest.tables)
    assert moved["downloaded"] > planned["store"]["downloaded"]
    assert any("row fingerprints are uploaded" in line for line in render_report(planned))
    assert verify(store.url("out"), store.options).findings == []
    package, there = (
        dist_export.open_package(path, storage_options=options)
        for path, options in ((tmp_path / "local", None), (store.url("out"), store.options))
    )
    for table in manifest.tables:
        for number, part in enumerate(table.parts):
            local, remote_part = (open_fingerprints(opened, table.name, number) for opened in (package, there))
            assert local is not None
            assert remote_part is not None
            rows = np.random.default_rng(1).integers(0, part.rows, 50)
            assert np.array_equal(local.fingerprints(rows), remote_part.fingerprints(rows))
