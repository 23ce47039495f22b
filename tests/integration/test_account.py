"""The account: each tensor and byte of a source is exported, in the program, dropped for a reason, or left out by name."""

from __future__ import annotations

import argparse
import json
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model

from dist_export.checkpoint.dcp import classify as dcp_classify
from dist_export.checkpoint.payload import size_of
from dist_export.checkpoint.recis.reader import RecisReader
from dist_export.checkpoint.tensors import classify
from dist_export.config.loader import load_config
from dist_export.errors import CommitError
from dist_export.manifest import AccountEntry, Manifest
from dist_export.pipeline.dry_run import make_report, render_report
from dist_export.reporting.summary import summarize
from tests.support import embedding_model, exports
from tests.support.dcp_writer import save as save_dcp
from tests.support.dynamicemb_writer import make_table, write_dump
from tests.support.recis_writer import MERGED, make_rows, make_tables, split_table, write_checkpoint
from tests.support.sparse_cases import ADAM, copy, export

SETTINGS: dict[str, Any] = {
    "model": "tests.support.embedding_model:build",
    "dataset": "tests.support.embedding_model:dataset",
}
STEP = "user@filter_global_step"


def bytes_in(value: Any) -> tuple[int, int]:
    """Return how many tensors a nested state holds, and their bytes."""
    if isinstance(value, torch.Tensor):
        return 1, value.numel() * value.element_size()
    members = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    found = [bytes_in(member) for member in members]
    return sum(its[0] for its in found), sum(its[1] for its in found)


def bytes_of_shards(folder: Path) -> int:
    """Return the bytes behind the headers of all shards."""
    total = 0
    for file in folder.glob("model-*.safetensors"):
        total += file.stat().st_size - 8 - struct.unpack("<Q", file.read_bytes()[:8])[0]
    return total


def account_of(manifest: Manifest) -> AccountEntry:
    account = manifest.account
    assert isinstance(account, AccountEntry)
    assert account.total == account.num_bytes
    assert sum(other.num_bytes for other in account.others) <= account.num_bytes
    return account


