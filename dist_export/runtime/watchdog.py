"""Ends this process when the export cannot go on, and says why: so that nobody waits for a dead rank, and no orphan commits.

Two threads on each rank, beside whatever the main thread is in:

- *beat* writes a sign of life into the job's store, over a connection of its own, and reads that of the next rank in the
  ring: one rank watches one other, whatever the world size, and of a run of dead ranks the one before it is alive.
- *guard* looks at the launcher, at the clock and at beat itself: a store call on a cut link hangs for minutes despite its
  timeout, and then only a thread that makes no such call can end the process.

Whoever finds that the export is over leaves a record in the store; the first to do so tells it. All others end quietly.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

import msgspec

from dist_export.redact import first_line
from dist_export.runtime.heartbeat import Beat, End, Store, encode, has_ended
from dist_export.runtime.interrupts import INTERRUPTS, end_children
from dist_export.runtime.io_activity import ACTIVITY
from dist_export.runtime.process_identity import Identity, identify
from dist_export.runtime.sigterm import SigtermPipe
from dist_export.runtime.terminal import SCREEN

BEAT_SECS = 1.0
STEP_SECS = 0.1
"""So long after a rank has begun a step the others can know which one it died in."""
TICK_SECS = 0.25
SILENT_SECS = 6.0
"""A rank of another machine, or a store, that has been silent for so long is dead. With a beat before it, one after it and
a second to speak this stays under ten seconds."""
STOP_SECS = 20.0
"""A job that was asked to stop has so long to stop by itself. torchrun and SLURM wait 30 seconds."""

_END = "end"
_ADVICE = "Run the same command again to go on"


class Watchdog:
    """Build on every rank of an export, start, stop. The attributes may be set from any thread."""

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
        """Nothing runs before :meth:`start`.

        Args:
            rank: this rank.
            world_size: of the export.
            store: a connection that no other thread uses; None for a single process.
            timeout_secs: a rank that has got nothing done for so long hangs.
            launcher: process id of the launcher without which this process must not go on; None where there is none.
            request_stop: makes the main thread stop at the next step, with the reason as its error.
            has_failure: whether a rank has announced a failure, which the main threads are about to tell.
            finish: ends the process, after telling what it gets, if anything, and waiting for some seconds, with an exit
                code; for tests.
        """
        self.step = "start"
        self.is_busy = False
        """Whether this rank is at work: waiting for others is no hang of its own."""
        self.hears = False
        """Whether the main thread polls for failures of other ranks by itself, and then tells them."""
        self.say_on_disk: Callable[[], str] = lambda: "Nothing was written"
        """Says what is on disk, when a message is made: another rank may have committed since."""
        self.moves = 0
        """Grows with all progress that is not a call on a file."""
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
        """The first rank of this machine, which speaks where there is no store left to decide who does."""
        self._is_asked_to_stop = False
        self._is_stopping = False
        self._stopping_secs = 0.0
        self._sigterm: SigtermPipe | None = None
        self._threads: list[threading.Thread] = []
        self._watched = rank
        """The rank that this one watches, and what it last knew of it."""
        self._identity: Identity | None = None
        self._number = -2
        self._silent_since = 0.0

    def start(self, *, catches_sigterm: bool = False) -> None:
        """Start both threads. With ``catches_sigterm``, from the main thread alone, SIGTERM becomes a clean stop."""
        if catches_sigterm:
            self._sigterm = SigtermPipe()
        loops = [("guard", self._run_guard)]
        if self._store is not None:
            self._store.set(f"who/{self._rank}", encode(self._me))
            # at once: a rank that dies before its first beat must be missed too
            self._store.set(f"beat/{self._rank}", encode(Beat(-1, self.doing)))
            loops.append(("beat", self._run_beat))
        for name, loop in loops:
            thread = threading.Thread(target=loop, name=f"watchdog-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def begin(self, step: str, *, is_busy: bool) -> None:
        """Say what the main thread does from now on. ``is_busy``: it works, and does not wait for others."""
        self.step, self.is_busy = step, is_busy
        self.moves += 1

    def pause(self) -> None:
        """Say that the main thread has done its work, and waits for others."""
        self.is_busy = False
        self.moves += 1

    def note_progress(self) -> None:
        """Say that this rank gets on, with something that is no call on a file. Any thread."""
        self.moves += 1

    def stop(self) -> None:
        """Say that this rank has left on its own account, and end both threads."""
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
    def doing(self) -> str:
        """The step that this rank is in, and the file."""
        where = ACTIVITY.oldest()
        return f"'{self.step}'" + (f" at {where}" if where else "")

    @property
    def is_orphan(self) -> bool:
        """Whether the launcher is gone. Cheap: asked once more right before the commit."""
        return self._launcher is not None and os.getppid() != self._launcher

    def orphan_text(self) -> str:
        """Return what to say of a launcher that is gone."""
        return (
            f"rank {self._rank} of {self._world_size}: its launcher (process {self._launcher} on {self._me.host}) is gone; "
            f"this rank was in {self.doing}"
        )

    def describe_interrupt(self) -> str:
        """Return what to say of a SIGINT."""
        return f"interrupted in {self.doing}. {self.tail()}"

    def fail(self, text: str, *, exit_code: int = 1) -> bool:
        """Record, for ranks that wait where no exception reaches them, why this rank leaves. It tells ``text`` itself.

        Returns whether it is the first to leave, of those that share this rank's machine if the store is gone.
        """
        self.stop()
        if self._store is None:
            return True
        end = End(text, self._me.host, self._rank, is_raised=True, exit_code=exit_code)
        try:
            return msgspec.json.decode(self._store.compare_set(_END, "", encode(end)), type=End) == end
        except RuntimeError:  # without the store there is nobody left to hear it
            return os.environ.get("LOCAL_RANK", "0") == "0"

    def wait_for_end(self) -> None:
        """Wait as long as it takes to find out which rank is dead, which ends this process. Returns if none is."""
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
            # a machine that slept, or a thread that held the interpreter for long, is no sign of a hang
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
                continue  # this process ends for that reason, and within seconds
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
            self._is_asked_to_stop = True  # it may come twice, as under SLURM
            self._wake.set()

    def _end(self, why: str) -> None:
        """Have beat record why, as far as the store still answers, and end."""
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
                time.sleep(TICK_SECS)  # where the launcher hosts it, guard knows better
                self._leave_without_store(
                    self._why
                    or f"rank {self._rank} of {self._world_size}: the job's store is gone, and with it the process that "
                    f"hosts it ({first_line(error)}); this rank was in {self.doing}"
                )

    def _wait_for_beat(self, store: Store) -> None:
        """Wait for the next beat, or until something is to be done; tell of a new step on the way, outside of its path."""
        told, until = self.step, time.monotonic() + BEAT_SECS
        while not self._wake.wait(STEP_SECS) and time.monotonic() < until:
            if self.step != told:
                told = self.step
                store.set(f"beat/{self._rank}", encode(Beat(self._cycles, self.doing)))
        self._wake.clear()

    def _beat(self, store: Store) -> None:
        """Give a sign of life, look for an end, look at the next rank."""
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local and self._first_here is None and store.check([f"who/{self._rank - local}"]):
            self._first_here = msgspec.json.decode(store.get(f"who/{self._rank - local}"), type=Identity)
        store.set(f"beat/{self._rank}", encode(Beat(self._cycles, self.doing)))
        if INTERRUPTS.has_come:
            return
        if store.check([_END]) and not (self.hears and msgspec.json.decode(store.get(_END), type=End).is_raised):
            self._follow(store)
        elif self._why:
            self._record(store, self._why)
        elif self._is_asked_to_stop and not self._is_stopping:
            self._find_out_why_to_stop(store)
        else:
            self._watch(store)

    def _watch(self, store: Store) -> None:
        if self._watched == self._rank:
            self._watch_next()
        rank = self._watched
        if rank == self._rank:
            return  # all others have left
        now = time.monotonic()
        if store.check([f"beat/{rank}", f"who/{rank}"]):
            beat = msgspec.json.decode(store.get(f"beat/{rank}"), type=Beat)
            if beat.has_left:
                self._watch_next()
                return
            if beat.number != self._number:
                self._number, self._silent_since = beat.number, now
            if self._identity is None:
                self._identity = msgspec.json.decode(store.get(f"who/{rank}"), type=Identity)
            self._judge(store, beat, now - self._silent_since)
        elif now - self._silent_since > self._timeout_secs:
            self._record(store, f"rank {rank} of {self._world_size} never arrived")

    def _watch_next(self) -> None:
        self._watched = (self._watched + 1) % self._world_size
        self._identity, self._number, self._silent_since = None, -2, time.monotonic()

    def _judge(self, store: Store, beat: Beat, silent: float) -> None:
        assert self._identity is not None
        is_alive = self._identity.is_alive(self._me)
        who = f"rank {self._watched} of {self._world_size} ({self._identity})"
        if is_alive is False:
            self._record_death(store, who, beat)
        elif is_alive is None and silent > SILENT_SECS:
            self._record(store, f"{who} has given no sign of life for {silent:.0f} s; it was last in {beat.doing}")
        elif silent > self._timeout_secs:
            self._record(
                store, f"{who} hangs: no sign of life for {silent:.0f} s (timeout); it was last in {beat.doing}"
            )

    def _record_death(self, store: Store, who: str, beat: Beat) -> None:
        again = msgspec.json.decode(store.get(f"beat/{self._watched}"), type=Beat)
        if not again.has_left:  # it may have left between the two looks
            self._record(store, f"{who} died in {beat.doing}")

    def _record(self, store: Store, why: str) -> None:
        """Leave the reason for all ranks, unless one is there already, and end."""
        end = End(why, self._me.host, self._rank)
        kept = msgspec.json.decode(store.compare_set(_END, "", encode(end)), type=End)
        if kept == end:
            self._let_rank_0_end(store)
            self._leave(self._tell(why))
        else:
            self._follow(store)

    def _let_rank_0_end(self, store: Store) -> None:
        """Wait until rank 0, which commits, has seen that the export is over: what is on disk is settled then.

        Where SIGTERM is not caught there is no time for it: the launcher ends this rank as soon as another one has ended.
        """
        deadline = time.monotonic() + 2 * BEAT_SECS
        with contextlib.suppress(RuntimeError):  # rank 0 may host the store
            while self._rank and self._sigterm is not None and time.monotonic() < deadline:
                if has_ended(store, 0, self._me):
                    return
                time.sleep(STEP_SECS)

    def _follow(self, store: Store) -> None:
        """End as another rank has recorded; on another machine than its own, one rank says it there too."""
        end = msgspec.json.decode(store.get(_END), type=End)
        is_elsewhere = end.host != self._me.host and os.environ.get("LOCAL_RANK", "0") == "0"
        self._leave(self._tell(end.text) if is_elsewhere else None, exit_code=end.exit_code)

    def _find_out_why_to_stop(self, store: Store) -> None:
        """SIGTERM comes from a scheduler, or from torchrun because a rank died: the rank that died goes first."""
        local, here = int(os.environ.get("LOCAL_RANK", self._rank)), os.environ.get("LOCAL_WORLD_SIZE")
        first = self._rank - local
        for rank in range(first, first + int(here or self._world_size)):
            if rank == self._rank or not store.check([f"who/{rank}", f"beat/{rank}"]):
                continue
            identity = msgspec.json.decode(store.get(f"who/{rank}"), type=Identity)
            beat = msgspec.json.decode(store.get(f"beat/{rank}"), type=Beat)
            if identity.is_alive(self._me) is False and not beat.has_left:
                self._record(store, f"rank {rank} of {self._world_size} ({identity}) died in {beat.doing}")
                return
        self._stop_cleanly()

    def _stop_cleanly(self) -> None:
        self._is_stopping = True
        if not self._has_failure():  # else the main threads know already, and what they say goes first
            self._request_stop(f"stopped by SIGTERM, which came in {self.doing}")

    # ---- the end ----

    def _tell(self, why: str) -> str:
        return f"dist_export: {why}. {self.tail()}\n"

    def tail(self) -> str:
        """Return how every message of an end ends: what is on disk now, and what to do."""
        return f"{self.say_on_disk()}. {_ADVICE}"

    def _leave_without_store(self, why: str) -> None:
        """End where nobody can be asked who tells it: on each machine its first rank does, if it still runs."""
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        is_early = self._store is None and not is_first  # before the ranks know each other the first one speaks
        if is_early or (self._first_here is not None and self._first_here.is_alive(self._me) is not False):
            self._leave(None)
            return
        self._leave(self._tell(why), 4 * TICK_SECS)  # until the others here have seen that their first rank runs

    def _leave(self, text: str | None, wait_secs: float = 0.0, *, exit_code: int = 1) -> None:
        self._finish(text, wait_secs, exit_code)
        self._is_over.set()


def _finish(text: str | None, wait_secs: float, exit_code: int) -> None:
    """End the process at once: the main thread may be where no exception reaches it."""
    with contextlib.suppress(OSError):  # whoever read it is gone too
        os.write(2, (SCREEN.close() + (text or "")).encode())
    end_children()
    time.sleep(wait_secs)
    os._exit(exit_code)
