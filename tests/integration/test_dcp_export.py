"""Exports of DCP checkpoints: the reference ones against their truth, odd layouts, settings, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp

from dist_export.checkpoint.dcp.dense import DcpDense
from dist_export.checkpoint.dcp.reader import DcpReader
from dist_export.checkpoint.metadata import IN_STRIPS
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.cli import main
from dist_export.errors import CheckpointError, ConfigError, PlanError
from dist_export.pipeline.source_changes import look_at_small_files
from dist_export.storage.urls import open_directory
from tests.support import exports, tiny_model
from tests.support.dcp_writer import change_metadata, make_state, save, write_chunks
from tests.support.fixture_cases import TORCHREC_CASES
from tests.support.package_reader import read_row_tables
from tests.support.sparse_cases import recorded_reads

USER = "ebc.embedding_bags.user.weight"


def export(source: Path, target: Path, **settings: Any) -> dict[tuple[str, str], torch.Tensor]:
    """Export with the filter, and return what the package holds."""
    values = {"filter_sparse_opt": True, **settings}
    exports.export({"ckpt_dir": str(source), "export_dir": str(target), **values})
    return read_row_tables(target)


def golden_of(fixtures: Path, case: str) -> dict[tuple[str, str], torch.Tensor]:
    """Return table and slot -> values, of the slots that fit their table."""
    truth: dict[tuple[str, str], torch.Tensor] = {}
    golden = torch.load(fixtures / f"{case}.golden.pt", weights_only=True)
    for key, values in golden.items():
        if key.startswith("opt|"):
            _, table, slot = key.split("|")
            truth[table, slot.split(".")[-1]] = values
        elif key.startswith("optim.state.t_"):
            table, _, slot = key.removeprefix("optim.state.").rpartition(".")
            truth[table, slot] = values
        elif "t_user" in key or "t_item" in key:
            truth[key, "embedding"] = values
    return {key: value for key, value in truth.items() if value.shape[:1] == truth[key[0], "embedding"].shape[:1]}


def same(found: dict[Any, torch.Tensor], expected: dict[Any, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key]) for key in expected
    )


@pytest.mark.fixtures
@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, "source"])
@pytest.mark.parametrize("case", TORCHREC_CASES)
def test_real_checkpoints_give_the_truth(case: str, num_shards: Any, torchrec_fixtures: Path, tmp_path: Path) -> None:
    """Rows and columns shared out over ranks come together, optimizer state stays behind, and is named."""
    found = export(torchrec_fixtures / case, tmp_path, num_shards=num_shards, treat_as_tables=TORCHREC_CASES[case])
    truth = golden_of(torchrec_fixtures, case)
    assert same(found, {key: values for key, values in truth.items() if key[1] == "embedding"})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["source"]["format"] == "dcp"
    assert {slot["reason"] for table in manifest["tables"] for slot in table["dropped"]} == {"optimizer"}
    merged = json.loads((tmp_path / "torch_rank_weights_embs_table_multi_shard.json").read_text())
    dense = {name: entry["shape"] for name, entry in merged.items() if entry["dense"]}
    golden = torch.load(torchrec_fixtures / f"{case}.golden.pt", weights_only=True)
    assert dense == {name: list(values.shape) for name, values in golden.items() if name.startswith("mlp.")}


@pytest.mark.fixtures
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("case", ["row_wise", "dtensor_adam"])
def test_optimizer_state_that_fits_is_kept_where_asked_for(
    case: str, num_shards: int, torchrec_fixtures: Path, tmp_path: Path
) -> None:
    slots = ["momentum1", "exp_avg*"] if case == "row_wise" else ["exp_avg*"]
    slots = slots[:1]
    found = export(
        torchrec_fixtures / case,
        tmp_path,
        num_shards=num_shards,
        treat_as_tables=TORCHREC_CASES[case],
        keep_slots=slots,
    )
    assert same(found, golden_of(torchrec_fixtures, case))
    assert len(found) == (4 if case == "row_wise" else 6)


@pytest.mark.fixtures
@pytest.mark.parametrize(
    ("case", "slot", "shape"),
    [("hostile_lossy_adam", "exp_avg", "[501, 16]"), ("column_wise", "*t_user.weight.momentum1", "[2000]")],
)
def test_optimizer_state_that_does_not_fit_cannot_be_kept(
    case: str, slot: str, shape: str, torchrec_fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a save lost, or laid out by shard, is no row's; nothing is written."""
    arguments = ["--ckpt_dir", str(torchrec_fixtures / case), "--export_dir", str(tmp_path / "out")]
    assert main(["export", *arguments, "--filter_sparse_opt", "true", "--keep_slots", f"[{slot!r}]"]) == 2
    error = capsys.readouterr().err
    assert f"has shape {shape}, which does not go with the" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_of_dropped_state_the_heads_of_items_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its values lie is asked for, in case it is kept; the values are not read. Kept rows are read once."""
    state = make_state()
    state["model"][USER] = torch.rand(20_000, 8)
    state["optim"]["state"][USER] = {"m": torch.rand(20_000, 8)}
    save(tmp_path / "ckpt", state)
    reader = DcpReader(open_directory(tmp_path / "ckpt"))
    checkpoint = reader.assemble([reader.read_headers(range(1))])
    with recorded_reads(monkeypatch) as reads:
        export(tmp_path / "ckpt", tmp_path / "out", num_shards=2, digest="xxh3")
    for column, (least, most) in {1: (640_000, 740_000), 2: (0, 100_000)}.items():
        begin = int(checkpoint.blocks.offset[0, column])
        touched = [
            max(0, min(last, begin + 640_000) - max(first, begin))
            for where, first, last in reads
            if where.endswith(".distcp")
        ]
        assert least <= sum(touched) <= most


def test_a_transposed_table_comes_out_row_by_row(tmp_path: Path) -> None:
    state = make_state()
    expected = torch.arange(28, dtype=torch.float32).reshape(4, 7).t()
    state["model"][USER] = expected
    save(tmp_path / "ckpt", state)
    found = export(tmp_path / "ckpt", tmp_path / "out", num_shards=2)
    assert torch.equal(found[USER, "embedding"], expected)


def test_columns_of_a_wider_tensor_come_out_alone(tmp_path: Path) -> None:
    """A padded table, of which torch.save stores the padding too."""
    wide = torch.arange(60, dtype=torch.float32).reshape(10, 6)
    write_chunks(tmp_path / "ckpt", {USER: (wide[:, 1:5], [((0, 0), wide[:, 1:5])])})
    reader = DcpReader(open_directory(tmp_path / "ckpt"))
    checkpoint = reader.assemble([reader.read_headers(range(2))])
    assert checkpoint.blocks.file[:, 1].tolist() == [IN_STRIPS]
    assert checkpoint.strips.row_stride.tolist() == [24]
    assert torch.equal(export(tmp_path / "ckpt", tmp_path / "out")[USER, "embedding"], wide[:, 1:5])


def test_column_shards_of_row_shards_are_joined(tmp_path: Path) -> None:
    """Table-row-wise and column-wise at once, each band of rows with its own columns, over four files."""
    whole = torch.arange(88, dtype=torch.float32).reshape(11, 8)
    pieces = [(0, 5, 0, 4), (0, 5, 4, 8), (5, 6, 0, 8), (6, 11, 0, 2), (6, 11, 2, 8)]
    chunks = [((top, left), whole[top:end, left:right].clone()) for top, end, left, right in pieces]
    write_chunks(tmp_path / "ckpt", {USER: (whole, chunks)}, num_files=4)
    for num_shards in (1, 2, 3, "source"):
        found = export(tmp_path / "ckpt", tmp_path / str(num_shards), num_shards=num_shards)
        assert torch.equal(found[USER, "embedding"], whole)


def test_tables_without_rows_and_pieces_without_rows(tmp_path: Path) -> None:
    """More ranks than rows leave pieces of none."""
    whole, none = torch.arange(8, dtype=torch.float16).reshape(2, 4), torch.zeros(0, 4)
    chunks = [((0, 0), whole[:1].clone()), ((1, 0), whole[1:].clone()), ((2, 0), whole[2:].clone())]
    tensors = {USER: (whole, chunks), "ebc.embeddings.none.weight": (none, [((0, 0), none)])}
    tensors["ebc.embeddings.nothing.weight"] = (none, [])
    write_chunks(tmp_path / "ckpt", tensors)
    for num_shards in (1, 3, "source"):
        found = export(tmp_path / "ckpt", tmp_path / str(num_shards), num_shards=num_shards)
        assert torch.equal(found.pop((USER, "embedding")), whole)
        assert {tuple(rows.shape) for rows in found.values()} == {(0, 4)}
        assert len(found) == 2


def test_two_directories_are_exported_as_one(tmp_path: Path) -> None:
    """TorchEasyRec's layout, with the slot from the other directory."""
    state = make_state()
    save(tmp_path / "ckpt" / "model", state["model"])
    save(tmp_path / "ckpt" / "optimizer", state["optim"])
    found = export(tmp_path / "ckpt", tmp_path / "out", num_shards=3, keep_slots=["momentum1"])
    assert torch.equal(found[USER, "embedding"], state["model"][USER])
    assert torch.equal(found[USER, "momentum1"], torch.ones(10))


