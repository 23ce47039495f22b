"""Safetensors checkpoints that RecIS did not write: by the library, by torch's DCP, with and without an index."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from dist_export.checkpoint.detect import detect_format
from dist_export.cli import main
from dist_export.errors import CheckpointError, ConfigError
from dist_export.storage.urls import open_place
from tests.support.hostile_cases import assert_refused, edit_header, edit_header_text, edit_json, run, swap
from tests.support.plain_cases import (
    ITEM,
    NUM_SHARDS,
    TABLES,
    USER,
    assert_same,
    dense_of,
    make_model,
    read_numbered,
    same,
)
from tests.support.sparse_cases import export, tiny

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def tables_of(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: model[name] for name in (USER, ITEM)}


def save(folder: Path, model: dict[str, torch.Tensor], name: str = WHOLE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model, folder / name, metadata={"format": "pt"})
    return folder / name


def save_several(folder: Path, model: dict[str, torch.Tensor], *, index: bool = True) -> Path:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: names[place % 2] for place, name in enumerate(sorted(model))}
    for file in names:
        save(folder, {name: tensor for name, tensor in model.items() if weight_map[name] == file}, file)
    if index:
        document = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(document, indent=2))
    return folder


@pytest.mark.parametrize("lost", [0, 1])
def test_a_file_that_is_missing_by_the_names_of_the_others(lost: int, tmp_path: Path) -> None:
    """Nothing else tells it where there is no index: its tables would be lost."""
    folder = save_several(tmp_path / "in" / "checkpoint-2", make_model(), index=False)
    names = sorted(path.name for path in folder.iterdir())
    (folder / names[lost]).unlink()
    with pytest.raises(
        CheckpointError, match=f"{names[lost]} is missing: by the names of the files there are 2, and 1 are"
    ):
        export(folder, tmp_path / "out", treat_as_tables=TABLES)
    if lost == 0:  # the first file has none of the tables
        manifest = export(folder / names[1], tmp_path / "one", treat_as_tables=TABLES)
        assert any(f"{names[1]} is one of 2 files by its name" in note for note in manifest.notes)
    save_several(tmp_path / "in" / "checkpoint-1", make_model(), index=False)
    manifest = export(tmp_path / "in", tmp_path / "run", treat_as_tables=TABLES)
    assert manifest.source.path.endswith("checkpoint-1"), "a save that has not finished is not the latest one"


def test_files_that_are_counted_from_0_or_by_shard(tmp_path: Path) -> None:
    for number, name in enumerate(
        ("x-0-of-2", "x-1-of-2", "shard-00001-model-00001-of-00002", "shard-00002-model-00002-of-00002")
    ):
        save(tmp_path / "in", {f"{number}_emb.weight": torch.ones(3, 2)}, f"{name}.safetensors")
    assert len(export(tmp_path / "in", tmp_path / "out", treat_as_tables=["*_emb.weight"]).tables) == 4
    (tmp_path / "in" / "shard-00002-model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        export(tmp_path / "in", tmp_path / "other", treat_as_tables=["*_emb.weight"])


@pytest.mark.parametrize("num_shards", NUM_SHARDS)
def test_tables_come_out_as_they_went_in(num_shards: int, tmp_path: Path) -> None:
    """One file, its directory, several files with an index and without: the same package, without __metadata__."""
    model = make_model() | {"half.embeddings.x.weight": torch.randn(17, 3).to(torch.bfloat16)}
    one = save(tmp_path / "one", model)
    save_several(tmp_path / "index", model)
    save_several(tmp_path / "bare", model, index=False)
    found = []
    for number, place in enumerate((one, one.parent, tmp_path / "index", tmp_path / "bare")):
        out = tmp_path / f"out{number}"
        manifest = export(place, out, treat_as_tables=TABLES, num_shards=num_shards)
        assert manifest.source.format == "safetensors"
        assert_same(
            read_numbered(out), {**tables_of(model), "half.embeddings.x.weight": model["half.embeddings.x.weight"]}
        )
        found.append({path.name: path.read_bytes() for path in out.glob("*.safetensors")})
    assert all(files == found[0] for files in found)
    assert b"__metadata__" not in b"".join(found[0].values())


def test_dense_parameters_are_loaded_by_name(tmp_path: Path) -> None:
    """Also where an odd length before them makes them start at any byte, and dtypes that no table can have."""
    model = make_model() | {
        "dense_arch.flags": torch.tensor([True, False, True]),
        "dense_arch.f8": torch.ones(5).to(torch.float8_e4m3fn),
        "dense_arch.u32": torch.ones(3).to(torch.uint32),
    }
    save_several(tmp_path / "in", model)
    expected = {name: tensor for name, tensor in model.items() if name not in (USER, ITEM)}
    described = dense_of(tmp_path / "in", tables=TABLES).describe()
    assert {name: (dtype, shape) for name, dtype, shape in described} == {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in expected.items()
    }
    loaded = dense_of(tmp_path / "in", tables=TABLES).load()
    assert_same(dict(loaded), expected)


def test_what_inspect_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "in", make_model())
    save(tmp_path / "in", make_model(), "copy.safetensors")
    assert main(["inspect", str(tmp_path / "in"), "--treat_as_tables", "*item.weight"]) == 0
    shown = capsys.readouterr().out
    assert f"safetensors checkpoint: {tmp_path / 'in'}" in shown
    assert "dense      dense_arch.mlp.bias float32 [3]" in shown
    assert f"1 files beside {WHOLE} are not of it and stay behind, first copy.safetensors" in shown


# ---- shards that DCP wrote ------------------------------------------------------------------------------------------


def write_shards(folder: Path, pieces: dict[str, list[tuple[list[int], torch.Tensor]]], *, files: int) -> Path:
    """Deal the pieces of tensors out over files, as ``HuggingFaceStorageWriter(save_distributed=True)`` names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        mine = {name: its[number] for name, its in pieces.items() if number < len(its)}
        info = {name: {"saved_offsets": offsets} for name, (offsets, _) in mine.items()}
        metadata = {"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"}
        path = folder / f"shard-{number + 1:05}-model-00001-of-00001.safetensors"
        save_file({name: tensor.contiguous() for name, (_, tensor) in mine.items()}, path, metadata=metadata)
    return folder


