"""Building the compiled kernels: from the wheel's own recipe, without a compiler, without warnings, and under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dist_export.kernels.sources import digest_sources, list_sources
from tests.support.kernels import REQUIRED, UNDER_TEST

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CC", "cc")
FLAGS = ("-std=gnu11", "-fPIC", "-shared", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def need(condition: bool, reason: str) -> None:
    if condition:
        return
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{reason} (${REQUIRED} asks for it)")
    pytest.skip(reason)


def compile_library(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    need(shutil.which(COMPILER) is not None, f"no C compiler {COMPILER}")
    digest = f'-DSOURCE_DIGEST="{digest_sources()}"'
    files = [str(file) for file in list_sources() if file.suffix == ".c"]
    command = [COMPILER, *FLAGS, *options, digest, "-o", str(path), *files, "-lm"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def build_wheel(tmp_path: Path, **environment: str) -> Path:
    """Build a wheel from a copy of the files that it is made of, and return it."""
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT / "dist_export", tree / "dist_export", ignore=shutil.ignore_patterns("__pycache__", "_compiled.so")
    )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = "from setuptools import build_meta; build_meta.build_wheel('../dist')"
    (tmp_path / "dist").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", build],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    return wheel


def describe(tmp_path: Path, wheel: Path, **environment: str) -> str:
    """Unpack a wheel, and return what its command says of its kernels."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-m", "dist_export", "--version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()[1]


def test_the_wheel_has_the_library_and_the_name_of_the_platform(tmp_path: Path) -> None:
    need(shutil.which(COMPILER) is not None, f"no C compiler {COMPILER}")
    wheel = build_wheel(tmp_path)
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "dist_export/kernels/_compiled.so" in names
    assert {f"dist_export/kernels/src/{path.name}" for path in list_sources()} <= set(names)
    assert describe(tmp_path, wheel, DIST_EXPORT_KERNELS="compiled").startswith("kernels: compiled (")


@pytest.mark.parametrize("compiler", ["/bin/false", "/nowhere/cc"])
def test_without_a_compiler_the_wheel_is_for_every_platform_and_uses_numpy(tmp_path: Path, compiler: str) -> None:
    wheel = build_wheel(tmp_path, CC=compiler)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert describe(tmp_path, wheel) == "kernels: numpy (_compiled.so was not built)"


@pytest.mark.parametrize("optimisation", ["-O0", "-O3"])
def test_the_sources_compile_without_a_warning(tmp_path: Path, optimisation: str) -> None:
    done = compile_library(tmp_path / "library.so", optimisation)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_kernels_pass_their_tests_under_the_sanitizers(tmp_path: Path) -> None:
    """No kernel reads or writes outside its arrays, or does what C leaves undefined."""
    library = tmp_path / "sanitized.so"
    done = compile_library(library, *SANITIZERS)
    need(done.returncode == 0, f"{COMPILER} has no address sanitizer: {done.stderr[-300:]}")
    runtime = subprocess.run(
        [COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    need(os.path.isabs(runtime), f"{COMPILER} has no libasan.so")
    environment = {
        **os.environ,
        UNDER_TEST: str(library),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    arguments = ["-m", "pytest", "-q", "-x", "-k", "plain or AVX2", "tests/unit/kernels"]
    run = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
