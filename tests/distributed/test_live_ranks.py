"""Exports of a model in memory inside a running job of real ranks: the package is what saving and exporting gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import dist_export
from dist_export.errors import DistExportError
from dist_export.reporting.summary import summarize
from dist_export.verify.verify import verify
from tests.support import exports
from tests.support.distributed.ranks import run_ranks
from tests.support.live_models import CoalescedTable, LiveTable, Tables, bytes_of, embedding, read_rows
from tests.support.recis_writer import PartSpec, gen_slice, make_rows, make_tables, split_table, write_checkpoint

pytestmark = pytest.mark.distributed

NUM_SHARDS = [1, 2, 3, 4]


def exporter(model: nn.Module, out: Path, **settings: Any) -> dist_export.Exporter:
    return exports.exporter(model, "sparse_arch", "dense_arch", None, None, out, **settings)


# ---- hash tables ----


def hash_tables(world_size: int) -> dict[str, list[PartSpec]]:
    """Two plain tables and two children of a coalesced one, whose ids have 52 bits."""
    tables = make_tables({"user": 300, "item": 40}, world_size, slots=())
    for number, name in enumerate(("first", "second")):
        ids, slots = make_rows(200, 6, seed=20 + number)
        tables[name] = split_table(np.unique(ids & ((1 << 52) - 1)), slots, world_size)
    return tables


def hash_model(rank: int, world_size: int) -> Tables:
    tables = {name: specs[rank] for name, specs in hash_tables(world_size).items()}
    part = gen_slice(rank, world_size)
    stated = LiveTable("user", tables["user"].ids, tables["user"].slots["embedding"], part)
    silent = LiveTable("item", tables["item"].ids, tables["item"].slots["embedding"])  # its slice follows from its rank
    return Tables(
        user=stated, item=silent, both=CoalescedTable({name: tables[name] for name in ("first", "second")}, part)
    )


def export_hash_tables(rank: int, out: Path) -> None:
    model = hash_model(rank, dist.get_world_size())
    before = [tensor.clone() for tensor in (model.sparse_arch.user._rows, model.sparse_arch.item._rows)]
    for num_shards in NUM_SHARDS:
        exporter(model, out / str(num_shards), num_shards=num_shards, threads=2).export()
    assert torch.equal(before[0], model.sparse_arch.user._rows)
    assert torch.equal(before[1], model.sparse_arch.item._rows)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_hash_tables_give_what_their_checkpoint_gives(world_size: int, tmp_path: Path) -> None:
    """Shards and indexes are those of a RecIS checkpoint of the same rows, byte by byte, for any number of shards."""
    write_checkpoint(tmp_path / "saved", hash_tables(world_size))
    run_ranks(export_hash_tables, world_size, tmp_path / "store", tmp_path / "live")
    for num_shards in NUM_SHARDS:
        settings = {"filter_sparse_opt": True, "num_shards": num_shards}
        expected, found = tmp_path / "from_saved" / str(num_shards), tmp_path / "live" / str(num_shards)
        dist_export.export({"ckpt_dir": str(tmp_path / "saved"), "export_dir": str(expected), **settings})
        names = sorted(path.name for path in expected.iterdir() if path.is_file() and path.name != "manifest.json")
        assert names == sorted(path.name for path in found.iterdir() if path.is_file() and path.name != "manifest.json")
        for name in names:
            assert (found / name).read_bytes() == (expected / name).read_bytes(), (num_shards, name)
        manifest = json.loads((found / "manifest.json").read_text())
        assert manifest["source"]["format"] == "live"
        assert manifest["source"]["path"] == ""
        assert manifest["tables"] == json.loads((expected / "manifest.json").read_text())["tables"]


# ---- tables whose rows go by number ----


def truth() -> dict[str, torch.Tensor]:
    """What the tables of ``numbered_model`` hold, by the name of their weight."""
    random = torch.Generator().manual_seed(5)

    def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    return {
        "replicated": rows(23, 4),
        "bag": rows(7, 3, dtype=torch.bfloat16),
        "row_wise": rows(17, 4),
        "column_wise": rows(11, 7, dtype=torch.float16),
        "replicated_mesh": rows(9, 2),
        "fully_sharded": rows(13, 4),
        "few": rows(1, 5),
        "rec_row_wise": rows(10, 4),
        "rec_column_wise": rows(12, 6),
        "rec_table_wise": rows(5, 4),
        "strided": rows(4, 19).t(),
    }


def numbered_model() -> Tables:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    tables = {name: embedding(rows) for name, rows in truth().items() if not name.startswith(("rec_", "bag"))}
    tables["bag"] = embedding(truth()["bag"], nn.EmbeddingBag)
    tables["strided"].weight = nn.Parameter(truth()["strided"])
    for name, placement in {
        "row_wise": Shard(0),
        "column_wise": Shard(1),
        "replicated_mesh": Replicate(),
        "few": Shard(0),
    }.items():
        tables[name].weight = nn.Parameter(distribute_tensor(tables[name].weight.detach(), mesh, [placement]))
    model = Tables(**tables)
    model.sparse_arch.replicated = nn.parallel.DistributedDataParallel(model.sparse_arch.replicated)
    fully_shard(model.sparse_arch.fully_sharded, mesh=mesh)
    model.sparse_arch.ebc = nn.Module()
    model.sparse_arch.ebc.embedding_bags = nn.ModuleDict()
    for name, rows in truth().items():
        if name.startswith("rec_"):
            model.sparse_arch.ebc.embedding_bags[name] = Sharded(rows, name, rank, world_size)
    return model


class Sharded(nn.Module):
    """What torchrec's sharded collections have under a table's name: a weight that is a ShardedTensor."""

    def __init__(self, rows: torch.Tensor, name: str, rank: int, world_size: int) -> None:
        super().__init__()
        height, width = rows.shape
        offsets = {
            "rec_row_wise": [(height * r // world_size, 0) for r in range(world_size + 1)] + [(height, 0)],
            "rec_column_wise": [(0, width * r // world_size) for r in range(world_size + 1)] + [(0, width)],
        }
        shards = []
        if name == "rec_table_wise":
            shards = [LocalShard.from_tensor_and_offsets(rows.clone(), [0, 0], rank)] if rank == world_size - 1 else []
        else:
            begin, end = offsets[name][rank], offsets[name][rank + 1]
            piece = rows[begin[0] : end[0]] if name == "rec_row_wise" else rows[:, begin[1] : end[1]]
            shards = [LocalShard.from_tensor_and_offsets(piece.contiguous(), list(begin), rank)]
        self._register_state_dict_hook(self._tell)
        self._weight = init_from_local_shards(shards, *rows.shape)

    @staticmethod
    def _tell(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[f"{prefix}weight"] = module._weight


def export_rows(rank: int, out: Path) -> None:
    model = numbered_model()
    before = {name: local_of(value) for name, value in model.state_dict().items()}
    for num_shards in NUM_SHARDS:
        exporter(model, out / str(num_shards), num_shards=num_shards, threads=2).export()
    after = {name: local_of(value) for name, value in model.state_dict().items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(rows, after[name]) for name, rows in before.items())


def local_of(value: Any) -> torch.Tensor:
    if hasattr(value, "local_shards"):
        return torch.cat([shard.tensor.reshape(-1) for shard in value.local_shards()] or [torch.zeros(0)]).clone()
    return (value.to_local() if hasattr(value, "to_local") else value).clone()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rows_of_all_shardings_are_put_together(world_size: int, tmp_path: Path) -> None:
    """Replicas, DTensors and ShardedTensors, by rows, columns and whole tables, give the rows that they were cut from."""
    run_ranks(export_rows, world_size, tmp_path / "store", tmp_path / "out")
    for num_shards in NUM_SHARDS:
        found = read_rows(tmp_path / "out" / str(num_shards))
        expected = {
            f"sparse_arch.{'ebc.embedding_bags.' * name.startswith('rec_')}{name}.weight": bytes_of(rows)
            for name, rows in truth().items()
        }
        assert found.keys() == expected.keys()
        for name, rows in expected.items():
            assert np.array_equal(found[name], rows), (num_shards, name)
        manifest = json.loads((tmp_path / "out" / str(num_shards) / "manifest.json").read_text())
        assert {table["name"]: table["rows_in"] for table in manifest["tables"]} == {
            n: len(r) for n, r in expected.items()
        }


# ---- the whole model ----


class Mixed(nn.Module):
    """A hash table whose rows the ranks share, a replicated and a column-sharded table, and a dense arch in DDP."""

    def __init__(self) -> None:
        super().__init__()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self.sparse_arch = MixedSparse(mixed_tables(world_size)[rank])
        torch.manual_seed(3)
        self.dense_arch = nn.parallel.DistributedDataParallel(MixedDense())


class MixedSparse(nn.Module):
    def __init__(self, spec: PartSpec) -> None:
        super().__init__()
        self.user = LiveTable("user", spec.ids, spec.slots["embedding"], spec.slice)
        self.city = embedding(city_rows())
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.price = embedding(city_rows())
        self.price.weight = nn.Parameter(distribute_tensor(city_rows() + 1, mesh, [Shard(1)]))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        whole = self.price.weight.full_tensor()
        return {"user": self.user(batch["user"]), "city": self.city(batch["city"]), "price": whole[batch["city"]]}


class MixedDense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(12, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"ctr": torch.sigmoid(self.out(torch.cat([blocks["user"], blocks["city"], blocks["price"]], 1)))}


def mixed_tables(world_size: int) -> list[PartSpec]:
    return make_tables({"user": 50}, world_size, slots=())["user"]


def city_rows() -> torch.Tensor:
    return torch.arange(40, dtype=torch.float32).reshape(10, 4) / 7


def export_mixed(rank: int, out: Path) -> dict[str, Any]:
    model = Mixed()
    specs = mixed_tables(dist.get_world_size())
    asked = torch.from_numpy(np.concatenate([spec.ids[:2] for spec in specs]))  # half of them are another rank's
    batch = {"user": asked, "city": torch.arange(len(asked))}
    before = {name: local_of(value) for name, value in model.state_dict().items()}
    held = model.sparse_arch.user._rows.clone()
    manifest = exports.exporter(model, "sparse_arch", "dense_arch", [batch], None, out).export()
    assert all(torch.equal(local_of(value), before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.sparse_arch.user._rows, held)
    return {
        "notes": manifest.notes,
        "sample": manifest.run["sample"],
        "parity": manifest.parity is not None and manifest.parity.from_files is not None,
    }


def test_a_whole_model_leaves_memory_with_its_dense_arch(tmp_path: Path) -> None:
    """Tables, program and scores in one go; the manifest that serving reads names the dense parameters as model.pt would."""
    found = run_ranks(export_mixed, 2, tmp_path / "store", tmp_path / "out")[0]
    assert found["parity"]
    assert found["sample"]["asked"] == {"user": 8, "sparse_arch.city.weight": 8}
    assert found["sample"]["missing"]["user"] == 4
    assert "sharded in memory" in " ".join(found["notes"])
    merged = json.loads((tmp_path / "out" / "torch_rank_weights_embs_table_multi_shard.json").read_text())
    assert merged["dense_arch.out.weight"]["shape"] == [1, 12]
    rows = read_rows(tmp_path / "out")
    assert np.array_equal(rows["sparse_arch.city.weight"], bytes_of(city_rows()))
    assert np.array_equal(rows["sparse_arch.price.weight"], bytes_of(city_rows() + 1))


def export_sharded(rank: int, out: Path) -> dict[str, Any]:
    """Both tables under ``fully_shard``, so that the sample takes no row of the files."""
    del rank
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    batch = {"city": torch.arange(5)}

    def exporter_of(where: Path, **settings: Any) -> dist_export.Exporter:
        model = Mixed()  # a new one: FSDP leaves the weights of its outermost module whole after a forward
        model.sparse_arch = Sharding()
        fully_shard(model.sparse_arch.city, mesh=mesh)
        return exports.exporter(model, "sparse_arch", "dense_arch", [batch], None, where, **settings)

    manifest = exporter_of(out).export()
    assert manifest.parity is not None
    bounded = out.with_name("bounded")
    with pytest.raises(DistExportError) as caught:
        exporter_of(bounded, max_drift=1.0).export()
    assert not bounded.exists()
    return {
        "parity": manifest.parity.from_files,
        "notes": manifest.notes,
        "summary": summarize(manifest, [], "out"),
        "drift": manifest.drift,
        "refused": (caught.value.exit_code, str(caught.value)),
    }


def export_sharded_twice(rank: int, out: Path) -> dict[str, float]:
    """A model of which FSDP holds all tables, whole after a forward, over several batches: each call gathers them again."""
    del rank
    model = Mixed()
    model.sparse_arch = Sharding()
    fully_shard(model.sparse_arch.city, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    batches = [{"city": torch.arange(5) + at} for at in range(3)]
    with torch.no_grad():
        expected = model.dense_arch(model.sparse_arch(batches[2]))
    manifest = exports.exporter(model, "sparse_arch", "dense_arch", batches, None, out).export()
    assert manifest.parity is not None
    with torch.no_grad():
        assert repr(model.dense_arch(model.sparse_arch(batches[2]))) == repr(expected)
    return manifest.parity.max_abs


def test_a_sharded_model_that_has_run_is_exported_over_several_batches(tmp_path: Path) -> None:
    """Whole parameters that the forward left were read in place of the shards, and the second call's counted as strangers."""
    told = run_ranks(export_sharded_twice, 2, tmp_path / "store", tmp_path / "out")
    assert told == [{"ctr": 0.0}] * 2
    assert np.array_equal(read_rows(tmp_path / "out")["sparse_arch.city.weight"], bytes_of(city_rows()))


