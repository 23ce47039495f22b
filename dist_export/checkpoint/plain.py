"""What the readers of plain tensors have in common: from located tensors to a checkpoint, and to dense parameters."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import xxhash

from dist_export.checkpoint.reader import Checkpoint, SourceFile
from dist_export.checkpoint.tensors import (
    Sorted,
    StoredTensor,
    build_numbered,
    listed,
    say_no_tables,
    sort_tensors,
)
from dist_export.errors import CheckpointError
from dist_export.readers import OpenReaders
from dist_export.storage import Directory

if TYPE_CHECKING:
    import torch

_COPY = "its tables lie in files that RecIS and serving cannot read"


class PlainFacts(NamedTuple):
    """All that the files of a plain checkpoint say."""

    tensors: tuple[StoredTensor, ...]
    notes: tuple[str, ...]


class Patterns(NamedTuple):
    """What the settings say of tensors whose names do not tell what they are."""

    tables: tuple[str, ...] = ()
    optimizer_slots: tuple[str, ...] = ()


def sort_facts(directory: Directory, facts: PlainFacts, patterns: Patterns) -> Sorted:
    """Tell tables, state and dense parameters apart. CheckpointError for patterns that cannot be meant."""
    return sort_tensors(
        facts.tensors, where=directory.url, tables=patterns.tables, optimizer_slots=patterns.optimizer_slots
    )


def make_checkpoint(
    directory: Directory, files: tuple[SourceFile, ...], facts: PlainFacts, patterns: Patterns, *, kind: str
) -> Checkpoint:
    """Build the metadata of a checkpoint of format ``kind``. CheckpointError for patterns that cannot be meant."""
    found = sort_facts(directory, facts, patterns)
    tables, parts, blocks, strips = build_numbered(found.tables)
    warnings = list(facts.notes)
    if found.other_state:
        warnings.append(
            f"optimizer state of no table, or that does not fit its table, is not read: {listed(found.other_state)}"
        )
    return Checkpoint(
        format=kind,
        directory=directory,
        files=files,
        tables=tables,
        parts=parts,
        blocks=blocks,
        dense=(),
        fingerprint=_fingerprint(files, facts),
        copy_hindrances=(_COPY,),
        verbatim={},
        warnings=tuple(warnings),
        strips=strips,
        optimizer_patterns=frozenset(patterns.optimizer_slots),
        no_tables="" if tables else say_no_tables(found, directory.url),
    )


class PlainReader(Protocol):
    """What the readers of this room have in common beside :class:`~dist_export.checkpoint.reader.CheckpointReader`."""

    files: tuple[SourceFile, ...]

    def read_headers(self, files: range) -> Any:
        """Read the headers of some files."""

    def join(self, shares: Sequence[Any]) -> PlainFacts:
        """Put together what all files say."""


class PlainDense:
    """What is neither a table nor optimizer state. See :class:`~dist_export.checkpoint.dense_parameters.DenseParameters`."""

    def __init__(self, directory: Directory, patterns: Patterns, open_reader: Callable[[], PlainReader]) -> None:
        self.where = directory.url
        self._directory = directory
        self._patterns = patterns
        self._open_reader = open_reader
        self._reader: PlainReader | None = None
        self._found: tuple[StoredTensor, ...] = ()

    def describe(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return name, dtype and shape of each."""
        return [(tensor.name, tensor.dtype, tensor.shape) for tensor in self._read()[1]]

    def load(self) -> Mapping[str, Any]:
        """Return the tensors, each read when it is asked for."""
        reader, found = self._read()
        return DenseTensors(self._directory, reader.files, found)

    def _read(self) -> tuple[PlainReader, tuple[StoredTensor, ...]]:
        if self._reader is None:
            self._reader = self._open_reader()
            self._found = sort_facts(self._directory, read_all(self._reader), self._patterns).dense
            if len(self._reader.files) == 1:
                self.where = self._directory.describe(self._reader.files[0].name)
        return self._reader, self._found


class DenseTensors(Mapping[str, Any]):
    """Dense parameters by name, each a CPU tensor that is read, or mapped where the directory is local, when asked for."""

    def __init__(self, directory: Directory, files: tuple[SourceFile, ...], dense: Sequence[StoredTensor]) -> None:
        self._directory = directory
        self._files = files
        self._tensors = {tensor.name: tensor for tensor in dense}
        self._mapped: dict[int, mmap.mmap] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        tensor = self._tensors[name]
        dtype = getattr(torch, tensor.dtype)
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
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

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


def read_all(reader: PlainReader) -> PlainFacts:
    """Return the facts of a reader of this room that one process reads alone."""
    return reader.join([reader.read_headers(range(len(reader.files)))])


def stat_files(directory: Directory, names: Sequence[str]) -> tuple[SourceFile, ...]:
    """Return the files with size and version. CheckpointError where one cannot be looked at."""
    files = []
    for name in names:
        try:
            found = directory.stat(name)
        except OSError as error:
            raise CheckpointError(f"{directory.describe(name)} cannot be read: {error.strerror or error}") from None
        files.append(SourceFile(name=name, size=found.size, version=found.version))
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
