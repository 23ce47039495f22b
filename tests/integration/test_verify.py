"""``verify`` of packages: sound in every mode, and each way to break one is told by its own check alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from dist_export.formats.tuning import Tuning
from dist_export.manifest import Manifest
from dist_export.verify import ids as id_check
from dist_export.verify.report import Report
from dist_export.verify.verify import verify
from dist_export.verify.work_split import cut, share_out
from tests.integration.test_package import BREAKS, reseal, restate
from tests.support import exports, tiny_model
from tests.support.recis_writer import PartSpec, make_tables, write_checkpoint
from tests.support.sparse_cases import copy, export

A, B = "model-000000-of-000002.safetensors", "model-000001-of-000002.safetensors"
INDEX, TENSORKEY, MANIFEST = "index", "tensorkey.json", "manifest.json"
MERGED = "torch_rank_weights_embs_table_multi_shard.json"
PROGRAM = "fx_user_model/exported_model.pt"


def told(report: Report) -> set[tuple[str, str]]:
    return {(finding.file, finding.check) for finding in report.found}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("verify")
    source = tiny_model.write_tiny_checkpoint(base / "ckpt")
    export(
        source,
        base / "out",
        num_shards=2,
        model=tiny_model.MODEL,
        dataset=tiny_model.DATASET,
    )
    return base / "out"


@pytest.fixture
def package(exported: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(exported, tmp_path / "out")


@pytest.fixture(scope="module")
def sparse_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("sparse")
    write_checkpoint(base / "ckpt", make_tables({"t": 60, "u": 30}, 2), dense={"w": np.ones(3, np.float32)})
    export(base / "ckpt", base / "out", num_shards=2)
    return base / "out"


@pytest.fixture
def sparse(sparse_package: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sparse_package, tmp_path / "out")


EXPECTED: dict[str, set[tuple[str, str]]] = {
    "a bit of a shard": {(A, "digest")},
    "a shard cut short": {(A, "size")},
    "a shard gone": {(A, "size")},
    "a dense file gone": {("fx_user_model/graph.txt", "size")},
    "a truncated header": {(A, "header")},
    "an id of another slice": {(A, "slice")},
    "an id twice": {(A, "unique")},
    "a block that index forgets": {(A, "index")},
    "a block that is nowhere": {(INDEX, "index")},
    "a gap in the file numbers": {(INDEX, "index")},
    "a part that tensorkey forgets": {(TENSORKEY, TENSORKEY)},
    "two blocks of one name": {
        (TENSORKEY, "twice"),
        (MANIFEST, "manifest"),
        (B, "slice"),
    },  # it has the other's slice now
    "no tensorkey.json": {(TENSORKEY, "size")},
    "an id that became another": {(A, "id_sum")},
    "a program that nothing vouches for": {(PROGRAM, "dense")},
    "an account that does not add up": {(MANIFEST, "account")},
    **{
        key: {(MERGED, "merged")}
        for key in (
            "a merged manifest of another shape",
            "a merged manifest without a part",
            "a merged manifest with wrong ids",
            "a merged manifest with a ghost",
            "a merged manifest that hides a table",
            "a merged manifest that is a list",
            "a merged manifest too deep",
        )
    },
    **{
        key: {(MANIFEST, "manifest")}
        for key in ("a table listed twice", "a part of another slice", "a slot of another dtype")
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_check_fails_alone(name: str, package: Path) -> None:
    damage, names = next((damage, names) for known, damage, names, _ in BREAKS if known == name)
    damage(package)
    if names:
        restate(package, *names)
    report = verify(str(package))
    assert told(report) == EXPECTED[name], report.findings


def change(**changes: Any) -> Callable[[Path], None]:
    return lambda package: reseal(package, lambda manifest: msgspec.structs.replace(manifest, **changes))


def change_table(**changes: Any) -> Callable[[Path], None]:
    def damage(package: Path) -> None:
        def replace(manifest: Manifest) -> Manifest:
            first, *rest = manifest.tables
            return msgspec.structs.replace(manifest, tables=(msgspec.structs.replace(first, **changes), *rest))

        reseal(package, replace)

    return damage


def change_part(**changes: Any) -> Callable[[Path], None]:
    def damage(package: Path) -> None:
        def replace(manifest: Manifest) -> Manifest:
            first, *rest = manifest.tables
            part, *parts = first.parts
            table = msgspec.structs.replace(first, parts=(msgspec.structs.replace(part, **changes), *parts))
            return msgspec.structs.replace(manifest, tables=(table, *rest))

        reseal(package, replace)

    return damage


def edit(manifest_change: Callable[[Manifest], dict[str, Any]]) -> Callable[[Path], None]:
    def damage(package: Path) -> None:
        reseal(package, lambda manifest: msgspec.structs.replace(manifest, **manifest_change(manifest)))

    return damage


def stray(name: str) -> Callable[[Path], None]:
    return lambda package: shutil.copy(package / A, package / name)


def link(name: str) -> Callable[[Path], None]:
    def damage(package: Path) -> None:
        outside = package.parent / f"outside-{Path(name).name}"
        shutil.move(package / name, outside)
        (package / name).symlink_to(outside)

    return damage


def rename_key(package: Path) -> None:
    """The shard has another part in place of the manifest's, in header and indexes alike."""
    for name in (A, INDEX, TENSORKEY, MERGED):
        content = (package / name).read_bytes()
        (package / name).write_bytes(content.replace(b"t.id/part_0_2", b"t.id/part_9_2"))


