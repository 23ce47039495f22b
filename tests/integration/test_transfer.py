from __future__ import annotations

import json
import os
import struct
import sys
import threading
import tracemalloc

import numpy as np
import pytest

import dist_export.pipeline.steps
import dist_export.transfer.executor
from dist_export.errors import CommitError, ConfigError, TransferError
from dist_export.storage.directory import WORK_DIRECTORY as RECEIPTS
from dist_export.storage.directory import Directory, digest_file
from dist_export.storage.range_reader import OpenReaders
from dist_export.storage.urls import open_directory
from dist_export.transfer import unit_runner as transfer_units
from dist_export.transfer.output_files import StagedFiles
from tests.support.recis_writer import (
    INDEX,
    MERGED,
    TENSORKEY,
    gen_slice,
    make_tables,
    read_back,
    truth_of,
    write_checkpoint,
)
from tests.support.sparse_cases import assert_exact, content, copy, export, plan, recorded_reads


@pytest.fixture
def tables(tmp_path):
    found = make_tables({"a": 120, "b": 40}, 3)
    write_checkpoint(tmp_path / "in", found, dense={"w": np.ones(9)})
    return found


def interrupt(monkeypatch, tmp_path, kind=export, **settings):
    """Export until all shards are in place, and fail before the manifest."""

    def fail(*_, **__):
        raise CommitError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(dist_export.pipeline.steps, "check", fail)
        with pytest.raises(CommitError, match="interrupted"):
            kind(tmp_path / "in", tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "manifest.json").exists()


class Written:
    """Counts what is written into shards, by output number."""

    def __init__(self, monkeypatch):
        self.bytes = {}
        original = StagedFiles.write

        def write(its, number, view, offset):
            self.bytes[number] = self.bytes.get(number, 0) + len(view)
            original(its, number, view, offset)

        monkeypatch.setattr(StagedFiles, "write", write)


def shard(number, count=3):
    return f"model-{number:06d}-of-{count:06d}.safetensors"


@pytest.mark.parametrize("kind", [export, copy])
def test_a_rerun_keeps_the_shards_that_are_whole(tmp_path, tables, monkeypatch, kind):
    settings = {"num_shards": 3} if kind is export else {}
    kind(tmp_path / "in", tmp_path / "whole", **settings)
    interrupt(monkeypatch, tmp_path, kind, **settings)
    written = Written(monkeypatch)
    manifest = kind(tmp_path / "in", tmp_path / "out", **settings)
    assert written.bytes == {}
    assert manifest.run["reused_shards"] == 3
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert {file.path: file.digest for file in manifest.files} == {
        file.path: digest_file(open_directory(tmp_path / "whole"), file.path) for file in manifest.files
    }


def damage_a_byte(out):
    path = out / shard(1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(out):
    (out / shard(1)).write_bytes((out / shard(1)).read_bytes()[:-1])


def remove_shard(out):
    (out / shard(1)).unlink()


def remove_receipt(out):
    (out / RECEIPTS / f"{shard(1)}.json").unlink()


def cut_receipt(out):
    path = out / RECEIPTS / f"{shard(1)}.json"
    path.write_bytes(path.read_bytes()[:-5])


def foreign_plan(out):
    edit_receipt(out, plan="xxh3:0")


def other_digest(out):
    edit_receipt(out, digest="xxh3:0")


def other_size(out):
    edit_receipt(out, num_bytes=5)


def edit_receipt(out, **changes):
    path = out / RECEIPTS / f"{shard(1)}.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


@pytest.mark.parametrize(
    "harm",
    [damage_a_byte, truncate, remove_shard, remove_receipt, cut_receipt, foreign_plan, other_digest, other_size],
)
def test_a_shard_or_receipt_that_is_not_sound_vouches_for_nothing(tmp_path, tables, monkeypatch, harm):
    export(tmp_path / "in", tmp_path / "whole", num_shards=3)
    interrupt(monkeypatch, tmp_path, num_shards=3)
    harm(tmp_path / "out")
    written = Written(monkeypatch)
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards=3)
    assert written.bytes == {1: (tmp_path / "whole" / shard(1)).stat().st_size}
    assert manifest.run["reused_shards"] == 2
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert_exact(tmp_path / "out", truth_of(tables))


