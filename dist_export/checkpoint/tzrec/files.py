"""The files of TorchEasyRec's dumps of changed embeddings: which step and rank each is of, and which ones a delta takes. Pure.

A trainer of one rank leaves ``<prefix>_step_<n>.parquet``. One of several leaves a file of each rank, empty or not:
``step_<n>/<prefix>_step_<n>_rank_<r>_of_<w>.parquet``. It writes to a name that ends with ``.tmp`` and renames, so what has
such a name was never finished.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dist_export.errors import CheckpointError
from dist_export.humanize import count, few
from dist_export.storage.directory import Directory

TZREC_DELTA = "tzrec_delta"
"""The format's name, in settings and manifest."""
TOLD_BY = "<prefix>_step_<n>.parquet, or step_<n>/<prefix>_step_<n>_rank_<r>_of_<w>.parquet"
"""For messages."""

_NAME = re.compile(r"(.*)_step_(\d{1,18})(?:_rank_(\d{1,9})_of_(\d{1,9}))?\.parquet", re.DOTALL)
_FOLDER = re.compile(r"step_\d{1,18}")
_LEFTOVER = ".tmp"
_SUFFIX = ".parquet"


class DumpFile(NamedTuple):
    """One file of a dump."""

    path: str
    """Relative to the directory of dumps."""
    prefix: str
    step: int
    rank: int
    world_size: int


class Listing(NamedTuple):
    """What a directory of dumps holds."""

    files: tuple[DumpFile, ...]
    """By step, then by rank."""
    leftovers: tuple[str, ...]
    """Files that no trainer finished."""


class Chosen(NamedTuple):
    """What a delta takes."""

    files: tuple[DumpFile, ...]
    """By step, then by rank: of rows with one key, that of the last file counts."""
    notes: tuple[str, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps, in order."""
        return tuple(sorted({file.step for file in self.files}))


def list_dumps(directory: Directory) -> Listing:
    """Return the files of a directory of dumps, by their names. One rank; reads none of them.

    Raises:
        CheckpointError: the directory is not there, or holds a parquet file that is named otherwise.
        OSError: it cannot be looked at.
    """
    names = directory.names()
    folders = [folder for folder in directory.folders() if _FOLDER.fullmatch(folder)]
    names += [f"{folder}/{name}" for folder in folders for name in directory.child(folder).names()]
    if not names and not directory.exists():
        raise CheckpointError(f"{directory.url}: {directory.say_missing()}")
    files = [_read_name(name, directory) for name in names if name.endswith(_SUFFIX)]
    if not files:
        raise CheckpointError(f"{directory.url} holds no dump of TorchEasyRec; looked for {TOLD_BY}")
    leftovers = tuple(name for name in names if name.endswith(_LEFTOVER))
    return Listing(tuple(sorted(files, key=lambda file: (file.step, file.rank, file.path))), leftovers)


def choose_files(listing: Listing, *, since: int, until: int | None, allow_ragged: bool, where: str) -> Chosen:
    """Return the files of the steps after ``since``, up to ``until``; every step must be whole.

    Args:
        since: the step of the base, whose rows are older than the next dump.
        until: the last step; None for all.
        allow_ragged: take a step also where ranks are missing.
        where: the directory, for messages.

    Raises:
        CheckpointError: there is no such step, or one lacks a rank, is of two trainers, or has two files of a rank.
    """
    files = [file for file in listing.files if file.step > since and (until is None or file.step <= until)]
    if not files:
        steps = sorted({file.step for file in listing.files})
        upto = "" if until is None else f" and up to {until} (until_step)"
        raise CheckpointError(
            f"{where}: no dump after step {since} of the base{upto}; there are those of {count(len(steps), 'step')} from "
            f"{steps[0]} to {steps[-1]}"
        )
    notes: list[str] = []
    for step in sorted({file.step for file in files}):
        missing = _find_missing([file for file in files if file.step == step], step, where)
        if missing and not allow_ragged:
            raise CheckpointError(
                f"{where}: the dump of step {step} lacks {_say_ranks(missing)}, so changed rows would be missing. Wait until it "
                "is whole, or set until_step to an earlier step; allow_ragged: true takes dumps by the clock, of which ranks may "
                "be a step apart"
            )
        if missing:
            notes.append(f"the dump of step {step} lacks {_say_ranks(missing)}; what is there was taken (allow_ragged)")
    if listing.leftovers:
        notes.append(f"{where}: no trainer finished {few(listing.leftovers)}; passed over")
    return Chosen(tuple(files), tuple(notes))


def _read_name(name: str, directory: Directory) -> DumpFile:
    folder, _, last = name.rpartition("/")
    found = _NAME.fullmatch(last)
    if found is None or (folder and folder != f"step_{found[2]}"):
        raise CheckpointError(
            f"{directory.describe(name)} is named otherwise than a dump of TorchEasyRec ({TOLD_BY}); put other parquet files "
            "elsewhere"
        )
    rank, world_size = (int(found[3]), int(found[4])) if found[3] is not None else (0, 1)
    if rank >= world_size:
        raise CheckpointError(f"{directory.describe(name)}: there is no rank {rank} of {world_size}; remove the file")
    return DumpFile(name, found[1], int(found[2]), rank, world_size)


def _find_missing(files: Sequence[DumpFile], step: int, where: str) -> list[int]:
    """Return the ranks that a step lacks. CheckpointError if its files are not of one dump."""
    sizes = sorted({file.world_size for file in files})
    if len(sizes) > 1:
        raise CheckpointError(
            f"{where}: the dump of step {step} has files of {sizes[0]} and of {sizes[1]} ranks, so two trainers wrote it. Remove "
            "the files of the one that is not to be served"
        )
    ranks = [file.rank for file in files]
    twice = next((file for file in files if ranks.count(file.rank) > 1), None)
    if twice is not None:
        its = [file.path for file in files if file.rank == twice.rank]
        raise CheckpointError(
            f"{where}: the dump of step {step} has {few(its)} of rank {twice.rank}; put dumps of other trainers elsewhere"
        )
    return sorted(set(range(sizes[0])) - set(ranks))


def _say_ranks(ranks: Iterable[int]) -> str:
    numbers = [str(rank) for rank in ranks]
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {few(numbers)}"