def test_plain_tables_are_named_by_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where no module says which matrices are tables, the error lists them; the setting goes all the way."""
    weights = {"user.weight": torch.rand(9, 4), "mlp.weight": torch.rand(3, 4), "mlp.bias": torch.rand(3)}
    save(tmp_path / "ckpt", {"model": weights})
    arguments = ["--ckpt_dir", str(tmp_path / "ckpt"), "--export_dir", str(tmp_path / "out")]
    assert main(["export", *arguments, "--filter_sparse_opt", "true"]) == 2
    error = capsys.readouterr().err
    assert "no tensor of this DCP checkpoint is a table" in error
    assert "user.weight [9, 4], mlp.weight [3, 4]" in error
    arguments += ["--filter_sparse_opt", "true", "--treat_as_tables", "['user.*']"]
    assert main(["plan", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "source: dcp checkpoint (recognised by .metadata, or model/.metadata)" in shown
    assert "table user.weight: 9 rows" in shown
    assert main(["export", *arguments]) == 0
    assert f"checkpoint {tmp_path / 'ckpt'} (recognised by .metadata" in capsys.readouterr().out
    assert torch.equal(read_row_tables(tmp_path / "out")["user.weight", "embedding"], weights["user.weight"])


def test_settings_that_cannot_be_met_are_one_line(tmp_path: Path) -> None:
    save(tmp_path / "ckpt", make_state())
    with pytest.raises(PlanError, match=r"it is a DCP checkpoint, whose files .*Set filter_sparse_opt: true"):
        export(tmp_path / "ckpt", tmp_path / "out", filter_sparse_opt=False)
    with pytest.raises(PlanError, match="keep_slots: the pattern 'momentum2' matches no slot"):
        export(tmp_path / "ckpt", tmp_path / "out", keep_slots=["momentum2"])
    with pytest.raises(CheckpointError, match="optimizer_slots: the pattern 'momentum2' matches no"):
        export(tmp_path / "ckpt", tmp_path / "out", optimizer_slots=["momentum2"])
    with pytest.raises(
        ConfigError, match="treat_as_tables says which tensors are tables, but need_export_sparse is false"
    ):
        export(
            tmp_path / "ckpt",
            tmp_path / "out",
            treat_as_tables=["mlp.*"],
            need_export_sparse=False,
            filter_sparse_opt=False,
        )
    assert not (tmp_path / "out").exists()


def test_optimizer_state_may_be_named_as_a_tensor_or_as_a_slot(tmp_path: Path) -> None:
    """``optimizer_slots`` finds what the source's names do not tell, and means slots as everywhere else."""
    state = make_state()
    state["model"]["shadow.user.weight"] = torch.zeros(10, 4)
    save(tmp_path / "ckpt", state)
    patterns = ["shadow.*", "momentum1"]
    export(tmp_path / "ckpt", tmp_path / "out", optimizer_slots=patterns)
    merged = json.loads((tmp_path / "out" / "torch_rank_weights_embs_table_multi_shard.json").read_text())
    assert sorted(merged) == [f"{USER}/part_0_1", "mlp.weight"]
    found = export(tmp_path / "ckpt", tmp_path / "kept", optimizer_slots=patterns, keep_slots=["momentum1"])
    assert set(found) == {(USER, "embedding"), (USER, "momentum1")}