class Sharding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.city = embedding(city_rows())

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows = self.city(batch["city"])
        return {"user": rows, "city": rows + 1, "price": rows * 2}


def test_a_model_whose_tables_are_all_sharded_claims_no_written_rows(tmp_path: Path) -> None:
    found = run_ranks(export_sharded, 2, tmp_path / "store", tmp_path / "out")[0]
    assert not found["parity"].reads_rows
    assert found["drift"].not_measured == "sparse_arch.city.weight of the model in memory is sharded, and takes no rows"
    assert (found["drift"].batches, found["drift"].outputs) == (0, {})
    assert found["refused"][0] == 2
    assert "max_drift bounds the drift, which cannot be measured: sparse_arch.city.weight" in found["refused"][1]
    assert "sharded in memory" in " ".join(found["notes"])
    summary = "\n".join(found["summary"])
    assert "with the program as written, no row from the shards: largest difference" in summary
    report = verify(str(tmp_path / "out"))
    assert not report.findings
    assert "sample: fx_user_model/sample_rows.json names no id, so there was no row to compare" in report.checked
    assert np.array_equal(read_rows(tmp_path / "out")["sparse_arch.city.weight"], bytes_of(city_rows()))


# ---- what is refused ----


class Failing(LiveTable):
    """Gives its rows while they are looked at, and fails when they are to be written."""

    def embeddings(self) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls > 1 and dist.get_rank() == 1:
            raise RuntimeError("device lost")
        return self._rows.clone()


