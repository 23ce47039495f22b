"""``.metadata`` of a ``torch.distributed.checkpoint`` directory: read without torch, and held against itself.

Source: torch 2.13's ``checkpoint/metadata.py`` and ``filesystem.py``, and the checkpoints that they write. The file is a
pickle; only the names that DCP itself puts there are admitted, and none of them is more than a name here. One object may
lie in many places of a pickle, so what is made of it is counted too. That it is there does not prove that the save was
finished.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from dist_export.checkpoint.chunk_cover import check_cover
from dist_export.errors import CheckpointError
from dist_export.formats.dtypes import is_torch_dtype
from dist_export.formats.pickle_machine import Machine
from dist_export.formats.pickle_values import Global, PickleError, Record, recorded

_MODULE = "torch.distributed.checkpoint"
_CLASSES = {
    *(
        (f"{_MODULE}.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
            *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        )
    ),
    (f"{_MODULE}.filesystem", "_StorageInfo"),
}
_IGNORED = {
    (f"{_MODULE}.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
"""What describes memory formats, layouts, and where the checkpoint was written."""
_MAX_DIMS = 64
_MAX_SIZE = 1 << 62
_MAX_NAME = 4_096
_MAX_STEPS = 64
"""Of a name, between its dots."""
_MAX_PATH = 63
_MAX_CELLS = 1 << 26
"""Of the grids that the chunks of all tensors together are laid out on, where they are not cut along one dimension alone."""
_CHUNK_COST, _NUMBER_COST = 16, 8
"""What a chunk counts for, and each of its dimensions, against 8 for each byte of the file: an honest one takes 100 bytes."""


class Chunk(NamedTuple):
    """A rectangle of a tensor, which is one item of a payload file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    """Relative to the directory of the checkpoint."""
    begin: int
    num_bytes: int
    """The item's range in the file, in bytes."""
    is_transformed: bool
    """Compressed or encrypted, so that the range does not hold what ``torch.save`` wrote."""


