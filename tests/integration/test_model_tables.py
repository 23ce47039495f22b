"""Which tensors are tables, by the model: what it looks rows up in is exported, what it scores with stays in the program."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

import dist_export
from dist_export.checkpoint.doubtful_tensors import MANY_ROWS
from dist_export.checkpoint.model_weights import ModelWeights, merge_weights
from dist_export.config.loader import load_config
from dist_export.errors import CheckpointError, ModelError
from dist_export.model.sparse_tables import find_weights
from dist_export.pipeline.dry_run import make_report
from tests.support import embedding_model
from tests.support.dcp_writer import save as save_dcp
from tests.support.plain_cases import MERGED, assert_same, read_numbered
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.sparse_cases import export

TABLES = ["sparse_arch.item.weight", "sparse_arch.user.weight"]
SETTINGS: dict[str, Any] = {
    "model": "tests.support.embedding_model:build",
    "dataset": "tests.support.embedding_model:dataset",
}


def save_torch(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    torch.save(state, folder / "model.pt")
    return folder


def save_safetensors(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    return folder


def save_dcp_model(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    return save_dcp(folder, {"model": state})


WRITERS = (save_torch, save_safetensors, save_dcp_model)


def look(model: nn.Module, sparse: str = "sparse_arch", dense: str = "dense_arch") -> ModelWeights:
    return find_weights(model, sparse_model_name=sparse, dense_model_name=dense)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_the_models_embeddings_are_tables_without_a_setting(write: Callable[..., Path], tmp_path: Path) -> None:
    """Two of them, beside one pattern's worth: none is lost, and those of the dense arch are in the program."""
    trained = embedding_model.build_trained()
    state = trained.state_dict()
    source = write(tmp_path / "ckpt", state)
    manifest = export(source, tmp_path / "out", **SETTINGS)
    assert_same(read_numbered(tmp_path / "out"), {name: state[name] for name in TABLES})
    assert manifest.parity.from_files.reads_rows
    assert manifest.run["sample"]["missing"] == dict.fromkeys(TABLES, 0)
    assert not any("own rows" in note for note in manifest.notes)
    (left,) = [note for note in manifest.notes if "in no shard" in note]
    assert "teacher.weight" in left
    assert "sparse_arch.scale.weight" in left
    program = dist_export.open_package(tmp_path / "out").load_program()
    held = {name.removeprefix("dense_arch."): value for name, value in program.state_dict.items()}
    assert any(torch.equal(value, state["dense_arch.position.weight"]) for value in held.values())


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_patterns_add_to_them_and_take_nothing_from_the_program(write: Callable[..., Path], tmp_path: Path) -> None:
    state = embedding_model.build_trained().state_dict()
    source = write(tmp_path / "ckpt", state)
    manifest = export(
        source, tmp_path / "out", treat_as_tables=["*user.weight", "teacher.*", "*position.weight"], **SETTINGS
    )
    expected = {name: state[name] for name in (*TABLES, "teacher.weight")}
    assert_same(read_numbered(tmp_path / "out"), expected)
    assert any("dense_arch.position.weight" in note and "stay in the program" in note for note in manifest.notes)


def test_a_table_that_is_looked_up_is_left_out_by_no_accident(tmp_path: Path) -> None:
    source = save_torch(tmp_path / "ckpt", embedding_model.build_trained().state_dict())
    with pytest.raises(ModelError, match=r"sparse_arch.item.weight.*drop_tables leaves out"):
        export(source, tmp_path / "out", drop_tables=["*item*"], **SETTINGS)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", ""])
def test_names_may_have_wrappers_or_begin_within_the_sparse_arch(prefix: str, tmp_path: Path) -> None:
    state = {prefix + name: value for name, value in embedding_model.build_trained().state_dict().items()}
    manifest = export(save_torch(tmp_path / "ckpt", state), tmp_path / "out", **SETTINGS)
    assert [table.name for table in manifest.tables] == [prefix + name for name in TABLES]
    weights = look(embedding_model.build())
    alone = weights.sort(["user.weight", "module.item.weight", "scale.weight"])
    assert alone.tables == {"user.weight", "module.item.weight"}


