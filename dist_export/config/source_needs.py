"""What opening a source and planning its tables need of the settings, in groups like those of ``needs.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from dist_export.config.needs import ArchNames, ExportedTables


class SourceStorage(Protocol):
    """How the files of the source are reached."""

    @property
    def storage_options(self) -> dict[str, Any]:
        """Options for the source's file system."""

    @property
    def follow_links(self) -> bool:
        """Whether links may lead out of the directory."""


class CheckpointTensors(ArchNames, Protocol):
    """What the tensors of a checkpoint are, where their names do not tell."""

    @property
    def format(self) -> str:
        """The format of the checkpoint, or ``auto``."""

    @property
    def treat_as_tables(self) -> Sequence[str]:
        """Patterns of tensors that are tables."""

    @property
    def optimizer_slots(self) -> Sequence[str]:
        """Patterns of slots that only training needs."""

    @property
    def state_root(self) -> str | None:
        """The state to read, of several in one checkpoint."""


class RunOfCheckpoints(CheckpointTensors, SourceStorage, ExportedTables, Protocol):
    """Which checkpoints of a training run are complete."""


class ChosenTables(Protocol):
    """Which tables are exported, and how they are seen."""

    @property
    def select_tables(self) -> Sequence[str]:
        """Patterns of tables that are exported."""

    @property
    def drop_tables(self) -> Sequence[str]:
        """Patterns of tables that are not."""

    @property
    def rename_tables(self) -> Mapping[str, str]:
        """Name in the checkpoint -> in the package."""

    @property
    def to_hash_tables(self) -> Sequence[str]:
        """Patterns of row-indexed tables that become hash tables."""

    @property
    def default_row(self) -> Mapping[str, Literal["zeros"] | list[float]]:
        """Rows of serving for ids without one, by pattern."""

    @property
    def dtypes(self) -> Sequence[tuple[str, str]]:
        """Dtypes of rows as (pattern, dtype)."""


class OpenedTables(CheckpointTensors, ChosenTables, Protocol):
    """How the tables of a checkpoint are opened."""

    @property
    def filter_sparse_opt(self) -> bool | None:
        """Whether new shards are written; None before the format is known."""

    @property
    def dynamicemb_dims(self) -> dict[str, int]:
        """Dimensions of DynamicEmb tables, by pattern."""


class OpenedSource(OpenedTables, ExportedTables, Protocol):
    """How a source is opened, with its model."""

    @property
    def allow_hashed_ids(self) -> Sequence[str]:
        """Patterns of tables whose ids the model hashes."""


class ConfFiles(Protocol):
    """Where fg and mc come from, and how they are checked."""

    @property
    def fg_conf_or_path(self) -> str | dict[str, Any] | None:
        """The feature generator's conf, or its path."""

    @property
    def mc_conf_or_path(self) -> str | dict[str, Any] | None:
        """The model's conf, or its path."""

    @property
    def fg_rules(self) -> Literal["rtp", "none"]:
        """The rules that fg must keep."""


class KeptSlots(Protocol):
    """Which slots stay, and in how many shards."""

    @property
    def filter_sparse_opt(self) -> bool | None:
        """Whether new shards are written."""

    @property
    def optimizer_slots(self) -> Sequence[str]:
        """Patterns of slots that only training needs."""

    @property
    def drop_slots(self) -> Sequence[str]:
        """Patterns of slots that are dropped."""

    @property
    def keep_slots(self) -> Sequence[str]:
        """Patterns of slots that are kept all the same."""

    @property
    def dtypes(self) -> Sequence[tuple[str, str]]:
        """Dtypes of rows as (pattern, dtype)."""

    @property
    def num_shards(self) -> int | Literal["world_size", "source"] | None:
        """How many shards are written."""


class PrunedRows(Protocol):
    """Rules that leave rows out, and what reading them takes."""

    @property
    def prune(self) -> Sequence[Mapping[str, Any]]:
        """The rules."""

    @property
    def max_memory_bytes(self) -> int:
        """Bytes that buffers may take on a rank."""

    @property
    def storage_options(self) -> dict[str, Any]:
        """Options for the file system of lists of ids."""


class PlannedTables(KeptSlots, PrunedRows, Protocol):
    """How tables are counted and laid out."""

    @property
    def threads(self) -> int | None:
        """Threads of a rank; None for a number that fits the machine."""

    @property
    def on_duplicate(self) -> Literal["error", "first", "last"]:
        """What happens to ids that a table has twice."""

    @property
    def on_misplaced(self) -> str:
        """``repair`` or ``error``."""

    @property
    def on_empty_table(self) -> str:
        """``error`` or ``allow``."""

    @property
    def compare(self) -> str:
        """``fingerprints`` or ``exact``."""

    @property
    def delta_ignore_slots(self) -> Sequence[str]:
        """Slots that are not compared with a base."""


class FittedBase(KeptSlots, PrunedRows, Protocol):
    """What must fit a base."""

    @property
    def base(self) -> str | None:
        """The package that a delta goes on top of."""

    @property
    def on_base_mismatch(self) -> str:
        """``error`` or ``full``."""


class BaseOfDelta(Protocol):
    """Where the base of a delta is, and which package of a chain is taken."""

    @property
    def base(self) -> str | None:
        """A package, a URI, or ``latest``."""

    @property
    def delta_chain(self) -> int:
        """How many deltas may be on top of each other."""

    @property
    def on_base_mismatch(self) -> str:
        """``error`` or ``full``."""

    @property
    def is_refresh(self) -> bool:
        """Whether the dense part is exported alone."""

    @property
    def export_dir(self) -> str:
        """Where the package goes."""

    @property
    def options_of_target(self) -> dict[str, Any]:
        """Options for the store of the package."""


class DumpRange(Protocol):
    """Which of a trainer's dumps are taken, over which base."""

    @property
    def base(self) -> str | None:
        """The package below."""

    @property
    def since_step(self) -> int | None:
        """The step after which they are taken; None for that of the base."""

    @property
    def until_step(self) -> int | None:
        """The last step that is taken."""


class TakenDumps(DumpRange, Protocol):
    """How a trainer's dumps are read."""

    @property
    def allow_ragged(self) -> bool:
        """Whether ranks may have dumped different steps."""

    @property
    def dtypes(self) -> Sequence[tuple[str, str]]:
        """Dtypes of rows, which dumps do not take."""

    @property
    def max_memory_bytes(self) -> int:
        """Bytes that buffers may take on a rank."""


class Registries(Protocol):
    """How registries are reached."""

    @property
    def registry_options(self) -> dict[str, Any]:
        """Options by scheme."""

    @property
    def options_of_target(self) -> dict[str, Any]:
        """Options for the store of the package."""

    @property
    def keep_versions(self) -> int | None:
        """How many versions stay in a directory of versions."""


class RegisteredExport(Registries, SourceStorage, Protocol):
    """How a package is registered, with the place of its source."""


class FilesBesideShards(Protocol):
    """Which files are written beside shards."""

    @property
    def row_index(self) -> bool:
        """Whether row indexes are written."""

    @property
    def row_fingerprints(self) -> bool | Literal["auto"]:
        """Whether row fingerprints are written."""

    @property
    def register(self) -> str | None:
        """The registry's URI of the new version."""

    @property
    def is_refresh(self) -> bool:
        """Whether the dense part is exported alone."""


class WatchedRun(RunOfCheckpoints, Registries, Protocol):
    """What ``watch`` looks at."""

    @property
    def ckpt_dir(self) -> str | None:
        """The run."""

    @property
    def export_dir(self) -> str:
        """The directory of versions."""
