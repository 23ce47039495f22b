"""The command line under torchrun, with real ranks: whole exports, and how failures are told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import dist_export
from tests.distributed import test_worlds
from tests.support import tiny_model
from tests.support.distributed.warm_torchrun import torchrun
from tests.support.recis_writer import make_tables, read_back, truth_of, write_checkpoint
from tests.support.warm import run_command

pytestmark = pytest.mark.distributed

DENSE = ["--model", tiny_model.MODEL, "--dataset", tiny_model.DATASET]


def export_warm(world_size: int, source: Path, target: Path, *arguments: str):
    """Warm ranks without a launcher, where nothing of it is looked at."""
    return run_command(
        world_size, "-m", "dist_export", "--ckpt_dir", str(source), "--export_dir", str(target), *arguments
    )


def own_lines(text: str) -> list[str]:
    """Return what the export itself said of its failure, without the launcher's report."""
    return [line for line in text.splitlines() if line.startswith("dist_export: ")]


def test_two_ranks_export_a_model_that_serves_its_rows(tmp_path: Path) -> None:
    """The whole job: tables, dense arch, parity, manifest; the package alone gives rows and scores."""
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    config = tmp_path / "export.yaml"
    config.write_text(
        f"ckpt_dir: {source}\nexport_dir: {tmp_path / 'unused'}\nfilter_sparse_opt: true\n"
        f"model: {tiny_model.MODEL}\nmodel_args: {{width: 3}}\ndataset: {tiny_model.DATASET}\n"
    )
    target = tmp_path / "package"
    done = test_worlds.torchrun(
        2, "-m", "dist_export", "--config", str(config), "--export_dir", str(target), "--model_args.width", "8"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "outputs  ctr, like" in done.stdout
    assert done.stdout.count("package:") == 1, "one rank speaks"
    package = dist_export.open_package(target)
    truth = truth_of(tiny_model.tables())["user_emb"]
    rows, found = package.lookup("user_emb", truth["id"])
    assert found.all()
    assert np.array_equal(rows, truth["embedding"])
    assert [tensor.name for tensor in package.manifest.dense.outputs] == ["ctr", "like"]
    assert package.manifest.parity.batch_sizes == (5, 1, 2, 301)
    assert set(read_back(target)) == {"user_emb", "item_emb"}


def test_events_of_all_ranks_belong_to_their_attempt(tmp_path: Path) -> None:
    """A refused export of other settings is one more attempt, and leaves the figures of the package as they were."""
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    told = ["--filter_sparse_opt=true", "--events=true", f"--metrics={tmp_path / 'm.prom'}"]
    assert export_warm(2, source, tmp_path / "out", *told).returncode == 0
    figures = (tmp_path / "m.prom").read_text()
    assert export_warm(2, source, tmp_path / "out", "--num_shards=3", *told).returncode == 1
    assert (tmp_path / "m.prom").read_text() == figures
    events = [json.loads(line) for line in (tmp_path / "out.events.jsonl").read_text().splitlines()]
    assert {event["rank"] for event in events if event["event"] == "moved"} == {0, 1}
    ends = [(e["attempt"], e["event"]) for e in events if e["event"] in ("started", "committed", "failed")]
    assert ends == [(1, "started"), (1, "committed"), (2, "started"), (2, "failed")]


def test_a_shared_mistake_is_told_once(tmp_path: Path) -> None:
    """Every rank meets the same fault; rank 0 says it in one line, and nothing is written."""
    command = ("-m", "dist_export", "--ckpt_dir", str(tmp_path / "nowhere"), "--export_dir", str(tmp_path / "out"))
    done = torchrun(2, *command)
    assert done.returncode == 1
    (line,) = own_lines(done.stderr)
    assert "nowhere: does not exist" in line
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_misspelt_setting_is_told_once(tmp_path: Path) -> None:
    done = export_warm(2, tmp_path, tmp_path / "out", "--filter_sparse_opts", "true")
    (line,) = own_lines(done.stderr)
    assert "did you mean filter_sparse_opt?" in line


def test_failure_on_one_rank_is_everyones(tmp_path: Path) -> None:
    """A rank that cannot write names itself through rank 0; no manifest is left."""
    source = tmp_path / "ckpt"
    write_checkpoint(source, make_tables({"t": 500}, 2))
    script = tmp_path / "broken.py"
    script.write_text(
        "import errno, os, sys\n"
        "from dist_export.transfer.executor import Transfer\n"
        "real = Transfer.write\n"
        "def write(self):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise OSError(errno.ENOSPC, 'No space left on device', 'model-x')\n"
        "    return real(self)\n"
        "Transfer.write = write\n"
        "from dist_export.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    target = tmp_path / "out"
    done = torchrun(
        2, str(script), "--ckpt_dir", str(source), "--export_dir", str(target), "--filter_sparse_opt", "true"
    )
    assert done.returncode == 1
    (line,) = own_lines(done.stderr)
    assert "rank 1 of 2" in line
    assert "No space left on device" in line
    assert "exitcode  : 1" in done.stderr
    assert not (target / "manifest.json").exists()
    again = export_warm(2, source, target, "--filter_sparse_opt", "true")
    assert again.returncode == 0, again.stderr[-3000:]
    assert dist_export.open_package(target).manifest.tables[0].rows_out == 500


def test_a_killed_rank_leaves_no_manifest_and_the_rerun_completes(tmp_path: Path) -> None:
    """SIGKILL in the middle of the transfer: nobody hangs, nothing looks like a package, the next run finishes."""
    source = tmp_path / "ckpt"
    write_checkpoint(source, make_tables({"t": 500, "u": 300}, 4))
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from dist_export.transfer.executor import Transfer\n"
        "real = Transfer.finish\n"
        "def finish(self, wait):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, wait)\n"
        "Transfer.finish = finish\n"
        "from dist_export.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    target = tmp_path / "out"
    arguments = ["--filter_sparse_opt", "true", "--num_shards", "3"]
    done = torchrun(2, str(script), "--ckpt_dir", str(source), "--export_dir", str(target), *arguments)
    assert done.returncode != 0
    assert not (target / "manifest.json").exists()
    again = export_warm(2, source, target, *arguments)
    assert again.returncode == 0, again.stderr[-3000:]
    assert sorted(read_back(target)) == ["t", "u"]
    assert not [name for name in os.listdir(target) if name.startswith(".")], "nothing of the attempt is left"


def test_memory_target_needs_one_rank(tmp_path: Path) -> None:
    source = tmp_path / "ckpt"
    write_checkpoint(source, make_tables({"t": 10}, 1))
    done = run_command(2, "-m", "dist_export", "--ckpt_dir", str(source), "--export_dir", "memory://out")
    (line,) = own_lines(done.stderr)
    assert "one process" in line


def test_a_rank_without_a_batch_is_named(tmp_path: Path) -> None:
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    done = export_warm(
        2,
        source,
        tmp_path / "out",
        "--model",
        tiny_model.MODEL,
        "--dataset",
        "tests.support.tiny_model:build_empty_dataset",
    )
    (line,) = own_lines(done.stderr)
    assert "no batch on rank 0, 1" in line
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("is_slow", [False, True])
def test_a_parity_failure_stops_the_commit(tmp_path: Path, is_slow: bool) -> None:
    """A model that takes another way for a batch of one is caught, on every rank, with exit code 1.

    Rank 0 hosts the store where there is no torchrun: a rank that is slow to leave must not find it gone, and say so as well.
    """
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    target = tmp_path / "out"
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "from dist_export.runtime.ranks import Ranks\n"
        "real = Ranks.tell_once\n"
        "def tell_once(self, tell):\n"
        "    real(self, tell)\n"
        f"    time.sleep({float(is_slow)} * self.rank)\n"
        "Ranks.tell_once = tell_once\n"
        "from dist_export.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    places = ("--ckpt_dir", str(source), "--export_dir", str(target))
    code = ("--model", "tests.support.tiny_model:build_branching_model", "--dataset", tiny_model.DATASET)
    done = run_command(2, str(script), *places, *code)
    assert done.returncode == 1
    (line,) = own_lines(done.stderr)
    assert "at batch size 1" in line
    assert not (target / "manifest.json").exists()


def test_plan_under_torchrun_environment_counts_its_ranks(tmp_path: Path) -> None:
    source = tmp_path / "ckpt"
    write_checkpoint(source, make_tables({"t": 100}, 2))
    done = torchrun(
        1, "-m", "dist_export", "plan", "--ckpt_dir", str(source), "--export_dir", str(tmp_path / "out"),
        "--filter_sparse_opt", "true", "--world_size", "3", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert len(report["files"]) == len(report["ranks"]) == 3
    assert not (tmp_path / "out").exists()