@pytest.mark.parametrize("other", ["module.sparse_arch.user.weight", "sparse_arch.module.user.weight"])
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_two_tensors_that_would_be_one_table_are_refused(
    write: Callable[..., Path], other: str, tmp_path: Path
) -> None:
    """One of them would be served, and the other one lost: a second copy, or a submodule that is really called module."""
    state = embedding_model.build_trained().state_dict()
    source = write(tmp_path / "ckpt", {**state, other: state["sparse_arch.user.weight"] + 1})
    with pytest.raises(CheckpointError, match="are one table of the model") as caught:
        export(source, tmp_path / "out", **SETTINGS)
    assert f"{other!r}" in str(caught.value)
    assert "'sparse_arch.user.weight'" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_deduplicated", [False, True])
def test_a_weight_of_both_arches_is_a_table_and_in_the_program(is_deduplicated: bool, tmp_path: Path) -> None:
    """Also where the file has it under one of its names alone, be it that of the dense arch."""
    trained = embedding_model.build_trained(embedding_model.TiedModel)
    (tmp_path / "ckpt").mkdir()
    state = trained.state_dict()
    if is_deduplicated:
        save_model(trained, str(tmp_path / "ckpt" / "model.safetensors"))
    else:
        torch.save(state, tmp_path / "ckpt" / "model.pt")
    settings = {**SETTINGS, "model": "tests.support.embedding_model:build_tied"}
    manifest = export(tmp_path / "ckpt", tmp_path / "out", **settings)
    assert_same(read_numbered(tmp_path / "out"), {name: state[name] for name in TABLES})
    program = dist_export.open_package(tmp_path / "out").load_program()
    assert any(torch.equal(value, state["dense_arch.out.weight"]) for value in program.state_dict.values())
    assert manifest.parity.from_files.max_abs == {"ctr": 0.0}


@pytest.mark.parametrize("name", ["sparse_arch.item.weight", "dense_arch.out.weight"])
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_tied_weight_is_found_under_any_of_its_names(write: Callable[..., Path], name: str, tmp_path: Path) -> None:
    state = embedding_model.build_trained(embedding_model.TiedModel).state_dict()
    (other,) = {"sparse_arch.item.weight", "dense_arch.out.weight"} - {name}
    held = {key: value.clone() for key, value in state.items() if key != other}
    export(
        write(tmp_path / "ckpt", held),
        tmp_path / "out",
        **{**SETTINGS, "model": "tests.support.embedding_model:build_tied"},
    )
    assert_same(read_numbered(tmp_path / "out"), {name: state[name] for name in TABLES})


def test_without_a_model_each_matrix_that_looks_like_a_table_is_named(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "a.user.weight": torch.zeros(20, 2),
        "a.long.weight": torch.zeros(MANY_ROWS + 1, 2),
        "a.short.weight": torch.zeros(MANY_ROWS, 2),
        "a.rowwise.weight": torch.zeros(9, 2),
        "a.rowwise_too.weight": torch.zeros(9, 2),
        "a.column.weight": torch.zeros(9, 1),
    }
    optimizer = {
        "a.rowwise.weight": {"sum": torch.zeros(9)},
        "a.rowwise_too.weight": {"sum": torch.zeros(9, 1)},
        "a.short.weight": {"exp_avg": torch.zeros(MANY_ROWS, 2), "step": torch.zeros(())},
        "a.column.weight": {"exp_avg": torch.zeros(9, 1)},
    }
    for number, source in enumerate(
        (
            save_torch(tmp_path / "torch", {"model": state, "optimizer": {"state": optimizer, "param_groups": []}}),
            save_dcp(
                tmp_path / "dcp", {"model": state, "optimizer": {"state": optimizer, "param_groups": [{"lr": 1}]}}
            ),
        )
    ):
        manifest = export(source, tmp_path / f"out{number}", treat_as_tables=["*user.weight"])
        named = [note.partition("'")[2].partition("'")[0] for note in manifest.notes if "is in no table" in note]
        assert sorted(named) == ["a.long.weight", "a.rowwise.weight", "a.rowwise_too.weight"]
        report = make_report(load_config({**load(source, tmp_path), "treat_as_tables": ["*user.weight"]}), world_size=2)
        assert [note for note in report["notes"] if "is in no table" in note] == [
            note for note in manifest.notes if "is in no table" in note
        ]


