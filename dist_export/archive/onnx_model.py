"""Run the dense arch from its ONNX file, with ONNX Runtime on the CPU."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from dist_export.errors import PackageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

UNSUPPORTED = frozenset({"bfloat16", "complex32", "complex64", "complex128"})
"""torch dtypes that no numpy array can pass to ONNX Runtime, or that ONNX Runtime does not compute with; 8-bit floats too."""


def has_runtime() -> bool:
    """Return whether ONNX Runtime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def is_supported(dtype: str) -> bool:
    """Return whether an input or output of this torch dtype can be passed to ONNX Runtime."""
    return dtype not in UNSUPPORTED and not dtype.startswith("float8")


def open_session(content: bytes, *, where: str) -> Any:
    """Return an ``onnxruntime.InferenceSession`` of an ONNX file.

    The session reads no other file: ONNX Runtime refuses external data in a model that it gets as bytes.

    Raises:
        PackageError: ONNX Runtime is not installed, or it cannot load the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise PackageError(
            f"{where} needs ONNX Runtime, which cannot be imported ({error}): pip install onnxruntime"
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised anyway
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PackageError(
            f"{where}: ONNX Runtime {onnxruntime.__version__} cannot load the file: {first[:400]}"
        ) from error


class OnnxProgram:
    """The ONNX file as something that is called like the exported program. Outputs are on the device of the inputs."""

    def __init__(self, content: bytes, output_names: Sequence[str], *, where: str, is_single: bool = False) -> None:
        """Load the file. Raises PackageError. ``is_single``: return a bare tensor instead of a tuple of one."""
        self._session = open_session(content, where=where)
        self._outputs = list(output_names)
        self._is_single = is_single

    @property
    def input_names(self) -> list[str]:
        """The names of the file's inputs, in order."""
        return [value.name for value in self._session.get_inputs()]

    @property
    def output_names(self) -> list[str]:
        """The names of the file's outputs, in order."""
        return [value.name for value in self._session.get_outputs()]

    def module(self) -> OnnxProgram:
        """Return itself, as ``ExportedProgram.module`` returns what is called."""
        return self

    def __call__(self, **inputs: torch.Tensor) -> Any:
        """Return the outputs as tensors, in the order of ``output_names``."""
        import numpy as np
        import torch

        device = next(iter(inputs.values())).device
        feeds = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in inputs.items()}
        found = self._session.run(self._outputs, feeds)
        # an output without elements may be read-only memory of the runtime
        outputs = tuple(torch.from_numpy(np.array(value)).to(device) for value in found)
        return outputs[0] if self._is_single else outputs