def relabel_gap(package: Path) -> None:
    """Two shards that own less than all ids; no row is affected."""
    for name in (TENSORKEY, MANIFEST):
        content = (package / name).read_text()
        (package / name).write_text(content.replace("32768@65536@65536", "32769@65536@65536"))


SPARSE_BREAKS: list[tuple[str, Callable[[Path], object], tuple[str, ...], set[tuple[str, str]], str]] = [
    ("a file listed twice", edit(lambda m: {"files": (*m.files, m.files[0])}), (), {(MANIFEST, "manifest")}, "twice"),
    ("a table that is nowhere", edit(lambda m: {"tables": (*m.tables, msgspec.structs.replace(m.tables[0], name="x"))}), (),
     {(MANIFEST, "manifest")}, "is stated with table 'x'; the shards say 't'"),
    ("a table that is not stated", edit(lambda m: {"tables": m.tables[1:]}), (),
     {(A, "manifest"), (B, "manifest")}, "'t.id/part_0_2' is not in the manifest"),
    ("a dense tensor that is not stated", change(dense_tensors=()), (), {(A, "manifest")}, "'w^ ' is not in the manifest"),
    ("a dense tensor of another shape",
     edit(lambda m: {"dense_tensors": (msgspec.structs.replace(m.dense_tensors[0], shape=(4,)),)}), (),
     {(MANIFEST, "manifest")}, "dense tensor 'w' is stated as float32 [4]"),
    ("a dense tensor that is nowhere",
     edit(lambda m: {"dense_tensors": (*m.dense_tensors, msgspec.structs.replace(m.dense_tensors[0], name="v"))}), (),
     {(MANIFEST, "manifest")}, "dense tensor 'v' is in no shard"),
    ("a part of another file", change_part(file=B), (), {(MANIFEST, "manifest")}, f"is stated with file '{B}'"),
    ("a part with other keys", change_part(keys={"id": "t.id/part_0_2"}), (), {(MANIFEST, "manifest"), (A, "manifest")},
     "has a part with slots ['id']"),
    ("a slice that is none", change_part(slice="everything"), (), {(MANIFEST, "manifest")}, "with slice 'everything'"),
    ("rows beyond all numbers", change_part(rows=1 << 63), (), {(MANIFEST, "manifest")}, "is damaged"),
    ("a negative count", change_table(rows_in=59, rows_dropped={"x": -1}), (), {(MANIFEST, "manifest")}, "is damaged"),
    ("more repaired than misplaced", change_table(repaired=3), (), {(MANIFEST, "account")}, "contradicts itself"),
    ("a slot that is not kept", change_table(kept=()), (), {(MANIFEST, "manifest"), (A, "manifest"), (B, "manifest")},
     "keeps no id"),
    ("rows that its parts do not have", change_table(rows_out=59, rows_in=59), (), {(MANIFEST, "account")}, "its rows_out is 59"),
    ("bytes that nothing became of", edit(lambda m: {"account": msgspec.structs.replace(m.account, exported=1)}), (),
     {(MANIFEST, "account")}, "payload does not add up"),
    ("another sum of ids", change_table(id_sum="0" * 16), (), {(A, "id_sum")}, "not those that were exported"),
    ("an index that is not vouched for", edit(lambda m: {"files": tuple(f for f in m.files if f.path != INDEX)}), (),
     {(MANIFEST, "manifest")}, "does not name index"),
    ("a shard that is not vouched for", edit(lambda m: {"files": tuple(f for f in m.files if f.path != A)}), (),
     {(A, "manifest")}, "is in index, but not in the manifest"),
    ("an unknown digest",
     edit(lambda m: {"files": tuple(msgspec.structs.replace(f, digest="md5:1") if f.path == A else f for f in m.files)}), (),
     {(A, "digest")}, "'md5' is no digest algorithm"),
    ("a shard that nobody names", stray("model-000007-of-000009.safetensors"), (),
     {("model-000007-of-000009.safetensors", "stray")}, "named like a shard"),
    ("a shard that leads out", link(A), (), {(A, "link")}, "leads out of the directory"),
    ("an index that leads out", link(INDEX), (), {(INDEX, "link")}, "leads out of the directory"),
    ("a block of another key", rename_key, (A, INDEX, TENSORKEY, MERGED), {(MANIFEST, "manifest"), (A, "manifest")},
     "block 't.id/part_0_2' of table 't' is in no shard"),
    ("a dense tensor of another name", lambda p: (p / A).write_bytes((p / A).read_bytes().replace(b'"w^ "', b'"v^ "')), (A,),
     {(A, "index"), (INDEX, "index"), (MERGED, "merged")}, "'w^ ' should be in"),
    ("a gap between the slices", lambda p: (relabel_gap(p), mend(p)), (TENSORKEY,), {(TENSORKEY, "slices")}, "from 32768 on"),
    ("no merged manifest", lambda p: (p / MERGED).unlink(), (), {(MERGED, "size")}, "is missing"),
    ("a merged manifest that is null", lambda p: (p / MERGED).write_text("null"), (MERGED,), {(MERGED, "merged")}, "is null"),
    ("a merged manifest with ids",
     lambda p: (p / MERGED).write_text(json.dumps({
         **json.loads((p / MERGED).read_text()), "t.id/part_0_2": {"dense": False, "dtype": "I64", "shape": [30]}})),
     (MERGED,), {(MERGED, "merged")}, "is listed, but is no embedding"),
    ("a manifest that was changed", lambda p: (p / MANIFEST).write_text(
        (p / MANIFEST).read_text().replace('"misplaced": 0', '"misplaced": 1', 1)), (),
     {(MANIFEST, "manifest")}, "is not what was committed"),
    ("a manifest that is none", lambda p: (p / MANIFEST).write_text("{"), (), {(MANIFEST, "manifest")}, "no package manifest"),
]  # fmt: skip


