"""Whole exports in one process: the two modes, in place, tables alone, the dense arch alone, resumption."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

import dist_export
from dist_export.errors import ConfigError, ExportError
from dist_export.storage.directory import WORK_DIRECTORY as RECEIPTS
from dist_export.storage.directory import Directory
from dist_export.transfer.unit_runner import UnitRunner
from dist_export.verify.verify import verify
from tests.support import exports, tiny_model
from tests.support.recis_writer import make_tables, read_back, truth_of, write_checkpoint

MERGED = "torch_rank_weights_embs_table_multi_shard.json"
SETTINGS = {"model": tiny_model.MODEL, "dataset": tiny_model.DATASET}


def snapshot(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.relative_to(directory).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")


def test_export_returns_the_manifest_that_it_committed(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = exports.export(
        {"ckpt_dir": str(checkpoint), "export_dir": str(out), "filter_sparse_opt": True, **SETTINGS}
    )
    assert dist_export.open_package(out).manifest == manifest
    assert verify(str(out)).findings == []
    listed = {entry.path for entry in manifest.files} | {"manifest.json"}
    assert listed == {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def test_a_path_a_mapping_and_a_config_object_are_the_same(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "export.yaml"
    file.write_text(f"ckpt_dir: {checkpoint}\nexport_dir: {tmp_path / 'a'}\nfilter_sparse_opt: true\n")
    mapping = {"ckpt_dir": str(checkpoint), "export_dir": str(tmp_path / "b"), "filter_sparse_opt": True}
    config = dist_export.ExportConfig(ckpt_dir=str(checkpoint), export_dir=str(tmp_path / "c"), filter_sparse_opt=True)
    digests = {dist_export.export(given).digest for given in (file, mapping, config)}
    assert len(digests) == 1


def test_exporter_takes_objects_and_leaves_the_model_as_it_was(checkpoint: Path, tmp_path: Path) -> None:
    model = tiny_model.build_model()
    model.train()
    model.sparse_arch.user.insert(torch.tensor([123456789]), torch.ones(1, tiny_model.DIM))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exporter = exports.exporter(
        model,
        "sparse_arch",
        "dense_arch",
        tiny_model.build_dataset(),
        checkpoint,
        tmp_path / "out",
        export_outputs=("a", "b"),
        filter_sparse_opt=True,
        num_shards=3,
    )
    manifest = exporter.export()
    assert [tensor.name for tensor in manifest.dense.outputs] == ["a", "b"]
    assert manifest.num_shards == 3
    assert all(module.training for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert 123456789 in model.sparse_arch.user.ids()


def test_the_package_alone_gives_the_scores_of_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """Rows from the shards and the program from the archive score as the trained dense arch does."""
    out = tmp_path / "out"
    exports.export({"ckpt_dir": str(checkpoint), "export_dir": str(out), "filter_sparse_opt": True, **SETTINGS})
    package = dist_export.open_package(out)
    (_, batch), *_ = tiny_model.build_dataset(3)
    blocks = {"price": batch["price"]}
    for name in ("user", "item"):
        rows, found = package.lookup(f"{name}_emb", batch[name].numpy())
        assert found.all()
        blocks[name] = torch.from_numpy(rows)
    dense = tiny_model.DenseArch().eval()
    dense.load_state_dict({k.removeprefix("dense_arch."): v for k, v in tiny_model.trained_dense_state().items()})
    with torch.no_grad():
        expected = dense(blocks)
        found = package.load_program().module()(**blocks)
    for value, name in zip(found, ("ctr", "like"), strict=True):
        torch.testing.assert_close(value, expected[name])


def test_a_copy_goes_over_byte_for_byte_with_its_indexes(checkpoint: Path, tmp_path: Path) -> None:
    """Also the index, which RecIS's own exporter forgets; never what a training job needs alone."""
    for name in ("extra.pt", "io_state_0.pt", "io_state_count", "0tensorkey.json", "ckpt-0000000-0000000.json"):
        (checkpoint / name).write_bytes(b"x")
    out = tmp_path / "out"
    manifest = exports.export({"ckpt_dir": str(checkpoint), "export_dir": str(out)})
    assert manifest.mode == "copy"
    for name in ("model-000000-of-000002.safetensors", "model-000001-of-000002.safetensors", "index", "tensorkey.json"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == [
        "index",
        "manifest.json",
        "model-000000-of-000002.row_index",
        "model-000000-of-000002.safetensors",
        "model-000001-of-000002.row_index",
        "model-000001-of-000002.safetensors",
        "tensorkey.json",
        MERGED,
    ]
    truth = truth_of(tiny_model.tables())
    assert np.array_equal(read_back(out)["user_emb"]["embedding"], truth["user_emb"]["embedding"])
    assert verify(str(out)).findings == []


def test_in_place_completes_the_package_around_the_files(checkpoint: Path) -> None:
    """export_dir may be ckpt_dir: no file of the checkpoint changes."""
    before = snapshot(checkpoint)
    manifest = exports.export({"ckpt_dir": str(checkpoint), "export_dir": str(checkpoint), **SETTINGS})
    after = snapshot(checkpoint)
    assert {name: after[name] for name in before} == before
    assert manifest.mode == "in_place"
    assert {"manifest.json", "fx_user_model/exported_model.pt"} <= set(after) - set(before)
    assert verify(str(checkpoint)).findings == []
    assert {entry.path for entry in manifest.files} >= {"index", "tensorkey.json", MERGED}


@pytest.mark.parametrize("spelling", ["{path}/", "{path}/../ckpt", "link"])
def test_in_place_is_seen_through_other_spellings(spelling: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(checkpoint)
    target = str(tmp_path / "link") if spelling == "link" else spelling.format(path=checkpoint)
    before = snapshot(checkpoint)
    with pytest.raises(ConfigError, match="would replace the training checkpoint"):
        exports.export({"ckpt_dir": str(checkpoint), "export_dir": target, "filter_sparse_opt": True})
    assert snapshot(checkpoint) == before


def test_in_place_does_not_rewrite_an_existing_fg(checkpoint: Path) -> None:
    (checkpoint / "fg.json").write_text('{"features": [], "mine": 1}')
    before = snapshot(checkpoint)
    with pytest.raises(ConfigError, match=r"fg\.json"):
        exports.export(
            {"ckpt_dir": str(checkpoint), "export_dir": str(checkpoint), "fg_conf_or_path": {"features": []}}
        )
    assert snapshot(checkpoint) == before


def test_the_source_is_opened_read_only(checkpoint: Path, tmp_path: Path) -> None:
    for path in (*checkpoint.iterdir(), checkpoint):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    before = snapshot(checkpoint)
    exports.export({"ckpt_dir": str(checkpoint), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True})
    assert snapshot(checkpoint) == before
    checkpoint.chmod(0o755)


def test_tables_alone_need_no_model_pt(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.pt").unlink()
    manifest = exports.export(
        {"ckpt_dir": str(checkpoint), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True}
    )
    assert manifest.dense is None
    assert not [name for name, entry in merged(tmp_path / "out").items() if entry["dense"]]


def test_the_merged_manifest_lists_the_parameters_of_model_pt(checkpoint: Path, tmp_path: Path) -> None:
    exports.export({"ckpt_dir": str(checkpoint), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True})
    entries = merged(tmp_path / "out")
    names = list(tiny_model.trained_dense_state())
    assert list(entries)[-len(names) :] == names, "after the sorted part, in the order of the state_dict"
    assert entries["dense_arch.hidden.weight"] == {
        "name": "dense_arch.hidden.weight",
        "dense": True,
        "dimension": 0,
        "is_hashmap": False,
        "dtype": "float32",
        "shape": [8, 9],
    }


def test_the_dense_arch_alone(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = exports.export(
        {"ckpt_dir": str(checkpoint), "export_dir": str(out), "need_export_sparse": False, **SETTINGS}
    )
    assert manifest.mode == "dense_only"
    assert manifest.run["sample"]["asked"]["user_emb"] == 5, "the sample's rows still come from the checkpoint"
    assert not list(out.glob("*.safetensors"))
    assert verify(str(out)).findings == []


def test_the_dense_arch_alone_from_a_directory_with_model_pt_alone(tmp_path: Path) -> None:
    source = tmp_path / "ckpt"
    source.mkdir()
    torch.save(tiny_model.trained_dense_state(), source / "model.pt")
    manifest = exports.export(
        {"ckpt_dir": str(source), "export_dir": str(tmp_path / "out"), "need_export_sparse": False, **SETTINGS}
    )
    assert any("model's own rows" in note for note in manifest.notes)


def test_add_subfolder_is_dated(checkpoint: Path, tmp_path: Path) -> None:
    settings = {"ckpt_dir": str(checkpoint), "add_subfolder": True}
    exports.export({**settings, "export_dir": str(tmp_path / "out")})
    assert (tmp_path / "out" / f"{time.strftime('%Y%m%d')}000000" / "data" / "manifest.json").is_file()
    exports.export({**settings, "export_dir": str(tmp_path / "mydata")})
    assert (tmp_path / "mydata" / "manifest.json").is_file(), "as in RecIS, a path that ends with data stays"


@pytest.mark.parametrize("is_filter", [False, True])
def test_memory_on_both_ends(is_filter: bool, tmp_path: Path) -> None:
    """Paths are fsspec URLs; memory:// stands for stores that cannot write at a position."""
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    memory = fsspec.filesystem("memory")
    place = f"/{tmp_path.name}-{is_filter}"
    for path in source.iterdir():
        memory.pipe_file(f"{place}/ckpt/{path.name}", path.read_bytes())
    settings = {"filter_sparse_opt": True, "num_shards": 3} if is_filter else {}
    exports.export({"ckpt_dir": f"memory:/{place}/ckpt", "export_dir": f"memory:/{place}/out", **settings, **SETTINGS})
    exports.export({"ckpt_dir": str(source), "export_dir": str(tmp_path / "out"), **settings, **SETTINGS})
    assert verify(f"memory:/{place}/out").findings == []
    for path in (tmp_path / "out").glob("model-*.safetensors"):
        assert memory.cat_file(f"{place}/out/{path.name}") == path.read_bytes()


def test_fg_and_mc_are_checked_and_exported(checkpoint: Path, tmp_path: Path) -> None:
    fg = {"features": [lookup("user_id", "user_emb"), lookup("item_id", "item_emb")]}
    mc = {"user": ["user_id"], "item": ["item_id"]}
    settings = {"ckpt_dir": str(checkpoint), "filter_sparse_opt": True, **SETTINGS}
    manifest = exports.export(
        {**settings, "export_dir": str(tmp_path / "out"), "fg_conf_or_path": fg, "mc_conf_or_path": mc}
    )
    assert json.loads((tmp_path / "out" / "fg.json").read_text()) == fg
    assert json.loads((tmp_path / "out" / "fx_user_model" / "input_columns.json").read_text()) == mc
    assert any("price" in note for note in manifest.notes), "an input that mc does not list is reported"
    unserved = {**lookup("item_id", "item_emb"), "gen_key_type": "ev_hash"}
    narrow_table = {**lookup("other", "item_emb"), "embedding_dimension": 5}
    wrong = {"features": [lookup("user_id", "usr_emb"), unserved, narrow_table]}
    mc["more"] = ["other"]
    with pytest.raises(ConfigError, match=r"(?s)3 findings.*'item_id'.*'user_id'.*'other'"):
        exports.export(
            {**settings, "export_dir": str(tmp_path / "no"), "fg_conf_or_path": wrong, "mc_conf_or_path": mc}
        )
    del mc["more"]
    narrow = {**mc, "item": ["item_id", "user_id"]}
    with pytest.raises(ConfigError, match="item"):
        exports.export(
            {**settings, "export_dir": str(tmp_path / "no"), "fg_conf_or_path": fg, "mc_conf_or_path": narrow}
        )
    assert not (tmp_path / "no").exists()


def lookup(name: str, table: str) -> dict[str, object]:
    return {
        "feature_name": name,
        "feature_type": "id_feature",
        "value_type": "String",
        "gen_key_type": "hash",
        "gen_val_type": "lookup",
        "hash_bucket_size": 1000,
        "embedding_dimension": tiny_model.DIM,
        "shared_name": table,
    }


@pytest.mark.parametrize(
    ("model", "dataset", "match"),
    [
        ("bad_name", "build_dataset", "not-a-name"),
        ("nested_output", "build_dataset", "output"),
    ],
)
def test_dense_mistakes_are_found_before_shards_are_written(
    model, dataset, match, checkpoint: Path, tmp_path: Path
) -> None:
    built = tiny_model.build_model()
    if model == "bad_name":
        forward = built.sparse_arch.forward
        built.sparse_arch.forward = lambda batch: {"not-a-name": forward(batch)["user"]}
    else:
        built.dense_arch.forward = lambda blocks: {"a": {"b": blocks["user"]}}
    exporter = exports.exporter(
        built, "sparse_arch", "dense_arch", tiny_model.build_dataset(), checkpoint, tmp_path / "out"
    )
    with pytest.raises(dist_export.UserError, match=match):
        exporter.export()
    assert not (tmp_path / "out").exists()


def interrupt_after(monkeypatch: pytest.MonkeyPatch, num_units: int) -> None:
    """Let the transfer fail after some units, as a full disk would."""
    real = UnitRunner.run
    done = []

    def run(self, unit):
        if len(done) >= num_units:
            raise OSError(28, "No space left on device", "model-x")
        done.append(unit)
        return real(self, unit)

    monkeypatch.setattr(UnitRunner, "run", run)


def test_an_interrupted_export_leaves_no_package_and_the_rerun_equals_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "ckpt"
    write_checkpoint(source, make_tables({"t": 400, "u": 100}, 4))
    settings = {"ckpt_dir": str(source), "filter_sparse_opt": True, "num_shards": 4}
    exports.export({**settings, "export_dir": str(tmp_path / "whole")})
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        interrupt_after(patched, 2)
        with pytest.raises(ExportError, match="No space left"):
            exports.export({**settings, "export_dir": str(out)})
    with pytest.raises(dist_export.PackageError):
        dist_export.open_package(out)
    exports.export({**settings, "export_dir": str(out)})
    for path in (tmp_path / "whole").iterdir():
        if path.name != "manifest.json":
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole"))


@pytest.mark.parametrize(("num_shards", "num_parts"), [(4, 4), (5, 3)])
def test_a_rerun_goes_on_with_the_shards_that_were_finished(
    num_shards: int, num_parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards get their names one by one as they are whole, gathered ones too, so that a late failure costs little."""
    source = tmp_path / "ckpt"
    write_checkpoint(source, make_tables({"t": 900, "u": 100}, num_parts))
    settings = {"ckpt_dir": str(source), "filter_sparse_opt": True, "num_shards": num_shards}
    exports.export({**settings, "export_dir": str(tmp_path / "whole")})
    out = tmp_path / "out"
    units = len(recorded_units(monkeypatch, settings, tmp_path / "counted"))
    with monkeypatch.context() as patched:
        interrupt_after(patched, units - 1)
        with pytest.raises(ExportError, match="No space left"):
            exports.export({**settings, "export_dir": str(out)})
    finished = {path.name: path.stat().st_ino for path in out.glob("model-*.safetensors")}
    assert len(finished) == num_shards - 1
    manifest = exports.export({**settings, "export_dir": str(out)})
    assert manifest.run["reused_shards"] == num_shards - 1
    for path in (tmp_path / "whole").glob("model-*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()
        assert finished.get(path.name, 0) in (0, (out / path.name).stat().st_ino)
    assert dist_export.open_package(tmp_path / "whole").manifest.digest == manifest.digest


def recorded_units(monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], out: Path) -> list[object]:
    done: list[object] = []
    real = UnitRunner.run
    with monkeypatch.context() as patched:
        patched.setattr(UnitRunner, "run", lambda self, unit: (done.append(unit), real(self, unit))[1])
        exports.export({**settings, "export_dir": str(out)})
    return done


def failing_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_):
        raise OSError(5, "Input/output error", "manifest.json")

    monkeypatch.setattr("dist_export.pipeline.steps.publish", fail)


def test_a_rerun_keeps_whole_shards_of_the_same_plan_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is kept if its receipt is of this plan and its content has the digest that the receipt says."""
    source = tmp_path / "ckpt"
    write_checkpoint(source, make_tables({"t": 400}, 4))
    out = tmp_path / "out"
    settings = {"ckpt_dir": str(source), "export_dir": str(out), "filter_sparse_opt": True, "num_shards": 4}
    with monkeypatch.context() as patched:
        failing_publish(patched)
        with pytest.raises(ExportError, match="Input/output error"):
            exports.export(settings)
    assert len(list((out / RECEIPTS).glob("model-*.safetensors.json"))) == 4
    inodes = {path.name: path.stat().st_ino for path in out.glob("model-*.safetensors")}
    damaged = out / "model-000002-of-000004.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    manifest = exports.export(settings)
    assert manifest.run["reused_shards"] == 3
    again = {path.name: path.stat().st_ino for path in out.glob("model-*.safetensors")}
    assert {name for name in inodes if inodes[name] != again[name]} == {damaged.name}
    assert verify(str(out)).findings == []


def test_shards_of_another_plan_are_not_kept_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "ckpt"
    write_checkpoint(source, make_tables({"t": 400}, 4))
    out = tmp_path / "out"
    settings = {"ckpt_dir": str(source), "export_dir": str(out), "filter_sparse_opt": True}
    with monkeypatch.context() as patched:
        failing_publish(patched)
        with pytest.raises(ExportError):
            exports.export({**settings, "num_shards": 4})
    shutil.rmtree(source)
    write_checkpoint(source, make_tables({"t": 300}, 4, seed=9))
    exports.export({**settings, "num_shards": 2})
    assert sorted(path.name for path in out.glob("model-*")) == [
        f"model-00000{i}-of-000002.{suffix}" for i in (0, 1) for suffix in ("row_index", "safetensors")
    ]
    assert len(read_back(out)["t"]["id"]) == 300


def test_the_manifest_is_written_last(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    real = Directory.write

    def write(self, name, data):
        written.append(name)
        real(self, name, data)

    monkeypatch.setattr(Directory, "write", write)
    exports.export(
        {"ckpt_dir": str(checkpoint), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True, **SETTINGS}
    )
    assert written[-1] == "manifest.json"
    assert written.count("manifest.json") == 1


def merged(directory: Path) -> dict[str, dict[str, object]]:
    return json.loads((directory / MERGED).read_text())
