"""The tutorial works as it is written: its files and commands, in its order, and each command prints what the page shows."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

TUTORIALS = ROOT / "docs" / "tutorials"


def read_blocks(page: str) -> list[tuple[str, str]]:
    """Return (language, content) of a page's code blocks, in order."""
    text = (TUTORIALS / page).read_text()
    return re.findall(r"^```(python|yaml|bash|text)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def follow(blocks: list[tuple[str, str]], folder: Path) -> dict[str, str]:
    """Write the files, run the commands, and compare what they print; return that by command."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    printed: dict[str, str] = {}
    command = ""
    for language, content in blocks:
        if language == "bash":
            command = content.strip()
            done = subprocess.run(
                ["bash", "-ec", command], cwd=folder, env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            printed[command] = done.stdout
        elif language == "text":
            assert find_missing_line(content, printed[command]) is None, f"{command} printed\n{printed[command]}"
        else:
            name = re.match(r"# (\S+)\n", content)
            assert name is not None, f"no name of a file in the first line of\n{content}"
            (folder / name[1]).write_text(content)
    return printed


def find_missing_line(expected: str, printed: str) -> str | None:
    """Return the first line of ``expected`` that is not in ``printed`` where it should be; ``...`` stands for any text.

    A line that is ``...`` alone stands for any lines, also for none; all other lines follow each other.
    """
    rest = printed
    for piece in re.split(r"^\.\.\.\n", expected, flags=re.MULTILINE):
        pattern = "\n".join(re.escape(line).replace(re.escape("..."), ".*") for line in piece.splitlines())
        found = re.search(rf"^{pattern}$" if pattern else "", rest, re.MULTILINE)
        if found is None:
            return piece
        rest = rest[found.end() :]
    return None


@pytest.mark.parametrize(
    ("expected", "missing"),
    [
        ("a\nb 1\n", None),
        ("a\nb ...\n", None),
        ("a\n...\nc\n", None),
        ("...\nc\n", None),
        ("a\nc\n", "a\nc\n"),
        ("c\n...\na\n", "a\n"),
        ("b\n", "b\n"),
    ],
)
def test_output_is_compared_line_by_line(expected: str, missing: str | None) -> None:
    assert find_missing_line(expected, "a\nb 1\nc\n") == missing


@pytest.mark.distributed
def test_scores_from_the_package_are_those_of_the_trainer_and_all_commands_print_what_the_page_says(
    tmp_path: Path,
) -> None:
    """Runs training, init, plan, export on two ranks, a second export, verify, and lookups: each as the page has it."""
    printed = follow(read_blocks("ten-minutes.md"), tmp_path)
    scores = [re.findall(r"items 41 and 42: (.*)", text) for text in printed.values()]
    trainer, package = (found[0] for found in scores if found)
    assert trainer == package
    assert len(printed) == 7


@pytest.mark.distributed
def test_a_served_model_is_refreshed_as_the_page_says(tmp_path: Path) -> None:
    """Runs training, watch and a server beside each other, with a client before and after the second checkpoint."""
    model = next(block for block in read_blocks("ten-minutes.md") if block[1].startswith("# my_model.py"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    blocks = [(language, content.replace("8000", port)) for language, content in read_blocks("fresh-models.md")]
    try:
        printed = follow([model, *blocks], tmp_path)
    finally:
        for name in ("watch.pid", "serve.pid"):
            pid = int((tmp_path / name).read_text() or 0) if (tmp_path / name).exists() else 0
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM) if pid else None
    assert len(printed) == 8
