"""Reader of safetensors files that RecIS did not write: one, several with an index, or shards that DCP wrote.

Source: the safetensors format specification, Hugging Face's index files, and torch 2.13's ``HuggingFaceStorageWriter``,
whose shards say in ``__metadata__`` where in its tensor each piece belongs (``DCP_SHARDING_INFO``: JSON, name ->
``{"saved_offsets": [row, column]}``), and nowhere how large the tensor is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from dist_export.checkpoint.metadata import Checkpoint, SourceFile
from dist_export.checkpoint.raw_ids import Piece
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.checkpoint.tensors.classify import join_pieces
from dist_export.checkpoint.tensors.common import PlainFacts, make_checkpoint, open_files, stat_files
from dist_export.checkpoint.tensors.weight_map import match_weight_map, note_missing_parts, read_weight_map
from dist_export.errors import CheckpointError
from dist_export.formats.dtypes import ITEMSIZES
from dist_export.formats.safetensors import decode_foreign_header, header_length
from dist_export.formats.strict_json import decode_object, is_text, show
from dist_export.storage.directory import Directory

INDEX_JSON = "model.safetensors.index.json"
SUFFIX = ".safetensors"
_WHOLE = "model.safetensors"
_SHARDING = "DCP_SHARDING_INFO"
_RECIS_SHARD = re.compile(r"model-\d{6}-of-\d{6}\.safetensors")
"""Other writers have five digits."""
_NO_SHAPE = "they do not say how many rows there are, so a last shard that is missing would not be seen"


class Entry(NamedTuple):
    """A tensor, or a piece of one, in a file."""

    name: str
    dtype: str
    """Torch's name."""
    is_whole: bool
    piece: Piece


class SafetensorsShare(NamedTuple):
    """What one rank read, in the order of files."""

    entries: tuple[Entry, ...]


class SafetensorsReader:
    """Reads one safetensors checkpoint. See :class:`~dist_export.checkpoint.metadata.CheckpointReader`."""

    def __init__(
        self,
        directory: Directory,
        settings: TensorSettings = TensorSettings(),  # noqa: B008 -- immutable
    ) -> None:
        """Find the files. CheckpointError where there is none, or the index names one that is missing."""
        self.directory = directory
        self._settings = settings
        self._notes: tuple[str, ...] = ()
        self._weight_map = read_weight_map(directory, INDEX_JSON) if directory.exists(INDEX_JSON) else None
        there = [name for name in directory.names() if name.endswith(SUFFIX)]
        names = sorted(set(self._weight_map.values())) if self._weight_map is not None else there
        if self._weight_map is None and _WHOLE in there:
            names = [_WHOLE]
        if not names:
            raise CheckpointError(
                f"{directory.url}: no safetensors file among its {len(directory.names())} files; looked for {INDEX_JSON}, "
                f"{_WHOLE} and *{SUFFIX}"
            )
        strays = [name for name in there if name not in names]
        if strays:
            known = INDEX_JSON if self._weight_map is not None else _WHOLE
            self._notes = (f"{len(strays)} files beside {known} are not of it and stay behind, first {strays[0]}",)
        if self._weight_map is None:
            self._notes += note_missing_parts(directory, names)
        self.files: tuple[SourceFile, ...] = stat_files(directory, names)

    def read_headers(self, files: range) -> SafetensorsShare:
        """Read and check the headers of these files."""
        found: list[Entry] = []
        try:
            with open_files(self.directory, self.files) as readers:
                for number in files:
                    size, reader = self.files[number].size, readers[number]
                    prefix = bytearray(min(8, size))
                    reader.read_into(memoryview(prefix), 0)
                    raw = reader.read_text(8, header_length(bytes(prefix), path=reader.where, file_size=size))
                    found += _read_entries(raw, size, number, reader.where)
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read: {error.strerror or error}") from None
        return SafetensorsShare(tuple(found))

    def join(self, shares: Sequence[SafetensorsShare]) -> PlainFacts:
        """Put pieces together. CheckpointError where a tensor stands twice or has a gap, or the index says otherwise."""
        entries = [entry for share in shares for entry in share.entries]
        if self._weight_map is not None:
            held = ((entry.name, self.files[entry.piece.file].name) for entry in entries)
            match_weight_map(self._weight_map, held, where=self.directory.describe(INDEX_JSON))
        tensors = join_pieces(
            ((e.name, e.dtype, e.piece.sizes if e.is_whole else None, e.piece) for e in entries),
            where=self.directory.url,
            paths=[self.directory.describe(file.name) for file in self.files],
        )
        notes = self._notes
        if any(len(tensor.pieces) > 1 for tensor in tensors):
            notes += (f"tensors are put together from {len(self.files)} files of shards; {_NO_SHAPE}",)
        return PlainFacts(tensors, notes)

    def assemble(self, shares: Sequence[SafetensorsShare]) -> Checkpoint:
        """Build the metadata from the headers of all files."""
        return make_checkpoint(self.directory, self.files, self.join(shares), self._settings, kind="safetensors")


def find_safetensors_files(directory: Directory) -> list[str]:
    """Return the safetensors files by name; none where RecIS wrote some of them."""
    names = [name for name in directory.names() if name.endswith(SUFFIX)]
    return [] if any(map(_RECIS_SHARD.fullmatch, names)) else names


def _read_entries(raw: bytes, size: int, number: int, where: str) -> list[Entry]:
    found, metadata = decode_foreign_header(raw, path=where, file_size=size)
    offsets = None
    if _SHARDING in metadata:
        offsets = decode_object(metadata[_SHARDING], what=f"{where}: {_SHARDING}")
    entries = []
    for name, dtype, shape, begin, _ in found:
        if not name or not is_text(name):
            raise CheckpointError(
                f"{where} holds a tensor called {name!r}; a table or parameter needs a name; save it with one"
            )
        first = (0,) * len(shape) if offsets is None else _offsets_of(offsets.get(name), shape, f"{where}: {name!r}")
        strides = []
        stride = ITEMSIZES.get(dtype, 0)  # where it is not read, only the shape counts
        for length in reversed(shape):
            strides.append(stride)
            stride *= max(length, 1)
        entries.append(
            Entry(name, dtype, offsets is None, Piece(first, shape, number, begin, tuple(reversed(strides))))
        )
    return entries


def _offsets_of(info: object, shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    offsets = info.get("saved_offsets") if isinstance(info, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != len(shape)
        or not all(type(offset) is int and 0 <= offset < 1 << 48 for offset in offsets)
    ):
        raise CheckpointError(
            f"{where}: {_SHARDING} says {show(info)}; expected saved_offsets with {len(shape)} numbers from 0 up"
            ". Copy the checkpoint again, or take an earlier one"
        )
    return tuple(offsets)
