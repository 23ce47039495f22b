"""Exports that cast: the truth in another dtype, the same whoever cast what, and what does not fit told."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dist_export
from dist_export.checkpoint.metadata import (
    ABSENT,
    IN_STRIPS,
    Blocks,
    Checkpoint,
    Parts,
    SlotMeta,
    SourceFile,
    Strips,
    TableMeta,
    no_strips,
)
from dist_export.config.schema import ExportConfig
from dist_export.errors import ConfigError, DistExportError, ExportError, PlanError
from dist_export.formats.row_encodings import INT8_ROWWISE, decode_int8
from dist_export.formats.tuning import Tuning
from dist_export.inspect.describe import describe, render
from dist_export.pipeline.dry_run import make_report, render_report
from dist_export.plan.casts import cast_slots
from dist_export.plan.census import count_row_indexed_rows
from dist_export.plan.selection import select
from dist_export.plan.shard_layout import plan_shards
from dist_export.plan.target_slices import plan_targets
from dist_export.storage.urls import open_directory
from dist_export.transfer import unit_runner
from dist_export.transfer.casting import cast_blocks
from dist_export.verify.verify import verify
from tests.support.fixture_cases import CASES
from tests.support.properties import examples
from tests.support.recis_writer import PartSpec, Raw, make_tables, read_back, split_table, truth_of, write_checkpoint
from tests.support.row_model import truth_of_model
from tests.support.sparse_cases import ADAM, assert_exact, content, export, plan, run, tiny

DTYPES = ("float16", "bfloat16", "int8")


def cast_truth(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Return rows as they should be written, by torch."""
    if dtype == "int8":
        return torch.ops.quantized.embedding_bag_byte_prepack(torch.from_numpy(rows.astype(np.float32))).numpy()
    tensor = torch.from_numpy(np.ascontiguousarray(rows)).to(getattr(torch, dtype))
    return tensor.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else tensor.numpy()


def in_dtype(truth: dict[str, dict[str, np.ndarray]], dtype: str) -> dict[str, dict[str, np.ndarray]]:
    return {
        table: {name: cast_truth(rows, dtype) if name == "embedding" else rows for name, rows in slots.items()}
        for table, slots in truth.items()
    }


def slot_of(manifest: dist_export.Manifest, table: str) -> Any:
    entry = next(entry for entry in manifest.tables if entry.name == table)
    return next(slot for slot in entry.kept if slot.name == "embedding")


def entries(folder: Path) -> str:
    return json.dumps(json.loads((folder / "manifest.json").read_text())["tables"])


def truth_of_fixture(fixtures: Path, case: str, scratch: Path) -> dict[str, dict[str, np.ndarray]]:
    """Return RecIS's own truth of what an export keeps; where the fixture has none, that of an export without casts."""
    name_of_truth = "small2" if case.startswith("fullckpt") else case
    path = fixtures / f"{name_of_truth}.truth.npz"
    if not path.exists():
        export(fixtures / case, scratch / "plain")
        return read_back(scratch / "plain")
    truth: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path) as arrays:
        for name in arrays.files:
            table, at, slot = name.rpartition("@")
            if at and not slot.startswith("sparse_"):
                truth.setdefault(table, {})[slot] = arrays[name]
    return truth


