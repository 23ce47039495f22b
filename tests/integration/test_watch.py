"""``watch``: each checkpoint of a run becomes the current version, and readers see the state of each; what it survives."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tritonclient import http as triton

import dist_export
from dist_export.cli import main
from dist_export.pipeline import steps
from dist_export.registry.versions import VersionDirectory
from dist_export.runtime.lasting_ranks import LastingRanks
from dist_export.serve.served import Watcher
from dist_export.watch.command import read_rules, watch
from dist_export.watch.loop import Watch
from tests.support import ROOT, exports
from tests.support import score_models as models
from tests.support.deltas import manifest_of
from tests.support.recis_writer import make_rows, split_table, write_checkpoint
from tests.support.served import infer, running

NUM_ROWS = 400
State = tuple[np.ndarray, np.ndarray]
"""Ids and their rows."""


def state_of(step: int) -> State:
    """Return the rows of a step: some change at each, some are new, and some are deleted."""
    ids, slots = make_rows(NUM_ROWS, 4)
    rows = slots["embedding"]
    rows[: 3 * step] += step
    return ids[2 * step : 300 + 4 * step], rows[2 * step : 300 + 4 * step]


def save(run: Path, step: int, *, is_listed: bool = True, has_duplicate: bool = False) -> State:
    """Save a step as RecIS does: the name goes into the list of finished saves last. A duplicate makes its export fail."""
    ids, rows = state_of(step)
    if has_duplicate:
        ids, rows = np.append(ids, ids[0]), np.append(rows, rows[:1], axis=0)
    slots = {"embedding": rows, "sparse_adam_exp_avg": rows * 0.5}
    write_checkpoint(run / f"ckpt_{step}", {"item": split_table(ids, slots, 2)})
    if is_listed:
        list_save(run, step)
    return ids, rows


def list_save(run: Path, step: int) -> None:
    path = run / "checkpoint"
    before = path.read_text() if path.exists() else ""
    path.with_suffix(".new").write_text(f"{before}ckpt_{step}\n")
    path.with_suffix(".new").rename(path)


def assert_is_served(package: dist_export.Package, state: State) -> None:
    ids, rows = state
    found, has_row = package.lookup("item", ids)
    assert has_row.all()
    assert np.array_equal(found, rows)
    others = np.setdiff1d(make_rows(NUM_ROWS, 4)[0], ids)
    assert not package.lookup("item", others)[1].any()


class Scripted(LastingRanks):
    """A rank that does the next thing of a script each time that it would wait, and gets SIGTERM after the last one."""

    def __init__(self, script: Sequence[Callable[[], object]]) -> None:
        super().__init__(0, 1, None, None, owns_default_group=False, timeout_secs=60.0)
        self.script = list(script)

    def wait(self, secs: float) -> None:
        if self.script:
            self.script.pop(0)()
        else:
            self.request_stop("stopped by SIGTERM")


def idle() -> None:
    """Let a poll pass."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return tmp_path / "serving"


def follow(run: Path, where: Path, script: Sequence[Callable[[], object]], **options: Any) -> list[str]:
    """Run the loop until the script ends; return the lines about versions."""
    given = {"ckpt_dir": run, "publish": where, "filter_sparse_opt": True, "score_program": "off", "progress": False}
    argv = [f"--{name}={value}" for name, value in (given | options).items()]
    settings = read_rules(argv)
    lines: list[str] = []
    ranks = Scripted(script)
    Watch(ranks, settings.config, settings.rules, poll_secs=settings.poll_secs, announce=lines.append).run()
    return lines


def current_of(where: Path) -> Any:
    return json.loads((where / "current.json").read_text())


def steps_of(where: Path) -> list[int]:
    return [switch["step"] for switch in reversed(current_of(where)["switches"])]


def kinds_of(where: Path) -> str:
    """Return F for each full package and d for each delta."""
    return "".join("d" if switch["base"] else "F" for switch in reversed(current_of(where)["switches"]))


# ---- readers follow ----


