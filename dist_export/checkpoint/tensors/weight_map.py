"""``model.safetensors.index.json`` and ``pytorch_model.bin.index.json``: which of several files holds which tensor.

Source: the files that Hugging Face's libraries and torch's ``HuggingFaceStorageWriter`` write:
``{"metadata": {"total_size": n}, "weight_map": {tensor: file}}``. The size is not looked at: writers count it differently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dist_export.errors import CheckpointError
from dist_export.formats.recis import is_plain_name
from dist_export.formats.strict_json import decode_object, show
from dist_export.storage.directory import Directory


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
