"""Carry out a rank's part of the plan: claim units, run them, and publish each complete file with a receipt.

The order on every rank: ``prepare`` (collective), ``write`` (no collective, so it may run in a thread beside other
work), ``finish`` (collective).
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Container, Iterator, Sequence

import msgspec

from dist_export.errors import TransferError
from dist_export.formats.digests import NONE, root_digest
from dist_export.plan.casts import casts_by_table
from dist_export.plan.disk_placement import find_placements
from dist_export.plan.memory_budget import MemoryBudget
from dist_export.plan.plan import SparsePlan
from dist_export.plan.work_units import Unit, plan_hash_units, plan_units
from dist_export.runtime.ranks import Ranks
from dist_export.runtime.threads import run_threads
from dist_export.storage.directory import Directory
from dist_export.storage.range_reader import OpenReaders, RangeReader, share_descriptors
from dist_export.storage.s3 import UploadedPart
from dist_export.storage.staging import Staging
from dist_export.transfer.casting import Counts, read_counts, write_counts
from dist_export.transfer.multipart_upload import Begun, PartWriter, plan_uploads
from dist_export.transfer.output_files import StagedFiles
from dist_export.transfer.resume import Receipts
from dist_export.transfer.shared_disks import share_disks
from dist_export.transfer.unit_runner import UnitRunner
from dist_export.transfer.work_done import PIECES, ChunkDigests, Piece, Share, chunks_of_files, join_digests
from dist_export.transfer.work_stealing import open_queues, take_units
from dist_export.workdir.state import Receipt, write_receipt

logger = logging.getLogger(__name__)


class Transfer:
    """One rank's transfer of one plan into ``target``."""

    def __init__(
        self,
        ranks: Ranks,
        plan: SparsePlan,
        target: Directory,
        *,
        budget: MemoryBudget,
        digest: str,
        in_place: bool,
        may_copy: bool = False,
        count_bytes: Callable[[int], None],
    ) -> None:
        """Set up the transfer. It reads and writes nothing before ``prepare``.

        Args:
            ranks: the ranks of the export.
            plan: the plan to carry out; the same on all ranks.
            target: the export directory.
            budget: threads of each rank and their memory; the same on all ranks.
            digest: algorithm of the shards' digests, or ``none``.
            in_place: whether the files are already in the target and are only hashed.
            may_copy: on S3, whether the store may copy byte ranges itself.
            count_bytes: called with the bytes of each finished unit, for a progress display.
        """
        self._ranks = ranks
        self._plan = plan
        self._target = target
        self._budget = budget
        self._digest = digest
        self._in_place = in_place
        self._count_bytes = count_bytes
        self._staging = Staging(target)
        self._uploads = (
            plan_uploads(plan, target, budget.part_bytes, may_copy=may_copy, digest=digest) if not in_place else None
        )
        self._receipts = Receipts(plan, target, self._uploads, digest=digest)
        self._digests: ChunkDigests = {}
        self._reused: dict[int, Receipt] = {}
        self._writing: list[Unit] = []
        self._hashing: list[Unit] = []
        self._pieces: dict[int, list[int]] = {}
        """The first bytes of the hashed units of each file. The file is complete when all of them are done."""
        self._reserved: list[str] = []
        self._disk_of_rank: Sequence[int] = ()
        """The disk that each rank sees, if files are built on several disks; else empty."""
        self._placements: dict[int, int] = {}
        """The disk on which each of those files is built."""
        self._elsewhere: frozenset[int] = frozenset()
        """The files that are built on a disk that this rank does not see."""
        self._share = Share(ranks.rank)
        self._counts: Counts = {}
        """The losses of the rows that this rank cast. On rank 0 also the losses that an interrupted run counted."""
        self.casts: Counts = {}
        """The losses of all casts of all ranks. After ``finish``."""

    @property
    def num_bytes(self) -> int:
        """The bytes that all ranks move, or hash if the transfer is in place. After ``prepare``."""
        return sum(unit.moved_bytes for unit in (self._hashing if self._in_place else self._writing))

    @property
    def num_reused(self) -> int:
        """How many complete shards of an interrupted run are reused. After ``prepare``."""
        return len(self._reused)

    @property
    def reused_bytes(self) -> int:
        """The bytes of the reused shards."""
        return sum(self._plan.files[number].num_bytes for number in self._reused)

    def prepare(self) -> None:
        """Find complete shards of an interrupted run, remove half-written files, and reserve space. All ranks."""
        ranks, plan = self._ranks, self._plan
        threads = self._budget.threads

        def look() -> tuple[dict[int, Receipt], dict[int, Receipt], set[int]]:
            open_queues(ranks, "reuse", threads)
            open_queues(ranks, "write", threads)
            if ranks.rank or self._in_place:
                return {}, {}, set()
            if casts_by_table(plan.checkpoint, plan.selection):
                self._counts = read_counts(self._target, plan)
            return *self._receipts.find(), set(self._counts)

        candidates, vouched, counted = ranks.all_gather("look for an interrupted export", look)[0]
        if self._in_place:
            self._hashing = plan_hash_units(plan, list(range(len(plan.files))), tuning=self._budget.tuning)
            return
        self._reused = self._find_whole(candidates) | vouched
        remote = {} if self._uploads is None else {n: p for n, p in self._uploads.parts.items() if p.has_remote}
        new = [n for n in range(len(plan.files)) if n not in self._reused]
        built = [n for n in new if self._uploads is None or self._uploads.is_built(n)]
        if built and not self._target.is_local and ranks.world_size > 1:
            self._share_disks(built)
        self._writing, self._hashing = plan_units(
            plan,
            skip=frozenset(self._reused),
            counted=counted,
            by_parts=remote,
            placements=self._placements,
            tuning=self._budget.tuning,
        )
        for unit in (*self._writing, *self._hashing):
            if unit.is_hashed:
                self._pieces.setdefault(unit.number, []).append(unit.begin)
        for begins in self._pieces.values():
            begins.sort()
        if self._uploads is not None:
            self._uploads.join(ranks.broadcast("begin the uploads", functools.partial(self._begin_uploads, new)))
        ranks.all_gather("reserve space for the shards", lambda: self._reserve(built, remote))

    def _find_whole(self, candidates: dict[int, Receipt]) -> dict[int, Receipt]:
        """Return the shards of an interrupted export that still have the digest of their receipt. All ranks."""
        if not candidates or self._digest == NONE:
            return candidates
        ranks, units = self._ranks, plan_hash_units(self._plan, sorted(candidates), tuning=self._budget.tuning)

        def hash_again() -> ChunkDigests:
            hashed = self._run_units("reuse", units, self._open_final, is_counted=False)
            ranks.refuse_to_go_on()  # a rank that was asked to stop did not hash all its files
            return hashed

        shares = ranks.all_gather("verify shards of an interrupted export", hash_again)
        found = chunks_of_files(join_digests(shares))
        whole = {number: root_digest(chunks, self._digest) for number, chunks in found.items()}
        return {n: receipt for n, receipt in candidates.items() if whole[n] == receipt.digest}

    def _reserve(self, built: list[int], remote: Container[int]) -> None:
        """Reserve this rank's share of the space on its disk. ``remote``: files of which the store copies parts itself."""
        ranks, files = self._ranks, self._plan.files
        if self._disk_of_rank:
            open_queues(ranks, "write/disk", self._budget.threads)
        here = [number for number in built if number not in self._elsewhere]
        if not here:
            return
        self._staging.check_room(sum(files[number].num_bytes for number in here if number not in remote))
        disks = self._disk_of_rank or [0] * ranks.world_size
        neighbours = [rank for rank, disk in enumerate(disks) if disk == disks[ranks.rank]]
        for number in here[neighbours.index(ranks.rank) :: len(neighbours)]:
            self._reserved.append(files[number].name)
            has_holes = number in remote  # ranges that the store copies are never written here
            self._staging.create(files[number].name, files[number].num_bytes, has_holes=has_holes)

    def _share_disks(self, built: list[int]) -> None:
        """Choose the disk on which each file is built. All ranks."""
        ranks, disk_of_rank = self._ranks, share_disks(self._ranks, self._staging)
        if len(set(disk_of_rank)) == 1:
            return
        self._disk_of_rank = disk_of_rank
        self._placements = ranks.run(
            "deal shards out to disks", lambda: find_placements(self._plan, built, disk_of_rank)
        )
        mine = disk_of_rank[ranks.rank]
        self._elsewhere = frozenset(number for number, disk in self._placements.items() if disk != mine)

    def write(self) -> None:
        """Copy and gather: own units first, then units of slower ranks. Any thread; no collective."""
        self._digests.update(self._run_units("write", self._writing, self._open_staged, is_counted=True))

    def finish(self, wait: Callable[[], None], and_then: Callable[[], object]) -> tuple[list[Receipt], list[Share]]:
        """Wait for the writing, hash the remaining chunks, and check that the source did not change. All ranks.

        Args:
            wait: returns when ``write`` has returned, or raises its error.
            and_then: is called on rank 0 when all files are published, before this returns on any rank.

        Returns:
            The receipts of all files, in the order of the files, and the work of each rank. All files are published.
        """
        ranks, plan = self._ranks, self._plan

        def finish_writing() -> ChunkDigests:
            open_queues(ranks, "hash", self._budget.threads)
            if self._disk_of_rank:
                open_queues(ranks, "hash/disk", self._budget.threads)
            wait()
            ranks.refuse_to_go_on()  # a rank that was asked to stop did not finish its units
            return self._digests

        found = join_digests(ranks.all_gather("write shards", finish_writing))
        if self._hashing:
            opener = self._open_final if self._in_place else self._open_staged
            # usually read back from the page cache: progress counts it only in place
            hash_shards = functools.partial(self._run_units, "hash", self._hashing, opener, is_counted=self._in_place)
            found |= join_digests(ranks.all_gather("hash shards", hash_shards))

        def look_back() -> tuple[Counts, Share]:
            self._refuse_changed_source()
            if ranks.rank == 0:
                and_then()
            return self._counts, self._share

        outcomes = ranks.all_gather("look whether the checkpoint changed", look_back)
        for counts, _ in outcomes:
            self.casts |= counts
        if self._uploads is not None:
            ranks.broadcast("look for uploads that are left", self._uploads.sweep)
        written = {n: self._receipts.make(n, chunks) for n, chunks in chunks_of_files(found).items()} | self._reused
        return [written[number] for number in range(len(plan.files))], [share for _, share in outcomes]

    def close(self) -> None:
        """Remove reserved files that were not published. Each rank by itself, also after a failure.

        Call this only after the last step in which another rank may write into them.
        """
        for name in self._reserved:
            try:
                self._staging.remove(name)
            except OSError as error:  # do not hide the failure before this one
                logger.warning("the space of an unfinished file could not be given back: %s", error)
        self._staging.close()

    def _run_units(
        self, phase: str, units: list[Unit], open_written: Callable[[int], RangeReader], *, is_counted: bool
    ) -> ChunkDigests:
        started = time.perf_counter()
        threads = self._budget.threads
        max_open = share_descriptors(threads)

        def work(worker: int) -> tuple[ChunkDigests, Share]:
            staged = StagedFiles(self._plan, self._staging, max_open=max_open)
            outputs = staged if self._uploads is None else PartWriter(staged, self._uploads)
            written = OpenReaders(open_written, max_open=max_open)
            runner = UnitRunner(
                self._plan,
                outputs,
                written,
                budget=self._budget,
                digest=self._digest,
                skip=self._elsewhere.union(self._reused),
            )
            disks = self._disk_of_rank if any(unit.disk >= 0 for unit in units) else ()
            taken = take_units(self._ranks, phase, units, worker=worker, threads=threads, disk_of_rank=disks)
            is_whole = False
            try:
                done = self._run_taken(taken, runner, outputs, is_counted=is_counted)
                is_whole = True
            except BaseException:
                self._ranks.announce_failure()  # the other threads and ranks stop at their next unit
                raise
            finally:
                runner.close()
                outputs.close(sync=is_whole)
            return done

        first = self._ranks.rank * threads
        shares = run_threads(work, list(range(first, first + threads)))
        if is_counted:
            self._share = functools.reduce(Share.plus, (share for _, share in shares), self._share)
        self._share = self._share._replace(seconds=self._share.seconds + time.perf_counter() - started)
        return join_digests([digests for digests, _ in shares])

    def _run_taken(
        self,
        taken: Iterator[tuple[Unit, bool]],
        runner: UnitRunner,
        outputs: StagedFiles | PartWriter,
        *,
        is_counted: bool,
    ) -> tuple[ChunkDigests, Share]:
        """Run the units, and return the digests and the work done."""
        digests: ChunkDigests = {}
        pending: ChunkDigests = {}
        uncounted = 0
        parts: list[UploadedPart] = []
        done = Share(self._ranks.rank)
        for unit, is_others in taken:
            if pending and (not unit.is_hashed or unit.number != next(iter(pending))[0]):
                self._hand_in(pending, parts, outputs)
            chunks = runner.run(unit)
            if isinstance(outputs, PartWriter):
                sent = outputs.take_parts(unit.number)
                parts += sent
                if self._has_remote(unit.number):  # a unit of such a file is one part
                    chunks = [part.sha256 for part in sent]
            if unit.is_hashed:
                digests[unit.number, unit.begin] = chunks
                if unit.number in self._pieces:
                    pending[unit.number, unit.begin] = chunks
            uncounted += unit.num_bytes if runner.counts else 0
            if uncounted >= self._budget.tuning.unit_bytes:
                self._keep_counts(runner.counts)
                uncounted = 0
            if is_counted:
                done = done.plus(Share(done.rank, 1, int(is_others), unit.moved_bytes))
                self._count_bytes(unit.moved_bytes)
        self._hand_in(pending, parts, outputs)
        self._keep_counts(runner.counts)
        return digests, done

    def _keep_counts(self, counts: Counts) -> None:
        """Move the losses of finished gathers into this rank's counts, and store them for a rerun."""
        if counts:
            write_counts(self._target, self._plan, counts)
            self._counts.update(counts)  # a gather is run by one thread
            counts.clear()

    def _hand_in(self, pending: ChunkDigests, parts: list[UploadedPart], outputs: StagedFiles | PartWriter) -> None:
        """Make finished pieces of a file durable and announce them. The thread with the last piece publishes the file.

        Pieces of one file are handed in together, because each call costs a sync.
        """
        if not pending:
            return
        ranks = self._ranks
        number = next(iter(pending))[0]
        outputs.sync(number)
        for place, ((_, begin), chunks) in enumerate(pending.items()):
            ranks.shared.put(f"piece/{number}/{begin}", msgspec.msgpack.encode(Piece(chunks, [] if place else parts)))
        begins = self._pieces[number]
        if ranks.shared.add(f"pieces/{number}", len(pending)) == len(begins):
            pieces = [PIECES.decode(ranks.shared.take(f"piece/{number}/{begin}")) for begin in begins]
            sent = sorted(part for piece in pieces for part in piece.parts)
            receipt = self._receipts.make(number, [chunk for piece in pieces for chunk in piece.chunks], sent)
            # Write the receipt before the shard, so that no shard is without one. First remove a file of another plan with
            # that name: without a digest the receipt would vouch for it.
            self._target.remove(receipt.name)
            write_receipt(self._target, receipt)
            if self._uploads is not None and number in self._uploads:
                self._uploads.complete(number, sent)
            else:
                self._staging.publish(receipt.name)
        pending.clear()
        parts.clear()

    def _has_remote(self, number: int) -> bool:
        return self._uploads is not None and self._uploads.has_remote(number)

    def _begin_uploads(self, numbers: list[int]) -> dict[int, Begun]:
        assert self._uploads is not None
        return self._uploads.begin([number for number in numbers if number in self._uploads])

    def _refuse_changed_source(self) -> None:
        """Raise TransferError if one of this rank's share of source files changed since its header was read."""
        checkpoint = self._plan.checkpoint
        if checkpoint.memory is not None:
            return  # training does not run during the export
        mine = checkpoint.files[self._ranks.rank :: self._ranks.world_size]
        stats = checkpoint.directory.stat_many([file.name for file in mine])
        for file in mine:
            if not file.is_same(stats[file.name]):
                raise TransferError(
                    f"{checkpoint.directory.describe(file.name)}: changed while it was being exported, so the shards may "
                    "mix two checkpoints. No manifest was written; run the export again on a checkpoint that is finished"
                )

    def _open_staged(self, number: int) -> RangeReader:
        return self._staging.open_reader(self._plan.files[number].name)

    def _open_final(self, number: int) -> RangeReader:
        return self._target.open_reader(self._plan.files[number].name)
