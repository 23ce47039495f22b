"""The score program has what the model's own forward does before and between the arches, and nothing behind the dense arch."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export.api import Exporter
from dist_export.errors import ModelError, UserError
from tests.support import score_models as models

LARGE = 9.0
"""A price that no sample has."""


class OwnForward(nn.Module):
    """``before`` gets the batch, ``between`` the blocks, ``behind`` what the dense arch returns."""

    def __init__(self) -> None:
        super().__init__()
        look = models.WAYS["embedding"][1]
        self.sparse_arch = models.Lookups(nn.Embedding(models.ROWS, models.DIM), look)
        self.dense_arch = models.Head(models.DIM + 1)

    def before(self, batch: Any) -> Any:
        return batch

    def between(self, blocks: Any, batch: Any) -> Any:
        return blocks

    def behind(self, output: Any, batch: Any) -> Any:
        return output

    def forward(self, batch: Any) -> Any:
        given = self.before(batch)
        return self.behind(self.dense_arch(self.between(self.sparse_arch(given), batch)), batch)


class IdsModulo(OwnForward):
    def before(self, batch: Any) -> Any:
        return {**batch, "user": batch["user"] % models.ROWS}


class PriceBelow(OwnForward):
    def before(self, batch: Any) -> Any:
        return {**batch, "price": batch["price"].clamp(max=5.0)}


class PriceInPlace(OwnForward):
    def before(self, batch: Any) -> Any:
        batch["price"].clamp_(max=5.0)
        return batch


class PriceBetween(OwnForward):
    def between(self, blocks: Any, batch: Any) -> Any:
        return {**blocks, "price": blocks["price"].clamp(max=5.0)}


class PriceByHook(OwnForward):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(lambda _, args: ({**args[0], "price": args[0]["price"].clamp(max=5.0)},))


class ByLabel(OwnForward):
    """Reads an input that no arch takes."""

    def before(self, batch: Any) -> Any:
        return {**batch, "user": torch.where(batch["price"][:, 0] > 5, torch.zeros_like(batch["user"]), batch["user"])}


class Trunk(nn.Module):
    def __init__(self, sparse_arch: nn.Module, dense_arch: nn.Module) -> None:
        super().__init__()
        self.sparse_arch, self.dense_arch = sparse_arch, dense_arch

    def forward(self, batch: Any) -> Any:
        return self.dense_arch(self.sparse_arch(batch))


class WithinAnother(OwnForward):
    """The arches are called by a module within the model, which has a hook of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk(self.sparse_arch, self.dense_arch)
        del self.sparse_arch, self.dense_arch
        self.trunk.register_forward_pre_hook(lambda _, args: ({**args[0], "price": args[0]["price"].clamp(max=5.0)},))

    def forward(self, batch: Any) -> Any:
        return self.trunk(batch)


