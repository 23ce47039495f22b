"""A new dense part must take and give what that of the base does: the first difference is named."""

from __future__ import annotations

import pytest

from dist_export.delta.signature import find_other_contract, find_other_dense, find_other_score
from dist_export.manifest import (
    ColumnsEntry,
    DenseEntry,
    DenseInputEntry,
    FeatureEntry,
    IdsEntry,
    ScoreEntry,
    ServingEntry,
    TensorEntry,
    TransformEntry,
)


def tensor(name: str, dtype: str = "float32", shape: tuple[int | str, ...] = ("batch", 4)) -> TensorEntry:
    return TensorEntry(name=name, dtype=dtype, shape=shape)


def dense(inputs: list[TensorEntry], outputs: list[TensorEntry], order: str = "ab") -> DenseEntry:
    return DenseEntry(
        folder="f",
        program="f/p",
        archive_format="pt2",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        dropped_inputs=(),
        max_batch_size=8,
        input_order=tuple(order),
    )


A, B, OUT = tensor("a"), tensor("b"), tensor("ctr", shape=("batch", 1))
BASE = dense([A, B], [OUT])


def test_the_first_difference_of_dense_programs() -> None:
    renamed_batch = dense([tensor("a", shape=("n", 4)), B], [OUT])
    assert find_other_dense(BASE, BASE) == find_other_dense(renamed_batch, BASE) == ""
    for ours, text in (
        (
            dense([A, B], [OUT], "ba"),
            "the blocks of the dense arch are in another order: number 1 is 'b', and 'a' in the base",
        ),
        (dense([A], [OUT]), "the inputs lack 'b', which the base has"),
        (dense([A, B, tensor("c")], [OUT]), "the inputs have 'c', which the base lacks"),
        (dense([B, A], [OUT]), "the inputs are in another order: number 1 is 'b', and 'a' in the base"),
        (
            dense([tensor("a", "float16"), B], [OUT]),
            "input 'a' is float16 [batch, 4], and float32 [batch, 4] in the base",
        ),
        (
            dense([A, tensor("b", shape=("batch", 5))], [OUT]),
            "input 'b' is float32 [batch, 5], and float32 [batch, 4] in the base",
        ),
        (
            dense([A, tensor("b", shape=("batch", "n"))], [OUT]),
            "input 'b' is float32 [batch, n], and float32 [batch, 4] in the base",
        ),
        (dense([A, B], [tensor("ctr")]), "output 'ctr' is float32 [batch, 4], and float32 [batch, 1] in the base"),
        (dense([A, B], [tensor("x", shape=("batch", 1)), OUT]), "the outputs have 'x', which the base lacks"),
    ):
        assert find_other_dense(ours, BASE) == text


def test_score_programs() -> None:
    def score(inputs: list[TensorEntry]) -> ScoreEntry:
        return ScoreEntry(program="p", sample="s", inputs=tuple(inputs), outputs=(OUT,), dropped_inputs=(), tables=())

    assert find_other_score(score([A]), score([A])) == ""
    assert (
        find_other_score(score([A, B]), score([A])) == "of the score program, the inputs have 'b', which the base lacks"
    )


def contract(order: str, table: str = "t", dim: int = 4, unknown: str = "") -> ServingEntry:
    columns = tuple(ColumnsEntry(begin=4 * place, end=4 * place + 4, feature=name) for place, name in enumerate(order))
    more = {"unknown": unknown} if unknown else {}
    return ServingEntry(
        features=tuple(FeatureEntry(name=name, table=table, dim=dim) for name in sorted(order)),
        inputs=(DenseInputEntry(name="a", dtype="float32", dims=2, columns=columns, **more),),
    )


def test_contracts() -> None:
    assert find_other_contract(contract("xy"), contract("xy")) == ""
    assert find_other_contract(contract("yx", unknown="no"), contract("xy")) == ""
    assert find_other_contract(contract("yx"), contract("xy")) == (
        "of input 'a', columns 0 to 3 are of 'y', and number 1 of the base is of 'x'"
    )
    assert (
        find_other_contract(contract("xyz"), contract("xy"))
        == "input 'a' is made of 3 features or tensors, and of 2 in the base"
    )
    assert find_other_contract(contract("xy", "u"), contract("xy")) == (
        "feature 'x' looks up embedding of table 'u' (4 values), and embedding of 't' (4 values) in the base"
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "text"),
    [
        ({"pooling": "mean"}, {"pooling": "sum"}, 'has the pooling "mean", and "sum" in the base'),
        (
            {"transforms": (TransformEntry(op="add", value=1),)},
            {"transforms": ()},
            'has the transforms of ids [{"op":"add","value":1}], and none in the base',
        ),
        ({"padding_id": None}, {"padding_id": 0}, "has the padding id none, and 0 in the base"),
        ({"longest": 3}, {"longest": 5}, "has the longest list 3, and 5 in the base"),
        ({"shortest": 3}, {}, "has the least number of columns 3, and 0 in the base"),
        ({"default_row": "zeros"}, {"default_row": (1.0,)}, 'has the default row "zeros", and [1.0] in the base'),
        (
            {"ids": IdsEntry(values="a", lengths="b", num_keys=2)},
            {"ids": IdsEntry(values="a", lengths="b")},
            'has the ids {"values":"a","lengths":"b","num_keys":2}, and {"values":"a","lengths":"b"} in the base',
        ),
        ({"pooling": "mean"}, {}, ""),
        ({"padding_id": 0}, {"padding_id": 0}, ""),
    ],
    ids=str,
)
def test_what_is_done_with_the_ids_of_a_feature(ours, theirs, text: str) -> None:
    one, other = (
        ServingEntry(features=(FeatureEntry(name="x", table="t", dim=4, **fields),), inputs=())
        for fields in (ours, theirs)
    )
    assert find_other_contract(one, other) == (text and f"feature 'x' {text}")
