"""The serving contract carried out with numpy: lists, padding, transforms, pooling, and columns side by side."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from dist_export.errors import UserError
from dist_export.formats.serving_entries import (
    ColumnsEntry,
    DenseInputEntry,
    FeatureEntry,
    IdsEntry,
    ServingEntry,
    TransformEntry,
)
from dist_export.package.dense_inputs import build_dense_inputs, compute_feature, transform_ids

DIM = 2


def rows_of(table: str, slot: str, ids: np.ndarray) -> np.ndarray:
    """Row of an id: (id, 10 * id)."""
    assert (table, slot) == ("t", "embedding")
    return np.stack([ids, 10 * ids], axis=1).astype(np.float32)


def feature(ids: IdsEntry, pooling: str, *, padding_id: int | None = None, **fields: Any) -> FeatureEntry:
    fields = {"transforms": (), **fields}
    return FeatureEntry(name="f", table="t", dim=DIM, ids=ids, pooling=pooling, padding_id=padding_id, **fields)


def first_column(entry: FeatureEntry, **inputs: Any) -> list[Any]:
    arrays = {name: np.asarray(values) for name, values in inputs.items()}
    return compute_feature(entry, arrays, rows_of, where="here")[..., 0].tolist()


PADDED = [[4, 0, 2], [0, 0, 0], [3, 3, 9]]


@pytest.mark.parametrize(
    ("pooling", "padding_id", "expected"),
    [
        ("sum", 0, [6, 0, 15]),
        ("mean", 0, [3, 0, 5]),
        ("max", 0, [4, 0, 9]),
        ("mean", None, [2, 0, 5]),
        ("sum", 3, [6, 0, 9]),
        ("none", None, PADDED),
        ("none", 3, [[4, 0, 2], [0, 0, 0], [0, 0, 9]]),
    ],
)
def test_padded_lists_are_pooled_without_padding(pooling: str, padding_id: int | None, expected: list[Any]) -> None:
    entry = feature(IdsEntry(values="x"), pooling, padding_id=padding_id)
    assert first_column(entry, x=PADDED) == expected


def test_the_maximum_of_negative_rows_is_negative_and_of_an_empty_list_zero() -> None:
    assert first_column(feature(IdsEntry(values="x"), "max", padding_id=0), x=[[-3, -5], [0, 0]]) == [-3, 0]


def test_one_id_for_each_example_is_its_row() -> None:
    assert first_column(feature(IdsEntry(values="x"), "none"), x=[7, 0, 5]) == [7, 0, 5]
    assert first_column(feature(IdsEntry(values="x"), "none", padding_id=7), x=[7, 0, 5]) == [0, 0, 5]
    assert first_column(feature(IdsEntry(values="x", column=1), "none"), x=[[1, 2], [3, 4]]) == [2, 4]


@pytest.mark.parametrize(
    ("entry", "bounds"),
    [
        (IdsEntry(values="x", lengths="b"), [2, 0, 1]),
        (IdsEntry(values="x", offsets="b"), [0, 2, 2]),
        (IdsEntry(values="x", offsets="b", has_end=True), [0, 2, 2, 3]),
    ],
)
def test_lists_of_different_lengths_are_told_by_lengths_or_offsets(entry: IdsEntry, bounds: list[int]) -> None:
    assert first_column(feature(entry, "sum"), x=[1, 2, 3], b=bounds) == [3, 0, 3]
    assert first_column(feature(entry, "none"), x=[1, 2, 3], b=bounds) == [[1, 2], [0, 0], [3, 0]]
    assert first_column(feature(entry, "none", longest=1), x=[1, 2, 3], b=bounds) == [[1], [0], [3]]
    assert first_column(feature(entry, "none", longest=3), x=[1, 2, 3], b=bounds)[2] == [3, 0, 0]
    weighted = msgspec.structs.replace(entry, weights="w")
    assert first_column(feature(weighted, "sum"), x=[1, 2, 3], b=bounds, w=[0.5, 2.0, 1.0]) == [4.5, 0, 3]


@pytest.mark.parametrize("entry", [IdsEntry(values="x", lengths="b"), IdsEntry(values="x", offsets="b", has_end=True)])
@pytest.mark.parametrize("pooling", ["sum", "mean", "max"])
def test_ids_behind_the_last_list_are_refused_where_models_differ_on_them(entry: IdsEntry, pooling: str) -> None:
    """On a CPU, torch's mean counts them, and its maximum, or a sum that leaves padding out, takes them into the last bag."""
    inputs = {"x": [1, 2, 3, 9], "b": [2, 1] if isinstance(entry.lengths, str) else [0, 2, 3]}
    if pooling == "sum":
        assert first_column(feature(entry, pooling), **inputs) == [3, 3]
    for padding_id in (0,) if pooling == "sum" else (None, 0):
        with pytest.raises(UserError, match="'x' has 1 ids behind its last list"):
            first_column(feature(entry, pooling, padding_id=padding_id), **inputs)