class Loss(PriceBelow):
    """What comes behind the dense arch is the trainer's: a layer that no score depends on, a label, a literal."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(1, 1)
        self.register_buffer("steps", torch.zeros(1))

    def behind(self, output: Any, batch: Any) -> Any:
        self.steps += 1
        return ((self.aux(output["ctr"]) - batch["label"][:, None].float()) * torch.tensor(5.0)).mean()


class Literal(OwnForward):
    def between(self, blocks: Any, batch: Any) -> Any:
        return {**blocks, "price": torch.minimum(blocks["price"], torch.tensor(5.0))}


class AskingForParameters(OwnForward):
    """The first parameter is a table of the sparse arch, which is not there while the model is traced."""

    def between(self, blocks: Any, batch: Any) -> Any:
        first = next(self.dense_arch.parameters(), None)
        return blocks if first is None else {**blocks, "price": blocks["price"].to(first.device).clamp(max=5.0)}


def export(tmp_path: Path, build: Any, *, prefix: str = "", **settings: Any) -> tuple[Any, nn.Module]:
    trained = models.train(build())
    checkpoint = models.save(trained, tmp_path / "trained.pth")
    arches = f"{prefix}sparse_arch", f"{prefix}dense_arch"
    settings = {"score_program": "require", **settings}
    batch = models.inputs_of(trained, models.batch_of())
    Exporter(build(), *arches, [batch], checkpoint, tmp_path / "out", **settings).export(progress=False)
    return dist_export.open_package(tmp_path / "out"), trained


def scores_of_model(trained: nn.Module, batch: Any) -> np.ndarray:
    """Return what the dense arch returns while the whole model runs."""
    kept: list[Any] = []
    dense_arch = next(module for name, module in trained.named_modules() if name.endswith("dense_arch"))
    handle = dense_arch.register_forward_hook(lambda _, __, output: kept.append(output["ctr"]))
    with torch.no_grad():
        trained({name: tensor.clone() for name, tensor in batch.items()})
    handle.remove()
    return kept[0].numpy()


def other_batch(trained_rows: int = models.ROWS) -> Any:
    """Return a batch with ids and prices that the sample lacks."""
    batch = models.batch_of(7, seed=3)
    batch["user"] = batch["user"] + trained_rows * (torch.arange(7) % 2)
    batch["price"] = batch["price"] + LARGE * (torch.arange(7)[:, None] % 3 == 0)
    return batch


@pytest.mark.parametrize(
    "build",
    [IdsModulo, PriceBelow, PriceInPlace, PriceBetween, PriceByHook, ByLabel, Loss],
    ids=lambda its: its.__name__,
)
def test_what_forward_does_is_in_the_program_though_the_sample_does_not_show_it(tmp_path, build) -> None:
    package, trained = export(tmp_path, build)
    batch = other_batch()
    if build is not IdsModulo:
        batch["user"] = batch["user"] % models.ROWS
    np.testing.assert_allclose(package.score(batch)["ctr"], scores_of_model(trained, batch), rtol=1e-5, atol=1e-6)


def test_a_module_between_the_model_and_the_arches_has_its_hooks(tmp_path) -> None:
    package, trained = export(tmp_path, WithinAnother, prefix="trunk.")
    batch = other_batch(0)
    np.testing.assert_allclose(package.score(batch)["ctr"], scores_of_model(trained, batch), rtol=1e-5, atol=1e-6)


def test_what_forward_does_to_a_column_is_not_in_the_contract_as_a_plain_column(tmp_path) -> None:
    package, _ = export(tmp_path, PriceBelow)
    price = next(entry for entry in package.manifest.serving.inputs if entry.name == "price")
    assert "clamp" in price.unknown


class Chunks(OwnForward):
    """Scores in chunks of 512: of a small sample, only the first is there."""

    def forward(self, batch: Any) -> Any:
        found, begin = [], 0
        while begin < batch["user"].shape[0]:
            part = {name: batch[name][begin : begin + 512] for name in ("user", "price")}
            found.append(self.dense_arch(self.sparse_arch(part))["ctr"])
            begin += 512
        return torch.cat(found)


def test_a_forward_that_scores_in_chunks_loses_no_row(tmp_path) -> None:
    package, _ = export(tmp_path, Chunks, score_program="auto")
    score = package.manifest.score
    if score is msgspec.UNSET:
        return
    assert any("512" in text for text in score.conditions)
    large = {"user": torch.arange(600) % models.ROWS, "price": torch.rand(600, 1)}
    with pytest.raises(UserError):
        package.score(large)


class SmallChunks(OwnForward):
    """Of the sample it calls the dense arch once, of 301 examples twice. torch sees no branch on a size."""

    def forward(self, batch: Any) -> Any:
        parts = [{"user": batch["user"], "price": batch["price"]}]
        if not torch.compiler.is_compiling() and len(batch["user"]) > 256:
            parts = [
                {name: tensor[part] for name, tensor in parts[0].items()} for part in (slice(256), slice(256, None))
            ]
        return torch.cat([self.dense_arch(self.sparse_arch(part))["ctr"] for part in parts])


def test_a_model_that_calls_its_dense_arch_again_for_a_larger_batch_has_no_program(tmp_path) -> None:
    package, _ = export(tmp_path, SmallChunks, score_program="auto")
    assert package.manifest.score is msgspec.UNSET
    assert any("at 301 examples model(batch) calls the dense arch 2 times" in note for note in package.manifest.notes)


class BranchOnValues(OwnForward):
    def before(self, batch: Any) -> Any:
        return {**batch, "user": batch["user"] * 0} if batch["price"].max() > 5 else batch


class OwnParameter(OwnForward):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def between(self, blocks: Any, batch: Any) -> Any:
        return {**blocks, "price": blocks["price"] + self.shift * 0}


class MoreArguments(OwnForward):
    def __init__(self) -> None:
        super().__init__()
        inner = self.dense_arch.forward
        self.dense_arch.forward = lambda blocks, batch=None: inner(blocks)  # type: ignore[method-assign]

    def forward(self, batch: Any) -> Any:
        return self.dense_arch(self.sparse_arch(batch), batch)


class BranchBehind(OwnForward):
    """Whether the dense arch is called once more is seen behind its first call."""

    def behind(self, output: Any, batch: Any) -> Any:
        return self.dense_arch(self.sparse_arch(batch)) if output["ctr"].max() > 2 else output


class Caught(OwnForward):
    """Goes on without the clamp where the trace has no value to branch on."""

    def before(self, batch: Any) -> Any:
        try:
            if (batch["price"] > 5).any():
                return {**batch, "price": batch["price"].clamp(max=5.0)}
        except Exception:
            return batch
        return batch


class CaughtLater(OwnForward):
    """Takes a number, which succeeds, and branches on it, which does not."""

    def before(self, batch: Any) -> Any:
        highest = batch["price"].max().item()
        try:
            return {**batch, "price": batch["price"].clamp(max=5.0)} if highest > 5 else batch
        except Exception:
            return batch


class CaughtSize(OwnForward):
    """Branches on a size that follows from values."""

    def size(self, batch: Any) -> Any:
        return torch.bincount(batch["user"]).shape[0]

    def before(self, batch: Any) -> Any:
        try:
            return {**batch, "price": batch["price"].clamp(max=5.0)} if self.size(batch) > 4 else batch
        except Exception:
            return batch


class CaughtLength(CaughtSize):
    def size(self, batch: Any) -> Any:
        return len(batch["price"][batch["price"] > 5])


class CaughtArray(CaughtSize):
    def size(self, batch: Any) -> Any:
        return np.asarray(batch["price"]).max()


class CaughtMethod(OwnForward):
    """Asks by the tensor's own method."""

    def before(self, batch: Any) -> Any:
        try:
            return (
                {**batch, "price": batch["price"].clamp(max=5.0)} if (batch["price"] > 5).any().is_nonzero() else batch
            )
        except Exception:
            return batch


