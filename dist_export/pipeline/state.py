"""What an export knows: a frozen state that grows from step to step."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_export.checkpoint.dense import DenseParameters
from dist_export.checkpoint.metadata import Checkpoint, SourceFile
from dist_export.checkpoint.model_weights import ModelWeights
from dist_export.commit.publish import DenseMeta
from dist_export.config.schema import ExportConfig
from dist_export.dense.fg import Features
from dist_export.formats.tuning import Tuning
from dist_export.manifest import FileEntry, Manifest, TableEntry
from dist_export.model.user_objects import Objects
from dist_export.package.reader import Package
from dist_export.pipeline.locate import Locations
from dist_export.pipeline.planning import PlannedSparse
from dist_export.pipeline.reused_program import TakenOver
from dist_export.pipeline.target import ExportPaths
from dist_export.reporting.progress import Reporter
from dist_export.runtime.ranks import Ranks
from dist_export.storage.directory import Directory
from dist_export.transfer.casting import Counts
from dist_export.transfer.work_done import Share
from dist_export.workdir.presence import Written
from dist_export.workdir.state import Receipt

if TYPE_CHECKING:
    from dist_export.contract.stage import ContractStage
    from dist_export.dense.stage import DenseStage
    from dist_export.score.stage import ScoreStage


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one export is asked to do, and with what. The same object for all steps of a rank."""

    ranks: Ranks
    config: ExportConfig
    """With the paths that ``located`` found."""
    objects: Objects
    located: Locations
    reporter: Reporter
    weights: ModelWeights | None
    """What the model says of a checkpoint's tensors."""
    export_dir: str
    """Where the package goes, the day's subfolder included."""
    held: contextlib.ExitStack
    """Claims and temporary directories, given back when the export ends."""
    started: float
    """Seconds since the epoch."""
    traffic: Mapping[str, int]
    """The requests to stores that this process had made before."""
    tuning: Tuning
    """The sizes of pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What was read of the source, before anything is planned."""

    checkpoint: Checkpoint | None
    """None where only a model is exported, or one in memory without tables."""
    fg_conf: Any
    mc_conf: Any
    features: Features
    parameters: DenseParameters | None
    held_state: DenseMeta
    """All dense tensors of the checkpoint."""
    trainer_state: DenseMeta
    """Those of them that only training needs, where the filter drops these."""
    small_files: Mapping[str, SourceFile]
    """The state of each small file, and of files with dense parameters alone, to notice a change. The same on all ranks."""
    identity: str
    """A digest of the source and of the settings that shape the package."""
    has_manifest: bool
    """Whether the source has a manifest: it may be a package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportState:
    """What is known after a step. Each step returns a new one with more; fields that come later are empty."""

    task: Task
    paths: ExportPaths
    notes: tuple[str, ...] = ()
    read: Source | None = None
    base: Package | None = None
    """What a delta goes on top of; None in a full export."""
    planned: PlannedSparse | None = None
    """None where no tables are exported."""
    taken_over: TakenOver = dataclasses.field(default_factory=TakenOver)
    dense: DenseStage | None = None
    """None where no dense arch is exported."""
    scores: ScoreStage | None = None
    """None if no score program is exported."""
    contract: ContractStage | None = None
    """None if no serving contract is stated."""
    dense_state: DenseMeta = ()
    """The dense tensors that the package's index names. Rank 0."""
    refuse_if_lost: Callable[[], None] = lambda: None
    """Raises where another export has taken the target."""
    scratch: str = ""
    """The directory on rank 0's disk where the small files are made."""
    receipts: tuple[Receipt, ...] = ()
    shares: tuple[Share, ...] = ()
    reused: int = 0
    casts: Counts = dataclasses.field(default_factory=dict)
    tables: tuple[TableEntry, ...] = ()
    index_files: tuple[FileEntry, ...] = ()
    """The files of row indexes, and those of row fingerprints."""
    deleted_files: tuple[FileEntry, ...] = ()
    """The files of deleted ids; none in a full export."""
    small_files: tuple[FileEntry, ...] = ()
    written: Written = dataclasses.field(default_factory=dict)
    """Each file of the package with its size and version as it was checked. Rank 0."""
    exchanged: Mapping[str, int] | None = None
    """The requests of all ranks to stores; None where no store is used."""
    registered: tuple[str, ...] = ()
    """The new version in a registry, if there is one."""
    manifest: Manifest | None = None
    """Set by the step that ends the export: the commit, or the one that finds the same package."""
    is_same: bool = False
    """The package was there already."""

    @property
    def source(self) -> Source:
        """What was read; only after ``read_source``."""
        assert self.read is not None
        return self.read

    @property
    def target(self) -> Directory:
        """The directory in which files are written."""
        return self.paths.target

    @property
    def in_place(self) -> bool:
        """Whether the package is made of the checkpoint's own files, which stay as they are."""
        return self.paths.in_place

    def grown(self, *, notes: tuple[str, ...] | list[str] = (), **changes: Any) -> ExportState:
        """Return a state with ``changes``, and with more ``notes``."""
        return dataclasses.replace(self, notes=(*self.notes, *notes), **changes)
