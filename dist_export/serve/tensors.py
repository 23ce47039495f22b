"""Tensors of the Open Inference Protocol v2: JSON values, or raw bytes behind the JSON. Pure: bytes and arrays.

Source: https://github.com/kserve/open-inference-protocol, and Triton's binary tensor data extension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from dist_export.errors import UserError
from dist_export.formats.row_encodings import widen_bfloat16

HEADER_LENGTH = "Inference-Header-Content-Length"
"""The header that says how many bytes of a body are JSON. The rest is binary data."""

DATATYPES = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_BF16 = "BF16"
_JSON_KINDS = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}
"""Kind of a dtype -> the kinds of numpy arrays that JSON values for it become."""
_BY_TORCH = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "bfloat16": "FP32",  # arrays of numpy have no bfloat16, so these values are widened
    "float32": "FP32",
    "float64": "FP64",
}


class InputTensor(msgspec.Struct):
    """One input of a request."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: Any = None


class RequestedOutput(msgspec.Struct):
    """One output that a request asks for."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(msgspec.Struct):
    """The JSON of an inference request."""

    inputs: list[InputTensor]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[RequestedOutput] | None = None


_REQUESTS = msgspec.json.Decoder(InferRequest)


def datatype_of(torch_dtype: str) -> str:
    """Return the protocol's name of a dtype of torch, such as ``FP32``."""
    return _BY_TORCH[torch_dtype]


def decode_request(body: bytes, header_length: str | None) -> tuple[InferRequest, dict[str, np.ndarray]]:
    """Return a request and its input tensors by name.

    Args:
        body: the body, decompressed.
        header_length: the value of the header ``Inference-Header-Content-Length``; None if all of the body is JSON.

    Raises:
        UserError: the request is not what the protocol says.
    """
    length = len(body)
    if header_length is not None:
        if not header_length.isascii() or not header_length.isdigit() or int(header_length) > len(body):
            raise UserError(f"{HEADER_LENGTH} is {header_length!r}, and the body has {len(body):,} bytes")
        length = int(header_length)
    try:
        request = _REQUESTS.decode(body[:length])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the request is not valid JSON of the Open Inference Protocol: {error}") from None
    tensors: dict[str, np.ndarray] = {}
    offset = length
    for tensor in request.inputs:
        if tensor.name in tensors:
            raise UserError(f"input {tensor.name!r} is given twice")
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            tensors[tensor.name] = _from_json(tensor)
            continue
        if not isinstance(size, int) or size < 0 or offset + size > len(body):
            raise UserError(
                f"input {tensor.name!r}: binary_data_size is {size!r}, and {len(body) - offset:,} bytes are left in the body"
            )
        tensors[tensor.name] = _from_bytes(tensor, body[offset : offset + size])
        offset += size
    if offset != len(body):
        raise UserError(f"the body has {len(body) - offset:,} bytes more than its inputs")
    return request, tensors


def _count(tensor: InputTensor) -> int:
    if any(size < 0 for size in tensor.shape):
        raise UserError(f"input {tensor.name!r} has the shape {tensor.shape}, which no tensor has")
    return math.prod(tensor.shape)


def _dtype(tensor: InputTensor) -> np.dtype:
    if tensor.datatype not in DATATYPES:
        known = ", ".join([*DATATYPES, _BF16])
        raise UserError(f"input {tensor.name!r} has the datatype {tensor.datatype!r}; known are {known}")
    return DATATYPES[tensor.datatype]


