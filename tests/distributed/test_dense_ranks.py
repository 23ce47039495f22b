"""The dense part of an export inside a running job of real ranks: wrappers, collective sparse arches, failures of one."""

from __future__ import annotations

import copy
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import dist_export
from dist_export.archive.safe_load import load_program
from dist_export.errors import DistExportError
from dist_export.model.unwrap import copy_dense_arch
from tests.support import exports
from tests.support.distributed.ranks import run_ranks
from tests.support.recis_writer import split_table, write_checkpoint

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
DIM = 4


class Table(nn.Module):
    """RecIS's surface, on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self._name = "user"
        self.rows: dict[int, torch.Tensor] = {}

    def ids(self) -> torch.Tensor:
        return torch.tensor(list(self.rows), dtype=torch.int64)

    def insert(self, ids: torch.Tensor, embeddings: torch.Tensor) -> None:
        self.rows |= dict(zip(ids.tolist(), embeddings.clone(), strict=True))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.rows.get(i, torch.zeros(DIM)) for i in ids.tolist()] or [torch.zeros(DIM)])[: len(ids)]


class CollectiveSparse(nn.Module):
    """Each rank holds the rows of the ids that it owns; a lookup asks all ranks and adds up what they have."""

    def __init__(self, failing_rank: int | None = None) -> None:
        super().__init__()
        self.table = Table()
        self.failing_rank = failing_rank

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if dist.get_rank() == self.failing_rank:
            raise ValueError("only here")
        ids = batch.pop("ids")
        asked: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(asked, ids)
        flat = torch.cat(asked)
        mine = (flat & 65535) // 32768 == dist.get_rank()
        found = torch.zeros(len(flat), DIM)
        found[mine] = self.table(flat[mine])
        dist.all_reduce(found)
        begin = sum(len(some) for some in asked[: dist.get_rank()])
        return {"user": found[begin : begin + len(ids)], "price": batch["price"]}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.exported = False
        self.first = nn.Linear(DIM + 1, 6)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Sequential(nn.ReLU(), nn.Linear(6, 2))

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        hidden = self.norm(self.first(torch.cat([inputs["user"], inputs["price"]], 1)))
        scores = torch.sigmoid(self.last(hidden))
        return {"ctr": scores[:, 0], "like": scores[:, 1]}


class Model(nn.Module):
    def __init__(self, failing_rank: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.sparse = CollectiveSparse(failing_rank)
        self.dense = Dense()


def wrap_ddp(dense: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(dense)


def wrap_compiled_ddp(dense: nn.Module) -> nn.Module:
    return torch.compile(nn.parallel.DistributedDataParallel(torch.compile(dense, backend="eager")), backend="eager")


def wrap_fsdp1(dense: nn.Module, *, use_orig_params: bool = False) -> nn.Module:
    dense.last = FullyShardedDataParallel(dense.last, device_id=CPU, use_orig_params=use_orig_params)
    return FullyShardedDataParallel(dense, device_id=CPU, use_orig_params=use_orig_params)


def wrap_fsdp1_orig(dense: nn.Module) -> nn.Module:
    return wrap_fsdp1(dense, use_orig_params=True)


def wrap_fsdp2(dense: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(dense.last, mesh=mesh)
    return fully_shard(dense, mesh=mesh)


def wrap_tensor_parallel(dense: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(dense, mesh, {"first": ColwiseParallel(output_layouts=Replicate())})


WRAPPERS = [wrap_ddp, wrap_compiled_ddp, wrap_fsdp1, wrap_fsdp1_orig, wrap_fsdp2, wrap_tensor_parallel]


def copy_each(rank: int, has_run: bool) -> dict[str, list[str]]:
    """Return what is wrong with the copy of each wrapped dense arch."""
    found: dict[str, list[str]] = {}
    for wrap in WRAPPERS:
        plain = Model().dense
        wrapped = wrap(Model().dense)
        inputs = {"user": torch.ones(4, DIM), "price": torch.ones(4, 1)}
        if has_run and wrap is not wrap_compiled_ddp:
            wrapped.eval()
            with torch.no_grad():
                wrapped(inputs)
        copied = copy_dense_arch(wrapped)
        wrong = found[wrap.__name__] = []
        if [type(m) for m in copied.modules()] != [type(m) for m in plain.modules()]:
            wrong.append(f"modules: {copied}")
        state = copied.state_dict()
        if list(state) != list(plain.state_dict()):
            wrong.append(f"keys: {list(state)}")
        wrong += [name for name, tensor in plain.state_dict().items() if not torch.equal(state[name], tensor)]
        wrong += [name for name, p in copied.named_parameters() if type(p) is not nn.Parameter or not p.requires_grad]
        expected = plain.eval()(inputs)["ctr"]
        if not torch.allclose(copied(inputs)["ctr"], expected):
            wrong.append("outputs")
        if has_run and wrap is not wrap_compiled_ddp:  # the caller's is as usable as before
            with torch.no_grad():
                again = wrapped(inputs)["ctr"]
            if not torch.allclose(again, expected):
                wrong.append("the wrapped one is spoilt")
    return found


@pytest.mark.parametrize("has_run", [False, True])
def test_wrapped_and_sharded_parameters_are_gathered(has_run: bool, tmp_path: Path) -> None:
    for found in run_ranks(copy_each, 2, tmp_path / "store", has_run):
        assert found == {wrap.__name__: [] for wrap in WRAPPERS}


# ---- whole exports -----------------------------------------------------------------------------------------------

IDS = np.arange(-20, 40) * 1009


def trained_state(prefix: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {f"{prefix}{name}": torch.rand_like(t.float()).to(t.dtype) for name, t in Dense().state_dict().items()}


def write_source(folder: Path, prefix: str = "dense.module.") -> Path:
    rows = np.stack([np.full(DIM, i % 97, np.float32) for i in IDS])
    tables = {"user": split_table(IDS, {"embedding": rows, "sparse_adam_exp_avg": rows}, 2)}
    return write_checkpoint(folder, tables, model_state=trained_state(prefix))


def batches(rank: int) -> list[tuple[bool, dict[str, torch.Tensor]]]:
    ids = torch.from_numpy(IDS[rank * 10 : rank * 10 + 5].copy())
    return [(False, {"ids": ids, "price": torch.full((5, 1), float(rank))})]


def make_exporter(model: nn.Module, dataset: Any, folder: str, name: str, **settings: Any) -> dist_export.Exporter:
    return exports.exporter(
        model, "sparse", "dense", dataset, f"{folder}/ckpt", f"{folder}/{name}", filter_sparse_opt=True, **settings
    )


def local_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's parameters and buffers, DTensors by their local part."""
    return {
        name: (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().clone()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


def hooks_of(model: nn.Module) -> list[int]:
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def export_twice(rank: int, folder: str) -> list[str]:
    """Return what the exports changed in a job that goes on, for each wrapper."""
    wrong: list[str] = []
    for wrap in (wrap_ddp, wrap_fsdp1_orig, wrap_fsdp2):
        model = Model()
        model.dense = wrap(model.dense)
        model.sparse.table.rows = {int(IDS[0]): torch.full((DIM,), -1.0), int(IDS[12]): torch.full((DIM,), -2.0)}
        optimizer = torch.optim.Adam(model.dense.parameters())
        model.train()
        inputs = {"user": torch.ones(4, DIM), "price": torch.rand(4, 1)}
        model.dense(inputs)["ctr"].sum().backward()
        optimizer.step()
        dataset = batches(rank)
        before = local_state(model)
        rows = copy.deepcopy(model.sparse.table.rows)
        hooks, training = hooks_of(model), [m.training for m in model.modules()]
        manifests = [
            make_exporter(model, dataset, folder, f"{wrap.__name__}{i}", dense_optimizer=optimizer).export()
            for i in range(2)
        ]
        after = local_state(model)
        wrong += [f"{wrap.__name__}: {name} changed" for name in before if not torch.equal(before[name], after[name])]
        if hooks_of(model) != hooks or [m.training for m in model.modules()] != training:
            wrong.append(f"{wrap.__name__}: hooks or mode")
        if any(p.grad is not None for p in model.dense.parameters()):
            wrong.append(f"{wrap.__name__}: gradients are there")
        if any(getattr(m, "exported", False) for m in model.modules()):
            wrong.append(f"{wrap.__name__}: exported")
        if any(not torch.equal(model.sparse.table.rows[i], row) for i, row in rows.items()):
            wrong.append(f"{wrap.__name__}: rows")
        if list(dataset[0][1]) != ["ids", "price"]:
            wrong.append(f"{wrap.__name__}: the dataset's own dict was emptied")
        if manifests[0].digest != manifests[1].digest:
            wrong.append(f"{wrap.__name__}: digests differ")
        if manifests[0].run["sample"]["asked"] != {"user": 10} or manifests[0].run["sample"]["missing"] != {"user": 0}:
            wrong.append(f"{wrap.__name__}: {manifests[0].run['sample']}")
        model.dense(inputs)["ctr"].sum().backward()  # training goes on
        optimizer.step()
        total = torch.ones(1)
        dist.all_reduce(total)
        if total.item() != dist.get_world_size():
            wrong.append(f"{wrap.__name__}: the job's own group")
    return wrong


def test_two_exports_in_a_running_job_leave_the_model_as_it_was(tmp_path: Path) -> None:
    write_source(tmp_path / "ckpt")
    assert run_ranks(export_twice, 2, tmp_path / "store", str(tmp_path), timeout=240) == [[], []]
    trained = trained_state("")
    for name in ("wrap_ddp0", "wrap_fsdp1_orig1", "wrap_fsdp20"):
        package = tmp_path / name
        program = load_program(package / "fx_user_model" / "exported_model.pt")
        weights = {key.removeprefix("dense_arch."): tensor for key, tensor in program.state_dict.items()}
        for key in ("first.weight", "norm.running_mean", "last.1.bias"):
            assert torch.equal(weights[key], trained[key]), f"{name}: {key} is not the checkpoint's"
        sample = pickle.loads((package / "fx_user_model" / "inputs_dict.pkl").read_bytes())
        expected = torch.tensor([[float(i % 97)] * DIM for i in IDS[:5]])
        assert torch.equal(sample["user"], expected), f"{name}: the sample does not have the checkpoint's rows"


def export_and_tell(rank: int, folder: str, failing_rank: int | None, empty_rank: int | None) -> tuple[str, str, float]:
    """Return the kind and text of the error, and after how many seconds it came."""
    dataset = [] if rank == empty_rank else batches(rank)
    started = time.monotonic()
    try:
        make_exporter(Model(failing_rank), dataset, folder, "out").export()
    except DistExportError as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "", "", time.monotonic() - started


def test_a_rank_without_a_batch_is_named_on_all_ranks(tmp_path: Path) -> None:
    write_source(tmp_path / "ckpt", "dense.")
    for kind, text, seconds in run_ranks(export_and_tell, 3, tmp_path / "store", str(tmp_path), None, 1):
        assert kind == "StepFailedError"
        assert "no batch on rank 1;" in text
        assert seconds < 30
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_sparse_arch_that_fails_on_one_rank_ends_that_rank_with_its_own_error(
    failing_rank: int, tmp_path: Path
) -> None:
    write_source(tmp_path / "ckpt", "dense.")
    other = 1 - failing_rank
    results = run_ranks(export_and_tell, 2, tmp_path / "store", str(tmp_path), failing_rank, None, may_end=(other,))
    kind, text, seconds = results[failing_rank]
    assert kind == "ModelError"
    assert "ValueError: only here at" in text
    assert "test_dense_ranks.py" in text
    assert seconds < 30
    assert results[other] is None or results[other][0], "the other rank waited in the arch's own collective until then"


def test_a_sparse_arch_that_fails_on_all_ranks_is_told_once(tmp_path: Path) -> None:
    write_source(tmp_path / "ckpt", "dense.")
    for kind, text in run_ranks(fail_everywhere, 2, tmp_path / "store", str(tmp_path)):
        assert kind == "StepFailedError"
        assert text.count("the sparse arch fails on the sample batch: KeyError: 'ids'") == 1


def fail_everywhere(rank: int, folder: str) -> tuple[str, str]:
    try:
        make_exporter(Model(), [{"price": torch.ones(2, 1)}], folder, "out").export()
    except DistExportError as error:
        return type(error).__name__, str(error)
    return "", ""


def export_with_missing_keys(rank: int, folder: str) -> tuple[str, str]:
    model = Model()
    model.dense = wrap_ddp(model.dense)
    try:
        make_exporter(model, batches(rank), folder, "out").export()
    except DistExportError as error:
        return type(error).__name__, str(error)
    return "", ""


def test_what_rank_0_finds_wrong_with_model_pt_is_everyones_error(tmp_path: Path) -> None:
    write_source(tmp_path / "ckpt", "dense.")
    state = trained_state("dense.")
    del state["dense.norm.bias"]
    torch.save(state, tmp_path / "ckpt" / "model.pt")
    for kind, text in run_ranks(export_with_missing_keys, 2, tmp_path / "store", str(tmp_path)):
        assert kind == "StepFailedError"
        assert "rank 0" in text
        assert "missing: norm.bias" in text
