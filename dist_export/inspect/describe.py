"""Describe a checkpoint or a package for ``inspect``, from headers and manifests only. Needs no torch for tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from dist_export.checkpoint.detect import (
    AUTO,
    DCP,
    DCP_AND_DUMP,
    DYNAMICEMB,
    SAFETENSORS,
    TORCH,
    detect_format,
    find_nothing,
)
from dist_export.checkpoint.dynamicemb_widths import render_width
from dist_export.checkpoint.recis.reader import list_finished
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.checkpoint.tzrec.files import TZREC_DELTA
from dist_export.errors import CheckpointError, ConfigError, PackageError, UserError
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.recis import DENSE_SUFFIX, EMBEDDING_SLOT, ID_SLOT
from dist_export.formats.recis_index import split_internal, split_stem
from dist_export.formats.row_fingerprints import SUFFIX
from dist_export.inspect.checkpoints import describe_source, render_skipped, render_source
from dist_export.inspect.dcp import describe_dcp, render_dcp
from dist_export.manifest import MANIFEST, DeltaEntry, Manifest, ScoreEntry, ServingEntry, SlotEntry, TensorEntry
from dist_export.package.reader import Package
from dist_export.package.shard_headers import read_header, read_indexes
from dist_export.registry.bases import follow
from dist_export.storage.directory import Directory
from dist_export.storage.urls import open_place

_MAX_NAME_WIDTH = 64
"""The most characters of the column of table names. A longer name only moves the rest of its own line."""


def describe(
    path: str,
    storage_options: dict[str, Any] | None = None,
    *,
    follow_links: bool = False,
    asked: str = AUTO,
    settings: TensorSettings = TensorSettings(),  # noqa: B008 -- immutable
    dynamicemb_dims: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return what is at ``path`` as plain values: a package if there is a manifest, else a checkpoint.

    Args:
        path: a directory or a file of a checkpoint, or an fsspec URL of one.
        storage_options: options for its file system.
        follow_links: whether files may be links that lead out of the directory.
        asked: the format of a checkpoint; ``auto`` detects it from the files.
        settings: how to classify tensors, for a checkpoint that does not say which are tables.
        dynamicemb_dims: for a DynamicEmb dump: pattern of tables -> dimension.

    Raises:
        CheckpointError: there is no package and no checkpoint, or the checkpoint cannot be read.
        UserError: the package cannot be read.
        ConfigError: a setting does not apply to this format.
    """
    directory = open_place(path, storage_options, follow_links=follow_links)
    is_package = asked == AUTO and directory.exists(MANIFEST)
    found = None if is_package else detect_format(directory, asked=asked)
    dims = dynamicemb_dims or {}
    if dims and found not in (DYNAMICEMB, DCP_AND_DUMP):
        raise ConfigError(f"{path} is no DynamicEmb dump; --dynamicemb_dims is for those")
    if found in (DCP, DCP_AND_DUMP):
        return describe_dcp(directory, asked=found, settings=settings, dynamicemb_dims=dims)
    if found in (SAFETENSORS, TORCH, DYNAMICEMB, TZREC_DELTA):
        return describe_source(directory, asked=found, settings=settings, dynamicemb_dims=dims)
    if not is_package and found is None:
        raise find_nothing(directory, asked=asked)
    if settings.treat_as_tables or settings.optimizer_slots or settings.state_root is not None:
        raise ConfigError(
            f"{path} is no DCP checkpoint and no other that holds tensors alone; --treat_as_tables, --optimizer_slots "
            "and --state_root are for those"
        )
    if is_package:
        return _describe_package(directory)
    list_finished(directory)
    try:
        return _describe_checkpoint(directory)
    except PackageError as error:
        raise CheckpointError(str(error)) from None


