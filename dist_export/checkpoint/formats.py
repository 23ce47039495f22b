"""Which format a checkpoint is of, by the files that only this format has; its reader, and its dense parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dist_export.checkpoint import safetensors, torch_save
from dist_export.checkpoint.dcp import find_metadata, read_dcp
from dist_export.checkpoint.dcp_dense import DcpDense
from dist_export.checkpoint.dcp_metadata import METADATA
from dist_export.checkpoint.dcp_reader import DcpReader
from dist_export.checkpoint.dense_parameters import DenseParameters, NoDense, RecisDense
from dist_export.checkpoint.dynamicemb import DynamicEmbReader, find_dumps
from dist_export.checkpoint.plain import Patterns, PlainDense, PlainReader, read_all, sort_facts
from dist_export.checkpoint.reader import CheckpointReader
from dist_export.checkpoint.recis import RecisReader
from dist_export.checkpoint.safetensors import SafetensorsReader, find_safetensors_files
from dist_export.checkpoint.torch_save import TorchReader, find_torch_files
from dist_export.errors import CheckpointError
from dist_export.layout.recis import INDEX, TENSORKEY
from dist_export.storage import Directory

RECIS = "recis"
DCP = "dcp"
SAFETENSORS = "safetensors"
TORCH = "torch"
DYNAMICEMB = "dynamicemb"
AUTO = "auto"

NAMES = {
    RECIS: "a RecIS checkpoint",
    DCP: "a DCP checkpoint",
    SAFETENSORS: "a safetensors checkpoint",
    TORCH: "a checkpoint of torch.save",
    DYNAMICEMB: "a DynamicEmb dump",
}
"""Of each format, for messages."""

LOOKED_FOR = (
    f"{INDEX} and {TENSORKEY} (RecIS), .metadata or model/.metadata (DCP), *_emb_keys.rank_* (DynamicEmb), "
    "*.safetensors (safetensors), *.pt, *.pth, *.ckpt or *.bin of torch.save (torch)"
)
"""For messages."""

INDEX_FILES = (safetensors.INDEX_JSON, torch_save.INDEX_JSON)
"""Small files of plain checkpoints, beside those that hold tensors."""


def detect_format(directory: Directory, *, asked: str = AUTO) -> str | None:
    """Return ``asked``, or with ``auto`` what the directory looks like; None where it is nothing that is known.

    Files of ``torch.save`` and safetensors files stand beside ``index`` in RecIS's checkpoints, and the former beside DCP's
    ``.metadata``: there they do not count.

    Raises:
        CheckpointError: it looks like several formats, or cannot be looked at.
    """
    if asked != AUTO:
        return asked
    try:
        found = _list_candidates(directory)
    except OSError as error:
        raise CheckpointError(f"{directory.url} cannot be read: {error.strerror or error}") from error
    if len(found) > 1:
        what, which = (" and ".join(texts) for texts in ([NAMES[f] for f in found], [f"format: {f}" for f in found]))
        raise CheckpointError(f"{directory.url} holds {what}; say which one with {which.replace(' and ', ' or ')}")
    return found[0] if found else None


def _list_candidates(directory: Directory) -> list[str]:
    names = set(directory.names())
    is_recis = not names.isdisjoint((INDEX, TENSORKEY))
    found = [RECIS] if is_recis else []
    if METADATA in names or (not is_recis and find_metadata(directory)):
        found.append(DCP)
    if is_recis:
        return found
    if find_dumps(directory):
        found.append(DYNAMICEMB)
    is_recis_cut = any(name.endswith(safetensors.SUFFIX) for name in names) and not find_safetensors_files(directory)
    if find_safetensors_files(directory):
        found.append(SAFETENSORS)
    if DCP not in found and not is_recis_cut and (torch_save.INDEX_JSON in names or find_torch_files(directory)):
        found.append(TORCH)
    return found


def open_reader(
    directory: Directory, *, asked: str = AUTO, tables: Sequence[str] = (), optimizer_slots: Sequence[str] = ()
) -> CheckpointReader[Any]:
    """Open the checkpoint for an export.

    Args:
        directory: where it is.
        asked: the format; with ``auto`` the files tell.
        tables: patterns of tensors that are tables, for formats that do not say which are.
        optimizer_slots: patterns of tensors that are optimizer state, which is sought among the tensors of such formats.

    Raises:
        CheckpointError: no format is recognised, the checkpoint is not complete, or ``tables`` is given for a format that
            says itself which its tables are.
    """
    found = detect_format(directory, asked=asked)
    if found is not None and tables and not FORMATS[found].takes_tables:
        raise CheckpointError(
            f"{directory.url} is {NAMES[found]}, which says itself what its tables are; leave out tables"
        )
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
    if found in (SAFETENSORS, TORCH):
        patterns = Patterns(tuple(tables), tuple(optimizer_slots))
        return bool(
            sort_facts(directory, read_all(_open_plain(found, directory, tables, optimizer_slots)), patterns).tables
        )
    if found == DYNAMICEMB:
        return True
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
    takes_tables: bool
    """Whether it holds tensors alone, so that ``tables`` may say which of them are tables."""
    open: Callable[[Directory, Sequence[str], Sequence[str]], CheckpointReader[Any]]
    dense: Callable[[Directory, Sequence[str], Sequence[str]], DenseParameters]


FORMATS: dict[str, Format] = {
    RECIS: Format(
        told_by=f"{INDEX} and {TENSORKEY}",
        takes_tables=False,
        open=lambda directory, *_: RecisReader(directory),
        dense=lambda directory, *_: RecisDense(directory),
    ),
    DCP: Format(
        told_by=f"{METADATA}, or model/{METADATA}",
        takes_tables=True,
        open=lambda directory, tables, slots: DcpReader(directory, tables=tables, optimizer_slots=slots),
        dense=lambda directory, tables, slots: DcpDense(directory, tables=tables, optimizer_slots=slots),
    ),
    SAFETENSORS: Format(
        told_by="*.safetensors",
        takes_tables=True,
        open=lambda directory, tables, slots: SafetensorsReader(directory, Patterns(tuple(tables), tuple(slots))),
        dense=lambda directory, tables, slots: _plain_dense(SAFETENSORS, directory, tables, slots),
    ),
    TORCH: Format(
        told_by="*.pt, *.pth, *.ckpt or *.bin",
        takes_tables=True,
        open=lambda directory, tables, slots: TorchReader(directory, Patterns(tuple(tables), tuple(slots))),
        dense=lambda directory, tables, slots: _plain_dense(TORCH, directory, tables, slots),
    ),
    DYNAMICEMB: Format(
        told_by="*_emb_keys.rank_*",
        takes_tables=False,
        open=lambda directory, *_: DynamicEmbReader(directory),
        dense=lambda directory, *_: NoDense(directory.url, NAMES[DYNAMICEMB]),
    ),
}


def _plain_dense(found: str, directory: Directory, tables: Sequence[str], slots: Sequence[str]) -> PlainDense:
    return PlainDense(
        directory, Patterns(tuple(tables), tuple(slots)), lambda: _open_plain(found, directory, tables, slots)
    )


def _open_plain(found: str, directory: Directory, tables: Sequence[str], slots: Sequence[str]) -> PlainReader:
    kind = SafetensorsReader if found == SAFETENSORS else TorchReader
    return kind(directory, Patterns(tuple(tables), tuple(slots)))
