"""What a sample's scores may claim: whose rows they are of, and what stands for ids that the package lacks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export.cli import main
from dist_export.config.loader import load_config
from dist_export.config.schema import ExportConfig
from dist_export.errors import CommitError, ModelError
from dist_export.formats.dtypes import CODE_BY_NAME
from dist_export.formats.recis import MERGED
from dist_export.formats.row_encodings import encode_values
from dist_export.pipeline import deltas
from dist_export.pipeline.dry_run import make_report, render_report
from dist_export.reporting.summary import summarize
from dist_export.verify.verify import verify
from tests.support import exports, tiny_model, torchrec_shape
from tests.support.dcp_writer import save
from tests.support.recis_writer import write_checkpoint
from tests.support.sparse_cases import export

PREFIX = "sparse_arch.ebc.embedding_bags."
ROWS = torchrec_shape.ROWS
SETTINGS = {
    "model": torchrec_shape.MODEL,
    "dataset": torchrec_shape.DATASET,
    "num_shards": 2,
}


def write_trained(folder: Path, *, prefix: str = PREFIX, rows: dict[str, int] | None = None) -> Path:
    """Save what a trainer leaves by DCP; ``rows``: how many rows of each table, all by default."""
    state = torchrec_shape.build_trained().state_dict()
    tables = {
        f"{prefix}{name}.weight": state[f"{PREFIX}{name}.weight"][: (rows or ROWS).get(name, num_rows)]
        for name, num_rows in ROWS.items()
    }
    dense = {name: value for name, value in state.items() if name.startswith("dense_arch.")}
    return save(folder, {"model": {**tables, **dense}})


def summary_of(manifest: dist_export.Manifest) -> str:
    return "\n".join(summarize(manifest, [], "out"))


def export_model(model: nn.Module, ckpt: Path | None, out: Path, dataset: Any = None, **settings: Any) -> Any:
    batches = torchrec_shape.build_dataset() if dataset is None else dataset
    if ckpt is not None:
        settings = {"filter_sparse_opt": True, "num_shards": 2, **settings}
    return exports.exporter(model, "sparse_arch", "dense_arch", batches, ckpt, out, **settings).export()


# ---- whose rows they are of ------------------------------------------------------------------------------------------


def test_a_model_with_tables_of_other_names_is_refused(tmp_path: Path) -> None:
    ckpt = write_trained(tmp_path / "ckpt", prefix="")
    with pytest.raises(ModelError) as caught:
        export(ckpt, tmp_path / "out", treat_as_tables=["t_*"], **SETTINGS)
    message = str(caught.value)
    assert "sparse_arch.ebc.embedding_bags.t_user" in message
    assert "t_user.weight, t_item.weight" in message or "t_item.weight, t_user.weight" in message
    assert "no setting maps" in message
    assert "Nothing was written" in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_it_is_the_users_mistake_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = write_trained(tmp_path / "ckpt", prefix="")
    settings = {
        "ckpt_dir": ckpt,
        "export_dir": tmp_path / "out",
        "filter_sparse_opt": True,
        "treat_as_tables": "[t_*]",
        **SETTINGS,
    }
    assert main([f"--{name}={value}" for name, value in settings.items()]) == 2
    assert "none of the model's tables" in capsys.readouterr().err


def test_the_dense_arch_alone_needs_no_table_of_the_checkpoint(tmp_path: Path) -> None:
    ckpt = write_trained(tmp_path / "ckpt", prefix="")
    settings = {**SETTINGS, "num_shards": None, "need_export_sparse": False, "filter_sparse_opt": False}
    manifest = export(ckpt, tmp_path / "out", treat_as_tables=["t_*"], **settings)
    assert sum("is no table of the checkpoint" in note for note in manifest.notes) == 2
    assert "with the program as written: " in summary_of(manifest)


@pytest.mark.parametrize("to_hash_tables", [[], ["*"]])
def test_shards_that_do_not_read_back_are_a_failed_export(
    to_hash_tables: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    """And no mistake of the user's, though a source like that would be one."""
    real = deltas.open_written

    def damage(ranks: Any, target: Any, plan: Any) -> Any:
        target.write(MERGED, b"{")
        return real(ranks, target, plan)

    monkeypatch.setattr(deltas, "open_written", damage)
    with pytest.raises(
        CommitError, match=r"torch_rank_weights_embs_table_multi_shard.*No manifest was written"
    ) as caught:
        export(write_trained(tmp_path / "ckpt"), tmp_path / "out", to_hash_tables=to_hash_tables, **SETTINGS)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


