"""DCP checkpoints: their metadata, where their tensors lie, what is a table and what is not. Formats told apart."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_export.checkpoint.dcp.metadata import TensorMeta
from dist_export.checkpoint.dcp.tables import DcpCheckpoint, locate_tables, read_dcp
from dist_export.checkpoint.detect import detect_format
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.checkpoint.torch_items import ItemFinder
from dist_export.cli import main
from dist_export.errors import CheckpointError, ConfigError
from dist_export.inspect.describe import describe, render
from dist_export.storage.urls import open_directory
from tests.support import tiny_model
from tests.support.dcp_writer import change_metadata, make_state, save

WEIGHT = "model.ebc.embedding_bags.user.weight"


def read(path: Path, **settings: Any) -> DcpCheckpoint:
    return read_dcp(open_directory(str(path)), TensorSettings(**{name: tuple(its) for name, its in settings.items()}))


def values_of(checkpoint: DcpCheckpoint, tensor: TensorMeta) -> np.ndarray:
    """Read a tensor at the places that were found, as an export would, with numpy alone."""
    dtype = np.dtype(tensor.dtype)
    whole = np.zeros(tensor.shape, dtype)
    for chunk in tensor.chunks:
        with checkpoint.directory.open_reader(chunk.file) as reader:
            item = ItemFinder().locate(
                reader, chunk.begin, chunk.num_bytes, shape=chunk.sizes, dtype=tensor.dtype, where=chunk.file
            )
        raw = (Path(checkpoint.directory.path) / chunk.file).read_bytes()
        found = np.ndarray(chunk.sizes, dtype, raw, item.offset, item.strides)
        whole[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))] = found
    return whole


@pytest.mark.fixtures
@pytest.mark.parametrize("case", ["row_wise", "column_wise", "hostile_lossy_adam", "dtensor_adam"])
def test_tensors_of_real_checkpoints_are_found_where_they_lie(case: str, torchrec_fixtures: Path) -> None:
    """Tables, slots and dense parameters, read at the found places, equal what torch reads bit for bit."""
    tables = ("t_*.weight",) if case == "dtensor_adam" else ()
    checkpoint = read(torchrec_fixtures / case, treat_as_tables=tables)
    golden = torch.load(torchrec_fixtures / f"{case}.golden.pt", weights_only=True)
    assert sorted(table.name.split(".")[-2] for table in checkpoint.tables) == ["t_item", "t_user"]
    tensors = {table.name: table.weight for table in checkpoint.tables} | dict(checkpoint.dense)
    for name, tensor in tensors.items():
        assert np.array_equal(values_of(checkpoint, tensor), golden[name].numpy()), name
    assert set(tensors) == {name for name in golden if not name.startswith(("opt|", "optim."))}
    for table in checkpoint.tables:
        for slot in table.slots:
            key = (
                slot.tensor.name
                if case == "dtensor_adam"
                else f"opt|{table.name}|{table.name.split('.')[-2]}.{slot.name}"
            )
            if case != "hostile_lossy_adam":  # of whose optimizer state there is no truth
                assert np.array_equal(values_of(checkpoint, slot.tensor), golden[key].numpy()), key
    assert locate_tables(checkpoint) == {table.name: 0 for table in checkpoint.tables}


@pytest.mark.fixtures
@pytest.mark.parametrize(
    ("case", "slots", "sharding"),
    [
        ("row_wise", {"momentum1": True}, "by rows, 2 pieces"),
        ("column_wise", {"momentum1": False}, "by columns, 2 pieces"),
        ("hostile_lossy_adam", {"exp_avg": False, "exp_avg_sq": False, "step": False}, "by rows, 2 pieces"),
    ],
)
def test_slots_that_do_not_fit_their_table_are_told(
    case: str, slots: dict[str, bool], sharding: str, torchrec_fixtures: Path
) -> None:
    """A slot of another number of rows is the rest of what a save lost, or laid out by shard; either way no row has it."""
    table = next(table for table in read(torchrec_fixtures / case).tables if "t_user" in table.name)
    assert {slot.name: slot.fits for slot in table.slots} == slots
    assert table.sharding == sharding


def test_a_transposed_tensor_has_its_own_strides(tmp_path: Path) -> None:
    """A tensor that was saved as a transposed view is stored by columns, and its shape alone would give wrong values."""
    state = make_state()
    expected = torch.arange(28, dtype=torch.float32).reshape(4, 7).t()
    state["model"]["ebc.embedding_bags.user.weight"] = expected
    state["optim"]["state"]["ebc.embedding_bags.user.weight"]["user.momentum1"] = torch.ones(7)
    checkpoint = read(save(tmp_path / "ckpt", state))
    assert expected.stride() == (1, 7)
    assert np.array_equal(values_of(checkpoint, checkpoint.tables[0].weight), expected.numpy())
    assert locate_tables(checkpoint) == {"ebc.embedding_bags.user.weight": 1}
    assert "1 of them not row after row" in "\n".join(render(describe(str(tmp_path / "ckpt"))))


def test_tables_slots_and_dense_parameters_are_told_apart(tmp_path: Path) -> None:
    checkpoint = read(save(tmp_path / "ckpt", make_state()))
    (table,) = checkpoint.tables
    assert table.name == "ebc.embedding_bags.user.weight"
    assert [(slot.name, slot.fits) for slot in table.slots] == [("momentum1", True)]
    assert [name for name, _ in checkpoint.dense] == ["mlp.weight"]
    assert checkpoint.other_state == ()
    assert set(checkpoint.objects) == {"optim.state.mlp.weight.step", "optim.param_groups.0.lr"}


def test_optimizer_state_by_number_belongs_to_no_table(tmp_path: Path) -> None:
    """Under a root with ``param_groups``, whatever the root is called; without groups it takes a setting."""
    state = {
        "model": {"w": torch.ones(2, 2)},
        "adam": {"state": {0: {"m": torch.ones(2, 2)}}, "param_groups": [{"lr": 1}]},
    }
    assert read(save(tmp_path / "a", state)).other_state == ("adam.state.0.m",)
    del state["adam"]["param_groups"]
    path = save(tmp_path / "b", state)
    assert [name for name, _ in read(path).dense] == ["w", "adam.state.0.m"]
    assert read(path, optimizer_slots=("adam.*",)).other_state == ("adam.state.0.m",)


def test_two_models_with_the_same_names_keep_their_full_names(tmp_path: Path) -> None:
    weights = {"ebc.embedding_bags.user.weight": torch.ones(2, 2)}
    checkpoint = read(save(tmp_path / "ckpt", {"online": weights, "target": dict(weights)}))
    assert [table.name for table in checkpoint.tables] == [
        f"{root}.ebc.embedding_bags.user.weight" for root in ("online", "target")
    ]


def test_the_state_of_an_application_is_looked_into(tmp_path: Path) -> None:
    """A model and its optimizer below one key, as torch's own tutorial saves them."""
    checkpoint = read(save(tmp_path / "ckpt", {"app": make_state()}))
    (table,) = checkpoint.tables
    assert table.name == "ebc.embedding_bags.user.weight"
    assert [(slot.name, slot.fits) for slot in table.slots] == [("momentum1", True)]
    assert [name for name, _ in checkpoint.dense] == ["mlp.weight"]
    nested = read(save(tmp_path / "nested", {"net": {"first": {"weight": torch.ones(2)}}}))
    assert [name for name, _ in nested.dense] == ["net.first.weight"]