def mend(package: Path) -> None:
    """Seal a manifest that was edited as text."""
    from dist_export.manifest import compute_digest

    document = json.loads((package / MANIFEST).read_text())
    document["digest"] = compute_digest(document)
    (package / MANIFEST).write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "names", "expected", "message"), [b[1:] for b in SPARSE_BREAKS], ids=[b[0] for b in SPARSE_BREAKS]
)
def test_each_check_of_the_tables_fails_alone(damage, names, expected, message, sparse: Path) -> None:
    damage(sparse)
    if names:
        restate(sparse, *names)
    report = verify(str(sparse))
    assert told(report) == expected, report.findings
    assert any(message in line for line in report.findings), report.findings


def test_a_folder_of_the_program_that_leads_out_is_not_read(package: Path) -> None:
    link("fx_user_model")(package)
    report = verify(str(package))
    assert told(report) == {("fx_user_model", "link")}
    assert not any("dense program" in line for line in report.checked)


def test_links_within_the_directory_are_fine(sparse: Path) -> None:
    (sparse / "data").mkdir()
    shutil.move(sparse / A, sparse / "data" / "a")
    (sparse / A).symlink_to("data/a")
    report = verify(str(sparse))
    assert report.findings == []
    assert [note.line for note in report.notes] == ["data/a: is not in the manifest; nothing vouches for it"]