ITEM = f"{PREFIX}t_item"


def lacking_item(tmp_path: Path) -> Path:
    state = torchrec_shape.build_trained().state_dict()
    del state[f"{ITEM}.weight"]
    return save(tmp_path / "ckpt", {"model": state})


def test_a_table_that_the_checkpoint_lacks_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    ckpt = lacking_item(tmp_path)
    with pytest.raises(ModelError) as caught:
        export(ckpt, tmp_path / "out", **SETTINGS)
    assert str(caught.value).startswith(f"{ITEM}: no table of the checkpoint")
    assert "Nothing was written" in str(caught.value)
    assert "allow_missing_tables: [patterns]" in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        ModelError, match=r"allow_missing_tables: the pattern 'item' matches no embedding .*t_item.*t_user"
    ):
        export(ckpt, tmp_path / "out", allow_missing_tables=["item"], **SETTINGS)


def plan(ckpt: Path, target: Path, **settings: Any) -> dict[str, Any]:
    config = {"ckpt_dir": str(ckpt), "export_dir": str(target), "filter_sparse_opt": True, **SETTINGS, **settings}
    return make_report(load_config(config), world_size=1)


@pytest.mark.parametrize(
    "settings",
    [{}, {"drop_tables": ["*t_user*"]}],
    ids=["missing", "left out"],
)
def test_a_plan_says_of_tables_what_the_export_says(settings: dict[str, Any], tmp_path: Path) -> None:
    state = torchrec_shape.build_trained().state_dict()
    ckpt = save(tmp_path / "ckpt", {"model": state}) if "drop_tables" in settings else lacking_item(tmp_path)
    said = []
    for ask in (plan, export):
        with pytest.raises(ModelError) as caught:
            ask(ckpt, tmp_path / "out", **{**SETTINGS, **settings})
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert not (tmp_path / "out").exists()


def test_a_plan_of_what_may_be_exported_is_made(tmp_path: Path) -> None:
    """A table that is missing and may be, one that is tied to a table of another name, and a whole checkpoint."""
    report = plan(lacking_item(tmp_path), tmp_path / "out", allow_missing_tables=[ITEM, "item"])
    assert any(
        "the pattern 'item' matches no embedding of the sparse arch, which has" in its for its in report["notes"]
    )
    whole = save(tmp_path / "whole", {"model": torchrec_shape.build_trained().state_dict()})
    plan(whole, tmp_path / "out")


@pytest.mark.parametrize("pattern", [ITEM, f"{ITEM}.weight", "ebc.*.t_item", "*t_*"])
def test_it_is_exported_without_where_that_is_allowed(pattern: str, tmp_path: Path) -> None:
    manifest = export(lacking_item(tmp_path), tmp_path / "out", allow_missing_tables=[pattern], **SETTINGS)
    assert [note for note in manifest.notes if "is no table of the checkpoint" in note] == [
        f"{ITEM} is no table of the checkpoint: the sample used the model's own rows"
    ]
    assert manifest.parity.from_files.reads_rows
    assert "with rows and program as written" in summary_of(manifest)


def test_the_dense_arch_alone_may_lack_it(tmp_path: Path) -> None:
    settings = {**SETTINGS, "num_shards": None, "need_export_sparse": False, "filter_sparse_opt": False}
    manifest = export(lacking_item(tmp_path), tmp_path / "out", **settings)
    assert any(f"{ITEM} is no table of the checkpoint" in note for note in manifest.notes)


