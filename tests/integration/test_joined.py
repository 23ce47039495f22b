"""A DCP checkpoint and the DynamicEmb dump beside it, as TorchEasyRec saves them: one export, one package of all tables."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

import dist_export
from dist_export.checkpoint.combined import JoinedReader, join_checkpoints
from dist_export.checkpoint.detect import detect_format
from dist_export.checkpoint.metadata import (
    ABSENT,
    Blocks,
    Checkpoint,
    DenseTensor,
    Parts,
    SlotMeta,
    SourceFile,
    Strips,
    TableMeta,
)
from dist_export.cli import main
from dist_export.config.schema import ExportConfig
from dist_export.errors import CheckpointError, PlanError
from dist_export.formats.dtypes import CODE_BY_TORCH, I64
from dist_export.pipeline.run_dir import find_checkpoint
from dist_export.reporting.summary import summarize
from dist_export.storage.urls import open_directory, open_place
from tests.support import torchrec_shape
from tests.support.dcp_writer import write_chunks
from tests.support.dynamicemb_writer import make_table, write_dump
from tests.support.easyrec_writer import (
    CITY,
    DUMPED,
    EBC,
    EC,
    ITEM,
    MLP,
    SHOP,
    USER,
    WORLD_SIZE,
    assert_same,
    by_rows,
    make_city,
    read_package,
    stand_in,
    truth,
    write_dynamic,
    write_easyrec,
)
from tests.support.hostile_cases import assert_refused, run
from tests.support.sparse_cases import export, open_source

F32 = CODE_BY_TORCH["float32"]
DUMP_TRUTH = truth()

# ---- the join itself ------------------------------------------------------------------------------------------------


def make_checkpoint(kind: str, names: list[str], *, num_files: int, num_slots: int, by_number: bool) -> Checkpoint:
    """A made-up checkpoint of two parts a table: the first part's slots lie in blocks, the last slot of the second in strips."""
    kinds = [("id", I64, 8), ("embedding", F32, 12), ("a", F32, 12), ("b", F32, 12)][:num_slots]
    slots = tuple(
        SlotMeta(name=name, dtype=code, inner_shape=() if name == "id" else (3,), row_bytes=size, column=column)
        for column, (name, code, size) in enumerate(kinds)
    )
    num_parts = 2 * len(names)
    numbers = np.arange(num_parts * num_slots).reshape(num_parts, num_slots)
    file = (numbers % num_files).astype(np.int32)
    key = np.array([f"{kind} {number}" for number in range(numbers.size)], object).reshape(numbers.shape)
    if by_number:
        file[:, 0] = ABSENT
    odd = np.arange(1, num_parts, 2)
    file[odd, -1] = -2
    strips = {name: np.repeat(odd, 2) * (place + 3) for place, name in enumerate(("width", "row_stride", "offset"))}
    first = np.tile([0, 4], len(odd))
    return Checkpoint(
        format=kind,
        directory=open_directory("/c"),
        files=tuple(SourceFile(name=f"{kind}/{n}", size=100 + n, version="v") for n in range(num_files)),
        tables=tuple(TableMeta(name=n, slots=slots, is_hashed=not by_number, has_ids=not by_number) for n in names),
        parts=Parts(
            table=np.repeat(np.arange(len(names)), 2),
            begin=np.tile([0, 5], len(names)),
            end=np.tile([5, 9], len(names)),
            size=np.full(num_parts, 9),
            rows=np.arange(num_parts) + 1,
            first_row=np.tile([0, 5], len(names)) if by_number else None,
        ),
        blocks=Blocks(file=file, offset=numbers * 10, key=key),
        strips=Strips(
            part=np.repeat(odd, 2),
            column=np.full(len(first), num_slots - 1),
            first_byte=first,
            file=(np.arange(len(first)) + 1) % num_files,
            **strips,
        ),
        dense=(DenseTensor(name=f"{kind}.w", dtype=F32, shape=(2,), file=num_files - 1, offset=4, num_bytes=8),),
        fingerprint=f"of {kind}",
        copy_hindrances=(f"no copy of {kind}",),
        verbatim={kind: b"x"},
        warnings=(f"of {kind}",),
        optimizer_patterns=frozenset({kind}),
    )


