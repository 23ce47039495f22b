"""TorchEasyRec's dumps of looked-up embeddings as a source: the last row of each key, on top of a base.

Each rank reads some of the files, and keeps their rows on its disk. Keys and fingerprints of rows travel, so that all ranks
choose the same rows; the rows stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

from dist_export.checkpoint.metadata import Blocks, Checkpoint, Parts, SourceFile, no_strips
from dist_export.checkpoint.trainer_dump import ReadFile, TrainerDump
from dist_export.checkpoint.tzrec.files import TZREC_DELTA, Chosen, DumpFile, choose_files, list_dumps
from dist_export.checkpoint.tzrec.parquet import need_pyarrow
from dist_export.checkpoint.tzrec.spool import NO_ROWS, ChosenRows, DumpMemory, HeldRows, Kind, Spool, bytes_of
from dist_export.checkpoint.tzrec.tables import FoundTable, Matched, is_exact, match_tables
from dist_export.checkpoint.tzrec.winners import Conflict, Keyed, choose_rows
from dist_export.errors import CheckpointError, PlanError
from dist_export.formats.recis import HASH_SIZE
from dist_export.humanize import count, few
from dist_export.manifest import Manifest, TableEntry
from dist_export.runtime.ranks import Ranks
from dist_export.storage.directory import Directory, digest_file

_BYTES_OF_KEY = 64
"""Of a row while keys are compared: key, fingerprint, step and place, twice over while they are sorted."""
_BYTES_OF_ROW = 40
"""Of a row that a rank holds: key, fingerprint and place, then those of the chosen ones."""
_GROUP_ROWS = 1 << 22
"""Rows of the tables that are compared in one exchange."""


class DumpSettings(NamedTuple):
    """What the settings say of a dump."""

    since: int
    """The step of the base."""
    until: int | None
    allow_ragged: bool
    max_memory: int
    """Bytes that a rank may hold."""


class _FileFacts(NamedTuple):
    """What a rank has found in a file."""

    file: ReadFile
    tables: Mapping[str, tuple[Kind, int]]
    """Table of the dump -> the kind of its rows and their number."""


class _Held:
    """What this rank has read: rows by file and table of the dump."""

    def __init__(self) -> None:
        self.spool = Spool()
        self.rows: dict[tuple[int, str], HeldRows] = {}

    def read(self, directory: Directory, file: DumpFile, number: int) -> _FileFacts:
        """Read a file. CheckpointError where it is damaged, or changes meanwhile."""
        before = directory.stat(file.path)
        digest = digest_file(directory, file.path)
        found = self.spool.add_file(directory, file)
        if not SourceFile.of(file.path, before).is_same(directory.stat(file.path)):
            raise CheckpointError(
                f"{directory.describe(file.path)}: changed while it was read. Nothing was written; run the export again"
            )
        self.rows |= {(number, table): its for table, its in found.items()}
        kinds = {table: (its.kind, len(its.keys)) for table, its in found.items()}
        return _FileFacts(ReadFile(file.path, before.size, digest), kinds)


def open_dump(ranks: Ranks, directory: Directory, base: Manifest, wanted: DumpSettings) -> Checkpoint:
    """Read the dumps since a base, and return the last row of each key as a source. All ranks; each reads some of the files.

    Raises:
        ConfigError: pyarrow is not there.
        CheckpointError: a dump is not whole or is damaged, or ranks have different rows of one key.
        PlanError: its tables or keys are not those of the base, or its keys take more than ``max_memory``.
        ExportError: there is no room for its rows.
    """
    ranks.run("look for pyarrow", need_pyarrow)
    chosen = ranks.broadcast("look for dumps", lambda: _choose(directory, wanted))
    held = ranks.run("make room for the rows", _Held)
    mine = range(ranks.rank, len(chosen.files), ranks.world_size)

    def read() -> dict[int, _FileFacts]:
        facts = {}
        for number in mine:
            ranks.refuse_to_go_on()
            facts[number] = held.read(directory, chosen.files[number], number)
        return facts

    shares = ranks.all_gather("read the dumps", read)
    facts = [shares[number % ranks.world_size][number] for number in range(len(chosen.files))]
    matched = ranks.run("match the tables with the base's", lambda: _match(directory, facts, base, wanted))
    ranks.run("compare keys with row numbers", lambda: _refuse_far_keys(directory, chosen, held, matched, base))
    rows: dict[int, dict[int, np.ndarray]] = {}
    for tables in _group(facts, matched):
        keyed = ranks.all_gather("exchange the keys", lambda its=tables: _list_keys(held, matched, its))  # type: ignore[misc]
        of_all = {key: columns for share in keyed for key, columns in share.items()}
        rows |= ranks.run(
            "choose the last rows",
            lambda its=tables, keys=of_all: {  # type: ignore[misc]
                table: _choose_rows(directory, chosen, matched, table, keys) for table in its
            },
        )
    return ranks.run("put the tables together", lambda: _assemble(ranks, directory, chosen, facts, matched, rows, held))


def _choose(directory: Directory, wanted: DumpSettings) -> Chosen:
    try:
        listing = list_dumps(directory)
    except OSError as error:
        raise CheckpointError(f"{directory.url} cannot be read: {error.strerror or error}") from error
    return choose_files(
        listing, since=wanted.since, until=wanted.until, allow_ragged=wanted.allow_ragged, where=directory.url
    )


def _match(directory: Directory, facts: Sequence[_FileFacts], base: Manifest, wanted: DumpSettings) -> Matched:
    found: dict[str, FoundTable] = {}
    rows: dict[str, int] = {}
    for file, tables in facts:
        for table, (kind, number) in tables.items():
            known = found.setdefault(table, FoundTable(table, kind, directory.describe(file.path)))
            rows[table] = rows.get(table, 0) + number
            if known.kind != kind:
                raise CheckpointError(
                    f"{directory.describe(file.path)}: rows of {table!r} are {kind.row_bytes} bytes of {kind.kind}, and in "
                    f"{known.where} {known.kind.row_bytes} bytes of {known.kind.kind}. Take dumps of one kind (until_step)"
                )
    largest = max(rows.values(), default=0)
    needed = max(largest, min(sum(rows.values()), _GROUP_ROWS)) * _BYTES_OF_KEY + sum(rows.values()) * _BYTES_OF_ROW
    if needed > wanted.max_memory:
        raise PlanError(
            f"{directory.url}: the {sum(rows.values()):,} rows of these dumps need {needed:,} bytes to be compared, and "
            f"max_memory is {wanted.max_memory:,}. Raise max_memory, or set until_step to an earlier step"
        )
    return match_tables(found, base, directory.url)


def _refuse_far_keys(directory: Directory, chosen: Chosen, held: _Held, matched: Matched, base: Manifest) -> None:
    """Refuse keys that are no row numbers of a table whose rows go by number. PlanError."""
    by_name = {one.name: entry for one, entry in zip(matched.found, base.tables, strict=True) if one is not None}
    for (number, table), its in held.rows.items():
        entry: TableEntry | None = by_name.get(table)
        if entry is None or not entry.is_row_indexed or not len(its.keys):
            continue
        least, most = int(its.keys.min()), int(its.keys.max())
        if least < 0 or most >= entry.rows_out:
            raise PlanError(
                f"{directory.describe(chosen.files[number].path)}: key {least if least < 0 else most} of {table!r} is no row of "
                f"table {entry.name!r}, which has {entry.rows_out:,} rows by number in the base. Give the base that was exported "
                "from this training"
            )


def _group(facts: Sequence[_FileFacts], matched: Matched) -> Iterator[list[int]]:
    """Yield the numbers of the tables that the dump has, in groups of a bounded number of rows. The same on all ranks."""
    group: list[int] = []
    total = 0
    for table, found in enumerate(matched.found):
        if found is None:
            continue
        rows = sum(tables[found.name][1] for _, tables in facts if found.name in tables)
        if group and total + rows > _GROUP_ROWS:
            yield group
            group, total = [], 0
        group.append(table)
        total += rows
    if group:
        yield group


def _name_of(matched: Matched, table: int) -> str:
    found = matched.found[table]
    assert found is not None
    return found.name


def _list_keys(
    held: _Held, matched: Matched, tables: Sequence[int]
) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Return (file, table) -> keys and fingerprints of this rank's rows of some tables."""
    numbers = {_name_of(matched, table): table for table in tables}
    return {
        (file, numbers[name]): (its.keys, its.fingerprints)
        for (file, name), its in held.rows.items()
        if name in numbers
    }