def test_a_source_that_changed_is_another_plan(tmp_path, tables, monkeypatch):
    interrupt(monkeypatch, tmp_path, num_shards=3)
    changed = make_tables({"a": 120, "b": 40}, 3, seed=9)
    write_checkpoint(tmp_path / "in", changed, dense={"w": np.ones(9)})
    export(tmp_path / "in", tmp_path / "out", num_shards=3)
    assert_exact(tmp_path / "out", truth_of(changed))


def test_shards_of_another_attempt_and_half_written_files_go_away(tmp_path, tables, monkeypatch):
    interrupt(monkeypatch, tmp_path, num_shards=5)
    (tmp_path / "out" / f".{shard(2)}.partial").write_bytes(b"half")
    (tmp_path / "out" / ".model-000009-of-000011.safetensors.partial").write_bytes(b"half")
    (tmp_path / "out" / "mine.txt").write_text("not ours")
    export(tmp_path / "in", tmp_path / "out", num_shards=3)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(shard(i) for i in range(3)),
        *(shard(i).replace(".safetensors", ".row_index") for i in range(3)),
        INDEX,
        TENSORKEY,
        MERGED,
        "manifest.json",
        "mine.txt",
    }
    assert_exact(tmp_path / "out", truth_of(tables))


def test_a_committed_package_is_not_written_again(tmp_path, tables):
    export(tmp_path / "in", tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(ConfigError, match="committed package"):
        export(tmp_path / "in", tmp_path / "out", digest="sha256")
    export(tmp_path / "in", tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_the_manifest_is_last(tmp_path, tables, monkeypatch):
    order = []
    original = Directory.write

    def write(self, name, data):
        order.append(name)
        original(self, name, data)

    monkeypatch.setattr(Directory, "write", write)
    export(tmp_path / "in", tmp_path / "out")
    assert order[-1] == "manifest.json"
    assert order.index(INDEX) > order.index(TENSORKEY)


# ---- the source is never harmed -------------------------------------------------------------------------------------


def test_a_source_that_shrinks_meanwhile_is_an_error(tmp_path, tables, monkeypatch):
    original = transfer_units.UnitRunner.run

    def run(self, unit):
        for path in (tmp_path / "in").glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:700])
        return original(self, unit)

    monkeypatch.setattr(transfer_units.UnitRunner, "run", run)
    with pytest.raises(TransferError, match=r"in/model-.* it shrank while it was being read"):
        export(tmp_path / "in", tmp_path / "out", num_shards=3)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("settings", [{"num_shards": 2}, {"filter_sparse_opt": False}])
def test_a_source_that_is_saved_anew_meanwhile_is_an_error(tmp_path, tables, monkeypatch, settings):
    original = transfer_units.UnitRunner.close

    lock = threading.Lock()

    def close(self):
        path = tmp_path / "in" / shard(1)
        with lock:  # every thread closes a runner, and others may still be reading
            saved = tmp_path / "saved"
            saved.write_bytes(path.read_bytes())
            os.utime(saved, ns=(5, 5))
            saved.replace(path)
        original(self)

    monkeypatch.setattr(transfer_units.UnitRunner, "close", close)
    with pytest.raises(TransferError, match=rf"in/{shard(1)}: changed while it was being exported"):
        export(tmp_path / "in", tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.undo()
    manifest = export(tmp_path / "in", tmp_path / "out", **settings)
    assert manifest.run["reused_shards"] == 0, "nothing that was read from the other checkpoint is trusted"


@pytest.mark.parametrize("settings", [{"num_shards": 2}, {"filter_sparse_opt": False}])
def test_the_source_stays_as_it_was(tmp_path, tables, settings):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "in").iterdir()}
    export(tmp_path / "in", tmp_path / "out", **settings)
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "in").iterdir()}


