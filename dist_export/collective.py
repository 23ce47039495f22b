"""The only module that talks to ``torch.distributed``: control messages over gloo, failures shared, a work counter.

Payload never travels here. Every method below says on which ranks it is called.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from dist_export.errors import ConfigError, DistExportError, ExportError, StepFailedError

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")

logger = logging.getLogger(__name__)

_ARRIVAL_SECS = 5.0

_FROM_END = 1 << 32

_sequence = itertools.count()
"""Exports of one process, counted: two in one job must not share keys in the job's store. Exports are collective,
so every rank counts alike."""


class Ranks:
    """The ranks of this export. Build with :func:`join`; a single process gets one without any group."""

    def __init__(
        self, rank: int, world_size: int, store: Any, group: Any, *, owns_default_group: bool, timeout_secs: float
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._group = group
        self._owns_default_group = owns_default_group
        self._timeout_secs = timeout_secs
        self._counters: dict[str, int] = {}
        self._left: dict[str, bytes] = {}
        self._turns: dict[str, int] = {}
        self._lock = threading.Lock()
        self._has_failed = False

    def gather(self, step: str, work: Callable[[], T], *, may_block: bool = False) -> list[T]:
        """Run ``work`` on every rank and return the results in rank order. All ranks.

        ``work`` issues no collective of its own: ranks that did not fail would wait in it for the one that did. Where
        that cannot be helped, for the caller's model is collective, ``may_block`` lets a rank that failed alone raise
        its own error instead of waiting; the launcher then ends the others.

        Raises:
            StepFailedError: on all ranks, if ``work`` raised a known error on any; the text names those ranks. An
                unexpected exception is raised as itself where it happened, so that a bug keeps its traceback.
        """
        result: T | None = None
        failure: tuple[str, int] | None = None
        raised: Exception | None = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 -- whatever it was, the other ranks must hear of it
            raised = error
        except SystemExit as error:  # a model or dataset that exits must not make the export look done
            raised = ExportError(f"'{step}': code of the model or the dataset called sys.exit({error.code})")
        if raised is not None:
            failure = _describe(raised)
            self.announce_failure()
        if self.world_size == 1:
            if isinstance(raised, OSError):
                raise ExportError(f"{step}: {_describe(raised)[0]}") from raised
            if raised is not None:
                raise raised
            return [cast("T", result)]
        if may_block:
            self._meet(step, raised, failure)
        import torch.distributed as dist

        outcomes: list[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(outcomes, (result, failure), group=self._group)
        except RuntimeError as error:
            if raised is not None:
                raise raised from None
            raise ExportError(f"lost contact with another rank during '{step}': {_first_line(error)}") from error
        failures = {rank: outcome[1] for rank, outcome in enumerate(outcomes) if outcome[1] is not None}
        if raised is not None and not isinstance(raised, (DistExportError, OSError)):
            raise raised
        if failures:
            code = max((code for _, code in failures.values()), default=1)
            texts = {rank: text for rank, (text, _) in failures.items()}
            raise StepFailedError(step, texts, world_size=self.world_size, exit_code=code) from raised
        return [outcome[0] for outcome in outcomes]

    def on_rank_0(self, step: str, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 and return its result on every rank. All ranks; raises as :meth:`gather` does."""
        return cast("T", self.gather(step, work if self.rank == 0 else _nothing)[0])

    def run(self, step: str, work: Callable[[], T], *, may_block: bool = False) -> T:
        """Run ``work`` on every rank and return this rank's own result, which need not travel. All ranks."""
        kept: list[T] = []
        self.gather(step, lambda: kept.append(work()), may_block=may_block)
        return kept[0]

    def _meet(self, step: str, raised: Exception | None, failure: tuple[str, int] | None) -> None:
        """Come together after a step that may have left some ranks in a collective of the caller's model.

        Raises:
            Exception: this rank's own error, where it failed and others did not come within a few seconds.
            StepFailedError: where another rank has left for that reason.
        """
        turn = self._turns[step] = self._turns.get(step, 0) + 1
        place = f"meet/{turn}/{step}"
        started = time.monotonic()
        arrived = int(self._store.add(place, 1))
        pause = 0.001
        while arrived < self.world_size:
            if int(self._store.add(f"{place}/left", 0)):
                rank, code, text = bytes(self._store.get(f"{place}/why")).decode().split(" ", 2)
                raise StepFailedError(
                    step, {int(rank): text}, world_size=self.world_size, exit_code=int(code)
                ) from raised
            waited = time.monotonic() - started
            if raised is None and waited > self._timeout_secs:
                raise ExportError(f"another rank did not get through '{step}' within {waited:.0f} s (timeout)")
            if raised is not None and failure is not None and waited > _ARRIVAL_SECS:
                self._store.set(f"{place}/why", f"{self.rank} {failure[1]} {failure[0]}")
                self._store.add(f"{place}/left", 1)
                raise raised
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
            arrived = int(self._store.add(place, 0))

    def open_queue(self, queue: str) -> None:
        """Make a queue known, so that :meth:`taken` finds it. Any one rank, in a step before it is used."""
        self.add(f"queue/{queue}", 0)

    def claim(self, queue: str, length: int, *, from_end: bool = False) -> int | None:
        """Return the place of an item that nobody else gets, None when all are taken. Any rank, any thread, any time.

        One counter holds what was taken from the front (low half) and from the end (high half), so that a single
        addition decides: whoever helps takes from the end and meets the owner, who takes from the front, only once.
        """
        taken = self.add(f"queue/{queue}", _FROM_END if from_end else 1)
        front, back = taken % _FROM_END, taken // _FROM_END
        if front + back > length:
            return None
        return length - back if from_end else front - 1

    def taken(self, queues: list[str]) -> list[tuple[int, int]]:
        """Return for each queue how often it was asked for an item from its front and from its end. Any rank."""
        if self.world_size == 1:
            counts = [self.add(f"queue/{queue}", 0) for queue in queues]
        else:
            counts = [int(value) for value in self._store.multi_get([f"add/queue/{queue}" for queue in queues])]
        return [(count % _FROM_END, count // _FROM_END) for count in counts]

    def add(self, counter: str, amount: int) -> int:
        """Add to a counter that all ranks share and return its value. Any rank; 0 reads it."""
        if self.world_size == 1:
            with self._lock:
                self._counters[counter] = self._counters.get(counter, 0) + amount
                return self._counters[counter]
        return int(self._store.add(f"add/{counter}", amount))

    def put(self, key: str, value: bytes) -> None:
        """Leave a few bytes for whoever asks for ``key``. Any rank, any thread."""
        if self.world_size == 1:
            self._left[key] = value
        else:
            self._store.set(f"put/{key}", value)

    def take(self, key: str) -> bytes:
        """Return what some rank has left under ``key``, and was known to have left. Any rank, any thread."""
        return self._left[key] if self.world_size == 1 else bytes(self._store.get(f"put/{key}"))

    def announce_failure(self) -> None:
        """Let ranks that are busy know that one has failed. Any rank."""
        self._has_failed = True
        if self.world_size > 1:
            try:
                self._store.add("failed", 1)
            except RuntimeError as error:  # the rank that hosts the store is gone, and with it whoever could hear this
                logger.debug("the failure could not be announced: %s", error)

    def has_failure(self) -> bool:
        """Return whether any rank has announced a failure. Any rank."""
        return self._has_failed or (self.world_size > 1 and int(self._store.add("failed", 0)) > 0)

    def tell_once(self, tell: Callable[[], None]) -> None:
        """Run ``tell`` on rank 0 while the other ranks wait for it, at most ten seconds. All ranks that get there.

        torchrun ends all ranks as soon as one exits, so the one that speaks must be through by then.
        """
        if self.rank == 0:
            try:
                tell()
            finally:
                if self.world_size > 1:
                    self._store.add("told", 1)
            return
        try:
            deadline = time.monotonic() + 10
            while int(self._store.add("told", 0)) == 0 and time.monotonic() < deadline:
                time.sleep(0.05)
        except RuntimeError:  # rank 0 hosts the store: when that is gone, rank 0 is, and there is no one to wait for
            return

    def close(self) -> None:
        """Leave the group. All ranks; the job's own default group stays."""
        if self._group is None:
            return
        import torch.distributed as dist

        group, self._group = self._group, None
        if self._owns_default_group:
            dist.destroy_process_group()
        else:
            dist.destroy_process_group(group)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def alone() -> Ranks:
    """Return the ranks of a process that works by itself, whatever job it belongs to."""
    return Ranks(0, 1, None, None, owns_default_group=False, timeout_secs=0.0)


def join(*, timeout_secs: float) -> Ranks:
    """Join the other ranks of this job. All ranks, in the same order of calls.

    A process group that is already there is used through a gloo subgroup; under ``torchrun`` one is started; a process
    without either is alone.

    Args:
        timeout_secs: how long a rank waits for another one inside a step.
    """
    timeout = timedelta(seconds=timeout_secs)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1 and not _is_initialized():
        return Ranks(0, 1, None, None, owns_default_group=False, timeout_secs=timeout_secs)
    import torch._C._distributed_c10d as torch_store
    import torch.distributed as dist

    owns = not dist.is_initialized()
    if owns:
        try:
            dist.init_process_group("gloo", timeout=timeout)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"WORLD_SIZE is {started}, but the ranks cannot find each other: {_first_line(error)}. Start them with "
                "torchrun, or unset WORLD_SIZE to export with one rank"
            ) from error
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    store = torch_store.PrefixStore(f"dist_export/{next(_sequence)}", dist.distributed_c10d._get_default_store())  # noqa: SLF001 -- torch offers no public way to the job's store
    return Ranks(
        dist.get_rank(), dist.get_world_size(), store, group, owns_default_group=owns, timeout_secs=timeout_secs
    )


def _is_initialized() -> bool:
    import sys

    if "torch" not in sys.modules:  # a group cannot exist before torch is imported
        return False
    import torch.distributed as dist

    return bool(dist.is_available() and dist.is_initialized())


def _describe(error: Exception) -> tuple[str, int]:
    if isinstance(error, DistExportError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return f"{error.filename or 'I/O'}: {error.strerror or error}", 1
    return f"{type(error).__name__}: {_first_line(error)}", 1


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _nothing() -> None:
    return None
