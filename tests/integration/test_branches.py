"""Branches and loops over weights in the dense arch, operators of the caller's, and programs that torch cannot write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention

from dist_export.archive.safe_load import load_program
from dist_export.dense.blocks import read_blocks
from dist_export.dense.eager import run_dense_arch
from dist_export.dense.folder import PROGRAM, write_dense_folder
from dist_export.dense.parity import check_parity
from dist_export.dense.trace import output_shapes, trace_dense
from dist_export.errors import TraceError


class Net(nn.Module):
    def __init__(self, fn) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.yes, self.no = nn.Linear(3, 3), nn.Linear(3, 3)
        self.fn = fn

    def forward(self, inputs):
        return self.fn(self, inputs["x"], inputs["z"])


def write(fn, folder: Path, archive_format: str = "pt2"):
    inputs = {"x": torch.linspace(-1, 2, 15).reshape(5, 3), "z": torch.linspace(0, 1, 10).reshape(5, 2)}
    sample = run_dense_arch(Net(fn).eval(), read_blocks(inputs), export_outputs=None)
    traced = trace_dense(sample, max_batch_size=1000, dynamic_dims={})
    write_dense_folder(
        folder, sample, traced, export_model_name="user_model", archive_format=archive_format, mc_conf=None, looked_up={}
    )  # fmt: skip
    return sample, traced, load_program(folder / PROGRAM)


def loop(net, x, z):
    return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, net.yes(y)), (torch.tensor(0), x))[1]


# ruff: noqa: PLW0108 -- torch.cond takes functions, and these capture the weights as a user's do
BRANCHES = {
    "cond": lambda net, x, z: torch.cond(x.sum() > 0, lambda x: net.yes(x), lambda x: net.no(x), (x,)),
    "nested cond": lambda net, x, z: torch.cond(
        x.sum() > 0,
        lambda x: torch.cond(x.mean() > 9, lambda x: net.yes(x), lambda x: net.no(x), (x,)),
        lambda x: x * 2,
        (x,),
    ),
    "while_loop": loop,
    "map": lambda net, x, z: map_rows(lambda row: net.yes(row), x),
    "constant": lambda net, x, z: torch.cond(x.sum() > 0, lambda x: x * torch.ones(3), lambda x: x + net.no.bias, (x,)),
    "root of a size": lambda net, x, z: net.yes(x) / torch.sym_sqrt(x.shape[0]),
}  # fmt: skip


@pytest.mark.parametrize("archive_format", ["pt2", "legacy"])
@pytest.mark.parametrize("case", BRANCHES)
def test_branches_over_weights_are_exported(case: str, archive_format: str, tmp_path: Path) -> None:
    sample, traced, program = write(BRANCHES[case], tmp_path / "f", archive_format)
    assert list(traced.inputs) == ["x"]
    assert traced.dropped == ("z",)
    shapes = output_shapes(traced, {})
    check_parity(sample, traced.inputs, program, shapes=shapes, atol=1e-6, rtol=1e-5, max_batch_size=1000)
    if case.endswith("cond"):  # the branch that the sample did not take
        x, net = -sample.inputs["x"] - 1, sample.dense_arch
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x=x), net({"x": x, "z": sample.inputs["z"]}))


def test_what_torch_cannot_write_is_one_line_with_the_users_line(tmp_path: Path) -> None:
    def attend(net, x, z):
        wide = net.yes(x)[None, None]
        return flex_attention(wide, wide, wide)[0, 0]

    with pytest.raises(
        TraceError, match=r"cannot write the program: it has no form for flex_attention.*test_branches"
    ) as caught:
        write(attend, tmp_path / "f")
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert type(caught.value.__cause__).__name__ == "SerializeError"


def test_any_failure_of_torchs_writer_is_told(tmp_path: Path, monkeypatch) -> None:
    def fail(*_, **__):
        raise KeyError("schema")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(TraceError, match=r"torch.export.save cannot write the program: KeyError: 'schema'"):
        write(lambda net, x, z: net.yes(x), tmp_path / "f")


@pytest.fixture(scope="module")
def operators():
    with torch.library._scoped_library("dist_export_tests", "DEF") as library:
        for name in ("bare", "known", "_"):
            library.define(f"{name}(Tensor x) -> Tensor")
            library.impl(name, lambda x: x * 2, "CPU")
        for name in ("known", "_"):
            torch.library.register_fake(f"dist_export_tests::{name}", torch.empty_like, lib=library)
        yield torch.ops.dist_export_tests


def test_an_operator_without_a_fake_kernel_says_what_to_register(operators, tmp_path: Path) -> None:
    with pytest.raises(
        TraceError, match=r"dist_export_tests\.bare.*test_branches\.py.*torch\.library\.register_fake"
    ) as caught:
        write(lambda net, x, z: operators.bare(net.yes(x)), tmp_path / "f")
    assert "torch.where" not in str(caught.value)


def test_an_operator_with_a_fake_kernel_is_exported(operators, tmp_path: Path) -> None:
    sample, _, program = write(lambda net, x, z: operators.known(net.yes(x)), tmp_path / "f")
    assert torch.equal(program.module()(x=sample.inputs["x"]), sample.outputs[0])


def test_a_program_that_no_server_would_load_is_told_as_such(operators, tmp_path: Path) -> None:
    with pytest.raises(
        TraceError, match=r"no server would load the program: .*an operator 'torch\.ops\.\w+\._\."
    ) as caught:
        write(lambda net, x, z: operators._(net.yes(x)), tmp_path / "f")
    assert "ask whoever sent" not in str(caught.value)
    assert not (tmp_path / "f" / PROGRAM).exists()
