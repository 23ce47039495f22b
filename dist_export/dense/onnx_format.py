"""The traced dense arch as an ONNX file: true names, a named batch dimension, and nothing of the machine that wrote it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from dist_export.dense.onnx_names import rename_values
from dist_export.dense.trace import TracedDense
from dist_export.errors import TraceError
from dist_export.model.user_errors import blame_text, said

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""What writes and checks the file; their versions are in the manifest."""

_MOST_BYTES = (1 << 31) - 1
"""Of a message of protobuf."""

_OUTPUT = "dist_export_output_"
"""How outputs are called until they get their true names, which values within the graph may have too."""

_PRIVATE = ("metadata_props", "doc_string")
"""Fields that quote source files, stack traces and nodes of the graph."""


def make_onnx(
    traced: TracedDense, output_names: Sequence[str], dynamic_dims: Mapping[str, Mapping[int, str]]
) -> tuple[bytes, int]:
    """Return the content of the ONNX file, and the version of its operators. Rank 0; writes nothing.

    The same program gives the same bytes with the same versions of torch, onnx and onnxscript.

    Raises:
        TraceError: ONNX cannot express the program. The message names the operator, and the model's line if torch knows it.
    """
    shapes = {name: {0: "batch"} | dict(dynamic_dims.get(name, {})) for name in traced.inputs}
    try:
        with _quiet(), torch.no_grad():
            # input_names would rename by position, and could swap two inputs; the program has the names already
            converted = torch.onnx.export(
                _rewrite(traced.program),
                (),
                kwargs=dict(traced.inputs),
                dynamo=True,
                output_names=[f"{_OUTPUT}{place}" for place in range(len(output_names))],
                dynamic_shapes=shapes,
                verbose=False,
            )
            assert converted is not None
            model = converted.model_proto
    except Exception as error:
        raise TraceError(
            f"dense_formats: the dense arch cannot be written as ONNX: {_why(traced.program, error)}. Use other operators "
            "there, or leave onnx out of dense_formats"
        ) from error
    _set_names(model, traced, list(output_names))
    _strip(model)
    if model.ByteSize() > _MOST_BYTES:
        raise TraceError(
            f"dense_formats: the dense arch has {model.ByteSize():,} bytes as ONNX; one ONNX file holds at most "
            f"{_MOST_BYTES:,}. Leave onnx out of dense_formats"
        )
    opset = next(its.version for its in model.opset_import if its.domain in ("", "ai.onnx"))
    return model.SerializeToString(deterministic=True), int(opset)


def _rewrite(program: ExportedProgram) -> ExportedProgram:
    """Return the program without operators whose form in ONNX, as torch writes it, gives other values, or lacks a case."""
    found = {
        node.target: _REWRITTEN[str(node.target)] for node in program.graph.nodes if str(node.target) in _REWRITTEN
    }
    return program.run_decompositions(found) if found else program


def _log_sigmoid(value: torch.Tensor) -> torch.Tensor:
    """Compute it as torch's kernel does: the logarithm of a sigmoid, as ONNX has it, is -inf below about -88."""
    return value.clamp(max=0) - torch.log1p(torch.exp(-value.abs()))


def _over_all(reduce: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """Return ``amax`` or ``amin`` of all elements, for which ONNX wants dimensions; with dimensions it stays."""

    def reduced(value: torch.Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
        return NotImplemented if dim else reduce(value).reshape([1] * value.dim() if keepdim else [])

    return reduced


_REWRITTEN: dict[str, Callable[..., Any]] = {
    "aten.log_sigmoid.default": _log_sigmoid,
    "aten.amax.default": _over_all(torch.max),
    "aten.amin.default": _over_all(torch.min),
}


def list_onnx_versions() -> dict[str, str]:
    """Return the versions of the packages that write and check the file."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _set_names(model: Any, traced: TracedDense, output_names: list[str]) -> None:
    """Give inputs and outputs their true names. TraceError for inputs that are not the program's, or without a free batch."""
    found = [value.name for value in model.graph.input]
    expected = [str(name) for name in traced.program.graph_signature.user_inputs]
    # torch adds _orig to an input that is also an output
    is_same = len(found) == len(expected) and all(
        name in (its, f"{its}_orig") for name, its in zip(found, expected, strict=True)
    )
    outputs = [value.name for value in model.graph.output]
    if not is_same or outputs != [f"{_OUTPUT}{place}" for place in range(len(output_names))]:
        raise TraceError(
            f"dense_formats: the ONNX file has the inputs {found} and {len(outputs)} outputs, the program has {expected} and "
            f"{len(output_names)}. Leave onnx out of dense_formats"
        )
    names = dict(zip(found, traced.inputs, strict=True)) | dict(zip(outputs, output_names, strict=True))
    rename_values(model.graph, names)
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if not dims or dims[0].dim_param != "batch":
            raise TraceError(
                f"dense_formats: input {value.name!r} of the ONNX file has no free batch dimension. Leave onnx out of "
                "dense_formats"
            )


def _strip(message: Any) -> None:
    """Remove what quotes the machine and the model's source from a message of protobuf and all messages within it."""
    for name in _PRIVATE:
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                _strip(inner)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within this block, torch's exporter does not warn of what it always warns of, such as a missing torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _why(program: ExportedProgram, error: BaseException) -> str:
    """Return the operator that has no form in ONNX and the user's line that calls it, else what torch says."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(texts)
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'(?:, overload='([^']+)')?", text)
    node = re.search(r"translating node %(\w+)", text)
    place = _find_line(program, node[1]) if node else ""
    if operator:
        name = operator[1] + (f".{operator[2]}" if operator[2] else "")
        return f"it has no form for {name}{place}"
    innermost = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    return f"{said(innermost)}{place}"


def _find_line(program: ExportedProgram, name: str) -> str:
    """Return the user's line of a node of the graph; empty if there is none.

    torch translates a program whose operators it has taken apart before, so the node may be missing from the program itself.
    """
    found: ExportedProgram | None = program
    while found is not None:
        for node in found.graph.nodes:
            if node.name == name:
                return blame_text(node.meta.get("stack_trace") or "")
        found = _take_apart(program) if found is program else None
    return ""


def _take_apart(program: ExportedProgram) -> ExportedProgram | None:
    with _quiet(), contextlib.suppress(Exception):  # it is only for the line that is added to an error
        apart: ExportedProgram = program.run_decompositions()
        return apart
    return None