def test_two_directories_are_read_as_one(tmp_path: Path) -> None:
    """TorchEasyRec keeps the model and its optimizer apart."""
    state = make_state()
    save(tmp_path / "model", state["model"])
    save(tmp_path / "optimizer", state["optim"])
    checkpoint = read(tmp_path)
    (table,) = checkpoint.tables
    assert [slot.tensor.name for slot in table.slots] == [
        "optimizer.state.ebc.embedding_bags.user.weight.user.momentum1"
    ]
    assert set(checkpoint.files) == {"model/__0_0.distcp", "optimizer/__0_0.distcp"}
    assert np.array_equal(values_of(checkpoint, table.slots[0].tensor), np.ones(10, np.float32))
    assert detect_format(open_directory(str(tmp_path))) == "dcp"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"treat_as_tables": ("nothing.*",)},
            "treat_as_tables: the pattern 'nothing.*' matches no tensor; .*mlp.weight",
        ),
        ({"optimizer_slots": ("nothing.*",)}, "optimizer_slots: the pattern 'nothing.*' matches no tensor"),
        ({"treat_as_tables": ("bias",)}, r"treat_as_tables names 'bias', which has shape \[3\]"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path / "ckpt", make_state() | {"bias": torch.ones(3)})
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "ckpt", **settings)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/nowhere/at/all",)


def spoil(path: Path, **changes: Any) -> None:
    """Change the storage entry of the table."""

    def change(metadata: Any) -> None:
        for index, entry in metadata.storage_data.items():
            if index.fqn == WEIGHT:
                metadata.storage_data[index] = dataclasses.replace(entry, **changes)

    change_metadata(path, change)


def drop_entry(metadata: Any) -> None:
    metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if k.fqn != WEIGHT}


def drop_object(metadata: Any) -> None:
    metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if k.fqn != "optim.param_groups.0.lr"}


def leave_gap(metadata: Any) -> None:
    metadata.state_dict_metadata[WEIGHT].size = torch.Size([11, 4])


def overlap(metadata: Any) -> None:
    metadata.state_dict_metadata[WEIGHT].chunks *= 2


def reach_out(metadata: Any) -> None:
    metadata.state_dict_metadata[WEIGHT].size = torch.Size([9, 4])


