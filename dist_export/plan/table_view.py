"""Select and rename the tables to export, and set how their rows are found. Pure.

The result is a view of the checkpoint, which all later stages use. Settings use the table names of the checkpoint.
Patterns are shell-style.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TypeVar

import numpy as np

from dist_export.checkpoint.metadata import Blocks, Checkpoint, LeftOutTable, Parts, Strips, TableMeta
from dist_export.config.mistakes import Mistakes
from dist_export.errors import PlanError, printable
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.recis import EMBEDDING_SLOT, HASH_SIZE
from dist_export.formats.row_encodings import F32
from dist_export.humanize import few

ZEROS = "zeros"

BY_SELECTION = "select_tables"
BY_PATTERN = "drop_tables"

DefaultRow = Sequence[float] | str

_MAX_NAME_BYTES = 400
_TOLD_TABLES = 12
_WILDCARD = re.compile(r"\*|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)
_PIECE = re.compile(r"\{(\d{1,9})\}")

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSettings:
    """The settings about tables."""

    select: Sequence[str] = ()
    drop: Sequence[str] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    to_hash_tables: Sequence[str] = ()
    default_row: Mapping[str, DefaultRow] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether any of them is set."""
        return bool(self.select or self.drop or self.rename or self.to_hash_tables or self.default_row)


def view_tables(checkpoint: Checkpoint, asked: TableSettings) -> Checkpoint:
    """Return the checkpoint with only the exported tables, under their new names. Files and dense tensors stay.

    Raises:
        PlanError: a pattern matches no table, two tables get one name, a package cannot hold a name, a default row does not
            fit its table, ``to_hash_tables`` names a table that is already a hash table, or no table remains.
    """
    if not asked:
        return checkpoint
    names = [table.name for table in checkpoint.tables]
    mistakes = Mistakes()
    everything: list[str | None] = [None] * len(names)
    reasons = mistakes.collect(lambda: _reasons_to_leave(names, asked), everything)
    kept = [number for number, reason in enumerate(reasons) if reason is None]
    if names and not kept:
        raise PlanError("select_tables and drop_tables leave no table; set need_export_sparse: false to export none")
    kept_names = [names[number] for number in kept]
    renamed = mistakes.collect(lambda: _rename(kept_names, asked.rename), kept_names)
    is_hash = mistakes.collect(
        lambda: _matching("to_hash_tables", asked.to_hash_tables, kept_names), [False] * len(kept)
    )
    no_defaults: list[DefaultRow | None] = [None] * len(kept)
    defaults = mistakes.collect(lambda: first_match("default_row", asked.default_row, kept_names), no_defaults)
    mistakes.refuse()
    tables = []
    for number, new_name, becomes_hash, default in zip(kept, renamed, is_hash, defaults, strict=True):
        table = checkpoint.tables[number]
        if becomes_hash and table.is_hashed:
            raise PlanError(
                f"to_hash_tables: {table.name!r} is a hash table already; name only tables whose rows go by number"
            )
        if default is not None:
            _check_default(table, default)
        tables.append(
            replace(
                table,
                name=new_name,
                source_name=None if new_name == table.name else table.name,
                is_hashed=table.is_hashed or becomes_hash,
                default_row=_as_default(default, table.default_row),
            )
        )
    return _take_tables(checkpoint, kept, tuple(tables), becomes_hash=is_hash, reasons=reasons)


def _as_default(asked: DefaultRow | None, own: tuple[float, ...] | str | None) -> tuple[float, ...] | str | None:
    """Return the default row of the settings, else that of the source. Only packages have one."""
    if asked is None:
        return own
    return asked if isinstance(asked, str) else tuple(map(float, asked))


def first_match(setting: str, values: Mapping[str, Value], names: Sequence[str]) -> list[Value | None]:
    """Return for each table name the value of the first pattern that matches it; None if there is none.

    Raises:
        PlanError: a pattern matches no table, or only tables that an earlier pattern takes.
    """
    _matching(setting, list(values), names)
    refuse_shadowed(setting, list(values.items()), names)
    return [next((value for pattern, value in values.items() if fnmatchcase(name, pattern)), None) for name in names]


def refuse_shadowed(setting: str, values: Sequence[tuple[str, object]], names: Sequence[str]) -> None:
    """Refuse a pattern without effect: earlier patterns, with other values, match all of its tables. PlanError."""
    decided: dict[str, int] = {}
    for place, (pattern, value) in enumerate(values):
        mine = [name for name in names if fnmatchcase(name, pattern)]
        earlier = [values[decided[name]] for name in mine if name in decided]
        if mine and len(earlier) == len(mine) and all(its != value for _, its in earlier):
            raise PlanError(
                f"{setting}: the pattern {pattern!r} has no effect, because {earlier[0][0]!r} comes before it and matches "
                f"{mine[0]!r}; the first pattern that matches a table counts. Put {pattern!r} first"
            )
        for name in mine:
            decided.setdefault(name, place)


