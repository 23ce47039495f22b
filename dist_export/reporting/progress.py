"""Show users what an export does: stages with their times, and the bytes of all ranks. Rank 0 only."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence

import msgspec

from dist_export.errors import ExportError
from dist_export.manifest import Manifest
from dist_export.reporting.display import Display, Speedometer, open_display
from dist_export.reporting.events import Events
from dist_export.reporting.moment import Moment
from dist_export.runtime.io_activity import current_stage_since, in_stage
from dist_export.runtime.ranks import Ranks
from dist_export.storage.traffic import TRAFFIC
from dist_export.transfer.work_done import Share

logger = logging.getLogger(__name__)

COUNTER = "bytes"


class Reporter:
    """Times stages on every rank, and shows progress on rank 0 if that is enabled."""

    def __init__(self, ranks: Ranks, *, is_shown: bool, events: Events | None = None) -> None:
        """Set up without showing anything.

        Args:
            ranks: the ranks of the export.
            is_shown: whether progress is shown. If not, only the ends of stages are logged.
            events: gets stages and results too.
        """
        self._ranks = ranks
        self._events = events
        self._traffic = TRAFFIC.snapshot()
        self._is_shown = is_shown
        self._reused_bytes = 0
        self._total_bytes = 0
        self.seconds: dict[str, float] = {}
        self.shares: Sequence[Share] = ()
        """The work of each rank. Set by ``note_result``."""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of the export."""
        started = time.perf_counter()
        with in_stage(name):
            yield
        self.seconds[name] = time.perf_counter() - started
        if self._events is not None:
            self._events.add("stage", stage=name, seconds=round(self.seconds[name], 3))
        if self._ranks.rank == 0:
            logger.info("%s: %.2f s", name, self.seconds[name])

    def note_result(self, manifest: Manifest, shares: Sequence[Share]) -> None:
        """Add events for the moved bytes of this rank, and on rank 0 for drift and for each table."""
        self.shares = shares
        if self._events is None:
            return
        mine = next((share for share in shares if share.rank == self._ranks.rank), None)
        if mine is not None:
            self._events.add(
                "moved",
                retries=TRAFFIC.since(self._traffic)["retries"],
                bytes=mine.num_bytes,
                units=mine.num_units,
                helped=mine.num_helped,
                seconds=round(mine.seconds, 3),
            )
        if manifest.drift is not None and self._ranks.rank == 0:
            if manifest.drift.not_measured is not msgspec.UNSET:
                self._events.add("drift_not_measured", reason=manifest.drift.not_measured)
            for name, output in manifest.drift.outputs.items():
                self._events.add("drift", output=name, **msgspec.structs.asdict(output))
        for table in manifest.tables if self._ranks.rank == 0 else ():
            kept = sum(slot.num_bytes for slot in table.kept)
            self._events.add("table", table=table.name, rows=table.rows_out, dropped=table.rows_dropped, bytes=kept)

    def note_registered(self, uri: str) -> None:
        """Add an event for the package's new version in a registry. Rank 0."""
        if self._events is not None:
            self._events.add("registered", uri=uri)

    def count_bytes(self, num_bytes: int) -> None:
        """Add to the number of bytes of all ranks. Any rank, any thread."""
        self._ranks.shared.add(COUNTER, num_bytes)

    @contextlib.contextmanager
    def transferring(self, total_bytes: int, *, reused_bytes: int = 0) -> Iterator[None]:
        """Show the bytes of all ranks while the block runs.

        Args:
            total_bytes: the bytes of all shards of the package.
            reused_bytes: the part of them that is reused from an interrupted export. They count as done from the start.
        """
        self._reused_bytes, self._total_bytes = reused_bytes, total_bytes
        try:
            yield
        finally:
            self._total_bytes = 0

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """Show progress while the block runs: one line of a terminal, or lines of the logger. All ranks."""
        if not self._is_shown:
            yield
            return
        with open_display(rank=self._ranks.rank, world_size=self._ranks.world_size) as display:
            if display is None:
                yield
                return
            stop = threading.Event()
            thread = threading.Thread(target=self._show, args=(display, stop), name="progress", daemon=True)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()

    def _show(self, display: Display, stop: threading.Event) -> None:
        speedometer = Speedometer()
        while not stop.wait(display.wait_secs):
            stage, since = current_stage_since()
            if not stage:
                continue
            now = time.monotonic()
            moment = Moment(stage, self._ranks.step, now - since)
            if total := self._total_bytes:
                try:
                    moved = self._ranks.shared.add(COUNTER, 0)
                except ExportError:  # the other ranks are gone, which the main thread reports
                    return
                moment = moment._replace(
                    done=self._reused_bytes + moved, total=total, speed=speedometer.measure(now, moved)
                )
            try:
                display.show(moment)
            except OSError:  # the terminal is gone, and the export continues without it
                return
