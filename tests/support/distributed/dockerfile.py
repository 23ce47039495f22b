"""Carry out a Dockerfile's steps without Docker: in a root of its own, an overlay over this machine's, with a fresh venv as
its Python. ``FROM`` is not looked at: what the base image has besides Python is this machine's.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.needed import lack, need_programs


def parse(text: str) -> list[tuple[str, str]]:
    """Return the instructions with their arguments; comments and the ends of continued lines are gone."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


class Image:
    """What the steps make: ``root`` is its file system as seen from outside, while :func:`mounted` holds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {
            "PATH": "/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/tmp",
        }
        self.environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        self.environment["PIP_COMPILE"] = (
            "0"  # nor all of torch: what is imported is compiled then. NO_COMPILE=1 means yes
        )
        self.folder = "/"
        self.user = "root"
        self.entrypoint: list[str] = []
        self.command: list[str] = []

    def build(self, text: str, context: Path, *, arguments: dict[str, str]) -> None:
        """Carry out all steps. AssertionError where one fails, with what it said."""
        shell = dict(arguments)
        for word, rest in parse(text):
            if word == "ARG":
                name, _, default = rest.partition("=")
                shell.setdefault(name, default.strip('"'))
            elif word == "ENV":
                self.environment |= dict(pair.split("=", 1) for pair in rest.split())
            elif word == "WORKDIR":
                self.folder = rest
                self.inside(rest).mkdir(parents=True, exist_ok=True)
            elif word == "COPY":
                self._copy(context, *rest.split())
            elif word == "RUN":
                done = self.run(["sh", "-c", rest], **shell)
                assert done.returncode == 0, f"RUN {rest}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
            elif word == "USER":
                self.user = rest
            elif word == "ENTRYPOINT":
                self.entrypoint = json.loads(rest)
            elif word == "CMD":
                self.command = json.loads(rest)
            else:
                assert word == "FROM", f"{word} {rest}: not an instruction that is known here"

    def run(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the image, as its user and in its working directory."""
        bytecode = {
            "PYTHONPYCACHEPREFIX": f"/tmp/bytecode-{self.user}"
        }  # where each user may keep it for the next command
        assignments = [f"{name}={value}" for name, value in {**bytecode, **self.environment, **environment}.items()]
        return subprocess.run(
            [
                *("chroot", f"--userspec={self.user}", str(self.root), "env", "-i", f"--chdir={self.folder}", *assignments),
                *command,
            ],
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip

    def inside(self, path: str) -> Path:
        """Return where a path of the image lies as seen from outside."""
        return self.root / os.path.join(self.folder, path).lstrip("/")

    def _copy(self, context: Path, *names: str) -> None:
        *sources, target = names
        for name in sources:
            source, place = context / name, self.inside(target)
            if source.is_dir():
                shutil.copytree(source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place = place / source.name if target.endswith("/") else place
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place)


def _lend_torch(root: Path) -> None:
    """Link this machine's torch into the venv: to unpack it takes half a minute of the processor.

    pip takes it if the version is that of the Dockerfile, and else gets its own. What torch needs is not lent.
    """
    (target,) = (root / "opt" / "venv" / "lib").glob("python*/site-packages")
    torch = importlib.metadata.distribution("torch")
    source = Path(str(torch.locate_file("")))
    for name in sorted({file.parts[0] for file in torch.files or ()} - {".."}):
        if (root / str(source / name).lstrip("/")).exists():  # else it is on a file system that is not laid over
            (target / name).symlink_to(source / name)
    for place in source.parents:
        inside = root / str(place).lstrip("/")
        if inside.exists():
            inside.chmod(inside.stat().st_mode | 0o055)


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[Image]:
    """Make the root and take it away. Skips the test, or fails it, where file systems cannot be laid over each other."""
    need_programs("chroot", "mount", "umount", package="coreutils and mount")
    if os.geteuid() != 0:
        lack("a root directory of one's own needs root's privileges")
    upper, work, root = folder / "upper", folder / "work", folder / "root"
    for place in (upper, work, root):
        place.mkdir()
    options = f"lowerdir=/,upperdir={upper},workdir={work}"
    done = subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", options, str(root)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lack(f"an overlay over / cannot be mounted: {done.stderr.strip()}")
    mounts = [root]
    try:
        for name in ("proc", "dev", "sys"):
            subprocess.run(["mount", "--bind", f"/{name}", str(root / name)], check=True)
            mounts.append(root / name)
        image = Image(root)
        for place in Path(sys.base_prefix).parents:  # an interpreter in somebody's home is everybody's here
            inside = root / str(place).lstrip("/")
            inside.chmod(inside.stat().st_mode | 0o055)
        subprocess.run(["chroot", str(root), os.path.realpath(sys.executable), "-m", "venv", "/opt/venv"], check=True)
        _lend_torch(root)
        yield image
    finally:
        for place in reversed(mounts):
            subprocess.run(["umount", "--lazy", str(place)], check=True)
        shutil.rmtree(upper)  # a gigabyte of torch
