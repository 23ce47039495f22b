"""The traced program as bytes, and one line where torch cannot write it. Rank 0."""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch.export import ExportedProgram

from dist_export.archive.guard import check_archive
from dist_export.archive.pt2 import pack_program
from dist_export.dense.blame import blame_text, said
from dist_export.errors import DistExportError, PackageError, TraceError


def pack_traced(program: ExportedProgram, *, archive_format: Literal["pt2", "legacy"]) -> bytes:
    """Return the bytes of ``exported_model.pt``, which passes the look that servers take at it.

    Raises:
        TraceError: torch cannot write the program, or what it wrote has something in it that the look refuses. Its own
            error is kept as the cause.
        ConfigError: as :func:`~dist_export.archive.pt2.pack_program`.
    """
    try:
        packed = pack_program(program, archive_format=archive_format)
    except DistExportError:
        raise
    except Exception as error:
        raise TraceError(
            f"the dense arch was traced, but torch.export.save cannot write the program: {_why(program, error)}. Write this "
            "part of forward with other operators"
        ) from error
    try:
        check_archive(packed)
    except PackageError as error:
        told = str(error).split(": ", 1)[-1].split("; ")[0]
        advice = "Write this part of forward with other operators"
        if "custom object" in told:
            advice = "Let the module hold a plain tensor there, no object of a class of its own"
        raise TraceError(
            f"the dense arch was traced, but no server would load the program: {told}. {advice}"
        ) from error
    return packed


def _why(program: ExportedProgram, error: Exception) -> str:
    """Return the operator that cannot be written and the user's line where it is called, else what torch says."""
    found = re.match(r"Failed serializing node (\S+) in graph", str(error))
    for module in program.graph_module.modules() if found else ():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if found and node.name == found[1]:
                cause = error.__cause__ or error.__context__
                told = f" ({said(cause)})" if cause is not None else ""
                return f"it has no form for {node.target}{told}{blame_text(node.meta.get('stack_trace') or '')}"
    return said(error)
