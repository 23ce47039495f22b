"""A torchrec-shaped model, in plain torch: trained rows in the checkpoint, scores from the package as the trainer's."""

from __future__ import annotations

import itertools
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export.checkpoint.package_reader import PackageReader
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.sample_rows import SampleRows
from dist_export.dense.source_rows import SourceRows
from dist_export.dense.table_feed import checkpoint_rows
from dist_export.errors import CheckpointError, ModelError, ParityError
from dist_export.storage.urls import open_directory
from dist_export.verify.verify import verify
from tests.integration.test_scores import after_check
from tests.support import torchrec_shape
from tests.support.numbered_source import Numbered, make_rows, plug_in, write_source
from tests.support.recis_writer import split_table
from tests.support.sparse_cases import export, open_source, recorded_reads

MERGED = "torch_rank_weights_embs_table_multi_shard.json"
PREFIX = "sparse_arch.ebc.embedding_bags."
SETTINGS = {
    "model": torchrec_shape.MODEL,
    "dataset": torchrec_shape.DATASET,
    "num_shards": 3,
}
CITIES = np.array([0, 7, 14, 28, 99])


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch)


def write_trained(folder: Path, trained: nn.Module, *, prefix: str = PREFIX, cities: bool = False) -> Path:
    """Write the trainer's tables, cut as two ranks had them, and its dense parameters."""
    state = trained.state_dict()
    tables: dict[str, Any] = {
        f"{prefix}{name}.weight": Numbered(
            {"embedding": state[f"{PREFIX}{name}.weight"].numpy(), "momentum1": np.ones(rows, np.float32)},
            (0, rows // 2),
        )
        for name, rows in torchrec_shape.ROWS.items()
    }
    if cities:
        tables["city_emb"] = split_table(CITIES, {"embedding": city_rows()}, 2)
    dense = {name: tensor for name, tensor in state.items() if name.startswith("dense_arch.")}
    return write_source(folder, tables, model_state=dense)


def city_rows() -> np.ndarray:
    return np.random.default_rng(9).standard_normal((len(CITIES), torchrec_shape.DIM)).astype(np.float32)


def score(
    package: dist_export.package.reader.Package, batch: dict[str, Any], prefix: str = PREFIX
) -> list[torch.Tensor]:
    """Score a batch as a server does: rows from the shards, pooled, through the written program."""
    blocks = {"price": batch["price"]}
    for name, block in (("t_user", "user"), ("t_item", "item")):
        values, offsets = batch["features"][name]
        rows, found = package.lookup(f"{prefix}{name}.weight", values.numpy())
        assert found.all()
        blocks[block] = torch.stack(
            [torch.from_numpy(rows[begin:end].sum(0)) for begin, end in itertools.pairwise(offsets)]
        )
    return list(package.load_program().module()(**blocks))


def test_the_package_scores_as_the_trainer(tmp_path: Path) -> None:
    trained = torchrec_shape.build_trained()
    write_trained(tmp_path / "ckpt", trained)
    manifest = export(tmp_path / "ckpt", tmp_path / "out", **SETTINGS)
    assert manifest.parity.from_files.reads_rows
    assert manifest.parity.from_files.max_ulp == {"ctr": 0, "like": 0}
    report = verify(str(tmp_path / "out"))
    assert report.findings == []
    assert any(line.startswith("sample: the rows of its") for line in report.checked)
    (_, batch), *_ = torchrec_shape.build_dataset(9)
    with torch.no_grad():
        expected = trained.dense_arch(trained.sparse_arch(batch))
    found = score(dist_export.open_package(tmp_path / "out"), batch)
    for value, name in zip(found, ("ctr", "like"), strict=True):
        torch.testing.assert_close(value, expected[name])
    rows = json.loads((tmp_path / "out" / "fx_user_model" / "sample_rows.json").read_text())
    assert set(rows) == {f"{PREFIX}t_user.weight", f"{PREFIX}t_item.weight"}


@pytest.mark.parametrize(
    "prefix", ["ebc.embedding_bags.", "module.sparse_arch.ebc.embedding_bags.", "ebc.module.embedding_bags."]
)
def test_names_may_lack_the_prefix_and_have_wrappers(prefix: str, tmp_path: Path) -> None:
    trained = torchrec_shape.build_trained()
    write_trained(tmp_path / "ckpt", trained, prefix=prefix)
    manifest = export(tmp_path / "ckpt", tmp_path / "out", **SETTINGS)
    assert not any("own rows" in note for note in manifest.notes)
    (_, batch), *_ = torchrec_shape.build_dataset(3)
    with torch.no_grad():
        expected = trained.dense_arch(trained.sparse_arch(batch))
    found = score(dist_export.open_package(tmp_path / "out"), batch, prefix)
    torch.testing.assert_close(found[0], expected["ctr"])


def test_hash_tables_beside_them_are_fed_and_scored_too(tmp_path: Path) -> None:
    trained = torchrec_shape.build_trained(has_hash_table=True)
    write_trained(tmp_path / "ckpt", trained, cities=True)
    settings = {**SETTINGS, "model": "tests.support.torchrec_shape:build_mixed_model"}
    manifest = export(tmp_path / "ckpt", tmp_path / "out", **settings)
    assert manifest.run["sample"]["missing"]["city_emb"] == 1  # 21
    assert manifest.parity.from_files.max_ulp == {"ctr": 0, "like": 0}
    assert verify(str(tmp_path / "out")).findings == []


def test_a_model_whose_tables_are_not_seen_is_told_so(tmp_path: Path) -> None:
    write_trained(tmp_path / "ckpt", torchrec_shape.build_trained())
    manifest = export(
        tmp_path / "ckpt", tmp_path / "out", **{**SETTINGS, "model": "tests.support.torchrec_shape:build_sharded_model"}
    )
    assert any("looked up no table" in note and "not sharded" in note for note in manifest.notes)
    manifest = export(tmp_path / "ckpt", tmp_path / "other", **SETTINGS)
    assert not any("looked up no table" in note for note in manifest.notes)


def find_table(
    names: list[str], path: str = "ebc.embedding_bags.t_user", sparse_model_name: str = "sparse_arch"
) -> SampleRows:
    """Let the model's modules look for their tables among these names."""

    class Names:
        """As much of a RowFinder as that takes."""

        is_live = is_recording = False

        def table_names(self) -> list[str]:
            return names

        def exported_names(self) -> list[str]:
            return []  # no table has raw ids

        def table_of(self, name: str) -> Any:
            return types.SimpleNamespace(raw_ids=None)

        def has_table(self, name: str) -> bool:
            return name in names

        def embedding_of(self, name: str) -> Any:
            raise LookupError(name)

    root = nn.Module()
    holder = root
    *steps, last = path.split(".")
    for step in steps:
        holder.add_module(step, nn.Module())
        holder = getattr(holder, step)
    holder.add_module(last, nn.EmbeddingBag(3, 2))
    counts = SampleRows()
    with checkpoint_rows(root, sparse_model_name=sparse_model_name, finder=Names(), counts=counts):  # type: ignore[arg-type]
        pass
    return counts


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["sparse_arch.ebc.embedding_bags.t_user.weight", "ebc.embedding_bags.t_user.weight"], 0),
        (["x", "module.sparse_arch._orig_mod.ebc.embedding_bags.t_user.weight"], 1),
        (["sparse_arch.ebc.embedding_bags.t_user", "y.weight"], 0),
        (["y", "ebc.embedding_bags.t_user"], 1),
    ],
)
def test_the_name_that_fits_is_found(names: list[str], found: int) -> None:
    with pytest.raises(LookupError, match=names[found]):
        find_table(names)


