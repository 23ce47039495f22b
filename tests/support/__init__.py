"""What tests share: writers of checkpoints, models, cases, and ranks to run them on."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository. A process that has it on its path can import ``tests`` and ``dist_export``."""
