"""Checks of the settings of tables, without any file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from dist_export.config.prune_rules import parse_rules
from dist_export.config.publishing import VERSIONS
from dist_export.config.trainer_deltas import TZREC_DELTA
from dist_export.errors import ConfigError
from dist_export.formats.delta_entries import MOST_LINKS
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT

CastDtype = Literal["float16", "bfloat16", "float32", "int8", "source"]
"""Dtypes that rows can be cast to. int8 is row-wise, with scale and bias; source keeps the dtype."""

LATEST = "latest"
"""As ``base``: the current version of the directory of ``publish``."""


def check_sparse(settings: Mapping[str, Any], dtypes: Sequence[tuple[str, str]]) -> None:
    """Refuse settings of the tables that do not go together. ConfigError names the setting.

    ``settings`` are all settings by name, and ``dtypes`` is ``dtype`` as (pattern, dtype).
    """
    patterns = [name for name in ("optimizer_slots", "drop_slots", "keep_slots") if settings[name]]
    asked = [*patterns, *(["num_shards"] if settings["num_shards"] is not None else [])]
    asked += ["on_duplicate"] if settings["on_duplicate"] != "error" else []
    views = ("select_tables", "drop_tables", "rename_tables", "to_hash_tables", "prune")
    asked += [name for name in views if settings[name]]
    asked += ["dtype"] if dtypes else []
    unused = [*asked, *(["on_misplaced"] if settings["on_misplaced"] != "repair" else [])]
    unused += [name for name in ("default_row", "dynamicemb_dims") if settings[name]]
    if unused and not settings["need_export_sparse"]:
        raise ConfigError(f"{unused[0]} says how to export the tables, but need_export_sparse is false")
    if settings["treat_as_tables"] and not settings["need_export_sparse"] and settings["model"] is None:
        raise ConfigError("treat_as_tables says which tensors are tables, but need_export_sparse is false")
    asked += ["base"] if settings["base"] is not None else []
    if asked and settings["filter_sparse_opt"] is False:  # null is checked once the format is known
        raise ConfigError(
            f"{asked[0]} needs new shards, but filter_sparse_opt is false, which copies the files as they are; "
            "set filter_sparse_opt: true"
        )
    parse_rules(settings["prune"])
    for pattern, dim in settings["dynamicemb_dims"].items():
        if dim < 1:
            raise ConfigError(f"dynamicemb_dims.{pattern} is {dim}; a row has 1 value or more")
    for pattern, values in settings["default_row"].items():
        if not isinstance(values, str) and not all(math.isfinite(value) for value in values):
            raise ConfigError(f"default_row.{pattern}: {values} holds what is no finite number")
    for pattern, dtype in dtypes:
        if dtype not in get_args(CastDtype):
            known = ", ".join(get_args(CastDtype))
            raise ConfigError(f"dtype: {pattern!r} is to be {dtype!r}; rows can be cast to {known}")
    if settings["on_empty_table"] != "error" and not settings["prune"]:
        raise ConfigError(
            "on_empty_table says what becomes of tables that prune leaves nothing of, but prune has no rule"
        )
    if settings["on_overflow"] != "error" and not dtypes and settings["format"] != TZREC_DELTA:
        raise ConfigError("on_overflow says what becomes of values that a dtype cannot hold, but dtype names no table")
    _check_base(settings)


def _check_base(settings: Mapping[str, Any]) -> None:
    if settings["base"] is None:
        if settings["on_base_mismatch"] != "error":
            raise ConfigError("on_base_mismatch says what to do without a fitting base, but base is not set")
        if settings["compare"] != "fingerprints":
            raise ConfigError("compare says how rows are compared with those of a base, but base is not set")
        if settings["delta_ignore_slots"]:
            raise ConfigError("delta_ignore_slots says what is not compared with a base, but base is not set")
        if settings["delta_chain"] != 1:
            raise ConfigError("delta_chain says how many deltas may be on top of each other, but base is not set")
        return
    if not settings["base"]:
        raise ConfigError("base is empty; give a package, or null for a full export")
    if not 1 <= settings["delta_chain"] <= MOST_LINKS:
        raise ConfigError(f"delta_chain is {settings['delta_chain']}; give a number of deltas from 1 to {MOST_LINKS}")
    if settings["format"] == TZREC_DELTA and settings["delta_chain"] != 1:
        raise ConfigError(
            "delta_chain needs checkpoints: with format: tzrec_delta a delta goes on a full package. Leave delta_chain out"
        )
    if not settings["need_export_sparse"]:
        _check_refresh(settings)
    if settings["base"] == LATEST and not settings["export_dir"].startswith(VERSIONS):
        raise ConfigError("base is latest, the current version of the directory of publish, but publish is not set")
    if settings["delta_ignore_slots"] and settings["compare"] != "exact":
        raise ConfigError(
            "delta_ignore_slots leaves out slots that row fingerprints are made of; set compare: exact, which reads the rows of "
            "the base"
        )
    if {ID_SLOT, EMBEDDING_SLOT} & {*settings["delta_ignore_slots"]}:
        raise ConfigError(f"delta_ignore_slots: {ID_SLOT} and {EMBEDDING_SLOT} are always compared")


def _check_refresh(settings: Mapping[str, Any]) -> None:
    """Refuse settings that a delta without tables of its own cannot follow."""
    for name, default, reason in (
        ("on_base_mismatch", "error", "full would export the tables"),
        ("compare", "fingerprints", "no row is compared"),
        ("delta_ignore_slots", [], "no row is compared"),
        ("delta_chain", 1, "it goes on a full package"),
        ("max_drift", None, "no row of the checkpoint is read to measure a drift"),
    ):
        if settings[name] != default:
            raise ConfigError(
                f"{name} is {settings[name]}, but need_export_sparse is false, and the tables stay those of base: {reason}. "
                f"Leave {name} out, or export the tables too"
            )
    if settings["format"] == "live":
        raise ConfigError(
            "base with need_export_sparse: false takes the dense part of a checkpoint, but format is live; save a checkpoint and "
            "give ckpt_dir, or export the tables too"
        )
