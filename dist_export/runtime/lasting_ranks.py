"""The ranks of a process that makes one export after the other: a failed export is over, and the ranks go on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from dist_export.runtime.ranks import Ranks

_NOTHING = "No export was under way"


class LastingRanks(Ranks):
    """Ranks that outlast their exports. Each export has ranks of its own, with the same group and the same watchdog.

    SIGTERM between two exports stops nothing: the caller asks for :attr:`is_asked_to_stop`. Within an export it ends this one.
    """

    def __init__(self, rank: int, world_size: int, store: Any, group: Any, **more: Any) -> None:
        super().__init__(rank, world_size, store, group, **more)
        self._lock = threading.Lock()
        self._stop_event = threading.Event()
        self._stop_reason = ""
        self._current: Ranks | None = None
        self._num_exports = 0
        self.note_on_disk(lambda: _NOTHING)

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether this rank got SIGTERM. Any thread."""
        return self._stop_event.is_set()

    def wait(self, secs: float) -> None:
        """Wait for so many seconds, or until SIGTERM comes. Any rank."""
        self._stop_event.wait(secs)

    def request_stop(self, reason: str) -> None:
        """Make the export that is under way fail, and note that this rank is to end. Any thread."""
        with self._lock:
            self._stop_reason = reason
            current = self._current
        self._stop_event.set()
        if current is not None:
            current.request_stop(reason)

    def has_failure(self) -> bool:
        """Return whether the export that is under way has failed on any rank. Any thread."""
        with self._lock:
            current = self._current
        return current is not None and current.has_failure()

    def leave_interrupted(self) -> str:
        """End the other ranks too, within an export or not; return the message, as :meth:`Ranks.leave_interrupted` does."""
        with self._lock:
            current = self._current
        if current is not None:
            current.announce_failure()
        return super().leave_interrupted()

    @contextlib.contextmanager
    def one_export(self) -> Iterator[Ranks]:
        """Give the ranks of one export. All ranks, in the same order of calls.

        An error that all ranks share ends the export alone. After any other one :attr:`can_go_on` is false, or this rank cannot
        know whether the others wait for it.
        """
        self._num_exports += 1
        store = None
        if self.world_size > 1:
            import torch._C._distributed_c10d as torch_store

            store = torch_store.PrefixStore(f"export/{self._num_exports}", self._store)
        ranks = Ranks(
            self.rank,
            self.world_size,
            store,
            self._group,
            owns_default_group=False,
            timeout_secs=self._timeout_secs,
            watchdog=self._watchdog,
        )
        with self._lock:
            self._current = ranks
            reason = self._stop_reason
        if reason:
            ranks.request_stop(reason)
        try:
            yield ranks
        except KeyboardInterrupt:
            raise  # the message says what is on disk
        except BaseException:
            self._end_export()
            raise
        self._end_export()

    def _end_export(self) -> None:
        with self._lock:
            self._current = None
        self.note_on_disk(lambda: _NOTHING)