def render(found: dict[str, Any]) -> list[str]:
    """Return the description as lines for people."""
    lines = [f"{found['kind']}: {found['path']}"]
    lines += [
        f"  {key:<10} {found[key]}" for key in ("mode", "source", "shards", "files", "bytes", "digest") if key in found
    ]
    if base := found.get("base"):
        alone = ", a new dense part alone" if base.get("dense_only") else ""
        lines.append(f"  {'base':<10} {base['path']} (digest {base['digest']}){alone}")
    if chain := found.get("chain"):
        lines.append(f"  {'chain':<10} {' on '.join(chain)}")
    if lack := found.get("lack"):
        lines.append(f"  {'lack':<10} it {lack}")
    if compacted := found.get("compacted"):
        links = [compacted["delta"], *compacted.get("between", ()), compacted["base"]]
        lines.append(f"  {'made of':<10} {' and its base '.join(its['path'] for its in links)}")
    if found.get("row_fingerprints"):
        lines.append(f"  row fingerprints: {found['row_fingerprints']:,} of these bytes")
    width = min(max([24, *(len(table["name"]) for table in found["tables"])]), _MAX_NAME_WIDTH)
    if found["tables"]:
        lines.append(f"  {'table':<{width}} {'rows':>12} {'row':>10} {'dtype':<9} {'parts':>5} {'bytes':>15}  slots")
    for table in found["tables"]:
        shape = "x".join(map(str, table["shape"])) or "1"
        lines.append(
            f"  {table['name']:<{width}} {table['rows']:>12,} {shape:>10} {table['dtype']:<9} {table['parts']:>5} "
            f"{table['bytes']:>15,}  {', '.join(table['slots'])}{'' if table.get('is_hashed', True) else ' (rows by number)'}"
        )
        if delta := table.get("delta"):
            lines.append(
                f"    of {delta['rows_base']:,} rows of the base: {delta['same']:,} same, {delta['changed']:,} changed, "
                f"{delta['deleted']:,} deleted; {delta['new']:,} new"
            )
        lines += render_width(table)
        if cast := table.get("cast"):
            lines.append(f"    cast from {cast['source_dtype']}: {render_errors(cast)}")
        for earlier in table.get("earlier_casts", ()):
            lines.append(f"    before that, cast from {earlier['source_dtype']}: {render_errors(earlier)}")
    lines += render_dcp(found) + render_source(found) + render_skipped(found)
    if found["dense_tensors"]:
        lines.append(f"  dense tensors among the sparse files: {', '.join(found['dense_tensors'])}")
    for what in ("inputs", "outputs"):
        for tensor in (found.get("dense") or {}).get(what, []):
            shape = ", ".join(map(str, tensor["shape"]))
            lines.append(f"  {what[:-1]:<10} {tensor['name']} {tensor['dtype']} ({shape})")
    if score := found.get("score"):
        inputs = ", ".join(tensor["name"] for tensor in score["inputs"])
        lines.append(f"  score      {score['program']}: from {inputs}, lookups in {', '.join(score['tables'])}")
    if serving := found.get("serving"):
        unknown = [name for name, reason in serving["unknown"].items()]
        told = f"; unknown {', '.join(unknown)}" if unknown else ""
        lines.append(f"  contract   features {', '.join(serving['features']) or 'none'}{told}")
    return lines


def render_errors(cast: dict[str, Any]) -> str:
    """Return the losses of a cast as text for people."""
    overflow = [(cast["out_of_range"], "out of range"), (cast["nans"], "NaN")]
    told = "".join(f", {number:,} {what} (clamped)" for number, what in overflow if number)
    return f"largest error {cast['max_abs_error']:.3g}, mean {cast['mean_abs_error']:.3g}{told}"


def _describe_chain(directory: Directory, manifest: Manifest) -> dict[str, Any]:
    """Return where all packages of a chain are, and what lacks of it; nothing about a package that needs no other delta."""
    try:
        links, lack = follow(directory, manifest)
    except ConfigError as error:
        return {"lack": f"needs a package that cannot be looked at: {error}"}
    chain = {"chain": [place.url for place, _ in links]} if len(links) > 2 or (len(links) == 2 and lack) else {}
    return {**chain, **({"lack": lack} if lack else {})}


