"""What each room needs of the settings. ``ExportConfig`` has all of it; a function states the least that it reads.

A room outside of the pipeline takes one of these and not the whole, so that what a setting can change is seen from the types.
:mod:`~dist_export.config.source_needs` has those of opening a source and planning its tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol


class ArchNames(Protocol):
    """Where the two arches are within the model."""

    @property
    def sparse_model_name(self) -> str:
        """The path of the sparse arch."""

    @property
    def dense_model_name(self) -> str:
        """The path of the dense arch."""


class Tolerance(Protocol):
    """How far scores may differ: ``atol + rtol * |value|``."""

    @property
    def atol(self) -> float:
        """The absolute part."""

    @property
    def rtol(self) -> float:
        """The relative part."""


class Comparisons(Tolerance, Protocol):
    """How scores of the sample are compared."""

    @property
    def max_batch_size(self) -> int:
        """Examples of the largest batch."""


class ExportedTables(Protocol):
    """Whether there are tables at all."""

    @property
    def need_export_sparse(self) -> bool:
        """Whether tables are exported."""


class MissingTables(ArchNames, ExportedTables, Protocol):
    """What of the model's tables the checkpoint may lack."""

    @property
    def allow_missing_tables(self) -> Sequence[str]:
        """Patterns of tables that may be missing."""


class ModelValues(ArchNames, ExportedTables, Protocol):
    """What of the model's other values may be missing, too many, or changed by hooks."""

    @property
    def ckpt_dir(self) -> str | None:
        """The checkpoint; None for a model in memory."""

    @property
    def allow_missing_dense(self) -> Sequence[str]:
        """Patterns of parameters that the checkpoint may lack."""

    @property
    def allow_unexpected_dense(self) -> Sequence[str]:
        """Patterns of parameters that the model may lack."""

    @property
    def allow_load_hooks(self) -> Sequence[str]:
        """Patterns of hooks that load a state and may do so."""


class UserCallables(ExportedTables, Protocol):
    """What the settings name of the caller's code."""

    @property
    def is_live(self) -> bool:
        """Whether the model in memory is the source."""

    @property
    def model(self) -> str | None:
        """The callable that returns the model."""

    @property
    def model_args(self) -> Mapping[str, Any]:
        """Its keyword arguments."""

    @property
    def dataset(self) -> str | None:
        """The callable that returns batches."""

    @property
    def dataset_args(self) -> Mapping[str, Any]:
        """Its keyword arguments."""

    @property
    def fg(self) -> str | None:
        """The callable that returns the feature generator."""

    @property
    def fg_args(self) -> Mapping[str, Any]:
        """Its keyword arguments."""


class ReplacedPackage(UserCallables, Protocol):
    """What becomes of a package, or of an unfinished export, that is in the target already."""

    @property
    def ckpt_dir(self) -> str | None:
        """The checkpoint; None for a model in memory."""

    @property
    def overwrite(self) -> bool:
        """Whether another package is replaced."""

    @property
    def on_unfinished(self) -> str:
        """``resume``, ``restart`` or ``error``."""


class DriftSettings(Comparisons, ArchNames, ExportedTables, Protocol):
    """How drift is measured and bounded."""

    @property
    def drift_batches(self) -> int:
        """Most batches that are scored."""

    @property
    def max_drift(self) -> float | dict[str, float] | None:
        """The bound on ``max_abs``, of all outputs or by output; None for none."""

    @property
    def dynamic_dims(self) -> Mapping[str, Mapping[int, str]]:
        """Free sizes besides the batch."""

    @property
    def max_memory_bytes(self) -> int:
        """Bytes that buffers may take on a rank."""

    @property
    def prune(self) -> Sequence[Mapping[str, Any]]:
        """Rules that leave rows behind."""

    @property
    def default_row(self) -> Mapping[str, Any]:
        """Rows of serving for ids without one, by pattern."""

    @property
    def on_duplicate(self) -> str:
        """What happens to ids that a table has twice."""

    @property
    def rename_tables(self) -> Mapping[str, str]:
        """Name in the checkpoint -> in the package."""


class DenseSettings(DriftSettings, ModelValues, MissingTables, Protocol):
    """What the dense stage needs: the arches, their values, the sample, the program and its formats."""

    @property
    def device(self) -> str | None:
        """Where the dense arch runs; None for where it is."""

    @property
    def archive_format(self) -> Literal["pt2", "legacy"]:
        """Layout of the program's file."""

    @property
    def export_folder_name(self) -> str:
        """The folder of the dense arch."""

    @property
    def export_model_name(self) -> str:
        """The name of the model within it."""

    @property
    def export_outputs(self) -> list[str] | None:
        """Names of the outputs; None for those that the dense arch gives."""

    @property
    def dense_formats(self) -> Sequence[str]:
        """Other formats of the dense arch."""

    @property
    def layouts(self) -> Sequence[str]:
        """Layouts of other servers."""


class ScoreSettings(DenseSettings, Protocol):
    """What the score program and the serving contract need besides."""

    @property
    def score_program(self) -> str:
        """``auto``, ``require`` or ``off``."""

    @property
    def lookup_modules(self) -> Sequence[str]:
        """Patterns of modules that are lookups as a whole."""

    @property
    def serving(self) -> Any:
        """``auto``, ``off``, or statements of the contract."""


class EventSettings(Protocol):
    """Where events go."""

    @property
    def events(self) -> bool | str:
        """Whether they are written, or the URL."""

    @property
    def options_of_target(self) -> dict[str, Any]:
        """Options for the store of the package."""
