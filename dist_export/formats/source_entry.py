"""The entry ``source`` of ``manifest.json``: what a package was exported from."""

from __future__ import annotations

import msgspec

from dist_export.formats.delta_entries import Count
from dist_export.formats.package_entries import FileEntry

RENAMED, PRUNED = "rename_tables", "prune"


class SourceEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Where the rows come from."""

    path: str
    """The path from the config. If that was a registry's URI or a training run, the checkpoint that it resolved to."""
    format: str
    fingerprint: str
    num_files: Count
    num_bytes: Count
    uri: str | msgspec.UnsetType = msgspec.UNSET
    """The version in the registry, if the config named the checkpoint by a registry's URI."""
    step: int | msgspec.UnsetType = msgspec.UNSET
    """The training step, if the checkpoint is of a run or a package that says it. Of a trainer's dumps, that of the last one."""
    rows_step: int | msgspec.UnsetType | None = msgspec.UNSET
    """The training step of the rows, if it is not ``step``: a dense part alone is over the rows of its base. null if these do not
    say their step. Absent if it is ``step``."""
    earlier: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    """Of a package: ``prune`` and ``rename_tables``, if it was exported with these settings, or a package before it. Its names or
    rows are not those of the checkpoint that all goes back to. Absent without any."""
    steps: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET
    """Of a trainer's dumps: the steps whose rows were taken, in order."""
    files: tuple[FileEntry, ...] | msgspec.UnsetType = msgspec.UNSET
    """Of a trainer's dumps: the files that were read."""

    @property
    def path_for_people(self) -> str:
        """The path; of a source without one, words."""
        return self.path or ("the model in memory" if self.format == "live" else "no checkpoint")

    @property
    def was_renamed(self) -> bool:
        """Whether tables had other names in the checkpoint than in the package that was the source."""
        return not isinstance(self.earlier, msgspec.UnsetType) and RENAMED in self.earlier

    @property
    def was_pruned(self) -> bool:
        """Whether the package that was the source, or one before it, lacks rows of the checkpoint."""
        return not isinstance(self.earlier, msgspec.UnsetType) and PRUNED in self.earlier

    @property
    def dense_step(self) -> int | None:
        """The training step of the checkpoint; None if it is not known."""
        return None if isinstance(self.step, msgspec.UnsetType) else self.step

    @property
    def step_of_rows(self) -> int | None:
        """The training step of the rows; None if it is not known."""
        return self.dense_step if isinstance(self.rows_step, msgspec.UnsetType) else self.rows_step

    @property
    def other_rows(self) -> str:
        """Of which step the rows are, in words, if it is not that of the checkpoint; else empty."""
        if isinstance(self.rows_step, msgspec.UnsetType):
            return ""
        return "rows of an unknown step" if self.rows_step is None else f"rows of step {self.rows_step:,}"
