"""``verify`` of directories that RecIS wrote: what it says of each reference checkpoint, and of each way to break one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_export.errors import UserError
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.verify.report import Report
from dist_export.verify.verify import verify
from tests.support.fixture_cases import CASES
from tests.support.recis_writer import Files, PartSpec, Raw, make_rows, make_tables, split_table, write_checkpoint

A, B = "model-000000-of-000002.safetensors", "model-000001-of-000002.safetensors"
INDEX, TENSORKEY = "index", "tensorkey.json"
MERGED = "torch_rank_weights_embs_table_multi_shard.json"


def told(report: Report) -> set[tuple[str, str]]:
    return {(finding.file, finding.check) for finding in report.found}


def noted(report: Report) -> set[str]:
    """The checks of all notes but those that every directory of RecIS has."""
    return {note.check for note in report.notes} - {"manifest"}


FOUND = {
    "hostile_misplaced2": {(A, "slice"), (B, "slice")},
    "hostile_bool_dense": {("model-000000-of-000001.safetensors", "bool")},
}
"""All others are sound."""
NOTED = {
    **{key: {"prefix", "gpu_keys"} for key in CASES},
    **{key: {"prefix", "gpu_keys", "merged"} for key in ("adam2_v1", "small2_v1")},
    **{key: {"gpu_keys"} for key in ("noopt2", "fp16_noopt", "hostile_bool_dense")},
}


@pytest.mark.fixtures
@pytest.mark.parametrize("case", CASES)
def test_what_it_says_of_each_reference_checkpoint(case: str, recis_fixtures: Path) -> None:
    report = verify(str(recis_fixtures / case), finite=True)
    assert report.kind == "RecIS directory"
    assert told(report) == FOUND.get(case, set())
    assert noted(report) == NOTED[case]
    assert any("all finite" in line for line in report.checked)
    assert any("model.pt" in line for line in report.checked) == (case == "fullckpt/ckpt_3")
    assert any("rows: unique" in line for line in report.checked) == (case != "hostile_misplaced2")


@pytest.mark.fixtures
@pytest.mark.parametrize("case", CASES)
def test_a_copy_by_recis_own_exporter_lacks_its_index_and_is_checked_all_the_same(
    case: str, recis_fixtures: Path, tmp_path: Path
) -> None:
    """It takes over what ends in ``json`` or ``safetensors``: ``index`` does not."""
    for path in (recis_fixtures / case).iterdir():
        if path.name.endswith(("json", "safetensors")):
            shutil.copy(path, tmp_path)
    report = verify(str(tmp_path))
    assert told(report) == FOUND.get(case, set()) | {(INDEX, INDEX)}
    assert "RecIS's Exporter leaves it out when it copies" in report.findings[0]
    assert noted(report) == NOTED[case]


ADAM = ("sparse_adam_exp_avg",)


def checkpoint(folder: Path, **settings: Any) -> Path:
    return write_checkpoint(folder, make_tables({"t": 40, "u": 30}, 2, slots=ADAM), **settings)


def test_a_sound_checkpoint_has_no_findings(tmp_path: Path) -> None:
    report = verify(str(checkpoint(tmp_path / "c", dense={"w": np.ones(3, np.float32)})))
    assert report.findings == []
    assert noted(report) == set()
    assert report.checked == [
        "2 shards, 13 blocks: headers, index, tensorkey.json and merged manifest agree",
        "2 tables, 70 rows: unique, each in the slice of its shard",
    ]


def edit(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        replaced = change(document)
        (folder / name).write_text(json.dumps(document if replaced is None else replaced))

    return damage


def header(name: str, change: Callable[[Any], object]) -> Callable[[Files], None]:
    def damage(files: Files) -> None:
        change(files.headers[name])

    return damage


def lower(files: Files) -> None:
    """One row less in a slot, in header, payload and merged manifest alike."""
    entry = files.headers[B]["u.sparse_adam_exp_avg/part_1_2"]
    entry["shape"][0] -= 1
    entry["data_offsets"][1] -= 16
    files.payloads[B] = files.payloads[B][:-16]


def drop_block(name: str, key: str) -> Callable[[Files], None]:
    """Leave the last block of a file out everywhere."""

    def damage(files: Files) -> None:
        begin, end = files.headers[name].pop(key)["data_offsets"]
        assert end == len(files.payloads[name])
        files.payloads[name] = files.payloads[name][:begin]
        for entries in (files.index["block_index"], files.tensorkey, files.merged):
            entries.pop(key, None)

    return damage


def set_ids(name: str, key: str, change: Callable[[np.ndarray], None]) -> Callable[[Files], None]:
    def damage(files: Files) -> None:
        begin, end = files.headers[name][key]["data_offsets"]
        payload = bytearray(files.payloads[name])
        change(np.frombuffer(payload, np.int64, (end - begin) // 8, begin))
        files.payloads[name] = bytes(payload)

    return damage


def repeat_id(ids: np.ndarray) -> None:
    ids[3] = ids[1]


def stranger(ids: np.ndarray) -> None:
    ids[2] = (ids[2] & ~0xFFFF) | 0xFFFF


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


def link(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        outside = folder.parent / "outside"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return damage


def fifo(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def cut(name: str, length: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def grow(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"\0")


U_ID, T_ID = "u.id/part_1_2", "t.id/part_0_2"
LAST = "u.sparse_adam_exp_avg/part_1_2"

WRITTEN: list[tuple[str, Callable[[Files], None], set[tuple[str, str]], str]] = [
    (
        "a block that index forgets",
        lambda f: f.index["block_index"].pop(U_ID),
        {(B, "index")},
        "index does not name it",
    ),
    (
        "a block that index puts elsewhere",
        lambda f: f.index["block_index"].update({U_ID: 0}),
        {(B, "index")},
        f"but index says that it is in {A}",
    ),
    (
        "a block that stands in two files",
        lambda f: f.headers[B].update({T_ID: {"dtype": "I64", "shape": [0], "data_offsets": [len(f.payloads[B])] * 2}}),
        {(B, "index")},
        f"holds '{T_ID}', but index says that it is in {A}",
    ),
    (
        "a block that is nowhere",
        lambda f: f.index["block_index"].update({"x.id/part_0_1": 0}),
        {(INDEX, "index")},
        "should be in",
    ),
    (
        "a gap in the numbers",
        lambda f: f.index["file_index"].update({B: 4}),
        {(INDEX, "index")},
        "reader crashes on that",
    ),
    (
        "a number out of range",
        lambda f: f.index["block_index"].update({U_ID: 9}),
        {(INDEX, "index")},
        "is in file 9, but there are 2 files",
    ),
    (
        "a file that leads out",
        lambda f: f.index["file_index"].update({"../x.safetensors": 2}),
        {(INDEX, "index")},
        "is no name of a data file",
    ),
    (
        "a file with a control character",
        lambda f: f.index["file_index"].update({"x\n\x1b[2J.safetensors": 2}),
        {(INDEX, "index")},
        "is no name of a data file",
    ),
    (
        "a file that is not there",
        lambda f: f.index["file_index"].update({"other.safetensors": 2}),
        {("other.safetensors", "header")},
        "is missing; index names it",
    ),
    (
        "a block that tensorkey forgets",
        lambda f: f.tensorkey.pop(U_ID),
        {(TENSORKEY, "tensorkey.json")},
        "loses its rows without a word",
    ),
    (
        "a block that tensorkey alone knows",
        lambda f: f.tensorkey.update({"x.id/part_0_1": "x@id^0@1@1"}),
        {(TENSORKEY, "tensorkey.json")},
        "'x.id/part_0_1' is in no file",
    ),
    (
        "a name that is none",
        lambda f: f.tensorkey.update({U_ID: "nothing"}),
        {(TENSORKEY, "tensorkey.json")},
        "expected <table>@<slot>",
    ),
    (
        "metadata",
        header(A, lambda h: h.update({"__metadata__": {"format": "pt"}})),
        {(A, "metadata")},
        "__metadata__",
    ),
    ("an unknown dtype", header(A, lambda h: h[T_ID].update(dtype="U32")), {(A, "header")}, "has dtype 'U32'"),
    ("a slot with fewer rows than ids", lower, {(B, "rows")}, "RecIS's reader does not see that"),
    (
        "a slot missing in one part",
        drop_block(B, LAST),
        {(B, "slots")},
        "but no sparse_adam_exp_avg, which other parts have",
    ),
    ("an id twice", set_ids(B, U_ID, repeat_id), {(A, "unique")}, "1 ids of table 'u' stand twice"),
    ("an id of another slice", set_ids(A, T_ID, stranger), {(A, "slice")}, f"1 ids of '{T_ID}' lie outside its slice"),
    (
        "a merged manifest of another shape",
        lambda f: f.merged["t.embedding/part_0_2"].update(shape=[1, 4]),
        {(MERGED, "merged")},
        "has shape [1, 4]",
    ),
    (
        "a merged manifest without a part",
        lambda f: f.merged.pop("t.embedding/part_0_2"),
        {(MERGED, "merged")},
        "'t.embedding/part_0_2' is missing",
    ),
    (
        "a merged manifest with a ghost",
        lambda f: f.merged.update({"x.embedding/part_0_1": dict(f.merged["t.embedding/part_0_2"])}),
        {(MERGED, "merged")},
        "'x.embedding/part_0_1' is in no file",
    ),
    (
        "a merged manifest with an entry that is none",
        lambda f: f.merged.update({"t.embedding/part_0_2": 3}),
        {(MERGED, "merged")},
        "should be an object",
    ),
    (
        "a merged manifest of ids that are nowhere",
        lambda f: f.merged["t.embedding/part_0_2"].update(hashmap_key="x"),
        {(MERGED, "merged")},
        "has hashmap_key 'x'",
    ),
    (
        "a merged manifest with another dtype",
        lambda f: f.merged["t.embedding/part_0_2"].update(dtype="float16"),
        {(MERGED, "merged")},
        "has dtype 'float16'",
    ),
]


@pytest.mark.parametrize(("damage", "expected", "message"), [w[1:] for w in WRITTEN], ids=[w[0] for w in WRITTEN])
def test_each_check_fails_alone(damage, expected, message, tmp_path: Path) -> None:
    report = verify(str(checkpoint(tmp_path / "c", change=damage)))
    assert told(report) == expected, report.findings
    assert any(message in line for line in report.findings), report.findings
    assert all(line.isprintable() for line in report.findings)


BROKEN: list[tuple[str, Callable[[Path], object], set[tuple[str, str]], str]] = [
    ("no index", lambda p: (p / INDEX).unlink(), {(INDEX, "index")}, "cannot open the directory without it"),
    ("no tensorkey", lambda p: (p / TENSORKEY).unlink(), {(TENSORKEY, TENSORKEY)}, "cannot open the directory"),
    ("an index that is no JSON", write(INDEX, b"{"), {(INDEX, "index")}, "is not the JSON it should be"),
    ("a tensorkey that is a list", write(TENSORKEY, b"[]"), {(TENSORKEY, TENSORKEY)}, "should be a JSON object"),
    ("an index that is a pipe", fifo(INDEX), {(INDEX, "index")}, "is no regular file"),
    ("a shard that is a pipe", fifo(B), {(B, "header")}, "is no regular file"),
    ("a shard cut short", cut(B, -1), {(B, "header")}, "truncated"),
    ("a shard cut in its header", cut(B, 20), {(B, "header")}, "truncated"),
    ("an empty shard", cut(B, 0), {(B, "header")}, "too short"),
    ("a shard with bytes too many", grow(B), {(B, "header")}, "bytes that no entry names"),
    ("a shard gone", lambda p: (p / B).unlink(), {(B, "header")}, "is missing; index names it"),
    ("a link that leads out", link(B), {(B, "link")}, "leads out of the directory"),
    ("a broken link", lambda p: ((p / B).unlink(), (p / B).symlink_to("gone")), {(B, "header")}, "is missing"),
    ("a merged manifest that leads out", link(MERGED), {(MERGED, "link")}, "leads out"),
    ("a merged manifest that is no JSON", write(MERGED, b"]"), {(MERGED, "merged")}, "is not the JSON"),
    (
        "a file of a crashed save",
        write("ckpt-0000000-0000001.data.tmp", b""),
        {("ckpt-0000000-0000001.data.tmp", "leftover")},
        "a save that crashed",
    ),
    (
        "a manifest of a crashed save",
        write("ckpt-0000000-0000001.json", b""),
        {("ckpt-0000000-0000001.json", "leftover")},
        "a save that crashed",
    ),
    (
        "names of a crashed save",
        write("0tensorkey.json", b""),
        {("0tensorkey.json", "leftover")},
        "a save that crashed",
    ),
    ("a name that cannot be printed", write("a\x1b[31m\n", b""), {("a\\x1b[31m\\n", "name")}, "cannot be printed"),
    (
        "a model.pt that is none",
        write("model.pt", b"junk"),
        {("model.pt", "model.pt")},
        "cannot be read as a state_dict",
    ),
    (
        "a model.pt that leads out",
        lambda p: (write("model.pt", b"x")(p), link("model.pt")(p)),
        {("model.pt", "link")},
        "leads out",
    ),
]


@pytest.mark.parametrize(("damage", "expected", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_each_damage_is_told_alone_and_in_one_line(damage, expected, message, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c")
    damage(folder)
    report = verify(str(folder))
    assert told(report) == expected, report.findings
    assert len(report.findings) == 1
    assert message in report.findings[0]
    assert report.findings[0].isprintable()


def part(
    ids: list[int], begin: int, end: int, size: int = 65536, slots: dict[str, Any] | None = None, **more: Any
) -> PartSpec:
    rows = {"embedding": np.ones((len(ids), 2), np.float32)} if slots is None else slots
    return PartSpec(np.array(ids, np.int64), rows, (begin, end, size), **more)


F32 = np.ones((1, 2), np.float32)
SHAPES: list[tuple[str, dict[str, list[PartSpec]], set[str], set[str], str]] = [
    ("two ranks with the default slice", {"t": [part([1], 0, 65536), part([2], 0, 65536)]}, {"twice"}, set(), "RecIS keeps one"),
    ("slices of two sizes", {"t": [part([1], 0, 8, 16), part([9], 8, 32, 32)]}, {"slices"}, set(), "sizes 16, 32"),
    ("another size", {"t": [part([1], 0, 16, 16)]}, set(), {"slices"}, "slices of size 16"),
    ("a gap", {"t": [part([1], 0, 8), part([9], 9, 65536)]}, set(), {"slices"}, "has the slice from 8 on"),
    ("a gap at the end", {"t": [part([1], 0, 8)]}, set(), {"slices"}, "has the slice from 8 on"),
    ("an overlap", {"t": [part([1], 0, 9), part([9], 8, 65536)]}, set(), {"slices"}, "overlap, first at 8"),
    ("an id in two overlapping parts", {"t": [part([8], 0, 9), part([8], 8, 65536)]}, {"unique"}, {"slices"}, "first 8"),
    ("other dims in a part", {"t": [part([1], 0, 8), part([9], 8, 65536, slots={"embedding": np.ones((1, 3), np.float32)})]},
     {"shape"}, set(), "of the same table and slot is F32 [1, 2]"),
    ("no embedding", {"t": [part([1], 0, 65536, slots={"other": F32})]}, {"slots"}, set(), "has no embedding block"),
    ("a flat embedding", {"t": [part([1], 0, 65536, slots={"embedding": np.ones(1, np.float32)})]}, {"shape"}, set(),
     "[rows, dim]"),
    ("an embedding in its name", {"t.embedding_x": [part([1], 0, 65536)]}, set(), {"merged"}, "serving finds no ids"),
    ("an @ in its name", {"t@x": [part([1], 0, 65536)]}, set(), {"merged"}, "serving does not find it"),
    ("a name that begins another", {"t": [part([1], 0, 65536, slots={"embedding": F32, "embedding_2": F32})]},
     set(), {"prefix"}, "'t@embedding' begins the name 't@embedding_2'"),
    ("ids that a GPU cannot hold", {"t": [part([-1, 3], 0, 65536)]}, set(), {"gpu_keys"}, "1 ids are -1 or -2"),
    ("an empty part left out", {"t": [part([1], 0, 8), None, part([30000], 16, 65536)]}, set(), {"slices"}, "from 8 on"),
]  # fmt: skip


@pytest.mark.parametrize(("tables", "found", "notes", "message"), [s[1:] for s in SHAPES], ids=[s[0] for s in SHAPES])
def test_tables_of_odd_shapes(tables, found, notes, message, tmp_path: Path) -> None:
    report = verify(str(write_checkpoint(tmp_path / "c", tables)))
    assert {finding.check for finding in report.found} == found, report.findings
    assert noted(report) == notes
    lines = report.findings + [note.line for note in report.notes]
    assert any(message in line for line in lines), lines


def test_an_id_in_two_parts_of_one_name_is_found(tmp_path: Path) -> None:
    report = verify(str(write_checkpoint(tmp_path / "c", {"t": [part([1], 0, 65536), part([1], 0, 65536)]})))
    assert {finding.check for finding in report.found} == {"twice", "unique"}


def test_a_merged_manifest_with_an_entry_twice(tmp_path: Path) -> None:
    """Also where the two are far apart, in different pieces of a long file."""
    folder = checkpoint(tmp_path / "c")
    entries = json.loads((folder / MERGED).read_text())
    text = json.dumps(entries, indent=4)
    first = json.dumps({"t.embedding/part_0_2": entries["t.embedding/part_0_2"]}, indent=4)
    (folder / MERGED).write_text(text[:-2] + "," + first[1:])
    for tuning in (STANDARD, Tuning(json_bytes=64)):
        (line,) = verify(str(folder), tuning=tuning).findings
        assert "the key 't.embedding/part_0_2' stands there twice" in line


def test_values_are_read_where_asked_for_alone(tmp_path: Path, monkeypatch) -> None:
    from tests.support.sparse_cases import recorded_reads

    folder = checkpoint(tmp_path / "c")
    with recorded_reads(monkeypatch) as reads:
        verify(str(folder))
        assert sum(end - begin for where, begin, end in reads if where.endswith("safetensors")) < 2000
        verify(str(folder), finite=True)
        assert sum(end - begin for where, begin, end in reads if where.endswith("safetensors")) > 4000


def test_parts_without_rows_may_lack_slots(tmp_path: Path) -> None:
    empty = part([], 32768, 65536)
    tables = {"t": [part([1], 0, 32768, slots={"embedding": F32, "step": np.ones((1, 1), np.int64)}), empty]}
    report = verify(str(write_checkpoint(tmp_path / "c", tables)))
    assert report.findings == []


def test_a_part_of_ids_alone_is_refused_by_recis(tmp_path: Path) -> None:
    tables = {"t": [part([1], 0, 32768), part([], 32768, 65536, slots={})]}
    (line,) = verify(str(write_checkpoint(tmp_path / "c", tables))).findings
    assert "RecIS's loader refuses the table" in line


def test_slices_in_two_spellings_are_one_block(tmp_path: Path) -> None:
    def respell(files: Files) -> None:
        files.tensorkey = {
            key: name.replace("@0", "@").replace("^00000", "^0") if "part_1" in key else name
            for key, name in files.tensorkey.items()
        }

    tables = {"t": [part([1], 0, 65536), part([2], 0, 65536)]}
    report = verify(str(write_checkpoint(tmp_path / "c", tables, change=respell)))
    assert report.findings == []
    assert "in two spellings" in " ".join(note.line for note in report.notes)


@pytest.mark.parametrize(
    ("manifest", "message"), [("null", "is null"), (None, "is missing"), ("v1", "in the style of")]
)
def test_merged_manifests_that_recis_itself_does_not_read_are_notes(manifest, message, tmp_path: Path) -> None:
    report = verify(str(checkpoint(tmp_path / "c", manifest=manifest)))
    assert report.findings == []
    assert [note.check for note in report.notes] == ["manifest", "merged"]
    assert message in report.notes[1].line


def test_an_old_manifest_with_an_entry_of_another_dtype(tmp_path: Path) -> None:
    def damage(files: Files) -> None:
        files.merged[T_ID]["dtype"] = "I32"

    (line,) = verify(str(checkpoint(tmp_path / "c", manifest="v1", change=damage))).findings
    assert f"{T_ID!r} has dtype 'I32', the shards say 'I64'" in line


def test_keys_that_are_internal_names_need_no_tensorkey(tmp_path: Path) -> None:
    report = verify(str(checkpoint(tmp_path / "c", internal_keys=True, manifest=None)))
    assert report.findings == []


def test_arbitrary_keys_are_fine_where_tensorkey_maps_them(tmp_path: Path) -> None:
    report = verify(str(checkpoint(tmp_path / "c", rename=lambda _, internal: "k" + internal[::-1], manifest=None)))
    assert report.findings == []


def test_a_dense_name_like_a_part_is_unreadable_to_recis(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c", dense={"w/part_0": np.ones(2, np.float32)})
    (line,) = verify(str(folder)).findings
    assert "RecIS cannot read it" in line


def test_bool_is_lost_with_its_file(tmp_path: Path) -> None:
    (line,) = verify(str(checkpoint(tmp_path / "c", dense={"b": np.array([True])}))).findings
    assert line.startswith(f"{A}: holds a tensor of dtype 'bool'")


def test_an_earlier_save_that_nobody_reads_is_a_note(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c")
    shutil.copy(folder / A, folder / "model-000003-of-000004.safetensors")
    report = verify(str(folder))
    assert report.findings == []
    assert noted(report) == {"stray"}


def test_saves_that_no_index_tells_apart(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c")
    shutil.copy(folder / A, folder / "model-000003-of-000004.safetensors")
    (folder / INDEX).unlink()
    report = verify(str(folder))
    assert (("model-000003-of-000004.safetensors", "index")) in told(report), "its blocks stand twice"
    assert "of 000002 and of 000004 files" in " ".join(note.line for note in report.notes)


def test_parameters_of_model_pt_and_the_merged_manifest(tmp_path: Path) -> None:
    import torch

    state = {"a": torch.ones(2), "b": torch.ones(3, dtype=torch.float64)}
    folder = checkpoint(tmp_path / "c", model_state=state)
    assert verify(str(folder)).findings == []
    torch.save({"a": torch.ones(4)}, folder / "model.pt")
    report = verify(str(folder))
    assert told(report) == {(MERGED, "merged")}
    assert [line.partition(": ")[2] for line in report.findings] == [
        "'a' is float32 [2], model.pt says float32 [4]",
        "'b' is neither in a shard nor in model.pt",
    ]


def test_values_of_model_pt_that_are_not_finite(tmp_path: Path) -> None:
    import torch

    state = {"a": torch.tensor([1.0, float("nan"), float("inf")]), "b": torch.arange(3)}
    folder = checkpoint(tmp_path / "c", model_state=state)
    assert verify(str(folder)).findings == []
    assert verify(str(folder), finite=True).findings == ["model.pt: 'a' holds 1 NaN and 1 infinities"]


def bits_of(dtype: str, values: list[float]) -> Any:
    array = np.array(values, np.float32).reshape(-1, 2)
    if dtype == "BF16":
        return Raw("BF16", (array.view(np.uint32) >> 16).astype(np.uint16))
    return array.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_values_that_are_not_finite_are_counted_by_table_and_slot(dtype, threads, tmp_path: Path) -> None:
    inf, nan = float("inf"), float("nan")
    parts = [
        part([1, 2, 3], 0, 8, slots={"embedding": bits_of(dtype, [0, -1, 2, 65504 / 2, 1e-4, -0.0])}),
        part([9, 10, 11], 8, 65536, slots={"embedding": bits_of(dtype, [0, 1, 2, nan, -inf, inf])}),
    ]
    folder = write_checkpoint(tmp_path / "c", {"t": parts}, dense={"w": np.array(nan, np.float32), "i": np.array([7])})
    assert verify(str(folder)).findings == []
    tuning = Tuning(value_bytes=16, scan_bytes=8)
    report = verify(str(folder), finite=True, threads=threads, max_memory=64 << 20, tuning=tuning)
    assert report.findings == [
        f"{A}: dense tensor 'w' holds 1 NaN and 0 infinities, first in 'w^ ' row 0",
        f"{B}: slot 'embedding' of table 't' holds 1 NaN and 2 infinities, first in 't.embedding/part_1_2' row 1",
    ]


def test_the_number_of_alike_findings_is_told_instead_of_all(tmp_path: Path) -> None:
    def damage(files: Files) -> None:
        files.index["block_index"].update({f"x{i}": 0 for i in range(500)})

    report = verify(str(checkpoint(tmp_path / "c", change=damage)))
    assert report.count() == 500
    assert len(report.findings) == 11
    assert report.findings[-1] == "index: and 490 more of this kind"
    assert report.render()[-1] == "unsound: RecIS directory with 500 findings"


def test_what_is_nothing_cannot_be_asked(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(UserError, match="is no package and nothing that RecIS wrote"):
        verify(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        verify(str(tmp_path / "nowhere"))


def test_memory_stores_are_checked_too() -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    ids, rows = make_rows(20)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, {"t": split_table(ids, rows, 2)})
        for path in Path(folder).iterdir():
            fs.pipe_file(f"/verify/c/{path.name}", path.read_bytes())
    assert verify("memory://verify/c", finite=True).findings == []
    fs.pipe_file("/verify/c/model-000000-of-000002.safetensors", b"short")
    assert told(verify("memory://verify/c")) == {(A, "header")}
    fs.rm("/verify", recursive=True)
