"""All that can be wrong before an export begins, looked at in one go, for ``plan``. Nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.model_weights import ModelWeights
from dist_export.config.mistakes import Mistakes
from dist_export.config.needs import MissingTables
from dist_export.config.schema import ExportConfig
from dist_export.config.source_needs import OpenedSource, PlannedTables, SourceStorage
from dist_export.dense.fg import Features
from dist_export.errors import ConfigError, DistExportError, UnaskedError
from dist_export.model.user_objects import Objects, build_objects
from dist_export.pipeline.account import DenseMeta
from dist_export.pipeline.inputs import find_dense, look_for_weights, open_source, read_confs
from dist_export.pipeline.locate import Locations, locate
from dist_export.pipeline.planning import choose, read_pruning
from dist_export.pipeline.target import ExportPaths, open_paths, place_of
from dist_export.runtime.ranks import Ranks
from dist_export.storage.directory import Directory
from dist_export.storage.local_io import why_no_directory
from dist_export.storage.urls import open_place


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a plan starts from, without a mistake of the user's."""

    weights: ModelWeights | None
    config: ExportConfig
    """With the paths that were found."""
    located: Locations
    paths: ExportPaths
    source: Directory
    checkpoint: Checkpoint | None
    fg_conf: dict[str, Any] | None
    features: Features
    dense_state: DenseMeta
    notes: tuple[str, ...] = ()


def look_at_all(ranks: Ranks, config: ExportConfig, world_size: int) -> Found:
    """Look at all that an export is given, and go on after a mistake, so that all of them are in one error. All ranks."""
    mistakes = Mistakes()
    objects = _build(ranks, config, mistakes)
    model = None if objects is None else objects.model
    weights = mistakes.collect(lambda: look_for_weights(ranks, config, model), None)
    # without the model nobody knows which tensors of some checkpoints are tables
    ignored = (UnaskedError,) if mistakes else ()
    needs_dense = config.model is not None
    located = mistakes.collect(
        lambda: ranks.broadcast(
            "find the checkpoint", lambda: locate(config, needs_dense=needs_dense, weights=weights)
        ),
        None,
        ignored=ignored,
    )
    config = config if located is None else located.apply(config)
    paths = _open_target(ranks, config, mistakes)
    source = _open_source(config.ckpt_dir or "", config) if located is not None else None
    checkpoint, dense_state = (
        (None, ()) if source is None else _look_at_source(ranks, config, source, model, weights, mistakes, ignored)
    )
    confs = None
    if objects is not None or config.fg is None:  # what is given as a file can be read all the same
        given = Objects() if objects is None else objects
        confs = mistakes.collect(
            lambda: ranks.run("check fg and mc", lambda: read_confs(config, given, checkpoint)), None
        )
    notes: Sequence[str] = ()
    if checkpoint is not None:
        if config.need_export_sparse and (not ignored or checkpoint.is_of_recis):
            _try_choices(ranks, config, checkpoint, world_size, mistakes)
        if weights is not None and objects is not None and objects.dataset is not None:
            notes = _match_tables(ranks, config, checkpoint, weights, dense_state, mistakes)
    mistakes.refuse()
    assert located is not None
    assert paths is not None
    assert source is not None
    assert confs is not None
    return Found(
        weights=weights,
        config=config,
        located=located,
        paths=paths,
        source=source,
        checkpoint=checkpoint,
        fg_conf=confs[0],
        features=confs[2],
        dense_state=dense_state,
        notes=tuple(notes),
    )


def _build(ranks: Ranks, config: ExportConfig, mistakes: Mistakes) -> Objects | None:
    """Build what of the caller's can be built. All ranks. None after a mistake."""
    fg_only = config.with_changes(model=None, need_export_sparse=True) if config.fg else None
    built = config if config.model is not None else fg_only
    if built is None:
        return Objects()
    step = "build the model and the dataset"
    return mistakes.collect(lambda: ranks.run(step, lambda: build_objects(built, tells_all=True), may_block=True), None)


def _open_target(ranks: Ranks, config: ExportConfig, mistakes: Mistakes) -> ExportPaths | None:
    """Open the export directory, and try whether it can be made. All ranks. None after a mistake."""
    place = place_of(config.export_dir, add_subfolder=config.add_subfolder)
    paths = mistakes.collect(lambda: open_paths(ranks, config, place), None)
    if paths is not None and paths.target.is_local:
        target = paths.target
        reason = ranks.broadcast("try export_dir", lambda: why_no_directory(target.path))
        if reason is not None:
            mistakes.add(ConfigError(f"export_dir {paths.final.url}: {reason}"))
    return paths


def _open_source(url: str, storage: SourceStorage) -> Directory:
    return open_place(url, storage.storage_options, follow_links=storage.follow_links)


def _look_at_source(
    ranks: Ranks,
    config: OpenedSource,
    source: Directory,
    model: Any,
    weights: ModelWeights | None,
    mistakes: Mistakes,
    ignored: tuple[type[DistExportError], ...],
) -> tuple[Checkpoint | None, DenseMeta]:
    """Return the checkpoint and its dense parameters, as far as they can be read. All ranks."""
    checkpoint = mistakes.collect(
        lambda: open_source(ranks, config, source, model=model, weights=weights, exports_dense=True),
        None,
        ignored=ignored,
    )
    if checkpoint is None and mistakes:
        return None, ()

    def describe_dense() -> DenseMeta:
        parameters = find_dense(config, source, checkpoint, weights)
        assert parameters is not None  # a live model was refused
        return parameters.describe()

    none: DenseMeta = ()
    dense = mistakes.collect(
        lambda: ranks.broadcast("read the dense parameters", describe_dense), none, ignored=ignored
    )
    return checkpoint, dense


def _try_choices(
    ranks: Ranks, config: PlannedTables, checkpoint: Checkpoint, world_size: int, mistakes: Mistakes
) -> None:
    """Choose tables and read the rules for rows, as the export does. All ranks."""
    mistakes.collect(lambda: ranks.run("choose what to keep", lambda: choose(checkpoint, config, world_size)), None)
    mistakes.collect(lambda: ranks.run("read the rules for rows", lambda: read_pruning(checkpoint, config)), None)


def _match_tables(
    ranks: Ranks,
    config: MissingTables,
    checkpoint: Checkpoint,
    weights: ModelWeights,
    dense_state: DenseMeta,
    mistakes: Mistakes,
) -> Sequence[str]:
    """Return notes on the model's tables that the checkpoint lacks. All ranks."""
    from dist_export.dense.missing_tables import refuse_missing_by_name  # a plan of tables alone needs no torch

    names = [name for name, *_ in dense_state]
    return mistakes.collect(
        lambda: ranks.run(
            "match the model's tables", lambda: refuse_missing_by_name(config, weights, checkpoint, names)
        ),
        (),
    )