@pytest.mark.fixtures
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_every_fixture_equals_its_truth_in_the_dtype(
    case: str, dtype: str, recis_fixtures: Path, tmp_path: Path
) -> None:
    truth = truth_of_fixture(recis_fixtures, case, tmp_path)
    floats = {table for table, slots in truth.items() if slots["embedding"].dtype.kind == "f"}
    for num_shards in (1, 2, 3, 4):
        out = tmp_path / str(num_shards)
        manifest = export(recis_fixtures / case, out, num_shards=num_shards, dtype=dict.fromkeys(floats, dtype))
        found = read_back(out)
        for table, slots in truth.items():
            expected = cast_truth(slots["embedding"], dtype) if table in floats else slots["embedding"]
            assert found[table]["embedding"].tobytes() == expected.tobytes(), (table, num_shards)
            assert found[table]["id"].tobytes() == slots["id"].tobytes()
        assert verify(str(out), finite=True).findings == []
        for table in floats:
            cast = slot_of(manifest, table).cast
            if slot_of(manifest, table).dtype != str(truth[table]["embedding"].dtype):
                assert cast.values == truth[table]["embedding"].size


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_those_of_the_values(dtype: str, tmp_path: Path) -> None:
    tables = make_tables({"a": 3000, "b": 200}, 3, dim=20)
    write_checkpoint(tmp_path / "in", tables)
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards=2, dtype={"*": dtype})
    truth = truth_of(tables)
    assert_exact(tmp_path / "out", in_dtype(truth, dtype))
    package = dist_export.open_package(tmp_path / "out")
    for table, slots in truth.items():
        rows, has_row = package.lookup(table, slots["id"])
        assert has_row.all()
        assert rows.shape == slots["embedding"].shape
        errors = np.abs(rows.astype(np.float64) - slots["embedding"])
        cast = slot_of(manifest, table).cast
        assert cast.max_abs_error == errors.max()
        assert cast.mean_abs_error == pytest.approx(errors.mean(), rel=1e-12)
        assert (cast.values, cast.nans, cast.out_of_range) == (errors.size, 0, 0)
        assert cast.source_dtype == "float32"
        if dtype == "int8":
            assert rows.dtype == np.float32
            raw, _ = package.lookup(table, slots["id"], raw=True)
            assert decode_int8(raw).tobytes() == rows.tobytes()
            slot = slot_of(manifest, table)
            assert (slot.dtype, slot.shape, slot.encoding, slot.dim) == ("uint8", (28,), INT8_ROWWISE, 20)


def test_lookups_of_all_shapes_and_of_unknown_ids(tmp_path: Path) -> None:
    tables = make_tables({"a": 30}, 1, dim=3)
    write_checkpoint(tmp_path / "in", tables)
    export(tmp_path / "in", tmp_path / "out", dtype={"a": "int8"})
    ids = np.append(tables["a"][0].ids[:5], 1).reshape(2, 3)
    rows, has_row = dist_export.open_package(tmp_path / "out").lookup("a", ids)
    assert rows.shape == (2, 3, 3)
    assert has_row.tolist() == [[True] * 3, [True, True, False]]
    assert not rows[1, 2].any()
    np.testing.assert_allclose(rows[0], tables["a"][0].slots["embedding"][:3], atol=0.02)


SOURCES = {
    "float64": (np.float64, "F64"),
    "float16": (np.float16, "F16"),
    "float32": (np.float32, "F32"),
}


