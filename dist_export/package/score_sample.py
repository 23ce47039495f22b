"""The stored sample of a score program: its inputs, the model's outputs for them, and what each of them is called."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from dist_export.errors import PackageError
from dist_export.manifest import ScoreEntry

if TYPE_CHECKING:
    from dist_export.package.score import ScoredPackage

SAMPLE = "sample.npz"
"""In the folder of the score program: ``input_<i>`` and ``output_<i>`` in the order of the manifest, and ``signature``."""
SIGNATURE = "signature"
"""JSON: the names of inputs and outputs in order, the dropped inputs, and the modules that are lookups."""


class ScoreSample(NamedTuple):
    """What the file holds."""

    inputs: dict[str, torch.Tensor]
    outputs: list[torch.Tensor]
    """The model's own, of the first examples."""
    signature: dict[str, Any]
    """As :func:`signature_of` made it from the entry that the export wrote."""


def signature_of(entry: ScoreEntry) -> dict[str, Any]:
    """Return what the sample stores of its manifest's entry, so that one of them cannot be exchanged alone."""
    return {
        "inputs": [one.name for one in entry.inputs],
        "outputs": [one.name for one in entry.outputs],
        "dropped_inputs": list(entry.dropped_inputs),
        "row_modules": dict(entry.row_modules),
    }


def write_sample(entry: ScoreEntry, inputs: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor]) -> bytes:
    """Return the content of the file. Inputs and outputs are in the order of ``entry``."""
    stored: dict[str, Any] = {f"input_{place}": _to_stored(tensor) for place, tensor in enumerate(inputs.values())}
    stored |= {f"output_{place}": _to_stored(tensor) for place, tensor in enumerate(outputs)}
    stored[SIGNATURE] = np.array(json.dumps(signature_of(entry), sort_keys=True))
    buffer = io.BytesIO()
    np.savez(buffer, **stored)
    return buffer.getvalue()


def read_sample(package: ScoredPackage, entry: ScoreEntry) -> ScoreSample:
    """Return the stored sample of a package. PackageError if it is damaged."""
    where = package.files.describe(entry.sample)
    try:
        with np.load(io.BytesIO(package.files.read(entry.sample)), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        inputs = {one.name: _from_stored(arrays[f"input_{place}"], one.dtype) for place, one in enumerate(entry.inputs)}
        outputs = [_from_stored(arrays[f"output_{place}"], one.dtype) for place, one in enumerate(entry.outputs)]
        signature = json.loads(str(arrays[SIGNATURE]))
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, RuntimeError, RecursionError) as error:
        raise PackageError(f"{where}: not the sample of a score program ({type(error).__name__}: {error})") from error
    return ScoreSample(inputs, outputs, signature if isinstance(signature, dict) else {})


def _to_stored(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as the sample stores it: numpy lacks some dtypes, whose bits are stored."""
    tensor = tensor.detach().cpu().contiguous()
    bits = _BITS.get(tensor.element_size()) if _numpy_dtype(tensor.dtype) is None else None
    array: np.ndarray = (tensor if bits is None else tensor.view(bits)).numpy()
    return array


def _from_stored(array: np.ndarray, dtype: str) -> torch.Tensor:
    kind: torch.dtype = getattr(torch, dtype)
    tensor = torch.from_numpy(np.array(array))
    return tensor.view(kind) if _numpy_dtype(kind) is None else tensor.to(kind)


def _numpy_dtype(dtype: torch.dtype) -> Any:
    try:
        return torch.zeros((), dtype=dtype).numpy().dtype
    except TypeError:
        return None


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