def test_compressed_items_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt", make_state())

    def compress(metadata: Any) -> None:
        for entry in metadata.storage_data.values():
            entry.transform_descriptors = ["zstd"]

    change_metadata(path, compress)
    with pytest.raises(CheckpointError, match="is compressed or encrypted"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_state_that_no_package_can_hold_is_told(tmp_path: Path) -> None:
    """A slot of complex numbers stays behind with a note; a table of them is refused."""
    values = torch.zeros(10, 4)
    tensors = {USER: (values, [((0, 0), values)])}
    odd = torch.zeros(10, dtype=torch.complex64)
    write_chunks(tmp_path / "ckpt", {**tensors, f"o.state.{USER}.m": (odd, [((0,), odd)])})
    assert set(export(tmp_path / "ckpt", tmp_path / "out")) == {(USER, "embedding")}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [note for note in manifest["notes"] if "complex64, which no package can hold" in note]


def test_the_fingerprint_is_of_content(tmp_path: Path) -> None:
    """Another metadata or another payload file is another source."""

    def fingerprint() -> str:
        reader = DcpReader(open_directory(tmp_path))
        return reader.assemble([reader.read_headers(range(len(reader.files)))]).fingerprint

    save(tmp_path, make_state())
    first = fingerprint()
    assert first == fingerprint()
    change_metadata(tmp_path, lambda m: m.planner_data.pop("mlp.weight", None) or setattr(m, "planner_data", None))
    assert fingerprint() != first
    before = look_at_small_files(open_directory(tmp_path))
    assert list(before) == [".metadata"]
    change_metadata(tmp_path, lambda m: setattr(m, "storage_meta", None))
    assert look_at_small_files(open_directory(tmp_path)) != before


def test_ranks_that_read_other_metadata_do_not_agree(tmp_path: Path) -> None:
    save(tmp_path, make_state())
    first = DcpReader(open_directory(tmp_path))
    share = first.read_headers(range(len(first.files)))
    change_metadata(tmp_path, lambda m: setattr(m, "planner_data", None))
    second = DcpReader(open_directory(tmp_path))
    with pytest.raises(CheckpointError, match=r"\.metadata is not the same on all ranks"):
        second.assemble([share])


def test_dense_parameters_are_put_together_from_their_chunks(tmp_path: Path) -> None:
    """As FSDP and DTensor share them out; scalars, transposed pieces, empty pieces and odd dtypes among them."""
    rows, columns = torch.arange(15, dtype=torch.float32).reshape(5, 3), torch.arange(12).reshape(3, 4)
    mask, step = torch.tensor([True, False, True]), torch.tensor(7)
    half = torch.arange(6, dtype=torch.bfloat16).reshape(3, 2)
    expanded = torch.ones(1, 4).expand(3, 4)
    tensors = {
        USER: (rows, [((0, 0), rows)]),
        "mlp.rows": (rows, [((0, 0), rows[:3].clone()), ((3, 0), rows[3:]), ((5, 0), rows[5:])]),
        "mlp.columns": (columns, [((0, 0), columns[:, :1]), ((0, 1), columns[:, 1:].t().contiguous().t())]),
        "mlp.mask": (mask, [((0,), mask)]),
        "mlp.step": (step, [((), step)]),
        "mlp.half": (half, [((0, 0), half[:, :1]), ((0, 1), half[:, 1:])]),
        "mlp.expanded": (expanded, [((0, 0), expanded)]),
    }
    write_chunks(tmp_path, tensors, num_files=3)
    dense = DcpDense(open_directory(tmp_path))
    expected = {name: values for name, (values, _) in tensors.items() if name != USER}
    assert dense.describe() == [
        (name, str(values.dtype).removeprefix("torch."), tuple(values.shape)) for name, values in expected.items()
    ]
    assert same(dense.load(), expected)


def test_features_name_tables_of_a_model_by_their_module(tmp_path: Path) -> None:
    """``user`` is ``ebc.embedding_bags.user.weight``; its width is compared."""
    save(tmp_path / "ckpt", make_state())
    feature = {
        "feature_name": "user_id",
        "feature_type": "id_feature",
        "value_type": "String",
        "gen_key_type": "hash",
        "gen_val_type": "lookup",
        "hash_bucket_size": 10,
        "embedding_dimension": 4,
        "shared_name": "user",
    }
    export(tmp_path / "ckpt", tmp_path / "out", fg_conf_or_path={"features": [feature]})
    assert (tmp_path / "out" / "fg.json").exists()
    for change in ({"embedding_dimension": 8}, {"shared_name": "item"}):
        with pytest.raises(ConfigError, match=r"table '?(user|item)'?"):
            export(tmp_path / "ckpt", tmp_path / "other", fg_conf_or_path={"features": [feature | change]})


def test_the_dense_arch_is_traced_with_the_parameters_of_the_checkpoint(tmp_path: Path) -> None:
    """An export of the dense arch alone needs no table, and takes every parameter from where its chunks lie."""
    torch.manual_seed(1)
    trained = tiny_model.build_model()
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter)
    save(tmp_path / "ckpt", {"model": trained.state_dict(), "epoch": 3})
    exports.export(
        {
            "ckpt_dir": str(tmp_path / "ckpt"),
            "export_dir": str(tmp_path / "out"),
            "need_export_sparse": False,
            "model": tiny_model.MODEL,
            "dataset": tiny_model.DATASET,
        }
    )
    program = torch.export.load(tmp_path / "out" / "fx_user_model" / "exported_model.pt")
    expected = dict(trained.dense_arch.named_parameters())
    found = dict(program.named_parameters())
    assert {name.rpartition("dense_arch.")[2] for name in found} >= set(expected)
    for name, values in found.items():
        assert torch.equal(values, expected[name.rpartition("dense_arch.")[2]]), name