def _choose_rows(
    directory: Directory,
    chosen: Chosen,
    matched: Matched,
    table: int,
    keys: Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]],
) -> dict[int, np.ndarray]:
    """Return the chosen rows of a table by file. CheckpointError where ranks have different rows of one key."""
    files = sorted(file for file, its in keys if its == table)
    try:
        rows = choose_rows([Keyed(chosen.files[file].step, *keys[file, table]) for file in files])
    except Conflict as conflict:
        one, other = (chosen.files[files[place]].path for place in conflict.files)
        raise CheckpointError(
            f"{directory.url}: {one} and {other} have different rows of key {conflict.key} of "
            f"{_name_of(matched, table)!r} at step {conflict.step}, so its ranks were not in step. Dump again, or set "
            "until_step to an earlier step"
        ) from None
    return {file: its for file, its in zip(files, rows, strict=True) if len(its)}


def _assemble(
    ranks: Ranks,
    directory: Directory,
    chosen: Chosen,
    facts: Sequence[_FileFacts],
    matched: Matched,
    rows: Mapping[int, Mapping[int, np.ndarray]],
    held: _Held,
) -> Checkpoint:
    """Return the metadata: a part of a table for each file that has chosen rows of it."""
    pieces = [
        (table, file, its)
        for table in range(len(matched.tables))
        for file, its in (rows.get(table) or {0: np.zeros(0, np.int64)}).items()
    ]
    owner = np.repeat([file % ranks.world_size for _, file, _ in pieces], 2)
    parts: dict[int, ChosenRows] = {}
    files = []
    for part, (table, file, its) in enumerate(pieces):
        name = matched.found[table] and _name_of(matched, table)
        if owner[2 * part] == ranks.rank:
            parts[part] = ChosenRows(held.spool, held.rows.get((file, str(name)), NO_ROWS), its)
        told = f"{chosen.files[file].path}, table {name or matched.tables[table].name}"
        sizes = bytes_of(len(its), matched.tables[table].slots[1].row_bytes)
        files += [SourceFile(name=told, size=size, version="") for size in sizes]
    zeros = np.zeros(len(pieces), np.int64)
    numbers = np.arange(len(pieces), dtype=np.int32)
    key = [f"{files[2 * part].name}" for part in range(len(pieces))]
    described = [[its.file, *chosen.files[number][2:]] for number, its in enumerate(facts)]
    return Checkpoint(
        format=TZREC_DELTA,
        directory=directory,
        files=tuple(files),
        tables=matched.tables,
        parts=Parts(
            table=np.array([table for table, _, _ in pieces], np.int64),
            begin=zeros,
            end=zeros + HASH_SIZE,
            size=zeros + HASH_SIZE,
            rows=np.array([len(its) for _, _, its in pieces], np.int64),
        ),
        blocks=Blocks(
            file=np.stack([2 * numbers, 2 * numbers + 1], axis=1),
            offset=np.stack([zeros, zeros], axis=1),
            key=np.array([[name, name] for name in key], object).reshape(-1, 2),
        ),
        dense=(),
        fingerprint=f"xxh3:{xxhash.xxh3_128_hexdigest(msgspec.json.encode(described))}",
        copy_hindrances=("it is a dump of changed rows",),
        verbatim={},
        warnings=(*chosen.notes, *_tell(chosen, facts, matched)),
        strips=no_strips(),
        memory=DumpMemory(ranks.rank, ranks.world_size, owner, [file.name for file in files], parts),
        dump=TrainerDump(steps=chosen.steps, files=tuple(its.file for its in facts), dtypes=matched.dtypes),
    )


def _tell(chosen: Chosen, facts: Sequence[_FileFacts], matched: Matched) -> list[str]:
    rows = sum(number for its in facts for _, number in its.tables.values())
    steps = chosen.steps
    span = f"step {steps[0]}" if len(steps) == 1 else f"{count(len(steps), 'step')} from {steps[0]} to {steps[-1]}"
    told = [f"the dumps of {span} hold {count(rows, 'row')} that were looked up; of each key the last one counts"]
    by_last = [
        f"{found.name} is {table.name}"
        for found, table in zip(matched.found, matched.tables, strict=True)
        if found is not None and not is_exact(found.name, table)
    ]
    if by_last:
        told.append(f"tables of the dumps were matched with the base's by the last part of their names: {few(by_last)}")
    if matched.left_out:
        told.append(
            f"the dumps have tables that the export of the base has left out, and so does this one: {few(matched.left_out)}"
        )
    return told