class ByClosure(OwnForward):
    """Reads a weight of the dense arch by a way that is no attribute."""

    def __init__(self) -> None:
        super().__init__()
        weight = self.dense_arch.mlp[0].weight
        self.total = lambda: torch.sum(weight)

    def between(self, blocks: Any, batch: Any) -> Any:
        return {**blocks, "price": torch.where(blocks["price"] > 5, self.total(), blocks["price"])}


class ByPartial(ByClosure):
    def __init__(self) -> None:
        super().__init__()
        self.total = functools.partial(torch.sum, self.dense_arch.mlp[0].weight)


class ByList(OwnForward):
    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.dense_arch.mlp[0].weight]

    def between(self, blocks: Any, batch: Any) -> Any:
        return {**blocks, "price": torch.where(blocks["price"] > 5, self.kept[0].sum(), blocks["price"])}


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (CaughtSize, "the model's code catches an error of the trace"),
        (CaughtLength, "the model's code catches an error of the trace"),
        (CaughtMethod, "the model's code catches an error of the trace"),
        (CaughtArray, "the model's code catches an error of the trace"),
        (ByClosure, "forward computes with total.weight, outside of the sparse and the dense arch"),
        (ByPartial, "forward computes with total, outside of the sparse and the dense arch"),
        (ByList, "forward computes with kept[0], outside of the sparse and the dense arch"),
        (CaughtLater, "takes a Python number from a tensor"),
        (BranchBehind, "data-dependent"),
        (Caught, "the model's code catches an error of the trace"),
        (BranchOnValues, "data-dependent"),
        (OwnParameter, "forward computes with shift, outside of the sparse and the dense arch"),
        (MoreArguments, "calls the dense arch with 2 arguments"),
    ],
    ids=lambda its: getattr(its, "__name__", ""),
)
def test_a_forward_that_cannot_be_in_the_program_leaves_no_program(tmp_path, build, reason) -> None:
    class Fresh(build):
        """Its parameters outside of the arches have the checkpoint's values nowhere."""

    with pytest.raises(ModelError, match=re.escape(reason)):
        export(tmp_path, Fresh)
    assert not (tmp_path / "out").exists()
    package, _ = export(tmp_path, Fresh, score_program="auto")
    assert package.manifest.score is msgspec.UNSET
    assert any(reason in note for note in package.manifest.notes)


class ByNumber(OwnForward):
    def between(self, blocks: Any, batch: Any) -> Any:
        return {**blocks, "price": blocks["price"] * batch["at"]["scale"]}


def test_numbers_of_the_batch_are_constants_and_a_note_says_so(tmp_path) -> None:
    """A batch with another number gives other scores than the program: nothing but a note can tell."""
    batch = {**models.batch_of(), "at": {"scale": 1.0, "day": "monday"}}
    checkpoint = models.save(models.train(ByNumber()), tmp_path / "trained.pth")
    arches = "sparse_arch", "dense_arch"
    manifest = Exporter(ByNumber(), *arches, [batch], checkpoint, tmp_path / "out").export(progress=False)
    notes = [note for note in manifest.notes if "constants" in note]
    assert len(notes) == 1
    assert "'at'['scale'] (1.0), 'at'['day'] ('monday')" in notes[0]