def plant(metadata: Any) -> None:
    metadata.planner_data = Evil()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_entry, "no file holds .*user.weight.* at .0, 0.; the save did not finish"),
        (drop_object, "no file holds 'optim.param_groups.0.lr'; the save did not finish"),
        (leave_gap, r"leave a gap at \[10, 0\]; the save did not finish"),
        (overlap, "chunks of .*user.weight' overlap"),
        (reach_out, r"has shape \[9, 4\], but a chunk of \[10, 4\]"),
        (plant, "names posix.mkdir, which torch.distributed.checkpoint never writes there"),
        (lambda m: m.state_dict_metadata.update(x=7), "is no metadata of torch.distributed.checkpoint"),
    ],
)
def test_metadata_that_is_not_whole_or_not_honest_is_refused(
    change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "ckpt", make_state())
    read(path)
    change_metadata(path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 1 << 40}, "ends at byte .* cut short"),
        ({"relative_path": "../x"}, "is no file of the checkpoint"),
        ({"relative_path": "/etc/passwd"}, "is no file of the checkpoint"),
        ({"relative_path": "__7_0.distcp"}, "__7_0.distcp, which holds .*, is missing"),
        ({"offset": -1}, "are no sizes or positions"),
    ],
)
def test_a_range_that_no_file_has_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt", make_state())
    spoil(path, **changes)
    with pytest.raises(CheckpointError, match=message):
        read(path)


@pytest.mark.parametrize("raw", [b"", b"garbage", pickle.dumps([1, 2]), pickle.dumps(None)])
def test_a_metadata_file_that_is_none_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(raw)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        read(tmp_path)


def test_an_item_that_is_not_what_the_metadata_say_is_refused(tmp_path: Path) -> None:
    """The range of another tensor, damaged bytes, or a compressed item would be taken for rows."""
    path = save(tmp_path / "ckpt", make_state())
    others: list[Any] = []
    change_metadata(path, lambda m: others.extend(e for i, e in m.storage_data.items() if i.fqn == "model.mlp.weight"))
    spoil(path, offset=others[0].offset, length=others[0].length)
    with pytest.raises(CheckpointError, match=r"is torch.float32 \[3, 4\], but .metadata says torch.float32 \[10, 4\]"):
        locate_tables(read(path))
    save(path, make_state())
    spoil(path, transform_descriptors=["zstd"])
    with pytest.raises(CheckpointError, match=r"is compressed or encrypted \(transform_descriptors\)"):
        locate_tables(read(path))
    save(path, make_state())
    file = path / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match=r"is truncated, or no file of torch\.save"):
        locate_tables(read(path))


def test_formats_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was found is told; what cannot be told, or is not exported, is one line."""
    path = save(tmp_path / "ckpt", make_state())
    out = ["--export_dir", str(tmp_path / "out")]
    for command in ("export", "plan"):
        assert main([command, "--ckpt_dir", str(path), "--filter_sparse_opt", "false", *out]) == 2
        assert "it is a DCP checkpoint, whose files serving does not read" in capsys.readouterr().err
    assert main(["export", "--ckpt_dir", str(path), "--format", "recis", *out]) == 2
    assert "no index and no tensorkey.json among its" in capsys.readouterr().err
    recis = tiny_model.write_tiny_checkpoint(tmp_path / "recis")
    with pytest.raises(CheckpointError, match=r"no \.metadata and no model/\.metadata"):
        read(recis)
    assert main(["plan", "--ckpt_dir", str(recis), *out]) == 0
    assert "source: recis checkpoint" in capsys.readouterr().out
    assert main(["export", "--ckpt_dir", str(recis), *out]) == 0
    assert f"source   recis checkpoint {recis}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="is no DCP checkpoint"):
        describe(str(recis), settings=TensorSettings(("x",)))
    assert (
        main(["plan", "--ckpt_dir", str(recis), "--export_dir", str(tmp_path / "new"), "--treat_as_tables", "[x]"]) == 2
    )
    assert "is a RecIS checkpoint, which says itself what its tables are" in capsys.readouterr().err
    shutil.copy(path / ".metadata", recis / ".metadata")
    assert main(["export", "--ckpt_dir", str(recis), *out, "--overwrite", "true"]) == 2
    assert "a RecIS checkpoint and a DCP checkpoint" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.bin").write_bytes(b"x")
    assert main(["export", "--ckpt_dir", str(tmp_path / "other"), "--export_dir", str(tmp_path / "third")]) == 2
    assert (
        "looked for manifest.json (package), index and tensorkey.json (RecIS), .metadata or model/.metadata (DCP)"
        in capsys.readouterr().err
    )


def test_inspect_shows_a_dcp_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "ckpt", make_state())
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "DCP checkpoint: " in shown
    assert "ebc.embedding_bags.user.weight is shared out in one piece" in shown
    assert "dense      mlp.weight float32 [3, 4]" in shown
    assert (
        main(["inspect", "--json", "--treat_as_tables", "mlp.*", "--treat_as_tables", "*.user.weight", str(path)]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert [(table["name"], table["rows"], table["slots"]) for table in found["tables"]] == [
        ("ebc.embedding_bags.user.weight", 10, ["embedding", "momentum1"]),
        ("mlp.weight", 3, ["embedding"]),
    ]
