"""A trainer's own deltas as the source: what the pipeline does otherwise for them. All but the rows is the base's."""

from __future__ import annotations

import glob

import msgspec

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.tzrec.files import DumpFile, list_dumps
from dist_export.config.schema import ExportConfig
from dist_export.config.source_needs import SourceStorage, TakenDumps
from dist_export.config.trainer_deltas import TZREC_DELTA
from dist_export.errors import CheckpointError, ConfigError, PlanError
from dist_export.humanize import count
from dist_export.manifest import FileEntry, Manifest, SourceEntry
from dist_export.package.reader import Package
from dist_export.pipeline.run_dir import FoundCheckpoint
from dist_export.pipeline.trainer_rows import DumpSettings, open_dump
from dist_export.runtime.ranks import Ranks
from dist_export.storage.directory import Directory, FileStat
from dist_export.storage.urls import open_place


def is_trainer_delta(format_name: str) -> bool:
    """Whether the setting ``format`` names a trainer's own deltas."""
    return format_name == TZREC_DELTA


def find_dumps(url: str, storage: SourceStorage, *, until_step: int | None) -> FoundCheckpoint:
    """Return the directory of dumps and the last step that is taken of it. One rank; reads names alone. CheckpointError."""
    steps = [step for step in list_steps(url, storage) if until_step is None or step <= until_step]
    return FoundCheckpoint(url, max(steps, default=until_step), ())


def list_steps(url: str, storage: SourceStorage) -> tuple[int, ...]:
    """Return all steps of a directory of dumps, in order. One rank; reads names alone. CheckpointError."""
    directory = open_place(url, storage.storage_options, follow_links=storage.follow_links)
    return tuple(sorted({file.step for file in _list(directory)}))


def stat_dumps(directory: Directory) -> dict[str, FileStat]:
    """Return the state of each file of a directory of dumps, by its path there. CheckpointError."""
    return directory.stat_many([file.path for file in _list(directory)])


def _list(directory: Directory) -> tuple[DumpFile, ...]:
    try:
        return list_dumps(directory).files
    except OSError as error:
        raise CheckpointError(f"{directory.url} cannot be read: {error.strerror or error}") from error


def open_trainer_delta(ranks: Ranks, config: TakenDumps, source: Directory, base: Package) -> Checkpoint:
    """Return the rows of the dumps since the base. All ranks.

    Raises:
        ConfigError: the base does not say its step and the settings do not either, or ``dtype`` is set.
        PlanError: the base has what no dump has.
        CheckpointError, PlanError, ExportError: as :func:`~dist_export.pipeline.trainer_rows.open_dump`.
    """
    manifest = base.manifest

    def look() -> DumpSettings:
        if config.dtypes:
            raise ConfigError(
                "dtype is set, but with format: tzrec_delta rows are cast as the base's are; remove dtype"
            )
        if manifest.dense_tensors:
            raise PlanError(
                f"base {config.base}: its shards hold {count(len(manifest.dense_tensors), 'dense tensor')}, which a delta of "
                "dumps cannot carry; export the base from a checkpoint whose dense parameters are apart"
            )
        if manifest.prune is not msgspec.UNSET:
            raise PlanError(
                f"base {config.base}: rows were pruned when it was exported, and dumps would bring them back; export the base "
                "without prune"
            )
        if manifest.source.was_renamed or manifest.source.was_pruned:
            done = "tables had been renamed" if manifest.source.was_renamed else "rows had been pruned"
            raise PlanError(
                f"base {config.base}: it was exported from the package {manifest.source.path}, of which {done}, and dumps have "
                "the names and rows of the trainer; export the base from the checkpoint"
            )
        of_base = manifest.source.step_of_rows
        since = of_base if config.since_step is None else config.since_step
        if of_base is not None and since is not None and since < of_base:
            raise ConfigError(
                f"since_step is {since}, and base {config.base} has rows of step {of_base}, later than some dumps; leave "
                "since_step out"
            )
        if since is None:
            raise ConfigError(
                f"base {config.base} does not say the training step of its rows, so nobody knows which dumps are later; set "
                "since_step"
            )
        return DumpSettings(
            since=since,
            until=config.until_step,
            allow_ragged=config.allow_ragged,
            max_memory=config.max_memory_bytes,
        )

    return open_dump(ranks, source, manifest, ranks.run("look at the settings of the dumps", look))


def as_base(config: ExportConfig, checkpoint: Checkpoint) -> ExportConfig:
    """Return the settings with the casts that bring rows of dumps to the base's dtypes; as they are for other sources."""
    if checkpoint.dump is None:
        return config
    return config.with_changes(dtype=[{glob.escape(table): dtype} for table, dtype in checkpoint.dump.dtypes])


def describe_dumps(source: SourceEntry, checkpoint: Checkpoint | None) -> SourceEntry:
    """Return the manifest's entry of the source with the steps and files of dumps; as it is for other sources."""
    dump = None if checkpoint is None else checkpoint.dump
    if dump is None:
        return source
    return msgspec.structs.replace(
        source,
        num_files=len(dump.files),
        num_bytes=sum(file.num_bytes for file in dump.files),
        steps=dump.steps,
        files=tuple(FileEntry(path=file.path, num_bytes=file.num_bytes, digest=file.digest) for file in dump.files),
    )


def note_dense_of_base(base: Manifest, checkpoint: Checkpoint) -> list[str]:
    """Return the note that says how old the dense part is."""
    assert checkpoint.dump is not None
    step = "" if base.source.dense_step is None else f" (step {base.source.dense_step})"
    return [
        f"the rows are those of step {checkpoint.dump.steps[-1]}; all else is the base's{step}, the dense arch included"
    ]
