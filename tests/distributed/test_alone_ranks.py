"""What one rank runs alone while the others wait: a model that talks to them there has no score program, and nobody hangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import dist_export
from dist_export.api import Exporter
from dist_export.errors import DistExportError
from tests.support import score_models as models
from tests.support.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

ONE_TABLE = models.WAYS["embedding"][1]


class Plain(models.Model):
    """A layer behind the dense arch; the scores are those in front of it."""

    def __init__(self) -> None:
        super().__init__(models.Lookups(nn.Embedding(models.ROWS, models.DIM), ONE_TABLE), models.DIM + 1)
        self.behind = nn.Linear(1, 1)
        self.norm = nn.BatchNorm1d(1)

    def forward(self, batch: Any) -> Any:
        return self.norm(self.behind(super().forward(batch)["ctr"]))


class Between(Plain):
    """The layer is between the arches, and does nothing for the sample."""

    def forward(self, batch: Any) -> Any:
        blocks = self.sparse_arch(batch)
        price = torch.where(blocks["price"] > 1e6, self.behind(blocks["price"]), blocks["price"])
        return self.dense_arch({**blocks, "price": price})


class Waiting(Plain):
    def forward(self, batch: Any) -> Any:
        blocks = self.sparse_arch(batch)
        dist.barrier()
        return self.dense_arch(blocks)


class Counting(Plain):
    """Its ranks tell each other how many examples they have."""

    def forward(self, batch: Any) -> Any:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, len(batch["user"]))
        return self.dense_arch(self.sparse_arch(batch))


class Summing(nn.Module):
    """A dense arch that talks to the other ranks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, blocks: Any) -> Any:
        dist.all_reduce(torch.ones(1))
        return self.inner(blocks)


class Branching(Plain):
    def forward(self, batch: Any) -> Any:
        blocks = self.sparse_arch(batch)
        price = blocks["price"]
        twice = torch.cond(price.sum() > 1e6, lambda its: its * 2, lambda its: its * 1, (price,))
        return self.dense_arch({**blocks, "price": twice})


def shard_behind(model: Any) -> nn.Module:
    fully_shard(model.behind)
    return model  # type: ignore[no-any-return]


def shard_behind_and_dense(model: Any) -> nn.Module:
    fully_shard(model.behind)
    fully_shard(model.dense_arch)
    return model  # type: ignore[no-any-return]


def shard_root(model: Any) -> nn.Module:
    return fully_shard(model, ignored_params=set(model.sparse_arch.parameters()))


def shard_dense(model: Any) -> nn.Module:
    fully_shard(model.dense_arch)
    return model  # type: ignore[no-any-return]


def split_behind(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, {"behind": ColwiseParallel(output_layouts=Replicate())})


def replicate(model: Any) -> nn.Module:
    return DistributedDataParallel(model)


def replicate_norm(model: Any) -> nn.Module:
    model.norm = DistributedDataParallel(model.norm)
    return model  # type: ignore[no-any-return]


def as_it_is(model: nn.Module) -> nn.Module:
    return model


CASES: dict[str, tuple[Any, Any, str]] = {
    "behind": (Plain, shard_behind, "fully_shard is around behind"),
    "behind and dense": (Plain, shard_behind_and_dense, "fully_shard is around behind"),
    "between": (Between, shard_behind, "fully_shard is around behind"),
    "root": (Plain, shard_root, "fully_shard is around all of it"),
    "split": (Plain, split_behind, "behind.weight is a DTensor over 2 ranks"),
    "barrier": (Waiting, as_it_is, "the model's code calls a collective of torch.distributed (c10d.barrier"),
    "objects": (Counting, as_it_is, "torch.export refused the model"),
    "dense alone": (Plain, shard_dense, ""),
    "replicas": (Plain, replicate, ""),
    "replicas within": (Plain, replicate_norm, ""),
    "branches": (Branching, as_it_is, ""),
}
"""Name -> model, what is around it, and why there is no program; empty if there is one."""


