"""What the user sees while an export runs: what the export is at, the bytes of all ranks, and the closing summary."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

import dist_export
from dist_export.errors import CommitError
from dist_export.humanize import amount
from dist_export.manifest import Manifest
from dist_export.pipeline import steps as exporter
from dist_export.reporting import display
from dist_export.reporting.display import LineStream, LogDisplay, Speedometer
from dist_export.reporting.moment import Moment, describe_moment
from dist_export.reporting.progress import COUNTER, Reporter
from dist_export.reporting.summary import summarize
from dist_export.runtime.io_activity import in_stage
from dist_export.runtime.joining import join
from dist_export.transfer.work_done import Share
from tests.support import ROOT
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.terminal import Terminal


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "ckpt", make_tables({"user_emb": 50, "item_emb": 30}, 2))
    return tmp_path / "ckpt"


@pytest.fixture
def settings(checkpoint: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "ckpt_dir": str(checkpoint),
        "export_dir": str(tmp_path / "out"),
        "filter_sparse_opt": True,
        "num_shards": 4,
        "threads": 1,
    }


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (5 * 10**12, "5.0 TB")]
)
def test_amounts_are_for_people(num_bytes: int, text: str) -> None:
    assert amount(num_bytes) == text


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (Moment("plan", "count the ids", 3.2), "plan: count the ids, 3 s"),
        (Moment("check", "check the shards", 61), "check the shards, 1 min 1 s"),
        (Moment("transfer", "write shards", 1, 0, 2000), "shards: 0 B of 2.0 kB"),
        (Moment("transfer", "write shards", 9, 500, 2000, 100), "shards: 500 B of 2.0 kB, 100 B/s, 15 s left"),
        (Moment("trace", "write shards", 9, 500, 2000), "shards: 500 B of 2.0 kB; trace, 9 s"),
        (Moment("trace", "write shards", 99, 2000, 2000, 3.0), "shards: all 2.0 kB done; trace, 1 min 39 s"),
        (Moment("transfer", "hash shards", 4, 2000, 2000), "shards: all 2.0 kB done; transfer: hash shards, 4 s"),
    ],
)
def test_a_moment_says_what_goes_on(moment: Moment, text: str) -> None:
    """A speed is there while bytes come, and no longer; once all are there it is told what still runs, and for how long."""
    assert describe_moment(moment) == text


def test_a_speed_is_that_of_the_last_seconds_and_ends_with_the_bytes() -> None:
    speedometer = Speedometer()
    assert speedometer.measure(0, 0) == 0
    assert speedometer.measure(5, 500) == 100
    assert [speedometer.measure(5 + secs, 500) for secs in range(1, 30)][-1] == 0
    assert speedometer.measure(44, 1500) == 100, "not an average over the pause too"


def test_a_log_gets_a_line_only_when_something_has_changed(caplog: pytest.LogCaptureFixture) -> None:
    log = LogDisplay()
    moments = [
        *(Moment("transfer", "write shards", secs, 500, 2000, 100) for secs in (1, 2, 3)),
        Moment("transfer", "write shards", 4, 2000, 2000),
        *(Moment("trace", "write shards", secs, 2000, 2000) for secs in (5, 6, 7)),
        *(Moment("check", "check the shards", secs) for secs in (5, 6)),
    ]
    with caplog.at_level(logging.INFO):
        for moment in moments:
            log.show(moment)
    assert caplog.messages == [describe_moment(moments[number]) for number in (0, 3, 4, 7)]


def test_the_display_follows_the_bytes_of_all_ranks_and_the_stage(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(display, "_LOG_SECS", 0.02)
    with join(timeout_secs=1) as ranks, caplog.at_level(logging.INFO):
        reporter = Reporter(ranks, is_shown=True)
        reporter.count_bytes(400)  # another rank may be faster than rank 0's display
        with reporter.showing(), in_stage("transfer"):
            with reporter.transferring(2000, reused_bytes=100):
                wait_for(lambda: "shards: 500 B of 2.0 kB" in caplog.text)
                reporter.count_bytes(1500)
                wait_for(lambda: "shards: all 2.0 kB done; transfer: start" in caplog.text)
                with in_stage("trace"):
                    wait_for(lambda: "shards: all 2.0 kB done; trace, 0 s" in caplog.text)
            with in_stage("check"):
                wait_for(lambda: "check: start, 0 s" in caplog.text)


def wait_for(happened: Callable[[], bool]) -> None:
    """Wait until it has, however busy the machine is; fail after ten seconds."""
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_display_that_is_not_wanted_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(display, "_LOG_SECS", 0.01)
    with join(timeout_secs=1) as ranks, caplog.at_level(logging.INFO):
        reporter = Reporter(ranks, is_shown=False)
        with reporter.showing(), in_stage("transfer"), reporter.transferring(10):
            time.sleep(0.1)
    assert not caplog.records


def test_all_bytes_are_done_at_the_end_also_where_shards_are_taken_over(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int]] = []
    real = Reporter.transferring

    @contextmanager
    def transferring(self: Reporter, total_bytes: int, *, reused_bytes: int = 0) -> Iterator[None]:
        with real(self, total_bytes, reused_bytes=reused_bytes):
            yield
        seen.append((total_bytes, reused_bytes, self._ranks.shared.add(COUNTER, 0)))

    monkeypatch.setattr(Reporter, "transferring", transferring)

    def fail(*_: object, **__: object) -> None:
        raise CommitError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(exporter, "check", fail)
        with pytest.raises(CommitError, match="interrupted"):
            dist_export.export(settings)
    next((tmp_path / "out").glob("*.safetensors")).unlink()
    manifest = dist_export.export(settings)
    (total, reused, moved) = seen.pop()
    shards = [file for file in manifest.files if file.path.endswith(".safetensors")]
    assert manifest.run["reused_shards"] == 3
    assert 0 < reused < total == sum(file.num_bytes for file in shards)
    assert reused + moved == total
    dist_export.export({**settings, "export_dir": settings["ckpt_dir"], "filter_sparse_opt": False, "num_shards": None})
    (total, reused, moved) = seen.pop()
    assert (reused, moved) == (0, total), "in place nothing is written, but all is hashed"


# ---- from Python ----


def export_by_function(settings: dict[str, object], **more: object) -> Manifest:
    return dist_export.export(settings, **more)


def export_by_class(settings: dict[str, object], **more: object) -> Manifest:
    names = ("ckpt_dir", "export_dir")
    others = {name: value for name, value in settings.items() if name not in names}
    exporter = dist_export.Exporter(None, "sparse_arch", "dense_arch", None, *(settings[n] for n in names), **others)
    return exporter.export(**more)


@pytest.mark.parametrize("export", [export_by_function, export_by_class])
def test_python_callers_get_the_summary_in_the_log(
    export: Callable[..., Manifest], settings: dict[str, object], caplog: pytest.LogCaptureFixture, capsys
) -> None:
    with caplog.at_level(logging.INFO, logger="dist_export"):
        manifest = export(settings)
    told = [record.getMessage() for record in caplog.records if record.name == "dist_export.reporting.display"]
    assert told == str(manifest).splitlines()
    assert told[0] == f"package: {settings['export_dir']}"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("export", [export_by_function, export_by_class])
@pytest.mark.parametrize("is_setting", [False, True])
def test_progress_is_turned_off(
    is_setting: bool, export: Callable[..., Manifest], settings: dict[str, object], caplog, monkeypatch
) -> None:
    monkeypatch.setattr(display, "_LOG_SECS", 0.001)
    with caplog.at_level(logging.INFO, logger="dist_export"):
        if is_setting:
            export({**settings, "progress": False})
        else:
            export(settings, progress=False)
    assert not [record for record in caplog.records if record.name == "dist_export.reporting.display"]
    assert {"read", "commit"} <= {message.partition(":")[0] for message in caplog.messages}, (
        "the ends of stages are logged"
    )


def test_a_printed_manifest_is_the_closing_summary(settings: dict[str, object], tmp_path: Path, capsys) -> None:
    manifest = dist_export.export(settings)
    shares = [Share(**share) for share in manifest.run["ranks"]]
    assert sum(share.num_bytes for share in shares) == sum(
        file.num_bytes for file in manifest.files if file.path.endswith(".safetensors")
    )
    assert str(manifest).splitlines() == summarize(manifest, shares, str(settings["export_dir"]))
    print(dist_export.open_package(tmp_path / "out").manifest)
    assert capsys.readouterr().out == f"{manifest}\n"
    assert "user_emb" in repr(manifest)
    assert "user_emb" not in str(manifest)


@pytest.mark.parametrize(
    "run",
    [{}, {"ranks": 3}, {"ranks": [{"rank": 1, "no": 2}]}, {"seconds": []}, {"sample": {"asked": 1}}, {"export_dir": 1}],
)
def test_a_manifest_whose_run_is_odd_can_be_printed(run: dict[str, object], settings: dict[str, object]) -> None:
    manifest = msgspec.structs.replace(dist_export.export(settings), run=run)
    assert "80 rows in 4 shards" in str(manifest)


def test_what_is_foreign_in_a_printed_manifest_is_printable(settings: dict[str, object]) -> None:
    manifest = msgspec.structs.replace(dist_export.export(settings), notes=("a\nb \x1b[31m",))
    assert str(manifest).splitlines()[-1] == r"  note     a\nb \x1b[31m"


# ---- on a terminal ----

CALLS = """
import logging, os, sys, time, warnings
import dist_export
from dist_export.transfer.unit_runner import UnitRunner

