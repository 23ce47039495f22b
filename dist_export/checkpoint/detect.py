"""Which format a checkpoint is of, by the files that only this format has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from dist_export.checkpoint.combined import JoinedReader
from dist_export.checkpoint.dcp.dense import DcpDense
from dist_export.checkpoint.dcp.placeholders import read_beside
from dist_export.checkpoint.dcp.reader import DcpReader
from dist_export.checkpoint.dcp_files import METADATA, find_metadata
from dist_export.checkpoint.dense import DenseParameters, NoDense, RecisDense
from dist_export.checkpoint.dynamicemb import DynamicEmbReader, find_dumps
from dist_export.checkpoint.metadata import CheckpointReader
from dist_export.checkpoint.package_source import (
    PackageSource,
    find_manifest,
    find_package,
    has_row_indexed,
    note_lost_manifest,
)
from dist_export.checkpoint.recis.reader import RecisReader
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.checkpoint.tensors import safetensors, torch_save
from dist_export.checkpoint.tensors.common import PlainDense, read_all, sort_facts
from dist_export.checkpoint.tensors.safetensors import SafetensorsReader, find_safetensors_files
from dist_export.checkpoint.tensors.torch_save import TorchReader, find_torch_files
from dist_export.checkpoint.tzrec.files import TOLD_BY, TZREC_DELTA
from dist_export.errors import CheckpointError, ConfigError, UnaskedError
from dist_export.formats.recis import INDEX, TENSORKEY
from dist_export.manifest import MANIFEST
from dist_export.storage.directory import Directory

RECIS = "recis"
DCP = "dcp"
SAFETENSORS = "safetensors"
TORCH = "torch"
DYNAMICEMB = "dynamicemb"
PACKAGE = "package"
DCP_AND_DUMP = "dcp+dynamicemb"
"""What TorchEasyRec saves of a model that has tables of both kinds."""
AUTO = "auto"

LOOKED_FOR = (
    f"{MANIFEST} (package), {INDEX} and {TENSORKEY} (RecIS), .metadata or model/.metadata (DCP), *_emb_keys.rank_* (DynamicEmb), "
    "*.safetensors (safetensors), *.pt, *.pth, *.ckpt or *.bin of torch.save (torch)"
)
"""For messages."""

INDEX_FILES = (safetensors.INDEX_JSON, torch_save.INDEX_JSON)
"""Small files of plain checkpoints, beside those that hold tensors."""


_DUMP_ALONE = (
    "is a DynamicEmb dump, which holds only tables, and the dense arch needs parameters. Leave `model` out of the config for an "
    "export of the tables"
)
_DELTA_ALONE = (
    "is a dump of TorchEasyRec, which holds only rows of tables. The dense arch is that of the base; leave `model` out"
)
_PACKAGE_ALONE = (
    "is a package, which has a program and no dense parameters. Leave `model` out of the config for an export of the tables, or "
    "export from the checkpoint"
)


def detect_format(directory: Directory, *, asked: str = AUTO) -> str | None:
    """Return ``asked``, or with ``auto`` what the directory looks like; None where it is nothing that is known.

    Files of ``torch.save`` and safetensors files stand beside ``index`` in RecIS's checkpoints: there they do not count. Beside
    other formats the former count where they hold a model. A DCP checkpoint and a DynamicEmb dump in one directory are of one
    save, and a format together; asked for by name, each is exported alone.

    Raises:
        CheckpointError: it looks like several formats, cannot be looked at, or is not there although ``asked`` for.
    """
    try:
        if asked != AUTO:
            if not directory.exists():
                raise find_nothing(directory, asked=asked)
            return asked
        found = list_candidates(directory)
    except OSError as error:
        raise CheckpointError(f"{directory.url} cannot be read: {error.strerror or error}") from error
    if set(found) == {DCP, DYNAMICEMB}:
        return DCP_AND_DUMP
    if len(found) > 1:
        what = " and ".join(FORMATS[name].kind for name in found)
        together = [DCP_AND_DUMP] if {DCP, DYNAMICEMB} <= set(found) else []
        which = " or ".join(f"format: {name}" for name in [*found, *together])
        raise UnaskedError(f"{directory.url} holds {what}; say which one with {which}")
    return found[0] if found else None


def list_candidates(directory: Directory) -> list[str]:
    """Return the formats that a directory looks like. OSError where it cannot be looked at."""
    names = set(directory.names())
    is_recis = not names.isdisjoint((INDEX, TENSORKEY))
    package = find_package(directory) if MANIFEST in names else None
    if package is not None and (has_row_indexed(package) or is_recis):
        return [PACKAGE if has_row_indexed(package) else RECIS]  # what else lies there is no part of it
    found = [RECIS] if is_recis else []
    if METADATA in names or (not is_recis and find_metadata(directory)):
        found.append(DCP)
    if is_recis:
        return found
    if find_dumps(directory):
        found.append(DYNAMICEMB)
    plain = find_safetensors_files(directory)
    is_recis_cut = not plain and any(name.endswith(safetensors.SUFFIX) for name in names)
    if plain:
        found.append(SAFETENSORS)
    if is_recis_cut:
        return found
    has_torch = not names.isdisjoint((torch_save.INDEX_JSON, "pytorch_model.bin"))
    if not has_torch and (files := find_torch_files(directory)):
        # beside other formats lies what trainers keep for themselves: training_args.bin, optimizer.pt, meta.pt
        has_torch = not found or torch_save.holds_model(directory, files)
    if has_torch:
        found.append(TORCH)
    return found


def find_nothing(directory: Directory, *, asked: str = AUTO) -> CheckpointError:
    """Return the error for a place that is no checkpoint, which lists what was looked for.

    OSError where it cannot be looked at.
    """
    names = directory.names()
    what = f"no checkpoint that is known among its {len(names)} files" if names else directory.say_missing()
    looked_for = LOOKED_FOR if asked == AUTO else FORMATS[asked].told_by
    if any(name.endswith(".parquet") for name in names):
        what += " (parquet files of TorchEasyRec's trainer are taken with format: tzrec_delta and a base)"
    unfinished = (
        ". A save that did not finish lacks what is written last: index, tensorkey.json, .metadata" if names else ""
    )
    return CheckpointError(f"{directory.url}: {what}; looked for {looked_for}{unfinished}{directory.tell_folders()}")


def open_reader(
    directory: Directory,
    *,
    asked: str = AUTO,
    settings: TensorSettings = TensorSettings(),  # noqa: B008 -- immutable
) -> CheckpointReader[Any]:
    """Open the checkpoint for an export.

    Args:
        directory: the checkpoint.
        asked: the format; with ``auto`` the files tell.
        settings: what they say of the tensors of formats that do not say it themselves.

    Raises:
        CheckpointError: no format is recognised, the checkpoint is not complete, or it is a delta package.
        ConfigError: ``treat_as_tables`` or ``state_root`` for a format that says itself which tensors are tables.
    """
    found = detect_format(directory, asked=asked)
    if found is None:
        raise find_nothing(directory)
    if asked not in (AUTO, RECIS):  # to open RecIS's looks for a manifest itself
        find_manifest(directory)  # it refuses a delta package, which any format could otherwise read in part
    return FORMATS[found].open(directory, settings)


def open_dense(
    directory: Directory,
    found: str | None,
    settings: TensorSettings = TensorSettings(),  # noqa: B008 -- immutable
) -> DenseParameters:
    """Return the dense parameters of a checkpoint of the format ``found``; nothing is read yet.

    Settings as those of :func:`open_reader`.
    """
    return FORMATS[found or RECIS].dense(directory, settings)


def holds_tables(
    directory: Directory,
    found: str | None,
    settings: TensorSettings = TensorSettings(),  # noqa: B008 -- immutable
) -> bool:
    """Whether a checkpoint of the format ``found`` has any table, for an export that can do without.

    Raises:
        CheckpointError: it is not there, cannot be looked at, or a pattern matches nothing.
    """
    if found == DCP:
        return bool(read_beside(directory, settings).checkpoint.tables)
    if found in _PLAIN:
        return bool(sort_facts(directory, read_all(_PLAIN[found](directory, settings)), settings).tables)
    if found in (DYNAMICEMB, DCP_AND_DUMP, PACKAGE, TZREC_DELTA):
        return True
    try:
        names = directory.names()
        if not names:
            raise find_nothing(directory)
        return not set(names).isdisjoint((INDEX, TENSORKEY))
    except OSError as error:
        raise CheckpointError(f"{directory.url} cannot be read: {error.strerror or error}") from error


def describe_format(name: str) -> str:
    """Return what a format is recognised by, for people, to be put behind its name."""
    return f" (recognised by {FORMATS[name].told_by})" if name in FORMATS else ""


class Format(NamedTuple):
    """What is to be known of a format. The functions take the directory and what the settings say of its tensors."""

    kind: str
    """What a checkpoint of it is called, for people."""
    told_by: str
    """The files that it is recognised by, for people."""
    open: Callable[[Directory, TensorSettings], CheckpointReader[Any]]
    dense: Callable[[Directory, TensorSettings], DenseParameters]


def _open_recis(directory: Directory, settings: TensorSettings) -> CheckpointReader[Any]:
    if directory.exists(INDEX):  # else it is none, which the reader tells
        _refuse_settings(directory, settings, RECIS)
    package = find_package(directory)
    reader = RecisReader(directory, warn=functools.partial(note_lost_manifest, directory))
    return reader if package is None else PackageSource(directory, package, reader)


def _open_recis_dense(directory: Directory, _: TensorSettings) -> DenseParameters:
    # a package has no model.pt: one that lies beside it is somebody else's
    return RecisDense(directory) if find_package(directory) is None else NoDense(directory, _PACKAGE_ALONE)


def _open_package(directory: Directory, settings: TensorSettings) -> CheckpointReader[Any]:
    _refuse_settings(directory, settings, PACKAGE)
    package = find_package(directory)
    if package is None:
        raise find_nothing(directory, asked=PACKAGE)
    return PackageSource(directory, package)


def _open_dynamicemb(directory: Directory, settings: TensorSettings) -> CheckpointReader[Any]:
    reader = DynamicEmbReader(directory)
    _refuse_settings(directory, settings, DYNAMICEMB)
    return reader


def _open_delta(directory: Directory, _: TensorSettings) -> CheckpointReader[Any]:
    raise ConfigError(
        f"{directory.url} is read as a dump of changed rows (format: tzrec_delta), which is no checkpoint: only an export "
        "against a base reads it"
    )


def _open_dcp_and_dump(directory: Directory, settings: TensorSettings) -> CheckpointReader[Any]:
    dcp = DcpReader(directory, settings, with_dump=True)
    return JoinedReader(dcp, DynamicEmbReader(directory, with_dcp=True), kind=DCP_AND_DUMP)


def _refuse_settings(directory: Directory, settings: TensorSettings, found: str) -> None:
    if settings.treat_as_tables:
        raise ConfigError(
            f"treat_as_tables is set, but {directory.url} is {FORMATS[found].kind}, which says itself what "
            "its tables are; remove treat_as_tables"
        )
    if settings.state_root is not None:
        raise ConfigError(
            f"state_root is set, but {directory.url} is {FORMATS[found].kind}, which holds one model "
            "only; remove state_root"
        )


def _plain(name: str, kind: str, told_by: str) -> Format:
    make = _PLAIN[name]

    def dense(directory: Directory, settings: TensorSettings) -> DenseParameters:
        return PlainDense(directory, make, settings)

    return Format(kind, told_by, make, dense)


_PLAIN: dict[str | None, type[SafetensorsReader | TorchReader]] = {
    SAFETENSORS: SafetensorsReader,
    TORCH: TorchReader,
}

FORMATS: dict[str, Format] = {
    RECIS: Format("a RecIS checkpoint", f"{INDEX} and {TENSORKEY}", _open_recis, _open_recis_dense),
    DCP: Format(
        "a DCP checkpoint",
        f"{METADATA}, or model/{METADATA}",
        DcpReader,
        DcpDense,
    ),
    SAFETENSORS: _plain(SAFETENSORS, "a safetensors checkpoint", f"*{safetensors.SUFFIX}"),
    TORCH: _plain(TORCH, "a checkpoint of torch.save", "*.pt, *.pth, *.ckpt or *.bin"),
    DYNAMICEMB: Format(
        "a DynamicEmb dump", "*_emb_keys.rank_*", _open_dynamicemb, lambda directory, _: NoDense(directory, _DUMP_ALONE)
    ),
    PACKAGE: Format("a package", MANIFEST, _open_package, lambda directory, _: NoDense(directory, _PACKAGE_ALONE)),
    TZREC_DELTA: Format(
        "a dump of TorchEasyRec",
        TOLD_BY,
        _open_delta,
        lambda directory, _: NoDense(directory, _DELTA_ALONE),
    ),
    DCP_AND_DUMP: Format(
        "a DCP checkpoint with a DynamicEmb dump",
        f"{METADATA}, or model/{METADATA}, and *_emb_keys.rank_*",
        _open_dcp_and_dump,
        lambda directory, settings: DcpDense(directory, settings, has_more_slots=True),
    ),
}
