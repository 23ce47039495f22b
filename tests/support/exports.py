"""Exports without a score program, for tests of other matters: its trace takes as long as the rest of a small export.

Tests of the score program, and of what an export does by default, call ``dist_export`` itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dist_export
from dist_export.config.loader import load_config
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.pipeline.config_agreement import build_and_digest
from dist_export.pipeline.run import run_export
from dist_export.runtime.joining import join

SCORES_OFF = {"score_program": "off"}


def exporter(*arguments: Any, **settings: Any) -> dist_export.Exporter:
    """Return an exporter as ``dist_export.Exporter`` does."""
    return dist_export.Exporter(*arguments, **{**SCORES_OFF, **settings})


def export(config: Mapping[str, Any], *, tuning: Tuning = STANDARD, **options: Any) -> dist_export.Manifest:
    """Export as ``dist_export.export`` does. With a ``tuning`` of its own it shows no progress."""
    values = {**SCORES_OFF, **config}
    if tuning is STANDARD:
        return dist_export.export(values, **options)
    settings = load_config(values)
    with join(timeout_secs=settings.timeout) as ranks:
        objects, digests = build_and_digest(ranks, settings)
        return run_export(ranks, settings, objects, is_shown=False, digests=digests, tuning=tuning, **options)[0]
