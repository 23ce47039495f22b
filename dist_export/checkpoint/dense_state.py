"""The dense parameters of a RecIS checkpoint: ``model.pt``, a ``torch.save``d state_dict. Never unpickles code."""

from __future__ import annotations

import io
import zipfile
from typing import Any

from dist_export.errors import CheckpointError
from dist_export.layout.recis import DENSE_STATE
from dist_export.storage import Directory


def load_dense_state(directory: Directory) -> dict[str, Any]:
    """Return the state_dict (name -> CPU tensor, memory-mapped where the directory is local). Rank 0.

    Raises:
        CheckpointError: no ``model.pt``, or it is truncated, or holds anything but tensors and plain containers.
    """
    return _load(directory, map_location="cpu")


def describe_dense_state(directory: Directory) -> list[tuple[str, str, tuple[int, ...]]] | None:
    """Return (name, torch dtype name, shape) of each tensor in ``model.pt``, in its order, without reading payload.

    None where there is no ``model.pt``. CheckpointError as :func:`load_dense_state`.
    """
    if not directory.exists(DENSE_STATE):
        return None
    import torch

    return [
        (name, str(value.dtype).removeprefix("torch."), tuple(value.shape))
        for name, value in _load(directory, map_location="meta").items()
        if isinstance(value, torch.Tensor)
    ]


def _load(directory: Directory, *, map_location: str) -> dict[str, Any]:
    import torch

    where = directory.describe(DENSE_STATE)
    if not directory.exists(DENSE_STATE):
        raise CheckpointError(
            f"{where} is missing; the dense arch needs its parameters. "
            "Leave `model` out of the config for an export of the tables alone"
        )
    try:
        if directory.is_local:
            directory.open_reader(DENSE_STATE).close()  # a pipe under this name would let torch wait for ever
            path = directory.join(DENSE_STATE)
            is_zip = zipfile.is_zipfile(path)  # torch's older format cannot be mapped
            state = torch.load(path, map_location=map_location, weights_only=True, mmap=is_zip)
        else:
            data = io.BytesIO(directory.read(DENSE_STATE))
            state = torch.load(data, map_location=map_location, weights_only=True)
    except Exception as error:  # noqa: BLE001 -- a damaged pickle can make torch's reader raise anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{where} cannot be read as a state_dict of tensors (torch.load with weights_only=True): {reason}"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(name, str) and _is_text(name) for name in state):
        raise CheckpointError(f"{where} holds a {type(state).__name__}, expected a state_dict: names mapped to tensors")
    return state


def _is_text(name: str) -> bool:
    """Whether a name can be written into JSON: half a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in name)
