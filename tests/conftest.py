"""Fixtures that every test may use."""

from __future__ import annotations

import compileall
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import ROOT, shortcuts

if TYPE_CHECKING:
    from tests.support.faults.fault_cases import Bench
    from tests.support.s3.s3_server import S3Server

shortcuts.take()

FIXTURES = "DIST_EXPORT_FIXTURES"
REQUIRED = "DIST_EXPORT_REQUIRE_FIXTURES"


def pytest_configure(config: pytest.Config) -> None:
    """Compile the package once, and not in each process that a test starts, also where $PYTHONDONTWRITEBYTECODE is set."""
    if not hasattr(config, "workerinput"):
        for folder in ("dist_export", "tests/support"):
            compileall.compile_dir(ROOT / folder, quiet=2)


def pytest_collection_finish() -> None:
    """Leave what imports and collection made out of garbage collections, which are rare: a twentieth of an export's time."""
    shortcuts.remember_no_fakes()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the rewritten assertions of test modules for the next run; modules that tests write are not kept."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, False
    try:
        return (yield)
    finally:
        sys.dont_write_bytecode = before


def find_fixtures() -> Path:
    """Return where the reference checkpoints should be, whether they are or not."""
    given = os.environ.get(FIXTURES)
    return Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "fixtures"


def need_fixtures(kind: str) -> Path:
    """Return the folder of one kind of reference checkpoints; where it is not there the test skips, or fails if it must run."""
    folder = find_fixtures() / kind
    if not folder.is_dir():
        message = f"no reference checkpoints in {folder}; set ${FIXTURES} to the directory that holds {kind}/"
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{message} (${REQUIRED} asks for them)")
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def recis_fixtures() -> Path:
    """The checkpoints that RecIS's own code wrote, each ``X/`` with its content in ``X.truth.npz``."""
    return need_fixtures("recis")


@pytest.fixture(scope="session")
def torchrec_fixtures() -> Path:
    """The DCP checkpoints that torchrec and torch wrote, each ``X/`` with its content in ``X.golden.pt``."""
    return need_fixtures("torchrec")


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Checkpoints, and a server that forks exports with a shim below them that injects faults."""
    from tests.support.faults.fault_cases import Bench, build_shim

    folder = tmp_path_factory.mktemp("faults")
    shim = build_shim(folder)
    if isinstance(shim, str):
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{shim} (${REQUIRED} asks for it)")
        pytest.skip(shim)
    bench = Bench(folder, shim)
    yield bench
    bench.close()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on loopback; where it is not installed the test skips, or fails if it must run."""
    from tests.support.s3.s3_server import S3Server, why_not_here

    reason = why_not_here()
    if reason is not None:
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{reason} (${REQUIRED} asks for it)")
        pytest.skip(reason)
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.kill()