def test_what_the_checkpoint_has_in_some_other_way_is_not_missing(tmp_path: Path) -> None:
    """A weight that two modules share, a frozen one, and wrappers in its name."""
    model = torchrec_shape.build_model()
    bags = model.sparse_arch.ebc.embedding_bags
    bags["t_item"].weight = bags["t_user"].weight
    bags["t_item"].num_embeddings = ROWS["t_user"]
    bags["t_item"].padding_idx, bags["t_user"].weight.requires_grad = 0, False
    state = model.state_dict()
    (tmp_path / "shared").mkdir()
    torch.save(state, tmp_path / "shared" / "model.pt")
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "wrapped.pt")
    for number, source in enumerate((tmp_path / "shared", tmp_path / "wrapped.pt")):
        manifest = export_model(model, source, tmp_path / str(number))
        assert not any("is no table of the checkpoint" in note for note in manifest.notes)
        assert manifest.drift.outputs["ctr"].max_abs == 0


class Tableless(nn.Module):
    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        price = batch["price"]
        return {"user": price.expand(-1, 4), "item": price.expand(-1, 4) + 1, "price": price}


def assert_claims_no_rows(manifest: dist_export.Manifest, out: Path) -> None:
    assert not manifest.parity.from_files.reads_rows
    assert "with the program as written, no row from the shards: largest difference" in summary_of(manifest)
    assert "rows and program" not in summary_of(manifest)
    report = verify(str(out))
    assert not report.findings
    assert "sample: fx_user_model/sample_rows.json names no id, so there was no row to compare" in report.checked


def test_a_model_of_dense_inputs_alone_claims_no_rows(tmp_path: Path) -> None:
    model = torchrec_shape.build_model()
    model.sparse_arch = Tableless()
    manifest = export_model(model, write_trained(tmp_path / "ckpt"), tmp_path / "out")
    assert_claims_no_rows(manifest, tmp_path / "out")


class Looking(nn.Module):
    """Asks a parameter by itself, as a kernel does, beside an embedding that is no table of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.ebc = nn.Module()
        self.ebc.embedding_bags = nn.ModuleDict({name: nn.Module() for name in ROWS})
        for name, num_rows in ROWS.items():
            self.ebc.embedding_bags[name].weight = nn.Parameter(torch.randn(num_rows, 4))
        self.hour = nn.Embedding(24, 4)

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        some = torch.arange(len(batch["price"]))
        bags = self.ebc.embedding_bags
        return {"user": bags["t_user"].weight[some], "item": self.hour(some), "price": batch["price"]}


def test_tables_that_no_module_looks_up_are_seen(tmp_path: Path) -> None:
    """Kernels hold their weights under the names of tables, and look rows up by themselves."""
    model = torchrec_shape.build_model()
    model.sparse_arch = Looking()
    settings = {"allow_missing_tables": ["hour"]}
    manifest = export_model(model, write_trained(tmp_path / "ckpt"), tmp_path / "out", **settings)
    assert any("hour is no table of the checkpoint" in note for note in manifest.notes)
    assert manifest.parity.from_files.reads_rows
    assert manifest.run["sample"]["asked"] == {f"{PREFIX}t_user.weight": 5}


# ---- ids that the package lacks --------------------------------------------------------------------------------------

DEFAULT = [0.5, -1.0, 2.0, 0.25]


def prune_half(tmp_path: Path, **more: Any) -> dict[str, Any]:
    np.save(tmp_path / "deny.npy", np.arange(0, 60, 2))
    prune = [{"tables": "*t_user*", "deny": str(tmp_path / "deny.npy")}]
    return {"to_hash_tables": ["*t_user*"], "prune": prune, **more}


def asked_of(name: str) -> list[int]:
    (_, batch), *_ = torchrec_shape.build_dataset()
    return sorted(set(batch["features"][name][0].tolist()))


def scores_by_lookup(out: Path) -> list[torch.Tensor]:
    """Score the sample as serving does: whatever a lookup gives goes into the pooling."""
    package = dist_export.open_package(out)
    (_, batch), *_ = torchrec_shape.build_dataset()
    blocks = {"price": batch["price"]}
    for name, block in (("t_user", "user"), ("t_item", "item")):
        values, offsets = batch["features"][name]
        rows, _ = package.lookup(f"{PREFIX}{name}.weight", values.numpy())
        pooled = [torch.from_numpy(rows[begin:end].sum(0)) for begin, end in itertools.pairwise(offsets)]
        blocks[block] = torch.stack(pooled).float()
    return list(package.load_program().module()(**blocks))


def stored_scores(out: Path) -> list[torch.Tensor]:
    """What the model gave for the sample."""
    from dist_export.archive.safe_pickle import read_sample_pickle

    found = read_sample_pickle((out / "fx_user_model" / "output_base.pkl").read_bytes(), where="output_base.pkl")
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize(
    ("default", "dtype"),
    [
        (None, "source"),
        (None, "int8"),
        ("zeros", "bfloat16"),
        *((DEFAULT, its) for its in ("source", "bfloat16", "int8")),
    ],
)
def test_ids_that_are_left_behind_get_what_serving_gives(default: Any, dtype: str, tmp_path: Path) -> None:
    """Whatever the model's own rows are: two models of other seeds give the same bytes."""
    ckpt = write_trained(tmp_path / "ckpt")
    settings = prune_half(tmp_path, dtype={"*": dtype})
    if default is not None:
        settings["default_row"] = {"*": default}
    packages = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = torchrec_shape.Model()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        manifest = export_model(model, ckpt, tmp_path / str(seed), **settings)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        packages.append({file.path: file.digest for file in manifest.files})
    assert packages[0] == packages[1]
    for found, expected in zip(scores_by_lookup(tmp_path / "1"), stored_scores(tmp_path / "1"), strict=True):
        torch.testing.assert_close(found, expected)
    left = sum(number % 2 == 0 for number in asked_of("t_user"))
    sample = manifest.run["sample"]
    assert sample["left_behind"] == {f"{PREFIX}t_user.weight": left, f"{PREFIX}t_item.weight": 0}
    assert not any(sample["missing"].values())
    asked = len(asked_of("t_user")) + len(asked_of("t_item"))
    assert f"sample   {asked} ids looked up, 0 not in the checkpoint, {left} left behind by prune" in summary_of(
        manifest
    )
    of_four = msgspec.structs.replace(manifest, run={**manifest.run, "world_size": 4})
    assert f"sample   {asked} ids looked up by all 4 ranks together, 0 not in the" in summary_of(of_four)
    assert any("ids that the sample looked up are left behind by prune: the sample has" in n for n in manifest.notes)
    assert not verify(str(tmp_path / "1")).findings