@pytest.mark.parametrize("style", ["new", "v1", None])
def test_an_export_onto_its_source_completes_it(tmp_path, style):
    found = make_tables({"a": 30}, 2)
    write_checkpoint(tmp_path / "in", found, manifest=style, extra_files={"extra.pt": b"x"})
    before = content(tmp_path / "in")
    manifest = copy(tmp_path / "in", tmp_path / "in")
    after = content(tmp_path / "in")
    assert {name: after[name] for name in before} == before
    indexes = {f"model-00000{i}-of-000002.row_index" for i in (0, 1)}
    assert set(after) - set(before) == (indexes if style else {MERGED, *indexes})
    assert (tmp_path / "in" / "manifest.json").exists()
    for file in manifest.files:
        assert digest_file(open_directory(tmp_path / "in"), file.path) == file.digest
    assert "extra.pt" not in {file.path for file in manifest.files}


def test_the_filter_onto_the_source_is_refused(tmp_path, tables):
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = content(tmp_path / "in")
    for target in ("in", "link", "in/../in"):
        with pytest.raises(ConfigError, match="export_dir is ckpt_dir"):
            export(tmp_path / "in", tmp_path / target)
    assert content(tmp_path / "in") == before


# ---- bytes, not tensors; bounded memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"num_shards": 1}, {"num_shards": 3}, {"filter_sparse_opt": False}])
def test_a_copied_range_builds_no_array(tmp_path, tables, monkeypatch, settings):
    planned = plan(tmp_path / "in", **settings).plan
    assert not planned.gathers
    views = []
    original = StagedFiles.write

    def write(self, number, view, offset):
        views.append(type(view.obj))
        original(self, number, view, offset)

    monkeypatch.setattr(StagedFiles, "write", write)
    monkeypatch.setattr(transfer_units.UnitRunner, "_gather", None)
    export(tmp_path / "in", tmp_path / "out", **settings)
    assert set(views) <= {bytes, bytearray}


def test_no_room_of_the_transfer_knows_torch():
    names = (
        "transfer.executor",
        "transfer.output_files",
        "transfer.unit_runner",
        "transfer.id_scan",
        "plan.segments",
        "checkpoint.recis.reader",
    )
    assert not any("torch" in vars(sys.modules[f"dist_export.{name}"]) for name in names)


def write_large(directory, rows_per_part, dim):
    """Two parts whose embeddings and optimizer slot are holes in the file."""
    directory.mkdir()
    index = {"block_index": {}, "file_index": {}}
    keys = {}
    for part in range(2):
        begin, end, size = gen_slice(part, 2)
        ids = np.arange(rows_per_part, dtype=np.int64)
        ids = (ids // 32768 << 16) + ids % 32768 + begin
        slots = {"id": ("I64", [rows_per_part], 8), "embedding": ("F32", [rows_per_part, dim], 4 * dim)}
        slots["sparse_adam_exp_avg"] = slots["embedding"]
        header, position = {}, 0
        for slot, (dtype, shape, width) in slots.items():
            key = f"t.{slot}/part_{part}_2"
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + width * rows_per_part]}
            position += width * rows_per_part
            index["block_index"][key] = part
            keys[key] = f"t@{slot}^{begin:05}@{end:05}@{size}"
        text = json.dumps(header).encode()
        name = f"model-{part:06d}-of-000002.safetensors"
        index["file_index"][name] = part
        with (directory / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + ids.tobytes())
            file.truncate(8 + len(text) + position)
    (directory / INDEX).write_text(json.dumps(index))
    (directory / TENSORKEY).write_text(json.dumps(keys))


@pytest.mark.parametrize(("num_shards", "limit"), [(1, 48 << 20), (3, 128 << 20)])
def test_memory_does_not_grow_with_the_table(tmp_path, num_shards, limit):
    rows, dim = 400_000, 64
    write_large(tmp_path / "in", rows, dim)
    planned = plan(tmp_path / "in", num_shards=num_shards).plan
    assert bool(planned.gathers) == (num_shards == 3)
    assert planned.num_bytes > 200 << 20
    tracemalloc.start()
    try:
        manifest = export(tmp_path / "in", tmp_path / "out", num_shards=num_shards)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert manifest.tables[0].rows_out == 2 * rows
    assert peak < limit


# ---- copies by the letter -------------------------------------------------------------------------------------------


