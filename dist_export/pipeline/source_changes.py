"""Whether the source is still what it was when the export began: its files by size, version and what the disk keeps of them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from dist_export.checkpoint.dcp_files import METADATA_FILES
from dist_export.checkpoint.detect import INDEX_FILES, RECIS
from dist_export.checkpoint.metadata import Checkpoint, SourceFile
from dist_export.errors import ExportError
from dist_export.formats.recis import DENSE_STATE, INDEX, MERGED, TENSORKEY
from dist_export.storage.directory import Directory


def look_at_small_files(source: Directory | None) -> dict[str, SourceFile]:
    """Return the states of the checkpoint's files that are no shards, as far as they are there. Rank 0.

    For a model in memory it is a word that no other export has: what one export wrote is never taken for another's.
    """
    if source is None:
        return {"live": SourceFile(name="live", size=0, version=uuid.uuid4().hex)}
    names = (INDEX, TENSORKEY, MERGED, DENSE_STATE, *METADATA_FILES, *INDEX_FILES)
    return {name: file for name in names if (file := _look_at(source, name)) is not None}


def _look_at(source: Directory, name: str) -> SourceFile | None:
    """Return the state of a file of the source; None where it is not there."""
    try:
        return SourceFile.of(name, source.stat(name))
    except FileNotFoundError:
        return None
    except OSError as error:  # whoever reads it tells
        return SourceFile(name=name, size=-1, version=str(error))


def refuse_changed_files(source: Directory | None, state: Mapping[str, SourceFile]) -> None:
    """Compare the checkpoint's small files with what they were when the export began. ExportError. Rank 0."""
    if source is None:
        return
    for name, file in sorted(state.items()):
        now = _look_at(source, name)
        if now is None or not file.is_same(now):
            raise ExportError(
                f"{source.describe(name)}: changed while it was being exported, so the package would mix two checkpoints. "
                "No manifest was written; run the export again on a checkpoint that is finished"
            )


def refuse_changed_payload(checkpoint: Checkpoint) -> None:
    """Compare the payload files with what they were when their headers were read. ExportError. Rank 0.

    RecIS writes its indexes anew with each save; other formats have nothing small that tells of one.
    """
    is_looked_at = checkpoint.format != RECIS and checkpoint.memory is None
    for file in checkpoint.files if is_looked_at else ():
        try:
            found = checkpoint.directory.stat(file.name)
        except OSError as error:
            what = error.strerror or str(error)
        else:
            if file.is_same(found):
                continue
            what = "changed"
        raise ExportError(
            f"{checkpoint.directory.describe(file.name)}: {what} while it was being exported, so the package would mix two "
            "checkpoints. No manifest was written; run the export again on a checkpoint that is finished"
        )
