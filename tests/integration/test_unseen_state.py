"""State that no checkpoint has, and that agrees with itself in every comparison: a note names it."""

from __future__ import annotations

import datetime as dt
import functools
import time
from datetime import date
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from torch import nn

import dist_export
from dist_export.dense.clock_reads import note_reads
from dist_export.dense.made_at_call import BeforeCall
from tests.support import exports, tiny_model

UNSAVED, KEPT, MADE = "buffers with persistent=False", "the sparse arch keeps", "forward makes"


class Sparse(nn.Module):
    """Two plain tables, and numbers that are taken off."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(50, tiny_model.DIM), nn.Embedding(40, tiny_model.DIM)
        self.mean: Any = 0.0

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"user": self.user(batch["user"]), "item": self.item(batch["item"]) - self.mean}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(2 * tiny_model.DIM, 1)
        self.mean: Any = 0.0

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"ctr": self.out(torch.cat([blocks["user"], blocks["item"]], 1) - self.mean)}


class Model(nn.Module):
    def __init__(self, sparse_arch: nn.Module, dense_arch: nn.Module) -> None:
        super().__init__()
        self.sparse_arch, self.dense_arch = sparse_arch, dense_arch

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.dense_arch(self.sparse_arch(batch))


def export(model: nn.Module, folder: Path, *, is_live: bool = False) -> list[str]:
    """Return the notes of an export."""
    batch = {"user": torch.arange(6), "item": torch.arange(6)}
    if not is_live:
        (folder / "ckpt").mkdir()
        torch.save(model.state_dict(), folder / "ckpt" / "model.pt")
    source = None if is_live else str(folder / "ckpt")
    exporter = exports.exporter(model, "sparse_arch", "dense_arch", [batch], source, str(folder / "out"))
    return list(exporter.export().notes)


def put_buffers(module: nn.Module, width: int) -> None:
    del module.mean
    module.register_buffer("mean", torch.full((width,), 0.5), persistent=False)


@pytest.mark.parametrize("is_live", [False, True])
def test_what_no_state_dict_has_is_told_once(is_live: bool, tmp_path: Path) -> None:
    model = Model(Sparse(), Dense())
    put_buffers(model.sparse_arch, tiny_model.DIM)
    put_buffers(model.dense_arch, 2 * tiny_model.DIM)
    model.dense_arch.register_buffer("positions", torch.arange(3), persistent=False)
    model.sparse_arch.factors = [torch.rand(2)]
    notes = export(model, tmp_path, is_live=is_live)
    told = [note for note in notes if note.startswith((UNSAVED, KEPT, MADE))]
    if is_live:
        assert told == []
        return
    buffers, kept = told
    assert (
        "(dense_arch.mean, dense_arch.positions, sparse_arch.mean): the package has the values of the model given"
        in buffers
    )
    assert "keeps sparse_arch.factors[0], neither parameter nor buffer" in kept


def test_a_model_that_keeps_nothing_has_no_such_note(tmp_path: Path) -> None:
    model = Model(Sparse(), Dense())
    model.sparse_arch.register_buffer("saved", torch.ones(3))
    model.sparse_arch.view = model.sparse_arch.user.weight.detach()[:2]
    notes = export(model, tmp_path)
    assert not [note for note in notes if note.startswith((UNSAVED, KEPT, MADE)) or "clock" in note]


class LazySparse(Sparse):
    """Takes off what the first batch has in the mean: in an attribute, a container, or a buffer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.mean, self.cache = kind, None, {}
        self.has_run = False
        if kind == "buffer":
            del self.mean
            self.register_buffer("mean", None, persistent=False)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.has_run = self.knows_more = True
        blocks = super().forward({"user": batch["user"], "item": batch["item"]}) if self.mean is not None else None
        if blocks is None:
            mean = self.user(batch["user"]).mean(0)
            if self.kind == "container":
                mean = self.cache.setdefault("mean", mean)
                return {"user": self.user(batch["user"]), "item": self.item(batch["item"]) - mean}
            self.mean = float(mean.mean()) if self.kind == "number" else mean
            return self.forward(batch)
        return blocks


class LazyDense(Dense):
    def __init__(self) -> None:
        super().__init__()
        del self.mean

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not hasattr(self, "mean"):
            self.mean = blocks["user"].mean()
        return super().forward(blocks)


@pytest.mark.parametrize("kind", ["tensor", "number", "container", "buffer"])
def test_what_the_first_call_makes_is_told(kind: str, tmp_path: Path) -> None:
    (note,) = [note for note in export(Model(LazySparse(kind), Dense()), tmp_path) if note.startswith(MADE)]
    name = "cache" if kind == "container" else "mean"
    assert note.startswith(f"forward makes sparse_arch.{name} (LazySparse) at its first call")
    assert "the package has what the sample made of it" in note


