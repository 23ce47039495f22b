"""Whole exports of models whose scores depend on the order, the type or the constants of the blocks."""

from __future__ import annotations

import collections
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_export.archive.safe_load import load_program
from dist_export.errors import ModelError
from tests.support import exports, tiny_model

BATCH = tiny_model.build_dataset()[0][1]


class Sparse(tiny_model.SparseArch):
    """Returns its blocks in no sorted order, through a function of them and of the batch."""

    def __init__(self, fn) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, batch):
        blocks = super().forward(batch)
        ordered = {"user": blocks["user"], "price": blocks["price"], "item": blocks["item"]}
        return self.fn(ordered, batch)


class Dense(tiny_model.DenseArch):
    def forward(self, blocks):
        x = torch.cat([b for b in blocks.values() if isinstance(b, torch.Tensor)], dim=-1) * blocks.get("scale", 1.0)
        return {"ctr": torch.sigmoid(self.out(torch.relu(self.norm(self.hidden(x)))))}


class Model(nn.Module):
    def __init__(self, fn, dense: nn.Module | None = None) -> None:
        super().__init__()
        self.sparse_arch = Sparse(fn)
        self.dense_arch = dense or Dense()


def cut(batch, num_rows: int):
    return {name: column[:num_rows] for name, column in batch.items()}


def export(tmp_path: Path, fn, dataset=None, dense: nn.Module | None = None):
    torch.manual_seed(7)
    model = Model(fn, dense)
    checkpoint = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    out = tmp_path / "out"
    manifest = exports.exporter(
        model, "sparse_arch", "dense_arch", dataset or [BATCH], checkpoint, out, filter_sparse_opt=True
    ).export()
    return manifest, out, checkpoint


def scores_of_trainer(blocks, checkpoint: Path) -> torch.Tensor:
    """What the dense arch gives with the checkpoint's parameters, on blocks in the sparse arch's own order."""
    dense = Dense()
    state = torch.load(checkpoint / "model.pt", weights_only=True)
    dense.load_state_dict({name.removeprefix("dense_arch."): value for name, value in state.items()})
    with torch.no_grad():
        return dense.eval()(blocks)["ctr"]


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict, types.MappingProxyType, collections.UserDict])
def test_scores_are_the_trainers_whatever_the_order_of_the_blocks(kind, tmp_path: Path) -> None:
    manifest, out, checkpoint = export(tmp_path, lambda blocks, _: kind(blocks))
    entry = manifest.dense
    assert [tensor.name for tensor in entry.inputs] == ["item", "price", "user"]
    assert entry.input_order == ("user", "price", "item")
    torch.manual_seed(1)
    blocks = {"user": torch.randn(6, 4), "price": torch.randn(6, 1), "item": torch.randn(6, 4)}
    program = load_program(out / entry.program).module()
    torch.testing.assert_close(program(**blocks)[0], scores_of_trainer(kind(blocks), checkpoint), rtol=0, atol=0)


def with_constant(value):
    return lambda blocks, batch: {"scale": value(batch) if callable(value) else value, **blocks}


@pytest.mark.parametrize(
    "dataset", [[BATCH], [BATCH, BATCH, cut(BATCH, 3)], [cut(BATCH, 1)]], ids=["cut", "second batch", "one row"]
)
def test_a_constant_is_served_as_it_was_trained(dataset, tmp_path: Path) -> None:
    manifest, out, checkpoint = export(tmp_path, with_constant(0.25), dataset)
    assert manifest.dense.constants == {"scale": "0.25"}
    assert any("constants of the program: scale = 0.25" in note for note in manifest.notes)
    blocks = {"user": torch.randn(6, 4), "price": torch.randn(6, 1), "item": torch.randn(6, 4)}
    found = load_program(out / manifest.dense.program).module()(**blocks)[0]
    torch.testing.assert_close(found, scores_of_trainer({"scale": 0.25, **blocks}, checkpoint), rtol=0, atol=0)


class Opaque:
    """A batch that only its owner can cut."""

    def __init__(self, batch) -> None:
        self.batch = batch