def test_a_copy_is_byte_for_byte_and_its_merged_manifest_is_new(tmp_path):
    found = make_tables({"a": 30, "x@y": 10, "u.embedding_x": 5}, 2)
    strays = {
        "extra.pt": b"x",
        "io_state_0.pt": b"x",
        "0tensorkey.json": b"{}",
        "ckpt-1.json": b"{}",
        "note.json": b"{}",
    }
    write_checkpoint(
        tmp_path / "in", found, files_per_shard=2, manifest="v1", dense={"w": np.ones(3)}, extra_files=strays
    )
    copy(tmp_path / "in", tmp_path / "out")
    source, target = content(tmp_path / "in"), content(tmp_path / "out")
    assert set(source) - set(target) == set(strays)
    new = {name for name in target if source.get(name) != target[name] and not name.endswith(".row_index")}
    assert new == {MERGED}
    assert set(read_back(tmp_path / "out")["a"]) == set(truth_of(found)["a"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dense": {"flag": np.array([True])}}, "dtype 'bool'"),
        ({"dense": {"w/part_0_1": np.ones(2)}}, "'w/part_0_1'"),
        (
            {"change": lambda files: [header.update(__metadata__={"a": "b"}) for header in files.headers.values()]},
            "__metadata__",
        ),
    ],
)
def test_what_recis_could_not_read_is_not_copied(tmp_path, settings, said):
    found = make_tables({"a": 30}, 2)
    write_checkpoint(tmp_path / "in", found, **settings)
    with pytest.raises(Exception, match=rf"{said}.*filter_sparse_opt: true") as caught:
        copy(tmp_path / "in", tmp_path / "out")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
    export(tmp_path / "in", tmp_path / "out")
    assert_exact(tmp_path / "out", truth_of(found))


def test_an_index_may_not_name_a_file_that_would_commit_the_package(tmp_path):
    write_checkpoint(tmp_path / "in", make_tables({"a": 3}, 1))
    old = "model-000000-of-000001.safetensors"
    for name in ("manifest.json", "fg.json", ".dist_export", INDEX):
        index = json.loads((tmp_path / "in" / INDEX).read_text())
        index["file_index"] = {name: 0}
        (tmp_path / "evil").mkdir()
        for path in (tmp_path / "in").iterdir():
            (tmp_path / "evil" / (name if path.name == old else path.name)).write_bytes(path.read_bytes())
        (tmp_path / "evil" / INDEX).write_text(json.dumps(index))
        # a manifest.json of another kind is read as that of a package, and refused before the index is looked at
        refusal = (
            r"evil/manifest.json cannot be read: .* damaged" if name == "manifest.json" else "no name of a data file"
        )
        with pytest.raises(Exception, match=refusal):
            copy(tmp_path / "evil", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        for path in (tmp_path / "evil").iterdir():
            path.unlink()
        (tmp_path / "evil").rmdir()


# ---- open files ------------------------------------------------------------------------------------------------------


def test_descriptors_are_few_and_all_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(dist_export.transfer.executor, "share_descriptors", lambda _: 2)
    found = make_tables({"a": 100}, 6, slots=())
    write_checkpoint(tmp_path / "in", found, files_per_shard=3)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    export(tmp_path / "in", tmp_path / "out", num_shards=5)
    assert_exact(tmp_path / "out", truth_of(found))
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before
    readers = OpenReaders(lambda n: open_directory(tmp_path / "out").open_reader(shard(n, 5)), max_open=2)
    opened = [readers[n] for n in range(5)]
    assert [reader.fd >= 0 for reader in opened] == [False, False, False, True, True]
    assert readers[3] is opened[3]
    readers.close()
    assert all(reader.fd < 0 for reader in opened)


def test_each_kept_byte_is_read_once(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "in", make_tables({"a": 200}, 2))
    planned = plan(tmp_path / "in", num_shards=1).plan
    with recorded_reads(monkeypatch) as reads:
        export(tmp_path / "in", tmp_path / "out", num_shards=1)
    payload = sum(end - begin for where, begin, end in reads if where.startswith(str(tmp_path / "in")))
    headers = sum(int(header) for header in planned.copies.source_offset[:1])
    kept = int(planned.copies.num_bytes.sum())
    assert payload <= kept + 200 * 8 + 2 * headers + 4096
