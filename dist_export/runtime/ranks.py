"""Collectives over gloo; all ranks share a failure. Only this room talks to ``torch.distributed``.

Payload is never sent through them. Every method below says which ranks call it.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from dist_export.errors import DistExportError, ExportError, StepFailedError
from dist_export.redact import first_line
from dist_export.runtime.interrupts import EXIT_CODE as INTERRUPTED
from dist_export.runtime.object_exchange import gather_objects
from dist_export.runtime.process_identity import find_launcher
from dist_export.runtime.shared_store import SharedStore
from dist_export.runtime.watchdog import Watchdog

T = TypeVar("T")

logger = logging.getLogger(__name__)

_ARRIVAL_SECS = 5.0
_FAILED_SECS = 2.0

_SMALL_BYTES = 128
"""A pickled result of rank 0 up to this size is sent with the gather that reports how the step went, which stays one gather."""


class Ranks:
    """The ranks of this export; :func:`~dist_export.runtime.joining.join` makes them. A single process has no group."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Any,
        group: Any,
        *,
        owns_default_group: bool,
        timeout_secs: float,
        watched_store: Any = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        """Keep the arguments. ``watchdog``: one that runs already, for several exports; None makes one for these ranks."""
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._group = group
        self._owns_default_group = owns_default_group
        self._timeout_secs = timeout_secs
        self._turns: dict[str, int] = {}
        self._has_failed = False
        self._stop = ""
        self._meets_in_checks = False
        self._owes_checks = False
        """Whether a rank may have failed in a check of which the others have not yet learned."""
        self._watchdog = watchdog or Watchdog(
            rank,
            world_size,
            watched_store,
            timeout_secs=timeout_secs,
            launcher=find_launcher(),
            request_stop=self.request_stop,
            has_failure=self.has_failure,
        )
        self.shared = SharedStore(
            store if world_size > 1 else None, ask=self._ask, note_progress=self._watchdog.note_progress
        )
        """Counters, queues and values that ranks share without waiting."""

    def watch(self, *, catches_sigterm: bool) -> None:
        """Start the watchdog, which ends this process when the export cannot go on. Called in the main thread of any rank."""
        self._watchdog.start(catches_sigterm=catches_sigterm)

    @property
    def step(self) -> str:
        """The step that this rank is in. Any thread."""
        return self._watchdog.step

    @property
    def can_go_on(self) -> bool:
        """Whether another step may follow a failed one: no rank has left because of it. Any rank."""
        return not self._watchdog.is_over and not self._watchdog.hears

    def note_on_disk(self, say: Callable[[], str]) -> None:
        """Use ``say`` to describe what is on disk, in every message that ends the export. Any rank.

        It is called when the message is made, from any thread. It must neither raise nor hang.
        """
        self._watchdog.say_on_disk = say

    def describe_interrupt(self) -> str:
        """Return the message about a SIGINT, as one line. Any thread."""
        return self._watchdog.describe_interrupt()

    def leave_interrupted(self) -> str:
        """End the other ranks too; return the message that this rank prints, empty if another rank prints it. Any rank."""
        text = self.describe_interrupt()
        self.announce_failure()
        return text if self._watchdog.fail("interrupted", exit_code=INTERRUPTED) else ""

    def request_stop(self, reason: str) -> None:
        """Make this rank, and so all ranks, fail with ``reason`` before its next piece of work. Any thread."""
        self._stop = reason
        self.announce_failure()

    def refuse_to_go_on(self) -> None:
        """Raise ExportError if this rank was asked to stop. Work that can end early calls it. Any rank."""
        if self._stop:
            raise ExportError(f"{self._stop}. {self._watchdog.tail()}")

    def refuse_orphans(self) -> None:
        """Raise ExportError if the launcher of this rank is gone, because then nobody waits for the result. Any rank."""
        if self._watchdog.is_orphan:
            raise ExportError(f"{self._watchdog.orphan_text()}. {self._watchdog.say_on_disk()}. Run the export again")

    def all_gather(self, step: str, work: Callable[[], T], *, may_block: bool = False) -> list[T]:
        """Run ``work`` on every rank and return the results in rank order. All ranks.

        ``work`` must issue no collective of its own: the ranks that did not fail would wait in it for the one that did.
        If the caller's model is collective, this cannot be avoided. Then ``may_block`` lets a rank that failed raise its own
        error if the others do not arrive; the launcher then ends them.

        Raises:
            StepFailedError: on all ranks, if ``work`` raised a known error on any rank; the text names those ranks. An
                unexpected exception is raised unchanged on the rank where it happened, so that a bug keeps its traceback.
        """
        if may_block:
            self.settle_checks(step)
        result, raised = self._try(step, work)
        return self._exchange(step, result, raised, may_block=may_block)

    def check(self, step: str, work: Callable[[], T]) -> T:
        """Run ``work`` on this rank and return its result, without waiting for the other ranks. All ranks.

        If it fails, this rank meets the others in their next step, where all of them learn of it. So ``work`` changes nothing
        on disk, and no caller goes on after its error, except while ranks are ``meeting_in_checks``.

        Raises:
            StepFailedError: as :meth:`all_gather`, on this rank now and on the others in their next step.
        """
        if self._meets_in_checks:
            return self.run(step, work)
        result, raised = self._try(step, work)
        if raised is not None:
            self._exchange(step, None, raised)
        self._owes_checks = True
        return cast("T", result)

    def check_on_first(self, step: str, work: Callable[[], T], elsewhere: T) -> T:
        """Run ``work`` on rank 0 and return its result there, ``elsewhere`` on the other ranks, as :meth:`check`. All ranks."""
        return self.check(step, work if self.rank == 0 else lambda: elsewhere)

    def settle_checks(self, step: str) -> None:
        """Wait until no rank has failed in a check, before what cannot be taken back in ``step``. All ranks."""
        if self._owes_checks and self.world_size > 1:
            self._exchange(step, None, None)

    @contextlib.contextmanager
    def meeting_in_checks(self) -> Iterator[None]:
        """Wait for all ranks in each check, so that work may go on after a failed one. All ranks."""
        self._meets_in_checks = True
        try:
            yield
        finally:
            self._meets_in_checks = False

    def _try(self, step: str, work: Callable[[], T]) -> tuple[T | None, Exception | None]:
        """Run ``work`` on this rank and return its result or its error."""
        result: T | None = None
        raised: Exception | None = None
        has_work = work is not _nothing
        self._watchdog.begin(step, is_busy=has_work)
        try:
            if has_work:
                self.refuse_to_go_on()
            result = work()
        except Exception as error:  # noqa: BLE001 -- the other ranks must learn of any error
            raised = error
        except SystemExit as error:  # a model or dataset that exits must not look like a successful export
            raised = ExportError(f"'{step}': code of the model or the dataset called sys.exit({error.code})")
        finally:
            self._watchdog.pause()
        return result, raised

    def _exchange(self, step: str, result: T | None, raised: Exception | None, *, may_block: bool = False) -> list[T]:
        """Exchange the results of a step, or raise what :meth:`all_gather` raises. All ranks; one may be in a check before it."""
        failure: tuple[str, int] | None = None
        if raised is not None:
            failure = _describe(raised, self._watchdog.say_on_disk)
            self.announce_failure()
        if self.world_size == 1:
            if isinstance(raised, OSError):
                raise ExportError(f"{step}: {cast('tuple[str, int]', failure)[0]}") from raised
            if raised is not None:
                raise raised
            return [cast("T", result)]
        if may_block:
            self._meet(step, raised, failure)
        told = (result, None) if failure is None else (result, (*failure, step))
        try:
            outcomes = self._gather_objects(told)
        except RuntimeError as error:
            if raised is not None:
                self._watchdog.fail(_describe(raised, self._watchdog.say_on_disk)[0])
                raise raised from None
            raise self._lost(step, error) from error
        self._owes_checks = False
        failures = {rank: outcome[1] for rank, outcome in enumerate(outcomes) if outcome[1] is not None}
        if raised is not None and not isinstance(raised, (DistExportError, OSError)):
            raise raised
        if failures:
            code = max((code for _, code, _ in failures.values()), default=1)
            texts = {rank: text for rank, (text, _, _) in failures.items()}
            where = failures[min(failures)][2]  # the others may be in the step after it
            raise StepFailedError(where, texts, world_size=self.world_size, exit_code=code) from raised
        return [outcome[0] for outcome in outcomes]

    def broadcast(self, step: str, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 and return its result on every rank. All ranks; raises as :meth:`all_gather` does.

        A gather gives every rank room for the largest result of each rank, so larger results are broadcast instead.
        """
        kept: list[T] = []
        pickled: list[bytes] = []

        def keep() -> bytes | int | None:
            kept.append(work())
            if self.world_size == 1:
                return None
            pickled.append(pickle.dumps(kept[0]))
            return pickled[0] if len(pickled[0]) <= _SMALL_BYTES else len(pickled[0])

        told = self.all_gather(step, keep if self.rank == 0 else _nothing)[0]
        if isinstance(told, int):
            try:
                told = self._broadcast_bytes(pickled[0] if self.rank == 0 else bytes(told))
            except RuntimeError as error:
                raise self._lost(step, error) from error
        if self.rank == 0 or told is None:
            return kept[0]
        return cast("T", pickle.loads(told))  # noqa: S301 -- it comes from rank 0 of this job, like all exchanged data

    def _gather_objects(self, given: Any) -> list[Any]:
        import numpy as np
        import torch
        import torch.distributed as dist

        def gather(own: np.ndarray) -> np.ndarray:
            gathered = np.empty((self.world_size, own.size), np.uint8)  # torch's default device may be a GPU
            dist.all_gather(list(torch.from_numpy(gathered).unbind(0)), torch.from_numpy(own), group=self._group)
            return gathered

        return gather_objects(given, gather)

    def _broadcast_bytes(self, data: bytes) -> bytes:
        """Return ``data`` of rank 0; on the others it has the same length."""
        import torch
        import torch.distributed as dist

        held = bytearray(data)
        dist.broadcast(torch.frombuffer(held, dtype=torch.uint8), src=0, group=self._group)
        return bytes(held)

    def run(self, step: str, work: Callable[[], T], *, may_block: bool = False) -> T:
        """Run ``work`` on every rank and return this rank's own result, which is not sent to other ranks. All ranks."""
        kept: list[T] = []
        self.all_gather(step, lambda: kept.append(work()), may_block=may_block)
        return kept[0]

    def _meet(self, step: str, raised: Exception | None, failure: tuple[str, int] | None) -> None:
        """Wait for the other ranks after a step that may have left some of them in a collective of the caller's model.

        Raises:
            Exception: this rank's own error, if it failed and the others did not arrive within a few seconds.
            StepFailedError: if another rank has left because of its own error.
        """
        self._watchdog.hears = True
        self._wait_for_others(step, raised, failure)
        self._watchdog.hears = False

    def _wait_for_others(self, step: str, raised: Exception | None, failure: tuple[str, int] | None) -> None:
        turn = self._turns[step] = self._turns.get(step, 0) + 1
        place = f"meet/{turn}/{step}"
        started = time.monotonic()
        arrived = self._ask(lambda: int(self._store.add(place, 1)))
        pause = 0.001
        while arrived < self.world_size:
            if self._ask(lambda: int(self._store.add(f"{place}/left", 0))):
                rank, code, text = bytes(self._store.get(f"{place}/why")).decode().split(" ", 2)
                raise StepFailedError(
                    step, {int(rank): text}, world_size=self.world_size, exit_code=int(code)
                ) from raised
            waited = time.monotonic() - started
            if raised is not None and failure is not None and waited > _ARRIVAL_SECS:
                self._store.set(f"{place}/why", f"{self.rank} {failure[1]} {failure[0]}")
                self._store.add(f"{place}/left", 1)
                self._watchdog.fail(failure[0])  # ends the ranks that wait in the model's own collective
                raise raised
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
            arrived = self._ask(lambda: int(self._store.add(place, 0)))

    def announce_failure(self) -> None:
        """Tell busy ranks that one rank has failed. Any rank."""
        self._has_failed = True
        if self.world_size > 1:
            try:
                self._store.add("failed", 1)
            except RuntimeError as error:  # the rank that hosts the store is gone, and no rank can be reached
                logger.debug("the failure could not be announced: %s", error)

    def has_failure(self) -> bool:
        """Return whether any rank has announced a failure. Any rank."""
        return self._has_failed or (self.world_size > 1 and self._ask(lambda: int(self._store.add("failed", 0))) > 0)

    def _ask(self, call: Callable[[], T]) -> T:
        """Call the job's store. If it is gone, the watchdog ends this process, or this raises ExportError."""
        try:
            return call()
        except RuntimeError as error:
            raise self._lost("ask the job's store", error) from error

    def _lost(self, step: str, error: RuntimeError) -> ExportError:
        """Wait for the watchdog, which finds the dead rank and ends this process; return the error to raise if it does not."""
        self._watchdog.wait_for_end()
        return ExportError(f"lost contact with another rank during '{step}': {first_line(error)}")

    def tell_once(self, tell: Callable[[], None]) -> None:
        """Run ``tell`` on rank 0 while the other ranks wait, for at most ten seconds. All ranks that reach this call.

        torchrun ends all ranks as soon as one exits, so rank 0 must have printed its message by then.
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
        except RuntimeError:  # rank 0 hosts the store: if the store is gone, rank 0 is gone too
            return

    def close(self) -> None:
        """Leave the group. All ranks; the job's own default group is kept."""
        self._watchdog.stop()
        if self._group is None:
            return
        self._wait_to_leave()
        import torch.distributed as dist

        kept, self._group = [self._group], None
        dist.destroy_process_group(None if self._owns_default_group else kept[0])
        threading.Thread(target=kept.clear).start()  # gloo closes its sockets in 20 ms, for which nobody has to wait

    def _wait_to_leave(self) -> None:
        """Let rank 0, which may host the store, leave last. If the export failed on it, not all may come: it waits less."""
        try:
            left = int(self._store.add("closed", 1))
            deadline = time.monotonic() + (_FAILED_SECS if self._has_failed else _ARRIVAL_SECS)
            while self.rank == 0 and left < self.world_size and time.monotonic() < deadline:
                time.sleep(0.002)
                left = int(self._store.add("closed", 0))
        except RuntimeError as error:  # the host of the store left before this rank
            logger.debug("the store was gone when this rank left: %s", error)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _describe(error: Exception, say_on_disk: Callable[[], str]) -> tuple[str, int]:
    if isinstance(error, DistExportError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return (
            f"{error.filename or 'I/O'}: {error.strerror or error}. {say_on_disk()}. Mend that and run the export again",
            1,
        )
    return f"{type(error).__name__}: {first_line(error)}", 1


def _nothing() -> None:
    return None
