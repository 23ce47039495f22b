"""What an export asks of the dense parameters of a checkpoint; every format answers in its own way."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from dist_export.checkpoint.metadata import SourceFile
from dist_export.checkpoint.recis.model_pt import describe_dense_state, load_dense_state
from dist_export.checkpoint.tensors.classify import Skipped
from dist_export.errors import CheckpointError
from dist_export.formats.recis import DENSE_STATE, FILTER_STEP
from dist_export.storage.directory import Directory


class DenseParameters(Protocol):
    """The dense parameters of one checkpoint. Cheap to build, on any rank; rank 0 alone asks for them."""

    where: str
    """Where they lie, for messages."""

    def describe(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return (name within the model, torch dtype name, shape) of each, without reading payload; empty for none.

        Raises:
            CheckpointError: what holds them cannot be read, or the checkpoint is not complete.
        """

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be told of how they were found, each a sentence; readers of tables tell the same."""

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What would be among them, and cannot be read."""

    @property
    def left_out(self) -> tuple[Skipped, ...]:
        """Tensors of other states of the checkpoint."""

    def list_files(self) -> tuple[SourceFile, ...]:
        """Return the files that hold them, as far as these are no small files of the format."""

    def load(self) -> Mapping[str, Any]:
        """Return name within the model -> CPU tensor, or ``UntakenState`` of what is there and cannot be read.

        Raises:
            CheckpointError: there are none, or they cannot be read.
        """


class RecisDense:
    """``model.pt``, beside the shards of a RecIS checkpoint. See :class:`DenseParameters`."""

    notes: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    left_out: tuple[Skipped, ...] = ()

    def __init__(self, directory: Directory, *, tables: Collection[str] = ()) -> None:
        """Read nothing yet; ``tables`` are names of what is exported as a table and is no dense parameter."""
        self._tables = tables
        self.where = directory.describe(DENSE_STATE)
        self._directory = directory

    def describe(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return what ``model.pt`` holds; nothing where there is none."""
        return [tensor for tensor in describe_dense_state(self._directory) or [] if tensor[0] not in self._tables]

    def list_files(self) -> tuple[SourceFile, ...]:
        """Return nothing: ``model.pt`` is a small file of the format."""
        return ()

    def load(self) -> Mapping[str, Any]:
        """Return what ``model.pt`` holds, but for counters that only training reads."""
        state = load_dense_state(self._directory)
        return {name: value for name, value in state.items() if not name.endswith(FILTER_STEP)}


class NoDense:
    """A source without dense parameters. See :class:`DenseParameters`."""

    notes: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    left_out: tuple[Skipped, ...] = ()

    def __init__(self, directory: Directory, reason: str) -> None:
        """``reason``: what it is and what to do, as the rest of a sentence about its path."""
        self.where = directory.url
        self._reason = reason

    def describe(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return nothing."""
        return []

    def list_files(self) -> tuple[SourceFile, ...]:
        """Return nothing."""
        return ()

    def load(self) -> Mapping[str, Any]:
        """Say that there is nothing to load."""
        raise CheckpointError(f"{self.where} {self._reason}")