def refuse_each(rank: int, out: Path) -> dict[str, str]:
    """Return what each export is refused with."""
    world_size = dist.get_world_size()
    part = gen_slice(rank, world_size)
    rows = torch.ones(4, 2)
    ids = torch.arange(4) + part[0]
    different = rows + rank
    offset = torch.full((4,), rank)
    models = {
        "replicas": Tables(t=embedding(different)),
        "slices": Tables(t=LiveTable("t", ids, rows, (0, 65536, 65536))),
        "misplaced": Tables(t=LiveTable("t", ids + 40000, rows)),
        "twice": Tables(t=LiveTable("t", ids - offset.sum() * 0 - torch.arange(4), rows, part)),
        "shapes": Tables(t=LiveTable("t", ids, torch.ones(4, 2 + rank), part)),
        "fails": Tables(t=Failing("t", ids, rows, part), u=embedding(rows)),
        "none": Tables(),
    }
    found = {}
    for name, model in models.items():
        with pytest.raises(DistExportError) as caught:
            exporter(model, out / name, num_shards=2, threads=1).export()
        found[name] = f"{type(caught.value).__name__} {caught.value.exit_code} {caught.value}"
    return found


def test_every_rank_hears_what_is_wrong(tmp_path: Path) -> None:
    """Replicas that differ, ids that may stand twice, a rank that fails while it reads: one line on all ranks, no package."""
    for found in run_ranks(refuse_each, 2, tmp_path / "store", tmp_path / "out"):
        assert "replicas on ranks 0 and 1 differ" in found["replicas"]
        assert "the slices overlap" in found["slices"]
        assert "outside the slice" in found["misplaced"]
        assert "twice" in found["twice"]
        assert "on rank 0 and" in found["shapes"]
        assert "device lost" in found["fails"]
        assert "rank 1" in found["fails"]
        assert "holds a table" in found["none"]
    for name in ("replicas", "slices", "misplaced", "twice", "shapes", "none"):
        assert " 2 " in found[name], found[name]
        assert not list((tmp_path / "out" / name).glob("*"))
    assert not (tmp_path / "out" / "fails" / "manifest.json").exists()


# ---- meshes of two dimensions ----


def export_mesh(rank: int, out: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    placements = {"replicas_of_rows": [Replicate(), Shard(0)], "rows_by_columns": [Shard(0), Shard(1)]}
    tables = {name: embedding(mesh_rows()) for name in placements}
    for name, table in tables.items():
        table.weight = nn.Parameter(distribute_tensor(mesh_rows(), mesh, placements[name]))
    exporter(Tables(**tables), out, num_shards=3, threads=1).export()


def mesh_rows() -> torch.Tensor:
    return torch.arange(77, dtype=torch.float32).reshape(11, 7)


def test_two_dimensions_of_ranks_give_the_rows(tmp_path: Path) -> None:
    """Replicas of row shards, and tiles of rows by columns, on four ranks."""
    run_ranks(export_mesh, 4, tmp_path / "store", tmp_path / "out")
    found = read_rows(tmp_path / "out")
    for name in ("replicas_of_rows", "rows_by_columns"):
        assert np.array_equal(found[f"sparse_arch.{name}.weight"], bytes_of(mesh_rows()))