@pytest.mark.parametrize("target", ["float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize("source", [*SOURCES, "bfloat16"])
def test_all_pairs(source: str, target: str, tmp_path: Path) -> None:
    ids = np.arange(500, dtype=np.int64) * 977
    values = np.random.default_rng(1).standard_normal((500, 3))
    tensor = torch.from_numpy(values).to(getattr(torch, source))
    if source == "bfloat16":
        rows: Any = Raw("BF16", tensor.view(torch.int16).numpy().view(np.uint16))
    else:
        rows = tensor.numpy()
    parts = [PartSpec(ids, {"embedding": rows}, (0, 65536, 65536))]
    write_checkpoint(tmp_path / "in", {"t": parts})
    for num_shards in (1, 3):
        manifest = export(tmp_path / "in", tmp_path / f"{num_shards}", num_shards=num_shards, dtype={"t": target})
        found = read_back(tmp_path / f"{num_shards}")["t"]["embedding"]
        if target == "int8":
            expected = cast_truth(tensor.float().numpy(), "int8")
        elif source == "float64" and target == "float16":
            expected = values.astype(np.float16)
        else:
            wide = tensor.to(getattr(torch, target))
            expected = wide.view(torch.int16).numpy() if target == "bfloat16" else wide.numpy()
        assert found.tobytes() == np.ascontiguousarray(expected).tobytes()
        assert (slot_of(manifest, "t").cast is msgspec.UNSET) == (source == target)
    if source == target:  # then the bytes go over as they are, and the package is what it is without the setting
        export(tmp_path / "in", tmp_path / "plain", num_shards=3)
        assert content(tmp_path / "plain") == content(tmp_path / "3")
        assert entries(tmp_path / "plain") == entries(tmp_path / "3")


def test_the_first_pattern_that_matches_counts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", make_tables({"user.a": 10, "user.b": 10, "item": 10, "left": 9}, 1))
    dtype = [{"user.a": "int8"}, {"left": "source"}, {"user.*": "bfloat16"}, {"*": "float16"}]
    manifest = export(tmp_path / "in", tmp_path / "out", dtype=dtype)
    assert {t.name: slot_of(manifest, t.name).dtype for t in manifest.tables} == {
        "user.a": "uint8",
        "user.b": "bfloat16",
        "item": "float16",
        "left": "float32",
    }
    assert any("user.b: written as bfloat16" in note for note in manifest.notes)
    assert any("user.a: written as int8" in note for note in manifest.notes)
    assert not any("item" in note for note in manifest.notes)
    config = tmp_path / "export.yaml"
    config.write_text(
        f"ckpt_dir: {tmp_path / 'in'}\nexport_dir: {tmp_path / 'yaml'}\nfilter_sparse_opt: true\n"
        "dtype: {user.a: int8, left: source, 'user.*': bfloat16, '*': float16}\n"
    )
    again = dist_export.export(str(config))
    assert again.tables == manifest.tables


def test_settings_that_cannot_be_met(tmp_path: Path) -> None:
    tables = make_tables({"a": 10}, 1)
    ids = np.arange(5, dtype=np.int64)
    tables["ints"] = [PartSpec(ids, {"embedding": np.ones((5, 2), np.int8)}, (0, 65536, 65536))]
    tables["cube"] = [PartSpec(ids, {"embedding": np.ones((5, 2, 3), np.float32)}, (0, 65536, 65536))]
    write_checkpoint(tmp_path / "in", tables)
    for dtype, told in (
        ({"b*": "float16"}, r"the pattern 'b\*' matches no table of the checkpoint, which has a, ints, cube"),
        ({"*": "float16"}, r"table 'ints' has rows of int8, which cannot be cast to float16.*ints: source"),
        ({"cube": "int8"}, r"table 'cube' has rows of shape \[2, 3\]"),
    ):
        with pytest.raises(PlanError, match=told):
            export(tmp_path / "in", tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()
    manifest = export(tmp_path / "in", tmp_path / "out", dtype={"ints": "source", "*": "float16"})
    assert slot_of(manifest, "cube").shape == (2, 3)
    assert read_back(tmp_path / "out")["cube"]["embedding"].tobytes() == np.ones((5, 2, 3), np.float16).tobytes()
    with pytest.raises(ConfigError, match="dtype needs new shards"):
        ExportConfig(ckpt_dir="a", export_dir="b", filter_sparse_opt=False, dtype={"a": "float16"})
    with pytest.raises(ConfigError, match="'a' is to be 'float8'; rows can be cast to float16, bfloat16"):
        ExportConfig(ckpt_dir="a", export_dir="b", filter_sparse_opt=True, dtype={"a": "float8"})
    with pytest.raises(ConfigError, match="on_overflow"):
        ExportConfig(ckpt_dir="a", export_dir="b", filter_sparse_opt=True, on_overflow="clamp")
    with pytest.raises(DistExportError, match="dtype"):
        export(tmp_path / "in", tmp_path / "out", dtype={"a": "float8"})


def broken(tmp_path: Path) -> Path:
    """Two tables with values that do not fit, in several parts."""
    tables = make_tables({"a": 400, "b": 90, "fine": 20}, 3, dim=4)
    tables["a"][1].slots["embedding"][7, 2] = 1e5
    tables["a"][2].slots["embedding"][3] = [np.nan, -np.inf, 1, 70000]
    tables["b"][0].slots["embedding"][0, 0] = np.nan
    return write_checkpoint(tmp_path / "in", tables)


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_values_that_do_not_fit_are_an_error_with_numbers_and_a_place(num_shards: int, tmp_path: Path) -> None:
    source = broken(tmp_path)
    ids = read_back(source)["a"]
    place = int(np.flatnonzero((ids["embedding"] == 1e5).any(axis=1))[0])
    with pytest.raises(ExportError) as caught:
        export(source, tmp_path / "out", num_shards=num_shards, dtype={"*": "float16"})
    told = str(caught.value)
    assert caught.value.exit_code == 1
    assert "\n" not in told
    assert "table 'a': 4 values do not fit float16 (3 beyond +-65504, 1 NaN)" in told
    assert f"row 7 of 'a.embedding/part_1_3' (id {ids['id'][place]})" in told
    assert "table 'b': 1 values do not fit float16 (1 NaN), the first in row 0 of 'b.embedding/part_0_3'" in told
    assert "'fine'" not in told
    assert "on_overflow: clamp" in told
    assert not (tmp_path / "out" / "manifest.json").exists()

    manifest = export(source, tmp_path / "out", num_shards=num_shards, dtype={"*": "float16"}, on_overflow="clamp")
    assert manifest.run["reused_shards"] == num_shards
    cast = slot_of(manifest, "a").cast
    assert (cast.nans, cast.out_of_range, cast.values) == (1, 3, 1600)
    assert 0 < cast.max_abs_error < 0.002
    found = read_back(tmp_path / "out")["a"]["embedding"]
    assert found[place, 2] == 65504
    assert np.isnan(found).sum() == 1
    assert not np.isinf(found).any()
    fresh = export(source, tmp_path / "fresh", num_shards=num_shards, dtype={"*": "float16"}, on_overflow="clamp")
    assert (fresh.tables, fresh.digest) == (manifest.tables, manifest.digest)
    assert content(tmp_path / "fresh") == content(tmp_path / "out")


def test_int8_rows_that_do_not_fit(tmp_path: Path) -> None:
    source = broken(tmp_path)
    with pytest.raises(ExportError, match=r"table 'a': 2 values do not fit int8 \(1 beyond \+-1.7e\+38, 1 NaN\)"):
        export(source, tmp_path / "out", dtype={"a": "int8"})
    manifest = export(source, tmp_path / "out", dtype={"a": "int8"}, on_overflow="clamp")
    assert slot_of(manifest, "a").cast.out_of_range == 1
    assert verify(str(tmp_path / "out"), finite=True).count() == verify(str(tmp_path / "out")).count() + 1  # NaN of b
    rows, _ = dist_export.open_package(tmp_path / "out").lookup("a", read_back(source)["a"]["id"])
    assert np.isfinite(rows).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_rows_that_are_left_behind_count_for_nothing(num_shards: int, dtype: str, tmp_path: Path) -> None:
    """A row that stands twice: the one that goes is broken, and does not hinder."""
    tables = make_tables({"a": 300}, 2)
    first, second = tables["a"]
    repeated = first.ids[:40]
    broken_rows = np.full((40, 4), np.nan, np.float32)
    second.ids = np.concatenate([second.ids[:50], repeated, second.ids[50:]])
    second.slots = {name: np.concatenate([rows[:50], broken_rows, rows[50:]]) for name, rows in second.slots.items()}
    write_checkpoint(tmp_path / "in", tables)
    asked: dict[str, Any] = {"num_shards": num_shards, "dtype": {"a": dtype}}
    manifest = export(tmp_path / "in", tmp_path / "out", on_duplicate="first", **asked)
    cast = slot_of(manifest, "a").cast
    assert (cast.nans, cast.values) == (0, manifest.tables[0].rows_out * 4)
    clean = make_tables({"a": 300}, 2)
    assert_exact(tmp_path / "out", in_dtype(truth_of(clean), dtype))
    write_checkpoint(tmp_path / "clean", clean)
    expected = slot_of(export(tmp_path / "clean", tmp_path / "other", **asked), "a").cast
    assert cast.max_abs_error == expected.max_abs_error
    assert cast.mean_abs_error == pytest.approx(expected.mean_abs_error, rel=1e-12)
    with pytest.raises(ExportError, match="160 NaN"):
        export(tmp_path / "in", tmp_path / "last", on_duplicate="last", **asked)


CUTS = [
    {"granule": 7, "buffer": 24},
    {"granule": 50, "buffer": 333},
    {"granule": 1000, "buffer": 1},
    {"chunk": 10_000_000, "unit": 10_000_000, "granule": 1000, "buffer": 100_000},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_neither_bytes_nor_errors_depend_on_buffers_and_threads(num_shards: int, dtype: str, tmp_path: Path) -> None:
    """Blocks of the sum are cut from the rows alone, small enough here that every table has many."""
    tables = make_tables({"a": 700, "b": 90, "c": 3}, 3, slots=("step_filter", *ADAM))
    write_checkpoint(tmp_path / "in", tables, dense={"w": np.ones(20)})
    asked: dict[str, Any] = {"num_shards": num_shards, "dtype": {"*": dtype}}
    export(tmp_path / "in", tmp_path / "whole", **asked, tuning=Tuning(cast_values=40))
    assert_exact(tmp_path / "whole", in_dtype(truth_of(tables), dtype))
    for number, cut in enumerate(CUTS):
        tuning = tiny(**cut, cast_values=40)
        export(tmp_path / "in", tmp_path / str(number), threads=1 + number, **asked, tuning=tuning)
        assert content(tmp_path / str(number)) == content(tmp_path / "whole")
        if cut["granule"] >= 1000:  # gathers are cut by it, and the sums of a table are those of its gathers
            assert entries(tmp_path / str(number)) == entries(tmp_path / "whole")


def test_misplaced_rows_are_moved_and_cast(tmp_path: Path) -> None:
    tables = make_tables({"a": 200}, 2)
    first, second = tables["a"]
    first.slice, second.slice = second.slice, first.slice
    write_checkpoint(tmp_path / "in", tables)
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards=2, dtype={"a": "float16"})
    assert manifest.tables[0].misplaced == 200
    assert_exact(tmp_path / "out", in_dtype(truth_of(tables), "float16"))


def test_a_whole_part_is_cast_without_its_ids(tmp_path: Path) -> None:
    """Merging is copying but for the embeddings, whose rows all go to one shard."""
    write_checkpoint(tmp_path / "in", make_tables({"a": 500}, 4))
    made = plan(tmp_path / "in", num_shards=2, dtype={"a": "float16"}).plan
    assert {gather.columns for gather in made.gathers} == {(1,)}
    assert len(made.copies) > 0
    split = plan(tmp_path / "in", num_shards=5, dtype={"a": "float16"}).plan
    assert any(gather.columns == (0, 1) for gather in split.gathers)


@pytest.mark.parametrize("kept", ["all", "nothing", "cut short", "of another plan"])
@pytest.mark.parametrize("lost", [(), (0,), (1,), (0, 1)])
def test_a_rerun_has_the_manifest_of_an_export_that_was_not_disturbed(
    lost: tuple[int, ...], kept: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Also where all shards, or some, were whole already."""
    from dist_export.pipeline import small_files

    tables = make_tables({"a": 700, "b": 90}, 3)
    write_checkpoint(tmp_path / "in", tables)
    asked: dict[str, Any] = {"num_shards": 2, "dtype": {"a": "int8", "*": "float16"}}
    whole = export(tmp_path / "in", tmp_path / "whole", **asked)

    def fail(*_: object, **__: object) -> None:
        raise ExportError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(small_files, "write_small_files", fail)
        with pytest.raises(ExportError, match="disk is full"):
            export(tmp_path / "in", tmp_path / "out", **asked)
    for number in lost:
        (tmp_path / "out" / f"model-{number:06d}-of-000002.safetensors").unlink()
    notes = sorted((tmp_path / "out" / ".dist_export").glob("losses-*"))
    assert notes
    for note in notes:
        if kept == "cut short":
            note.write_bytes(note.read_bytes()[:-20])
        elif kept == "of another plan":
            note.write_bytes(note.read_bytes().replace(b"xxh3:", b"xxh3:0"))
        elif kept == "nothing":
            note.unlink()
    calls = []

    def recorded(*args: Any, **more: Any) -> Any:
        calls.append(args)
        return cast_blocks(*args, **more)

    monkeypatch.setattr(unit_runner, "cast_blocks", recorded)
    again = export(tmp_path / "in", tmp_path / "out", **asked)
    assert bool(calls) == bool(lost or kept != "all")
    assert again.run["reused_shards"] == 2 - len(lost)
    assert (again.tables, again.digest) == (whole.tables, whole.digest)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_people_see(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", make_tables({"a": 1000, "b": 10}, 2, dim=16))
    asked: dict[str, Any] = {"filter_sparse_opt": True, "dtype": {"a": "int8", "b": "bfloat16"}}
    config = ExportConfig(ckpt_dir=str(tmp_path / "in"), export_dir=str(tmp_path / "out"), **asked)
    report = make_report(config, world_size=2)
    text = "\n".join(render_report(report))
    assert "float32 -> int8, 24.0 kB (saves 40.0 kB)" in text
    assert "float32 -> bfloat16, 320 B (saves 320 B)" in text
    assert "note: a: written as int8, of which RecIS's loader reads no embeddings" in text
    slots = {slot["name"]: slot for slot in report["tables"][0]["slots"]}
    assert slots["embedding"]["written"] == "int8"
    assert "written" not in slots["id"]
    manifest = export(tmp_path / "in", tmp_path / "out", dtype=asked["dtype"])
    shown = "\n".join(render(describe(str(tmp_path / "out"))))
    assert "1,000         16 int8_rowwise" in shown
    assert "cast from float32: largest error" in shown
    lines = dist_export.reporting.summary.summarize(manifest, [], "out")
    assert any("cast     1 table float32 -> int8_rowwise, saves 40.0 kB; largest error" in line for line in lines)


def test_a_merged_manifest_has_the_blocks_as_they_are(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", make_tables({"a": 20}, 1, dim=16))
    export(tmp_path / "in", tmp_path / "out", dtype={"a": "int8"})
    merged = json.loads((tmp_path / "out" / "torch_rank_weights_embs_table_multi_shard.json").read_text())
    entry = merged["a.embedding/part_0_1"]
    assert (entry["dtype"], entry["shape"], entry["dimension"]) == ("uint8", [20, 24], 24)


def test_verify_finds_what_is_wrong_with_int8_rows(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", make_tables({"a": 50}, 1, dim=16))
    export(tmp_path / "in", tmp_path / "out", dtype={"a": "int8"}, digest="none")
    shard = next((tmp_path / "out").glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    row = 31
    scale = len(raw) - (50 - row) * 24 + 16
    raw[scale : scale + 4] = np.array([np.inf], "<f4").tobytes()
    shard.write_bytes(raw)
    assert verify(str(tmp_path / "out")).count() == 0
    found = verify(str(tmp_path / "out"), finite=True).findings
    assert len(found) == 1
    assert "0 NaN and 1 infinities, first in 'a.embedding/part_0_1' row 31" in str(found[0])


@pytest.mark.parametrize("change", [{"encoding": "int4"}, {"dim": 15}, {"dtype": "int8"}])
def test_an_encoding_that_is_not_known_is_told(change: dict[str, Any], tmp_path: Path) -> None:
    from dist_export.manifest import compute_digest

    tables = make_tables({"a": 50}, 1, dim=16)
    write_checkpoint(tmp_path / "in", tables)
    export(tmp_path / "in", tmp_path / "out", dtype={"a": "int8"})
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    next(slot for slot in manifest["tables"][0]["kept"] if slot["name"] == "embedding").update(change)
    manifest["digest"] = compute_digest(manifest)
    path.write_text(json.dumps(manifest))
    assert any("encoding" in str(finding) for finding in verify(str(tmp_path / "out")).findings)
    with pytest.raises(DistExportError, match="encoding"):
        dist_export.open_package(tmp_path / "out").lookup("a", tables["a"][0].ids[:2])


def test_a_package_of_halves_can_be_exported_again(tmp_path: Path) -> None:
    """A package is a checkpoint too."""
    tables = make_tables({"a": 100}, 2)
    write_checkpoint(tmp_path / "in", tables)
    export(tmp_path / "in", tmp_path / "half", num_shards=2, dtype={"a": "float16"})
    export(tmp_path / "half", tmp_path / "wide", num_shards=3, dtype={"a": "float32"})
    truth = truth_of(tables)
    truth["a"]["embedding"] = truth["a"]["embedding"].astype(np.float16).astype(np.float32)
    assert_exact(tmp_path / "wide", truth)


def test_an_empty_table_is_cast_too(tmp_path: Path) -> None:
    none = np.zeros(0, np.int64)
    parts = split_table(none, {"embedding": np.zeros((0, 8), np.float32)}, 2)
    write_checkpoint(tmp_path / "in", {"a": parts, **make_tables({"b": 5}, 2, dim=8, slots=())})
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards=2, dtype={"*": "int8"})
    cast = slot_of(manifest, "a").cast
    assert (cast.values, cast.max_abs_error, cast.mean_abs_error) == (0, 0.0, 0.0)
    assert verify(str(tmp_path / "out")).findings == []
    assert open_directory(tmp_path / "out").exists("manifest.json")


@pytest.mark.parametrize("is_in_strips", [False, True])
@pytest.mark.parametrize("dtype", ["source", *DTYPES])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_tables_whose_rows_go_by_number(num_shards: int, dtype: str, is_in_strips: bool, tmp_path: Path) -> None:
    """Rows in two parts, the second perhaps as two column shards: cast as they are put together."""
    values = np.random.default_rng(0).standard_normal((1000, 6)).astype(np.float32)
    later = [values[400:, :2], values[400:, 2:]] if is_in_strips else [values[400:]]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "rows").write_bytes(b"".join(np.ascontiguousarray(a).tobytes() for a in (values[:400], *later)))
    begin = 400 * 24
    strips = no_strips()
    if is_in_strips:
        columns = ([1, 1], [1, 1], [0, 8], [8, 16], [8, 16], [0, 0], [begin, begin + 600 * 8])
        names = ("part", "column", "first_byte", "width", "row_stride", "file", "offset")
        strips = Strips(**{name: np.array(column, np.int64) for name, column in zip(names, columns, strict=True)})
    i64 = np.array([0, 0], np.int64)
    checkpoint = Checkpoint(
        format="test",
        directory=open_directory(tmp_path / "in"),
        files=(SourceFile(name="rows", size=values.nbytes, version=""),),
        tables=(
            TableMeta(
                name="t",
                slots=(SlotMeta(name="id", dtype=4, inner_shape=(), row_bytes=8, column=0),
                       SlotMeta(name="embedding", dtype=1, inner_shape=(6,), row_bytes=24, column=1)),
                is_hashed=False,
                has_ids=False,
            ),
        ),
        parts=Parts(table=i64, begin=np.array([0, 400]), end=np.array([400, 1000]), size=np.array([1000, 1000]),
                    rows=np.array([400, 600]), first_row=np.array([0, 400])),
        blocks=Blocks(
            file=np.array([[ABSENT, 0], [ABSENT, IN_STRIPS if is_in_strips else 0]], np.int32),
            offset=np.array([[0, 0], [0, begin]], np.int64),
            key=np.array([["", "t"], ["", "t"]], object),
        ),
        dense=(), fingerprint="", copy_hindrances=(), verbatim={}, warnings=(), strips=strips,
    )  # fmt: skip
    selection = select(checkpoint)
    if dtype != "source":
        selection = cast_slots(checkpoint, selection, (("t", dtype),))
    targets = plan_targets(checkpoint, num_shards)
    census = count_row_indexed_rows(checkpoint, targets)
    made = plan_shards(checkpoint, selection, targets, census, num_shards=num_shards)
    files = run(made, tmp_path / "out", world_size=2, seed=1)
    written = b"".join(files[file.name][len(file.header) :] for file in made.files)
    expected = values if dtype == "source" else cast_truth(values, dtype)
    assert written == np.ascontiguousarray(expected).tobytes()


@examples(25)
@given(
    rows=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    num_parts=st.integers(1, 4),
    num_shards=st.integers(1, 5),
    dim=st.integers(1, 9),
    dtypes=st.lists(st.sampled_from(["source", "float32", *DTYPES]), min_size=3, max_size=3),
    on_duplicate=st.sampled_from(["error", "first", "last"]),
    seed=st.integers(0, 1000),
    threads=st.integers(1, 3),
)
def test_any_tables_in_any_dtypes(
    rows: list[int],
    num_parts: int,
    num_shards: int,
    dim: int,
    dtypes: list[str],
    on_duplicate: str,
    seed: int,
    threads: int,
) -> None:
    """Against torch's casts of the rows that stay; where rows stand twice, of those that a plain model keeps."""
    random = np.random.default_rng(seed)
    tables = make_tables({f"t{i}": n for i, n in enumerate(rows)}, num_parts, dim=dim, slots=("step",), seed=seed)
    if on_duplicate != "error":
        for parts in tables.values():
            giver, taker = (parts[number] for number in random.integers(num_parts, size=2))
            if giver is taker or not len(giver.ids):
                continue
            ids = giver.ids[:5]
            fresh = {name: random.random((len(ids), dim)).astype(np.float32) for name in taker.slots}
            taker.slots = {name: np.concatenate([old, fresh[name]]) for name, old in taker.slots.items()}
            taker.ids = np.concatenate([taker.ids, ids])
    asked = {f"t{i}": dtype for i, dtype in zip(range(len(rows)), dtypes, strict=False)}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "in", tables)
        out = Path(folder) / "out"
        manifest = export(
            Path(folder) / "in", out, num_shards=num_shards, dtype=asked, on_duplicate=on_duplicate, threads=threads
        )
        found = read_back(out)
        package = dist_export.open_package(out)
        for table, parts in tables.items():
            keep = "first" if on_duplicate == "error" else on_duplicate
            kept = truth_of_model(parts, keep=keep)
            expected = kept["embedding"]
            if asked[table] not in ("source", "float32"):
                expected = cast_truth(expected, asked[table])
            assert found[table]["embedding"].tobytes() == np.ascontiguousarray(expected).tobytes()
            assert found[table]["step"].tobytes() == kept["step"].tobytes()
            values = package.lookup(table, kept["id"])[0].astype(np.float64)
            cast = slot_of(manifest, table).cast
            if asked[table] in ("source", "float32"):
                assert cast is msgspec.UNSET
                continue
            errors = np.abs(values - kept["embedding"])
            assert cast.max_abs_error == errors.max(initial=0)
            assert cast.mean_abs_error == pytest.approx(errors.mean() if errors.size else 0, rel=1e-12)
            assert cast.values == errors.size