real = UnitRunner.run

def run(self, unit):
    for number in range(3):
        time.sleep(0.1)
        logging.getLogger("any").warning("logged line %d", number)
        print("printed line", number, flush=True)
        print("line in ", end="", flush=True)
        print("two pieces", number, file=sys.stdout)
        sys.stderr.write("\\r 10%\\r 20%\\r[/bold] with markup\\n")
    return real(self, unit)

UnitRunner.run = run
logging.basicConfig(level=logging.INFO, format="%(message)s")
manifest = dist_export.export(sys.argv[1])
logging.getLogger("any").warning("the end")
"""


@pytest.fixture
def config(settings: dict[str, object], tmp_path: Path) -> Path:
    (tmp_path / "export.yaml").write_text(json.dumps(settings))
    return tmp_path / "export.yaml"


LINES = {
    *(f"{text} {number}" for text in ("logged line", "printed line", "line in two pieces") for number in range(3)),
    "[/bold] with markup",
}


def test_no_line_is_glued_to_the_bar(config: Path, tmp_path: Path) -> None:
    """Whatever a program writes while the bar is there, log handlers and prints, is a line of its own, once and in order."""
    with Terminal([sys.executable, "-c", CALLS, str(config)], cwd=ROOT) as terminal:
        lines = terminal.read_lines()
        assert terminal.process.returncode == 0, lines
    assert "━" in terminal.raw
    assert terminal.raw.count("shards: ") > 3, "the bar was there"
    begin = next(place for place, line in enumerate(lines) if line.startswith("package: "))
    before = [line for line in lines[:begin] if not line.partition(":")[0].isidentifier()]  # but for the ends of stages
    assert set(before) == LINES
    assert before == [
        *(
            line
            for _ in range(len(before) // 12)
            for number in range(3)
            for line in (
                f"logged line {number}",
                f"printed line {number}",
                f"line in two pieces {number}",
                "[/bold] with markup",
            )
        )
    ]
    assert lines[begin:] == [*str(dist_export.open_package(tmp_path / "out").manifest).splitlines(), "the end", ""]
    assert terminal.raw.count("\x1b[?25h") >= terminal.raw.count("\x1b[?25l") == 1, "the cursor is there again"


def test_what_is_not_for_the_terminal_does_not_go_there(config: Path, tmp_path: Path) -> None:
    with (tmp_path / "stdout").open("wb") as stdout:
        command = [sys.executable, "-c", CALLS, str(config)]
        with Terminal(command, cwd=ROOT, stdout=stdout.fileno()) as terminal:
            lines = terminal.read_lines()
    assert "logged line 1" in lines
    assert not [line for line in lines if "print" in line or "pieces" in line]
    printed = (tmp_path / "stdout").read_text().splitlines()
    assert printed[:4] == ["printed line 0", "line in two pieces 0", "printed line 1", "line in two pieces 1"]


def test_a_terminal_that_cannot_draw_gets_lines(config: Path) -> None:
    command = [sys.executable, "-m", "dist_export", "--config", str(config)]
    with Terminal(command, cwd=ROOT, env={**os.environ, "TERM": "dumb"}) as terminal:
        lines = terminal.read_lines()
        assert terminal.process.returncode == 0
    assert "\x1b" not in terminal.raw
    assert any(line.startswith("package: ") for line in lines)


def test_a_stream_is_itself_again_after_the_display() -> None:
    class Stream:
        encoding = "utf-8"

        def __init__(self) -> None:
            self.text = ""

        def write(self, text: str) -> int:
            self.text += text
            return len(text)

    stream, printed = Stream(), []
    lines = LineStream(stream, printed.append)
    assert lines.write("one\ntwo") == 7
    assert (printed, stream.text, lines.encoding) == (["one"], "", "utf-8")
    lines.close_lines()
    lines.write("!\n")
    assert (printed, stream.text) == (["one"], "two!\n"), "handlers that were made meanwhile keep it"
