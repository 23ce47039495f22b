"""``.metadata`` of a ``torch.distributed.checkpoint`` directory: read without torch, and held against itself.

Source: torch 2.13's ``checkpoint/metadata.py`` and ``filesystem.py``, and the checkpoints that they write. The file is a
pickle; only the names that DCP itself puts there are admitted, and each becomes a class that lives for one read, so that
nothing in the file reaches torch or another read. That it is there does not prove that the save was finished.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dist_export.errors import CheckpointError
from dist_export.layout.dtypes import CODE_BY_TORCH

METADATA = ".metadata"

_OF_METADATA = (
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "MetadataIndex",
    "StorageMeta",
)
_DTYPES = frozenset(CODE_BY_TORCH) | {
    f"{kind}{bits}" for kind, sizes in {"uint": (16, 32, 64), "complex": (32, 64, 128)}.items() for bits in sizes
}
_MAX_DIMS = 64
_MAX_SIZE = 1 << 62
_MAX_CELLS = 1 << 24
"""Of the grid that a tensor's chunks are laid out on."""


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
    document = _unpickle(raw, where)
    try:
        return _build(document, where, file_sizes)
    except (AttributeError, TypeError, ValueError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{where} is no metadata of torch.distributed.checkpoint: {error}") from None


class _Record:
    """Stands for one of DCP's own classes."""

    def __init__(self, *arguments: Any, **fields: Any) -> None:
        self.arguments = arguments
        self.__dict__.update(fields)


def _unpickle(raw: bytes, where: str) -> Any:
    def text_of(*steps: str) -> str:
        return "/".join(str(step) for step in steps)

    def anything(*_: Any) -> None:
        return None

    kinds = {name: type(name, (_Record,), {}) for name in (*_OF_METADATA, "_StorageInfo")}
    properties = type("TensorProperties", (_Record,), {"__setstate__": _set_properties})

    def size_of(sizes: Any = ()) -> tuple[Any, ...]:
        return tuple(sizes)

    admitted: dict[tuple[str, str], Any] = {
        **{("torch.distributed.checkpoint.metadata", name): kinds[name] for name in _OF_METADATA},
        ("torch.distributed.checkpoint.metadata", "TensorProperties"): properties,
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): anything,
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): kinds["_StorageInfo"],
        ("torch.serialization", "_get_layout"): anything,
        ("torch", "Size"): size_of,
        **{(module, "PosixPath"): text_of for module in ("pathlib", "pathlib._local")},
        **{("torch", name): _DtypeName(name) for name in _DTYPES},
    }

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found = admitted.get((module, name))
            if found is None:
                raise CheckpointError(
                    f"{where} asks for {module}.{name}, which torch.distributed.checkpoint does not use for it; "
                    "it may be made to run code, and is not read"
                )
            return found

    try:
        return Unpickler(io.BytesIO(raw)).load()
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 -- a damaged pickle can raise anything
        raise CheckpointError(f"{where} is damaged, it is no pickle that can be read: {error}") from None


class _DtypeName:
    def __init__(self, name: str) -> None:
        self.name = name


def _set_properties(self: Any, state: Any) -> None:
    # torch pickles these as a tuple that begins with the dtype
    self.dtype = state["dtype"] if isinstance(state, dict) else state[0]


