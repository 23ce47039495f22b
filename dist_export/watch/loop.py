"""The loop of ``watch``: rank 0 looks, all ranks export."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from dist_export.config.schema import ExportConfig
from dist_export.errors import ConfigError, DistExportError, ModelError, PlanError, StepFailedError, UnaskedError
from dist_export.manifest import Manifest
from dist_export.pipeline.base_package import EVERYTHING, FoundBase
from dist_export.pipeline.inputs import look_for_weights
from dist_export.pipeline.run import run_export
from dist_export.reporting.published import Published
from dist_export.runtime.lasting_ranks import LastingRanks
from dist_export.watch.decision import Decision, Failure, Rules, Seen, decide, key_of
from dist_export.watch.look import Lookout
from dist_export.watch.objects import FreshObjects

logger = logging.getLogger(__name__)

_OF_SETTINGS = (ConfigError, ModelError, PlanError, UnaskedError)
"""Errors that a wrong setting causes. A checkpoint may cause some of them too, once the settings have proven good."""


class Ending(NamedTuple):
    """How an export ended on one rank."""

    is_asked_to_stop: bool
    is_of_settings: bool


class Watch:
    """Exports each new checkpoint of a run. Every rank has one."""

    def __init__(
        self,
        ranks: LastingRanks,
        config: ExportConfig,
        rules: Rules,
        *,
        poll_secs: float,
        announce: Callable[[str], object],
    ) -> None:
        """Keep the arguments. ``announce`` is called on rank 0 with one line for each version."""
        self._ranks = ranks
        self._config = config
        self._rules = rules
        self._poll_secs = poll_secs
        self._announce = announce
        self._objects = FreshObjects(config)
        self._published = Published(config.export_dir)
        self._failure: Failure | None = None
        self._has_succeeded = False
        self._said: set[str] = set()
        self._seen = Seen()

    def run(self) -> None:
        """Export until SIGTERM comes, or a step is published that ends the watch. All ranks.

        Raises:
            DistExportError: a mistake in the settings; a rank that is lost.
        """
        ranks, config = self._ranks, self._config
        objects = ranks.run("build the model and the dataset", self._objects.build_first, may_block=True)
        needs_dense = objects.model is not None and objects.dataset is not None
        weights = look_for_weights(ranks, config, objects.model)
        del objects
        lookout = Lookout(config, needs_dense=needs_dense, weights=weights)
        self._say_once(f"watching {config.ckpt_dir}")
        while True:
            decision = self._decide(lookout)
            for line in decision.lines:
                self._say_once(line)
            if decision.kind == "end":
                return
            if decision.kind == "wait":
                if ranks.rank == 0:  # the others wait for its next decision
                    ranks.wait(self._poll_secs)
            elif not self._export(decision):
                return

    def _decide(self, lookout: Lookout) -> Decision:
        """Return what comes next, the same on all ranks. If one of them got SIGTERM, that is the end."""
        ranks = self._ranks

        def look() -> tuple[Decision | None, bool]:
            if ranks.rank:
                return None, ranks.is_asked_to_stop
            try:
                self._seen = lookout.look()
            except (ConfigError, UnaskedError) as error:
                if not self._has_succeeded:
                    raise
                self._seen = Seen(problems=(str(error),), is_readable=False)
            decision = decide(self._seen, self._failure, self._rules, now=time.monotonic())
            return decision, ranks.is_asked_to_stop

        shares = ranks.all_gather("look for a checkpoint", look)
        decision = shares[0][0]
        assert decision is not None
        if any(is_asked for _, is_asked in shares):
            return Decision(kind="end", lines=("stopped by SIGTERM",))
        return decision

    def _export(self, decision: Decision) -> bool:
        """Export a checkpoint; return whether the watch goes on. A failure that all ranks share is reported, and no more."""
        ranks, config, checkpoint = self._ranks, self._config, self._seen.checkpoint
        settings = config.with_changes(step=decision.step)
        if decision.is_full:
            settings = settings.with_changes(**FoundBase().settings)
        self._published.saved_at = 0.0 if checkpoint is None else checkpoint.saved_at
        try:
            with ranks.one_export() as its:
                objects = its.run("build the model and the dataset", self._objects.build, may_block=True)
                manifest, _ = run_export(its, settings, objects, is_shown=config.progress, published=self._published)
        except DistExportError as error:
            is_shared = isinstance(error, StepFailedError) or ranks.world_size == 1
            if not is_shared or not ranks.can_go_on:
                raise
            return self._end_failed(error, decision)
        self._failure, self._has_succeeded = None, True
        self._said.clear()
        if ranks.rank == 0:
            self._announce(_describe(manifest, self._published, decision))
        return True

    def _end_failed(self, error: DistExportError, decision: Decision) -> bool:
        """Report a failed export; return whether the watch goes on. All ranks. Raises ``error`` if the settings are wrong."""
        ranks = self._ranks
        cause = error.__cause__ if isinstance(error, StepFailedError) else error
        ending = Ending(ranks.is_asked_to_stop, isinstance(cause, _OF_SETTINGS))
        endings = ranks.all_gather("compare how the export ended", lambda: ending)
        if any(its.is_asked_to_stop for its in endings):
            self._say_once(f"stopped by SIGTERM: step {decision.step:,} is not published. {error}")
            return False
        if any(its.is_of_settings for its in endings) and error.exit_code == 2 and not self._has_succeeded:
            raise error
        key = key_of(self._seen)
        times = self._failure.times + 1 if self._failure is not None and self._failure.key == key else 1
        self._failure = Failure(key=key, times=times, failed_at=time.monotonic())
        self._say_once(f"step {decision.step:,} is not published, and is tried again: {error}")
        return True

    def _say_once(self, line: str) -> None:
        """Log a line on rank 0, unless it was logged since the last version was published."""
        if self._ranks.rank == 0 and line not in self._said:
            self._said.add(line)
            logger.info("%s", " ".join(line.split()))


def _describe(manifest: Manifest, published: Published, decision: Decision) -> str:
    """Return the line about a version, for people."""
    fields = published.describe(manifest)
    text = f"full, {sum(table.rows_out for table in manifest.tables):,} rows"
    if fields["is_delta"]:
        text = f"delta, {fields['changed']:,} changed, {fields['new']:,} new, {fields['deleted']:,} deleted"
    line = f"{fields['version']}: {text}; {fields['seconds']:.1f} s after the save of step {decision.step:,}"
    is_unplanned = not fields["is_delta"] and not decision.is_full
    reasons = [note for note in manifest.notes if is_unplanned and note.startswith(EVERYTHING)]
    return "; ".join([line, *reasons])
