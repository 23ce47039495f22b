"""Tools that a test cannot do without: it skips where one cannot be had, and fails where it must run."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

REQUIRED = "DIST_EXPORT_REQUIRE_TOOLS"


def lack(message: str) -> NoReturn:
    """Skip the test for this reason; fail where ``.ci/run`` has installed what is needed and asks for it."""
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{message} (${REQUIRED} asks for it)")
    pytest.skip(message)


def need_programs(*names: str, package: str) -> None:
    """Skip or fail where a program is not installed. ``package``: what to install."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        lack(f"no {', '.join(missing)} here; scripts/install_tools.sh installs {package}")
