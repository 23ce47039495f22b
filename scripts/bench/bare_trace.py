"""What any exporter of the small model must pay: torch, a gloo group, and the trace of the dense arch on rank 0."""

from __future__ import annotations

import torch
import torch.distributed as dist

from scripts.bench.command_model import BATCH_SIZE, NAMES, SOURCE, DenseArch


def main() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        batch = torch.export.Dim("batch", min=1, max=204800)
        blocks = {name: torch.zeros(BATCH_SIZE, SOURCE.dim) for name in NAMES}
        shapes = ({name: {0: batch} for name in NAMES},)
        torch.export.export(DenseArch().eval(), (blocks,), dynamic_shapes=shapes)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