def test_what_nobody_names_is_a_note(package: Path) -> None:
    (package / "README").write_text("x")
    (package / "fx_user_model" / "more.json").write_text("{}")
    report = verify(str(package))
    assert report.findings == []
    assert [(note.file, note.check) for note in report.notes] == [
        ("README", "stray"),
        ("fx_user_model/more.json", "stray"),
    ]
    assert report.render()[:1] == ["note: README: is not in the manifest; nothing vouches for it"]


def test_an_interrupted_export_is_no_package(sparse: Path) -> None:
    (sparse / MANIFEST).unlink()
    (sparse / ".dist_export").mkdir()
    report = verify(str(sparse))
    assert report.kind == "interrupted export"
    (line,) = report.findings
    assert line.startswith("manifest.json: no manifest.json, so this is no package: its export did not finish")


def test_a_package_that_lost_its_manifest_is_not_sound(exported: Path, package: Path) -> None:
    """Nothing vouches for its files; one of those that only a package has is enough to know it."""
    (package / MANIFEST).unlink()
    report = verify(str(package))
    assert (report.kind, told(report)) == ("package without manifest", {(MANIFEST, "manifest")})
    for side in ("*.row_index", "*.row_fingerprints"):
        for path in package.glob(side):
            path.unlink()
    (package / "score_program").mkdir(exist_ok=True)
    assert (
        verify(str(package)).findings[0].startswith("manifest.json: is not there, and score_program/ of a package is")
    )


def test_the_files_that_recis_knows_are_a_directory_of_recis(sparse: Path) -> None:
    (sparse / MANIFEST).unlink()
    for path in sparse.glob("*.row_*"):
        path.unlink()
    report = verify(str(sparse))
    assert (report.kind, report.findings) == ("RecIS directory", [])
    assert report.notes[0].line == "manifest.json: is not there, so this is no package; checked as a directory of RecIS"


@pytest.mark.parametrize("digest", ["xxh3", "sha256", "blake3", "none"])
def test_every_digest_is_checked(digest: str, tmp_path: Path) -> None:
    tuning = Tuning(chunk_bytes=64)
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 60}, 2))
    export(tmp_path / "ckpt", tmp_path / "out", num_shards=2, digest=digest, tuning=tuning)
    report = verify(str(tmp_path / "out"), threads=3, max_memory=64 << 20, tuning=tuning)
    assert report.findings == []
    assert ("sizes alone of 2" in report.checked[0]) == (digest == "none")
    path = tmp_path / "out" / B
    data = bytearray(path.read_bytes())
    data[-70] ^= 1
    path.write_bytes(data)
    expected = set() if digest == "none" else {(B, "digest")}
    assert told(verify(str(tmp_path / "out"), threads=3, max_memory=64 << 20, tuning=tuning)) == expected


@pytest.mark.fixtures
@pytest.mark.parametrize("num_shards", [1, 3, "source"])
@pytest.mark.parametrize("case", ["small4x2", "emptyshard", "hostile_misplaced2", "hostile_bool_dense", "dense_types"])
def test_exports_of_reference_checkpoints_are_sound(case, num_shards, recis_fixtures: Path, tmp_path: Path) -> None:
    export(recis_fixtures / case, tmp_path / "out", num_shards=num_shards)
    report = verify(str(tmp_path / "out"), finite=True)
    assert report.findings == []
    assert report.notes == []


@pytest.mark.fixtures
@pytest.mark.parametrize("case", ["small2", "small2_v1", "fullckpt/ckpt_3", "dense_types", "small4x2"])
def test_copies_of_reference_checkpoints_are_sound(case, recis_fixtures: Path, tmp_path: Path) -> None:
    copy(recis_fixtures / case, tmp_path / "out")
    assert verify(str(tmp_path / "out")).findings == []
    place = shutil.copytree(recis_fixtures / case, tmp_path / "place")
    shutil.copy(next(place.glob("model-*")), place / "model-000000-of-000099.safetensors")  # an earlier save's
    copy(place, place)
    assert verify(str(place)).findings == []