def export_cases(rank: int, folder: str) -> dict[str, tuple[str, bool]]:
    """Export each case, and then run the model once more. Returns the notes, and whether there is a program."""
    found = {}
    for name, (kind, wrap, _) in CASES.items():
        if rank == 0:
            models.save(models.train(kind()), Path(folder) / f"{name}.pth")
        dist.barrier()
        model = wrap(kind())
        batch = models.inputs_of(Plain(), models.batch_of(4 - rank))
        checkpoint, out = f"{folder}/{name}.pth", f"{folder}/{name}"
        manifest = Exporter(model, "sparse_arch", "dense_arch", [batch], checkpoint, out).export(progress=False)
        model.eval()(batch)  # the caller's group is alive, and so is the model
        found[name] = (" ".join(manifest.notes), bool(manifest.score))
    return found


def test_a_model_that_needs_all_ranks_has_no_program_and_nobody_waits(tmp_path: Path) -> None:
    notes = run_ranks(export_cases, 2, tmp_path / "store", str(tmp_path), timeout=300)[0]
    for name, (_, _, reason) in CASES.items():
        told, has_program = notes[name]
        assert has_program == (not reason), (name, told)
        assert not reason or f"the package has no score program: {reason}" in told, (name, told)
    batch = models.batch_of(9, 5)
    for name in ("replicas", "replicas within", "dense alone"):
        plain = models.train(Plain())
        scores = dist_export.open_package(tmp_path / name).score(batch)["ctr"]
        expected = plain.dense_arch(plain.sparse_arch(batch))["ctr"].detach()
        torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-4, atol=1e-5)


def export_summing(rank: int, folder: str) -> str:
    model = Plain()
    model.dense_arch = Summing(model.dense_arch)
    if rank == 0:
        models.save(models.train(model), Path(folder) / "c.pth")
    dist.barrier()
    arches = "sparse_arch", "dense_arch"
    exporter = Exporter(model, *arches, [models.batch_of()], f"{folder}/c.pth", f"{folder}/out", score_program="off")
    with pytest.raises(DistExportError) as caught:
        exporter.export(progress=False)
    dist.barrier()
    return str(caught.value)


def test_a_dense_arch_that_talks_to_other_ranks_is_refused(tmp_path: Path) -> None:
    for text in run_ranks(export_summing, 2, tmp_path / "store", str(tmp_path), timeout=120):
        assert "calls a collective of torch.distributed (c10d.allreduce_" in text


def export_live(rank: int, folder: str) -> tuple[str, bool]:
    """A table under ``fully_shard``, of a model in memory."""
    del rank
    model = models.train(Plain())
    fully_shard(model.sparse_arch.table)
    batch = models.batch_of()
    manifest = Exporter(model, "sparse_arch", "dense_arch", [batch], None, f"{folder}/out").export(progress=False)
    model.eval()(batch)
    return " ".join(manifest.notes), bool(manifest.score)


def test_a_sharded_table_in_memory_has_rows_and_no_program(tmp_path: Path) -> None:
    notes, has_program = run_ranks(export_live, 2, tmp_path / "store", str(tmp_path), timeout=120)[0]
    assert not has_program
    assert "fully_shard is around sparse_arch.table" in notes
    package = dist_export.open_package(tmp_path / "out")
    name = package.manifest.tables[0].name
    rows, _ = package.lookup(name, list(range(models.ROWS)))
    expected = models.train(Plain()).sparse_arch.table.weight.detach()
    assert torch.equal(torch.from_numpy(rows), expected)


def export_sizes(rank: int, folder: str, sizes: tuple[int, int]) -> bool:
    if rank == 0:
        models.save(models.train(Plain()), Path(folder) / "c.pth")
    dist.barrier()
    batch = models.batch_of(sizes[rank])
    arches = "sparse_arch", "dense_arch"
    return bool(Exporter(Plain(), *arches, [batch], f"{folder}/c.pth", f"{folder}/out").export(progress=False).score)


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2)])
def test_ranks_whose_samples_differ_in_size_compare_as_many_batches(sizes: tuple[int, int], tmp_path: Path) -> None:
    assert run_ranks(export_sizes, 2, tmp_path / "store", str(tmp_path), sizes, timeout=120) == [True, True]