def no_match(setting: str, pattern: str, names: Sequence[str]) -> PlanError:
    """Return the error for a pattern that matches no table."""
    more = f" and {len(names) - _TOLD_TABLES:,} more" if len(names) > _TOLD_TABLES else ""
    told = (", ".join(map(printable, names[:_TOLD_TABLES])) or "none") + more
    return PlanError(f"{setting}: the pattern {pattern!r} matches no table; there are {told}")


def find_mistake(setting: str, pattern: str, names: Sequence[str]) -> PlanError | None:
    """Return what is wrong with a pattern of tables: it matches none, or it is the name of one and matches others instead."""
    if pattern in names and not fnmatchcase(pattern, pattern):
        return refuse_brackets(setting, pattern, names, what="a table", escaped=glob.escape(pattern))
    if not any(fnmatchcase(name, pattern) for name in names):
        return no_match(setting, pattern, names)
    return None


def refuse_brackets(setting: str, pattern: str, names: Sequence[str], *, what: str, escaped: str) -> PlanError:
    """Return the error for a pattern that is a name, and as a pattern means others of ``names``."""
    matched = few([name for name in names if fnmatchcase(name, pattern)]) or "nothing"
    return PlanError(
        f"{setting}: {pattern!r} is the name of {what}, but as a pattern it matches {matched}, because brackets are a choice of "
        f"characters. Write {escaped!r} for that of this name"
    )


def _matching(setting: str, patterns: Sequence[str], names: Sequence[str]) -> list[bool]:
    """Return which names match at least one pattern. Raises PlanError if a pattern matches no name."""
    mistakes = Mistakes()
    for pattern in patterns:
        if mistake := find_mistake(setting, pattern, names):
            mistakes.add(mistake)
    mistakes.refuse()
    return [any(fnmatchcase(name, pattern) for pattern in patterns) for name in names]


def _reasons_to_leave(names: Sequence[str], asked: TableSettings) -> list[str | None]:
    """Return for each table the setting that leaves it out; None for a table that is kept."""
    mistakes = Mistakes()
    everything = [True] * len(names)
    is_selected = (
        mistakes.collect(lambda: _matching(BY_SELECTION, asked.select, names), everything)
        if asked.select
        else everything
    )
    is_dropped = mistakes.collect(lambda: _matching(BY_PATTERN, asked.drop, names), [False] * len(names))
    mistakes.refuse()
    return [
        BY_PATTERN if dropped else None if selected else BY_SELECTION
        for selected, dropped in zip(is_selected, is_dropped, strict=True)
    ]


def _rename(names: Sequence[str], rename: Mapping[str, str]) -> list[str]:
    """Return the new name of each table. The first pattern that matches decides."""
    rules = [(pattern, _compile(pattern), template) for pattern, template in rename.items()]
    for pattern in rename:
        if mistake := find_mistake("rename_tables", pattern, names):
            raise mistake
    refuse_shadowed("rename_tables", list(rename.items()), names)
    renamed = []
    taken: dict[str, str] = {}
    for name in names:
        found = next(((p, hit, new) for p, matcher, new in rules if (hit := matcher(name)) is not None), None)
        new_name = name if found is None else _fill(*found)
        if found is not None and (reason := _why_no_name(new_name)) is not None:
            raise PlanError(f"rename_tables: {name!r} would become {new_name!r}, which {reason}; give another name")
        other = taken.setdefault(new_name, name)
        if other != name:
            raise PlanError(f"rename_tables: the tables {other!r} and {name!r} would both be called {new_name!r}")
        renamed.append(new_name)
    return renamed


def _compile(pattern: str) -> Callable[[str], re.Match[str] | None]:
    """Return a matcher of a shell-style pattern that matches as fnmatch does, with a group for each ``*`` and ``?``."""
    pieces = []
    for part in _WILDCARD.findall(pattern):
        if part == "*":
            pieces.append("(.*)")
        elif part == "?":
            pieces.append("(.)")
        elif len(part) > 1:
            is_negated = part[1] == "!"
            body = re.sub(r"([\\\[\]^&~|])", r"\\\1", part[1 + is_negated : -1])
            pieces.append(f"[{'^' * is_negated}{body}]")
        else:
            pieces.append(re.escape(part))
    try:
        return re.compile("".join(pieces), re.DOTALL).fullmatch
    except re.error as error:
        raise PlanError(f"rename_tables: {pattern!r} is no pattern: {error}") from None


