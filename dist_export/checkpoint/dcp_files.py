"""Which files tell that a directory is a DCP checkpoint."""

from __future__ import annotations

from dist_export.storage.directory import Directory

METADATA = ".metadata"
MODEL, OPTIMIZER = "model", "optimizer"
"""TorchEasyRec's two directories."""
METADATA_FILES = (METADATA, f"{MODEL}/{METADATA}", f"{OPTIMIZER}/{METADATA}")
"""All that a DCP checkpoint may have."""


def find_metadata(directory: Directory) -> tuple[str, ...]:
    """Return the metadata files that are there: ``.metadata``, or those of TorchEasyRec; empty for no DCP checkpoint."""
    if directory.exists(METADATA):
        return (METADATA,)
    if not directory.exists(f"{MODEL}/{METADATA}"):
        return ()
    return tuple(f"{part}/{METADATA}" for part in (MODEL, OPTIMIZER) if directory.exists(f"{part}/{METADATA}"))