def test_what_the_dense_arch_makes_is_told_once(tmp_path: Path) -> None:
    (note,) = [note for note in export(Model(Sparse(), LazyDense()), tmp_path) if note.startswith(MADE)]
    assert note.startswith("forward makes dense_arch.mean (LazyDense) at its first call")


def test_what_torch_and_tables_make_is_not_told() -> None:
    model = tiny_model.build_model()
    lazy = nn.LazyLinear(2)
    before = BeforeCall(("", model), ("lazy", lazy))
    lazy(torch.ones(1, 3))
    model.sparse_arch.user.rows_kept = torch.ones(2)
    assert before.notes() == []
    model.sparse_arch.kept = 1
    assert len(before.notes()) == 1


class Hours:
    def hour(self) -> int:
        return time.localtime().tm_hour


def age_of(batch: Any) -> float:
    return sum(time.time() - then for then in batch)


def logged(function: Any) -> Any:
    @functools.wraps(function)
    def run(*args: Any) -> Any:
        began = monotonic()
        print(began)
        return function(*args)

    return run


class Now(nn.Module):
    def forward(self, batch: Any) -> Any:
        return dt.datetime.now().hour + batch  # noqa: DTZ005 -- as callers write it


class Today(nn.Module):
    def forward(self, batch: Any) -> Any:
        return [date.today().day for _ in batch]  # noqa: DTZ011 -- as callers write it


class Named(nn.Module):
    def forward(self, batch: Any) -> Any:
        return age_of(batch)


class Method(nn.Module):
    def forward(self, batch: Any) -> Any:
        return self.features(batch)

    def features(self, batch: Any) -> Any:
        return batch + sum(self.now() for _ in range(2))

    @staticmethod
    def now() -> float:
        return monotonic()


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hours, self.clock = Hours(), time.time_ns

    def forward(self, batch: Any) -> Any:
        return self.hours.hour() + self.clock() + batch


class Imports(nn.Module):
    def forward(self, batch: Any) -> Any:
        import time as watch
        from datetime import datetime as moment

        return watch.time() + moment.utcnow().hour + batch  # noqa: DTZ003 -- as callers write it


class Quiet(nn.Module):
    """Names what only looks like a clock, and is decorated by something that reads one."""

    def __init__(self) -> None:
        super().__init__()
        self.time = Hours()

    @logged
    def forward(self, batch: Any) -> Any:
        now = self.time
        return batch, now, dt.datetime.fromtimestamp(0, dt.timezone.utc), time.strftime, self.today()

    def today(self) -> dt.timedelta:
        return dt.timedelta(1)

    def unused(self) -> float:
        return time.time()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Now, ["Now.forward reads datetime.now()"]),
        (Today, ["Today.forward reads date.today()"]),
        (Named, ["age_of, which Named uses, reads time.time()"]),
        (Method, ["Method.now reads time.monotonic()"]),
        (Held, ["Held.forward reads time.time_ns()", "Hours.hour reads time.localtime()"]),
        (Imports, ["Imports.forward reads time.time()", "Imports.forward reads datetime.utcnow()"]),
        (Quiet, []),
    ],
)
def test_forwards_that_read_the_clock_are_named(kind: type[nn.Module], told: list[str]) -> None:
    notes = note_reads(nn.Sequential(kind(), kind()))
    assert len(notes) == bool(told)
    assert all(notes[0].count(its) == 1 for its in told)


def test_an_export_tells_of_the_clock(tmp_path: Path) -> None:
    class Aged(Sparse):
        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: block * (time.time() > 0) for name, block in super().forward(batch).items()}

    notes = export(Model(Aged(), Dense()), tmp_path)
    assert any(note.startswith("Aged.forward reads time.time(): the clock is read at the export") for note in notes)


def test_an_export_tells_of_code_that_asks_whether_it_is_traced(tmp_path: Path) -> None:
    """The branch of the trace is in the package, and the sample need not show the other one."""

    class Asks(Sparse):
        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: block if self.is_traced() else block * 1 for name, block in super().forward(batch).items()}

        def is_traced(self) -> bool:
            return torch.compiler.is_compiling()

    notes = export(Model(Asks(), Dense()), tmp_path)
    told = [
        note
        for note in notes
        if note.startswith("Asks.is_traced reads torch.compiler.is_compiling(): that is true while")
    ]
    assert len(told) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_an_export_tells_of_an_encoder_that_gives_zeros_for_padding(nested: bool, tmp_path: Path) -> None:
    class Encoded(Dense):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
            self.unused = nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested)

    notes = export(Model(Sparse(), Encoded()), tmp_path)
    assert any(note.startswith("dense_arch.unused: in eval mode") for note in notes) == nested


