"""The width and the dtype of rows in DynamicEmb dumps: what confirms them, what contradicts, what is said where nothing does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_export.checkpoint.dynamicemb_widths import Stated, find_score_words, find_width, read_stated
from dist_export.cli import main
from dist_export.dense.model_dims import find_model_dims
from dist_export.errors import CheckpointError, ConfigError, PlanError
from dist_export.formats.dtypes import DTYPES
from tests.support.dynamicemb_writer import make_table, truth_of, write_dump
from tests.support.hostile_cases import assert_refused, run
from tests.support.recis_writer import read_back
from tests.support.sparse_cases import assert_exact, export

KEPT = ("id", "embedding", "score")


def stated(opt_type: str | None = None, **more: Any) -> Stated:
    document = {"lr": 0.1, **({} if opt_type is None else {"opt_type": opt_type}), **more}
    return read_stated([("t_opt_args.json", document)])


@pytest.mark.parametrize(
    ("row_bytes", "state", "said", "expected"),
    [
        # float32 rows of 8 values
        (32, 16, stated("adam"), ("float32", 8, "optimizer state (adam)")),
        (32, 8, stated("exact_adagrad"), ("float32", 8, "optimizer state (exact_adagrad)")),
        (32, 1, stated("exact_row_wise_adagrad"), ("float32", 8, "")),
        (32, 4, stated("exact_row_wise_adagrad"), ("float32", 8, "")),
        (32, None, stated("sgd"), ("float32", 8, "")),
        (32, 0, stated("sgd"), ("float32", 8, "")),
        (32, 0, Stated(), ("float32", 8, "")),
        (32, 0, stated("lamb"), ("float32", 8, "")),
        (32, None, stated("adam"), ("float32", 8, "")),
        (32, None, Stated(), ("float32", 8, "")),
        (24, 6, Stated(), ("float32", 6, "optimizer state")),
        (32, 8, Stated(), ("float32", 8, "")),  # or row-wise, of bfloat16 in memory
        (32, 16, Stated(), ("float32", 8, "")),
        (32, None, stated(dim=8), ("float32", 8, "dim of t_opt_args.json")),
        (32, 20, stated("lamb"), ("float32", 8, "")),
        (4, 1, Stated(), ("float32", 1, "")),
        # rows of 2 bytes a value, where a json states it
        (16, 16, stated("adam", embedding_dtype="torch.bfloat16"), ("bfloat16", 8, "embedding_dtype")),
        (16, None, stated(dim=8, dtype="fp16"), ("float16", 8, "dtype of t_opt_args.json, dim of t_opt_args.json")),
        (14, None, stated(dtype="DataType.BF16"), ("bfloat16", 7, "dtype of t_opt_args.json")),
    ],
)
def test_a_width_that_nothing_contradicts(row_bytes: int, state: int | None, said: Stated, expected: Any) -> None:
    found = find_width(row_bytes, state, said)
    assert found.contradiction == ""
    assert (DTYPES[found.dtype].torch, found.dim) == expected[:2]
    assert ", ".join(found.confirmed_by).startswith(expected[2])
    assert bool(found.confirmed_by) == bool(expected[2])


@pytest.mark.parametrize(
    ("row_bytes", "state", "said", "reason"),
    [
        # rows of 8 values of 2 bytes, which would be 4 of float32
        (16, 16, stated("adam"), "its optimizer state has 16 float32 for each key, where adam has 8"),
        (16, 8, stated("exact_adagrad"), "has 8 float32 for each key, where exact_adagrad has 4"),
        (16, 16, Stated(), "has 16 float32 for each key, which no optimizer has for 4 values"),
        (
            16,
            None,
            stated(dim=8),
            "dim of t_opt_args.json is 8: that would be 2 bytes for each value, and nothing states",
        ),
        (14, None, stated("sgd"), "14 bytes for each key are no whole number of float32"),
        # of 4 of float64
        (32, 4, stated("exact_adagrad"), "has 4 float32 for each key, where exact_adagrad has 8"),
        (32, None, stated(embedding_dim=4.0), "that would be 8 bytes for each value"),
        # what is stated cannot be
        (32, 3, stated("sgd"), "has 3 float32 for each key, where sgd has none"),
        (32, 0, stated("adam"), "its files of optimizer state are empty, where adam has 16"),
        (32, 0, stated("exact_row_wise_adagrad"), "are empty, where exact_row_wise_adagrad has 1"),
        (32, 2, stated("exact_row_wise_adagrad"), "where exact_row_wise_adagrad has 1"),
        (32, 16, stated("adam", dtype="bfloat16"), "has 16 float32 for each key, where adam has 32"),
        (32, None, stated(dim=5), "dim of t_opt_args.json is 5"),
        (32, None, stated(dim=float("inf")), "dim of t_opt_args.json is inf"),
        (32, None, stated(dim=-float("inf")), "dim of t_opt_args.json is -inf"),
        (32, None, stated(dim=8.5), "dim of t_opt_args.json is 8.5"),
        (32, None, stated(dim=True), "dim of t_opt_args.json is True"),
        (32, None, stated(dim="wide"), "dim of t_opt_args.json is 'wide'"),
        (32, None, stated(dtype="int8"), "dtype of t_opt_args.json is 'int8'; expected one of float32"),
        (32, None, stated(dtype="float32", emb_dtype="float16"), "expected one of float32"),
        (0, None, Stated(), "0 bytes for each key"),
    ],
)
def test_a_width_that_something_contradicts(row_bytes: int, state: int | None, said: Stated, reason: str) -> None:
    found = find_width(row_bytes, state, said)
    assert reason in found.contradiction
    assert found.confirmed_by == ()


@pytest.mark.parametrize(
    ("words", "strategy", "is_right"),
    [
        (1, None, True), (2, None, True), (3, None, False), (0, None, False),
        (1, "EvictStrategy.KLru", True), (2, "EvictStrategy.KLru", False), (2, "KCustomized", False),
        (1, "EvictStrategy.KLfu", True), (2, "EvictStrategy.KLfu", True),  # {TIMESTAMP, LFU} evicts as LFU does
        (2, ["TIMESTAMP", "LFU"], True), (1, ["LFU", "TIMESTAMP"], False), (1, ["STEP"], True),
        (2, "(DynamicEmbScoreStrategy.TIMESTAMP, DynamicEmbScoreStrategy.LFU)", True), (1, "KLruLfu", False),
        (1, "something new", True), (2, "something new", True),
    ],
)  # fmt: skip
def test_score_words_go_with_the_strategy(words: int, strategy: Any, is_right: bool) -> None:
    found = find_score_words(words, stated(evict_strategy=strategy))
    assert (found == "") == is_right
    assert is_right or found.startswith(f"{words} score")


# ---- whole dumps ----------------------------------------------------------------------------------------------------


def write(folder: Path, values: torch.Tensor, *, words: int = 1, stated: dict[str, Any] | None = None) -> Path:
    """Write the table ``t`` of one collection, with these rows."""
    keys = np.arange(100, 100 + len(values))
    raw = values.contiguous().view(torch.uint8).numpy()
    scores = np.arange(len(keys) * words).reshape(len(keys), -1)
    write_dump(folder / "model.sparse_arch.ebc", "t", {"keys": keys, "values": raw, "scores": scores}, 2)
    (folder / "model.sparse_arch.ebc" / "t_opt_args.json").unlink()
    if stated is not None:
        (folder / "model.sparse_arch.ebc" / "t_meta.json").write_text(json.dumps(stated))
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_of_a_stated_dtype_come_out_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    values = torch.randn(10, 8).to(getattr(torch, dtype))
    source = write(tmp_path / "in", values, stated={"evict_strategy": "KLfu", "embedding_dtype": dtype, "dim": 8})
    manifest = export(source, tmp_path / "out", num_shards=2)
    found = read_back(tmp_path / "out")["t"]
    order = np.argsort(found["id"])
    assert found["embedding"][order].tobytes() == values.view(torch.uint8).numpy().tobytes()
    (slot,) = (slot for slot in manifest.tables[0].kept if slot.name == "embedding")
    assert (slot.dtype, list(slot.shape)[-1:] or [slot.dim]) == (dtype, [8])
    assert not [note for note in manifest.notes if "wide" in note]


def test_rows_of_two_bytes_a_value_are_never_read_as_half_as_many_of_float32(tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path / "in", torch.randn(10, 8).bfloat16(), stated={"dim": 8})
    places = ("--ckpt_dir", source, "--export_dir", tmp_path / "out", "--filter_sparse_opt", "true")
    for outcome in (
        run(capsys, tmp_path, "plan", *places),
        run(capsys, tmp_path, *places),
        run(capsys, tmp_path, "inspect", source),
    ):
        assert_refused(
            outcome, "table 't': its values have 16 bytes for each key, 4 float32, but dim of t_meta.json is 8"
        )
    assert not (tmp_path / "out").exists()
    (source / "model.sparse_arch.ebc" / "t_meta.json").unlink()
    assert_refused(run(capsys, tmp_path, *places, "--dynamicemb_dims.t", 8), "4 float32, but dynamicemb_dims says 8")
    assert_refused(run(capsys, tmp_path, "inspect", source, "--dynamicemb_dims", "{t: 8}"), "dynamicemb_dims says 8")


def test_a_width_that_nothing_confirms_is_noted(tmp_path: Path, capsys: Any) -> None:
    """Without json, optimizer state, model and setting; each of these takes the note away or refuses."""
    source = write(tmp_path / "in", torch.randn(10, 4), words=2)
    manifest = export(source, tmp_path / "out")
    (note,) = manifest.notes
    assert "does not say how wide the rows of 't' (float32 [4]) are, and nothing else confirms it" in note
    assert read_back(tmp_path / "out")["t"]["score"].shape == (10, 2)
    assert export(source, tmp_path / "sure", dynamicemb_dims={"*": 4}).notes == ()
    assert main(["inspect", str(source)]) == 0
    shown = capsys.readouterr().out
    assert "width of its rows: nothing confirms it" in shown
    assert "nothing else confirms it" in shown
    assert main(["inspect", str(source), "--dynamicemb_dims", "{t: 4}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tables"][0]["width_confirmed_by"] == ["dynamicemb_dims"]
    assert found["warnings"] == []
    settings = ["--ckpt_dir", str(source), "--export_dir", str(tmp_path / "no"), "--filter_sparse_opt", "true"]
    assert main(["plan", *settings, "--dynamicemb_dims.t", "4"]) == 0
    assert "width of its rows: confirmed by dynamicemb_dims" in capsys.readouterr().out
    with pytest.raises(
        PlanError, match="dynamicemb_dims: the pattern 'u' matches no table of a DynamicEmb dump; there are t"
    ):
        export(source, tmp_path / "no", dynamicemb_dims={"u": 4})
    with pytest.raises(ConfigError, match=r"dynamicemb_dims\.t is 0"):
        export(source, tmp_path / "no", dynamicemb_dims={"t": 0})
    assert main(["inspect", str(tmp_path / "out"), "--dynamicemb_dims", "{t: 4}"]) == 2
    assert "is no DynamicEmb dump" in capsys.readouterr().err


def test_a_table_that_cannot_be_read_may_be_left_out(tmp_path: Path) -> None:
    source = write(tmp_path / "in", torch.randn(10, 8).half(), stated={"dim": 8})
    rows = make_table(range(20), 4)
    write_dump(source / "model.sparse_arch.ebc", "other", rows, 2)
    with pytest.raises(CheckpointError, match="drop_tables leaves the table out"):
        export(source, tmp_path / "out")
    export(source, tmp_path / "out", drop_tables=["t"])
    assert_exact(tmp_path / "out", {"other": truth_of(rows, *KEPT)}, slots=KEPT)


def test_an_optimizer_without_state_leaves_empty_files(tmp_path: Path) -> None:
    rows = {**make_table(range(20), 4), "opt_values": np.zeros((20, 0), np.float32)}
    write_dump(tmp_path / "in", "t", rows, 2)
    (tmp_path / "in" / "t_opt_args.json").write_text('{"opt_type": "sgd", "evict_strategy": "EvictStrategy.KLru"}')
    export(tmp_path / "in", tmp_path / "out")
    assert_exact(tmp_path / "out", {"t": truth_of(rows, *KEPT)}, slots=KEPT)


@pytest.mark.parametrize(
    ("opt_type", "is_told"), [("adam", True), ("exact_adagrad", True), ("sgd", False), ("lamb", False)]
)
def test_state_that_the_optimizer_has_and_the_dump_lacks_is_told(opt_type: str, is_told: bool, tmp_path: Path) -> None:
    """A dump may be made without optimizer state; what would have told the width is named then."""
    rows = {slot: its for slot, its in make_table(range(20), 4).items() if slot != "opt_values"}
    write_dump(tmp_path / "in", "t", rows, 2)
    (tmp_path / "in" / "t_opt_args.json").write_text(json.dumps({"opt_type": opt_type, "lr": 0.1}))
    notes = " ".join(export(tmp_path / "in", tmp_path / "out").notes)
    assert "nothing else confirms it" in notes
    assert (f"'t': its optimizer is {opt_type}, whose state would tell, but there are no files" in notes) is is_told
    assert export(tmp_path / "in", tmp_path / "sure", dynamicemb_dims={"t": 4}).notes == ()


def test_empty_files_of_a_state_that_the_optimizer_has_are_refused(tmp_path: Path) -> None:
    rows = {**make_table(range(20), 4), "opt_values": np.zeros((20, 0), np.float32)}
    write_dump(tmp_path / "in", "t", rows, 2)
    (tmp_path / "in" / "t_opt_args.json").write_text('{"opt_type": "adam"}')
    with pytest.raises(CheckpointError, match="its files of optimizer state are empty, where adam has 8"):
        export(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_json_of_a_longer_name_is_of_the_other_table(tmp_path: Path) -> None:
    short, long = make_table(range(20), 4, seed=1), make_table(range(20), 8, seed=2)
    write_dump(tmp_path / "in", "t", short, 2)
    write_dump(tmp_path / "in", "t_b", long, 2)
    (tmp_path / "in" / "t_b_meta.json").write_text('{"dim": 8}')
    (tmp_path / "in" / "t.json").write_text('{"dim": 4}')
    export(tmp_path / "in", tmp_path / "out")
    assert_exact(tmp_path / "out", {"t": truth_of(short, *KEPT), "t_b": truth_of(long, *KEPT)}, slots=KEPT)
    (tmp_path / "in" / "t.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"t\.json"):
        export(tmp_path / "in", tmp_path / "other")


# ---- the model ------------------------------------------------------------------------------------------------------


class Collection(nn.Module):
    """What torchrec's collections show of their tables."""

    def __init__(self, **dims: int) -> None:
        super().__init__()
        self._configs = [SimpleNamespace(name=name, embedding_dim=dim) for name, dim in dims.items()]

    def embedding_bag_configs(self) -> list[Any]:
        return self._configs


