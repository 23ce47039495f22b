"""``verify`` under torchrun: the ranks share the work and one of them speaks, with the same words whatever their number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dist_export.verify.verify import verify
from tests.support import exports, tiny_model
from tests.support.distributed.warm_torchrun import torchrun
from tests.support.recis_writer import PartSpec, make_tables, write_checkpoint
from tests.support.warm import run_command

pytestmark = pytest.mark.distributed


def run(world_size: int, path: Path, *arguments: str):
    return run_command(world_size, "-m", "dist_export", "verify", str(path), *arguments)


def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    """Digests, ids in bounded memory and values that are not finite: told once, in one order; all ranks exit alike."""
    nan = np.ones((4, 1), np.float32)
    nan[2] = np.nan
    parts = [
        PartSpec(np.array([1, 2, 1, 70000]), {"embedding": nan}, (0, 40000, 65536)),
        PartSpec(np.array([50000, 2, 7, 8]), {"embedding": nan}, (40000, 65536, 65536)),
    ]
    folder = write_checkpoint(tmp_path / "c", {"odd": parts, **make_tables({"t": 500}, 2)})
    expected = verify(str(folder), finite=True).as_json()
    assert {finding["check"] for finding in expected["findings"]} == {"slice", "unique", "finite"}
    asked = ("--finite", "--json", "--threads", "2", "--max_memory", "16MiB")
    done = torchrun(2, "-m", "dist_export", "verify", str(folder), *asked)
    assert json.loads(done.stdout) == expected
    assert done.returncode == 1
    assert "exitcode  : 1" in done.stderr


def test_two_ranks_verify_a_package_with_its_program(tmp_path: Path) -> None:
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    settings = {
        "model": tiny_model.MODEL,
        "dataset": tiny_model.DATASET,
        "filter_sparse_opt": True,
    }
    exports.export({"ckpt_dir": str(source), "export_dir": str(tmp_path / "out"), **settings})
    done = run(2, tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == verify(str(tmp_path / "out")).render()
    shard = next((tmp_path / "out").glob("model-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = run(2, tmp_path / "out")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "unsound: package with 1 finding"


def test_what_cannot_be_asked_is_told_once(tmp_path: Path) -> None:
    done = run(2, tmp_path / "nowhere")
    assert done.codes == [2, 2]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dist_export: ")]
    assert "nowhere: does not exist" in line
    assert done.stdout == ""
