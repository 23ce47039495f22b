"""``model.safetensors.index.json`` and ``pytorch_model.bin.index.json``: which of several files holds which tensor.

Source: the files that Hugging Face's libraries and torch's ``HuggingFaceStorageWriter`` write:
``{"metadata": {"total_size": n}, "weight_map": {tensor: file}}``. The size is not looked at: writers count it differently.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from dist_export.errors import CheckpointError
from dist_export.formats.recis import is_plain_name
from dist_export.formats.strict_json import decode_object, show
from dist_export.storage.directory import Directory

_PART = re.compile(r"(?:shard-\d+-)?(.*?)(\d+)-of-(\d+)(\.\w+)")
"""Files of several, as these writers name them; each rank of torch's ``HuggingFaceStorageWriter`` is a shard."""


def read_weight_map(directory: Directory, name: str) -> dict[str, str]:
    """Return tensor -> file. CheckpointError where the index is no such file, or names what is no file of the directory."""
    where = directory.describe(name)
    try:
        raw = directory.read_text(name)
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from None
    weight_map = decode_object(raw, what=where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{where}: weight_map is {show(weight_map)}; expected a file by tensor"
            ". Copy the checkpoint again, or take an earlier one"
        )
    names = set(directory.names())
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not is_plain_name(file):
            raise CheckpointError(
                f"{where}: {tensor!r} lies in {show(file)}, which is no file of the checkpoint"
                ". Copy the checkpoint again, or take an earlier one"
            )
        if file not in names:
            raise CheckpointError(
                f"{directory.describe(file)} is missing; {name} says that it holds {tensor!r}"
                ". Copy the checkpoint again, or take an earlier one"
            )
    return weight_map


def match_weight_map(weight_map: Mapping[str, str], found: Iterable[tuple[str, str]], *, where: str) -> None:
    """Compare an index with what the files hold: (tensor, file). ``where`` is the index, for messages.

    Raises:
        CheckpointError: one of the two has a tensor that the other one lacks, or has in another file.
    """
    held = set()
    for tensor, file in found:
        held.add(tensor)
        if tensor not in weight_map:
            raise CheckpointError(
                f"{where} does not name {tensor!r}, which {file} holds; they are not of the same save"
            )
        if weight_map[tensor] != file:
            raise CheckpointError(
                f"{where} says that {tensor!r} is in {weight_map[tensor]}, but it is in {file}"
                ". Copy the checkpoint again, or take an earlier one"
            )
    for tensor, file in weight_map.items():
        if tensor not in held:
            raise CheckpointError(
                f"{where} says that {tensor!r} is in {file}, which does not hold it"
                ". Copy the checkpoint again, or take an earlier one"
            )


def note_missing_parts(directory: Directory, names: Sequence[str]) -> tuple[str, ...]:
    """Refuse files of which others are missing by their names, such as ``model-00001-of-00003.bin`` alone, without an index.

    Returns a note if the path is that of one such file, which is then exported alone.

    Raises:
        CheckpointError: a file is missing in the directory.
    """
    there: dict[tuple[str, str, str], set[int]] = {}
    for name in names:
        if part := _PART.fullmatch(name):
            stem, number, total, suffix = part.groups()
            there.setdefault((stem, total, suffix), set()).add(int(number))
    for (stem, total, suffix), numbers in there.items():
        first = 0 if 0 in numbers else 1
        missing = next((number for number in range(first, first + int(total)) if number not in numbers), None)
        if missing is None:
            continue
        if directory.is_file:
            return (f"{names[0]} is one of {int(total):,} files by its name; what the others hold is not exported",)
        lacks = f"{stem}{missing:0{len(total)}}-of-{total}{suffix}"
        raise CheckpointError(
            f"{directory.describe(lacks)} is missing: by the names of the files there are {int(total):,}, and {len(numbers):,} "
            "are there. Copy the checkpoint again, or take an earlier one"
        )
    return ()
