"""Write what a TorchRec job leaves: a DCP checkpoint whose tables were sharded over two ranks, with Adam's moments.

Nothing of torchrec is needed for that: its sharded tables are saved as tensors in chunks, and named as here.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

RANKS = 2
PREFIX = "ebc.embedding_bags."


def table_fqn(name: str) -> str:
    """Return the name of a table's parameter within the model, which is what the package calls it."""
    return f"{PREFIX}{name}.weight"


def write_source(job: dict[str, Any], *, by: str) -> None:
    """Turn the rows of a generated checkpoint into a DCP checkpoint, sharded ``by`` rows or columns. Two processes."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as meeting:
        mp.spawn(_write_share, (job["source"], job["target"], by, str(Path(meeting) / "store")), nprocs=RANKS)


def _write_share(rank: int, source: str, target: str, by: str, meeting: str) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    placement = [Shard(0 if by == "rows" else 1)]
    weights, moments = {}, {}
    for name, rows in read_tables(Path(source)):
        whole = torch.from_numpy(rows)
        local = whole.tensor_split(RANKS, 0 if by == "rows" else 1)[rank].contiguous()
        size: dict[str, Any] = {"shape": whole.shape, "stride": whole.stride()}
        weights[table_fqn(name)] = DTensor.from_local(local, mesh, placement, run_check=False, **size)
        moments[table_fqn(name)] = {
            slot: DTensor.from_local(torch.zeros_like(local), mesh, placement, run_check=False, **size)
            for slot in ("exp_avg", "exp_avg_sq")
        }
    state = {"model": weights, "optim": {"state": moments, "param_groups": [{"lr": 0.1}]}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(target))
    dist.destroy_process_group()


def read_tables(source: Path) -> list[tuple[str, np.ndarray]]:
    """Return name and rows (float32 (rows, dim)) of each table of a generated checkpoint, its parts one behind the other."""
    from safetensors import safe_open

    parts: dict[str, dict[int, np.ndarray]] = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118 -- no dict
                stem, _, part = key.partition("/part_")
                table, _, slot = stem.rpartition(".")
                if slot == "embedding":
                    parts.setdefault(table, {})[int(part.split("_")[0])] = file.get_tensor(key)
    return [
        (table, np.concatenate([pieces[part] for part in sorted(pieces)])) for table, pieces in sorted(parts.items())
    ]
