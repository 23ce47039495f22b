"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FIXTURES = "DIST_EXPORT_FIXTURES"
REQUIRED = "DIST_EXPORT_REQUIRE_FIXTURES"


def find_fixtures() -> Path:
    """Return where the reference checkpoints should be, whether they are or not."""
    given = os.environ.get(FIXTURES)
    return Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "fixtures"


@pytest.fixture(scope="session")
def recis_fixtures() -> Path:
    """The checkpoints that RecIS's own code wrote, each ``X/`` with its content in ``X.truth.npz``."""
    folder = find_fixtures() / "recis"
    if not folder.is_dir():
        message = f"no reference checkpoints in {folder}; set ${FIXTURES} to the directory that holds recis/"
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{message} (${REQUIRED} asks for them)")
        pytest.skip(message)
    return folder
