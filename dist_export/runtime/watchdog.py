"""Ends this process and says why, when the export cannot go on: no rank waits for a dead rank, and no orphan commits.

Each rank has two threads beside its main thread:

- *beat* writes a sign of life into the job's store, over its own connection, and reads that of the next rank in the
  ring. One rank watches one other, whatever the world size. If several neighbours are dead, the rank before them is alive.
- *guard* checks the launcher, the clock and beat itself. A store call on a cut link hangs for minutes despite its
  timeout; then only a thread that makes no such call can end the process.

A rank that finds that the export is over writes a record into the store. The first to do so prints it. All others end
without a message.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

from dist_export.redact import first_line
from dist_export.runtime.heartbeat import BEATS, ENDS, IDENTITIES, Beat, End, Store, encode, has_ended
from dist_export.runtime.interrupts import INTERRUPTS, end_children
from dist_export.runtime.io_activity import ACTIVITY
from dist_export.runtime.neighbour import Neighbour
from dist_export.runtime.process_identity import Identity, identify
from dist_export.runtime.sigterm import SigtermPipe
from dist_export.runtime.terminal import SCREEN

BEAT_SECS = 1.0
STEP_SECS = 0.1
"""How long after the begin of a step other ranks can read which step a rank is in."""
TICK_SECS = 0.25
SILENT_SECS = 6.0
"""A rank of another machine, or a store, that is silent for this long is dead. One beat before it, one beat after it and
a second to print the message keep the total under ten seconds."""
STOP_SECS = 20.0
"""How long a job that was asked to stop may take to stop by itself. torchrun and SLURM wait 30 seconds."""

_END = "end"
_ADVICE = "Run the same command again to go on"


class Watchdog:
    """Watches one export: build it on every rank, start it, stop it. The attributes may be set from any thread."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Store | None,
        *,
        timeout_secs: float,
        launcher: int | None,
        request_stop: Callable[[str], None],
        has_failure: Callable[[], bool],
        finish: Callable[[str | None, float, int], None] | None = None,
    ) -> None:
        """Keep the arguments. No thread runs before :meth:`start`.

        Args:
            rank: this rank.
            world_size: of the export.
            store: a connection that no other thread uses; None for a single process.
            timeout_secs: seconds without progress after which a rank counts as hanging.
            launcher: process id of the launcher without which this process must not go on; None if there is none.
            request_stop: makes the main thread stop at the next step, with the reason as its error.
            has_failure: returns whether a rank has announced a failure, which the main threads are about to print.
            finish: prints a message, or nothing for None, waits for some seconds, and ends the process with an exit code;
                tests replace it.
        """
        self.step = "start"
        self.is_busy = False
        """Whether this rank works. A rank that waits for others does not hang."""
        self.hears = False
        """Whether the main thread polls for failures of other ranks, and prints them itself."""
        self.say_on_disk: Callable[[], str] = lambda: "Nothing was written"
        """Returns what is on disk when a message is made: another rank may have committed in the meantime."""
        self.moves = 0
        """Grows with all progress except calls on files."""
        self._rank = rank
        self._world_size = world_size
        self._store = store
        self._timeout_secs = timeout_secs
        self._launcher = launcher
        self._request_stop = request_stop
        self._has_failure = has_failure
        self._finish = _finish if finish is None else finish
        self._me = identify()
        self._is_over = threading.Event()
        self._wake = threading.Event()
        self._cycles = 0
        self._why = ""
        self._first_here: Identity | None = None
        """The first rank of this machine. It prints the message if no store is left to decide which rank does."""
        self._is_asked_to_stop = False
        self._is_stopping = False
        self._stopping_secs = 0.0
        self._sigterm: SigtermPipe | None = None
        self._threads: list[threading.Thread] = []
        self._neighbour = Neighbour(rank, world_size, self._me, timeout_secs=timeout_secs, silent_secs=SILENT_SECS)

    def start(self, *, catches_sigterm: bool = False) -> None:
        """Start both threads. With ``catches_sigterm``, allowed only in the main thread, SIGTERM becomes a clean stop."""
        if catches_sigterm:
            self._sigterm = SigtermPipe()
        loops = [("guard", self._run_guard)]
        if self._store is not None:
            self._store.set(f"who/{self._rank}", encode(self._me))
            # written at once: a rank that dies before its first beat must be noticed too
            self._store.set(f"beat/{self._rank}", encode(Beat(-1, self.doing)))
            loops.append(("beat", self._run_beat))
        for name, loop in loops:
            thread = threading.Thread(target=loop, name=f"watchdog-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def begin(self, step: str, *, is_busy: bool) -> None:
        """Record the step of the main thread. ``is_busy``: it works, and does not wait for others."""
        self.step, self.is_busy = step, is_busy
        self.moves += 1

    def pause(self) -> None:
        """Record that the main thread has done its work and waits for others."""
        self.is_busy = False
        self.moves += 1

    def note_progress(self) -> None:
        """Record progress of this rank that is not a call on a file. Any thread."""
        self.moves += 1

    def stop(self) -> None:
        """Record that this rank has left by itself, and end both threads."""
        self._is_over.set()
        self._wake.set()
        if self._sigterm is not None:
            self._sigterm.wake()
        for thread in self._threads:
            thread.join(SILENT_SECS)  # beat may hang in a store that is gone
        sigterm, self._sigterm = self._sigterm, None
        if sigterm is not None:
            sigterm.close()
        self._threads = []

    @property
    def is_over(self) -> bool:
        """Whether this rank has left, or is about to."""
        return self._is_over.is_set()

    @property
    def doing(self) -> str:
        """The step that this rank is in, and the file that it reads or writes."""
        where = ACTIVITY.oldest()
        return f"'{self.step}'" + (f" at {where}" if where else "")

    @property
    def is_orphan(self) -> bool:
        """Whether the launcher is gone. The check is cheap, and is made again right before the commit."""
        return self._launcher is not None and os.getppid() != self._launcher

    def orphan_text(self) -> str:
        """Return the message about a launcher that is gone."""
        return (
            f"rank {self._rank} of {self._world_size}: its launcher (process {self._launcher} on {self._me.host}) is gone; "
            f"this rank was in {self.doing}"
        )

    def describe_interrupt(self) -> str:
        """Return the message about a SIGINT."""
        return f"interrupted in {self.doing}. {self.tail()}"

    def fail(self, text: str, *, exit_code: int = 1) -> bool:
        """Record why this rank leaves, for ranks that wait where no exception reaches them. The caller prints ``text``.

        Returns whether this rank is the first to leave; if the store is gone, whether it is the first rank of its machine.
        """
        self.stop()
        if self._store is None:
            return True
        end = End(text, self._me.host, self._rank, is_raised=True, exit_code=exit_code)
        try:
            return ENDS.decode(self._store.compare_set(_END, "", encode(end))) == end
        except RuntimeError:  # without the store no rank can read it
            return os.environ.get("LOCAL_RANK", "0") == "0"

    def wait_for_end(self) -> None:
        """Wait until a dead rank is found, which ends this process. Return after some seconds if none is found."""
        if self._threads:
            self._wake.set()
            self._is_over.wait(SILENT_SECS + 3 * BEAT_SECS)

    # ---- guard ----

    def _run_guard(self) -> None:
        last = time.monotonic()
        cycles, silent, idle, seen = -1, 0.0, 0.0, (-1, -1)
        while not self._is_over.is_set():
            self._wait_for_tick()
            now = time.monotonic()
            # after a sleep of the machine, or a thread that held the interpreter, the time that passed is no sign of a hang
            passed = min(now - last, 4 * TICK_SECS)
            last = now
            silent = 0.0 if self._cycles != cycles else silent + passed
            cycles = self._cycles
            moved = (self.moves, ACTIVITY.done)
            idle = idle + passed if self.is_busy and moved == seen else 0.0
            seen = moved
            if self._is_asked_to_stop and self._store is None and not self._is_stopping:
                self._stop_cleanly()
            self._stopping_secs += passed if self._is_stopping else 0.0
            if INTERRUPTS.has_come:
                continue  # the interrupt ends this process within seconds
            if self.is_orphan:
                self._end(self.orphan_text())
            elif self._store is not None and silent > SILENT_SECS:
                self._leave_without_store(
                    f"rank {self._rank} of {self._world_size}: the job's store has not answered for {SILENT_SECS:.0f} s, so "
                    f"the process or machine that hosts it is gone, or the network is cut; this rank was in {self.doing}"
                )
            elif idle > self._timeout_secs:
                self._end(
                    f"rank {self._rank} of {self._world_size} ({self._me}) hangs: no progress for {idle:.0f} s (timeout) in "
                    f"{self.doing}"
                )
            elif self._stopping_secs > STOP_SECS:
                self._end(f"stopped by SIGTERM, and did not stop by itself within {STOP_SECS:.0f} s in {self.doing}")

    def _wait_for_tick(self) -> None:
        sigterm = self._sigterm
        if sigterm is None:
            self._is_over.wait(TICK_SECS)
        elif sigterm.wait(TICK_SECS):
            self._is_asked_to_stop = True  # SIGTERM may come twice, as under SLURM
            self._wake.set()

    def _end(self, why: str) -> None:
        """Let beat record why, if the store still answers, and end."""
        self._why = self._why or why
        self._wake.set()
        if self._store is None or not self._is_over.wait(2 * BEAT_SECS):
            self._leave_without_store(self._why)

    # ---- beat ----

    def _run_beat(self) -> None:
        assert self._store is not None
        try:
            while not self._is_over.is_set():
                self._beat(self._store)
                self._cycles += 1
                self._wait_for_beat(self._store)
            self._store.set(f"beat/{self._rank}", encode(Beat(self._cycles, self.doing, has_left=True)))
        except RuntimeError as error:  # torch's errors of its store
            if not self._is_over.is_set() and not INTERRUPTS.has_come:
                time.sleep(TICK_SECS)  # if the launcher hosts the store, guard has the better message
                self._leave_without_store(
                    self._why
                    or f"rank {self._rank} of {self._world_size}: the job's store is gone, and with it the process that "
                    f"hosts it ({first_line(error)}); this rank was in {self.doing}"
                )

    def _wait_for_beat(self, store: Store) -> None:
        """Wait for the next beat, or until there is work. Write a new step at once, without a full beat."""
        told, until = self.step, time.monotonic() + BEAT_SECS
        while not self._wake.wait(STEP_SECS) and time.monotonic() < until:
            if self.step != told:
                told = self.step
                store.set(f"beat/{self._rank}", encode(Beat(self._cycles, self.doing)))
        self._wake.clear()

    def _beat(self, store: Store) -> None:
        """Write a sign of life, check whether the export is over, and check the next rank."""
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local and self._first_here is None and store.check([f"who/{self._rank - local}"]):
            self._first_here = IDENTITIES.decode(store.get(f"who/{self._rank - local}"))
        store.set(f"beat/{self._rank}", encode(Beat(self._cycles, self.doing)))
        if INTERRUPTS.has_come:
            return
        if store.check([_END]) and not (self.hears and ENDS.decode(store.get(_END)).is_raised):
            self._follow(store)
        elif self._why:
            self._record(store, self._why)
        elif self._is_asked_to_stop and not self._is_stopping:
            self._find_out_why_to_stop(store)
        elif why := self._neighbour.find_failure(store):
            self._record(store, why)

    def _record(self, store: Store, why: str) -> None:
        """Write the reason for all ranks, unless there is one already, and end."""
        end = End(why, self._me.host, self._rank)
        kept = ENDS.decode(store.compare_set(_END, "", encode(end)))
        if kept == end:
            self._let_rank_0_end(store)
            self._leave(self._tell(why))
        else:
            self._follow(store)

    def _let_rank_0_end(self, store: Store) -> None:
        """Wait until rank 0, which commits, has seen that the export is over. After that the files on disk no longer change.

        If SIGTERM is not caught, there is no time for it: the launcher ends this rank as soon as another one has ended.
        """
        deadline = time.monotonic() + 2 * BEAT_SECS
        with contextlib.suppress(RuntimeError):  # rank 0 may host the store
            while self._rank and self._sigterm is not None and time.monotonic() < deadline:
                if has_ended(store, 0, self._me):
                    return
                time.sleep(STEP_SECS)

    def _follow(self, store: Store) -> None:
        """End as another rank has recorded. On each other machine the first rank prints the message too."""
        end = ENDS.decode(store.get(_END))
        is_elsewhere = end.host != self._me.host and os.environ.get("LOCAL_RANK", "0") == "0"
        self._leave(self._tell(end.text) if is_elsewhere else None, exit_code=end.exit_code)

    def _find_out_why_to_stop(self, store: Store) -> None:
        """Report a rank that died, if there is one, because torchrun then sends SIGTERM; otherwise stop cleanly."""
        local, here = int(os.environ.get("LOCAL_RANK", self._rank)), os.environ.get("LOCAL_WORLD_SIZE")
        first = self._rank - local
        for rank in range(first, first + int(here or self._world_size)):
            if rank == self._rank or not store.check([f"who/{rank}", f"beat/{rank}"]):
                continue
            identity = IDENTITIES.decode(store.get(f"who/{rank}"))
            beat = BEATS.decode(store.get(f"beat/{rank}"))
            if identity.is_alive(self._me) is False and not beat.has_left:
                self._record(store, f"rank {rank} of {self._world_size} ({identity}) died in {beat.doing}")
                return
        self._stop_cleanly()

    def _stop_cleanly(self) -> None:
        self._is_stopping = True
        if not self._has_failure():  # otherwise the main threads know already, and their message comes first
            self._request_stop(f"stopped by SIGTERM, which came in {self.doing}")

    # ---- the end ----

    def _tell(self, why: str) -> str:
        return f"dist_export: {why}. {self.tail()}\n"

    def tail(self) -> str:
        """Return the end of every last message: what is on disk now, and what to do."""
        return f"{self.say_on_disk()}. {_ADVICE}"

    def _leave_without_store(self, why: str) -> None:
        """End without the store. On each machine the first rank prints the message, if it still runs."""
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        is_early = self._store is None and not is_first  # before the ranks know each other the first one prints it
        if is_early or (self._first_here is not None and self._first_here.is_alive(self._me) is not False):
            self._leave(None)
            return
        self._leave(self._tell(why), 4 * TICK_SECS)  # until the others here have seen that their first rank runs

    def _leave(self, text: str | None, wait_secs: float = 0.0, *, exit_code: int = 1) -> None:
        self._finish(text, wait_secs, exit_code)
        self._is_over.set()


def _finish(text: str | None, wait_secs: float, exit_code: int) -> None:
    """End the process at once: the main thread may be where no exception reaches it."""
    with contextlib.suppress(OSError):  # the reader of standard error may be gone too
        os.write(2, (SCREEN.close() + (text or "")).encode())
    end_children()
    time.sleep(wait_secs)
    os._exit(exit_code)