@pytest.mark.parametrize(
    "names",
    [
        ["sparse_arch.other.weight", "ebc.embedding_bags.t_user.weight"],  # of another place in the model
        ["ebc.embedding_bags.t_user.weights", "embedding_bags.t_user.weight", "t_user"],
    ],
)
def test_a_name_of_another_place_does_not_fit(names: list[str]) -> None:
    assert find_table(names).unknown_tables == ["sparse_arch.ebc.embedding_bags.t_user"]


@pytest.mark.parametrize(
    "names",
    [
        ["sparse_arch.ebc.embedding_bags.t_user", "sparse_arch.ebc.embedding_bags.t_user.weight"],
        ["module.ebc.embedding_bags.t_user.weight", "ebc.module.embedding_bags.t_user.weight"],
    ],
)
def test_a_name_that_fits_twice_is_an_error(names: list[str]) -> None:
    with pytest.raises(ModelError, match=r"may be .* or .* of the checkpoint"):
        find_table(names)


# ---- scoring from the written files ---------------------------------------------------------------------------------


def change_rows(folder: Path) -> None:
    from tests.support.recis_writer import read_header

    for path in sorted(folder.glob("model-*.safetensors")):
        start, header = read_header(path)
        raw = bytearray(path.read_bytes())
        for entry in header.values():
            begin, end = (start + offset for offset in entry["data_offsets"])
            raw[begin:end] = bytes(end - begin)
        path.write_bytes(raw)