def make_model(**dims: int) -> nn.Module:
    model = nn.Module()
    model.sparse_arch = nn.Module()
    model.sparse_arch.ebc = Collection(**dims)
    model.sparse_arch.item = nn.Embedding(3, 6)
    model.dense_arch = nn.ModuleDict({"t": nn.Embedding(3, 5)})
    return model


def test_dimensions_of_a_model_are_those_of_its_sparse_arch() -> None:
    found = find_model_dims(make_model(t=4, u=16), sparse_model_name="sparse_arch")
    assert {name: set(dims) for name, dims in found.items()} == {
        "t": {4}, "model.sparse_arch.ebc.t": {4}, "u": {16}, "model.sparse_arch.ebc.u": {16},
        "item": {6}, "model.sparse_arch.item": {6},
    }  # fmt: skip
    assert set(find_model_dims(make_model(t=4), sparse_model_name="lacking")["t"]) == {4, 5}


@pytest.mark.parametrize("name", ["t", "model.sparse_arch.ebc.t"])
def test_a_width_is_compared_with_the_model(name: str, tmp_path: Path) -> None:
    from dist_export.config.schema import ExportConfig
    from dist_export.pipeline.inputs import open_source
    from dist_export.runtime.joining import join
    from dist_export.storage.urls import open_place

    source = write(tmp_path / "in", torch.randn(10, 8).bfloat16())
    if name != "t":  # a second table of that name, so that both go by their collections
        write_dump(source / "model.other", "t", make_table(range(10), 4), 1)
    config = ExportConfig(ckpt_dir=str(source), export_dir=str(tmp_path / "out"), filter_sparse_opt=True)
    with join(timeout_secs=60) as ranks:
        with pytest.raises(
            CheckpointError, match=r"4 float32, but the model's table has embedding_dim 8\. They may be of"
        ):
            open_source(ranks, config, open_place(source), make_model(t=8))
        checkpoint = open_source(ranks, config, open_place(source), make_model(t=4))
    assert checkpoint is not None
    confirmed = {table.name: table.width_confirmed_by for table in checkpoint.tables}
    assert confirmed[name] == ("embedding_dim of the model",)
    assert checkpoint.warnings == ()
