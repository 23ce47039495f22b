"""The two index files of a RecIS directory: ``index`` and ``tensorkey.json``. Pure: bytes in, checked maps out."""

from __future__ import annotations

from typing import Any, NamedTuple

from dist_export.errors import CheckpointError
from dist_export.layout.recis import INDEX, TENSORKEY, Slice, is_payload_name, parse_slice
from dist_export.layout.safetensors import decode_object


class Indexes(NamedTuple):
    """What RecIS's loader goes by."""

    file_of_key: dict[str, int]
    """Block -> place in ``files``."""
    files: tuple[str, ...]
    internal_of_key: dict[str, str]
    """Sparse block -> ``<table>@<slot>^<slice>``."""


class BlockName(NamedTuple):
    """The internal name of a sparse block, taken apart."""

    table: str
    slot: str
    slice: Slice


def decode_indexes(raw_index: bytes, raw_tensorkey: bytes, *, where: str) -> Indexes:
    """Decode both files of the directory ``where``.

    Raises:
        CheckpointError: not JSON or not of the form that RecIS's reader takes; file numbers with gaps, with which that
            reader crashes; a file name that leads out of the directory.
    """
    document = decode_object(raw_index, what=f"{where}/{INDEX}")
    blocks, numbers = (_numbered(document.get(name), name, where) for name in ("block_index", "file_index"))
    files = sorted(numbers, key=numbers.__getitem__)
    if [numbers[name] for name in files] != list(range(len(files))):
        raise CheckpointError(
            f"{where}/{INDEX}: the numbers in file_index are {sorted(numbers.values())[:8]}, not 0 to {len(files) - 1}; "
            "RecIS's reader crashes on that"
        )
    bad = next((name for name in files if not is_payload_name(name)), None)
    if bad is not None:
        raise CheckpointError(f"{where}/{INDEX}: {bad!r} is no name of a data file in this directory")
    stray = next((key for key, number in blocks.items() if not 0 <= number < len(files)), None)
    if stray is not None:
        raise CheckpointError(
            f"{where}/{INDEX}: {stray!r} is in file {blocks[stray]}, but there are {len(files)} files"
        )
    internal = decode_object(raw_tensorkey, what=f"{where}/{TENSORKEY}")
    odd = next(
        (key for key, name in internal.items() if not isinstance(name, str) or split_internal(name) is None), None
    )
    if odd is not None:
        raise CheckpointError(
            f"{where}/{TENSORKEY}: {odd!r} maps to {internal[odd]!r}; expected <table>@<slot>^BEGIN@END@SIZE"
        )
    return Indexes(blocks, tuple(files), internal)


def split_internal(internal: str) -> BlockName | None:
    """Take ``<table>@<slot>^<slice>`` apart; None where it is no such name. A table's own name may hold an ``@``."""
    name, _, text = internal.rpartition("^")
    table, _, slot = name.rpartition("@")
    part = parse_slice(text)
    return BlockName(table, slot, part) if table and slot and part is not None else None


def _numbered(value: Any, name: str, where: str) -> dict[str, int]:
    if not isinstance(value, dict) or not all(type(number) is int for number in value.values()):
        raise CheckpointError(f"{where}/{INDEX}: {name} should be a map from a name to a number")
    return value
