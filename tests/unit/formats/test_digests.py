from __future__ import annotations

import hashlib
import os
import sys

import pytest
import xxhash

import dist_export.pipeline.steps
from dist_export.errors import CommitError, ConfigError, PackageError
from dist_export.formats import digests
from dist_export.formats.digests import algorithm_of, digest_bytes, digest_pieces, root_digest, start_hash
from dist_export.storage.directory import digest_file
from dist_export.storage.urls import open_directory
from dist_export.verify.verify import verify
from tests.support.recis_writer import make_tables, truth_of, write_checkpoint
from tests.support.sparse_cases import assert_exact, export

ALGORITHMS = ("xxh3", "sha256", "blake3")


def by_hand(data, algorithm, chunk):
    import blake3

    one = {
        "xxh3": xxhash.xxh3_128_digest,
        "sha256": lambda piece: hashlib.sha256(piece).digest(),
        "blake3": lambda piece: blake3.blake3(piece).digest(),
    }[algorithm]
    pieces = [data[i : i + chunk] for i in range(0, max(len(data), 1), chunk)]
    return f"{algorithm}:{one(b''.join(one(piece) for piece in pieces)).hex()}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 99, 100])
def test_a_root_over_the_digests_of_chunks(tmp_path, size, algorithm):
    data = os.urandom(size)
    open_directory(tmp_path).write("f", data)
    expected = by_hand(data, algorithm, 10)
    assert digest_bytes(data, algorithm, chunk_bytes=10) == expected
    assert digest_file(open_directory(tmp_path), "f", algorithm, chunk_bytes=10) == expected
    for cut in (1, 3, 7, 10, 15, 64):
        pieces = [memoryview(data[i : i + cut]) for i in range(0, size, cut)]
        assert digest_pieces(pieces, algorithm, chunk_bytes=10) == expected
    if size:
        assert digest_bytes(data[:-1] + bytes([data[-1] ^ 1]), algorithm, chunk_bytes=10) != expected


def test_the_text_of_a_digest_tells_its_algorithm():
    assert algorithm_of(root_digest([b"x"], "sha256")) == "sha256"
    assert algorithm_of("") == "none"
    with pytest.raises(PackageError, match="'md5' is no digest algorithm known here; xxh3, sha256, blake3 are"):
        start_hash("md5")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("num_shards", [1, 4])
def test_verify_uses_the_algorithm_of_the_package(tmp_path, algorithm, num_shards):
    tables = make_tables({"a": 60}, 3)
    write_checkpoint(tmp_path / "in", tables)
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards=num_shards, digest=algorithm)
    assert {algorithm_of(file.digest) for file in manifest.files} == {algorithm}
    assert verify(str(tmp_path / "out")).findings == []
    damage_last_byte(tmp_path / "out")
    findings = verify(str(tmp_path / "out")).findings
    assert len(findings) == 1
    assert "its content is not what was written" in findings[0]


def damage_last_byte(out):
    path = out / f"model-000000-of-{len(list(out.glob('model*.safetensors'))):06d}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_without_digests_verify_says_what_it_could_not_check(tmp_path):
    write_checkpoint(tmp_path / "in", make_tables({"a": 60}, 3))
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards=2, digest="none")
    report = verify(str(tmp_path / "out"))
    assert report.findings == []
    assert any("sizes alone of 2, which were exported without a digest" in line for line in report.checked)
    assert all(file.digest for file in manifest.files if not file.path.startswith("model-"))
    path = tmp_path / "out" / "model-000000-of-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert any("the manifest says" in finding for finding in verify(str(tmp_path / "out")).findings)
    index = tmp_path / "out" / "index"
    index.write_bytes(index.read_bytes() + b" ")
    assert any(finding.startswith("index:") for finding in verify(str(tmp_path / "out")).findings)


@pytest.mark.parametrize(("first", "second", "kept"), [("none", "none", 2), ("none", "xxh3", 0), ("sha256", "xxh3", 0)])
def test_a_rerun_keeps_shards_of_the_same_kind_of_digest(tmp_path, monkeypatch, first, second, kept):
    tables = make_tables({"a": 60}, 3)
    write_checkpoint(tmp_path / "in", tables)

    def fail(*_, **__):
        raise CommitError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(dist_export.pipeline.steps, "check", fail)
        with pytest.raises(CommitError):
            export(tmp_path / "in", tmp_path / "out", num_shards=2, digest=first)
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards=2, digest=second)
    assert manifest.run["reused_shards"] == kept
    assert_exact(tmp_path / "out", truth_of(tables))
    assert verify(str(tmp_path / "out")).findings == []


def test_without_a_digest_no_shard_of_another_plan_is_taken_over(tmp_path, monkeypatch):
    """A receipt is written before its shard gets its name: what an older attempt left there must not be vouched for."""
    from dist_export.storage.staging import Staging

    old, new = make_tables({"a": 60}, 2), make_tables({"a": 60}, 2)
    for part in new["a"]:
        part.slots = {slot: rows + 1 for slot, rows in part.slots.items()}

    def fail(*_, **__):
        raise CommitError("interrupted")

    write_checkpoint(tmp_path / "in", old)
    with monkeypatch.context() as patch:
        patch.setattr(dist_export.pipeline.steps, "check", fail)
        with pytest.raises(CommitError):
            export(tmp_path / "in", tmp_path / "out", num_shards=2, digest="none")
    write_checkpoint(tmp_path / "in", new)
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "publish", fail)
        with pytest.raises(CommitError):
            export(tmp_path / "in", tmp_path / "out", num_shards=2, digest="none", threads=1)
    export(tmp_path / "in", tmp_path / "out", num_shards=2, digest="none")
    assert_exact(tmp_path / "out", truth_of(new))


def test_an_algorithm_whose_package_is_missing(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "in", make_tables({"a": 6}, 1))
    export(tmp_path / "in", tmp_path / "out", digest="blake3")
    monkeypatch.setitem(sys.modules, "blake3", None)
    assert any("pip install blake3" in finding for finding in verify(str(tmp_path / "out")).findings)
    monkeypatch.setattr(digests.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"digest is blake3, which needs .*pip install blake3"):
        export(tmp_path / "in", tmp_path / "other", digest="blake3")