BESIDE = {
    "user.weight": torch.zeros(MANY_ROWS + 1, 2),
    "short.weight": torch.zeros(MANY_ROWS, 2),
    "rowwise.weight": torch.zeros(9, 2),
}


def test_a_matrix_of_another_state_that_looks_like_a_table_is_named(tmp_path: Path) -> None:
    """It may be trained rows that were saved beside the model; a copy of the model's own tables is none. The advice holds."""
    model = {"emb.weight": torch.zeros(MANY_ROWS + 2, 2), "mlp.weight": torch.zeros(3, 2)}
    optimizer = {"state": {"rowwise.weight": {"sum": torch.zeros(9)}}, "param_groups": [{"lr": 1}]}
    whole = {"model": model, "ema": model, "sparse": BESIDE, "optimizer": optimizer}
    source = save_torch(tmp_path / "torch", whole)
    manifest = export(source, tmp_path / "out", treat_as_tables=["*emb.weight"])
    named = [note for note in manifest.notes if "is in no table" in note]
    assert sorted(note.partition("'")[2].partition("'")[0] for note in named) == [
        "sparse.rowwise.weight",
        "sparse.user.weight",
    ]
    assert all('say state_root: . and treat_as_tables: ["sparse.' in note for note in named)
    export(source, tmp_path / "all", treat_as_tables=["sparse.user.weight"], state_root=".")
    assert list(read_numbered(tmp_path / "all")) == ["sparse.user.weight"]


def test_a_matrix_of_another_state_of_dcp_is_named(tmp_path: Path) -> None:
    """There a state is left out where its names are the model's."""
    model = {"emb.weight": torch.zeros(9, 2), "mlp.weight": torch.zeros(3, 2)}
    teacher = {"emb.weight": torch.zeros(MANY_ROWS + 1, 2), "mlp.weight": torch.zeros(3, 2)}
    source = save_dcp(tmp_path / "dcp", {"model": model, "teacher": teacher})
    manifest = export(source, tmp_path / "out", treat_as_tables=["*emb.weight"])
    (named,) = [note for note in manifest.notes if "is in no table" in note]
    assert named.startswith("'teacher.emb.weight'")


def load(source: Path, folder: Path) -> dict[str, Any]:
    return {"ckpt_dir": str(source), "export_dir": str(folder / "planned"), "filter_sparse_opt": True}


def test_a_plan_has_the_tables_of_the_export(tmp_path: Path) -> None:
    source = save_torch(tmp_path / "ckpt", embedding_model.build_trained().state_dict())
    report = make_report(load_config({**load(source, tmp_path), **SETTINGS}), world_size=3)
    assert [table["name"] for table in report["tables"]] == TABLES
    alone = make_report(load_config(load(source, tmp_path)), world_size=3)
    assert [table["name"] for table in alone["tables"]] == ["dense_arch.ebc.embedding_bags.slot.weight"]