@pytest.mark.parametrize("is_live", [False, True])
def test_a_step_that_the_dense_arch_counts_in_training_is_told(is_live: bool, tmp_path: Path) -> None:
    class WarmUp(Dense):
        def __init__(self) -> None:
            super().__init__()
            self.step = 0

        def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            self.step += self.training
            scores = super().forward(blocks)
            return scores if self.step < 100 else {name: score * 2 for name, score in scores.items()}

    notes = export(Model(Sparse(), WarmUp()), tmp_path, is_live=is_live)
    told = [note for note in notes if "dense_arch.step in its forward and makes scores of it" in note]
    assert len(told) == (not is_live)


class FilledOnce(nn.Module):
    """Fills a buffer at its first call, and knows by a number that it has, as caches of positions do."""

    def __init__(self, *, is_rebound: bool) -> None:
        super().__init__()
        self.register_buffer("positions", torch.zeros(tiny_model.DIM), persistent=False)
        self.cached, self.is_rebound = 0, is_rebound

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.cached:
            filled = torch.arange(float(tiny_model.DIM)).cos()
            if self.is_rebound:
                self.positions = filled
            else:
                self.positions.copy_(filled)
            self.cached = tiny_model.DIM
        return rows + self.positions


class WithPositions(nn.Module):
    def __init__(self, arch: nn.Module, filled: FilledOnce) -> None:
        super().__init__()
        self.arch, self.filled = arch, filled

    def forward(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if isinstance(self.arch, Dense):
            return self.arch(given | {"user": self.filled(given["user"])})
        blocks = self.arch(given)
        return blocks | {"user": self.filled(blocks["user"])}


@pytest.mark.parametrize("is_rebound", [False, True])
@pytest.mark.parametrize("place", ["sparse", "dense"])
def test_a_buffer_that_is_filled_once_is_filled_in_each_run(place: str, is_rebound: bool, tmp_path: Path) -> None:
    """It was put back and the number was not, so that the reference and the package both had zeros."""

    def build() -> Model:
        arches = {"sparse": Sparse(), "dense": Dense()}
        arches[place] = WithPositions(arches[place], FilledOnce(is_rebound=is_rebound))  # type: ignore[assignment]
        return Model(arches["sparse"], arches["dense"])

    batches = [{"user": torch.arange(6) + at, "item": torch.arange(6)} for at in range(3)]
    torch.manual_seed(0)
    trained = build()
    torch.save(trained.state_dict(), tmp_path / "model.pt")
    with torch.no_grad():
        blocks = trained.sparse_arch(batches[2])
        expected = trained(batches[2])["ctr"]
    torch.manual_seed(1)
    model = build()
    before = model.state_dict()
    exports.exporter(
        model,
        "sparse_arch",
        "dense_arch",
        batches,
        str(tmp_path / "model.pt"),
        str(tmp_path / "out"),
        score_program="auto",
    ).export()
    filled = next(module for module in model.modules() if isinstance(module, FilledOnce))
    assert not filled.cached
    assert not filled.positions.any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with dist_export.open_package(tmp_path / "out") as package:
        scores = package.load_program().module()(**{name: block.detach() for name, block in blocks.items()})
        torch.testing.assert_close(
            scores["ctr"] if isinstance(scores, dict) else scores[0], expected, rtol=0, atol=1e-6
        )
        if place == "sparse" and not is_rebound:  # the trace has the write, and cannot know that it comes once
            assert any("or call the model once before it is exported" in note for note in package.manifest.notes)
        else:
            score = torch.from_numpy(package.score({name: ids.numpy() for name, ids in batches[2].items()})["ctr"])
            torch.testing.assert_close(score, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_used", [False, True])
def test_a_step_that_the_sparse_arch_counts_is_told_if_blocks_are_made_of_it(is_used: bool, tmp_path: Path) -> None:
    class WarmUp(Sparse):
        def __init__(self) -> None:
            super().__init__()
            self.step = torch.tensor(0)

        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            self.step.add_(1)
            blocks = super().forward(batch)
            factor = torch.where(self.step < 100, 1.0, 2.0) if is_used else 1.0
            return {name: block * factor for name, block in blocks.items()}

    model = Model(WarmUp(), Dense())
    before = model.sparse_arch.step
    told = [note for note in export(model, tmp_path) if "in its forward and makes scores of it" in note]
    assert len(told) == is_used
    assert all(note.startswith("the sparse arch changes sparse_arch.step in its forward") for note in told)
    assert model.sparse_arch.step is before
    assert before < 50
