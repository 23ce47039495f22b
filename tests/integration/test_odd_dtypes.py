"""Inputs, outputs and buffers of every dtype of whole bytes: exported and verified, or refused before anything is written."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import dist_export
from dist_export.archive.output_diff import has_same_values
from dist_export.archive.safe_pickle import read_sample_pickle
from dist_export.dense.folder import _pickled
from dist_export.errors import ConfigError, PackageError
from dist_export.verify.verify import verify
from tests.support import exports, tiny_model

NAMES = (
    "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64 float8_e4m3fn float8_e5m2 "
    "float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu complex32 complex64 complex128"
)
DTYPES = [getattr(torch, name) for name in NAMES.split() if hasattr(torch, name)]
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

NEW = [torch.uint16, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex32]


def values_of(dtype: torch.dtype, rows: int = 4) -> torch.Tensor:
    values = torch.linspace(1, 6, rows * 2).reshape(rows, 2).round()
    return torch.complex(values, values + 1).to(dtype) if dtype.is_complex else values.to(dtype)


def as_number(x: torch.Tensor) -> torch.Tensor:
    return (
        (torch.view_as_real(x) if x.is_complex() else x).to(torch.float32).reshape(x.shape[0], -1).sum(1, keepdim=True)
    )


class Sparse(tiny_model.SparseArch):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, batch):
        return {**super().forward(batch), "odd": values_of(self.dtype, len(batch["price"]))}


class Dense(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.out = nn.Linear(9, 1)
        self.register_buffer("odd", values_of(dtype))

    def forward(self, blocks):
        x = torch.cat([blocks["user"], blocks["item"], blocks["price"]], 1)
        score = torch.sigmoid(self.out(x)) + as_number(blocks["odd"]) + as_number(self.odd).sum()
        return {"ctr": score, "odd": blocks["odd"].view(-1, 1)}


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.sparse_arch, self.dense_arch = Sparse(dtype), Dense(dtype)

    def forward(self, batch):
        return self.dense_arch(self.sparse_arch(batch))


def export(dtype: torch.dtype, tmp_path: Path, **settings) -> dist_export.Manifest:
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    model = Model(dtype)
    torch.save({f"dense_arch.{name}": t for name, t in model.dense_arch.state_dict().items()}, source / "model.pt")
    return exports.exporter(
        model, "sparse_arch", "dense_arch", tiny_model.build_dataset(5), source, tmp_path / "out", filter_sparse_opt=True,
        **settings,
    ).export()  # fmt: skip


@pytest.mark.parametrize("dtype", NEW, ids=str)
def test_a_new_dtype_is_exported_and_verified(dtype: torch.dtype, tmp_path: Path) -> None:
    manifest = export(dtype, tmp_path)
    assert manifest.parity.reference == "model"
    assert {tensor.dtype for tensor in manifest.dense.inputs if tensor.name == "odd"} == {
        str(dtype).removeprefix("torch.")
    }
    assert verify(str(tmp_path / "out")).findings == []
    sample = read_sample_pickle((tmp_path / "out" / "fx_user_model" / "inputs_dict.pkl").read_bytes(), where="x")
    assert has_same_values(sample["odd"], values_of(dtype, 5))


@pytest.mark.parametrize("dtype", [torch.uint32, torch.float8_e4m3fnuz], ids=str)
def test_what_the_older_format_lacks_is_refused_before_anything_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'legacy', which has no \w+, the dtype of the dense arch's input 'odd'"
    ) as caught:
        export(dtype, tmp_path, archive_format="legacy")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_of_any_dtype_is_pickled_and_read_as_it_was(dtype: torch.dtype) -> None:
    def make() -> dict[str, torch.Tensor]:
        return {"a": values_of(dtype), "empty": values_of(dtype)[:0], "one": values_of(dtype)[0, 0]}

    tensors = make()
    raw = _pickled(tensors)
    assert raw == _pickled(make()), "no address is in it"
    found = read_sample_pickle(raw, where="x")
    for name, tensor in tensors.items():
        assert has_same_values(found[name], tensor)
    loaded = pickle.loads(raw)  # as a server reads it
    assert all(has_same_values(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (b"\x8c\x06uint16", b"\x8c\x06import", "'torch', 'import', which no sample needs"),
        (b"\x8c\x06uint16", b"\x8c\x06qint32", "which no sample needs"),
        (b"\x8c\x06uint16", b"\x8c\x06Tensor", "which no sample needs"),
        (b"_v3", b"_v2", "uint8|has"),
    ],
)
def test_a_pickle_that_names_no_dtype_is_refused(old: bytes, new: bytes, told: str) -> None:
    raw = _pickled({"a": values_of(torch.uint16)})
    assert raw.count(old) == 1
    if new == b"_v2":
        found = read_sample_pickle(raw.replace(old, new), where="x")
        assert found["a"].dtype == torch.uint8, "the storage alone says nothing more"
        return
    with pytest.raises(PackageError, match=told):
        read_sample_pickle(raw.replace(old, new), where="x")


def test_values_of_any_dtype_are_compared() -> None:
    for dtype in DTYPES:
        one, other = values_of(dtype), values_of(dtype)
        assert has_same_values(one, other), dtype
        other[2, 1] = values_of(dtype)[0, 0] if dtype != torch.bool else False
        assert not has_same_values(one, other), dtype
        assert not has_same_values(one, one[:2])
    nan = torch.tensor([1.0, float("nan")])
    assert has_same_values(nan.to(torch.float8_e5m2), nan.to(torch.float8_e5m2))
    assert not has_same_values(nan, torch.tensor([float("nan"), 1.0]))
    assert not has_same_values(nan, nan.double())
    assert not has_same_values(torch.tensor([float("inf")]), torch.tensor([torch.finfo(torch.float32).max]))