def _describe_package(directory: Directory) -> dict[str, Any]:
    try:
        manifest = Package(directory, opens_base=False).manifest
    except PackageError as error:
        raise UserError(str(error)) from None
    dense = manifest.dense
    return {
        "kind": "package" if manifest.base is msgspec.UNSET else "delta package",
        "path": directory.url,
        "mode": manifest.mode,
        "source": f"{manifest.source.path_for_people} ({manifest.source.format})"
        + (f", {manifest.source.other_rows}" if manifest.source.other_rows else ""),
        "shards": manifest.num_shards,
        "files": len(manifest.files),
        "bytes": manifest.num_bytes,
        "row_fingerprints": sum(file.num_bytes for file in manifest.files if file.path.endswith(SUFFIX)),
        "digest": manifest.digest,
        **({} if manifest.base is msgspec.UNSET else {"base": msgspec.to_builtins(manifest.base)}),
        **_describe_chain(directory, manifest),
        **({} if manifest.compacted is msgspec.UNSET else {"compacted": msgspec.to_builtins(manifest.compacted)}),
        "tables": [
            {
                "name": table.name,
                "is_hashed": not table.is_row_indexed,
                "rows": table.rows_out,
                "shape": next((_shape_of(slot) for slot in table.kept if slot.name == EMBEDDING_SLOT), []),
                "dtype": next((_name_dtype(slot) for slot in table.kept if slot.name == EMBEDDING_SLOT), ""),
                "cast": next((_describe_cast(slot) for slot in table.kept if slot.name == EMBEDDING_SLOT), None),
                "earlier_casts": [
                    msgspec.to_builtins(cast)
                    for slot in table.kept
                    if slot.name == EMBEDDING_SLOT
                    for cast in slot.earlier_casts or ()
                ],
                "parts": len(table.parts),
                "bytes": sum(slot.num_bytes for slot in table.kept),
                "slots": [slot.name for slot in table.kept],
                **({} if table.delta is msgspec.UNSET else {"delta": _describe_delta(table.delta)}),
            }
            for table in manifest.tables
        ],
        "dense_tensors": [tensor.name for tensor in manifest.dense_tensors],
        "dense": None
        if dense is None
        else {
            "program": dense.program,
            "inputs": [_describe_tensor(tensor) for tensor in dense.inputs],
            "outputs": [_describe_tensor(tensor) for tensor in dense.outputs],
        },
        "serving": None if manifest.serving is msgspec.UNSET else _describe_contract(manifest.serving),
        "score": None if manifest.score is msgspec.UNSET else _describe_score(manifest.score),
    }


def _describe_score(score: ScoreEntry) -> dict[str, Any]:
    return {
        "program": score.program,
        "inputs": [_describe_tensor(tensor) for tensor in score.inputs],
        "outputs": [_describe_tensor(tensor) for tensor in score.outputs],
        "tables": list(score.tables),
    }


def _describe_delta(delta: DeltaEntry) -> dict[str, int]:
    return {name: getattr(delta, name) for name in ("rows_base", "same", "changed", "new", "deleted")}


def _describe_contract(serving: ServingEntry) -> dict[str, Any]:
    unknown = {entry.name: entry.unknown for entry in serving.inputs if entry.unknown is not msgspec.UNSET}
    return {"features": [feature.name for feature in serving.features], "unknown": unknown}


def _shape_of(slot: SlotEntry) -> list[int]:
    """Return the shape of a row's values."""
    return list(slot.shape) if slot.dim is msgspec.UNSET else [slot.dim]


def _name_dtype(slot: SlotEntry) -> str:
    return slot.dtype if slot.encoding is msgspec.UNSET else slot.encoding


def _describe_cast(slot: SlotEntry) -> dict[str, Any] | None:
    return None if slot.cast is msgspec.UNSET else msgspec.to_builtins(slot.cast)


def _describe_tensor(tensor: TensorEntry) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}


def _describe_checkpoint(directory: Directory) -> dict[str, Any]:
    indexes = read_indexes(directory)
    name_of_stem = [split_stem(stem) for stem in indexes.stems]
    tables: dict[str, dict[str, Any]] = {}
    dense: list[str] = []
    total = 0

    def name_of(key: str) -> tuple[str, str] | None:
        """Return table and slot of a block; None for a dense tensor."""
        place = indexes.place_of_key.get(key)
        if place is not None and indexes.stem[place] >= 0:
            return name_of_stem[int(indexes.stem[place])]
        block = split_internal(indexes.strays.get(key, key))
        return None if block is None else (block.table, block.slot)

    for file in indexes.files:
        header = read_header(directory, file)
        total += directory.stat(file).size
        columns = (header.rows, header.inner, header.dtypes, header.ends - header.begins)
        for key, rows, inner, code, num_bytes in zip(header.keys, *(c.tolist() for c in columns), strict=True):
            name = name_of(key)
            if name is None:
                dense.append(key.removesuffix(DENSE_SUFFIX))
                continue
            table_name, slot = name
            table = tables.setdefault(
                table_name,
                {"name": table_name, "rows": 0, "shape": [], "dtype": "", "parts": 0, "bytes": 0, "slots": []},
            )
            table["bytes"] += num_bytes
            if slot not in table["slots"]:
                table["slots"].append(slot)
            if slot == ID_SLOT:
                table["parts"] += 1
                table["rows"] += max(rows, 0)  # a scalar has no rows, and an export refuses it
            elif slot == EMBEDDING_SLOT:
                table["shape"] = list(header.inner_shapes[inner])
                table["dtype"] = DTYPES[code].torch
    return {
        "kind": "RecIS checkpoint",
        "path": directory.url,
        "shards": max((table["parts"] for table in tables.values()), default=0),
        "files": len(indexes.files),
        "bytes": total,
        "tables": list(tables.values()),
        "dense_tensors": dense,
        "dense": None,
    }
