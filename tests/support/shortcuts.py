"""What takes time in tests and shows in none: durability, types that torch evaluates anew, and its memory of fake tensors.

Processes that tests start as ``python`` take no shortcut, nor do those into which faults are put.
"""

from __future__ import annotations

import functools
import os
import sys
import typing
from typing import Any

SCHEMA = "torch._export.serde.schema"


def take() -> None:
    """Take the shortcuts, once for a process."""
    if not hasattr(typing.get_type_hints, "known"):
        remember_hints()
        skip_fsync()


def remember_no_fakes() -> None:
    """Let torch keep no results on fake tensors, where it has been imported: a seventh of the time of an export with a model.

    Sizes that are free hardly ever come again, and the files are the same without.
    """
    if "torch._dynamo.config" in sys.modules:
        sys.modules["torch._dynamo.config"].fake_tensor_cache_enabled = False  # type: ignore[attr-defined]


def skip_fsync() -> None:
    """Let ``os.fsync`` fail where it would, and return at once where not: no machine loses its power in a test."""

    def fsync(file: Any) -> None:
        os.fstat(file if isinstance(file, int) else file.fileno())

    setattr(os, "fsync", fsync)  # noqa: B010 -- the types know one fsync


def remember_hints() -> None:
    """Let torch evaluate the types of the fields of its program format once: a sixth of the time of an export with a model."""
    real = typing.get_type_hints
    known: dict[type, dict[str, Any]] = {}

    @functools.wraps(real)
    def get_type_hints(obj: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        if getattr(obj, "__module__", "") != SCHEMA or not isinstance(obj, type):
            return real(obj, *arguments, **options)
        if obj not in known:
            known[obj] = real(obj, *arguments, **options)
        return dict(known[obj])

    get_type_hints.known = known  # type: ignore[attr-defined]
    typing.get_type_hints = get_type_hints
