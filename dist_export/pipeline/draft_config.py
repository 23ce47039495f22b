"""``init``: a commented config for a checkpoint, made of what its headers and ids say."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from dist_export.checkpoint.detect import DCP, FORMATS, PACKAGE, SAFETENSORS, TORCH, detect_format, open_dense
from dist_export.checkpoint.metadata import Checkpoint, TableMeta
from dist_export.checkpoint.package_source import find_package
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.config.loader import load_config
from dist_export.config.schema import ExportConfig
from dist_export.config.source_needs import RunOfCheckpoints
from dist_export.errors import ConfigError, PlanError, UnaskedError, printable
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT
from dist_export.formats.row_encodings import F32
from dist_export.humanize import amount, count, few
from dist_export.inspect.checkpoints import describe_tables
from dist_export.pipeline.locate import Locations, locate
from dist_export.pipeline.planning import open_tables, plan_sparse
from dist_export.pipeline.run_dir import list_checkpoints
from dist_export.plan.selection import select
from dist_export.runtime.joining import join
from dist_export.runtime.ranks import Ranks
from dist_export.storage.urls import open_place

_SHOWN_TABLES = 50
_WEIGHT = ".weight"
_HINTS = ("emb", "table")
"""Names of matrices with one of these are taken for tables, before any others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """A checkpoint whose export was planned as the config says."""

    config: ExportConfig
    """With the paths that were found."""
    located: Locations
    checkpoint: Checkpoint


def draft_config(settings: Mapping[str, Any]) -> list[str]:
    """Return the lines of a YAML file that exports the tables of a checkpoint, and what else could be set as comments.

    The export is planned with the settings of the file, so that what refuses them is known now. Reads headers and id columns.

    Args:
        settings: those that go into the file as they are, ``ckpt_dir`` and ``export_dir`` among them.

    Raises:
        ConfigError: a setting that cannot be.
        CheckpointError: no checkpoint, or none that can be exported, whatever the settings.
        PlanError: settings that do not fit the checkpoint.
    """
    if os.path.exists(settings["ckpt_dir"]):  # the file may be used from another directory
        settings = {**settings, "ckpt_dir": os.path.abspath(settings["ckpt_dir"])}
    config = load_config(settings)
    added: dict[str, Any] = {}
    with join(timeout_secs=config.timeout) as ranks:
        try:
            planned = _plan(ranks, config)
        except UnaskedError:
            added = {} if config.treat_as_tables else {"treat_as_tables": _guess_tables(config.ckpt_dir or "", config)}
            if not added.get("treat_as_tables"):
                raise
            planned = _plan(ranks, config.with_changes(**added))
        except PlanError:
            if config.filter_sparse_opt is not None:
                raise
            added = {"filter_sparse_opt": True}  # new shards are sound where the files cannot be copied
            planned = _plan(ranks, config.with_changes(**added))
    return [
        *_describe(planned),
        "",
        *_write_settings(planned, {**settings, **added}, added),
        "",
        *_suggest(planned, {*settings, *added}),
        "",
        *_suggest_model(planned),
    ]


def write_draft(lines: Sequence[str], path: str) -> None:
    """Write the lines to a new file that only its owner reads, because they may hold credentials. ConfigError if that fails."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Nothing was written; give another --out") from None
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write("\n".join([*lines, ""]))


def _plan(ranks: Ranks, config: ExportConfig) -> _Planned:
    located = ranks.broadcast("find the checkpoint", lambda: locate(config, needs_dense=False))
    config = located.apply(config)
    source = open_place(config.ckpt_dir or "", config.storage_options, follow_links=config.follow_links)
    checkpoint = open_tables(ranks, source, config)
    plan_sparse(ranks, checkpoint, config, world_size=ranks.world_size)
    return _Planned(config=config, located=located, checkpoint=checkpoint)


def _guess_tables(url: str, config: RunOfCheckpoints) -> list[str]:
    """Return patterns of matrices that look like tables: by name, or else longer than wide and without a bias beside them."""
    directory = open_place(url, config.storage_options, follow_links=config.follow_links)
    settings = TensorSettings(optimizer_slots=tuple(config.optimizer_slots), state_root=config.state_root)
    listed = list_checkpoints(directory, asked=config.format, settings=settings)
    newest = next((each.name for each in listed if each.is_complete is not False), None)
    directory = directory if newest is None else directory.child(newest)
    kind = detect_format(directory, asked=config.format)
    if kind not in (DCP, SAFETENSORS, TORCH):
        return []
    shapes = {name: shape for name, _, shape in open_dense(directory, kind, settings).describe()}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and shape[0] > 1}
    named = [name for name in matrices if any(hint in name.lower() for hint in _HINTS)]
    alone = [
        name
        for name, (rows, columns) in matrices.items()
        if rows > columns and f"{name.rpartition('.')[0]}.bias" not in shapes
    ]
    return [glob.escape(name) for name in sorted(named or alone)]


def _describe(planned: _Planned) -> list[str]:
    checkpoint, located = planned.checkpoint, planned.located
    tables = describe_tables(checkpoint)
    lines = [
        "This file exports the tables of a checkpoint as they are:",
        "  torchrun --nproc-per-node 2 -m dist_export --config FILE",
        "'python -m dist_export plan --config FILE' shows what that does, and writes nothing.",
        "'python -m dist_export --help-all' explains all settings.",
        "",
        f"{checkpoint.directory.url} is {FORMATS[checkpoint.format].kind} with {count(len(tables), 'table')}:",
    ]
    for table, meta in zip(tables[:_SHOWN_TABLES], checkpoint.tables, strict=False):
        kind = "hash table" if meta.is_hashed else "row-indexed"
        shape = " x ".join(map(str, table["shape"]))
        slots = few([slot for slot in table["slots"] if slot not in (ID_SLOT, EMBEDDING_SLOT)])
        line = (
            f"  {table['name']}: {kind}, {table['rows']:,} rows of {shape} {table['dtype']}, {amount(table['bytes'])}"
        )
        lines.append(f"{line}, with {slots}" if slots else line)
    if len(tables) > _SHOWN_TABLES:
        lines.append(f"  and {len(tables) - _SHOWN_TABLES} more")
    return _comment([*lines, *(f"note: {note}" for note in (*located.notes, *checkpoint.warnings))])


def _write_settings(planned: _Planned, settings: Mapping[str, Any], added: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings that count."""
    reasons = {
        "treat_as_tables": "The checkpoint does not say which matrices are tables. These look like tables: check them.",
        "filter_sparse_opt": "The files cannot be copied as they are, so new shards are written.",
    }
    for name, value in settings.items():
        yield from _comment([reasons[name]] if name in added else [])
        yield _write(name, value)
    is_run = planned.located.is_run and "step" not in settings
    if is_run:
        yield from _comment(
            ["ckpt_dir is a training run: its latest complete checkpoint is exported. For this one alone:"]
        )
        yield f"# {_write('step', planned.located.step)}"
    if "format" not in settings and not is_run and planned.checkpoint.format != PACKAGE:
        yield _write("format", planned.checkpoint.format)


