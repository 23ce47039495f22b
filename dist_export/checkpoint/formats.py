"""Which format a checkpoint is of, by the files that only this format has."""

from __future__ import annotations

from dist_export.checkpoint.dcp import find_metadata
from dist_export.checkpoint.dcp_metadata import METADATA
from dist_export.checkpoint.recis import RecisReader
from dist_export.errors import CheckpointError
from dist_export.layout.recis import INDEX, TENSORKEY
from dist_export.storage import Directory

RECIS = "recis"
DCP = "dcp"
AUTO = "auto"

LOOKED_FOR = f"{INDEX} and {TENSORKEY} (RecIS), .metadata or model/.metadata (DCP)"
"""For messages."""


def detect_format(directory: Directory, *, asked: str = AUTO) -> str | None:
    """Return ``asked``, or with ``auto`` what the directory looks like: ``recis``, ``dcp``, None where it is neither.

    Raises:
        CheckpointError: it looks like both, or cannot be looked at.
    """
    if asked != AUTO:
        return asked
    try:
        names = set(directory.names())
        is_recis = not names.isdisjoint((INDEX, TENSORKEY))
        is_dcp = METADATA in names or (not is_recis and bool(find_metadata(directory)))
    except OSError as error:
        raise CheckpointError(f"{directory.url} cannot be read: {error.strerror or error}") from error
    if is_recis and is_dcp:
        raise CheckpointError(
            f"{directory.url} holds a RecIS checkpoint and a DCP checkpoint; say which one with format: recis or format: dcp"
        )
    return RECIS if is_recis else DCP if is_dcp else None


def open_reader(directory: Directory, *, asked: str = AUTO) -> RecisReader:
    """Open the checkpoint for an export.

    Raises:
        CheckpointError: no format is recognised, the checkpoint is not complete, or its format cannot be exported.
    """
    found = detect_format(directory, asked=asked)
    if found == DCP:
        raise CheckpointError(
            f"{directory.url} is a DCP checkpoint (torch.distributed.checkpoint). `dist_export inspect` shows what it "
            "holds; the export reads RecIS checkpoints alone. Nothing was written"
        )
    if found is None and (names := directory.names()):
        raise CheckpointError(
            f"{directory.url}: no {INDEX} and no {TENSORKEY} among its {len(names)} files; looked for {LOOKED_FOR}. Both "
            "are written last, so this is no checkpoint of these formats or its save did not finish"
        )
    return RecisReader(directory)
