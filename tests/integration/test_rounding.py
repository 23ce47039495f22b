"""What two right programs may differ by, and what they may not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import dist_export
from dist_export.archive.output_diff import compare, usual_sizes
from dist_export.dense.blocks import read_blocks
from dist_export.dense.eager import run_dense_arch
from dist_export.dense.rounding import Rounding, compare_scores
from dist_export.errors import ParityError
from dist_export.verify.verify import verify
from tests.support import exports, tiny_model

WIDTH = 64

# torch traces a GRU all the same, and so do these tests
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")


class Sequences(nn.Module):
    """A transformer and a GRU on inputs that nobody has scaled; its scores move by more than 1e-5 where it is fused."""

    def __init__(self, layers: int = 3, scale: float = 30.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.scale, self.dtype = scale, dtype
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.gru = nn.GRU(WIDTH, WIDTH, 2, batch_first=True)
        self.out = nn.Linear(WIDTH, 1)
        for parameter in self.parameters():
            parameter.data.mul_(1.5 if parameter.dim() > 1 else 1)
        self.to(dtype)

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        flat = torch.cat([blocks["user"], blocks["item"], blocks["price"]], 1)
        steps = torch.stack([torch.sin(flat.sum(1, keepdim=True) * k + flat[:, :1] * 9) for k in range(1, 9)], 1)
        wide = steps * torch.linspace(-self.scale, self.scale, WIDTH)
        hidden, _ = self.gru(self.encoder(wide.to(self.dtype)))
        return {"ctr": self.out(hidden[:, -1]) * 20}


class Model(nn.Module):
    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.sparse_arch, self.dense_arch = tiny_model.SparseArch(), dense

    def forward(self, batch):
        return self.dense_arch(self.sparse_arch(batch))


def export(tmp_path: Path, dense: nn.Module, **settings) -> dist_export.Manifest:
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    torch.save({f"dense_arch.{name}": t for name, t in dense.state_dict().items()}, source / "model.pt")
    return exports.exporter(
        Model(dense), "sparse_arch", "dense_arch", tiny_model.build_dataset(60), source, tmp_path / "out",
        filter_sparse_opt=True, **settings,
    ).export()  # fmt: skip


def test_a_deep_network_is_exported_and_verifies(tmp_path: Path) -> None:
    """Its fused kernels, which the model uses and the program does not, round so differently that no fixed bound would do."""
    manifest = export(tmp_path, Sequences())
    assert manifest.parity.reference == "model"
    assert manifest.parity.max_abs["ctr"] > 1e-6
    assert verify(str(tmp_path / "out")).findings == []


def test_a_small_error_in_a_deep_network_is_caught(tmp_path: Path, monkeypatch) -> None:
    from dist_export.dense import copied_arch

    real = copied_arch.load_dense_parameters

    def load(copied, state, **more):
        name = "dense_arch.out.weight"
        return real(copied, {**state, name: state[name] * 1.001}, **more)

    monkeypatch.setattr(copied_arch, "load_dense_parameters", load)
    with pytest.raises(ParityError, match="differs from the dense arch in model"):
        export(tmp_path, Sequences())


def test_the_settings_without_any_tolerance_stay_strict(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"allowed is atol 0 \+ rtol 0"):
        export(tmp_path, Sequences(), atol=0.0, rtol=0.0)


def test_a_value_near_zero_is_rounded_as_its_column() -> None:
    expected = torch.tensor([[1.0, 1e4], [-2.0, -2e4], [1e-3, 1.0], [1.5, 3e4]])
    assert usual_sizes(None, expected).tolist() == pytest.approx([1.0, 1e4])
    near = expected + torch.tensor([[0.0, 0.0], [0.0, 0.0], [5e-6, 5e-2], [0.0, 0.0]])
    assert compare(expected, near, atol=1e-6, rtol=1e-5).is_close
    for place in ((2, 0), (0, 0)):
        other = expected.clone()
        other[place] += 5e-5  # a column of large numbers beside it says nothing
        assert not compare(expected, other, atol=1e-6, rtol=1e-5).is_close


def test_one_huge_row_hides_no_difference() -> None:
    expected = torch.linspace(0.1, 1, 9).reshape(9, 1)
    expected[4] = 1e9
    other = expected.clone()
    other[0] += 1e-4
    assert not compare(expected, other, atol=1e-6, rtol=1e-5).is_close
    other[0] = expected[0]
    assert compare(expected, other, atol=1e-6, rtol=1e-5).is_close


@pytest.mark.parametrize(
    "pair", [(1.0, math.inf), (math.inf, 1.0), (math.inf, -math.inf), (1.0, math.nan), (math.nan, 1.0)]
)
def test_what_is_not_finite_on_one_side_differs(pair) -> None:
    expected, found = (torch.tensor([[value], [1.0], [math.inf]]) for value in pair)
    assert not compare(expected, found, atol=1.0, rtol=1.0).is_close


def test_small_batches_are_measured_by_the_sample() -> None:
    like = torch.tensor([[1.0], [2.0], [3.0]])
    one, other = torch.tensor([[1e-4]]), torch.tensor([[1.1e-4]])
    assert compare(one, other, atol=1e-6, rtol=1e-5, like=like).is_close
    assert not compare(one, other, atol=1e-6, rtol=1e-5).is_close
    assert not compare(one, other, atol=1e-6, rtol=1e-5, like=torch.ones(3, 2)).is_close, "of other columns"


class Net(nn.Module):
    def __init__(self, fn) -> None:
        super().__init__()
        self.fn, self.weight = fn, nn.Parameter(torch.full((1,), 0.1))

    def forward(self, blocks):
        return self.fn(blocks["x"], self.weight)


def rounding(fn, dtype: torch.dtype = torch.float32) -> tuple[Rounding, torch.Tensor]:
    sample = run_dense_arch(
        Net(fn).eval().to(dtype), read_blocks({"x": torch.linspace(0.1, 1, 16).reshape(8, 2)}), export_outputs=None
    )
    return Rounding(sample), sample.outputs[0]


def test_the_rounding_of_a_sum_of_huge_terms_is_measured() -> None:
    measured, output = rounding(lambda x, w: (x * w + 3e3) - 3e3)
    assert 1e-5 < measured.of(0).max() <= 1e-3
    assert compare_scores(output, output + 1e-5, 0, measured, atol=1e-6, rtol=1e-5).is_close
    assert not compare_scores(output, output + 1e-3, 0, measured, atol=1e-6, rtol=1e-5).is_close


def test_the_rounding_of_a_narrow_dtype_is_measured() -> None:
    measured, output = rounding(lambda x, w: (x.to(w.dtype) * w) @ torch.ones(2, 1, dtype=w.dtype), torch.bfloat16)
    usual = usual_sizes(None, output)
    assert 0 < measured.of(0).max() <= 8 * torch.finfo(torch.bfloat16).eps * usual.max()


def test_a_network_that_jumps_gets_a_thousandth_at_most() -> None:
    """It takes another branch in float64."""
    measured, output = rounding(lambda x, w: x * (1.0 if w.dtype == torch.float32 else 100.0))
    assert measured.of(0).max() <= 1e-3 * usual_sizes(None, output).max()
    assert not compare_scores(output, output * 1.01, 0, measured, atol=1e-6, rtol=1e-5).is_close


@pytest.mark.parametrize(
    "fn", [lambda x, w: x @ torch.ones(2, 2) * w, lambda x, w: (x * w).sum(), lambda x, w: (x > w).long()]
)
def test_where_it_cannot_be_measured_the_settings_decide(fn) -> None:
    measured, output = rounding(fn)
    assert measured.of(0) is None
    assert not compare_scores(output, output + 1, 0, measured, atol=1e-6, rtol=1e-5).is_close