@pytest.mark.parametrize("cities", [False, True])
def test_rows_that_changed_on_the_disk_are_found(cities: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_trained(tmp_path / "ckpt", torchrec_shape.build_trained(has_hash_table=cities), cities=cities)
    after_check(monkeypatch, change_rows)
    settings = {**SETTINGS, "model": "tests.support.torchrec_shape:build_mixed_model"} if cities else SETTINGS
    with pytest.raises(ParityError, match="in the shards"):
        export(tmp_path / "ckpt", tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_table_that_serving_would_not_find_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_export.pipeline import small_files as exporter

    original = exporter.render_indexes

    def render(*args: Any) -> dict[str, bytes]:
        files = original(*args)
        merged = json.loads(files[MERGED])
        for key in [key for key in merged if "t_user" in key]:
            del merged[key]
        return {**files, MERGED: json.dumps(merged).encode()}

    monkeypatch.setattr(exporter, "render_indexes", render)
    write_trained(tmp_path / "ckpt", torchrec_shape.build_trained())
    with pytest.raises(ParityError, match=r"t_user found its rows in the checkpoint, but .* has no table of it"):
        export(tmp_path / "ckpt", tmp_path / "out", **SETTINGS)


def open_shards(folder: Path | str) -> PackageReader:
    directory = open_directory(folder)
    return PackageReader(directory, [name for name in directory.names() if name.endswith(".safetensors")])


@pytest.mark.parametrize("ranks", [1, 3])
def test_written_tables_are_opened_by_what_serving_reads(ranks: int, tmp_path: Path) -> None:
    """Without the package manifest; both kinds of table, each rank a share of the files."""
    trained = torchrec_shape.build_trained()
    write_trained(tmp_path / "ckpt", trained, cities=True)
    export(tmp_path / "ckpt", tmp_path / "out", num_shards=3, keep_slots=["momentum1"])
    (tmp_path / "out" / "manifest.json").unlink()
    reader = open_shards(tmp_path / "out")
    edges = [len(reader.files) * rank // ranks for rank in range(ranks + 1)]
    shares = [reader.read_headers(range(begin, end)) for begin, end in itertools.pairwise(edges)]
    written = reader.assemble(shares)
    finder = RowFinder(SourceRows(checkpoint=written, misplaced=np.zeros(len(written.parts), np.int64)))
    assert finder.table_names() == ["city_emb", f"{PREFIX}t_item.weight", f"{PREFIX}t_user.weight"]
    weight = trained.state_dict()[f"{PREFIX}t_item.weight"].numpy()
    ids = np.array([-1, 0, 1, 12, 13, 36, 37])
    has_row, rows = finder.find(f"{PREFIX}t_item.weight", ids)
    assert has_row.tolist() == [False, True, True, True, True, True, False]
    assert np.array_equal(rows[has_row].view(np.float32), weight[ids[has_row]])
    has_row, rows = finder.find("city_emb", CITIES)
    assert has_row.all()
    assert np.array_equal(rows.view(np.float32), city_rows())


def test_a_part_that_serving_would_not_find_is_refused(tmp_path: Path) -> None:
    write_trained(tmp_path / "ckpt", torchrec_shape.build_trained())
    export(tmp_path / "ckpt", tmp_path / "out", num_shards=3)
    (tmp_path / "out" / "model-000001-of-000003.safetensors").unlink()
    reader = open_shards(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"parts 0, 2 of 3 of table .*t_item"):
        reader.assemble([reader.read_headers(range(2))])


def test_a_merged_manifest_that_is_damaged_is_one_line(tmp_path: Path) -> None:
    write_trained(tmp_path / "ckpt", torchrec_shape.build_trained())
    export(tmp_path / "ckpt", tmp_path / "out", num_shards=1)
    (tmp_path / "out" / MERGED).write_text("{")
    with pytest.raises(CheckpointError, match="is not what was written"):
        open_shards(tmp_path / "out")
    (tmp_path / "out" / MERGED).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_shards(tmp_path / "out")


def test_rows_by_number_are_read_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_trained(tmp_path / "ckpt", torchrec_shape.build_trained())
    finder = RowFinder(SourceRows(checkpoint=open_source(tmp_path / "ckpt")))
    with recorded_reads(monkeypatch) as reads:
        finder.find(f"{PREFIX}t_user.weight", np.array([-5, 3, 4, 29, 30, 31, 60]))
    assert [last - first for _, first, last in reads] == [2 * 16, 16, 2 * 16]


def test_a_shard_of_somebody_else_beside_them_is_not_read(tmp_path: Path) -> None:
    write_trained(tmp_path / "ckpt", torchrec_shape.build_trained())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-000000-of-000009.safetensors").write_bytes(b"x")
    manifest = export(tmp_path / "ckpt", tmp_path / "out", **SETTINGS)
    assert manifest.parity.from_files.reads_rows


def test_dense_tensors_beside_tables_by_number(tmp_path: Path) -> None:
    """Then there is an index, of these alone."""
    dense = {"w": np.ones(3, np.float32)}
    write_source(tmp_path / "ckpt", {"u.weight": Numbered({"embedding": make_rows(3)})}, dense=dense)
    export(tmp_path / "ckpt", tmp_path / "out", num_shards=2)
    assert verify(str(tmp_path / "out")).findings == []
    assert list(json.loads((tmp_path / "out" / "index").read_bytes())["block_index"]) == ["w^ "]
    reader = open_shards(tmp_path / "out")
    written = reader.assemble([reader.read_headers(range(2))])
    assert [table.name for table in written.tables] == ["u.weight"]
    assert [tensor.name for tensor in written.dense] == ["w"]


def test_packages_lie_on_stores_too(tmp_path: Path) -> None:
    trained = torchrec_shape.build_trained()
    write_trained(tmp_path / "ckpt", trained, cities=True)
    out = f"memory://numbered/{tmp_path.name}"
    settings = {**SETTINGS, "model": "tests.support.torchrec_shape:build_mixed_model"}
    manifest = export(tmp_path / "ckpt", out, **settings)
    assert manifest.parity.from_files.max_ulp == {"ctr": 0, "like": 0}
    assert verify(out, finite=True).findings == []
    rows, found = dist_export.open_package(out).lookup(f"{PREFIX}t_item.weight", [36, 37])
    assert found.tolist() == [True, False]
    assert np.array_equal(rows[0], trained.state_dict()[f"{PREFIX}t_item.weight"][36].numpy())