def _build(document: Any, where: str, file_sizes: Callable[[str], int | None]) -> DcpMetadata:
    entries: dict[tuple[str, tuple[int, ...] | None], Any] = {}
    for index, info in document.storage_data.items():
        raw_offset = getattr(index, "offset", None)  # left out of the pickle where it is None
        offset = None if raw_offset is None else _numbers(raw_offset)
        entries[_name(index.fqn), offset] = info
    sizes: dict[str, int | None] = {}

    def find(name: str, offset: tuple[int, ...] | None) -> tuple[str, int, int, bool]:
        info = entries.get((name, offset))
        at = "" if offset is None else f" at {list(offset)}"
        if info is None:
            raise CheckpointError(
                f"{where}: no file holds {name!r}{at}; the save did not finish. Take an earlier checkpoint"
            )
        file, begin, num_bytes = info.relative_path, info.offset, info.length
        if not isinstance(file, str) or file.startswith("/") or not _is_plain(file):
            raise CheckpointError(f"{where}: {name!r}{at} lies in {file!r}, which is no file of the checkpoint")
        if file not in sizes:
            sizes[file] = file_sizes(file)
        size = sizes[file]
        if size is None:
            raise CheckpointError(f"{where}: {file} is missing, which holds {name!r}{at}; the save did not finish")
        begin, num_bytes = _numbers((begin, num_bytes))
        if begin + num_bytes > size:
            raise CheckpointError(
                f"{where}: {name!r}{at} ends at byte {begin + num_bytes:,} of {file}, which has {size:,}; the file is "
                "cut short, or the save did not finish"
            )
        return file, begin, num_bytes, bool(getattr(info, "transform_descriptors", None))

    tensors: dict[str, TensorMeta] = {}
    objects: dict[str, Chunk] = {}
    for key, meta in document.state_dict_metadata.items():
        name = _name(key)
        if type(meta).__name__ == "BytesStorageMetadata":
            objects[name] = Chunk((), (), *find(name, None))
            continue
        shape = _numbers(meta.size)
        chunks = []
        for chunk in meta.chunks:
            offsets, chunk_sizes = _numbers(chunk.offsets), _numbers(chunk.sizes)
            chunks.append(Chunk(offsets, chunk_sizes, *find(name, offsets)))
        check_cover(name, shape, chunks, where)
        tensors[name] = TensorMeta(name, shape, str(meta.properties.dtype.name), tuple(chunks))
    planned = getattr(document, "planner_data", None)
    paths = {}
    if isinstance(planned, dict):
        paths = {key: path for key, path in planned.items() if isinstance(key, str) and isinstance(path, tuple)}
    return DcpMetadata(tensors, objects, paths)


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a name is {type(value).__name__}")
    return value


def _is_plain(file: str) -> bool:
    return file.isprintable() and "\\" not in file and all(step not in ("", ".", "..") for step in file.split("/"))


def _numbers(values: Any) -> tuple[int, ...]:
    found = tuple(values)
    if len(found) > _MAX_DIMS or not all(type(value) is int and 0 <= value < _MAX_SIZE for value in found):
        raise ValueError(f"{found!r:.200} are no sizes or positions")
    return found


def check_cover(name: str, shape: tuple[int, ...], chunks: Sequence[Any], where: str) -> None:
    """Refuse chunks (with ``offsets`` and ``sizes`` first) that leave a gap, overlap, or reach out of the tensor."""
    for offsets, sizes, *_ in chunks:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise CheckpointError(f"{where}: {name!r} has shape {list(shape)}, but a chunk of shape {list(sizes)}")
        if any(o + s > whole for o, s, whole in zip(offsets, sizes, shape, strict=True)):
            raise CheckpointError(
                f"{where}: {name!r} has shape {list(shape)}, but a chunk of {list(sizes)} at {list(offsets)}"
            )
    solid = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    if not math.prod(shape):
        return
    edges = [
        np.unique([0, whole, *(c.offsets[d] for c in solid), *(c.offsets[d] + c.sizes[d] for c in solid)])
        for d, whole in enumerate(shape)
    ]
    cells = [len(edge) - 1 for edge in edges]
    if math.prod(cells) > _MAX_CELLS:
        raise CheckpointError(f"{where}: {name!r} is cut into {math.prod(cells):,} pieces, which nobody does")
    count = np.zeros(cells, np.uint8)
    for chunk in solid:
        where_to = tuple(
            slice(*np.searchsorted(edge, [o, o + s]).tolist())
            for edge, o, s in zip(edges, chunk.offsets, chunk.sizes, strict=True)
        )
        held = count[where_to]
        if np.any(held):
            raise CheckpointError(
                f"{where}: chunks of {name!r} overlap at {list(chunk.offsets)}; it cannot be told which one counts"
            )
        count[where_to] = 1
    if not count.all():
        first = np.argwhere(count == 0)[0] if count.ndim else []
        gap = [int(edge[cell]) for edge, cell in zip(edges, first, strict=True)]
        raise CheckpointError(
            f"{where}: the chunks of {name!r} leave a gap at {gap}; the save did not finish. Take an earlier checkpoint"
        )