def _fill(pattern: str, hit: re.Match[str], template: str) -> str:
    def piece(found: re.Match[str]) -> str:
        number = int(found[1])
        if number >= len(hit.groups()):
            raise PlanError(
                f"rename_tables: {template!r} asks for piece {{{number}}}, but {pattern!r} has {len(hit.groups())} wildcards, "
                "counted from 0"
            )
        return hit[number + 1]

    return _PIECE.sub(piece, template)


def _why_no_name(name: str) -> str | None:
    """Return why a package cannot hold a table of this name; None if it can."""
    if not name or name != name.strip():
        return "is empty, or begins or ends with a space"
    if not name.isprintable():
        return "has a character that cannot be printed"
    if len(name.encode()) > _MAX_NAME_BYTES:
        return f"is longer than {_MAX_NAME_BYTES} bytes"
    taken = next((text for text in ("@", "^", "/part_") if text in name), None)
    return None if taken is None else f"has {taken!r} in it, which separates names and slices in RecIS's files"


def _check_default(table: TableMeta, default: DefaultRow) -> None:
    slot = next(slot for slot in table.slots if slot.name == EMBEDDING_SLOT)
    width = int(np.prod(slot.values_shape, dtype=np.int64))
    if isinstance(default, str):
        if default != ZEROS:
            raise PlanError(f"default_row: {default!r} for table {table.name!r}; give zeros, or the values of a row")
        return
    if len(default) != width:
        raise PlanError(
            f"default_row: {len(default):,} values for table {table.name!r}, whose rows have {width:,}; give as many, or zeros"
        )
    dtype = DTYPES[F32 if slot.encoding else slot.dtype]
    values = np.array(default, np.float64)
    if dtype.torch.startswith("bfloat") or dtype.numpy.startswith("<f"):
        most = np.finfo(np.float32 if dtype.torch == "bfloat16" else dtype.numpy).max
        fits = np.abs(values) <= most
    else:
        info = np.iinfo(np.uint8 if dtype.torch == "bool" else dtype.numpy)
        fits = (values == np.floor(values)) & (values >= info.min) & (values <= info.max)
    if not fits.all():
        place = int(np.flatnonzero(~fits)[0])
        raise PlanError(
            f"default_row: value {place} for table {table.name!r} is {values[place]:g}, which {dtype.torch} cannot hold"
        )


def _take_tables(
    checkpoint: Checkpoint,
    kept: Sequence[int],
    tables: tuple[TableMeta, ...],
    *,
    becomes_hash: Sequence[bool],
    reasons: Sequence[str | None],
) -> Checkpoint:
    """Return the checkpoint with only these tables. Parts, blocks and strips are renumbered."""
    parts, blocks, strips = checkpoint.parts, checkpoint.blocks, checkpoint.strips
    number_of = np.full(len(checkpoint.tables), -1, np.int64)
    number_of[list(kept)] = np.arange(len(kept))
    table = number_of[parts.table]
    mine = np.flatnonzero(table >= 0)  # tables and parts keep their order
    place_of = np.full(len(parts), -1, np.int64)
    place_of[mine] = np.arange(len(mine))
    to_hash_tables = np.array(becomes_hash, bool)[table[mine]] if len(mine) else np.zeros(0, bool)
    its_strips = np.flatnonzero(place_of[strips.part] >= 0)
    columns = {
        name: getattr(strips, name)[its_strips]
        for name in ("column", "first_byte", "width", "row_stride", "file", "offset")
    }
    return replace(
        checkpoint,
        tables=tables,
        parts=Parts(
            table=table[mine],
            begin=np.where(to_hash_tables, 0, parts.begin[mine]),
            end=np.where(to_hash_tables, HASH_SIZE, parts.end[mine]),
            size=np.where(to_hash_tables, HASH_SIZE, parts.size[mine]),
            rows=parts.rows[mine],
            first_row=None if parts.first_row is None else parts.first_row[mine],
        ),
        blocks=Blocks(file=blocks.file[mine], offset=blocks.offset[mine], key=blocks.key[mine]),
        strips=Strips(part=place_of[strips.part[its_strips]], **columns),
        left_out=tuple(
            LeftOutTable(
                name=checkpoint.tables[number].name,
                rows=int(parts.rows[parts.of_table(number)].sum()),
                reason=reason,
                **_count_stored(checkpoint, number),
            )
            for number, reason in enumerate(reasons)
            if reason is not None
        ),
    )


def _count_stored(checkpoint: Checkpoint, number: int) -> dict[str, int]:
    rows = int(checkpoint.parts.rows[checkpoint.parts.of_table(number)].sum())
    stored = checkpoint.tables[number].stored_slots()
    return {"tensors": len(stored), "num_bytes": sum(slot.num_bytes(rows) for slot in stored)}
