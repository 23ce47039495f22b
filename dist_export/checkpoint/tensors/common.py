"""What the readers of plain tensors have in common: from located tensors to a checkpoint, and to dense parameters."""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from dist_export.checkpoint.extra_state import UntakenState, find_extra_state
from dist_export.checkpoint.indexed_tables import build_row_indexed
from dist_export.checkpoint.managed_collisions import attach_collisions, find_collisions, note_collisions, read_state
from dist_export.checkpoint.metadata import Checkpoint, SourceFile
from dist_export.checkpoint.payload import OtherTensor, Payload, count_payload
from dist_export.checkpoint.raw_ids import Piece, StoredTensor
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.checkpoint.tensors.classify import (
    Skipped,
    Sorted,
    Unread,
    listed,
    say_no_tables,
    sort_tensors,
)
from dist_export.errors import CheckpointError, UnaskedError
from dist_export.storage.directory import Directory
from dist_export.storage.range_reader import OpenReaders

if TYPE_CHECKING:
    import torch

_COPY = "its tables lie in files that RecIS and serving cannot read"


class PlainFacts(NamedTuple):
    """All that the files of a plain checkpoint say."""

    tensors: tuple[StoredTensor, ...]
    notes: tuple[str, ...]
    rest: tuple[OtherTensor, ...] = ()
    """What else the files hold, and nobody reads."""
    unread: Unread = Unread()
    """What the files say of the tensors besides."""


def sort_facts(directory: Directory, facts: PlainFacts, settings: TensorSettings) -> Sorted:
    """Tell tables, state and dense parameters apart. CheckpointError for patterns that cannot be meant."""
    return sort_tensors(facts.tensors, settings, where=directory.url, unread=facts.unread)


def make_checkpoint(
    directory: Directory, files: tuple[SourceFile, ...], facts: PlainFacts, settings: TensorSettings, *, kind: str
) -> Checkpoint:
    """Build the metadata of a checkpoint of format ``kind``.

    Raises:
        CheckpointError: a pattern that cannot be meant, or no tensor is a table.
    """
    found = sort_facts(directory, facts, settings)
    if not found.tables:
        raise UnaskedError(say_no_tables(found, directory.url))
    tensors = {tensor.name: tensor for tensor in found.dense}
    collisions = find_collisions(
        {table.name: table.weight.shape for table in found.tables},
        {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()},
        where=directory.url,
    )
    named = [table._replace(collision=read_state(collisions.get(table.name), tensors)) for table in found.tables]
    tables, parts, blocks, strips, made = build_row_indexed(named, where=directory.url)
    warnings = [*facts.notes, *found.notes, *note_collisions(collisions, [table.name for table in found.tables])]
    if found.other_state:
        warnings.append(f"optimizer state of no table stays behind: {listed(found.other_state)}")
    return Checkpoint(
        format=kind,
        directory=directory,
        files=files,
        tables=attach_collisions(tables, named, collisions, directory, files),
        parts=parts,
        blocks=blocks,
        dense=(),
        fingerprint=_fingerprint(files, facts),
        copy_hindrances=(_COPY,),
        verbatim={},
        warnings=tuple(warnings),
        strips=strips,
        made=made,
        optimizer_patterns=frozenset(settings.optimizer_slots),
        payload=_list_payload(facts, found),
    )


def _list_payload(facts: PlainFacts, found: Sorted) -> Payload:
    tensors, num_bytes = count_payload((tensor.dtype, tensor.shape) for tensor in facts.tensors)
    return Payload(
        tensors=tensors + len(facts.rest),
        num_bytes=num_bytes + sum(tensor.num_bytes for tensor in facts.rest),
        others=(*found.others, *facts.rest),
        aliases=found.aliases,
    )


