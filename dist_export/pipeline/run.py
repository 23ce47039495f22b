"""The door to an export: find out what is meant, export, tell machines how it went."""

from __future__ import annotations

from collections.abc import Sequence

from dist_export.config.schema import ExportConfig
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.manifest import Manifest
from dist_export.model.user_objects import Objects
from dist_export.pipeline.config_agreement import digest_settings, refuse_different_settings
from dist_export.pipeline.inputs import look_for_weights
from dist_export.pipeline.locate import Locations, locate
from dist_export.pipeline.run_dir import FoundCheckpoint
from dist_export.pipeline.steps import STEPS, Step, export_located
from dist_export.pipeline.target import place_of
from dist_export.reporting.events import Events, failure_of, samples_of, write_metrics
from dist_export.reporting.progress import Reporter
from dist_export.reporting.published import Published
from dist_export.runtime.interrupts import EXIT_CODE as INTERRUPTED
from dist_export.runtime.ranks import Ranks


def run_export(
    ranks: Ranks,
    config: ExportConfig,
    objects: Objects,
    *,
    is_shown: bool,
    published: Published | None = None,
    steps: Sequence[Step] | None = None,
    found: FoundCheckpoint | None = None,
    digests: Sequence[bytes] | None = None,
    tuning: Tuning = STANDARD,
) -> tuple[Manifest, list[str]]:
    """Export, and return the committed manifest and the closing summary. All ranks, each with its own objects.

    ``is_shown``: progress is shown while it lasts. ``published`` counts the versions of a process that exports again and again.

    ``steps`` are what is done with the source, by default those of an export. ``found`` is the source, if other steps read it.
    ``digests`` are those of the settings of all ranks, if they were told already. ``tuning``: the sizes of pieces.

    Raises as :func:`~dist_export.pipeline.steps.export_located`; ConfigError and CheckpointError also for a registry's URI or a
    run that lead to no checkpoint; ConfigError, on all ranks, where their settings differ.
    """
    if digests is None:
        digests = ranks.all_gather("compare the settings", lambda: digest_settings(config))
    refuse_different_settings(ranks, config, digests)
    needs_dense = objects.model is not None and objects.dataset is not None
    weights = look_for_weights(ranks, config, objects.model)

    def find() -> tuple[Locations, str]:
        located = locate(config, needs_dense=needs_dense, weights=weights, found=found)
        its = located.apply(config)
        return located, place_of(its.export_dir, add_subfolder=its.add_subfolder)

    located, export_dir = ranks.broadcast("find the checkpoint", find)
    config = located.apply(config)
    events = Events(config, export_dir, rank=ranks.rank, step=located.step)
    reporter = Reporter(ranks, is_shown=is_shown, events=events)
    if ranks.rank == 0:  # one for each attempt, by which they are counted
        events.add("started", source=config.ckpt_dir, export_dir=export_dir, world_size=ranks.world_size)
    try:
        with reporter.showing():
            todo = STEPS if steps is None else steps
            manifest, summary = export_located(
                ranks, config, objects, located, reporter, weights, export_dir, todo, tuning
            )
    except BaseException as error:
        if ranks.rank == 0:
            _note_failure(error, config, export_dir, reporter, events, published)
        raise
    others = ranks.all_gather("collect the events", events.lines)
    if ranks.rank == 0:
        events.take_in(others[1:])
        events.add("committed", bytes=manifest.num_bytes, digest=manifest.digest)
        if published is not None:
            published.note(export_dir, manifest)
            events.add("published", **published.describe(manifest))
        if config.metrics:
            samples = samples_of(
                manifest,
                export_dir=export_dir,
                seconds=reporter.seconds,
                rank_bytes={share.rank: share.num_bytes for share in reporter.shares},
            )
            samples += published.samples() if published is not None else ()
            write_metrics(config.metrics, config.options_of_target, samples)
    return manifest, summary


def _note_failure(
    error: BaseException,
    config: ExportConfig,
    export_dir: str,
    reporter: Reporter,
    events: Events,
    published: Published | None,
) -> None:
    """Write the event and the metrics of an export that failed. Rank 0."""
    exit_code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    events.add("failed", error=f"{type(error).__name__}: {error}".removesuffix(": "), exit_code=exit_code)
    # what is refused (2) before the transfer has changed nothing: the figures of the package that may be there hold
    if config.metrics and (exit_code != 2 or "transfer" in reporter.seconds):
        samples = [*failure_of(export_dir), *(published.samples() if published is not None else ())]
        write_metrics(config.metrics, config.options_of_target, samples)
