"""Which format a checkpoint is of, by the files that only this format has; its reader, and its dense parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dist_export.checkpoint import safetensors, torch_save
from dist_export.checkpoint.dcp import find_metadata
from dist_export.checkpoint.dcp_metadata import METADATA
from dist_export.checkpoint.dense_state import describe_dense_state, load_dense_state
from dist_export.checkpoint.dynamicemb import DynamicEmbReader, find_dumps
from dist_export.checkpoint.plain import DenseParameters, Patterns, read_all, sort_facts
from dist_export.checkpoint.reader import CheckpointReader
from dist_export.checkpoint.recis import RecisReader
from dist_export.checkpoint.safetensors import SafetensorsReader, find_safetensors_files
from dist_export.checkpoint.tensors import StoredTensor
from dist_export.checkpoint.torch_save import TorchReader, find_torch_files
from dist_export.errors import CheckpointError
from dist_export.layout.recis import DENSE_STATE, INDEX, TENSORKEY
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


class DenseSource(NamedTuple):
    """The dense parameters of a checkpoint."""

    described: list[tuple[str, str, tuple[int, ...]]]
    """(name, torch dtype name, shape) of each, in the order of the checkpoint."""
    where: str
    """The file or directory that holds them, for messages."""


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
        asked: the format, or ``auto``.
        tables: of formats that do not say what a table is: patterns of further tensors that are.
        optimizer_slots: of these formats: patterns of further tensors that are optimizer state.

    Raises:
        CheckpointError: no format is recognised, the checkpoint is not complete, or its format cannot be exported.
    """
    found = detect_format(directory, asked=asked)
    if found == DCP:
        raise CheckpointError(
            f"{directory.url} is a DCP checkpoint (torch.distributed.checkpoint). `dist_export inspect` shows what it "
            "holds; the export reads RecIS checkpoints alone. Nothing was written"
        )
    if found is not None and tables and found not in (SAFETENSORS, TORCH):
        raise CheckpointError(
            f"{directory.url} is {NAMES[found]}, which says itself what its tables are; leave out tables"
        )
    patterns = Patterns(tuple(tables), tuple(optimizer_slots))
    if found == SAFETENSORS:
        return SafetensorsReader(directory, patterns)
    if found == TORCH:
        return TorchReader(directory, patterns)
    if found == DYNAMICEMB:
        return DynamicEmbReader(directory)
    if found is None and (names := directory.names()):
        raise CheckpointError(
            f"{directory.url}: no {INDEX} and no {TENSORKEY} among its {len(names)} files; looked for {LOOKED_FOR}. Both "
            "are written last, so this is no checkpoint of these formats or its save did not finish"
        )
    return RecisReader(directory)


def describe_dense(
    directory: Directory, *, asked: str = AUTO, tables: Sequence[str] = (), optimizer_slots: Sequence[str] = ()
) -> DenseSource:
    """Return what the checkpoint holds besides tables and optimizer state, without reading payload. Rank 0.

    CheckpointError as :func:`open_reader`; none for a checkpoint that has no dense parameters.
    """
    plain = _read_plain(directory, asked, tables, optimizer_slots)
    if plain is None:
        is_raw = detect_format(directory, asked=asked) == DYNAMICEMB
        described = None if is_raw else describe_dense_state(directory)
        return DenseSource(described or [], directory.describe(DENSE_STATE))
    reader, dense = plain
    where = directory.describe(reader.files[0].name) if len(reader.files) == 1 else directory.url
    return DenseSource([(tensor.name, tensor.dtype, tensor.shape) for tensor in dense], where)


def load_dense(
    directory: Directory, *, asked: str = AUTO, tables: Sequence[str] = (), optimizer_slots: Sequence[str] = ()
) -> Mapping[str, Any]:
    """Return what :func:`describe_dense` tells of, name -> CPU tensor, memory-mapped where the directory is local. Rank 0."""
    plain = _read_plain(directory, asked, tables, optimizer_slots)
    if plain is not None:
        return DenseParameters(directory, plain[0].files, plain[1])
    if detect_format(directory, asked=asked) == DYNAMICEMB:
        raise CheckpointError(
            f"{directory.url} is a DynamicEmb dump, which has tables alone, and the dense arch needs its parameters. Leave "
            "`model` out of the config for an export of the tables"
        )
    return load_dense_state(directory)


def _read_plain(
    directory: Directory, asked: str, tables: Sequence[str], optimizer_slots: Sequence[str]
) -> tuple[SafetensorsReader | TorchReader, tuple[StoredTensor, ...]] | None:
    """Return reader and dense parameters of a plain checkpoint; None for anything else."""
    found = detect_format(directory, asked=asked)
    if found not in (SAFETENSORS, TORCH):
        return None
    patterns = Patterns(tuple(tables), tuple(optimizer_slots))
    reader = SafetensorsReader(directory, patterns) if found == SAFETENSORS else TorchReader(directory, patterns)
    return reader, sort_facts(directory, read_all(reader), patterns).dense