class TensorMeta(NamedTuple):
    """One tensor: its shape, torch's name of its dtype, and chunks that cover it without gap or overlap."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


class DcpMetadata(NamedTuple):
    """What a checkpoint says of itself."""

    tensors: dict[str, TensorMeta]
    objects: dict[str, Chunk]
    """Name -> where it is (no offsets, no sizes), of what is no tensor: an item of ``torch.save``."""
    paths: dict[str, tuple[Any, ...]]
    """Name -> path of keys in the nested state_dict that was saved, where it is told."""


def decode_metadata(raw: bytes, *, where: str, file_sizes: Callable[[str], int | None]) -> DcpMetadata:
    """Read a ``.metadata`` and check that all that it names is there.

    Args:
        raw: the file's content.
        where: the file, for messages.
        file_sizes: the size in bytes of a payload file, None where there is none.

    Raises:
        CheckpointError: it is no such file, asks for a name that DCP does not use, or the checkpoint is not complete.
    """
    machine = Machine(raw, lambda module, name: _find(module, name, where))
    try:
        document = machine.load()
    except PickleError as error:
        raise CheckpointError(
            f"{where} is damaged, it is no pickle that can be read: {error}"
            ". Copy the checkpoint again, or take an earlier one"
        ) from None
    try:
        return _Builder(machine, document, where, file_sizes).build()
    except PickleError as error:
        raise CheckpointError(
            f"{where} is no metadata of {_MODULE}: {error}. Copy the checkpoint again, or take an earlier one"
        ) from None


def _find(module: str, name: str, where: str) -> Global:
    """Return what stands for a name that DCP uses. CheckpointError for any other."""
    if (module, name) in _CLASSES or (module, name) in _IGNORED:
        return recorded(name)
    if (module, name) == ("torch", "Size"):
        return Global(name, lambda *arguments: _numbers(*arguments[:1] or ((),)))
    if module == "torch" and is_torch_dtype(name):
        return Global(name)
    raise CheckpointError(
        f"{where} names {module}.{name}, which {_MODULE} never writes there. It may be meant to run code, so it is not read"
    )


class _Builder:
    """Makes metadata of what the pickle holds, which may be anything."""

    def __init__(self, machine: Machine, document: Any, where: str, file_sizes: Callable[[str], int | None]) -> None:
        self._machine = machine
        self._document = document
        self._where = where
        self._file_sizes = file_sizes
        self._sizes: dict[str, int | None] = {}
        self._cells = 0

    def build(self) -> DcpMetadata:
        described, stored = _fields(self._document, "Metadata", "state_dict_metadata", "storage_data")
        if type(described) is not dict or type(stored) is not dict:
            raise PickleError("its state_dict_metadata and storage_data are no dicts")
        entries = {}
        for index, info in stored.items():
            fqn, offset = _fields(index, "MetadataIndex", "fqn", "?offset")  # left out of the pickle where it is None
            entries[_name(fqn), None if offset is None else _packed(_numbers(offset))] = info
        tensors: dict[str, TensorMeta] = {}
        objects: dict[str, Chunk] = {}
        for key, meta in described.items():
            name = _name(key)
            self._machine.charge(_CHUNK_COST)
            if type(meta) is Record and meta.kind == "BytesStorageMetadata":
                objects[name] = Chunk((), (), *self._place(entries.get((name, None)), name, None))
            else:
                tensors[name] = self._tensor(name, meta, entries)
        return DcpMetadata(tensors, objects, self._paths())

    def _tensor(self, name: str, meta: Any, entries: dict[tuple[str, bytes | None], Any]) -> TensorMeta:
        size, listed, properties = _fields(meta, "TensorStorageMetadata", "size", "chunks", "properties")
        shape = _numbers(size)
        if type(listed) is not list:
            raise PickleError(f"the chunks of {name!r} are no list")
        chunks = []
        cost = _CHUNK_COST + _NUMBER_COST * len(shape)
        for chunk in listed:
            self._machine.charge(cost)
            offsets, sizes = map(_numbers, _fields(chunk, "ChunkStorageMetadata", "offsets", "sizes"))
            info = entries.get((name, _packed(offsets)))
            chunks.append(Chunk(offsets, sizes, *self._place(info, name, offsets)))
        self._cells += check_cover(name, shape, chunks, self._where)
        if self._cells > _MAX_CELLS:
            raise CheckpointError(
                f"{self._where}: its tensors are cut into {self._cells:,} pieces, more than any trainer writes"
                ". Copy the checkpoint again, or take an earlier one"
            )
        return TensorMeta(name, shape, _dtype_of(properties), tuple(chunks))

    def _place(self, info: Any, name: str, offset: tuple[int, ...] | None) -> tuple[str, int, int, bool]:
        """Return the file, the range in it, and whether that was transformed."""
        where = self._where
        at = "" if offset is None else f" at {list(offset)}"
        if info is None:
            raise CheckpointError(
                f"{where}: no file holds {name!r}{at}; the save did not finish. Take an earlier checkpoint"
            )
        fields = ("relative_path", "offset", "length", "?transform_descriptors")
        file, begin, num_bytes, transforms = _fields(info, "_StorageInfo", *fields)
        if file not in self._sizes if type(file) is str else True:
            if type(file) is not str or len(file) > _MAX_NAME or file.startswith("/") or not _is_plain(file):
                shown = f"{file!r:.200}" if type(file) is str else f"a {type(file).__name__}"
                raise CheckpointError(
                    f"{where}: {name!r}{at} lies in {shown}, which is no file of the checkpoint"
                    ". Copy the checkpoint again, or take an earlier one"
                )
            self._sizes[file] = self._file_sizes(file)
        size = self._sizes[file]
        if size is None:
            raise CheckpointError(
                f"{where}: {file}, which holds {name!r}{at}, is missing; the save did not finish, or only a part was copied. "
                "Copy the checkpoint again, or take an earlier one"
            )
        begin, num_bytes = _numbers((begin, num_bytes))
        if begin + num_bytes > size:
            raise CheckpointError(
                f"{where}: {name!r}{at} ends at byte {begin + num_bytes:,} of {file}, which has {size:,}; the file is "
                "cut short, or the save did not finish. Copy the checkpoint again, or take an earlier one"
            )
        return file, begin, num_bytes, bool(transforms)

    def _paths(self) -> dict[str, tuple[Any, ...]]:
        (planned,) = _fields(self._document, "Metadata", "?planner_data")
        paths = {}
        for name, path in planned.items() if type(planned) is dict else ():
            if type(name) is str and type(path) is tuple:
                if len(path) > _MAX_PATH or not all(type(step) in (str, int) for step in path):
                    raise PickleError(f"the path of {name!r:.200} is no path")
                if any(type(step) is int for step in path) or sum(map(len, path)) > _MAX_NAME:
                    self._machine.check_key(path)
                    self._machine.check_key(path[:-1])
                paths[name] = path
        return paths


def _fields(record: Any, kind: str, *names: str) -> list[Any]:
    """Return fields of an object of a class. Those marked with ? may be missing, and are None then."""
    state = record.state if type(record) is Record and record.kind == kind else None
    if type(state) is tuple and len(state) == 2 and state[0] is None:
        state = state[1]  # of a class with slots
    if type(state) is not dict:
        raise PickleError(
            f"it has a {record.kind if type(record) is Record else type(record).__name__}, expected a {kind}"
        )
    found = []
    for name in names:
        if name[0] == "?":
            found.append(state.get(name[1:]))
        elif name in state:
            found.append(state[name])
        else:
            raise PickleError(f"a {kind} in it has no {name}")
    return found


def _dtype_of(properties: Any) -> str:
    state = properties.state if type(properties) is Record else None
    # torch pickles these as a tuple that begins with the dtype
    dtype = state.get("dtype") if type(state) is dict else state[0] if type(state) is tuple and state else None
    if type(dtype) is not Global or not is_torch_dtype(dtype.name):
        raise PickleError("a tensor in it has no dtype")
    return dtype.name


def _name(value: Any) -> str:
    if type(value) is not str:
        raise PickleError(f"a name in it is a {type(value).__name__}")
    if len(value) > _MAX_NAME or value.count(".") >= _MAX_STEPS:
        raise PickleError(f"it has the name {value[:100]!r}..., of {len(value):,} characters")
    return value


def _is_plain(file: str) -> bool:
    return file.isprintable() and "\\" not in file and all(step not in ("", ".", "..") for step in file.split("/"))


def _numbers(values: Any) -> tuple[int, ...]:
    if type(values) not in (tuple, list) or len(values) > _MAX_DIMS:
        raise PickleError(f"a {type(values).__name__} in it holds no sizes or positions")
    for value in values:
        if type(value) is not int or not 0 <= value < _MAX_SIZE:
            shown = value if type(value) is int else f"a {type(value).__name__}"
            raise PickleError(f"sizes or positions in it have {shown}, so they are no sizes or positions")
    return tuple(values)


def _packed(numbers: tuple[int, ...]) -> bytes:
    """Return numbers as a key. Tuples of numbers that have one hash are easily made; of bytes they are not."""
    return struct.pack(f"<{len(numbers)}q", *numbers)
