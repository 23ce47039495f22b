"""The command ``watch``: its options, and what the settings of an export must be for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dist_export.config.describe import Option
from dist_export.config.loader import parse_with_extras
from dist_export.config.publishing import VERSIONS
from dist_export.config.schema import ExportConfig
from dist_export.config.sparse_settings import LATEST
from dist_export.config.trainer_deltas import TZREC_DELTA
from dist_export.errors import ConfigError
from dist_export.registry.base import scheme_of
from dist_export.reporting.printing import print_now
from dist_export.runtime.lasting_ranks import LastingRanks
from dist_export.watch.decision import Rules
from dist_export.watch.loop import Watch

USAGE = (
    "usage: dist_export watch --config FILE [--key value ...]\n\nExport each new complete checkpoint of the training run "
    "ckpt_dir, and publish it to the directory of versions publish, until SIGTERM or Ctrl-C. Under torchrun the ranks share the "
    "work. All settings of an export are options too; base is latest, on_base_mismatch is full, and filter_sparse_opt is "
    "true unless they are set."
)
OPTIONS = {
    "poll_secs": Option(hint=float, default=1.0, text="How often the run is looked at, in seconds."),
    "full_every": Option(hint=int, default=20, text="Every N-th version is a full package; 1 writes no deltas."),
    "max_delta": Option(
        hint=float,
        default=0.3,
        text="The next version is a full package if the last delta had more rows than this share of its base's.",
    ),
    "until_step": Option(
        hint=int | None, default=None, text="End once a version of this step, or a later one, is published."
    ),
}


class WatchSettings(NamedTuple):
    """What the arguments say."""

    config: ExportConfig
    rules: Rules
    poll_secs: float


def read_rules(argv: Sequence[str]) -> WatchSettings:
    """Parse the arguments. ConfigError for a mistake."""
    config, options = parse_with_extras(argv, OPTIONS, defaults=_defaults_of)
    if not 0 < options["poll_secs"] < float("inf"):
        raise ConfigError(f"--poll_secs is {options['poll_secs']}; give seconds above 0")
    if options["full_every"] < 1:
        raise ConfigError(f"--full_every is {options['full_every']}; give a number from 1 up")
    if not options["max_delta"] >= 0:
        raise ConfigError(f"--max_delta is {options['max_delta']}; give a share from 0 up, such as 0.3")
    if config.is_live or config.ckpt_dir is None:
        raise ConfigError("format is live, and watch exports the checkpoints of a training run; set ckpt_dir")
    if config.step is not None:
        raise ConfigError(f"step is {config.step}, and watch takes the latest one; leave step out")
    if scheme_of(config.ckpt_dir) is not None and "://" not in config.ckpt_dir:
        raise ConfigError(f"ckpt_dir {config.ckpt_dir} is no directory of a training run, which watch follows")
    full_every = options["full_every"]
    rules = Rules(
        base=config.base, full_every=full_every, max_delta=options["max_delta"], until_step=options["until_step"]
    )
    return WatchSettings(config, rules, options["poll_secs"])


def watch(ranks: LastingRanks, argv: Sequence[str]) -> int:
    """Export until SIGTERM comes; return the exit code. All ranks. DistExportError for a mistake in the settings."""
    settings = ranks.run("read the settings", lambda: read_rules(argv))
    loop = Watch(
        ranks,
        settings.config,
        settings.rules,
        poll_secs=settings.poll_secs,
        announce=print_now,
    )
    loop.run()
    return 0


def _defaults_of(values: dict[str, Any]) -> Mapping[str, Any]:
    """Return the settings that watch has by default. ConfigError without a directory of versions, or for a trainer's dumps."""
    if values.get("format") == TZREC_DELTA:
        raise ConfigError("format is tzrec_delta, and watch exports checkpoints; export dumps by a command each")
    if not values.get("publish") and not str(values.get("export_dir") or "").startswith(VERSIONS):
        raise ConfigError(
            "publish is not set; watch needs a directory of versions, in the config file or as --publish DIR"
        )
    if values["full_every"] == 1 or values.get("need_export_sparse") is False:
        return {}
    if "base" in values and values["base"] is None:
        return {}
    defaults = {"base": LATEST, "on_base_mismatch": "full", "filter_sparse_opt": True}  # deltas need new shards
    return {name: default for name, default in defaults.items() if values.get(name) is None}
