"""launch/torchx_component.py by TorchX itself, with its scheduler for one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dist_export
from tests.support import ROOT
from tests.support.distributed import crash
from tests.support.needed import lack
from tests.support.recis_writer import make_tables, read_back, write_checkpoint

pytestmark = pytest.mark.distributed

TORCHX = ROOT / ".venv-launch" / "bin" / "torchx"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    if not TORCHX.exists():
        lack(f"no {TORCHX}; scripts/install_tools.sh makes it")
    return subprocess.run(
        [str(TORCHX), "run", *arguments],
        cwd=ROOT, env=crash.environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def component(config: Path, *arguments: str) -> list[str]:
    port = str(crash.free_port())
    return [
        *("launch/torchx_component.py:export", "--config", str(config), "--python", sys.executable, "--port", port),
        *arguments,
    ]


def test_torchx_exports_on_two_replicas(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 50, "u": 30}, 2))
    config, out = tmp_path / "export.yaml", tmp_path / "out"
    config.write_text(f"ckpt_dir: {tmp_path / 'ckpt'}\nexport_dir: {tmp_path / 'unused'}\nfilter_sparse_opt: true\n")
    done = run(
        "--wait", "--log", "-s", "local_cwd", "-cfg", f"log_dir={tmp_path / 'logs'}",
        *component(config, "-j", "2x1", "--", "--export_dir", str(out), "--num_shards", "3"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert dist_export.open_package(out).manifest.run["world_size"] == 2
    assert set(read_back(out)) == {"t", "u"}
    assert len([name for name in os.listdir(out) if name.endswith(".safetensors")]) == 3


def test_the_request_to_kubernetes(tmp_path: Path) -> None:
    """It renders without a cluster; machine 0 is told localhost by TorchX, the others its name."""
    done = run(
        "--dryrun", "--workspace", "", "-s", "kubernetes", "-cfg", "queue=default",
        *component(Path("/data/export.yaml"), "-j", "2x4", "--image", "example.com/dist_export:0.1"),
        *("--env", "ZONE=7", "--mounts"),
        "type=volume,src=training,dst=/data,readonly,type=volume,src=serving,dst=/serving",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "apiVersion: batch.volcano.sh/v1alpha1" in done.stdout
    assert done.stdout.count("image: example.com/dist_export:0.1") == 2
    assert done.stdout.count('MASTER_ADDR="${TORCHX_RANK0_HOST:-localhost}"') == 1
    assert done.stdout.count('MASTER_ADDR="${VC_EXPORT_0_HOSTS:-localhost}"') == 1
    for claim, path in (("training", "/data"), ("serving", "/serving")):
        assert done.stdout.count(f"claimName: {claim}") == 2
        assert done.stdout.count(f"mountPath: {path}") == 2
    assert done.stdout.count("readOnly: true") == 2, "the source, on both machines"
    for name, value in (
        ("ZONE", "7"),
        ("NNODES", "2"),
        ("NPROC_PER_NODE", "4"),
        ("NODE_RANK", "0"),
        ("NODE_RANK", "1"),
    ):
        assert f"- name: {name}\n            value: '{value}'" in done.stdout, name


def test_a_mistake_fails_the_app(tmp_path: Path) -> None:
    config = tmp_path / "export.yaml"
    config.write_text(f"ckpt_dir: {tmp_path / 'nowhere'}\nexport_dir: {tmp_path / 'out'}\n")
    done = run(
        "--wait", "--log", "-s", "local_cwd", "-cfg", f"log_dir={tmp_path / 'logs'}", *component(config, "-j", "1x2")
    )
    assert done.returncode != 0
    assert "nowhere: does not exist" in done.stdout + done.stderr
    assert "(exit code 2, of which torchrun makes 1)" in done.stdout + done.stderr


def test_machines_and_ranks_that_make_no_sense(tmp_path: Path) -> None:
    done = run("--dryrun", "-s", "local_cwd", *component(tmp_path / "export.yaml", "-j", "2x0"))
    assert done.returncode != 0
    assert "-j is '2x0'; give machines and ranks of each, such as 2x4" in done.stdout + done.stderr