@pytest.mark.parametrize("default", [None, DEFAULT])
def test_ids_beyond_the_checkpoints_rows_get_it_too(default: Any, tmp_path: Path) -> None:
    ckpt = write_trained(tmp_path / "ckpt", rows={"t_user": 20})
    settings = {} if default is None else {"default_row": {"*": default}}
    for seed in (1, 2):
        torch.manual_seed(seed)
        manifest = export_model(torchrec_shape.Model(), ckpt, tmp_path / str(seed), **settings)
    assert (tmp_path / "1/fx_user_model/output_base.pkl").read_bytes() == (
        tmp_path / "2/fx_user_model/output_base.pkl"
    ).read_bytes()
    for found, expected in zip(scores_by_lookup(tmp_path / "1"), stored_scores(tmp_path / "1"), strict=True):
        torch.testing.assert_close(found, expected)
    assert manifest.run["sample"]["missing"][f"{PREFIX}t_user.weight"] == sum(n >= 20 for n in asked_of("t_user")) > 0
    told = (
        f"table '{PREFIX}t_user.weight' has 20 rows in the checkpoint, the model's 60: of ids from 20 on the package has no "
        "row, and lookups give its default_row or zeros"
    )
    assert [note for note in manifest.notes if "in the checkpoint" in note] == [told]