def test_a_key_of_several_has_its_own_run_of_lists() -> None:
    inputs = {"x": [1, 2, 3, 4, 5], "b": [1, 2, 0, 2]}
    for key, expected in enumerate(([1, 5], [0, 9])):
        entry = IdsEntry(values="x", lengths="b", key=key, num_keys=2)
        assert first_column(feature(entry, "sum"), **inputs) == expected


def test_transforms_are_of_python_and_wrap_around() -> None:
    ids = np.array([-7, 7, 2**63 - 1])
    step = lambda op, value: (TransformEntry(op=op, value=value),)
    assert transform_ids(ids, step("modulo", 5)).tolist() == [3, 2, (2**63 - 1) % 5]
    assert transform_ids(ids, step("mask", 6)).tolist() == [-7 & 6, 6, 6]
    assert transform_ids(ids, step("add", 1)).tolist() == [-6, 8, -(2**63)]
    assert transform_ids(ids, step("from_end", 10)).tolist() == [3, 7, 2**63 - 1]
    both = (TransformEntry(op="add", value=1), TransformEntry(op="modulo", value=4))
    assert transform_ids(np.array([3, 4]), both).tolist() == [0, 1]


def test_padding_is_of_the_id_in_the_request() -> None:
    entry = feature(IdsEntry(values="x"), "sum", padding_id=0, transforms=(TransformEntry(op="add", value=5),))
    assert first_column(entry, x=[[1, 0], [0, 0]]) == [6, 0]


def test_columns_are_side_by_side() -> None:
    pooled = feature(IdsEntry(values="x"), "sum")
    serving = ServingEntry(
        features=(pooled,),
        inputs=(
            DenseInputEntry(
                name="block",
                dtype="float32",
                dims=2,
                columns=(
                    ColumnsEntry(begin=0, end=1, tensor="price"),
                    ColumnsEntry(begin=1, end=3, feature="f"),
                    ColumnsEntry(begin=3, end=5, tensor="wide", first=1),
                ),
            ),
            DenseInputEntry(
                name="flat", dtype="float64", dims=1, columns=(ColumnsEntry(begin=0, end=1, tensor="price"),)
            ),
            DenseInputEntry(name="other", dtype="float32", dims=2, unknown="nobody says"),
        ),
    )
    inputs = {"x": np.array([[1, 2], [3, 0]]), "price": np.array([0.5, 1.5]), "wide": np.arange(6).reshape(2, 3)}
    found = build_dense_inputs(serving, inputs, rows_of, where="here")
    assert set(found) == {"block", "flat"}
    assert found["block"].tolist() == [[0.5, 3, 30, 1, 2], [1.5, 3, 30, 4, 5]]
    assert found["flat"].tolist() == [0.5, 1.5]
    assert (found["block"].dtype, found["flat"].dtype) == (np.float32, np.float64)


@pytest.mark.parametrize(
    ("entry", "inputs", "told"),
    [
        (IdsEntry(values="y"), {"x": [1]}, "'y' is missing; the request has x"),
        (IdsEntry(values="x"), {"x": [1.5]}, "ids are integers, 'x' is float64"),
        (IdsEntry(values="x"), {"x": [[[1]]]}, "ids are (batch,) or (batch, length)"),
        (IdsEntry(values="x", column=2), {"x": [[1, 2]]}, "so no column 2"),
        (IdsEntry(values="x", lengths="b"), {"x": [1, 2], "b": [1, 2]}, "'b' does not fit the 2 ids of 'x'"),
        (IdsEntry(values="x", lengths="b"), {"x": [1, 2], "b": [3, -1]}, "'b' does not fit"),
        (IdsEntry(values="x", offsets="b"), {"x": [1, 2], "b": [1, 2]}, "'b' does not fit"),
        (IdsEntry(values="x", lengths="b", num_keys=2), {"x": [1, 2], "b": [1, 0, 1]}, "'b' does not fit"),
        (
            IdsEntry(values="x", lengths="b", weights="w"),
            {"x": [1], "b": [1], "w": [1.0, 2.0][:0]},
            "not one value for each id",
        ),
        (IdsEntry(values="x", weights="w"), {"x": [[1]], "w": [1.0]}, "not one value for each id"),
    ],
)
def test_a_request_that_does_not_fit_is_one_line(entry: IdsEntry, inputs: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        first_column(feature(entry, "sum"), **inputs)
    assert told in str(caught.value)
    assert str(caught.value).startswith("here: ")
