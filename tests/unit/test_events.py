"""What machines are told: events as JSON lines, figures as Prometheus text."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import tiny_model

import dist_export
from dist_export import cli
from dist_export.errors import ConfigError, ExportError
from dist_export.transfer.units import UnitRunner

SAMPLE = re.compile(r'[a-zA-Z_:][a-zA-Z0-9_:]*(\{([a-zA-Z_]\w*="([^"\\]|\\.)*",?)*\})? \S+')


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    run = tmp_path / "run"
    run.mkdir()
    tiny_model.write_tiny_checkpoint(run / "ckpt_70")
    return {"ckpt_dir": str(run), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True}


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_stand_beside_the_package(settings: dict[str, object], tmp_path: Path) -> None:
    manifest = dist_export.export({**settings, "events": True})
    events = read(tmp_path / "out.events.jsonl")
    assert (events[0]["event"], events[-1]["event"]) == ("started", "committed")
    assert events[-1]["bytes"] == manifest.num_bytes
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
    manifest = dist_export.export({**settings, "metrics": str(tmp_path / "export.prom")})
    lines = (tmp_path / "export.prom").read_text().splitlines()
    samples = [line for line in lines if not line.startswith("#")]
    assert all(SAMPLE.fullmatch(line) for line in samples), samples
    names = [line.split("{")[0] for line in samples]
    assert [line.split()[2] for line in lines if line.startswith("# TYPE")] == sorted(set(names))
    assert f'dist_export_success{{package="{tmp_path}/out"}} 1' in samples
    assert f'dist_export_package_bytes{{package="{tmp_path}/out"}} {manifest.num_bytes}' in samples


def test_a_failed_export_is_told_too(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "disk on fire")

    monkeypatch.setattr(UnitRunner, "run", fail)
    with pytest.raises(ExportError):
        dist_export.export({**settings, "events": str(tmp_path / "e.jsonl"), "metrics": str(tmp_path / "m.prom")})
    assert read(tmp_path / "e.jsonl")[-1]["event"] == "failed"
    assert "disk on fire" in str(read(tmp_path / "e.jsonl")[-1]["error"])
    assert f'dist_export_success{{package="{tmp_path}/out"}} 0' in (tmp_path / "m.prom").read_text()


def test_a_log_that_cannot_be_written_does_not_stop_an_export(
    settings: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    where = str(tmp_path / "file" / "x")
    with caplog.at_level(logging.WARNING):
        dist_export.export({**settings, "events": where, "metrics": where})
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
