"""Requests and responses of the Open Inference Protocol as bytes: JSON, binary data, and what is neither."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from dist_export.errors import UserError
from dist_export.serve.tensors import InferRequest, decode_request, encode_response


def body(*inputs: dict[str, Any], binary: bytes = b"", **more: Any) -> tuple[bytes, str | None]:
    head = json.dumps({"inputs": list(inputs), **more}).encode()
    return head + binary, str(len(head)) if binary else None


def tensor(datatype: str, shape: list[int], data: Any = None, size: int | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"name": "x", "datatype": datatype, "shape": shape}
    return found | ({"data": data} if size is None else {"parameters": {"binary_data_size": size}})


@pytest.mark.parametrize(
    ("datatype", "data", "dtype"),
    [
        ("INT64", [1, -2, (1 << 63) - 1], np.int64),
        ("UINT8", [0, 255, 3], np.uint8),
        ("FP32", [1, 2.5, -3], np.float32),
        ("FP16", [1.0, 2.0, 0.5], np.float16),
        ("BF16", [1.0, 2.0, 0.5], np.float32),
        ("BOOL", [True, False, True], np.bool_),
        ("FP32", [[1.0], [2.0], [3.0]], np.float32),
    ],
)
def test_values_in_json(datatype: str, data: list[Any], dtype: Any) -> None:
    _, found = decode_request(*body(tensor(datatype, [3, 1], data)))
    assert found["x"].dtype == dtype
    assert found["x"].shape == (3, 1)
    assert found["x"].ravel().tolist() == np.array(data).ravel().tolist()


@pytest.mark.parametrize("data", [[1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]])
def test_values_are_flat_or_nested_as_the_shape_says(data: list[Any]) -> None:
    _, found = decode_request(*body(tensor("INT64", [2, 3], data)))
    assert found["x"].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_no_values_at_all() -> None:
    _, found = decode_request(*body(tensor("INT64", [0, 4], [])))
    assert found["x"].shape == (0, 4)
    assert found["x"].dtype == np.int64


def test_binary_data_follows_the_json_in_the_order_of_the_inputs() -> None:
    ids, price = np.arange(3, dtype=np.int64), np.array([0.5], np.float32)
    second = tensor("FP32", [1], size=4) | {"name": "price"}
    inputs = [tensor("INT64", [3], size=24), second, tensor("INT64", [1], [7]) | {"name": "plain"}]
    _, found = decode_request(*body(*inputs, binary=ids.tobytes() + price.tobytes()))
    assert {name: value.tolist() for name, value in found.items()} == {"x": [0, 1, 2], "price": [0.5], "plain": [7]}


def test_bfloat16_is_widened() -> None:
    raw = (np.array([1.5, -2.0], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    _, found = decode_request(*body(tensor("BF16", [2], size=4), binary=raw.tobytes()))
    assert found["x"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("request_body", "message"),
    [
        ((b"{", None), "not valid JSON"),
        ((b"[]", None), "not valid JSON"),
        ((b"{}", None), "missing required field `inputs`"),
        ((b"{}", "3"), "Inference-Header-Content-Length is '3', and the body has 2 bytes"),
        ((b"{}", "-1"), "Inference-Header-Content-Length is '-1'"),
        (body(tensor("INT64", [2], [1])), r"has 1 values, and its shape \[2\] has 2"),
        (body(tensor("INT64", [-1], [1])), "which no tensor has"),
        (body(tensor("INT64", [1])), "neither data nor binary_data_size"),
        (body(tensor("INT64", [1], [1.5])), "no values of INT64"),
        (body(tensor("INT64", [1], ["a"])), "no values of INT64"),
        (body(tensor("FP32", [1], [None])), "no values of FP32"),
        (body(tensor("BOOL", [1], [1])), "no values of BOOL"),
        (body(tensor("UINT8", [1], [256])), "a value that UINT8 cannot hold"),
        (body(tensor("INT64", [1], [1 << 63])), "cannot hold"),
        (body(tensor("INT64", [3], [[1], [2, 3]])), "no rectangle"),
        (body(tensor("INT64", [2, 3], [[1, 2], [3, 4], [5, 6]])), r"nested as \[3, 2\], and its shape is \[2, 3\]"),
        (body(tensor("FP32", [4], [[1.0, 2.0], [3.0, 4.0]])), r"nested as \[2, 2\], and its shape is \[4\]"),
        (body(tensor("BOOL", [2], size=2), binary=b"\1\2"), "a byte that is neither 0 nor 1"),
        (body(tensor("BYTES", [1], ["a"])), "datatype 'BYTES'; known are BOOL"),
        (body(tensor("INT64", [1], [1]), tensor("INT64", [1], [1])), "'x' is given twice"),
        (body(tensor("INT64", [2], size=8), binary=bytes(8)), r"has 8 bytes, and INT64 of the shape \[2\] has 16"),
        (body(tensor("INT64", [2], size=16), binary=bytes(8)), "8 bytes are left in the body"),
        (body(tensor("INT64", [1], size=8), binary=bytes(9)), "1 bytes more than its inputs"),
        (body(tensor("INT64", [1], size=-8), binary=bytes(8)), "binary_data_size is -8"),
    ],
)
def test_what_is_no_request_is_refused_in_one_sentence(request_body: tuple[bytes, str | None], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        decode_request(*request_body)
    assert "\n" not in str(error.value)


def test_a_response_holds_what_is_asked_for() -> None:
    outputs = {"a": np.array([1.5], np.float32), "b": np.array([[True]])}
    request = InferRequest(inputs=[], id="7")
    content, length = encode_response(request, outputs, model="score", version="v")
    assert length is None
    assert json.loads(content) == {
        "model_name": "score",
        "model_version": "v",
        "id": "7",
        "outputs": [
            {"name": "a", "datatype": "FP32", "shape": [1], "data": [1.5]},
            {"name": "b", "datatype": "BOOL", "shape": [1, 1], "data": [True]},
        ],
    }
    asked = json.dumps({"inputs": [], "outputs": [{"name": "a", "parameters": {"binary_data": True}}]}).encode()
    content, length = encode_response(decode_request(asked, None)[0], outputs, model="score", version="v")
    assert length is not None
    assert json.loads(content[:length])["outputs"] == [
        {"name": "a", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 4}}
    ]
    assert content[length:] == outputs["a"].tobytes()


def test_values_that_json_cannot_hold_go_as_binary_data_alone() -> None:
    outputs = {"a": np.array([np.nan], np.float32)}
    with pytest.raises(UserError, match="output 'a' has values that JSON cannot hold"):
        encode_response(InferRequest(inputs=[]), outputs, model="score", version="v")
    binary = InferRequest(inputs=[], parameters={"binary_data_output": True})
    assert encode_response(binary, outputs, model="score", version="v")[0].endswith(outputs["a"].tobytes())


def test_an_output_that_there_is_not_is_named() -> None:
    asked = json.dumps({"inputs": [], "outputs": [{"name": "z"}]}).encode()
    with pytest.raises(UserError, match="model 'score' has no output 'z'; it has a"):
        encode_response(decode_request(asked, None)[0], {"a": np.zeros(1)}, model="score", version="v")


@pytest.mark.parametrize(
    ("datatype", "value"), [("FP32", 1e300), ("FP16", 70_000), ("BF16", 1e39), ("INT32", 2**32 + 3)]
)
def test_a_value_that_the_datatype_cannot_hold_is_refused(datatype: str, value: float) -> None:
    with pytest.raises(UserError, match=f"input 'x' has a value that {datatype} cannot hold"):
        decode_request(*body(tensor(datatype, [2], [1, value])))