@pytest.mark.parametrize("num_shards", NUM_SHARDS)
def test_pieces_in_several_files_are_one_table(num_shards: int, tmp_path: Path) -> None:
    """By rows, by columns, by both, in any order of files."""
    rows, columns, grid = torch.randn(23, 4), torch.randn(11, 9), torch.randn(13, 6)
    pieces = {
        "embeddings.rows.weight": [([9, 0], rows[9:]), ([0, 0], rows[:9])],
        "embeddings.columns.weight": [([0, 0], columns[:, :2]), ([0, 7], columns[:, 7:]), ([0, 2], columns[:, 2:7])],
        "embeddings.grid.weight": [
            ([0, 0], grid[:5, :4]),
            ([0, 4], grid[:8, 4:]),
            ([5, 0], grid[5:, :4]),
            ([8, 4], grid[8:, 4:]),
        ],
        "mlp.weight": [([2, 0], columns[2:]), ([0, 0], columns[:2])],
    }
    folder = write_shards(tmp_path / "in", pieces, files=4)
    manifest = export(folder, tmp_path / "out", num_shards=num_shards, tuning=tiny())
    assert "a last shard that is missing would not be seen" in manifest.notes[0]
    expected = {"rows": rows, "columns": columns, "grid": grid}
    assert_same(read_numbered(tmp_path / "out"), {f"embeddings.{name}.weight": t for name, t in expected.items()})
    assert same(dense_of(folder).load()["mlp.weight"], columns)


def test_what_torch_itself_writes(tmp_path: Path) -> None:
    """One process, whole tensors, an index."""
    import torch.distributed.checkpoint as dcp

    model = make_model()
    dcp.save(model, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path / "in")), no_dist=True)
    assert (tmp_path / "in" / INDEX).exists()
    export(tmp_path / "in", tmp_path / "out", treat_as_tables=TABLES, num_shards=2)
    assert_same(read_numbered(tmp_path / "out"), tables_of(model))


