"""Exports without a score program, for tests of other matters: its trace takes as long as the rest of a small export.

Tests of the score program, and of what an export does by default, call ``dist_export`` itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dist_export

SCORES_OFF = {"score_program": "off"}


def exporter(*arguments: Any, **settings: Any) -> dist_export.Exporter:
    """Return an exporter as ``dist_export.Exporter`` does."""
    return dist_export.Exporter(*arguments, **{**SCORES_OFF, **settings})


def export(config: Mapping[str, Any], **options: Any) -> dist_export.Manifest:
    """Export as ``dist_export.export`` does."""
    return dist_export.export({**SCORES_OFF, **config}, **options)
