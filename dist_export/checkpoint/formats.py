"""Which format a checkpoint is of, by the files that only this format has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dist_export.checkpoint.dcp import find_metadata, read_dcp
from dist_export.checkpoint.dcp_dense import DcpDense
from dist_export.checkpoint.dcp_metadata import METADATA
from dist_export.checkpoint.dcp_reader import DcpReader
from dist_export.checkpoint.dense_parameters import DenseParameters, RecisDense
from dist_export.checkpoint.reader import CheckpointReader
from dist_export.checkpoint.recis import RecisReader
from dist_export.errors import CheckpointError, ConfigError
from dist_export.layout.recis import INDEX, TENSORKEY
from dist_export.storage import Directory

RECIS = "recis"
DCP = "dcp"
AUTO = "auto"

LOOKED_FOR = f"{INDEX} and {TENSORKEY} (RecIS), .metadata or model/.metadata (DCP)"
"""For messages."""


def detect_format(directory: Directory, *, asked: str = AUTO) -> str | None:
    """Return ``asked``, or with ``auto`` what the directory looks like: ``recis``, ``dcp``, None where it is neither.

    Raises:
        CheckpointError: it looks like both, or cannot be looked at.
    """
    if asked != AUTO:
        return asked
    try:
        names = set(directory.names())
        is_recis = not names.isdisjoint((INDEX, TENSORKEY))
        is_dcp = METADATA in names or (not is_recis and bool(find_metadata(directory)))
    except OSError as error:
        raise CheckpointError(f"{directory.url} cannot be read: {error.strerror or error}") from error
    if is_recis and is_dcp:
        raise CheckpointError(
            f"{directory.url} holds a RecIS checkpoint and a DCP checkpoint; say which one with format: recis or format: dcp"
        )
    return RECIS if is_recis else DCP if is_dcp else None


def open_reader(
    directory: Directory, *, asked: str = AUTO, tables: Sequence[str] = (), optimizer_slots: Sequence[str] = ()
) -> CheckpointReader[Any]:
    """Open the checkpoint for an export.

    Args:
        asked: the format; with ``auto`` the files tell.
        tables: patterns of tensors that are tables, for formats that do not say which are.
        optimizer_slots: patterns of tensors that are optimizer state, which is sought among the tensors of such formats.

    Raises:
        CheckpointError: no format is recognised, or the checkpoint is not complete.
        ConfigError: ``tables`` for a format that says which tensors are tables.
    """
    found = detect_format(directory, asked=asked)
    if found is None and (names := directory.names()):
        raise CheckpointError(
            f"{directory.url}: no {INDEX} and no {TENSORKEY} among its {len(names)} files; looked for {LOOKED_FOR}. Both "
            "are written last, so this is no checkpoint of these formats or its save did not finish"
        )
    return FORMATS[found or RECIS].open(directory, tables, optimizer_slots)


def open_dense(
    directory: Directory, found: str | None, *, tables: Sequence[str] = (), optimizer_slots: Sequence[str] = ()
) -> DenseParameters:
    """Return the dense parameters of a checkpoint of the format ``found``; nothing is read yet.

    Settings as those of :func:`open_reader`.
    """
    return FORMATS[found or RECIS].dense(directory, tables, optimizer_slots)


def holds_tables(
    directory: Directory, found: str | None, *, tables: Sequence[str] = (), optimizer_slots: Sequence[str] = ()
) -> bool:
    """Whether a checkpoint of the format ``found`` has any table, for an export that can do without.

    Raises:
        CheckpointError: it cannot be looked at, or a pattern matches nothing.
    """
    if found == DCP:
        return bool(read_dcp(directory, tables=tables, optimizer_slots=optimizer_slots).tables)
    try:
        return not set(directory.names()).isdisjoint((INDEX, TENSORKEY))
    except OSError as error:
        raise CheckpointError(f"{directory.url} cannot be read: {error.strerror or error}") from error


def describe_format(name: str) -> str:
    """Return what a format is recognised by, for people, to be put behind its name."""
    return f" (recognised by {FORMATS[name].told_by})" if name in FORMATS else ""


class Format(NamedTuple):
    """What is to be known of a format. The functions take the directory, ``tables`` and ``optimizer_slots``."""

    told_by: str
    """The files that it is recognised by, for people."""
    open: Callable[[Directory, Sequence[str], Sequence[str]], CheckpointReader[Any]]
    dense: Callable[[Directory, Sequence[str], Sequence[str]], DenseParameters]


def _open_recis(directory: Directory, tables: Sequence[str], _: Sequence[str]) -> CheckpointReader[Any]:
    if tables:
        raise ConfigError(
            f"tables names tensors that are tables, but {directory.url} is a RecIS checkpoint, which says so itself; "
            "take tables out"
        )
    return RecisReader(directory)


FORMATS: dict[str, Format] = {
    RECIS: Format(f"{INDEX} and {TENSORKEY}", _open_recis, lambda directory, *_: RecisDense(directory)),
    DCP: Format(
        f"{METADATA}, or model/{METADATA}",
        lambda directory, tables, slots: DcpReader(directory, tables=tables, optimizer_slots=slots),
        lambda directory, tables, slots: DcpDense(directory, tables=tables, optimizer_slots=slots),
    ),
}