def planned(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    config = {"ckpt_dir": str(source), "export_dir": str(out), "filter_sparse_opt": True, **settings}
    return make_report(load_config(config), world_size=2)


def make_state() -> dict[str, Any]:
    """What a training loop saves: the model, named and numbered optimizers, and what stands beside them."""
    model = embedding_model.build_trained().state_dict()
    item = model["sparse_arch.item.weight"]
    named = {
        "sparse_arch.item.weight": {"momentum1": torch.ones(len(item)), "exp_avg": torch.ones_like(item)},
        "dense_arch.mlp.weight": {"exp_avg": torch.ones_like(model["dense_arch.mlp.weight"])},
    }
    return {
        "model": model,
        "optimizer": {"state": named, "param_groups": [{"lr": 0.1}]},
        "other": {"state": {0: {"exp_avg": torch.ones(3, 5)}}, "param_groups": []},
        "teacher": {"w": torch.ones(7)},
    }


def write_torch(folder: Path) -> tuple[Path, tuple[int, int]]:
    folder.mkdir()
    state = make_state()
    torch.save(state, folder / "all.pt")
    return folder, bytes_in(state)


def test_nothing_that_lies_in_or_beside_an_optimizer_is_forgotten(tmp_path: Path) -> None:
    """State by number has arrays and odd keys too, groups have learning rates that are tensors, and a model may lie beside it."""
    arrays = [np.arange(float(n)) for n in range(5, 12)]
    rate = torch.tensor(0.1)
    by_number = {
        0: {"exp": torch.ones(3), "arr": arrays[0], ("t", 1): torch.ones(2), ("a", 2): arrays[1]},
        1: [arrays[2]],
    }
    by_name = {"emb.weight": {"exp": torch.ones(20, 4), ("k",): arrays[3]}}
    state = {
        "opt": {
            "state": by_number,
            "param_groups": [{"lr": rate, "params": [0, 1], "arr": arrays[4]}],
            "more": [torch.ones(6)],
        },
        "named": {
            "state": by_name,
            "param_groups": [{"lr": rate + 1, ("x",): {"arr": arrays[5]}}],
            "more": {"y": arrays[6]},
        },
        "emb.weight": torch.ones(20, 4),
    }
    torch.save(state, tmp_path / "m.pt")
    account = export(tmp_path / "m.pt", tmp_path / "out", treat_as_tables=["emb.weight"]).account
    every = [3, 2, 6, 1, 1, 2 * 20 * 4]
    assert account.num_bytes == account.total == 4 * sum(every) + sum(array.nbytes for array in arrays)
    assert account.tensors == 2 + 5 + len(arrays)
    others = {its.name: (its.num_bytes, its.fate, its.reason) for its in account.others}
    array, odd = "stored as an array of numpy", "below a key that is neither a text nor a number"
    assert others["opt.state.0.exp"] == (12, "dropped", "optimizer")
    assert others["opt.state.0.arr"] == (40, "left_out", array)
    assert others["opt.state.0.('t', 1)"] == (8, "left_out", odd)
    assert others["opt.state.0.('a', 2)"] == (48, "left_out", array)
    assert others["opt.state.1.0"] == (56, "left_out", array)
    assert others["opt.param_groups.0.lr"] == others["named.param_groups.0.lr"] == (4, "dropped", "optimizer")
    assert others["opt.param_groups.0.arr"] == (72, "left_out", array)
    assert others["named.param_groups.0.('x',).arr"] == (80, "left_out", array)
    assert others["named.state.emb.weight.('k',)"] == (64, "left_out", array)
    assert others["opt.more.0"][:2] == (24, "left_out")
    assert others["named.more.y"] == (88, "left_out", array)


def test_arrays_of_numpy_and_keys_that_are_no_names_are_left_out_by_name(tmp_path: Path) -> None:
    """The reader of plain values takes none of them for a table, and the account has their bytes."""
    state = {
        "ebc.embedding_bags.price.weight": torch.randn(50, 8),
        "ebc.embedding_bags.user.weight": np.ones((100, 8), np.float32),
        ("a", "b"): torch.randn(10, 8),
        "more": {None: {"c": torch.randn(3)}, 2.5: [np.ones(4, np.int64)]},
    }
    (tmp_path / "ckpt").mkdir()
    torch.save(state, tmp_path / "ckpt" / "all.pt")
    manifest = export(tmp_path / "ckpt", tmp_path / "out")
    account = account_of(manifest)
    assert (account.tensors, account.num_bytes) == (5, 50 * 32 + 100 * 32 + 10 * 32 + 3 * 4 + 4 * 8)
    notes = "\n".join(manifest.notes)
    assert "not read: ebc.embedding_bags.user.weight, more.2.5.0: stored as an array of numpy" in notes
    assert "not read: ('a', 'b'), more.None.c: below a key that is neither a text nor a number" in notes


def save_with(folder: Path, **more: Any) -> Path:
    folder.mkdir()
    torch.save({"ebc.embedding_bags.price.weight": torch.randn(50, 8), **more}, folder / "all.pt")
    return folder


def make_objects() -> dict[str, tuple[Any, dict[str, int]]]:
    """What holds tensors and is no container -> the bytes of each of these by name."""
    rate, array = torch.ones(6), np.arange(5.0)
    itself = argparse.Namespace(rate=rate, more=[{"a": array}])
    itself.itself = itself
    optimizer = {"state": {0: {"exp_avg": torch.ones(3, 5)}}, "param_groups": [{"lr": 0.1, "seen": itself}]}
    return {
        "namespace": (argparse.Namespace(rate=rate, steps=3), {"its.rate": 24}),
        "one that refers to itself": (itself, {"its.rate": 24, "its.more.0.a": 40}),
        "in a list": ([1, argparse.Namespace(rate=rate)], {"its.1.rate": 24}),
        "in an optimizer": (optimizer, {"its.param_groups.0.seen.rate": 24, "its.param_groups.0.seen.more.0.a": 40}),
        "counter": (Counter({"a": 2}), {}),
        "deep": (argparse.Namespace(a=_nest(rate, 60)), {".".join(["its", "a", *["0"] * 60]): 24}),
    }


def _nest(value: Any, times: int) -> Any:
    for _ in range(times):
        value = [value]
    return value


@pytest.mark.parametrize("name", make_objects())
def test_tensors_in_objects_are_left_out_by_name(name: str, tmp_path: Path) -> None:
    value, expected = make_objects()[name]
    manifest = export(save_with(tmp_path / "ckpt", its=value), tmp_path / "out")
    account = account_of(manifest)
    held = {other.name: other.num_bytes for other in account.others if other.reason.startswith("in an object of ")}
    assert held == expected
    assert sum(n for why, n in account.left_out.items() if why.startswith("in an object of ")) == sum(expected.values())
    notes = "\n".join(manifest.notes)
    assert all(its[:100] in notes for its in expected)
    assert "of no tensor" not in notes


def test_bytes_of_a_file_that_no_tensor_accounts_for_are_told(tmp_path: Path) -> None:
    """The zip's storages are counted, whatever the walk through what the pickle describes comes across."""
    manifest = export(save_with(tmp_path / "ckpt", raw=torch.ones(6).untyped_storage()), tmp_path / "out")
    assert any("24 B in 1 storage of the file are of no tensor" in note for note in manifest.notes)
    assert account_of(manifest).left_out["a storage of no tensor that is found"] == 24


def test_an_object_in_one_piece_of_dcp_has_an_entry(tmp_path: Path) -> None:
    """Whether it holds tensors only unpickling tells; learning rates and steps are too small to."""
    state = {
        "ebc": {"embedding_bags.price.weight": torch.randn(50, 8)},
        "args": argparse.Namespace(rate=torch.ones(50_000)),
    }
    source = save_dcp(tmp_path / "ckpt", {**state, "epoch": 3})
    manifest = export(source, tmp_path / "out")
    (entry,) = [other for other in account_of(manifest).others if other.reason.startswith("an object in one piece")]
    assert (entry.name, entry.fate) == ("args", "left_out")
    assert entry.num_bytes > 200_000
    assert any("not read: args (" in note for note in manifest.notes)


def write_dcp(folder: Path) -> tuple[Path, tuple[int, int]]:
    state = {name: value for name, value in make_state().items() if name in ("model", "optimizer")}
    return save_dcp(folder, state), bytes_in(state)


def write_safetensors(folder: Path) -> tuple[Path, tuple[int, int]]:
    folder.mkdir()
    state = make_state()
    flat = dict(state["model"])
    for name, slots in state["optimizer"]["state"].items():
        flat |= {f"optimizer.state.{name}.{slot}": value for slot, value in slots.items()}
    save_file(flat, folder / "model.safetensors")
    return folder, bytes_in(flat)


@pytest.mark.parametrize("settings", [{}, SETTINGS], ids=["tables", "model"])
@pytest.mark.parametrize("write", [write_torch, write_dcp, write_safetensors], ids=lambda write: write.__name__)
def test_all_that_a_plain_checkpoint_holds_is_accounted_for(
    write: Callable[..., Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    source, held = write(tmp_path / "ckpt")
    view = {
        "treat_as_tables": ["*user.weight", "*item.weight"],
        "dtype": {"*user*": "float16"},
        "drop_tables": ["*slot*"],
    }
    view |= {"keep_slots": ["exp_avg"]}
    if settings:
        del view["drop_tables"]  # a collection of the dense arch is no table then
    manifest = export(source, tmp_path / "out", **view, **settings)
    account = account_of(manifest)
    assert (account.tensors, account.num_bytes) == held
    model = embedding_model.build_trained().state_dict()
    user, item = (bytes_in(model[f"sparse_arch.{name}.weight"])[1] for name in ("user", "item"))
    assert account.exported == user // 2 + 2 * item
    assert account.dropped["cast"] == user // 2
    numbered = 60 if write is write_torch else 0
    assert account.dropped["optimizer"] == 4 * 40 + 4 * 12 + numbered
    dense = bytes_in({name: value for name, value in model.items() if name.startswith("dense_arch.")})[1]
    slot = bytes_in(model["dense_arch.ebc.embedding_bags.slot.weight"])[1]
    rest = bytes_in([model[name] for name in ("sparse_arch.scale.weight", "sparse_arch.scale.bias", "teacher.weight")])[
        1
    ]
    beside = {"not of the model": 28} if write is write_torch else {}
    if settings:
        assert account.in_program == dense
        assert account.left_out == {"not_served": rest} | beside
    else:
        assert account.in_program == 0
        assert account.left_out == {"drop_tables": slot, "no_model": dense + rest - slot} | beside
    fates = {other.name.removeprefix("model."): (other.fate, other.reason) for other in account.others}
    assert fates["teacher.weight"] == ("left_out", "not_served" if settings else "no_model")
    report = planned(source, tmp_path / "planned", **view, **settings)
    assert report["account"] == json.loads((tmp_path / "out" / "manifest.json").read_bytes())["account"]
    (line,) = [line for line in summarize(manifest, (), "out") if line.startswith("  account")]
    assert line.removeprefix("  account  ") in "\n".join(render_report(report))
    assert ("teacher.weight" if settings else "and 3 more") in line or write is write_torch


def write_recis(folder: Path) -> tuple[Path, int]:
    tables = make_tables({"user": 70, "item": 30}, 2)
    ids, rows = make_rows(9, slots=ADAM)
    ids[1] = ids[0]
    tables["twice"] = split_table(ids, rows, 2)
    model = {"dense_arch.w": torch.ones(4, 3), STEP: torch.ones(1, dtype=torch.int64)}
    dense = {"sparse_adam_step": np.ones(1, np.int64), "kept": np.ones(5, np.float32)}
    write_checkpoint(folder, tables, dense=dense, model_state=model)
    return folder, bytes_of_shards(folder) + 48 + 8


def test_a_recis_checkpoint_with_the_filter(tmp_path: Path) -> None:
    source, held = write_recis(tmp_path / "ckpt")
    settings = {
        "on_duplicate": "first",
        "prune": [{"tables": "user", "norm_at_most": 1.5}],
        "dtype": {"user": "bfloat16", "item": "int8"},
        "drop_slots": ["kept"],
        "keep_slots": ["item.sparse_adam_exp_avg"],
        "drop_tables": [],
    }
    manifest = export(source, tmp_path / "out", **settings)
    account = account_of(manifest)
    assert account.num_bytes == held
    assert account.tensors == 3 * 4 + 2 + 2
    user = next(table for table in manifest.tables if table.name == "user")
    assert user.rows_dropped["norm"]
    assert account.dropped["norm"] == user.rows_dropped["norm"] * (8 + 16)
    assert account.dropped["duplicate"] == 8 + 16
    assert account.dropped["cast"] == user.rows_out * 8 + 30 * (16 - 12)
    assert account.dropped["optimizer"] == (70 * 2 + 30 + 9 * 2) * 16 + 8
    assert account.dropped["drop_slots"] == 20
    assert account.dropped["trainer_state"] == 8
    assert account.left_out == {"no_model": 48}
    left = export(source, tmp_path / "left", select_tables=["user"])
    assert account_of(left).num_bytes == held
    assert account_of(left).left_out["select_tables"] == 39 * (8 + 3 * 16)
    report = planned(source, tmp_path / "planned", **settings)
    assert report["account"] == json.loads((tmp_path / "out" / "manifest.json").read_bytes())["account"]


def test_a_recis_checkpoint_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    write_checkpoint(folder, make_tables({"user": 70}, 2), model_state={"dense_arch.w": torch.ones(4, 3)})
    held = bytes_of_shards(folder)
    account = account_of(copy(folder, tmp_path / "out"))
    assert account.num_bytes == held + 48
    assert account.exported == held
    assert account_of(copy(folder, folder)).left_out == {"no_model": 48}


def test_the_step_of_the_filter_hook_is_trainer_state(tmp_path: Path) -> None:
    """Dropped and counted with the filter, also in the merged manifest; a copy lists it as RecIS does."""
    model = {"dense_arch.w": torch.ones(4, 3), STEP: torch.ones(1, dtype=torch.int64)}
    source = write_checkpoint(tmp_path / "ckpt", make_tables({"user": 20}, 2), model_state=model)
    manifest = export(source, tmp_path / "out")
    assert [(its.name, its.shape, its.reason) for its in manifest.dropped_dense_tensors] == [
        (STEP, (1,), "trainer_state")
    ]
    assert STEP not in json.loads((tmp_path / "out" / MERGED).read_bytes())
    assert "dense_arch.w" in json.loads((tmp_path / "out" / MERGED).read_bytes())
    assert not any(STEP in note for note in manifest.notes)
    assert any(STEP in line for line in summarize(manifest, (), "out") if line.startswith("  dropped"))
    report = planned(source, tmp_path / "planned")
    assert report["dense_tensors"]["dropped"] == [STEP]
    copy(source, tmp_path / "copy")
    assert STEP in json.loads((tmp_path / "copy" / MERGED).read_bytes())


def test_a_coalesced_groups_step_is_dropped(tmp_path: Path) -> None:
    names = [f"sparse_row_wise_adagrad{kind}_CoalescedHashtable_0f3_step" for kind in ("", "_sum")]
    source = write_checkpoint(
        tmp_path / "ckpt", make_tables({"user": 20}, 2), dense={name: np.ones(1, np.int64) for name in names}
    )
    manifest = export(source, tmp_path / "out")
    assert [(its.name, its.reason) for its in manifest.dropped_dense_tensors] == [(name, "optimizer") for name in names]


def test_a_dump_of_dynamicemb_alone_and_beside_a_checkpoint(tmp_path: Path) -> None:
    rows = make_table(list(range(40)), 4)
    write_dump(tmp_path / "ckpt" / "dynamicemb" / "model.ebc", "t", rows, 2)
    held = sum(column.nbytes for column in rows.values())
    account = account_of(export(tmp_path / "ckpt", tmp_path / "alone", keep_slots=["score"]))
    assert (account.tensors, account.num_bytes, account.dropped) == (4, held, {"optimizer": 40 * 32})
    state = {
        "model": {"ebc.embedding_bags.t.weight": torch.zeros(2, 1), "ebc.embedding_bags.u.weight": torch.ones(9, 4)}
    }
    save_dcp(tmp_path / "ckpt", state)
    account = account_of(export(tmp_path / "ckpt", tmp_path / "both"))
    assert (account.tensors, account.num_bytes) == (6, held + 8 + 9 * 16)
    assert account.left_out == {"stands for a table of the dump": 8}


def test_a_model_in_memory(tmp_path: Path) -> None:
    trained = embedding_model.build_trained()
    manifest = exports.exporter(
        model=trained,
        sparse_model_name="sparse_arch",
        dense_model_name="dense_arch",
        ckpt_dir=None,
        export_dir=tmp_path / "out",
        dataset=embedding_model.dataset(),
    ).export()
    account = account_of(manifest)
    model = trained.state_dict()
    tables = [value for name, value in model.items() if name in ("sparse_arch.user.weight", "sparse_arch.item.weight")]
    dense = {name: value for name, value in model.items() if name.startswith("dense_arch.")}
    assert account.exported == bytes_in(tables)[1]
    assert account.in_program == bytes_in(dense)[1]
    names = {"sparse_arch.user.weight", "sparse_arch.item.weight", *dense}
    rest = [value for name, value in model.items() if name not in names]
    assert account.left_out == {"not_served": bytes_in(rest)[1]}
    assert (account.tensors, account.num_bytes) == (len(model), bytes_in(model)[1])


@pytest.mark.parametrize("is_deduplicated", [False, True])
def test_a_tied_weight_counts_once_for_each_of_its_names_in_the_file(is_deduplicated: bool, tmp_path: Path) -> None:
    trained = embedding_model.build_trained(embedding_model.TiedModel)
    (tmp_path / "ckpt").mkdir()
    state = trained.state_dict()
    if is_deduplicated:
        save_model(trained, str(tmp_path / "ckpt" / "model.safetensors"))
    else:
        torch.save(state, tmp_path / "ckpt" / "model.pt")
    manifest = export(
        tmp_path / "ckpt", tmp_path / "out", **{**SETTINGS, "model": "tests.support.embedding_model:build_tied"}
    )
    account = account_of(manifest)
    item, user = bytes_in(state["sparse_arch.item.weight"])[1], bytes_in(state["sparse_arch.user.weight"])[1]
    assert account.exported == item + user
    assert account.in_program == (0 if is_deduplicated else item)


def test_numbers_that_become_ids_are_no_bytes_of_the_source(tmp_path: Path) -> None:
    source, held = write_safetensors(tmp_path / "ckpt")
    account = account_of(export(source, tmp_path / "out", to_hash_tables=["*"], **SETTINGS))
    assert (account.tensors, account.num_bytes) == held


def test_the_dense_arch_alone(tmp_path: Path) -> None:
    source, held = write_torch(tmp_path / "ckpt")
    manifest = exports.export(
        {"ckpt_dir": str(source), "export_dir": str(tmp_path / "out"), "need_export_sparse": False, **SETTINGS}
    )
    account = account_of(manifest)
    assert (account.tensors, account.num_bytes) == held
    assert account.exported == 0
    left = [other.name for other in account.others if other.reason == "need_export_sparse"]
    assert "sparse_arch.item.weight.embedding" in left


def test_a_tensor_that_is_lost_fails_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum is held against what headers and metadata say: whatever loses a tensor on the way is found."""
    for number, (write, room) in enumerate(((write_torch, classify), (write_dcp, dcp_classify))):
        source, _ = write(tmp_path / f"ckpt{number}")

        def lose(name: str, *args: Any, original: Any = room.other_tensor) -> Any:
            return original(name, *args)._replace(num_bytes=0) if "teacher" in name else original(name, *args)

        monkeypatch.setattr(room, "other_tensor", lose)
        with pytest.raises(CommitError, match="account of its payload does not add up"):
            export(source, tmp_path / "out", treat_as_tables=["*user.weight"])
        assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_slot_that_is_lost_fails_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = write_recis(tmp_path / "ckpt")
    whole = RecisReader.assemble

    def lose(self: RecisReader, shares: Any) -> Any:
        found = whole(self, shares)
        user, *rest = found.tables
        changed = user.__class__(name=user.name, slots=user.slots[:-1])
        return found.__class__(
            **{name: getattr(found, name) for name in found.__slots__} | {"tables": (changed, *rest)}
        )

    monkeypatch.setattr(RecisReader, "assemble", lose)
    with pytest.raises(CommitError, match="account of its payload does not add up"):
        export(source, tmp_path / "out", on_duplicate="first")


def test_sizes_of_dtypes() -> None:
    sizes = {"float32": 4, "bfloat16": 2, "bool": 1, "float8_e4m3fn": 1, "complex64": 8, "uint16": 2, "qint32": 4}
    assert {name: size_of(name, (1,)) for name in sizes} == sizes
    assert size_of("float32", (3, 0)) == 0
    assert size_of("float64", ()) == 8
