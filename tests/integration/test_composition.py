"""All that can be done to tables, done in one export: pruned, renamed, cast, written as hash tables, resharded, scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import dist_export
from dist_export import cli
from dist_export.errors import ConfigError, PlanError
from dist_export.pipeline.dry_run import make_report
from dist_export.verify.verify import verify
from tests.integration.test_torchrec_shape import PREFIX
from tests.support import exports, tiny_model, torchrec_shape
from tests.support.dcp_writer import write_chunks
from tests.support.recis_writer import make_tables, write_checkpoint


def write_torchrec(folder: Path, *, by: int) -> dict[str, np.ndarray]:
    """Write a DCP checkpoint of the torchrec-shaped model, tables cut in two along dimension ``by``; return their rows."""
    state = torchrec_shape.build_trained().state_dict()
    tensors = {}
    for name, tensor in state.items():
        cut = tensor.shape[by] // 2 if name.startswith(PREFIX) else 0
        pieces = tensor.tensor_split([cut], by) if cut else [tensor]
        offsets = [(0,) * tensor.dim(), tuple(cut if dim == by else 0 for dim in range(tensor.dim()))]
        tensors[name] = tensor, list(zip(offsets, pieces, strict=False))
        if cut:
            tensors[f"opt.state.{name}.momentum1"] = torch.ones(len(tensor)), [((0,), torch.ones(len(tensor)))]
    write_chunks(folder, tensors)
    return {name: state[f"{PREFIX}{name}.weight"].numpy() for name in torchrec_shape.ROWS}


@pytest.mark.parametrize("by", [0, 1])
def test_numbers_become_ids_of_halves_without_the_small_rows(tmp_path: Path, by: int) -> None:
    """DCP by rows or by columns: pruned by norm, renamed, float16, as hash tables in 3 shards, and the sample's scores."""
    rows = write_torchrec(tmp_path / "ckpt", by=by)
    limit = float(np.median([np.linalg.norm(row) for row in rows["t_user"]]))
    settings = {
        "filter_sparse_opt": True,
        "num_shards": 3,
        "to_hash_tables": ["*t_user*"],
        "rename_tables": {"*.embedding_bags.*.weight": "{1}"},
        "dtype": {"*t_user*": "float16", "*": "int8"},
        "default_row": {"*t_user*": [1, 2, 3, 4]},
        "prune": [{"tables": "*t_user*", "norm_at_most": limit}],
        "model": torchrec_shape.MODEL,
        "dataset": torchrec_shape.DATASET,
    }
    manifest = exports.export({"ckpt_dir": str(tmp_path / "ckpt"), "export_dir": str(tmp_path / "out"), **settings})
    assert verify(str(tmp_path / "out"), finite=True).findings == []
    assert manifest.parity.from_files.max_ulp == {"ctr": 0, "like": 0}
    tables = {table.name: table for table in manifest.tables}
    assert list(tables) == ["t_item", "t_user"]
    stays = np.linalg.norm(rows["t_user"], axis=1) > limit
    assert tables["t_user"].rows_out == stays.sum()
    assert tables["t_user"].rows_dropped == {"norm": int((~stays).sum())}
    assert (tables["t_user"].is_hashed, tables["t_item"].is_hashed) == (dist_export.manifest.msgspec.UNSET, False)
    package = dist_export.open_package(tmp_path / "out")
    found, has_row = package.lookup("t_user", np.arange(len(stays) + 5))
    assert (has_row[: len(stays)] == stays).all()
    assert found.dtype == np.float16
    assert (found[: len(stays)][stays] == rows["t_user"][stays].astype(np.float16)).all()
    assert (found[~has_row] == np.array([1, 2, 3, 4])).all()
    found, has_row = package.lookup("t_item", np.arange(len(rows["t_item"])))
    assert has_row.all()
    assert np.abs(found - rows["t_item"]).max() <= tables["t_item"].kept[0].cast.max_abs_error
    assert tables["t_item"].kept[0].cast.max_abs_error < 0.02