def test_a_recis_checkpoint_may_hold_tables_of_plain_torch_in_its_dense_state(tmp_path: Path) -> None:
    """They are exported beside the hash tables; a copy of the sparse files has no place for them, and says so."""
    trained = embedding_model.build_trained()
    state = trained.state_dict()
    source = write_checkpoint(tmp_path / "ckpt", make_tables({"hashed": 30}, 2), model_state=state)
    manifest = export(source, tmp_path / "out", **SETTINGS)
    package = dist_export.open_package(tmp_path / "out")
    for name in TABLES:
        rows, found = package.lookup(name, np.arange(len(state[name])))
        assert found.all()
        assert torch.equal(torch.from_numpy(rows), state[name])
    assert [table.name for table in manifest.tables] == ["hashed", *TABLES]
    assert manifest.run["sample"]["missing"] == dict.fromkeys(TABLES, 0)
    merged = json.loads((tmp_path / "out" / MERGED).read_bytes())
    assert "dense_arch.mlp.weight" in merged
    assert not set(TABLES) & set(merged)
    assert manifest.account.exported == 30 * 24 + sum(state[name].nbytes for name in TABLES)
    assert manifest.account.in_program == sum(
        value.nbytes for name, value in state.items() if name.startswith("dense_arch.")
    )
    with pytest.raises(ModelError, match=r"sparse_arch.item.weight.*drop_tables leaves out"):
        export(source, tmp_path / "other", drop_tables=["*item*"], **SETTINGS)
    copied = make_report(load_config({**load(source, tmp_path), **SETTINGS, "filter_sparse_opt": False}), world_size=1)
    assert any(TABLES[0] in note and "in no file of the package" in note for note in copied["notes"])


def test_a_run_takes_its_checkpoint_by_the_model_too(tmp_path: Path) -> None:
    for step in (1, 2):
        save_dcp_model(tmp_path / "run" / f"step_{step}", embedding_model.build_trained().state_dict())
    manifest = export(tmp_path / "run", tmp_path / "out", **SETTINGS)
    assert manifest.source.step == 2
    assert len(manifest.tables) == 2


def test_what_a_model_says_of_its_embeddings() -> None:
    weights = look(embedding_model.build())
    assert weights.tables == {*TABLES}
    assert weights.elsewhere == {"teacher.weight"}
    assert weights.ties == frozenset()
    assert look(embedding_model.build_tied()).ties == {("dense_arch.out.weight", "sparse_arch.item.weight")}


def test_wrappers_and_lookalikes_are_seen_through() -> None:
    model = embedding_model.build()
    model.sparse_arch.user = nn.DataParallel(model.sparse_arch.user)
    model.sparse_arch.item = torch.compile(model.sparse_arch.item)
    parallel = nn.Module()
    parallel.num_embeddings, parallel.embedding_dim = 8, 2
    parallel.weight = nn.Parameter(torch.zeros(4, 2))
    model.sparse_arch.parallel = parallel
    bags = nn.Module()
    bags.embeddings = nn.ModuleDict({"t": nn.Module()})
    bags.embeddings["t"].weight = nn.Parameter(torch.zeros(4, 2))
    model.sparse_arch.ec = bags
    assert look(model).tables == {*TABLES, "sparse_arch.parallel.weight", "sparse_arch.ec.embeddings.t.weight"}


def test_arches_may_lie_in_each_other() -> None:
    """The inner one decides; what both are is both."""
    model = embedding_model.build()
    outer = look(model, sparse="")
    assert outer.tables == {*TABLES, "teacher.weight"}
    names = [*model.state_dict()]
    assert outer.sort(names).dense == {name for name in names if name.startswith("dense_arch.")}
    whole = look(model, dense="").sort(names)
    assert whole.tables == whole.both == {*TABLES}
    assert whole.is_table("sparse_arch.user.weight", is_asked=False, is_in_collection=False)
    assert not whole.is_table("teacher.weight", is_asked=True, is_in_collection=False)


def test_ranks_may_hold_other_tables_of_one_model() -> None:
    first = look(embedding_model.build())
    second = first._replace(tables=frozenset({"sparse_arch.other.weight"}))
    assert merge_weights([first, second]).tables == {*TABLES, "sparse_arch.other.weight"}
