"""Checks of the settings of an export of a trainer's own deltas, without any file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_export.errors import ConfigError

TZREC_DELTA = "tzrec_delta"
"""As ``format``: TorchEasyRec's dumps."""

_OWN = ("since_step", "until_step", "allow_ragged")
_OF_BASE = (
    "select_tables",
    "drop_tables",
    "rename_tables",
    "to_hash_tables",
    "default_row",
    "dynamicemb_dims",
    "prune",
    "treat_as_tables",
    "optimizer_slots",
    "drop_slots",
    "keep_slots",
    "state_root",
    "model",
    "dataset",
    "fg",
    "fg_conf_or_path",
    "mc_conf_or_path",
    "dense_formats",
    "layouts",
)
"""What the base decides, or brings along."""


def check_trainer_delta(settings: Mapping[str, Any]) -> None:
    """Refuse settings that do not go with a trainer's own deltas. ConfigError names the setting.

    ``settings`` are all settings by name. ``dtype`` is not looked at: the casts of the base are put there later.
    """
    if settings["format"] != TZREC_DELTA:
        if given := [name for name in _OWN if settings[name] not in (None, False)]:
            raise ConfigError(f"{given[0]} is of TorchEasyRec's dumps, but format is not tzrec_delta")
        return
    if settings["base"] is None:
        raise ConfigError(
            "format is tzrec_delta, whose dumps hold changed rows alone, so they need a base: give the package that was exported "
            "from this training"
        )
    if settings["on_base_mismatch"] != "error":
        raise ConfigError("on_base_mismatch is full, but of the dumps of tzrec_delta no full package can be made")
    if settings["step"] is not None:
        raise ConfigError(
            "step is of a run with checkpoints; with format: tzrec_delta give until_step, the last step to take"
        )
    if not settings["need_export_sparse"]:
        raise ConfigError("format is tzrec_delta, which holds tables alone, but need_export_sparse is false")
    for name in _OF_BASE:
        if settings[name]:
            raise ConfigError(
                f"{name} is set, but with format: tzrec_delta all but the rows is the base's; remove {name}"
            )
    if settings["on_duplicate"] != "error":
        raise ConfigError(
            "on_duplicate is set, but of rows with one key in the dumps of tzrec_delta the last step's is taken"
        )
    since, until = settings["since_step"], settings["until_step"]
    for name, step in (("since_step", since), ("until_step", until)):
        if step is not None and step < 0:
            raise ConfigError(f"{name} is {step}; training steps count from 0")
    if since is not None and until is not None and until <= since:
        raise ConfigError(f"until_step is {until} and since_step {since}; give a later step")