def _from_json(tensor: InputTensor) -> np.ndarray:
    count = _count(tensor)
    dtype = np.dtype("<f4") if tensor.datatype == _BF16 else _dtype(tensor)
    if not isinstance(tensor.data, list):
        raise UserError(f"input {tensor.name!r} has neither data nor binary_data_size")
    try:
        raw = np.array(tensor.data)
    except ValueError:
        raise UserError(f"input {tensor.name!r}: its data is no rectangle of numbers") from None
    if raw.size != count:
        raise UserError(f"input {tensor.name!r} has {raw.size:,} values, and its shape {tensor.shape} has {count:,}")
    nesting = [size for size in raw.shape if size != 1]
    if len(nesting) > 1 and nesting != [
        size for size in tensor.shape if size != 1
    ]:  # else its values would get into other rows
        raise UserError(
            f"input {tensor.name!r}: its data is nested as {list(raw.shape)}, and its shape is {tensor.shape}"
        )
    if raw.size and raw.dtype.kind not in _JSON_KINDS[dtype.kind]:
        raise UserError(f"input {tensor.name!r}: its data are no values of {tensor.datatype}")
    with np.errstate(over="ignore"):  # what does not fit is refused below
        values = raw.astype(dtype)
    is_held = np.isfinite(values) if dtype.kind == "f" else values == raw
    if not is_held.all():
        raise UserError(f"input {tensor.name!r} has a value that {tensor.datatype} cannot hold")
    return values.reshape(tensor.shape)


def _from_bytes(tensor: InputTensor, data: bytes) -> np.ndarray:
    count = _count(tensor)
    dtype = np.dtype("<u2") if tensor.datatype == _BF16 else _dtype(tensor)
    if len(data) != count * dtype.itemsize:
        raise UserError(
            f"input {tensor.name!r} has {len(data):,} bytes, and {tensor.datatype} of the shape {tensor.shape} has "
            f"{count * dtype.itemsize:,}"
        )
    if tensor.datatype == "BOOL" and data.strip(b"\0\1"):  # sums of such bytes count more than one
        raise UserError(f"input {tensor.name!r} has a byte that is neither 0 nor 1, and BOOL has no other")
    values = np.frombuffer(data, dtype).reshape(tensor.shape)
    return widen_bfloat16(values) if tensor.datatype == _BF16 else values


def encode_response(
    request: InferRequest, outputs: Mapping[str, np.ndarray], *, model: str, version: str
) -> tuple[bytes, int | None]:
    """Return the body of a response, and the length of its JSON if binary data follows it; else None.

    Raises:
        UserError: the request asks for an output that the model does not have.
    """
    asked = [RequestedOutput(name) for name in outputs] if request.outputs is None else request.outputs
    all_binary = request.parameters.get("binary_data_output") is True
    described: list[dict[str, Any]] = []
    payload: list[bytes] = []
    for output in asked:
        if output.name not in outputs:
            raise UserError(f"model {model!r} has no output {output.name!r}; it has {', '.join(outputs)}")
        value = np.ascontiguousarray(outputs[output.name])
        name = next((name for name, dtype in DATATYPES.items() if dtype == value.dtype.newbyteorder("<")), "")
        entry: dict[str, Any] = {"name": output.name, "datatype": name, "shape": list(value.shape)}
        if output.parameters.get("binary_data", all_binary) is True:
            payload.append(value.tobytes())
            entry["parameters"] = {"binary_data_size": len(payload[-1])}
        else:
            _refuse_not_finite(output.name, value)
            entry["data"] = value.ravel().tolist()
        described.append(entry)
    document: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": described}
    if request.id is not None:
        document["id"] = request.id
    head = msgspec.json.encode(document)
    if not payload:
        return head, None
    return b"".join([head, *payload]), len(head)


def _refuse_not_finite(name: str, value: np.ndarray) -> None:
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise UserError(f"output {name!r} has values that JSON cannot hold (NaN or infinite); ask for binary data")


def describe_tensors(entries: Sequence[tuple[str, str, Sequence[int | str]]]) -> list[dict[str, Any]]:
    """Return the protocol's metadata of tensors, from (name, torch dtype, shape). A free size is -1."""
    return [
        {
            "name": name,
            "datatype": datatype_of(dtype),
            "shape": [size if isinstance(size, int) else -1 for size in shape],
        }
        for name, dtype, shape in entries
    ]
