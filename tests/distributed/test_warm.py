"""The pool of warm processes gives what processes of their own give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import test_worlds
from tests.support import warm
from tests.support.distributed import warm_torchrun

pytestmark = pytest.mark.distributed

SCRIPT = """
import os, sys
print("rank", os.environ.get("RANK", "none"), sys.argv[1:], __name__, os.getcwd())
print("said", os.environ["SAID"], file=sys.stderr)
sys.exit(int(sys.argv[1]) if os.environ.get("RANK", "0") == "0" else 0)
"""


@pytest.mark.parametrize("code", [0, 3])
def test_a_command_does_what_python_does(code: int, tmp_path: Path) -> None:
    """Output, arguments, directory, environment and exit code."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [str(tmp_path / "script.py"), str(code), "x"]
    expected = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"SAID": "a"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    found = warm.run_command(1, *command, cwd=tmp_path, SAID="a")
    assert (found.returncode, found.stdout, found.stderr) == (expected.returncode, expected.stdout, expected.stderr)


def test_each_rank_has_its_number_and_its_code(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    found = warm.run_command(3, str(tmp_path / "script.py"), "4", SAID="a")
    assert [line.split()[1] for line in found.stdout.splitlines()] == ["0", "1", "2"]
    assert (found.returncode, found.codes) == (1, [4, 0, 0])


def test_one_that_does_not_end_is_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import time\nprint('waits', flush=True)\ntime.sleep(600)\n")
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        warm.run_command(1, str(tmp_path / "script.py"), timeout=1)
    assert caught.value.output == "waits\n"


def tell_modules() -> None:
    missing = {"torch.export", "dist_export.pipeline.steps"} - sys.modules.keys()
    os._exit(len(missing))


def test_it_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds has been imported; the environment is the caller's at the moment of the call."""
    monkeypatch.setenv("DIST_EXPORT_WARM", "yes")
    for function, expected in ((tell_modules, 0), (tell_environment, 7)):
        process = warm.start(function)
        assert not warm.wait([process], 60)
        assert process.exitcode == expected


def tell_environment() -> None:
    os._exit(7 if os.environ.get("DIST_EXPORT_WARM") == "yes" else 1)


RANK = """
import json, os, sys
of_the_run = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE")
ours = {name: "" if name in of_the_run else value for name, value in os.environ.items()}
is_leader = os.getsid(0) == os.getpid()
with open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w") as file:
    json.dump([ours, is_leader, sys.argv[2:], __name__, os.getcwd(), sys.path[0]], file)
sys.exit(3 if os.environ["RANK"] == "1" else 0)
"""


def test_a_warm_torchrun_gives_its_ranks_what_torchrun_gives_them(tmp_path: Path) -> None:
    """Environment, arguments, a session of their own; it reports a failed rank as torchrun does, and ends as it does."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    seen = []
    for launch in (test_worlds.torchrun, warm_torchrun.torchrun):
        folder = tmp_path / str(len(seen))
        folder.mkdir()
        done = launch(2, str(script), str(folder), "x")
        report = [
            line.partition("(pid")[0]
            for line in done.stderr.splitlines()
            if line.strip().startswith(("rank ", "exitcode "))
        ]
        seen.append(
            (done.returncode, report[:2], *(json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)))
        )
    assert seen[0][0] == 1
    assert seen[0][1] != []
    assert seen[1] == seen[0]