def _suggest(planned: _Planned, taken: Collection[str]) -> Iterator[str]:
    """Yield settings that fit the tables of this checkpoint, as comments."""
    checkpoint, tables = planned.checkpoint, planned.checkpoint.tables
    selection = select(checkpoint, optimizer_slots=tuple(planned.config.optimizer_slots))
    dropped = sorted({slot.name for slots in selection.dropped for slot, _ in slots})
    further = sorted({slot.name for slots in selection.kept for slot in slots} - {ID_SLOT, EMBEDDING_SLOT})
    floats = [
        table for table in tables if any(slot.name == EMBEDDING_SLOT and slot.dtype == F32 for slot in table.slots)
    ]
    indexed = [table for table in tables if not table.is_hashed]
    unsure = {table.name_in_source: _dim_of(table) for table in tables if table.width_confirmed_by == ()}
    suggestions: list[tuple[str, str, Any]] = [
        (f"Drop optimizer state ({few(dropped)}) and write new shards.", "filter_sparse_opt", True),
        ("The number of shards. The default is the number of ranks.", "num_shards", 8),
        ("Write embeddings in fewer bytes.", "dtype", dict.fromkeys(_patterns(floats, tables), "float16")),
        ("Drop further slots.", "drop_slots", further),
        ("Shorter names of tables.", "rename_tables", _shorten(tables)),
        ("For servers that read hash tables alone.", "to_hash_tables", _patterns(indexed, tables)),
        ("The row for ids without a row.", "default_row", {} if indexed else {"*": "zeros"}),
        ("Nothing in the dump confirms these dimensions. Check them.", "dynamicemb_dims", unsure),
    ]
    if not planned.config.filter_sparse_opt:
        yield from _comment(["The files are copied. Everything below needs filter_sparse_opt: true."])
    for text, name, value in suggestions:
        if name not in taken and value and not (name == "filter_sparse_opt" and planned.config.filter_sparse_opt):
            yield from _comment([text])
            yield f"# {_write(name, value)}"


def _suggest_model(planned: _Planned) -> Iterator[str]:
    if find_package(planned.checkpoint.directory) is not None:
        return  # it has a program, and no parameters for a model
    yield from _comment(["The model. Without it only the tables are exported."])
    for name, value in (
        ("model", "my_team.models:build_model"),
        ("dataset", "my_team.data:build_dataset"),
        ("sparse_model_name", ExportConfig.sparse_model_name),
        ("dense_model_name", ExportConfig.dense_model_name),
        ("export_outputs", ["ctr"]),
    ):
        yield f"# {_write(name, value)}"


def _patterns(chosen: Sequence[TableMeta], tables: Sequence[TableMeta]) -> list[str]:
    """Return patterns that match the chosen ones of the tables."""
    return ["*"] if len(chosen) == len(tables) > 0 else [glob.escape(table.name_in_source) for table in chosen]


def _shorten(tables: Sequence[TableMeta]) -> dict[str, str]:
    """Return ``rename_tables`` that leaves the module's name of weights that have one parent; empty where there is none."""
    modules = [table.name_in_source.removesuffix(_WEIGHT).rpartition(".") for table in tables]
    (parent, *others) = {parent for parent, _, _ in modules}
    is_one = not others and bool(parent) and all(table.name_in_source.endswith(_WEIGHT) for table in tables)
    return {f"{glob.escape(parent)}.*{_WEIGHT}": "{0}"} if is_one else {}


def _dim_of(table: TableMeta) -> int:
    return next(slot.inner_shape[0] for slot in table.slots if slot.name == EMBEDDING_SLOT)


def _write(name: str, value: Any) -> str:
    """Return a setting as one line of YAML."""
    text = yaml.safe_dump(
        [value], default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True
    ).rstrip()
    return f"{name}: {text[1:-1]}"


def _comment(lines: Iterable[str]) -> list[str]:
    return [f"# {printable(line)}".rstrip() for line in lines]