@pytest.mark.fixtures
@pytest.mark.parametrize("case", TORCHREC_CASES)
def test_dense_parameters_of_real_checkpoints(case: str, torchrec_fixtures: Path) -> None:
    golden = torch.load(torchrec_fixtures / f"{case}.golden.pt", weights_only=True)
    dense = DcpDense(open_directory(torchrec_fixtures / case), TensorSettings(tuple(TORCHREC_CASES[case])))
    assert same(dense.load(), {name: values for name, values in golden.items() if name.startswith("mlp.")})


def test_a_table_of_endless_strips_is_refused(tmp_path: Path) -> None:
    """Few bytes may claim to be many columns that do not lie side by side."""
    wide = torch.zeros(1, 2)[:, :1].expand(2, 5_000_000)
    write_chunks(tmp_path / "ckpt", {USER: (wide, [((0, 0), wide)])})
    with pytest.raises(CheckpointError, match=r"would be read in more than .* strips; save it again, contiguous"):
        export(tmp_path / "ckpt", tmp_path / "out")
    tall = torch.zeros(1, 4).expand(1 << 40, 4)
    write_chunks(tmp_path / "ckpt", {USER: (tall, [((0, 0), tall)])})
    with pytest.raises(CheckpointError, match="made of 16 that are stored"):
        export(tmp_path / "ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_that_are_stored_once_for_all_come_out_each(tmp_path: Path) -> None:
    """A table that was expanded, as a fresh one may be."""
    rows = torch.arange(4.0).expand(7, 4)
    write_chunks(tmp_path / "ckpt", {USER: (rows, [((0, 0), rows)])})
    assert torch.equal(export(tmp_path / "ckpt", tmp_path / "out", num_shards=2)[USER, "embedding"], rows)


@pytest.mark.fixtures
def test_stores_are_read_as_directories_are(torchrec_fixtures: Path, tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(f"{torchrec_fixtures / 'column_wise'}/", "/dcp_export/", recursive=True)
    exports.export({"ckpt_dir": "memory://dcp_export", "export_dir": str(tmp_path), "filter_sparse_opt": True})
    truth = golden_of(torchrec_fixtures, "column_wise")
    assert same(read_row_tables(tmp_path), {key: values for key, values in truth.items() if key[1] == "embedding"})
    assert len(DcpDense(open_directory("memory://dcp_export")).load()) == 4


def test_a_dense_parameter_that_repeats_what_is_stored_without_end_is_refused(tmp_path: Path) -> None:
    small = torch.ones(1)
    chunks = [((0, 0), small.expand(1 << 20, 1 << 10))]
    write_chunks(tmp_path, {"w": (chunks[0][1], chunks)})
    with pytest.raises(CheckpointError, match="made of 4 that are stored; save it again, contiguous"):
        DcpDense(open_directory(tmp_path)).load()["w"]


def test_torch_reads_what_the_tests_write(tmp_path: Path) -> None:
    """The writer of odd checkpoints writes what ``dcp.load`` takes for the same tensors."""
    wide = torch.arange(60, dtype=torch.float32).reshape(10, 6)
    write_chunks(tmp_path, {"w": (wide[:, :4], [((0, 0), wide[:, :1]), ((0, 1), wide[:, 1:4].t().contiguous().t())])})
    state = {"w": torch.zeros(10, 4)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(state["w"], wide[:, :4])