def test_a_source_with_gaps_and_overlaps_gives_a_sound_package(tmp_path: Path) -> None:
    def part(ids: list[int], begin: int, end: int) -> PartSpec:
        return PartSpec(np.array(ids), {"embedding": np.ones((len(ids), 2), np.float32)}, (begin, end, 65536))

    write_checkpoint(tmp_path / "ckpt", {"t": [part([1, 65537], 0, 9), part([8, 3], 3, 20), part([30], 30, 65536)]})
    for num_shards in (2, "source"):
        export(tmp_path / "ckpt", tmp_path / f"out{num_shards}", num_shards=num_shards)
        report = verify(str(tmp_path / f"out{num_shards}"))
        assert report.findings == []
        assert {note.check for note in report.notes} == (set() if num_shards == 2 else {"slices"})


def test_a_dense_package_without_tables_is_checked(tmp_path: Path) -> None:
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    exports.export(
        {
            "ckpt_dir": str(source),
            "export_dir": str(tmp_path / "out"),
            "need_export_sparse": False,
            "model": tiny_model.MODEL,
            "dataset": tiny_model.DATASET,
        }
    )
    report = verify(str(tmp_path / "out"), finite=True)
    assert report.findings == []
    (tmp_path / "out" / A).write_bytes(b"")
    assert told(verify(str(tmp_path / "out"))) == {(A, "stray")}


# ---- ids in bounded memory, whatever the shares ------------------------------------------------------------------


def tables_with_repeats() -> dict[str, list[PartSpec]]:
    """Tables of every kind: sound; repeats within parts; across overlapping parts; misplaced and repeated."""
    random = np.random.default_rng(5)

    def part(ids: np.ndarray, begin: int, end: int) -> PartSpec:
        return PartSpec(ids, {"embedding": np.zeros((len(ids), 1), np.float32)}, (begin, end, 65536))

    def spread(count: int, begin: int, end: int) -> np.ndarray:
        high = random.choice(1 << 20, count, replace=False).astype(np.int64)
        return (high << 16) + random.integers(begin, end, count)

    sound = [part(spread(300, 0, 100), 0, 100), part(spread(200, 100, 65536), 100, 65536)]
    within = spread(400, 0, 100)
    within[50:60] = within[10:20]
    across = spread(150, 40, 60)
    misplaced = spread(90, 0, 50)
    misplaced[80:85] = misplaced[70:75]
    return {
        "sound": sound,
        "within": [part(within, 0, 100), part(spread(30, 100, 65536), 100, 65536)],
        "across": [part(across, 0, 60), part(across[30:70], 40, 65536)],
        "misplaced": [part(misplaced, 0, 100), part(misplaced[:7], 100, 65536)],
        "single": [part(np.full(20, 7), 0, 65536)],
    }


def brute_force(tables: dict[str, list[PartSpec]]) -> dict[str, tuple[int, int]]:
    found = {}
    for name, parts in tables.items():
        ids, counts = np.unique(np.concatenate([part.ids for part in parts]), return_counts=True)
        if counts.max() > 1:
            found[name] = int((counts - 1).sum()), int(ids[counts > 1].min())
    return found


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("held", [7, 64, 350, 1 << 20])
@pytest.mark.parametrize("run_rows", [3, 1 << 16])
def test_repeats_are_the_same_in_any_bounds_and_shares(threads, held, run_rows, tmp_path: Path) -> None:
    tables = tables_with_repeats()
    folder = write_checkpoint(tmp_path / "c", tables)
    expected = verify(str(folder)).findings
    truth = brute_force(tables)
    for name, (rows, first) in truth.items():
        assert any(f"{rows} ids of table {name!r} stand twice, first {first}" in line for line in expected), name
    assert sum("stand twice" in line for line in expected) == len(truth) == 4
    assert sum("outside its slice" in line for line in expected) == 1
    tuning = Tuning(held_ids=held, run_rows=run_rows, verified_ids=5)
    assert verify(str(folder), threads=threads, max_memory=64 << 20, tuning=tuning).findings == expected


