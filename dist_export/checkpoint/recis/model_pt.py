"""The dense parameters of a RecIS checkpoint: ``model.pt``, a ``torch.save``d state_dict. Never unpickles code."""

from __future__ import annotations

import contextlib
import io
import mmap
import warnings
from typing import IO, Any

from dist_export.checkpoint.extra_state import UntakenState, load_without_foreign_state
from dist_export.errors import CheckpointError
from dist_export.formats.legacy_pickle import load_legacy
from dist_export.formats.pickle_values import PickleError
from dist_export.formats.recis import DENSE_STATE
from dist_export.formats.strict_json import is_text
from dist_export.formats.torch_pickle import load_archive
from dist_export.formats.torch_zip import check_state_archive, is_zip, say_refusal
from dist_export.storage.directory import Directory

_MAX_EXPANDED_BYTES = 1 << 30
"""An expanded tensor repeats what its storage holds, up to this size; more is no parameter but a trap."""


def load_dense_state(directory: Directory) -> dict[str, Any]:
    """Return the state_dict (name -> CPU tensor, memory-mapped where the directory is local). Rank 0.

    Raises:
        CheckpointError: no ``model.pt``, or it is truncated, or holds anything but tensors and plain containers.
    """
    return _load(directory)


def describe_dense_state(directory: Directory) -> list[tuple[str, str, tuple[int, ...]]] | None:
    """Return (name, torch dtype name, shape) of each tensor in ``model.pt``, in its order, without reading payload.

    None where there is no ``model.pt``. CheckpointError as :func:`load_dense_state`.
    """
    if not directory.exists(DENSE_STATE):
        return None
    import torch

    return [
        (name, str(value.dtype).removeprefix("torch."), tuple(value.shape))
        for name, value in _load(directory).items()
        if isinstance(value, torch.Tensor)
    ]


def _load(directory: Directory) -> dict[str, Any]:
    where = directory.describe(DENSE_STATE)
    if not directory.exists(DENSE_STATE):
        raise CheckpointError(
            f"{where} is missing; the dense arch needs its parameters. "
            "Leave `model` out of the config for an export of the tables alone"
        )
    try:
        with contextlib.ExitStack() as held:
            if directory.is_local:
                reader = held.enter_context(directory.open_reader(DENSE_STATE))  # a pipe would let torch wait for ever
                file: IO[bytes] = held.enter_context(open(reader.fd, "rb", closefd=False))
            else:
                file = io.BytesIO(directory.read(DENSE_STATE))
            state = _read_state(file, directory.find(DENSE_STATE) if directory.is_local else None, where)
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) and is_text(name) for name in state):
        raise CheckpointError(
            f"{where} holds a {type(state).__name__}, expected a state_dict: names mapped to tensors"
            "; save the state_dict"
        )
    _refuse_expanded(state, where)
    return {
        name: UntakenState("it is a nested tensor") if _is_nested(value) else value for name, value in state.items()
    }


def _is_nested(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.is_nested


def _read_state(file: IO[bytes], path: str | None, where: str) -> Any:
    """Return what ``torch.load`` makes of the file, which is also at the local ``path``, if there is one."""
    import torch

    refused = f"{where} cannot be read as a state_dict of tensors (torch.load with weights_only=True)"
    is_mapped = is_zip(file)  # torch's older format cannot be mapped
    try:  # torch makes whatever a pickle describes
        if is_mapped:
            load_archive(check_state_archive(file, where=where), is_any_known=True)
        else:
            _check_legacy(file)
    except PickleError as error:
        raise CheckpointError(f"{refused}: {error}") from None

    def load() -> Any:
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns, on several lines, of what it refuses or reads all the same
            if path is None or not is_mapped:
                return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    try:
        return load()
    except Exception as error:  # noqa: BLE001 -- a damaged pickle can make torch's reader raise anything
        refusal = say_refusal(error)
    state = load_without_foreign_state(load, file, refusal) if is_mapped else None
    if state is None:
        raise CheckpointError(f"{refused}: {refusal}")
    return state


def _check_legacy(file: IO[bytes]) -> None:
    if isinstance(file, io.BytesIO):
        load_legacy(file.getvalue())
    elif file.seek(0, 2):
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            load_legacy(raw)
    else:
        raise PickleError("it is empty")


def _refuse_expanded(state: dict[str, Any], where: str) -> None:
    import torch

    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_nested:
            num_bytes = value.numel() * value.element_size()
            if num_bytes > max(value.untyped_storage().nbytes(), _MAX_EXPANDED_BYTES):
                raise CheckpointError(
                    f"{where}: {name!r} has shape {list(value.shape)}, {num_bytes:,} bytes, made of "
                    f"{value.untyped_storage().nbytes():,} that are stored; save it again, contiguous"
                )