def test_pieces_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    table = torch.randn(10, 4)
    name = "embeddings.t.weight"
    for number, (pieces, said) in enumerate(
        [
            ([([0, 0], table[:3]), ([5, 0], table[5:])], r"leave a gap at \[3, 0\]; the save did not finish"),
            ([([0, 0], table[:6]), ([5, 0], table[5:])], "chunks of 'embeddings.t.weight' overlap"),
            ([([0, 0], table[:5]), ([5, 0], table[5:].double())], r"is float64 \[5, 4\], but a piece of it in"),
        ]
    ):
        with pytest.raises(CheckpointError, match=said):
            export(write_shards(tmp_path / str(number), {name: pieces}, files=2), tmp_path / "out")


# ---- hostile files --------------------------------------------------------------------------------------------------

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
BIAS = "dense_arch.mlp.bias"


def header(change: Callable[[dict[str, Any]], object]) -> Any:
    return edit_header(change, name=FIRST)


def weight_map(change: Callable[[dict[str, Any]], object]) -> Any:
    return edit_json(INDEX, lambda document: change(document["weight_map"]))


def truncate(folder: Path) -> None:
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-8])


def long_header(folder: Path) -> None:
    (folder / FIRST).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def sharding(info: str) -> Any:
    return header(lambda h: h["__metadata__"].update(DCP_SHARDING_INFO=info))


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "it is truncated"),
    "empty": (lambda f: (f / FIRST).write_bytes(b""), "too short for a safetensors file"),
    "header too long": (long_header, "says that its header has 1,099,511,627,776 bytes"),
    "no json": (edit_header_text(lambda _: b"{nothing", name=FIRST), "header"),
    "name twice": (
        edit_header_text(swap(b'{"__metadata__"', b'{"__metadata__":{},"__metadata__"'), name=FIRST),
        "__metadata__",
    ),
    "metadata": (header(lambda h: h.update(__metadata__=[1])), "__metadata__ is [1]; expected texts by name"),
    "offset outside": (header(lambda h: h[BIAS].update(data_offsets=[1 << 40, (1 << 40) + 12])), "ends at byte"),
    "wrong length": (header(lambda h: h[BIAS].update(shape=[4])), "data_offsets span 12"),
    "overlap": (header(lambda h: h[USER].update(data_offsets=[4, 4 + 103 * 32])), "overlaps the block before it"),
    "huge shape": (header(lambda h: h[BIAS].update(shape=[1 << 61, 1 << 61])), "data_offsets span 12"),
    "negative": (header(lambda h: h[BIAS].update(shape=[-3])), "expected a list of at most 64 sizes from 0 up"),
    "dtype": (header(lambda h: h[BIAS].update(dtype="F 7")), "has dtype 'F 7'; expected names such as"),
    "missing file": (lambda f: (f / SECOND).unlink(), f"{SECOND} is missing; {INDEX} says that it holds"),
    "other file": (weight_map(lambda m: m.update({USER: FIRST, BIAS: SECOND})), "but it is in"),
    "not named": (weight_map(lambda m: m.pop(BIAS)), f"{INDEX} does not name '{BIAS}', which {FIRST} holds"),
    "not held": (weight_map(lambda m: m.update(more=FIRST)), f"says that 'more' is in {FIRST}, which does not hold it"),
    "path": (weight_map(lambda m: m.update(more="../x")), "which is no file of the checkpoint"),
    "number": (weight_map(lambda m: m.update(more=3)), "lies in 3, which is no file of the checkpoint"),
    "no map": (edit_json(INDEX, lambda d: d.pop("weight_map")), "weight_map is None; expected a file by tensor"),
    "index is text": (lambda f: (f / INDEX).write_bytes(b"{"), INDEX),
    "sharding is text": (sharding("nothing"), "DCP_SHARDING_INFO"),
    "sharding of nothing": (sharding("{}"), "DCP_SHARDING_INFO says None; expected saved_offsets with"),
    "sharding negative": (
        sharding(json.dumps({BIAS: {"saved_offsets": [-1]}})),
        "expected saved_offsets with 1 numbers",
    ),
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_a_hostile_checkpoint_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, said = HOSTILE[case]
    source = save_several(tmp_path / "in", make_model())
    damage(source)
    places = ("--ckpt_dir", source, "--export_dir", tmp_path / "out", "--filter_sparse_opt", "true")
    for outcome in (
        run(capsys, tmp_path, "plan", *places),
        run(capsys, tmp_path, *places),
        run(capsys, tmp_path, "inspect", source),
    ):
        assert_refused(outcome, said)
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_two_files_hold_is_refused(tmp_path: Path) -> None:
    save(tmp_path, make_model(), "a.safetensors")
    save(tmp_path, {USER: torch.ones(2, 2)}, "b.safetensors")
    with pytest.raises(CheckpointError, match=f"b.safetensors holds '{USER}', and so does .*a.safetensors"):
        export(tmp_path, tmp_path / "out")


