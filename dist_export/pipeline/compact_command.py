"""The command ``compact``: its options, and the settings of the export that it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec

from dist_export.config.describe import SETTINGS, Option
from dist_export.config.loader import PATH_OPTIONS, load_config
from dist_export.errors import ConfigError, DistExportError
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT
from dist_export.manifest import Manifest
from dist_export.model.user_objects import Objects
from dist_export.package.reader import Package
from dist_export.pipeline.account import NO_TABLES
from dist_export.pipeline.compact import Compaction, open_delta
from dist_export.pipeline.run import run_export
from dist_export.pipeline.run_dir import FoundCheckpoint
from dist_export.registry.base import resolve, scheme_of
from dist_export.runtime.ranks import Ranks
from dist_export.storage.urls import open_directory

USAGE = (
    "usage: dist_export compact DELTA OUT [--base BASE] [--key value ...]\n\nMake a full package of a delta package and its "
    "base: what an export without base gives of the same checkpoint, row for row, without the checkpoint and the model. "
    "Exit code 2: a package is missing or damaged, and nothing is written. Under torchrun the ranks share the work."
)
_PASSED = (
    *("overwrite", "on_unfinished", "digest", "max_memory", "threads", "timeout", "progress"),
    *("storage_options", "target_storage_options", "registry_options", "events", "metrics"),
)
_TEXTS = {
    "overwrite": "Replace a package that is already in OUT. The old package stays readable until the new one is committed.",
    "on_unfinished": "What to do if OUT holds an unfinished package: resume it, restart from the beginning, or stop.",
    "storage_options": "Options for the file system of DELTA and BASE (fsspec).",
    "target_storage_options": "Options for the file system of OUT, if they differ. Null takes --storage_options.",
    "events": "Write events as JSON lines to this file or fsspec URL. Lines are added. True takes <OUT>.events.jsonl.",
}
OPTIONS = {
    "base": Option(hint=str | None, default=None, text="Base of DELTA. Null looks at its old path, and beside DELTA."),
    "num_shards": Option(hint=int | None, default=None, text="Number of shards. Null takes that of DELTA."),
    **{name: replace(SETTINGS[name], text=_TEXTS.get(name, "")) for name in _PASSED},
    "registry_options": PATH_OPTIONS["registry_options"],
}
NAMES = ("delta", "out")
_WORDS = {
    "export_dir": "OUT",
    "ckpt_dir": "DELTA",
    "overwrite: true": "--overwrite true",
    "on_unfinished: resume": "--on_unfinished resume",
    "storage_options": "--storage_options",
    "target_storage_options": "--target_storage_options",
}
_WORD = re.compile(rf"(?<![\w/.:-])({'|'.join(_WORDS)})(?![\w/-]|\.\w)")


def check_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of all options. ConfigError if one of ``given`` is none, or has a wrong type."""
    if unknown := [name for name in given if name not in OPTIONS]:
        raise ConfigError(f"compact has no option {unknown[0]!r}; its options are {', '.join(OPTIONS)}")
    config = load_config({"ckpt_dir": "DELTA", "export_dir": "OUT", "filter_sparse_opt": True, **given})
    return {name: option.default for name, option in OPTIONS.items()} | {name: vars(config)[name] for name in given}


def compact(ranks: Ranks, arguments: Mapping[str, Any]) -> tuple[Manifest, list[str]]:
    """Make the package; return its manifest, and the lines of the summary. All ranks.

    Raises:
        UserError: DELTA is a full package, a package is missing or damaged, or there is another package in OUT.
        ExportError: it failed later. There is no package then.
    """
    try:
        settings, base, found = ranks.broadcast("look at the delta", lambda: _read_settings(arguments))
        config, steps = load_config(settings), Compaction(base).steps
        return run_export(ranks, config, Objects(), is_shown=config.progress, steps=steps, found=found)
    except DistExportError as error:  # an export speaks of its settings
        error.args = tuple(_WORD.sub(lambda match: _WORDS[match[1]], line) for line in error.args)
        raise


def _read_settings(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], str | None, FoundCheckpoint]:
    """Return the settings of the export, the directory of the base if it is given, and the delta as a source. Rank 0."""
    options = arguments["registry_options"]
    delta = resolve(arguments["delta"], options).directory
    base = None if arguments["base"] is None else resolve(arguments["base"], options).directory
    if arguments["num_shards"] is not None and arguments["num_shards"] < 1:
        raise ConfigError(f"--num_shards is {arguments['num_shards']}; give a number from 1 up")
    out = arguments["out"]
    if scheme_of(out) is None or "://" in out:
        target = arguments["target_storage_options"]
        place = open_directory(out, arguments["storage_options"] if target is None else target)
        if open_directory(delta, arguments["storage_options"]).is_same(place):
            raise ConfigError(f"OUT is DELTA ({delta}), whose place the new package would take; give another OUT")
    with open_delta(delta, base, arguments["storage_options"]) as package:
        below = package.manifest.base
        if not isinstance(below, msgspec.UnsetType) and below.has_dense is True and package.manifest.dense is not None:
            raise ConfigError(
                f"{delta} has rows of a trainer's dump, and its stored samples are of the base's rows, so no full package can be "
                "made of both. Nothing was written; export a checkpoint"
            )
        made = {name: arguments[name] for name in _PASSED} | {
            "ckpt_dir": delta,
            "export_dir": arguments["out"],
            "filter_sparse_opt": True,
            "server_side_copy": False,  # rows of two packages are put together
            "num_shards": _count_shards(package) if arguments["num_shards"] is None else arguments["num_shards"],
            "keep_slots": ["*"] if _has_more(package) else [],
            "row_fingerprints": True if _has_fingerprints(package) else "auto",
        }
        step = package.manifest.source.step
    return made, base, FoundCheckpoint(delta, None if step is msgspec.UNSET else step, ())


def _count_shards(package: Package) -> int:
    """Return the shards of a full export as the delta says; those of the base if the delta exported no tables."""
    account, base = package.manifest.account, package.layers[-1]
    has_no_tables = account is not msgspec.UNSET and NO_TABLES in account.left_out
    return base.manifest.num_shards if has_no_tables else package.manifest.num_shards


def _has_more(package: Package) -> bool:
    """Whether a package has slots besides ids and embeddings, or dense tensors among its shards. All were kept on purpose."""
    slots = {slot.name for table in package.manifest.tables for slot in table.kept}
    return bool(slots - {ID_SLOT, EMBEDDING_SLOT} or package.manifest.dense_tensors)


def _has_fingerprints(package: Package) -> bool:
    base = package.layers[-1]
    parts = (part for table in base.manifest.tables for part in table.parts)
    return any(part.row_fingerprints is not msgspec.UNSET for part in parts)
