"""What an export refuses to do to directories, and how the caller's own failures are told."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import dist_export
from dist_export.errors import CheckpointError, ConfigError, ExportError, ModelError
from dist_export.storage.directory import WORK_DIRECTORY
from dist_export.transfer.unit_runner import UnitRunner
from dist_export.verify.verify import verify
from dist_export.workdir import lock as claims
from tests.support import exports, tiny_model
from tests.support.recis_writer import make_tables, write_checkpoint

DENSE = {"model": tiny_model.MODEL, "dataset": tiny_model.DATASET}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")


def settings(checkpoint: Path, out: Path, **more: object) -> dict[str, object]:
    return {"ckpt_dir": str(checkpoint), "export_dir": str(out), "filter_sparse_opt": True, **more}


def test_a_second_export_into_the_same_directory_is_refused(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    """The first goes on undisturbed, and names itself to the second."""
    out = tmp_path / "out"
    reached, go_on = threading.Event(), threading.Event()
    real = UnitRunner.run

    def wait(self, unit):
        reached.set()
        assert go_on.wait(30)
        return real(self, unit)

    monkeypatch.setattr(UnitRunner, "run", wait)
    monkeypatch.setattr(claims, "PATIENCE_SECS", 0.3)
    first = threading.Thread(target=dist_export.export, args=(settings(checkpoint, out),))
    first.start()
    assert reached.wait(30)
    with pytest.raises(ConfigError, match=rf"another export \(process {os.getpid()} on .*\) is writing there"):
        exports.export(settings(checkpoint, out))
    go_on.set()
    first.join()
    assert verify(str(out)).findings == []


def test_a_package_that_was_committed_meanwhile_is_not_overwritten(
    checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "out"
    real = claims.lock

    def lock(directory):
        directory.write("manifest.json", b"{}")  # as another export does between our check and our claim
        return real(directory)

    monkeypatch.setattr(claims, "lock", lock)
    with pytest.raises(ConfigError, match="another export has just committed a package"):
        exports.export(settings(checkpoint, out))
    assert (out / "manifest.json").read_bytes() == b"{}"


def test_the_claim_ends_with_its_process(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        "import os, signal, sys, dist_export\n"
        "from dist_export.transfer.unit_runner import UnitRunner\n"
        "UnitRunner.run = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"dist_export.export({settings(checkpoint, out)!r})\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    exports.export(settings(checkpoint, out))
    assert not (out / WORK_DIRECTORY).exists()


def test_another_checkpoint_is_not_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_checkpoint(other, make_tables({"z": 10}, 1))
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    with pytest.raises(ConfigError, match="would be overwritten"):
        exports.export(settings(checkpoint, other))
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before


def test_chained_urls_cannot_hide_the_source(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="chained URLs"):
        exports.export(settings(checkpoint, f"simplecache::file://{checkpoint}"))


def test_files_of_an_earlier_attempt_with_other_settings_go(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"

    def fail(*_):
        raise OSError(5, "Input/output error", "manifest.json")

    with monkeypatch.context() as patched:
        patched.setattr("dist_export.pipeline.steps.publish", fail)
        with pytest.raises(ExportError):
            exports.export(settings(checkpoint, out, **DENSE, fg_conf_or_path={"features": []}, num_shards=4))
    assert (out / "fx_user_model" / "exported_model.pt").exists()
    manifest = exports.export(settings(checkpoint, out, num_shards=2))
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert there == {entry.path for entry in manifest.files} | {"manifest.json"}


@pytest.mark.parametrize("name", ["model.pt", "index", "model-000000-of-000002.safetensors"])
def test_a_pipe_in_the_checkpoint_is_no_file_to_wait_for(name: str, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    with pytest.raises(dist_export.DistExportError):
        exports.export(settings(checkpoint, tmp_path / "out", **DENSE))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_damaged_model_pt_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    data = (checkpoint / "model.pt").read_bytes()
    for cut in (0, 10, len(data) // 2, len(data) - 30):
        (checkpoint / "model.pt").write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=r"model\.pt") as caught:
            exports.export(settings(checkpoint, tmp_path / "out"))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("code", "error", "match"),
    [
        ("def build():\n    pass\n", ModelError, "returned None"),
        ("def build():\n    raise ValueError('no weights')\n", ModelError, r"ValueError: no weights at .*mine\.py:2"),
        ("import nothing_of_that_name\n", ModelError, r"importing mine failed: ModuleNotFoundError"),
        ("def build(:\n", ModelError, r"importing mine failed: SyntaxError.*mine\.py:1"),
        ("import sys\ndef build():\n    sys.exit(0)\n", ExportError, r"sys\.exit\(0\)"),
    ],
)
def test_what_goes_wrong_in_the_users_own_code(
    code, error, match, checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    """Never a package without the dense arch that was asked for, and the line is named."""
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("mine", None)
    with pytest.raises(error, match=match):
        exports.export(settings(checkpoint, tmp_path / "out", model="mine:build", dataset=tiny_model.DATASET))
    assert not (tmp_path / "out").exists()
    sys.modules.pop("mine", None)


def test_ctrl_c_stops_at_the_next_unit_and_keeps_what_is_whole(tmp_path: Path, monkeypatch) -> None:
    source, out = tmp_path / "ckpt", tmp_path / "out"
    write_checkpoint(source, make_tables({"t": 400}, 8))
    done: list[object] = []
    numbers = itertools.count()
    real = UnitRunner.run

    def slow(self, unit):
        done.append(unit)
        number = next(numbers)
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        if number >= 2:
            time.sleep(1)  # as a large unit takes; the main thread hears of the signal meanwhile
        return real(self, unit)

    monkeypatch.setattr(UnitRunner, "run", slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            exports.export(settings(source, out, num_shards=8))
    finally:
        signal.signal(signal.SIGINT, before)
    assert 3 <= len(done) < 8
    assert not (out / "manifest.json").exists()
    monkeypatch.undo()
    manifest = exports.export(settings(source, out, num_shards=8))
    assert manifest.run["reused_shards"] >= len(done) - 2


def test_nan_in_the_sample_gives_a_package_that_verifies(checkpoint: Path, tmp_path: Path) -> None:
    (_, batch), *_ = tiny_model.build_dataset(4)
    batch["price"][0] = float("nan")
    batch["price"][1] = float("inf")
    model = tiny_model.build_model()
    exports.exporter(
        model, "sparse_arch", "dense_arch", [batch], checkpoint, tmp_path / "out", filter_sparse_opt=True
    ).export()
    assert verify(str(tmp_path / "out")).findings == []


class TokenFileSystem(MemoryFileSystem):
    """A store that wants an option, as real ones want credentials."""

    protocol = "tokenfs"
    store: ClassVar[dict[str, object]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def __init__(self, *args: object, token: str = "", **kwargs: object) -> None:
        if token != "0123":
            raise PermissionError("no token")
        super().__init__(*args, **kwargs)


def test_storage_options_reach_the_file_system(checkpoint: Path) -> None:
    fsspec.register_implementation("tokenfs", TokenFileSystem, clobber=True)
    memory = fsspec.filesystem("tokenfs", token="0123")
    for path in checkpoint.iterdir():
        memory.pipe_file(f"tokenfs:///ckpt/{path.name}", path.read_bytes())
    options = {"token": "0123"}
    exports.export(
        {
            "ckpt_dir": "tokenfs:///ckpt",
            "export_dir": "tokenfs:///out",
            "filter_sparse_opt": True,
            "storage_options": options,
        }
    )
    assert verify("tokenfs:///out", options).findings == []
    with pytest.raises(ConfigError, match="no token"):
        exports.export({"ckpt_dir": "tokenfs:///ckpt", "export_dir": "tokenfs:///out2"})


@pytest.mark.parametrize(
    "name",
    ["allow_missing_tables", "allow_missing_dense", "allow_unexpected_dense", "allow_load_hooks", "lookup_modules"],
)
def test_patterns_of_a_model_that_is_not_exported_match_nothing(name: str, checkpoint: Path, tmp_path: Path) -> None:
    given = {"ckpt_dir": str(checkpoint), "export_dir": str(tmp_path / "out"), name: ["*"]}
    with pytest.raises(ConfigError, match=f"^{name} has patterns of what is in the model, and no model is exported"):
        dist_export.export(given)
    assert not (tmp_path / "out").exists()