# ---- formats told apart ---------------------------------------------------------------------------------------------


def test_formats_are_told_apart(tmp_path: Path) -> None:
    """Files that stand beside those of another format do not count; two formats are an error that names both."""
    model = make_model()
    folder = save_several(tmp_path / "in", model)
    assert detect_format(open_place(folder)) == "safetensors"
    torch.save(model, folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError,
        match=r"a safetensors checkpoint and a checkpoint of torch\.save; say which .* format: safetensors or format: torch",
    ):
        export(folder, tmp_path / "out", treat_as_tables=TABLES)
    export(folder, tmp_path / "out", treat_as_tables=TABLES, format="torch")
    assert_same(read_numbered(tmp_path / "out"), tables_of(model))
    (folder / "notes.bin").write_bytes(b"x")
    assert detect_format(open_place(folder / "notes.bin")) is None
    shard = save(tmp_path / "recis", model, "model-000000-of-000001.safetensors")
    assert detect_format(open_place(shard.parent)) is None  # of a save that did not finish
    (shard.parent / "index").write_text("{}")
    torch.save(model, shard.parent / "model.pt")
    assert detect_format(open_place(shard.parent)) == "recis"
    with pytest.raises(
        ConfigError, match="is a RecIS checkpoint, which says itself what its tables are; remove treat_as_tables"
    ):
        export(shard.parent, tmp_path / "other", treat_as_tables=TABLES)


def helpers() -> dict[str, Any]:
    """What trainers keep beside a model: none of it is one."""
    linear = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(linear.parameters())
    linear(torch.ones(3)).sum().backward()
    optimizer.step()
    return {
        "training_args.bin": SimpleNamespace(lr=0.1),
        "optimizer.pt": optimizer.state_dict(),
        "scheduler.pt": {"base_lrs": [0.1]},
        "rng_state_0.pth": {"cpu": torch.get_rng_state()},
        "meta.pt": {"epoch": 3, "optimizer_states": [optimizer.state_dict()]},
        "named.pt": {"state": {"a.weight": {"exp_avg": torch.ones(4, 4)}}, "param_groups": []},
        "damaged.pt": None,
    }


@pytest.mark.parametrize("kind", ["safetensors", "dcp", "dynamicemb"])
def test_a_model_of_torch_save_beside_another_format_is_an_error_and_a_trainers_own_files_are_none(
    tmp_path: Path, kind: str
) -> None:
    if kind == "safetensors":
        save_several(tmp_path, make_model())
    elif kind == "dcp":
        dcp.save({"model": make_model()}, checkpoint_id=str(tmp_path), no_dist=True)
    else:
        (tmp_path / "t_emb_keys.rank_0.world_size_1").write_bytes(b"")
    for name, value in helpers().items():
        torch.save(value, tmp_path / name) if value is not None else (tmp_path / name).write_bytes(b"PK\x03\x04")
    assert detect_format(open_place(tmp_path)) == kind
    torch.save({"epoch": 3, "state_dict": make_model()}, tmp_path / "last_one.pt")
    with pytest.raises(
        CheckpointError, match=rf"and a checkpoint of torch\.save; say which one .*format: {kind} or format: torch"
    ):
        detect_format(open_place(tmp_path))
    assert detect_format(open_place(tmp_path), asked=kind) == kind


def test_a_model_of_torch_save_beside_a_recis_checkpoint_is_its_dense_part(tmp_path: Path) -> None:
    for name in ("index", "tensorkey.json"):
        (tmp_path / name).write_text("{}")
    torch.save(make_model(), tmp_path / "model.pt")
    assert detect_format(open_place(tmp_path)) == "recis"
