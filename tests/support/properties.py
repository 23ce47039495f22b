"""How many examples a test of a property tries: all under the profile ``ci``, a quarter of them under ``dev``.

The examples are the same in every run; those of ``dev`` are the first of ``ci``'s. ``HYPOTHESIS_PROFILE`` chooses.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

PROFILE = "HYPOTHESIS_PROFILE"
FEWEST = 10

for _name in ("dev", "ci"):
    settings.register_profile(_name, deadline=None, derandomize=True, database=None)


def seeds(number: int) -> range:
    """Return the seeds of a test of its own making: so many under ``ci``, a quarter under ``dev``."""
    return range(number if os.environ.get(PROFILE, "dev") == "ci" else max(1, number // 4))


def examples(number: int, **options: Any) -> settings:
    """Return the settings of a property that ``ci`` tries for so many examples."""
    profile = os.environ.get(PROFILE, "dev")
    fewer = max(FEWEST, number // 4)
    return settings(settings.get_profile(profile), max_examples=number if profile == "ci" else fewer, **options)