class PlainDense:
    """See :class:`~dist_export.checkpoint.dense.DenseParameters`."""

    def __init__(
        self, directory: Directory, make: Callable[[Directory, TensorSettings], Any], settings: TensorSettings
    ) -> None:
        """Read nothing yet. ``make`` opens the reader of the format."""
        self.where = directory.url
        self._directory = directory
        self._make = make
        self._settings = settings

    def describe(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return what the headers say of all that is neither a table nor optimizer state."""
        return [(tensor.name, tensor.dtype, tensor.shape) for tensor in self._read()[1].dense]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was chosen, and what is skipped."""
        return self._read()[1].notes

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What would be dense, and cannot be read."""
        return self._read()[1].skipped

    @property
    def left_out(self) -> tuple[Skipped, ...]:
        """Tensors of other states than the model's."""
        return self._read()[1].left_out

    def list_files(self) -> tuple[SourceFile, ...]:
        """Return all files of the checkpoint."""
        files: tuple[SourceFile, ...] = self._make(self._directory, self._settings).files
        return files

    def load(self) -> Mapping[str, Any]:
        """Return them, each read, or mapped where the directory is local, when asked for; and why others are not read."""
        return _Parameters(*self._read())

    def _read(self) -> tuple[Any, Sorted]:
        reader = self._make(self._directory, self._settings)
        if len(reader.files) == 1:
            self.where = self._directory.describe(reader.files[0].name)
        return reader, sort_facts(self._directory, read_all(reader), self._settings)


class _Parameters(Mapping[str, Any]):
    """Tensors by name, on the CPU; of one that is not read, why."""

    def __init__(self, reader: Any, found: Sorted) -> None:
        self._reader = reader
        self._directory: Directory = reader.directory
        self._files: tuple[SourceFile, ...] = reader.files
        every: tuple[StoredTensor | Skipped, ...] = (*found.dense, *found.skipped)
        self._tensors = {its.name: its for its in every if not _is_in_extra_state(its.name)}
        self._extra = found.extra
        self._mapped: dict[int, mmap.mmap] = {}

    def __getitem__(self, name: str) -> Any:
        import torch

        if name in self._extra:
            return self._extra_states[self._extra[name]]
        tensor = self._tensors[name]
        if isinstance(tensor, Skipped):
            return UntakenState(f"it is {tensor.reason}")
        dtype = getattr(torch, tensor.dtype, None)
        if dtype is None:
            return UntakenState(f"it is of dtype {tensor.dtype}, which torch {torch.__version__} does not have")
        try:
            pieces = [self._load(piece, dtype) for piece in tensor.pieces]
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror or error}") from None
        if len(pieces) == 1:
            return pieces[0]
        whole = torch.empty(tensor.shape, dtype=dtype)
        for piece, value in zip(tensor.pieces, pieces, strict=True):
            whole[tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.sizes, strict=True))] = value
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter({**self._tensors, **self._extra})

    def __len__(self) -> int:
        return len({**self._tensors, **self._extra})

    @functools.cached_property
    def _extra_states(self) -> dict[tuple[str, ...], Any]:
        found: dict[tuple[str, ...], Any] = self._reader.read_extra_states(self._make)
        return found

    def _make(self, dtype: str, piece: Piece) -> torch.Tensor:
        import torch

        return self._load(piece, getattr(torch, dtype))

    def _load(self, piece: Any, dtype: torch.dtype) -> torch.Tensor:
        import torch

        if not math.prod(piece.sizes):
            return torch.empty(piece.sizes, dtype=dtype)
        itemsize = dtype.itemsize
        count = (
            sum((size - 1) * stride // itemsize for size, stride in zip(piece.sizes, piece.strides, strict=True)) + 1
        )
        strides = [stride // itemsize for stride in piece.strides]
        name = self._files[piece.file].name
        if self._directory.is_local and piece.offset % itemsize == 0:
            if piece.file not in self._mapped:
                with self._directory.open_reader(name) as reader:
                    self._mapped[piece.file] = mmap.mmap(reader.fd, 0, access=mmap.ACCESS_COPY)
            flat = torch.frombuffer(self._mapped[piece.file], dtype=dtype, count=count, offset=piece.offset)
        else:
            buffer = bytearray(count * itemsize)
            with self._directory.open_reader(name) as reader:
                reader.read_into(memoryview(buffer), piece.offset)
            flat = torch.frombuffer(buffer, dtype=dtype)
        return flat.as_strided(piece.sizes, strides)


def _is_in_extra_state(name: str) -> bool:
    steps = name.split(".")
    return 0 < find_extra_state(steps) < len(steps)


def read_all(reader: Any) -> PlainFacts:
    """Return the facts of a reader of this room that one process reads alone."""
    facts: PlainFacts = reader.join([reader.read_headers(range(len(reader.files)))])
    return facts


def stat_files(directory: Directory, names: Sequence[str]) -> tuple[SourceFile, ...]:
    """Return the files with size and version. CheckpointError where one cannot be looked at."""
    files = []
    for name in names:
        try:
            files.append(SourceFile.of(name, directory.stat(name)))
        except OSError as error:
            raise CheckpointError(f"{directory.describe(name)} cannot be read: {error.strerror or error}") from None
    return tuple(files)


def open_files(directory: Directory, files: tuple[SourceFile, ...]) -> OpenReaders:
    """Return the files by number, opened when asked for."""
    return OpenReaders(lambda number: directory.open_reader(files[number].name), max_open=4)


def _fingerprint(files: tuple[SourceFile, ...], facts: PlainFacts) -> str:
    hasher = xxhash.xxh3_128()
    for file in files:
        hasher.update(repr((file.name, file.size, file.version)).encode())
    for tensor in facts.tensors:
        hasher.update(repr(tuple(tensor)).encode("utf-8", "surrogatepass"))
    return f"xxh3:{hasher.hexdigest()}"
