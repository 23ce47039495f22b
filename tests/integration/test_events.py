"""What machines are told: events as JSON lines, figures as Prometheus text."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

import dist_export
from dist_export import cli
from dist_export.config.schema import ExportConfig
from dist_export.errors import ConfigError, ExportError
from dist_export.reporting.events import EVENTS, METRICS, Events, failure_of, samples_of
from dist_export.storage.traffic import TRAFFIC
from dist_export.transfer.unit_runner import UnitRunner
from tests.support import ROOT, exports, tiny_model

SAMPLE = re.compile(r'[a-zA-Z_:][a-zA-Z0-9_:]*(\{([a-zA-Z_]\w*="([^"\\]|\\.)*",?)*\})? \S+')


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    run = tmp_path / "run"
    run.mkdir()
    tiny_model.write_tiny_checkpoint(run / "ckpt_70")
    return {"ckpt_dir": str(run), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True}


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_credentials_in_a_url_are_in_no_event_and_no_metric() -> None:
    config = ExportConfig(ckpt_dir="sftp://me:hunter22@host/x", export_dir="memory://events_secret/out", events=True)
    events = Events(config, config.export_dir, rank=0, step=None)
    events.add("started", source=config.ckpt_dir, export_dir=config.export_dir, world_size=1)
    assert events.lines()[0]["source"] == "sftp://***@host/x"
    ((_, labels, _), *_) = failure_of("sftp://me:hunter22@host/out")
    assert labels == {"package": "sftp://***@host/out"}


def test_events_stand_beside_the_package(settings: dict[str, object], tmp_path: Path) -> None:
    manifest = exports.export({**settings, "events": True})
    events = read(tmp_path / "out.events.jsonl")
    assert (events[0]["event"], events[-1]["event"]) == ("started", "committed")
    assert events[-1]["bytes"] == manifest.num_bytes
    for event in events:
        fields = ", ".join(event.keys() - {"time", "event", "rank", "attempt", "step"})
        assert set(fields.split(", ")) == set(EVENTS[event["event"]].split(", ")), event
    stages = [event["stage"] for event in events if event["event"] == "stage"]
    assert stages == ["read", "plan", "transfer", "check", "write", "commit"]
    assert all(event["step"] == 70 and event["rank"] == 0 for event in events)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", str(event["time"])) for event in events)
    (moved,) = [event for event in events if event["event"] == "moved"]
    assert (moved["retries"], moved["bytes"] > 0, moved["seconds"] >= 0) == (0, True, True)
    tables = {event["table"]: event["rows"] for event in events if event["event"] == "table"}
    assert tables == {table.name: table.rows_out for table in manifest.tables}
    assert not (tmp_path / "out" / "events.jsonl").exists()


def test_metrics_are_prometheus_text(settings: dict[str, object], tmp_path: Path) -> None:
    manifest = exports.export({**settings, "metrics": str(tmp_path / "export.prom")})
    lines = (tmp_path / "export.prom").read_text().splitlines()
    samples = [line for line in lines if not line.startswith("#")]
    assert all(SAMPLE.fullmatch(line) for line in samples), samples
    names = [line.split("{")[0] for line in samples]
    for head in ("# HELP", "# TYPE"):
        assert [line.split()[2] for line in lines if line.startswith(head)] == sorted(set(names))
    assert f'dist_export_success{{package="{tmp_path}/out"}} 1' in samples
    assert f'dist_export_package_bytes{{package="{tmp_path}/out"}} {manifest.num_bytes}' in samples


def test_rows_left_behind_are_told_by_reason(settings: dict[str, object], tmp_path: Path) -> None:
    rules = {"prune": [{"tables": "*", "norm_at_most": 1e9}], "on_empty_table": "allow"}
    manifest = exports.export({**settings, **rules, "metrics": str(tmp_path / "m.prom")})
    table = manifest.tables[0]
    sample = f'dist_export_dropped_rows{{package="{tmp_path}/out",table="{table.name}",reason="norm"}} {table.rows_in}'
    assert sample in (tmp_path / "m.prom").read_text().splitlines()


def test_figures_of_a_store_have_units() -> None:
    manifest = SimpleNamespace(num_bytes=1, tables=(), run={"store": dict.fromkeys(TRAFFIC.NAMES, 3)})
    names = {name for name, *_ in samples_of(manifest, export_dir="s3://b/x", seconds={}, rank_bytes={})}
    assert {name for name in METRICS if "_store_" in name} == {name for name in names if "_store_" in name}
    assert names <= METRICS.keys()


def test_a_refused_rerun_loses_nothing(settings: dict[str, object], tmp_path: Path) -> None:
    told = {"events": True, "metrics": str(tmp_path / "m.prom")}
    exports.export({**settings, **told})
    figures = (tmp_path / "m.prom").read_text()
    first = (tmp_path / "out.events.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="holds a committed package"):
        exports.export({**settings, **told, "digest": "sha256"})
    assert (tmp_path / "m.prom").read_text() == figures
    assert (tmp_path / "out.events.jsonl").read_bytes().startswith(first)
    events = read(tmp_path / "out.events.jsonl")
    assert [(event["attempt"], event["event"]) for event in events if event["event"] != "stage"][-3:] == [
        (1, "committed"),
        (2, "started"),
        (2, "failed"),
    ]
    assert events[-1]["exit_code"] == 2


def test_what_is_in_the_file_of_events_stays(settings: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("not ours")
    exports.export({**settings, "events": str(tmp_path / "log.txt")})
    assert (tmp_path / "log.txt").read_text().startswith('not ours\n{"time":')


def test_events_and_metrics_go_to_any_store(settings: dict[str, object]) -> None:
    exports.export({**settings, "events": "memory://told/e.jsonl", "metrics": "memory://told/m.prom"})
    store = fsspec.filesystem("memory")
    assert b'"event":"committed"' in store.cat_file("/told/e.jsonl")
    assert b"# HELP dist_export_success " in store.cat_file("/told/m.prom")


def test_every_event_and_metric_is_documented_and_none_besides() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", text.partition("## What machines see")[2], re.MULTILINE)
    documented = {name: fields for name, fields in rows if not name.startswith("dist_export_")}
    names = {name: ", ".join(re.findall(r"`(\w+)`", fields)) for name, fields in documented.items()}
    assert names == EVENTS
    assert [name for name, _ in rows if name.startswith("dist_export_")] == list(METRICS)


def test_a_failed_export_is_told_too(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "disk on fire")

    monkeypatch.setattr(UnitRunner, "run", fail)
    with pytest.raises(ExportError):
        exports.export({**settings, "events": str(tmp_path / "e.jsonl"), "metrics": str(tmp_path / "m.prom")})
    assert read(tmp_path / "e.jsonl")[-1]["event"] == "failed"
    assert "disk on fire" in str(read(tmp_path / "e.jsonl")[-1]["error"])
    assert f'dist_export_success{{package="{tmp_path}/out"}} 0' in (tmp_path / "m.prom").read_text()


def test_a_log_that_cannot_be_written_does_not_stop_an_export(
    settings: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    where = str(tmp_path / "file" / "x")
    with caplog.at_level(logging.WARNING):
        exports.export({**settings, "events": where, "metrics": where})
    told = [record.getMessage() for record in caplog.records]
    assert len([line for line in told if "events cannot be written" in line]) == 1
    assert len([line for line in told if "metrics cannot be written" in line]) == 1
    assert dist_export.open_package(tmp_path / "out")


def test_log_lines_carry_rank_and_stage(settings: dict[str, object], capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers.clear()  # pytest's own would keep the command's from being made
    try:
        assert cli.main([f"--{name}={value}" for name, value in settings.items()]) == 0
    finally:
        root.handlers[:] = before
    lines = [line for line in capfd.readouterr().err.splitlines() if "rank 0" in line]
    assert any(re.match(r"\d\d:\d\d:\d\d rank 0 transfer: ", line) for line in lines), lines


def test_a_step_is_a_number_from_0_up(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="step is -1; training steps count from 0"):
        dist_export.ExportConfig(ckpt_dir="a", export_dir="b", step=-1)