class Client(threading.Thread):
    """Asks the server for rows, one request after the other, and compares each answer with the states that were saved."""

    def __init__(self, address: str, seed: int) -> None:
        super().__init__(daemon=True)
        self._address = address
        self._random = np.random.default_rng(seed)
        self.steps: list[int] = []
        self.failures: list[BaseException] = []
        self.ended = threading.Event()

    def run(self) -> None:
        states = [dict(zip(ids.tolist(), rows, strict=True)) for ids, rows in map(state_of, range(1, 11))]
        universe = make_rows(NUM_ROWS, 4)[0]
        try:
            with triton.InferenceServerClient(self._address) as client:
                while not self.ended.is_set():
                    ids = self._random.choice(universe, 200)
                    found = infer(client, "lookup", {"item": ids})
                    self.steps.append(
                        self._find_step(states, ids, found.as_numpy("item"), found.as_numpy("item.found"))
                    )
        except BaseException as error:
            self.failures.append(error)

    def _find_step(self, states: list[dict[int, Any]], ids: Any, rows: Any, has_row: Any) -> int:
        """Return the step, not before the last one, whose rows these are, all of them."""
        for step in range(max(self.steps, default=1), 11):
            state = states[step - 1]
            expected = [state.get(its) for its in ids.tolist()]
            if [its is not None for its in expected] == has_row.tolist() and all(
                np.array_equal(row, its) for row, its in zip(rows, expected, strict=True) if its is not None
            ):
                return step
        raise AssertionError(f"after step {max(self.steps, default=0)}, these are rows of no later step")


@pytest.mark.parametrize("chain", [1, 8])
def test_a_server_follows_ten_versions_under_load(run: Path, where: Path, chain: int) -> None:
    """Each answer is of one version, none of an earlier version than the last, and no request fails."""
    argv = ["--ckpt_dir", str(run), "--publish", str(where), "--filter_sparse_opt=true", "--poll_secs", "0.05"]
    argv += ["--full_every", "4", "--until_step", "10", "--progress=false", "--max_delta=0.9"]
    argv += [f"--delta_chain={chain}"]
    save(run, 1)
    ranks = LastingRanks(0, 1, None, None, owns_default_group=False, timeout_secs=60.0)
    watching = threading.Thread(target=watch, args=(ranks, argv), daemon=True)
    watching.start()
    wait_for((where / "current.json").exists)
    try:
        with running(Watcher(f"versions:{where}", poll_secs=0.02)) as address:
            clients = [Client(address, seed) for seed in range(2)]
            for client in clients:
                client.start()
            for step in range(2, 11):
                state = save(run, step)
                wait_for(lambda step=step: any(client.steps[-1:] == [step] for client in clients) or failed(clients))
                with dist_export.open_package(f"versions:{where}") as package:
                    assert_is_served(package, state)
            for client in clients:
                client.ended.set()
                client.join()
    finally:
        watching.join(60)
    assert not failed(clients), [client.failures for client in clients]
    assert set().union(*(client.steps for client in clients)) == set(range(1, 11))
    assert steps_of(where) == list(range(1, 11))
    assert kinds_of(where) == "FdddFdddFd"


def failed(clients: Sequence[Client]) -> bool:
    return any(client.failures for client in clients)


