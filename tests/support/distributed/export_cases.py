"""Export fixtures for numbers of shards in one job: all, if started alone; a third by torchrun. usage: FIXTURES OUT THREADS"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed as dist

import dist_export
from tests.support.fixture_cases import CASES, NUM_SHARDS, share_pairs


def main(fixtures: Path, out: Path, threads: int) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")  # one group for all exports, as inside a training job
    for case, num_shards in share_pairs(CASES, NUM_SHARDS, int(os.environ.get("WORLD_SIZE", "1"))):
        dist_export.export(
            {
                "ckpt_dir": str(fixtures / case),
                "export_dir": str(out / case / str(num_shards)),
                "filter_sparse_opt": True,
                "num_shards": num_shards,
                "threads": threads,
            }
        )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
