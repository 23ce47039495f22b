"""An export as the last step of a training job, twice in a row: nothing is begun anew, nothing is left behind.

gloo on CPU. Jobs whose default group is nccl get a gloo subgroup in the same way; that has not been tried, for want of GPUs.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_export.errors import DistExportError
from dist_export.verify.verify import verify
from tests.support import exports, tiny_model
from tests.support.distributed.ranks import run_ranks
from tests.support.recis_writer import truth_of

pytestmark = pytest.mark.distributed


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    """One step as a trainer takes it, gradients averaged over the job's own group; they stay in the parameters."""
    optimizer.zero_grad()
    scores = model.dense_arch(model.sparse_arch(batch))
    (scores["ctr"].mean() - scores["like"].mean()).backward()
    for parameter in model.dense_arch.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    optimizer.step()


def hooks_of(module: nn.Module) -> list[tuple[str, list[int]]]:
    """Return the hooks of a module and its parameters, by their ids."""
    found = [
        (name, [id(hook) for hook in value.values()]) for name, value in vars(module).items() if name.endswith("_hooks")
    ]
    return found + [
        (name, [id(hook) for hook in (parameter._backward_hooks or {}).values()])
        for name, parameter in module.named_parameters(recurse=False)
    ]


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return all that must be as it was, as plain values."""
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: hooks_of(module) for name, module in model.named_modules()},
        "keys": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "parameters": {
            name: (
                id(parameter),
                parameter.requires_grad,
                str(parameter.device),
                parameter._version,
                parameter.data_ptr(),
            )
            for name, parameter in model.named_parameters()
        },
        "values": {name: value.numpy().tobytes() for name, value in model.state_dict().items()},
        "grads": {
            name: None if parameter.grad is None else (id(parameter.grad), parameter.grad.numpy().tobytes())
            for name, parameter in model.named_parameters()
        },
        "rows": {
            name: {key: row.numpy().tobytes() for key, row in module._rows.items()}
            for name, module in model.named_modules()
            if isinstance(module, tiny_model.LookalikeTable)
        },
    }


def job_state() -> dict[str, Any]:
    """Return what of the process and its job must be as it was."""
    world = dist.distributed_c10d._world
    return {
        "groups": sorted(world.pg_names.values()),
        "default": id(dist.group.WORLD),
        "signals": {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)},
        "torch": (
            torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().numpy().tobytes(),
        ),
        "numpy": np.random.get_state()[1].tobytes(),  # noqa: NPY002 -- it is the job's
        "place": (os.getcwd(), list(sys.path), dict(os.environ)),
    }  # fmt: skip


def held() -> tuple[list[str], int, list[str]]:
    """Return the Python threads, the number of the process's threads, and what its descriptors are open on."""
    gc.collect()
    descriptors = []
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # the listing's own
            continue
    kinds = sorted(
        text.split(":")[0] if text.startswith(("socket", "pipe", "anon_inode")) else text for text in descriptors
    )
    return sorted(thread.name for thread in threading.enumerate()), len(os.listdir("/proc/self/task")), kinds


def settled(expected: tuple[list[str], int, list[str]]) -> tuple[list[str], int, list[str]]:
    """Return what is held once it is what is expected, or after some seconds: gloo takes a while to close its pairs."""
    deadline = time.monotonic() + 5
    while (now := held()) != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    return now


def last_step(rank: int, source: Path, out: Path) -> None:
    """Train, export twice, with one in between that fails, train on."""
    model = tiny_model.build_model()
    truth = {name: truth_of(tiny_model.tables())[name] for name in ("user_emb", "item_emb")}
    for table, name in ((model.sparse_arch.user, "user_emb"), (model.sparse_arch.item, "item_emb")):
        table.insert(torch.from_numpy(truth[name]["id"]), torch.from_numpy(truth[name]["embedding"]))
    seen: list[str] = []
    model.dense_arch.hidden.register_forward_hook(lambda *_: seen.append("forward"))
    model.dense_arch.out.weight.register_hook(lambda grad: grad)
    model.dense_arch.norm.eval()  # as where a trainer freezes it: the modes differ from module to module
    model.dense_arch.hidden.bias.requires_grad_(False)
    optimizer = torch.optim.Adam([value for value in model.dense_arch.parameters() if value.requires_grad])
    batch = tiny_model.build_dataset()[0][1]
    train(model, optimizer, batch)

    begun: list[Any] = []
    real = dist.init_process_group
    dist.init_process_group = lambda *arguments, **options: (begun.append(arguments), real(*arguments, **options))
    before, of_job, held_before = model_state(model), job_state(), held()
    for name in ("first", "failed", "second"):
        export = exports.exporter(
            model, "sparse_arch", "dense_arch", tiny_model.build_dataset(),
            source if name != "failed" else source / "nowhere", out / name,
            export_outputs=["ctr", "like"], filter_sparse_opt=True, num_shards=2,
        ).export  # fmt: skip
        if name == "failed":
            with pytest.raises(DistExportError, match="does not exist"):
                export()
        else:
            export()
        for expected, now in ((before, model_state(model)), (of_job, job_state())):
            assert now.keys() == expected.keys()
            for what, state in expected.items():
                assert now[what] == state, f"the {name} export changed {what}"
        assert settled(held_before) == held_before, f"threads or descriptors are left of the {name} export"
        dist.barrier()
    assert begun == [], "no second initialisation"
    train(model, optimizer, batch)
    assert len(seen) >= 2, "the job's own hook runs in its own steps"


@pytest.mark.parametrize("world_size", [1, 2])
def test_nothing_is_left_behind(world_size: int, tmp_path: Path) -> None:
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    run_ranks(last_step, world_size, tmp_path / "store", source, tmp_path, timeout=150)
    for name in ("first", "second"):
        assert verify(str(tmp_path / name)).findings == []
    assert not (tmp_path / "failed").exists()
