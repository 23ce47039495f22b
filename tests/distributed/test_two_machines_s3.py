"""Two machines with two ranks each, from a checkpoint on S3 to a package on S3; the server runs on the first of them.

They share no disk, so each builds the shards of its own that gathered rows fall into.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import dist_export
from tests.distributed.test_two_machines import exporting, ranks_of
from tests.support import ROOT
from tests.support.distributed import crash, machines
from tests.support.needed import lack
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.s3 import s3_server

pytestmark = [pytest.mark.distributed, pytest.mark.s3]

ANSWERS = """
import sys; sys.path.insert(0, {root!r})
import contextlib, io, json, socket, traceback
import s3fs
for line in sys.stdin:
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            fs = s3fs.S3FileSystem(**{options!r}, skip_instance_cache=True)
            exec(json.loads(line))
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = 1
            traceback.print_exc()
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
"""Runs each line of its input, a program in JSON: to start a Python for each would take seconds."""

PROBE = f"""
socket.create_connection(ADDRESS, 1).close()
if not fs.exists({s3_server.BUCKET!r}):
    fs.mkdir({s3_server.BUCKET!r})
fs.pipe_file({s3_server.BUCKET!r} + "/.probe", b"x")
"""


class FarServer(s3_server.S3Server):
    """A server in the network namespace of a machine, which alone can reach it, and the other machine over the link."""

    def __init__(self, folder: Path, machine: machines.Machine) -> None:
        self._machine = machine
        self._answering: subprocess.Popen[str] | None = None
        super().__init__(folder, address=machine.address)

    def _command(self) -> list[str]:
        return ["ip", "netns", "exec", self._machine.namespace, *super()._command()]

    def _answers(self) -> bool:
        return self.ask(f"ADDRESS = {(self.address, self.ports[3])}{PROBE}", timeout=20).returncode == 0

    def ask(self, program: str, *, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a little Python on that machine, with ``fs`` for the store."""
        if self._answering is None:
            script = ANSWERS.format(root=str(ROOT), options=self.options())
            command = ["ip", "netns", "exec", self._machine.namespace, sys.executable, "-W", "ignore", "-c", script]
            self._answering = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        its = self._answering
        assert its.stdin is not None
        assert its.stdout is not None
        its.stdin.write(json.dumps(program) + "\n")
        its.stdin.flush()
        if not select.select([its.stdout], [], [], timeout)[0]:  # one line answers one line: none is left in a buffer
            self._stop_answering()
            return subprocess.CompletedProcess(program, 1, "", "timed out")
        return subprocess.CompletedProcess(program, *json.loads(its.stdout.readline()))

    def _stop_answering(self) -> None:
        its, self._answering = self._answering, None
        if its is not None:
            its.kill()
            its.communicate()

    def kill(self) -> None:
        """End it, and what answers."""
        self._stop_answering()
        super().kill()


@pytest.fixture(scope="module")
def pair() -> Iterator[machines.Pair]:
    with machines.joined() as pair:
        yield pair


@pytest.fixture(scope="module")
def server(pair: machines.Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FarServer]:
    if (why := s3_server.why_not_here()) is not None:
        lack(why)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3_server, "_free_ports", lambda *_: [12_001, 12_002, 12_003, 12_004])  # nobody else is there
        server = FarServer(tmp_path_factory.mktemp("s3"), pair.machines[0])
    yield server
    server.kill()


def test_two_machines_export_from_s3_to_s3_and_a_rerun_resumes(
    pair: machines.Pair, server: FarServer, tmp_path: Path
) -> None:
    """One rank is killed in mid export, on the machine without the store; the same command again ends it."""
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 500, "u": 300}, 8))
    put = server.ask(f"fs.put({str(tmp_path / 'ckpt')!r} + '/', 'bucket/ckpt/', recursive=True)")
    assert put.returncode == 0, put.stderr
    config = tmp_path / "export.yaml"
    settings = {"ckpt_dir": "s3://bucket/ckpt", "export_dir": "s3://bucket/out", "storage_options": server.options()}
    config.write_text(yaml.safe_dump({**settings, "filter_sparse_opt": True, "num_shards": 3, "threads": 1}))
    arguments = ["--config", str(config)]

    own, mark = tmp_path / "own", tmp_path / "mark"
    own.mkdir()
    disk = {"OWN_DISK": str(own), "TMPDIR": str(own)}
    pause = {"ENTRY": crash.SCRIPT, "PAUSE_AT": "unit", "PAUSE_RANK": "1", "PAUSE_MARK": str(mark)}
    with exporting(pair, config, arguments, ranks=1, **disk, **pause) as agents:
        assert crash.wait_for_mark(mark, agents), [agent.communicate() for agent in agents]
        victims = ranks_of(config)
        assert victims
        os.kill(victims[-1], signal.SIGKILL)
        said = [agent.communicate(timeout=90)[1] for agent in agents]
        assert all(agent.returncode for agent in agents), said
    there = server.ask("print(fs.exists('bucket/out/manifest.json'))")
    assert there.stdout.strip() == "False", there

    with exporting(pair, config, arguments, ranks=1, **disk) as agents:
        said = [agent.communicate(timeout=150) for agent in agents]
        assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum(text.count("package: ") for text, _ in said) == 1, "one rank speaks"
    options = json.dumps(server.options())
    verified = server.ask(
        "from dist_export.cli import main; "
        f"sys.exit(main(['verify', 's3://bucket/out', '--storage_options', {options!r}]))"
    )
    assert verified.returncode == 0, verified.stderr
    found = server.ask("import json; print(json.loads(fs.cat_file('bucket/out/manifest.json'))['run']['world_size'])")
    assert found.stdout.strip() == "2"

    near = {"ckpt_dir": str(tmp_path / "ckpt"), "export_dir": str(tmp_path / "alone")}
    dist_export.export({**near, "filter_sparse_opt": True, "num_shards": 3})
    folder = tmp_path / "far"
    assert server.ask(f"fs.get('bucket/out', {str(folder)!r}, recursive=True)").returncode == 0
    for shard in sorted((tmp_path / "alone").glob("*.safetensors")):
        assert (folder / shard.name).read_bytes() == shard.read_bytes(), "the same bytes as of one rank and one disk"