@pytest.mark.parametrize(
    ("fn", "dataset", "told"),
    [
        (with_constant(lambda batch: batch["price"].shape[0]), None, "'scale' as 5 for one batch and as 2 for another"),
        (with_constant(lambda batch: float(batch["price"].sum())), [BATCH, cut(BATCH, 2)], "'scale' as 2.5 for one"),
        (lambda blocks, batch: {**blocks, "shape": (batch["price"].shape,)}, None, r"\"shape\[0\]\[0\]\"|shape.0..0."),
    ],
)
def test_what_follows_from_the_batch_is_no_constant(fn, dataset, told, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=told) as caught:
        export(tmp_path, fn, dataset)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_constant_that_cannot_be_shown_to_be_one_is_refused(tmp_path: Path) -> None:
    class Opens(Sparse):
        def forward(self, data):
            return super().forward(data.batch)

    model = Model(with_constant(2))
    model.sparse_arch = Opens(with_constant(2))
    checkpoint = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")

    def run(dataset):
        return exports.exporter(
            model, "sparse_arch", "dense_arch", dataset, checkpoint, tmp_path / "out", filter_sparse_opt=True
        ).export()

    with pytest.raises(ModelError, match=r"'scale' as 2, .* have 5 rows.* a second batch of another size"):
        run([Opaque(BATCH), Opaque(BATCH)])
    assert run([Opaque(BATCH), Opaque(cut(BATCH, 4))]).dense.constants == {"scale": "2"}


class TakesFirst(tiny_model.DenseArch):
    """Uses the block that comes first, and drops the others."""

    def forward(self, blocks):
        first = list(blocks.values())[0]  # noqa: RUF015 -- as people write it
        return {"ctr": self.out(self.hidden(first.repeat(1, 3)[:, :9]))}


def test_a_dropped_block_is_one_that_no_output_depends_on_in_that_order(tmp_path: Path) -> None:
    manifest, _, _ = export(tmp_path, lambda blocks, _: blocks, dense=TakesFirst())
    assert [tensor.name for tensor in manifest.dense.inputs] == ["user"]
    assert manifest.dense.dropped_inputs == ("item", "price")
    assert manifest.dense.input_order == ("user", "price", "item")


def test_an_order_that_differs_from_batch_to_batch_is_refused_where_it_matters(tmp_path: Path) -> None:
    def fn(blocks, batch):
        names = ["user", "price", "item"] if len(batch["price"]) == 5 else ["item", "price", "user"]
        return {"scale": 1.0, **{name: blocks[name] for name in names}}

    with pytest.raises(ModelError, match="for batch 1 of rank 0 in the order item, price, user"):
        export(tmp_path, fn)
    by_name = tiny_model.DenseArch()
    assert export(tmp_path, fn, dense=by_name)[0].dense.input_order == ("user", "price", "item")


class Named(dict):
    """A mapping with a way of its own to its entries."""

    def both(self) -> list[torch.Tensor]:
        return [self["user"], self["item"]]


class TakesNested(tiny_model.DenseArch):
    def forward(self, blocks):
        price, again = blocks["seq"]
        x = torch.cat([*blocks.both(), price], dim=-1)
        return {"ctr": torch.sigmoid(self.out(self.hidden(x))) * again * blocks["more"]["k"]}


class WithForward(Model):
    def forward(self, batch):
        return self.dense_arch(self.sparse_arch(batch))


@pytest.mark.parametrize("kind", [Model, WithForward])
def test_nested_entries_of_a_mapping_of_its_own_kind_are_exported_whole(kind, tmp_path: Path) -> None:
    def fn(blocks, _):
        seq = (blocks["price"], blocks["price"] + 1)
        return Named(seq=seq, user=blocks["user"], more={"k": 2.0}, item=blocks["item"])

    torch.manual_seed(7)
    checkpoint = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    manifest = exports.exporter(
        kind(fn, TakesNested()),
        "sparse_arch",
        "dense_arch",
        [BATCH],
        checkpoint,
        tmp_path / "out",
        filter_sparse_opt=True,
    ).export()
    assert manifest.dense.input_order == ("seq_0", "seq_1", "user", "item")
    assert manifest.dense.constants == {"more['k']": "2.0"}
    assert manifest.parity.reference == ("model" if kind is WithForward else "arches")