def test_a_plan_shows_all_of_it_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_torchrec(tmp_path / "ckpt", by=1)
    (tmp_path / "export.yaml").write_text(
        f"ckpt_dir: {tmp_path / 'ckpt'}\nexport_dir: {tmp_path / 'out'}\nfilter_sparse_opt: true\nnum_shards: 2\n"
        'drop_tables: ["*t_item*"]\nto_hash_tables: ["*t_user*"]\nrename_tables: {"*t_user*": user}\ndtype: {"*": bfloat16}\n'
        'prune: [{tables: "*", norm_at_most: 1.5}]\ndefault_row: {"*": zeros}\n'
    )
    assert cli.main(["plan", "--config", str(tmp_path / "export.yaml"), "--world_size", "2"]) == 0
    told = capsys.readouterr().out
    for text in (
        "source: dcp checkpoint",
        "table user (sparse_arch.ebc.embedding_bags.t_user.weight in the source)",
        "dropped (norm)",
        "float32 -> bfloat16",
        "for ids that it lacks: zeros",
        "left out, 37 rows (drop_tables)",
        "RecIS's loader",
    ):
        assert text in told, told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_hash_tables_of_recis_too(tmp_path: Path, num_shards: int) -> None:
    """A slot decides and goes, ids are denied, one row of each id stays, rows are cast, one table has another name."""
    tables = make_tables({"a": 300, "b": 200}, num_parts=3, seed=3)
    random = np.random.default_rng(1)
    for part in (part for parts in tables.values() for part in parts):
        part.slots["step_filter"] = random.integers(0, 4, (len(part.ids), 1))
    denied = np.concatenate([part.ids for part in tables["b"]])[::3]
    np.save(tmp_path / "denied.npy", denied)
    write_checkpoint(tmp_path / "ckpt", tables)
    settings = {
        "prune": [
            {"tables": "*", "slot": "step_filter", "below": 2},
            {"tables": "b", "deny": str(tmp_path / "denied.npy")},
        ],
        "drop_slots": ["step_filter"],
        "rename_tables": {"b": "bee"},
        "dtype": {"a": "float16"},
        "num_shards": num_shards,
        "filter_sparse_opt": True,
        "on_duplicate": "first",
        "max_memory": "64MiB",
    }
    manifest = exports.export({"ckpt_dir": str(tmp_path / "ckpt"), "export_dir": str(tmp_path / "out"), **settings})
    assert verify(str(tmp_path / "out")).findings == []
    package = dist_export.open_package(tmp_path / "out")
    for name, written in (("a", "a"), ("b", "bee")):
        ids = np.concatenate([part.ids for part in tables[name]])
        rows = np.concatenate([part.slots["embedding"] for part in tables[name]])
        stays = np.concatenate([part.slots["step_filter"][:, 0] for part in tables[name]]) >= 2
        if name == "b":
            stays &= ~np.isin(ids, denied)
        found, has_row = package.lookup(written, ids)
        assert (has_row == stays).all()
        assert (found[stays] == rows[stays].astype(found.dtype)).all()
    assert {table.name: table.kept[1].dtype for table in manifest.tables} == {"a": "float16", "bee": "float32"}
    assert manifest.tables[1].rows_dropped["deny_list"] > 0


def test_a_model_of_hash_tables_scores_what_is_left(tmp_path: Path) -> None:
    """Pruned and cast rows are what the sample sees, before and after."""
    tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    manifest = exports.export(
        {
            "ckpt_dir": str(tmp_path / "ckpt"),
            "export_dir": str(tmp_path / "out"),
            "filter_sparse_opt": True,
            "num_shards": 3,
            "dtype": {"*": "int8"},
            "rename_tables": {"user_emb": "u"},
            "prune": [{"tables": "item_emb", "norm_at_most": 2.0}],
            "model": tiny_model.MODEL,
            "dataset": tiny_model.DATASET,
        }
    )
    assert {table.name for table in manifest.tables} == {"u", "item_emb"}
    assert sum(manifest.tables[1].rows_dropped.values()) + sum(manifest.tables[0].rows_dropped.values()) > 0
    assert set(manifest.parity.from_files.max_ulp.values()) == {0}
    assert verify(str(tmp_path / "out")).findings == []


def test_a_default_row_of_a_quantised_table_is_given_and_verified(tmp_path: Path) -> None:
    write_torchrec(tmp_path / "ckpt", by=0)
    settings = {"ckpt_dir": str(tmp_path / "ckpt"), "filter_sparse_opt": True, "dtype": {"*": "int8"}}
    exports.export({**settings, "export_dir": str(tmp_path / "out"), "default_row": {"*": [1, 2, 3, 4]}})
    assert verify(str(tmp_path / "out")).findings == []
    rows, has_row = dist_export.open_package(tmp_path / "out").lookup(f"{PREFIX}t_item.weight", [10**6])
    assert not has_row.any()
    np.testing.assert_allclose(rows[0], [1, 2, 3, 4], atol=0.01)


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e6), ("bfloat16", 3.4028e38), ("int8", 3e38)])
def test_a_default_row_must_fit_what_is_written(tmp_path: Path, dtype: str, value: float) -> None:
    write_torchrec(tmp_path / "ckpt", by=0)
    settings = {"ckpt_dir": str(tmp_path / "ckpt"), "filter_sparse_opt": True, "dtype": {"*": dtype}}
    with pytest.raises(PlanError, match=rf"default_row: .* does not fit {dtype}"):
        exports.export({**settings, "export_dir": str(tmp_path / "out"), "default_row": {"*t_item*": [value, 0, 0, 0]}})
    assert not (tmp_path / "out").exists()


