"""What the tests of faults share: the shim, exports with a fault in a process of their own, and the judge of how they end."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_export.manifest import MANIFEST
from dist_export.verify.verify import verify
from tests.support import ROOT, tiny_model
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.sparse_cases import content

HERE = Path(__file__).resolve().parent

SETTINGS = {
    # rows of three parts go to two shards: gathers, and chunks that are hashed from the file
    "reshard": ["--filter_sparse_opt", "true", "--num_shards", "2"],
    # three parts go to one shard: copies, hashed on the way
    "merge": ["--filter_sparse_opt", "true", "--num_shards", "1"],
    "kernel": ["--filter_sparse_opt", "true", "--num_shards", "1", "--digest", "none"],
    "copy": [],
    "dense": [
        *("--filter_sparse_opt", "true", "--num_shards", "2"),
        *("--model", tiny_model.MODEL, "--dataset", tiny_model.DATASET),
    ],
}


class Ended(NamedTuple):
    """How an export ended. ``code`` is None for one that had to be killed; ``met`` are the calls that met the fault."""

    code: int | None
    stdout: str
    stderr: str
    met: list[str]
    seen: int
    """Calls that the fault's settings match, those that met it included."""

    @property
    def told(self) -> list[str]:
        """What the export itself said of its failure."""
        return [line for line in self.stderr.splitlines() if line.startswith("dist_export: ")]


def build_shim(folder: Path) -> Path | str:
    """Compile the shim; return its path, or why it cannot be had."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return "no C compiler, or no Linux, to build the shim that injects faults"
    shim = folder / "shim.so"
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(shim), str(HERE / "shim.c"), "-ldl"],
        capture_output=True,
        text=True,
        check=False,
    )
    # glibc's names are what it stands between; another libc has others
    return shim if done.returncode == 0 else f"the shim cannot be compiled here: {done.stderr[-500:]}"


def environment(shim: Path, **more: str) -> dict[str, str]:
    """Return the environment of a process with the shim."""
    return os.environ | {"LD_PRELOAD": str(shim), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


@dataclass
class Bench:
    """A place for exports with faults: checkpoints, what an undisturbed export makes of them, and a server that forks."""

    folder: Path
    shim: Path
    numbers: Any = field(default_factory=itertools.count)
    _server: Any = None
    _references: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tables = make_tables({"a": 200, "b": 60}, 3)
        write_checkpoint(self.folder / "ckpt", tables, dense={"w": np.ones(9, np.float32)})
        tiny_model.write_tiny_checkpoint(self.folder / "tiny")

    def source(self, mode: str) -> Path:
        """Return the checkpoint that a mode exports."""
        return self.folder / ("tiny" if mode == "dense" else "ckpt")

    def reference(self, mode: str) -> Path:
        """Return what an undisturbed export in this mode gives."""
        if mode not in self._references:
            target = self.folder / f"reference_{mode}"
            ended = self.export(mode, target)
            assert ended.code == 0, ended.stderr
            self._references[mode] = target
        return self._references[mode]

    def new_target(self) -> Path:
        """Return a directory that is not there yet."""
        return self.folder / f"out_{next(self.numbers)}"

    def export(
        self, mode: str, target: Path, spec: str = "", *arguments: str, timeout: float = 60, **env: str
    ) -> Ended:
        """Export in a process of its own, which meets the fault."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-u", str(HERE / "fault_server.py")],
                env=environment(self.shim),
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        place = self.folder / f"run_{next(self.numbers)}"
        place.mkdir()
        argv = [*command(self.source(mode), target, mode), *arguments]
        files = {name: str(place / name) for name in ("stdout", "stderr", "log")}
        job = {
            "argv": argv,
            "spec": spec,
            "timeout": timeout,
            "needs_torch": mode == "dense",
            "environment": {"TMPDIR": str(place), **env},
            **files,
        }
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        code = json.loads(self._server.stdout.readline())
        return ended(code, *(read(files[name]) for name in ("stdout", "stderr", "log")))

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.stdin.close()
            self._server.stdout.close()
            self._server.wait()