def wait_for(has_come: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not has_come():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- what is exported ----


def test_at_the_start_it_goes_on_where_it_was(run: Path, where: Path) -> None:
    save(run, 1)
    assert len(follow(run, where, [idle, idle])) == 1
    before = (where / "current.json").read_bytes()
    assert follow(run, where, [idle, idle]) == []
    assert (where / "current.json").read_bytes() == before
    (line,) = follow(run, where, [lambda: save(run, 2), idle])
    assert "delta, 2 changed, 4 new, 2 deleted; " in line
    assert steps_of(where) == [1, 2]


def test_skipped_checkpoints_are_not_made_up_for(run: Path, where: Path) -> None:
    for step in (1, 2, 3):
        save(run, step)
    follow(run, where, [idle])
    assert steps_of(where) == [3]


def test_a_rollback_lasts_until_the_next_checkpoint(run: Path, where: Path) -> None:
    save(run, 1)
    registry = VersionDirectory()
    script = [lambda: save(run, 2), lambda: registry.rollback(str(where)), idle, idle, lambda: save(run, 3)]
    follow(run, where, script)
    assert steps_of(where) == [1, 2, 1, 3]


@pytest.mark.parametrize(("chain", "depths"), [(1, "0111101"), (2, "0121201"), (8, "0123401")])
def test_deltas_are_counted_though_old_ones_are_removed(run: Path, where: Path, chain: int, depths: str) -> None:
    """Also those on top of each other: ``depths`` says how many deltas each version consists of."""
    options = {"keep_versions": 1, "registry_options": "{versions: {grace_secs: 0}}", "full_every": 5, "max_delta": 9}
    kinds, found = "", ""
    for step in range(1, 8):
        state = save(run, step)
        follow(run, where, [], **options, delta_chain=chain)
        kinds += kinds_of(where)[-1]
        with dist_export.open_package(f"versions:{where}") as package:
            assert_is_served(package, state)
            found += str(len(package.layers) - 1)
    assert kinds == "FddddFd"
    assert found == depths


def test_a_large_delta_makes_the_next_version_full(run: Path, where: Path) -> None:
    save(run, 1)
    follow(run, where, [lambda: save(run, 9), lambda: save(run, 10)], max_delta=0.01)
    assert kinds_of(where) == "FdF"


def test_without_a_list_of_saves_it_waits_until_the_files_rest(run: Path, where: Path) -> None:
    """Headers name no file that is not there yet: a checkpoint that only looks whole must not be published."""
    save(run, 1, is_listed=False)
    looks: list[bool] = []
    follow(run, where, [lambda: looks.append(where.exists()), idle])
    assert looks == [False]
    assert steps_of(where) == [1]


# ---- what it survives ----


def lines_of(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if part in record.getMessage()]


def test_a_damaged_checkpoint_is_reported_once_and_exported_when_it_is_whole(
    run: Path, where: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dist_export")
    save(run, 1)
    content: dict[Path, bytes] = {}

    def damage() -> None:
        save(run, 2)
        shard = next((run / "ckpt_2").glob("*.safetensors"))
        content[shard] = shard.read_bytes()
        shard.write_bytes(content[shard][:-8])

    def mend() -> None:
        for path, data in content.items():
            path.write_bytes(data)

    assert len(follow(run, where, [damage, idle, idle, idle, mend, idle, idle])) == 2
    assert len(lines_of(caplog, "ckpt_2 is passed over")) == 1
    assert steps_of(where) == [1, 2]


def test_a_failed_export_is_reported_once_and_the_next_checkpoint_is_exported(
    run: Path, where: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dist_export")
    save(run, 1)
    lines = follow(run, where, [lambda: save(run, 2, has_duplicate=True), idle, idle, lambda: save(run, 3), idle])
    assert len(lines) == 2
    (line,) = lines_of(caplog, "step 2 is not published")
    assert "\n" not in line
    assert steps_of(where) == [1, 3]
    assert kinds_of(where) == "Fd"


def test_a_full_disk_is_tried_again_though_no_file_has_changed(
    run: Path, where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 1)
    real, left = steps.publish, [1]

    def fail(*arguments: Any) -> Any:
        if left:
            left.pop()
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(steps, "publish", fail)
    monkeypatch.setattr("dist_export.watch.decision._FIRST_RETRY_SECS", 0.2)
    looks: list[bool] = []
    script = [lambda: looks.append((where / "current.json").exists()), lambda: time.sleep(0.3)]
    follow(run, where, script)
    assert looks == [False]
    assert steps_of(where) == [1]


def test_a_base_that_is_removed_makes_the_next_version_full(run: Path, where: Path) -> None:
    save(run, 1)

    def remove_and_save() -> None:
        shutil.rmtree(where / "versions" / current_of(where)["version"])
        save(run, 2)

    lines = follow(run, where, [remove_and_save, idle])
    assert kinds_of(where)[-1] == "F"
    assert "everything was exported, because the base cannot be used" in lines[1]
    with dist_export.open_package(f"versions:{where}") as package:
        assert_is_served(package, state_of(2))


def test_another_publisher_is_no_end(
    run: Path, where: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """current.json changes while the export goes on: the version is published on top of what is current now."""
    caplog.set_level(logging.INFO, "dist_export")
    save(run, 1)
    save(run, 2)
    save(run, 3)
    real, left = steps.publish, [2]

    def publish_in_between(*arguments: Any) -> Any:
        if left:
            step = left.pop()
            settings = {"ckpt_dir": str(run), "publish": str(where), "step": step, "filter_sparse_opt": True}
            exports.export(settings)
        return real(*arguments)

    monkeypatch.setattr(steps, "publish", publish_in_between)
    follow(run, where, [idle, idle])
    assert len(lines_of(caplog, "has changed since this export began")) == 1
    assert steps_of(where) == [2, 3]


@pytest.mark.parametrize("content", ["{", '{"version": "../x"}'])
def test_a_damaged_current_json_waits_for_a_sound_one(
    run: Path, where: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dist_export")
    save(run, 1)
    where.mkdir()
    (where / "current.json").write_text(content)
    follow(run, where, [idle, idle, (where / "current.json").unlink])
    assert len(lines_of(caplog, "is damaged")) == 1
    assert steps_of(where) == [1]


def test_sigterm_within_an_export_gives_it_up_and_the_next_start_goes_on(
    run: Path, where: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dist_export")
    save(run, 1)
    real = steps.publish
    ranks = Scripted([])
    settings = read_rules([f"--ckpt_dir={run}", f"--publish={where}", "--filter_sparse_opt=true", "--progress=false"])
    loop = Watch(ranks, settings.config, settings.rules, poll_secs=1.0, announce=lambda line: None)
    monkeypatch.setattr(steps, "seal", lambda manifest: (ranks.request_stop("stopped by SIGTERM"), manifest)[1])
    monkeypatch.setattr(steps, "publish", lambda *arguments: (ranks._current.refuse_to_go_on(), real(*arguments)))
    loop.run()
    assert lines_of(caplog, "stopped by SIGTERM: step 1 is not published")
    assert not (where / "current.json").exists()
    assert not list(where.rglob("manifest.json"))
    monkeypatch.undo()
    assert len(follow(run, where, [])) == 1


# ---- mistakes ----


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--ckpt_dir=RUN"], "publish is not set"),
        (["--ckpt_dir=RUN", "--export_dir=OUT"], "publish is not set"),
        (["--ckpt_dir=RUN", "--publish=OUT", "--step=3"], "leave step out"),
        (["--ckpt_dir=RUN", "--publish=OUT", "--poll_secs=0"], "--poll_secs is 0"),
        (["--ckpt_dir=RUN", "--publish=OUT", "--full_every=0"], "--full_every is 0"),
        (["--ckpt_dir=RUN", "--publish=OUT", "--max_delta=-1"], "--max_delta is -1"),
        (["--ckpt_dir=models:/ctr/1", "--publish=OUT"], "no directory of a training run"),
        (["--format=live", "--publish=OUT"], "format is live"),
        (["--ckpt_dir=RUN/ckpt_1", "--publish=OUT", "--filter_sparse_opt=true"], "is a checkpoint; watch follows"),
        (["--ckpt_dir=RUN", "--publish=OUT", "--filter_sparse_opt=false"], "base needs new shards"),
        (["--ckpt_dir=RUN", "--publish=OUT", "--model=no:model", "--dataset=no:data"], "there is no module 'no'"),
        (["--ckpt_dir=RUN", "--publish=OUT", "--filter_sparse_opt=true", "--select_tables=none"], "none"),
    ],
)
def test_a_mistake_in_the_settings_ends_it_at_once(
    run: Path, where: Path, argv: list[str], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    save(run, 1)
    given = [argument.replace("RUN", str(run)).replace("OUT", str(where)) for argument in argv]
    assert main(["watch", *given]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dist_export: ")]
    assert len(lines) == 1
    assert told in lines[0]
    assert not (where / "current.json").exists()


def test_a_run_that_is_not_there_is_said_to_be_waited_for(
    run: Path, where: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be mistyped, or training may not have begun."""
    run.rmdir()

    def begin() -> None:
        assert f"there is no {run} yet; it is waited for. If it is mistyped" in caplog.text
        (run / "day1").mkdir(parents=True)

    def save_first() -> None:
        assert (
            "has no checkpoint yet (day1 has no name such as ckpt_100 or 100, by which its step is known)"
            in caplog.text
        )
        save(run, 1)

    with caplog.at_level("INFO"):
        follow(run, where, [begin, save_first, idle, idle])
    assert steps_of(where) == [1]


def test_settings_that_were_good_once_are_no_mistake_later(run: Path, where: Path) -> None:
    """A checkpoint without the table that the settings name ends nothing, once another one had it."""
    save(run, 1)

    def save_another() -> None:
        write_checkpoint(run / "ckpt_2", {"other": split_table(*make_rows(9, 4), 1)})
        list_save(run, 2)

    follow(run, where, [save_another, idle, lambda: save(run, 3), idle], select_tables="item")
    assert steps_of(where) == [1, 3]


# ---- the same bytes ----


USERS_CODE = """
import torch
from tests.support import score_models as models

torch.manual_seed(7)  # as training scripts do, and only once in a process


def build_model():
    return models.Model(models.ThreeTables(), 3 * models.DIM + 1)


def build_dataset():
    return iter([models.batch_of(seed=int(torch.randint(1 << 30, ())))])  # an iterator has one sample only
"""


def files_of(package: Path) -> dict[str, bytes]:
    names = [path for path in package.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {str(path.relative_to(package)): path.read_bytes() for path in names}


def test_a_later_export_of_the_process_has_the_bytes_of_a_process_of_its_own(run: Path, where: Path) -> None:
    (run.parent / "users_code.py").write_text(USERS_CODE)
    model = models.train(models.Model(models.ThreeTables(), 3 * models.DIM + 1))
    place: dict[str, Any] = {"cwd": run.parent, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    command = [sys.executable, "-m", "dist_export"]
    options = {"ckpt_dir": run, "score_program": "off", "progress": False, "filter_sparse_opt": True}
    options |= {name: f"users_code:build_{name}" for name in ("model", "dataset")}
    arguments = [f"--{name}={value}" for name, value in options.items()]

    def save_model(step: int) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter[:1] += float(step)
        (run / f"step-{step}").mkdir()
        models.save(model, run / f"step-{step}" / "model.pth")

    save_model(1)
    watching = [*command, "watch", *arguments, f"--publish={where}", "--until_step=2", "--poll_secs=0.2"]
    with subprocess.Popen(watching, **place) as process:
        while not (where / "current.json").exists():
            assert process.poll() is None
            time.sleep(0.1)
        save_model(2)
        assert process.wait(100) == 0
    assert kinds_of(where) == "Fd"
    first, last = (where / "versions" / switch["version"] for switch in reversed(current_of(where)["switches"]))
    alone = where.parent / "alone"
    more = [f"--export_dir={alone}", "--step=2", f"--base={first}", "--on_base_mismatch=full"]
    subprocess.run([*command, *arguments, *more], check=True, **place)
    assert files_of(last) == files_of(alone)
    assert manifest_of(last)["digest"] == manifest_of(alone)["digest"]


# ---- what machines see ----


def test_events_and_metrics_of_versions(run: Path, where: Path, tmp_path: Path) -> None:
    save(run, 1)
    told = {"events": tmp_path / "e.jsonl", "metrics": tmp_path / "m.prom"}
    before = time.time()
    follow(run, where, [lambda: save(run, 2), idle], **told)
    events = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    published = [event for event in events if event["event"] == "published"]
    assert [event["is_delta"] for event in published] == [False, True]
    assert published[1]["version"] == current_of(where)["version"]
    delta = manifest_of(where / "versions" / current_of(where)["version"])["tables"][0]["delta"]
    assert {name: published[1][name] for name in ("changed", "new", "deleted")} == {
        name: delta[name] for name in ("changed", "new", "deleted")
    }
    assert 0 < published[1]["seconds"] < 30
    lines = (tmp_path / "m.prom").read_text().splitlines()
    figures = {line.split("{")[0]: float(line.split()[-1]) for line in lines if not line.startswith("#")}
    assert before - 60 < figures["dist_export_current_saved_timestamp_seconds"] < time.time()
    assert figures["dist_export_published_versions"] == 2
    assert figures["dist_export_publish_seconds"] == pytest.approx(published[1]["seconds"], abs=0.01)
    rows = f'dist_export_delta_rows{{publish="versions:{where}",change="new"}} {delta["new"]}'
    assert rows in lines


def test_a_failed_export_keeps_the_age_of_the_current_version(
    run: Path, where: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 1)
    real, left = steps.publish, [1, 1]

    def fail(*arguments: Any) -> Any:
        left.pop()
        if not left:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(steps, "publish", fail)
    follow(run, where, [lambda: save(run, 2)], metrics=tmp_path / "m.prom")
    text = (tmp_path / "m.prom").read_text()
    assert "dist_export_success{" in text
    assert text.split("dist_export_success{")[1].splitlines()[0].endswith(" 0")
    assert "\ndist_export_current_saved_timestamp_seconds{" in text