def test_no_more_ids_are_held_than_allowed(tmp_path: Path, monkeypatch) -> None:
    asked: list[int] = []

    class Counted(id_check.HeldIds):
        def __init__(self, capacity: int) -> None:
            asked.append(capacity)
            super().__init__(capacity)

    monkeypatch.setattr(id_check, "HeldIds", Counted)
    verify(str(write_checkpoint(tmp_path / "c", tables_with_repeats())), tuning=Tuning(held_ids=33))
    assert max(asked) == 33


def test_a_file_that_cannot_be_read_to_its_end_is_a_finding(sparse: Path, monkeypatch) -> None:
    """As of a disk with a broken sector: sizes and header are good, the read fails."""
    from dist_export.storage.range_reader import LocalReader, RangeReader

    original = RangeReader.read_into

    def read_into(self: RangeReader, view: memoryview, offset: int) -> None:
        if self.where.endswith(B) and offset > 300:
            raise OSError(5, f"Input/output error at byte {offset:,}", self.where)
        original(self, view, offset)

    monkeypatch.setattr(RangeReader, "read_into", read_into)
    monkeypatch.setattr(LocalReader, "read_many", RangeReader.read_many)  # one by one
    report = verify(str(sparse), finite=True)
    assert told(report) == {(B, "ids"), (B, "finite")}
    assert told(verify(str(sparse), tuning=Tuning(chunk_bytes=256))) >= {(B, "digest")}
    assert all("Input/output error" in line for line in report.findings)


@pytest.mark.parametrize("sizes", [[], [0], [5, 0, 3, 100, 1], [7] * 20])
@pytest.mark.parametrize("num_shares", [1, 2, 7])
def test_shares_cover_everything_once(sizes: list[int], num_shares: int) -> None:
    item, first, size = cut(np.array(sizes, np.int64), 4, most_whole=5)
    covered = {(i, byte) for i, f, s in zip(item, first, size, strict=True) for byte in range(f, f + s)}
    assert covered == {(i, byte) for i, total in enumerate(sizes) for byte in range(total)}
    assert sorted(set(item.tolist())) == list(range(len(sizes)))
    assert all(s == sizes[i] for i, s in zip(item, size, strict=True) if sizes[i] <= 5)
    shares = share_out(size, num_shares)
    assert [n for share in shares for n in range(len(size))[share]] == list(range(len(size)))
    assert len(shares) == num_shares


def test_shares_are_even() -> None:
    shares = share_out(np.full(1000, 64), 7)
    lengths = [share.stop - share.start for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_json_has_the_documented_form(sparse: Path, capsys) -> None:
    from dist_export.cli import main

    stray("model-000007-of-000009.safetensors")(sparse)
    assert main(["verify", str(sparse), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert list(document) == ["kind", "findings", "notes", "checked"]
    assert document["kind"] == "package"
    assert document["findings"] == [
        {
            "file": "model-000007-of-000009.safetensors",
            "check": "stray",
            "message": "is named like a shard, but neither manifest nor index names it",
        }
    ]
    assert main(["verify", str(sparse)]) == 1
    text = capsys.readouterr().out
    assert text.endswith("unsound: package with 1 finding\n")


def test_tables_alone_are_verified_without_slow_imports(sparse: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from dist_export.cli import main; "
        f"assert main(['verify', {str(sparse)!r}, '--finite']) == 0; "
        "assert not {'torch', 'asyncio', 'fsspec', 'yaml'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bug", [AttributeError, TypeError, KeyError, IndexError, MemoryError])
def test_a_bug_of_ours_is_no_finding(bug: type[Exception], sparse: Path, monkeypatch) -> None:
    """It keeps its traceback: a package that is sound must not be called unsound for it."""

    def fail(*_: object, **__: object) -> None:
        raise bug("a bug of ours")

    monkeypatch.setattr("dist_export.verify.metadata_checks.check_parts", fail)
    with pytest.raises(bug, match="a bug of ours"):
        verify(sparse)
