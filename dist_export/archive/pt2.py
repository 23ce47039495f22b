"""Make the bytes of ``exported_model.pt``: an ExportedProgram without information about the machine that packed it."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch

from dist_export.archive.legacy import pack_legacy
from dist_export.errors import ConfigError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

ArchiveFormat = Literal["pt2", "legacy"]

_MACHINE_BOUND_META = frozenset({"stack_trace", "source_fn_stack", "custom", "from_node"})
"""Node metadata that quotes source files or contains free text. ``nn_module_stack`` and ``torch_fn`` stay: they name
only classes and functions, and unflattening a program needs the former."""


def pack_program(exported_program: ExportedProgram, *, archive_format: ArchiveFormat) -> bytes:
    """Return the bytes of ``exported_model.pt``. Writes no file. The program is unchanged when this returns.

    The same program gives the same bytes in every process with the same torch: they contain no time, no path and no file
    name, and the root folder of a PT2 archive is always ``archive``.

    Args:
        exported_program: Traced on the CPU.
        archive_format: ``pt2`` is the archive of torch >= 2.8. ``legacy`` is the zip that torch 2.7 and, so far, every
            later torch reads.

    Raises:
        ConfigError: The format is unknown, or this torch cannot write ``pt2``.
        TraceError: The program uses something that the legacy format cannot express.
    """
    if archive_format not in ("pt2", "legacy"):
        raise ConfigError(f"archive_format is {archive_format!r}; it must be 'pt2' or 'legacy'")
    with _hidden_sources(exported_program):
        if archive_format == "legacy":
            return pack_legacy(exported_program)
        if importlib.util.find_spec("torch.export.pt2_archive") is None:
            raise ConfigError(
                f"archive_format 'pt2' needs torch >= 2.8 and this is {torch.__version__}; use archive_format 'legacy'"
            )
        # A buffer has no name. With a path, the archive's root folder would get the name of the file.
        buffer = io.BytesIO()
        torch.export.save(exported_program, buffer)
    return buffer.getvalue()


@contextmanager
def _hidden_sources(exported_program: ExportedProgram) -> Iterator[None]:
    """Remove the metadata that names source files from every node, and restore it afterwards.

    A copy of the program would be cleaner, but copying also copies the weights.
    """
    nodes = [
        node
        for module in exported_program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
    ]
    kept = [node.meta for node in nodes]
    try:
        for node, meta in zip(nodes, kept, strict=True):
            node.meta = {key: value for key, value in meta.items() if key not in _MACHINE_BOUND_META}
        yield
    finally:
        for node, meta in zip(nodes, kept, strict=True):
            node.meta = meta
