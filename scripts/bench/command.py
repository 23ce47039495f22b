"""The scenario that times the whole command: what an export of a small model costs beyond starting torch and tracing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from scripts.bench.command_model import SOURCE, write_dense_state
from scripts.bench.generate import generate
from scripts.bench.processes import ROOT, TIMEOUT_SECS, ContenderError
from scripts.bench.report import render_table, spread
from scripts.bench.scenarios import Bench

_CONFIG = """\
ckpt_dir: {source}
export_dir: {target}
filter_sparse_opt: true
num_shards: 2
model: scripts.bench.command_model:build_model
dataset: scripts.bench.command_model:build_dataset
export_outputs: [ctr, like]
"""


def run_command(bench: Bench) -> None:
    """torchrun with 2 ranks: the export of a small model, and a bare script that traces the same dense arch. Not on disk."""
    home = bench.place.directory / "command"
    target = home / "package"
    whole: list[float] = []
    bare: list[float] = []
    try:
        source = generate(home / "source", SOURCE)
        write_dense_state(source)
        config = home / "export.yaml"
        config.write_text(_CONFIG.format(source=source, target=target), encoding="utf-8")
        for number in range(bench.rounds + 1):
            pair = [
                (whole, "the command", ["-m", "dist_export", "--config", str(config)]),
                (bare, "the bare script", ["-m", "scripts.bench.bare_trace"]),
            ]
            for seconds, label, arguments in pair if number % 2 else reversed(pair):
                taken = _time_torchrun(label, arguments)
                if number:  # the first run of each is not counted
                    seconds.append(taken)
                if target.exists():
                    if number == 0:
                        _judge(target)
                    shutil.rmtree(target)
    except Exception as error:  # noqa: BLE001 -- whatever it was is told, and the benchmarks end with exit code 1
        bench.fail("command", error)
        return
    finally:
        shutil.rmtree(home, ignore_errors=True)
    difference = spread(a - b for a, b in zip(whole, bare, strict=True))
    bench.results.append({"case": "command", "where": bench.place.name, "command": whole, "bare": bare})
    rows = [
        ["torchrun -m dist_export", str(spread(whole))],
        ["torchrun of a bare script that traces", str(spread(bare))],
        ["difference, round by round", str(difference)],
    ]
    bench.note(
        f"### command: {SOURCE.tables} tables, 2 ranks, {bench.place.name}\n\n"
        + "\n".join(render_table(["what", "seconds"], rows))
    )


def _time_torchrun(label: str, arguments: list[str]) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    begin = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECS, check=False
    )
    seconds = time.monotonic() - begin
    if done.returncode != 0:
        raise ContenderError(f"{label} ended with code {done.returncode}\n{done.stderr[-3000:]}")
    return seconds


def _judge(package: Path) -> None:
    from dist_export.verify.verify import verify

    findings = verify(str(package)).findings
    if findings:
        raise ContenderError(f"the command: the package is not sound: {findings[0]} ({len(findings)} findings)")