def facts_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """All that a checkpoint says of each table, with names of files in the place of numbers."""

    def name_of(number: int) -> Any:
        return number if number < 0 else checkpoint.files[number].name

    parts, blocks, strips = checkpoint.parts, checkpoint.blocks, checkpoint.strips
    found = {}
    for number, table in enumerate(checkpoint.tables):
        its: list[Any] = [table]
        for part in parts.of_table(number):
            its.append((parts.slice_of(part), int(parts.rows[part]), parts.first_row_of(part)))
            for slot in table.slots:
                file, offset, key = (m[part, slot.column] for m in (blocks.file, blocks.offset, blocks.key))
                of = strips.of(part, slot.column)
                columns = [strips.first_byte, strips.width, strips.row_stride, strips.offset]
                pieces = [(name_of(strips.file[s]), *(int(c[s]) for c in columns)) for s in of]
                its.append((slot.name, name_of(int(file)), int(offset), key, pieces))
        found[table.name] = its
    return found


@pytest.mark.parametrize("slots", [(2, 4), (4, 2), (3, 3)])
@pytest.mark.parametrize("tables", [(["a", "b"], ["c"]), ([], ["c", "d"]), (["a"], [])])
def test_each_table_is_found_where_it_was(tables: tuple[list[str], list[str]], slots: tuple[int, int]) -> None:
    """Whatever the number of slots on either side, and where one side has no table."""
    first = make_checkpoint("x", tables[0], num_files=3, num_slots=slots[0], by_number=True)
    second = make_checkpoint("y", tables[1], num_files=2, num_slots=slots[1], by_number=False)
    joined = join_checkpoints(first, second, kind="x+y")
    assert facts_of(joined) == {**facts_of(first), **facts_of(second)}
    assert [file.name for file in joined.files] == ["x/0", "x/1", "x/2", "y/0", "y/1"]
    assert [(tensor.name, joined.files[tensor.file].name) for tensor in joined.dense] == [
        ("x.w", "x/2"),
        ("y.w", "y/1"),
    ]
    assert joined.format == "x+y"
    assert joined.num_bytes == first.num_bytes + second.num_bytes
    assert (joined.copy_hindrances, joined.warnings) == (("no copy of x", "no copy of y"), ("of x", "of y"))
    assert joined.optimizer_patterns == {"x", "y"}
    assert (joined.blocks.file.dtype, joined.blocks.offset.dtype) == (np.int32, np.int64)
    assert np.all(np.diff(joined.parts.table) >= 0)
    assert np.all(np.diff(joined.strips.part) >= 0)


def test_a_name_in_both_is_an_error_that_names_both_places() -> None:
    first = make_checkpoint("x", ["a", "b"], num_files=3, num_slots=3, by_number=True)
    second = make_checkpoint("y", ["c", "b"], num_files=2, num_slots=3, by_number=False)
    with pytest.raises(
        CheckpointError, match=r"two tables are called 'b': one of x in /c/x/., one of y in /c/y/.\. .*alone"
    ):
        join_checkpoints(first, second, kind="x+y")


