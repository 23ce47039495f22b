"""Parameters and buffers of the caller's dense arch that share memory, or are no plain tensors: exported, or one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dist_export
from dist_export.dense.own_parameters import put_values, state_put_back, values_within, write_into
from dist_export.errors import ModelError
from dist_export.model.unwrap import copy_dense_arch
from dist_export.verify.verify import verify
from tests.support import exports, tiny_model


class Plain(torch.Tensor):
    """A subclass that adds nothing."""


class Counting(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def buffer(make):
    return lambda net: net.register_buffer("scale", make())


def two_views(net) -> None:
    base = torch.linspace(1, 3, 18)
    net.register_buffer("scale", base[:9])
    net.register_buffer("other", base[4:13])


def expanded_parameter(net) -> None:
    net.scale = nn.Parameter(torch.full((1,), 2.0).expand(9))


def alias_in_attribute(net) -> None:
    net.register_buffer("stored", torch.full((1,), 2.0).expand(9))
    net.scale = net.stored


@torch.inference_mode()
def inferred(net) -> None:
    net.register_buffer("scale", torch.full((9,), 2.0))
    net.out = nn.Linear(9, 1)


LEGAL = {
    "expanded": buffer(lambda: torch.full((1,), 2.0).expand(9)),
    "expanded in one dimension": buffer(lambda: torch.linspace(1, 2, 9).expand(4, 9)[:1].expand(1, 9)),
    "windows": buffer(lambda: torch.linspace(1, 2, 9).unfold(0, 9, 1)),
    "overlapping windows": buffer(lambda: torch.linspace(1, 2, 11).unfold(0, 9, 1)[:1]),
    "expanded parameter": expanded_parameter,
    "alias in an attribute": alias_in_attribute,
    "two views of one buffer": two_views,
    "without elements": lambda net: (net.register_buffer("scale", torch.ones(1)), net.register_buffer("no", torch.ones(0, 3))),
    "inference mode": inferred,
    "frozen": lambda net: (net.register_buffer("scale", torch.ones(9)), net.out.requires_grad_(requires_grad=False)),
    "subclass that adds nothing": buffer(lambda: torch.full((9,), 2.0).as_subclass(Plain)),
    "no leaf": buffer(lambda: nn.Parameter(torch.ones(9)) * 2),
    "transposed": lambda net: (
        net.register_buffer("scale", torch.ones(9)), setattr(net.out, "weight", nn.Parameter(torch.ones(9, 1).t()))
    ),
    "view of a parameter": lambda net: net.register_buffer("scale", net.out.weight.detach()[0]),
}  # fmt: skip


class Dense(nn.Module):
    def __init__(self, setup) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.out = nn.Linear(9, 1)
        setup(self)

    def forward(self, blocks):
        return {"ctr": torch.sigmoid(self.out(torch.cat([*blocks.values()], 1) * self.scale))}


class Model(nn.Module):
    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.sparse_arch, self.dense_arch = tiny_model.SparseArch(), dense

    def forward(self, batch):
        return self.dense_arch(self.sparse_arch(batch))


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone().as_subclass(torch.Tensor) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("case", LEGAL)
def test_it_is_exported_with_the_checkpoints_values(case: str, tmp_path: Path) -> None:
    dense, trained = Dense(LEGAL[case]), Dense(LEGAL[case])
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    torch.save({f"dense_arch.{name}": tensor * 1.5 for name, tensor in state_of(trained).items()}, source / "model.pt")
    before, objects = state_of(dense), [id(t) for t in (*dense.parameters(), *dense.buffers())]
    manifest = exports.exporter(
        Model(dense), "sparse_arch", "dense_arch", tiny_model.build_dataset(7), source, tmp_path / "out", filter_sparse_opt=True
    ).export()  # fmt: skip
    assert manifest.parity.reference == "model"
    assert verify(str(tmp_path / "out")).findings == []
    after = state_of(dense)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [id(t) for t in (*dense.parameters(), *dense.buffers())] == objects
    # by hand: what the checkpoint says, in a model whose tensors are all of their own
    plain = copy_dense_arch(trained)
    for tensor in (*plain.parameters(), *plain.buffers()):
        with torch.no_grad():
            tensor.mul_(1.5)
    package = dist_export.open_package(tmp_path / "out")
    batch = tiny_model.build_dataset(7)[0][1]
    rows = [torch.from_numpy(package.lookup(f"{n}_emb", batch[n].numpy())[0].copy()) for n in ("user", "item")]
    (found,) = package.load_program().module()(user=rows[0], item=rows[1], price=batch["price"])
    x = torch.cat([*rows, batch["price"]], 1) * trained.scale.detach() * 1.5
    torch.testing.assert_close(
        found, torch.sigmoid(x @ trained.out.weight.detach().T * 1.5 + trained.out.bias.detach() * 1.5)
    )


@pytest.mark.parametrize(
    "shape_and_strides",
    [((9,), (0,)), ((3, 4), (0, 1)), ((3, 4), (1, 0)), ((3, 4), (1, 1)), ((2, 0), (0, 1)), ((2, 3, 2), (0, 2, 0))],
)
def test_values_are_written_where_elements_lie_at_one_place(shape_and_strides) -> None:
    shape, strides = shape_and_strides
    own = torch.zeros(30).as_strided(shape, strides)
    consistent = torch.arange(1.0, 31).as_strided(shape, strides).contiguous()
    assert write_into(own, consistent)
    assert torch.equal(own, consistent)
    if own.numel():
        assert not write_into(own, torch.arange(float(own.numel())).reshape(shape))
        assert write_into(own, torch.full(shape, float("nan")))


def test_different_values_for_one_place_are_refused_by_name() -> None:
    net = Dense(expanded_parameter)
    with (
        pytest.raises(ModelError, match=r"dense\.scale has several elements at one place .*\.clone\(\)"),
        state_put_back(net),
    ):
        put_values(net, {"dense.scale": torch.arange(9.0)}, dense_model_name="dense")
    assert torch.equal(net.scale, torch.full((9,), 2.0)), "put back"
    within = values_within(net, {"sparse.scale": torch.arange(9.0)}, path="sparse", except_below="")
    with pytest.raises(ModelError, match=r"sparse\.scale has several elements"), within:
        pass


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: torch.ones(9, device="meta"), "scale is on the meta device, so it has no values"),
        (lambda: torch.eye(9).to_sparse(), r"scale is a sparse_coo \(not strided\) tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(9), 0.1, 0, torch.qint8), "scale is a quantized tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "scale is a nested tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch warns that nested and quantized tensors are a prototype, or deprecated
def test_what_is_no_plain_tensor_is_refused_before_anything_is_written(make, told: str, tmp_path: Path) -> None:
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    dense = Dense(buffer(make))
    saved = {f"dense_arch.{name}": t for name, t in dense.state_dict().items() if t.device.type != "meta"}
    torch.save(saved, source / "model.pt")
    with pytest.raises(ModelError, match=told) as caught:
        exports.exporter(
            Model(dense), "sparse_arch", "dense_arch", tiny_model.build_dataset(7), source, tmp_path / "out",
            filter_sparse_opt=True,
        ).export()  # fmt: skip
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_subclass_with_a_behaviour_of_its_own_stays() -> None:
    """What it does is not known, so nothing is taken off; the program is refused where it is written."""
    net = copy_dense_arch(Dense(buffer(lambda: torch.ones(9).as_subclass(Counting))))
    assert type(net.scale) is Counting
    assert type(copy_dense_arch(Dense(buffer(lambda: torch.ones(9).as_subclass(Plain)))).scale) is torch.Tensor