def test_no_rule_goes_by_a_slot_that_does_not_fit_its_table(tmp_path: Path) -> None:
    name, weight = "m.embedding_bags.u.weight", torch.randn(10, 4)
    tensors = {
        name: (weight, [((0, 0), weight)]),
        f"opt.state.{name}.momentum1": (torch.ones(7), [((0,), torch.ones(7))]),
    }
    write_chunks(tmp_path / "ckpt", tensors)
    with pytest.raises(PlanError, match=r"slot 'momentum1' .* has shape \[7\], which does not go with the rows"):
        exports.export(
            {
                "ckpt_dir": str(tmp_path / "ckpt"),
                "export_dir": str(tmp_path / "out"),
                "filter_sparse_opt": True,
                "to_hash_tables": ["*"],
                "prune": [{"tables": "*", "slot": "momentum1", "below": 2}],
            }
        )


def test_a_live_model_with_new_names_is_scored(tmp_path: Path) -> None:
    manifest = exports.exporter(
        torchrec_shape.build_trained(),
        "sparse_arch",
        "dense_arch",
        torchrec_shape.build_dataset(),
        None,
        tmp_path / "out",
        rename_tables={"*.embedding_bags.*.weight": "{1}"},
        dtype={"*": "int8"},
    ).export()
    assert {table.name for table in manifest.tables} == {"t_user", "t_item"}
    assert set(manifest.parity.from_files.max_ulp.values()) == {0}


def test_ids_of_the_sample_that_rules_leave_behind_are_told(tmp_path: Path) -> None:
    tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    settings = {
        "model": tiny_model.MODEL,
        "dataset": tiny_model.DATASET,
        "filter_sparse_opt": True,
    }
    manifest = exports.export(
        {
            "ckpt_dir": str(tmp_path / "ckpt"),
            "export_dir": str(tmp_path / "out"),
            "prune": [{"tables": "*", "norm_at_most": 100}],
            "on_empty_table": "allow",
            **settings,
        }
    )
    note = next(note for note in manifest.notes if "ids that the sample looked up are left behind by prune" in note)
    assert note.endswith("the sample has the table's default_row or zeros for them, as serving has"), (
        "of a hash table too, although nothing is taken out of it"
    )


def test_a_live_model_says_what_its_tables_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="treat_as_tables is for checkpoints, but format is live"):
        dist_export.ExportConfig(export_dir=str(tmp_path), format="live", treat_as_tables=["x"])
    with pytest.raises(ConfigError, match="dataset is None"):
        exports.exporter(
            torchrec_shape.build_trained(), "sparse_arch", "dense_arch", None, None, tmp_path, need_export_sparse=False
        )


def test_rows_of_bfloat16_that_become_a_hash_table_are_told(tmp_path: Path) -> None:
    weight = torch.randn(10, 4).bfloat16()
    write_chunks(tmp_path / "ckpt", {"m.embedding_bags.u.weight": (weight, [((0, 0), weight)])})
    settings = {"ckpt_dir": str(tmp_path / "ckpt"), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True}
    manifest = exports.export({**settings, "to_hash_tables": ["*"]})
    assert any("bfloat16, of which RecIS's loader reads no embeddings" in note for note in manifest.notes)


def test_what_is_to_be_told_of_one_format_is_told_to_its_users_alone(tmp_path: Path) -> None:
    """A note about RecIS is for those whose tables RecIS holds, or is to hold."""
    weight, bias = torch.randn(10, 4), torch.randn(4)
    state = {"m.embedding_bags.u.weight": (weight, [((0, 0), weight)]), "m.out.bias": (bias, [((0,), bias)])}
    write_chunks(tmp_path / "dcp", state)
    tables = make_tables({"a": 20}, 2, dim=16)
    write_checkpoint(tmp_path / "recis", tables, model_state={"dense_arch.w": bias})

    def notes_of(source: str, dtype: str) -> str:
        out = tmp_path / f"{source}_{dtype}"
        settings = {"ckpt_dir": str(tmp_path / source), "export_dir": str(out), "filter_sparse_opt": True}
        config = dist_export.ExportConfig(**settings, dtype={"*": dtype})
        planned = make_report(config, world_size=1)["notes"]
        manifest = dist_export.export(config)
        assert list(manifest.notes) == planned
        return "\n".join(manifest.notes)

    for dtype in ("bfloat16", "int8"):
        notes = notes_of("dcp", dtype)
        assert "1 table is row-indexed (m.embedding_bags.u.weight)" in notes
        assert "1 dense tensor of the checkpoint (m.out.bias)" in notes
        assert not any(name in notes for name in ("RecIS", "TorchEasyRec", "DynamicEmb", "torchrec")), notes
        notes = notes_of("recis", dtype)
        assert f"a: written as {dtype}, of which RecIS's loader reads no embeddings" in notes
        assert "as RecIS's does" in notes
        assert "row-indexed" not in notes
