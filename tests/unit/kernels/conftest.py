"""Each test of this folder runs on every implementation of the kernels."""

from __future__ import annotations

import pytest

from dist_export.kernels.protocol import Kernels
from tests.support.kernels import IMPLEMENTATIONS, open_kernels


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """One implementation: its results are compared with those of numpy."""
    return open_kernels(request.param)
