"""Workers share what takes long to make."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from tests.support.made_once import make_once


class Worker:
    """The folders of one pytest worker, as pytest-xdist gives them."""

    def __init__(self, run: Path, number: int) -> None:
        self.base = run / f"popen-gw{number}"
        self.base.mkdir(parents=True)

    def getbasetemp(self) -> Path:
        return self.base

    def mktemp(self, name: str) -> Path:
        folder = self.base / f"{name}0"
        folder.mkdir()
        return folder


def test_two_workers_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both start at the same time; one waits for the other one, and finds it whole."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    made, found = [], []

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.05)
        (folder / "file").write_text("whole")

    def work(worker: Worker) -> None:
        found.append((make_once(worker, "thing", make) / "file").read_text())

    threads = [threading.Thread(target=work, args=(Worker(tmp_path, number),)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["whole", "whole"]
    assert len(made) == 1


def test_a_failure_is_not_kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise ValueError("no compiler")

    for _ in range(2):
        with pytest.raises(ValueError, match="no compiler"):
            make_once(tmp_path_factory, "fails", fail)
    folder = make_once(tmp_path_factory, "fails", lambda folder: (folder / "whole").touch())
    assert os.listdir(folder) == ["whole"]
    assert make_once(tmp_path_factory, "fails", fail) == folder