def command(source: Path, target: Path, mode: str) -> list[str]:
    """Return the arguments of an export; one thread, so that calls come in one order."""
    return ["--ckpt_dir", str(source), "--export_dir", str(target), "--threads", "1", *SETTINGS[mode]]


def ended(code: int | None, stdout: str, stderr: str, log: str) -> Ended:
    """Put together how an export ended."""
    lines = log.splitlines()
    return Ended(code, stdout, stderr, [line[2:] for line in lines if line[0] == "+"], len(lines))


def read(path: str | Path) -> str:
    """Return a text file's content, nothing where there is none."""
    return Path(path).read_text() if os.path.exists(path) else ""


def source_state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return content and time of all files of a checkpoint."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


def manifest_of(target: Path) -> dict[str, Any]:
    """Return the manifest but for what may differ between two exports of one source."""
    found = json.loads((target / MANIFEST).read_bytes())
    return {key: value for key, value in found.items() if key != "run"}


def assert_same_package(target: Path, reference: Path) -> None:
    """The package is what an undisturbed export makes: the same files, each byte, the same manifest; and it verifies."""
    assert content(target) == content(reference)
    assert manifest_of(target) == manifest_of(reference)
    assert verify(str(target)).findings == []


def assert_told(ended: Ended, *words: str) -> None:
    """The failure is one line that says which file, what happened, what is on disk and what to do; no traceback."""
    assert "Traceback" not in ended.stderr, ended.stderr
    assert len(ended.told) == 1, ended.stderr
    (line,) = ended.told
    for word in words:
        assert word in line, (word, line)
    if ended.code == 2:  # the source cannot be read, and nothing was written
        assert "cannot be read" in line, line
        return
    assert any(text in line for text in ("No manifest was written", "Nothing was", "holds the committed package")), line
    assert "un the export again" in line, line


def names_of(ended: Ended) -> set[str]:
    """Return the names of the files whose calls met the fault, as messages give them."""
    return {line.split("/")[-1].removeprefix(".").removesuffix(".partial") for line in ended.met}


def whole_shards(target: Path) -> int:
    """Count the shards that an export that failed has finished: those with their final name and a receipt of its plan."""
    receipts = [read(target / ".dist_export" / f"{path.name}.json") for path in target.glob("*.safetensors")]
    return sum(bool(receipt) and json.loads(receipt)["plan"] != "" for receipt in receipts)


def reused_shards(target: Path) -> int:
    """Return how many shards the last export of a package took over."""
    return int(json.loads((target / MANIFEST).read_bytes())["run"]["reused_shards"])


def assert_no_harm(bench: Bench, mode: str, target: Path) -> None:
    """A failed export left no manifest; the next one completes what is there, and takes over the shards that are whole."""
    assert not (target / MANIFEST).exists()
    whole = whole_shards(target)
    again = bench.export(mode, target)
    assert again.code == 0, again.stderr
    assert reused_shards(target) == whole
    assert_same_package(target, bench.reference(mode))


def assert_ends_well(bench: Bench, mode: str, spec: str, *words: str) -> Ended:
    """An export meets a fault; it succeeds all the same, or fails as it should, and the next one completes what is there.

    ``words`` stand in the line that tells of a failure, besides the name of a file that met the fault.
    """
    target, source = bench.new_target(), bench.source(mode)
    before, reference = source_state(source), bench.reference(mode)
    ended = bench.export(mode, target, spec)
    assert ended.met, f"no call met the fault {spec}: {ended.stderr}"
    assert ended.code is not None, f"it hung: {ended}"
    assert source_state(source) == before
    if ended.code:
        assert_told(ended, *words)
        assert any(name in ended.told[0] for name in names_of(ended)), ended
        assert_no_harm(bench, mode, target)
        assert source_state(source) == before
    # what only a rerun would need may be left where it could not be removed
    if "could not be removed" in ended.stderr:
        shutil.rmtree(target / ".dist_export", ignore_errors=True)
    assert_same_package(target, reference)
    shutil.rmtree(target)
    return ended