def test_a_model_of_fewer_rows_is_told(tmp_path: Path) -> None:
    ckpt = write_trained(tmp_path / "ckpt")
    model = torchrec_shape.build_model()
    model.sparse_arch.ebc.embedding_bags["t_item"] = nn.EmbeddingBag(12, 4, mode="sum", include_last_offset=True)
    dataset = torchrec_shape.build_dataset()
    dataset[0][1]["features"]["t_item"][0].remainder_(12)
    manifest = export_model(model, ckpt, tmp_path / "out", dataset)
    told = (
        f"table '{PREFIX}t_item.weight' has 37 rows in the checkpoint, the model's 12: it cannot look up rows from 12 on, "
        "which are exported all the same"
    )
    assert [note for note in manifest.notes if "in the checkpoint" in note] == [told]


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_live_model_is_scored_with_it_and_left_as_it_was(is_tied: bool, tmp_path: Path) -> None:
    """Of two tables that share a weight, one is exported whole: what stands for the other's rows must not reach it."""
    model = torchrec_shape.build_trained()
    bags = model.sparse_arch.ebc.embedding_bags
    if is_tied:
        bags["t_item"] = nn.EmbeddingBag(60, 4, mode="sum", include_last_offset=True)
        bags["t_item"].weight = bags["t_user"].weight
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = prune_half(tmp_path, default_row={"*t_user*": DEFAULT})
    manifest = export_model(model, None, tmp_path / "out", **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert set(manifest.parity.from_files.max_ulp.values()) == {0}
    assert manifest.parity.from_files.reads_rows
    left = sum(number % 2 == 0 for number in asked_of("t_user"))
    assert manifest.run["sample"]["left_behind"][f"{PREFIX}t_user.weight"] == left
    note = next(note for note in manifest.notes if "left behind by prune" in note)
    if is_tied:
        assert "tables that take no rows were left with what they give themselves" in note
        return
    assert "the sample has the table's default_row or zeros for them, as serving has" in note
    for found, expected in zip(scores_by_lookup(tmp_path / "out"), stored_scores(tmp_path / "out"), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("dtype", "encoding"), [("F32", ""), ("F16", ""), ("BF16", ""), ("I64", ""), ("U8", "int8_rowwise")]
)
def test_a_row_of_numbers_is_encoded_as_it_is_stored(dtype: str, encoding: str) -> None:
    row = encode_values([1.0, 2.0, 3.0], CODE_BY_NAME[dtype], encoding)
    sizes = {"F32": 12, "F16": 6, "BF16": 6, "I64": 24, "U8": 11}
    assert row.dtype == np.uint8
    assert row.shape == (sizes[dtype],)


# ---- tables alone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["dcp", "recis"])
def test_tables_alone_say_which_dense_tensors_stay_behind(source: str, tmp_path: Path) -> None:
    ckpt = tmp_path / "ckpt"
    dense = tiny_model.trained_dense_state()
    if source == "dcp":
        write_trained(ckpt)
    else:
        write_checkpoint(ckpt, tiny_model.tables(), model_state=dense)
    manifest = export(ckpt, tmp_path / "out")
    merged = json.loads((tmp_path / "out" / "torch_rank_weights_embs_table_multi_shard.json").read_text())
    names = [name for name in merged if name.startswith("dense_arch.")]
    assert len(names) == len(dense)
    note = next(note for note in manifest.notes if "no file of the package holds their values" in note)
    assert note.startswith(
        f"{len(names)} dense tensors of the checkpoint ({', '.join(names[:3])} and {len(names) - 3} more)"
    )
    assert note in summary_of(manifest)
    config = {"ckpt_dir": str(ckpt), "export_dir": str(tmp_path / "planned"), "filter_sparse_opt": True}
    report = make_report(ExportConfig(**config), world_size=1)
    assert report["dense_tensors"]["in_no_file"] == names
    assert note in report["notes"]
    assert f"dense tensors in no file: {', '.join(names)}" in "\n".join(render_report(report))


def test_with_a_model_they_are_in_the_program(tmp_path: Path) -> None:
    ckpt = write_trained(tmp_path / "ckpt")
    manifest = export(ckpt, tmp_path / "out", **SETTINGS)
    assert not any("no file of the package" in note for note in manifest.notes)
    config = {"ckpt_dir": str(ckpt), "export_dir": str(tmp_path / "planned"), "filter_sparse_opt": True, **SETTINGS}
    assert make_report(ExportConfig(**config), world_size=1)["dense_tensors"]["in_no_file"] == []