class Held:
    """An object of which nobody knows that it holds ids."""

    def __init__(self, ids: Any) -> None:
        self.ids = ids


class ByObject(OwnForward):
    def before(self, batch: Any) -> Any:
        return {**batch, "user": batch["held"].ids}


def test_an_object_in_the_batch_is_no_constant(tmp_path) -> None:
    batch = {**models.batch_of(), "held": Held(models.batch_of()["user"])}
    checkpoint = models.save(models.train(ByObject()), tmp_path / "trained.pth")
    arches = "sparse_arch", "dense_arch"
    manifest = Exporter(ByObject(), *arches, [batch], checkpoint, tmp_path / "out").export(progress=False)
    assert manifest.score is msgspec.UNSET
    assert any("'held' of the batch is a Held, whose values would be constants" in note for note in manifest.notes)


def test_a_live_model_computes_with_its_own_values(tmp_path) -> None:
    trained = models.train(OwnParameter())
    arches = "sparse_arch", "dense_arch"
    settings = {"format": "live", "score_program": "require"}
    Exporter(trained, *arches, [models.batch_of()], None, tmp_path / "out", **settings).export(progress=False)
    batch = other_batch(0)
    found = dist_export.open_package(tmp_path / "out").score(batch)["ctr"]
    np.testing.assert_allclose(found, scores_of_model(trained, batch), rtol=1e-5, atol=1e-6)


class CaughtInTheSparseArch(models.Lookups):
    """Reads a table in a way that has no lookup, and goes on without it."""

    def forward(self, batch: Any) -> Any:
        blocks = super().forward(batch)
        try:
            highest = self.table.weight.max(0).values[:1]
        except Exception:
            return blocks
        return {**blocks, "price": torch.minimum(blocks["price"], highest.abs() + LARGE)}


def test_an_error_of_a_table_that_is_caught_leaves_no_program(tmp_path) -> None:
    def build() -> nn.Module:
        look = models.WAYS["embedding"][1]
        sparse_arch = CaughtInTheSparseArch(nn.Embedding(models.ROWS, models.DIM), look)
        return models.Model(sparse_arch, models.DIM + 1)

    with pytest.raises(ModelError, match="the model's code catches an error of the trace"):
        export(tmp_path, build)


@pytest.mark.parametrize("wrap", ["compile", "model"])
def test_a_compiled_model_is_traced_as_it_was_written(tmp_path, wrap) -> None:
    def build() -> nn.Module:
        model = PriceBelow()
        if wrap == "compile":
            model.sparse_arch = torch.compile(model.sparse_arch)  # type: ignore[assignment]
            return model
        return torch.compile(model)  # type: ignore[return-value]

    trained = models.train(PriceBelow())
    checkpoint = models.save(trained, tmp_path / "trained.pth")
    own = build()
    Exporter(
        own,
        "sparse_arch",
        "dense_arch",
        [models.batch_of()],
        checkpoint,
        tmp_path / "out",
        score_program="require",
    ).export(progress=False)
    batch = other_batch(0)
    found = dist_export.open_package(tmp_path / "out").score(batch)["ctr"]
    np.testing.assert_allclose(found, scores_of_model(trained, batch), rtol=1e-5, atol=1e-6)


class Counting(PriceBelow):
    """Counts its calls in buffers, in eval mode too. No score depends on them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.sparse_arch.register_buffer("calls", torch.zeros(1))

    def before(self, batch: Any) -> Any:
        self.calls += 1
        self.sparse_arch.calls += 1
        return super().before(batch)


def test_buffers_that_forward_changes_are_put_back(tmp_path) -> None:
    model = Counting()
    checkpoint = models.save(models.train(Counting()), tmp_path / "trained.pth")
    arches = "sparse_arch", "dense_arch"
    settings = {"score_program": "require"}
    Exporter(model, *arches, [models.batch_of()], checkpoint, tmp_path / "out", **settings).export(progress=False)
    assert (model.calls.item(), model.sparse_arch.calls.item()) == (0.0, 0.0)


def test_the_model_is_left_as_it_was(tmp_path) -> None:
    model = PriceBelow()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = dict(vars(model.dense_arch))
    checkpoint = models.save(models.train(PriceBelow()), tmp_path / "trained.pth")
    Exporter(model, "sparse_arch", "dense_arch", [models.batch_of()], checkpoint, tmp_path / "out").export(
        progress=False
    )
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert vars(model.dense_arch).keys() == own.keys()
    assert not model.dense_arch._forward_pre_hooks