def test_the_fingerprint_is_of_both() -> None:
    first = make_checkpoint("x", ["a"], num_files=3, num_slots=3, by_number=True)
    second = make_checkpoint("y", ["b"], num_files=2, num_slots=3, by_number=False)
    found = {
        join_checkpoints(left, right, kind="x+y").fingerprint
        for left in (first, replace(first, fingerprint="other"))
        for right in (second, replace(second, fingerprint="other"))
    }
    assert len(found) == 4


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9])
def test_headers_are_shared_out_over_both(world_size: int) -> None:
    """Each reader is asked for each of its files once, by all ranks, in order."""

    class Reader:
        def __init__(self, name: str, count: int) -> None:
            self.files = tuple(SourceFile(name=f"{name}{n}", size=1, version="") for n in range(count))

        def read_headers(self, files: range) -> list[str]:
            return [self.files[number].name for number in files]

        def assemble(self, shares: Any) -> Any:
            raise NotImplementedError

    reader = JoinedReader(Reader("a", 3), Reader("b", 4), kind="x")
    size = -(-7 // world_size)
    shares = [reader.read_headers(range(min(r * size, 7), min((r + 1) * size, 7))) for r in range(world_size)]
    assert [name for share in shares for name in share.first] == ["a0", "a1", "a2"]
    assert [name for share in shares for name in share.second] == ["b0", "b1", "b2", "b3"]


# ---- exports --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_easyrec(tmp_path_factory.mktemp("easyrec") / "in")


@pytest.mark.parametrize("num_shards", [1, 2, 5, "source"])
def test_one_package_holds_the_tables_of_both(num_shards: int | str, source: Path, tmp_path: Path) -> None:
    manifest = export(source, tmp_path / "out", num_shards=num_shards)
    assert_same(read_package(tmp_path / "out"), truth())
    assert manifest.source.format == "dcp+dynamicemb"
    by_number = {table.name for table in manifest.tables if table.is_hashed is False}
    assert by_number == {CITY, SHOP}
    assert sum(len(table.dropped) for table in manifest.tables) == 3  # momentum1 of city, opt_values of user and item
    assert not any("stays behind" in note for note in manifest.notes)
    merged = json.loads((tmp_path / "out" / "torch_rank_weights_embs_table_multi_shard.json").read_bytes())
    assert [name for name, entry in merged.items() if entry["dense"]] == [MLP]
    assert main(["verify", str(tmp_path / "out")]) == 0
    package = dist_export.open_package(str(tmp_path / "out"))
    assert np.array_equal(package.lookup("user", DUMPED["user"]["keys"][:5])[0], DUMPED["user"]["values"][:5])
    assert np.array_equal(package.lookup(CITY, np.array([102, 0]))[0], make_city()[0].numpy()[[102, 0]])


def test_settings_for_tables_and_slots_go_for_both(source: Path, tmp_path: Path) -> None:
    """Slots to keep, casts, hash tables of numbers, new names, rows to leave behind: by the names of either side."""
    settings = {
        "keep_slots": ["momentum1", "user.opt_values"],
        "drop_slots": ["item.score"],
        "to_hash_tables": ["*city*"],
        "dtype": {"*.shop.*": "float16", "user": "float16"},
        "rename_tables": {"*.embeddings.shop.weight": "shop", "item": "goods"},
        "prune": [{"tables": "user", "deny": str(tmp_path / "gone.npy")}],
    }
    np.save(tmp_path / "gone.npy", np.array([5, -1]))
    manifest = export(source, tmp_path / "out", num_shards=3, **settings)
    expected = truth()
    city, momentum = make_city()
    expected[CITY] |= {"id": np.arange(len(city)), "momentum1": momentum.numpy()}
    expected["shop"] = {"embedding": expected.pop(SHOP)["embedding"].astype(np.float16)}
    expected["goods"] = {slot: rows for slot, rows in expected.pop("item").items() if slot != "score"}
    order = np.argsort(DUMPED["user"]["keys"])
    expected["user"]["opt_values"] = DUMPED["user"]["opt_values"][order]
    expected["user"]["embedding"] = expected["user"]["embedding"].astype(np.float16)
    stays = ~np.isin(expected["user"]["id"], [5, -1])
    expected["user"] = {slot: rows[stays] for slot, rows in expected["user"].items()}
    assert_same(read_package(tmp_path / "out"), expected)
    assert [table.rows_dropped for table in manifest.tables if table.name == "user"] == [{"deny_list": 2}]
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(("asked", "kept"), [("dcp", {CITY, SHOP}), ("dynamicemb", {"user", "item"})])
def test_a_format_that_is_named_is_exported_alone(asked: str, kept: set[str], source: Path, tmp_path: Path) -> None:
    """What stands in for a table of the dump is no table of either, and a note says what stays behind."""
    manifest = export(source, tmp_path / "out", num_shards=2, format=asked)
    assert_same(read_package(tmp_path / "out"), {name: rows for name, rows in truth().items() if name in kept})
    assert "stays behind" in manifest.notes[0]
    assert "format: auto takes both" in manifest.notes[0]
    export(source, tmp_path / "selected", num_shards=2, select_tables=sorted(kept))
    assert read_package(tmp_path / "selected").keys() == kept


def test_both_may_be_asked_for_by_name(tmp_path: Path) -> None:
    """Then it is an error where one of them is not there."""
    source = write_easyrec(tmp_path / "in")
    export(source, tmp_path / "out", format="dcp+dynamicemb")
    assert_same(read_package(tmp_path / "out"), truth())
    shutil.move(source / "dynamicemb", tmp_path / "dump")
    with pytest.raises(CheckpointError, match=r"no <table>_emb_keys"):
        export(source, tmp_path / "out2", format="dcp+dynamicemb")
    manifest = export(
        source, tmp_path / "out2"
    )  # nothing tells that there was a dump but what stands in for its tables
    assert (
        f"{USER}, {ITEM}. They may be placeholders of DynamicEmb tables, but no dump is beside them"
        in manifest.notes[0]
    )


def test_a_third_format_is_asked_about(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "in")
    export(source, tmp_path / "in2", num_shards=1)
    shutil.copy(next((tmp_path / "in2").glob("*.safetensors")), tmp_path / "in" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"or format: dcp\+dynamicemb"):
        export(tmp_path / "in", tmp_path / "out")
    export(tmp_path / "in", tmp_path / "out", format="dcp+dynamicemb")
    assert_same(read_package(tmp_path / "out"), truth())


def test_patterns_of_optimizer_slots_may_be_of_either(source: Path, tmp_path: Path) -> None:
    manifest = export(source, tmp_path / "out", optimizer_slots=["score", "*momentum1"])
    assert "score" not in read_package(tmp_path / "out")["user"]
    assert {slot.name for table in manifest.tables for slot in table.dropped} == {"score", "opt_values", "momentum1"}
    with pytest.raises(PlanError, match="optimizer_slots: the pattern 'scores' matches no slot"):
        export(source, tmp_path / "other", optimizer_slots=["scores"])
    assert not (tmp_path / "other").exists()


def test_what_inspect_plan_and_summary_say(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(t["name"], t["rows"], t["parts"], t["slots"]) for t in found["tables"]] == [
        (CITY, 103, 3, ["embedding", "momentum1"]),
        (SHOP, 41, 2, ["embedding"]),
        ("item", 51, 3, ["id", "embedding", "score", "opt_values"]),
        ("user", 289, 3, ["id", "embedding", "score", "opt_values"]),
    ]
    assert found["stand_ins"] == [USER, ITEM]
    assert [tensor["name"] for tensor in found["dense_parameters"]] == [MLP]
    assert main(["inspect", str(source)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("DCP checkpoint with a DynamicEmb dump: ")
    assert f"left out   {USER}, {ITEM}: they are placeholders for tables of the dump" in shown
    assert main(["inspect", str(source), "--format", "dcp"]) == 0
    shown = capsys.readouterr().out
    assert "also holds a DynamicEmb dump, which stays behind, with 2 placeholders for its tables" in shown
    settings = ["--ckpt_dir", str(source), "--export_dir", str(tmp_path / "out"), "--filter_sparse_opt", "true"]
    assert main(["plan", *settings]) == 0
    shown = capsys.readouterr().out
    told = "dcp+dynamicemb checkpoint (recognised by .metadata, or model/.metadata, and *_emb_keys.rank_*)"
    assert f"source: {told}" in shown
    assert "table user: 289 rows\n" in shown
    assert f"table {CITY}: 103 rows by number" in shown
    manifest = export(source, tmp_path / "out")
    assert f"  source   {told.replace(' (', f' {source} (', 1)}" in summarize(manifest, [], "x")


def test_the_sample_takes_rows_of_both_and_the_package_scores_as_they_do(tmp_path: Path) -> None:
    """Bags and dense parameters are DCP's, the hash table's rows those of the dump."""
    trained = torchrec_shape.build_trained(has_hash_table=True)
    model = {name: (t, [((0,) * t.dim(), t)]) for name, t in trained.state_dict().items()}
    write_chunks(tmp_path / "in" / "model", model | {"sparse_arch.ebc.embedding_bags.city_emb.weight": stand_in(2)})
    cities = {what: column for what, column in make_table([0, 7, 14, 28, 99], 4).items() if what in ("keys", "values")}
    write_dump(tmp_path / "in" / "dynamicemb" / "model.sparse_arch.ebc", "city_emb", cities, 2)
    manifest = export(
        tmp_path / "in",
        tmp_path / "out",
        model="tests.support.torchrec_shape:build_mixed_model",
        dataset=torchrec_shape.DATASET,
        num_shards=3,
    )
    assert manifest.parity is not None
    assert manifest.parity.from_files.reads_rows
    assert manifest.parity.from_files.max_ulp == {"ctr": 0, "like": 0}
    rows = json.loads((tmp_path / "out" / "fx_user_model" / "sample_rows.json").read_text())
    tables = {f"sparse_arch.ebc.embedding_bags.{name}.weight" for name in ("t_user", "t_item")} | {"city_emb"}
    assert rows.keys() == tables
    assert main(["verify", str(tmp_path / "out")]) == 0


# ---- which of the two holds a table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["without a group", "saved anew", "of other ranks"])
def test_what_stands_in_for_a_table_of_the_dump_is_left_out(case: str, tmp_path: Path) -> None:
    whole = torch.full((WORLD_SIZE, 1), 7.0)
    changes = {"without a group": stand_in(1), "saved anew": (whole, [((0, 0), whole)]), "of other ranks": stand_in(5)}
    source = write_easyrec(tmp_path / "in", **{USER: changes[case], ITEM: None})
    if case == "without a group":
        shutil.rmtree(source / "dynamicemb")
        write_dynamic(source, DUMPED, world_size=1)
    export(source, tmp_path / "out", num_shards=2)
    assert_same(read_package(tmp_path / "out"), truth())


def test_a_table_of_one_value_a_row_is_no_stand_in(tmp_path: Path) -> None:
    """Of another collection, or of another name than any table of the dump."""
    other, bias = torch.rand(WORLD_SIZE, 1), torch.rand(200, 1)
    source = write_easyrec(
        tmp_path / "in",
        **{"m.other.embedding_bags.user.weight": by_rows(other, 1), "m.ebc.embedding_bags.bias.weight": by_rows(bias)},
    )
    export(source, tmp_path / "out", num_shards=2)
    expected = truth() | {
        "m.other.embedding_bags.user.weight": {"embedding": other.numpy()},
        "m.ebc.embedding_bags.bias.weight": {"embedding": bias.numpy()},
    }
    assert_same(read_package(tmp_path / "out"), expected)


@pytest.mark.parametrize("folder", [EBC, EC.replace("ec_dict.16", "ebc").removeprefix("model."), "", "dump"])
def test_a_table_whose_rows_are_in_both_is_an_error(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names both places; where the dump's directory tells no collection, the table's name alone is compared.

    That it has as many rows as there were ranks does not make it a stand-in.
    """
    source = write_easyrec(tmp_path / "in", **{USER: by_rows(torch.rand(2, 8))})
    shutil.rmtree(source / "dynamicemb")
    write_dump(source / "dynamicemb" / folder, "user", DUMPED["user"], 2)
    places = ("--ckpt_dir", source, "--export_dir", tmp_path / "out", "--filter_sparse_opt", "true")
    for outcome in (
        run(capsys, tmp_path, "plan", *places),
        run(capsys, tmp_path, *places),
        run(capsys, tmp_path, "inspect", source),
    ):
        assert_refused(outcome, f"table 'user' is there twice: as '{USER}' of shape [2, 8] in {source}/model/__")
        place = Path(source, "dynamicemb", folder, "user_emb_keys.rank_*")
        assert f"and in {place}; nothing says which one is valid. To export one" in outcome.lines[0]
    assert not (tmp_path / "out").exists()
    manifest = export(source, tmp_path / "dcp", format="dcp")
    assert USER in {table.name for table in manifest.tables}


def test_one_name_in_two_collections_is_that_of_two_tables(tmp_path: Path) -> None:
    name = f"{EC.removeprefix('model.')}.embeddings.user.weight"
    weight = torch.rand(20, 16)
    source = write_easyrec(tmp_path / "in", **{name: by_rows(weight)})
    export(source, tmp_path / "out", num_shards=2)
    assert_same(read_package(tmp_path / "out"), truth() | {name: {"embedding": weight.numpy()}})


def test_a_name_that_settings_give_to_a_table_may_be_taken(tmp_path: Path) -> None:
    source = write_easyrec(tmp_path / "in", item=by_rows(torch.rand(20, 16)))
    export(source, tmp_path / "out")  # a dense parameter of that name is no table
    with pytest.raises(
        CheckpointError, match=r"table 'item' is there twice: as 'item' of shape \[20, 16\]|two tables are"
    ):
        export(source, tmp_path / "other", treat_as_tables=["item"])


def test_a_table_that_the_dump_lacks_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_easyrec(tmp_path / "in")
    shutil.rmtree(source / "dynamicemb" / EC)
    outcome = run(
        capsys, tmp_path, "--ckpt_dir", source, "--export_dir", tmp_path / "out", "--filter_sparse_opt", "true"
    )
    assert_refused(
        outcome, "But the dump beside it has no item_emb_keys.rank_*: the dump did not finish, or only a part of it"
    )
    assert f"'{ITEM}' has shape [3, 1], one value for each rank" in outcome.lines[0]


def test_a_dump_that_is_not_whole_is_an_error_unless_dcp_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_easyrec(tmp_path / "in")
    (source / "dynamicemb" / EBC / "user_emb_values.rank_1.world_size_3").unlink()
    places = ("--ckpt_dir", source, "--filter_sparse_opt", "true", "--export_dir")
    outcome = run(capsys, tmp_path, *places, tmp_path / "out")
    assert_refused(outcome, f"dynamicemb/{EBC}/user_emb_values.rank_1.world_size_3 is missing; the dump did not finish")
    assert run(capsys, tmp_path, *places, tmp_path / "out", "--format", "dcp").code == 0
    assert read_package(tmp_path / "out").keys() == {CITY, SHOP}


def test_a_model_whose_tables_are_all_dynamic(tmp_path: Path) -> None:
    """DCP has its dense parameters then, and what stands in for tables."""
    source = write_easyrec(tmp_path / "in", **{CITY: None, SHOP: None})
    manifest = export(source, tmp_path / "out", num_shards=2)
    assert_same(read_package(tmp_path / "out"), {name: DUMP_TRUTH[name] for name in ("user", "item")})
    (note,) = manifest.notes
    assert note.startswith(f"1 dense tensor of the checkpoint ({MLP}): no file of the package holds their values")
    with pytest.raises(
        CheckpointError, match=r"all tables of this DCP checkpoint are placeholders for .*format: auto takes both"
    ):
        export(source, tmp_path / "other", format="dcp")


def test_a_dump_without_rows(tmp_path: Path) -> None:
    """Its tables are left out, and so is what stands in for them; with no other table there is nothing to export."""
    source = write_easyrec(tmp_path / "in")
    none = {name: {what: column[:0] for what, column in rows.items()} for name, rows in DUMPED.items()}
    shutil.rmtree(source / "dynamicemb")
    write_dynamic(source, none)
    manifest = export(source, tmp_path / "out", num_shards=2)
    assert read_package(tmp_path / "out").keys() == {CITY, SHOP}
    assert sum("has no row, so its dimension is not told" in note for note in manifest.notes) == 2
    write_easyrec(tmp_path / "bare", **{CITY: None, SHOP: None})
    shutil.rmtree(tmp_path / "bare" / "dynamicemb")
    write_dynamic(tmp_path / "bare", none)
    with pytest.raises(CheckpointError, match="no table has a row; table 'item' has no row"):
        export(tmp_path / "bare", tmp_path / "other")


def test_a_run_passes_over_a_checkpoint_whose_dump_did_not_finish(tmp_path: Path) -> None:
    for step in (5, 10):
        write_easyrec(tmp_path / "run" / f"model.ckpt-{step}")
    next((tmp_path / "run" / "model.ckpt-10" / "dynamicemb" / EC).glob("item_emb_keys.rank_2*")).unlink()
    for asked in ("auto", "dcp+dynamicemb"):
        found = find_checkpoint(
            ExportConfig(ckpt_dir=str(tmp_path / "run"), export_dir="out", format=asked), str(tmp_path / "run")
        )
        assert found.step == 5
        assert "model.ckpt-10 is passed over: " in found.notes[0]
    manifest = export(tmp_path / "run", tmp_path / "out")
    assert manifest.source.step == 5
    assert_same(read_package(tmp_path / "out"), truth())


def test_stores_are_read_as_directories_are(source: Path, tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(f"{source}/", "/joined/", recursive=True)
    assert detect_format(open_place("memory://joined")) == "dcp+dynamicemb"
    export("memory://joined", tmp_path / "out", num_shards=3)
    assert_same(read_package(tmp_path / "out"), truth())


@pytest.mark.parametrize("name", ["model/.metadata", f"dynamicemb/{EBC}/user_emb_values.rank_0.world_size_3"])
def test_a_file_of_either_that_changes_gives_another_fingerprint(name: str, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "in")
    before = open_source(tmp_path / "in").fingerprint
    write_easyrec(tmp_path / "new", **{MLP: by_rows(torch.zeros(3, 13), 1)})
    if name.endswith("3"):  # times are part of a file's version
        shutil.copyfile(tmp_path / "new" / name, tmp_path / "in" / name)
    else:
        shutil.rmtree(tmp_path / "in" / "model")
        shutil.copytree(tmp_path / "new" / "model", tmp_path / "in" / "model")
    assert open_source(tmp_path / "in").fingerprint != before
