"""The caller's own model as the reference: what is recorded, with which rows and values, and that all is put back."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dist_export.dense.reference import Reference, ReferenceRunner
from dist_export.errors import ModelError
from dist_export.formats.dtypes import CODE_BY_NAME
from dist_export.formats.row_encodings import RowCast
from dist_export.runtime.joining import join
from tests.support.table_cases import HashTable, open_finder, row, table_of

IDS = [3, 5, 8, 1000003]


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = HashTable("user")

    def forward(self, batch):
        return {"user": self.table(batch["ids"]), "price": batch["price"].clone()}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, blocks):
        hidden = self.drop(self.norm(self.first(torch.cat([blocks["user"], blocks["price"]], 1))))
        return {"ctr": hidden.sum(1)}


class Model(nn.Module):
    """Its forward is a function of the model and the batch."""

    def __init__(self, forward=None, dense: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.sparse = Sparse()
        self.dense = dense or Dense()
        self.register_buffer("steps", torch.zeros(1))
        self._forward = forward or (lambda self, batch: self.dense(self.sparse(batch)))

    def forward(self, batch):
        return self._forward(self, batch)


def batch(num: int = 4) -> dict[str, torch.Tensor]:
    return {"ids": torch.tensor(IDS[:num]), "price": torch.linspace(0, 1, num).reshape(num, 1)}


def trained(seed: int = 9) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        f"dense.{name}": torch.rand(t.shape) if t.is_floating_point() else t + 3
        for name, t in Dense().state_dict().items()
    }


def expected(num: int = 4, state=None) -> torch.Tensor:
    """What the checkpoint's rows and values give, by hand."""
    dense = Dense()
    dense.load_state_dict({name.removeprefix("dense."): t for name, t in (state or trained()).items()})
    rows = torch.tensor(np.stack([row(i) for i in IDS[:num]]), dtype=torch.float32)
    with torch.no_grad():
        return dense.eval()({"user": rows, "price": batch(num)["price"]})["ctr"]


def run(model: nn.Module, folder: Path, *, state=None, data=None, names=("sparse", "dense"), finder=None) -> Reference:
    if finder is None:
        finder = open_finder(folder / "ck", {"user": table_of(IDS)})
    arches = [model.get_submodule(name) for name in names]
    runner = ReferenceRunner(
        join(timeout_secs=60), model, *arches, sparse_model_name=names[0], dense_model_name=names[1]
    )
    with runner.dense_values(trained if state is None else lambda: state):
        return runner.run(data or batch(), finder.unmodified())


def test_what_the_dense_arch_returned_is_the_reference_whatever_forward_does_with_it(tmp_path: Path) -> None:
    """Losses and what comes behind the dense arch do not matter; rows and dense values are those of the checkpoint."""

    def forward(model, data):
        scores = model.dense(model.sparse(data))
        return {"loss": torch.sigmoid(scores["ctr"]).mean() * 7}

    found = run(Model(forward), tmp_path)
    assert (found.kind, found.reason) == ("model", "")
    assert torch.equal(found.output["ctr"], expected())
    assert list(found.blocks) == ["user", "price"]
    assert found.blocks["user"].tolist() == [row(i).tolist() for i in IDS]
    assert found.rows.asked == {"user": 4}


def both(scores: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([scores["ctr"], scores["ctr"] * 2], 1)


@pytest.mark.parametrize(
    ("finish", "has_more"),
    [
        (lambda scores, data: scores, False),
        (lambda scores, data: scores["ctr"][:, None], False),
        (lambda scores, data: scores["ctr"].mean(), False),
        (lambda scores, data: (scores["ctr"].mean(), (scores["ctr"].detach(), data["price"].double())), False),
        (lambda scores, data: {**scores, "probability": torch.sigmoid(scores["ctr"])}, False),
        (lambda scores, data: both(scores), False),
        (lambda scores, data: (scores["ctr"].mean(), data["price"]), False),
        (lambda scores, data: torch.sigmoid(scores["ctr"]), True),
        (lambda scores, data: {"ctr": scores["ctr"] / 1.5, "label": data["price"]}, True),
        (lambda scores, data: both(scores).softmax(1), True),
        (lambda scores, data: (scores["ctr"].mean(), (torch.sigmoid(scores["ctr"]), data["price"])), True),
    ],
)
def test_scores_that_are_made_behind_the_dense_arch_are_seen(finish, has_more: bool, tmp_path: Path) -> None:
    """Neither a loss nor a label is one, and what the dense arch returns may be given in another shape, or beside others."""
    found = run(Model(lambda model, data: finish(model.dense(model.sparse(data)), data)), tmp_path)
    assert found.has_more_behind == has_more


def fail(model, data):
    model.dense(model.sparse(data))
    raise KeyError("label")


NO_REFERENCE = {
    "fails": (fail, r"model\(batch\) fails: KeyError: 'label' at .*test_reference.py:\d+ \(raise KeyError"),
    "dense twice": (
        lambda m, d: (m.dense(m.sparse(d)), m.dense({"user": torch.ones(2, 2), "price": torch.ones(2, 1)})),
        "the dense arch twice",
    ),
    "sparse twice": (lambda m, d: (m.sparse(d), m.dense(m.sparse(d))), "the sparse arch twice"),
    "no dense": (lambda m, d: m.sparse(d), "the dense arch not at all"),
    "around the hooks": (lambda m, d: m.dense.forward(m.sparse(d)), "the dense arch not at all"),
    "neither": (lambda m, d: d, "the sparse arch not at all and the dense arch not at all"),
}


@pytest.mark.parametrize("case", NO_REFERENCE)
def test_a_model_that_does_not_run_as_a_whole_gives_way_to_its_arches(case: str, tmp_path: Path) -> None:
    forward, told = NO_REFERENCE[case]
    found = run(Model(forward), tmp_path)
    assert found.kind == "arches"
    assert torch.equal(found.output["ctr"], expected())
    assert re.search(told, found.reason)


def test_a_model_without_forward_says_so(tmp_path: Path) -> None:
    model = nn.Module()
    model.sparse, model.dense = Sparse(), Dense()
    found = run(model, tmp_path)
    assert (found.kind, found.reason) == ("arches", "the model has no forward")
    assert torch.equal(found.output["ctr"], expected())


def test_arches_that_fail_are_told(tmp_path: Path) -> None:
    model = Model(lambda m, d: m.dense({}))
    model.sparse.forward = lambda data: {"price": data["price"]}
    with pytest.raises(ModelError, match="the dense arch fails on the sample batch: KeyError: 'user'"):
        run(model, tmp_path)


def test_inputs_are_kept_as_they_were_before_the_arch_changed_them(tmp_path: Path) -> None:
    class Mutating(Dense):
        def forward(self, blocks):
            result = super().forward(blocks)
            blocks["user"].zero_()
            blocks.pop("price")
            result["ctr"] = result["ctr"].clone()
            return result

    def forward(model, data):
        scores = model.dense(blocks=model.sparse(data))
        data.clear()
        scores["ctr"].zero_()
        return scores

    class Keyword(Mutating):
        def forward(self, *, blocks):
            return super().forward(blocks)

    data = batch()
    found = run(Model(forward, Keyword()), tmp_path, data=data)
    assert found.kind == "model"
    assert found.args == ()
    assert torch.equal(found.kwargs["blocks"]["user"], found.blocks["user"])
    assert found.blocks["user"].tolist() == [row(i).tolist() for i in IDS]
    assert list(found.kwargs["blocks"]) == ["user", "price"]
    assert torch.equal(found.output["ctr"], expected()), "as the arch returned it, not as forward left it"
    assert list(data) == ["ids", "price"]


def test_the_callers_hooks_belong_to_what_is_served(tmp_path: Path) -> None:
    """The copy has them too: what goes in counts before them, what comes out behind them."""
    model = Model()
    model.dense.register_forward_pre_hook(lambda _, args: ({**args[0], "price": args[0]["price"] * 0},))
    model.dense.register_forward_hook(lambda _, __, output: {"ctr": output["ctr"] + 5})
    found = run(model, tmp_path)
    assert torch.equal(found.args[0]["price"], batch()["price"])
    model.dense._forward_pre_hooks.clear()
    model.dense._forward_hooks.clear()
    zero = run(model, tmp_path / "2", data={**batch(), "price": torch.zeros(4, 1)})
    assert torch.allclose(found.output["ctr"], zero.output["ctr"] + 5)


class Extra(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.version = {"a": 1}

    def get_extra_state(self):
        return self.version

    def set_extra_state(self, state) -> None:
        self.version.update(state)


def states(model: nn.Module) -> dict[str, bytes]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors}


@pytest.mark.parametrize("kind", ["model", "arches", "failing"])
def test_the_model_is_left_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def forward(model, data):
        assert not model.training
        assert not torch.is_grad_enabled()
        model.steps += 1
        model.dense.seen = model.dense.seen + 1
        scores = model.dense(model.sparse(data))
        if kind == "arches":
            raise RuntimeError
        return scores

    model = Model(forward, Extra())
    model.train()
    model.dense.norm.eval()
    with torch.no_grad():
        model.dense.first.weight[0, 0] = float("nan")
        model.dense.first.weight[0, 1] = -0.0
    model.dense.first.bias.requires_grad_(requires_grad=False)
    tensors = [id(t) for t in (*model.parameters(), *model.buffers())]
    before, training = states(model), [m.training for m in model.modules()]
    if kind == "failing":
        model.sparse.forward = lambda data: {}
        with pytest.raises(ModelError):
            run(model, tmp_path)
    else:
        state = {**trained(), "dense._extra_state": {"a": 2}}
        assert torch.equal(run(model, tmp_path, state=state).output["ctr"], expected())
    assert states(model) == before
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == tensors
    assert [m.training for m in model.modules()] == training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.dense.version == {"a": 1}
    assert not model.dense.first.bias.requires_grad


def test_a_compiled_model_runs_as_it_is_written(tmp_path: Path) -> None:
    model = Model()
    model.dense = torch.compile(model.dense, backend="eager")
    found = run(torch.compile(model, backend="eager"), tmp_path)
    assert found.kind == "model"
    assert torch.equal(found.output["ctr"], expected())
    model.dense.compile(backend="eager")
    assert run(model, tmp_path / "2").kind == "model"


def test_a_scripted_dense_arch_is_recorded(tmp_path: Path) -> None:
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)

        def forward(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.first(torch.cat([blocks["user"], blocks["price"]], 1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch call it deprecated
        scripted = torch.jit.script(Typed())
    state = {"dense.first.weight": torch.ones(4, 3), "dense.first.bias": torch.zeros(4)}
    before = states(scripted)
    found = run(Model(None, scripted), tmp_path, state=state)
    assert found.kind == "model"
    assert torch.allclose(found.output[:, 0], found.blocks["user"].sum(1) + batch()["price"][:, 0])
    assert states(scripted) == before


def test_lazy_parameters_stay_lazy_in_the_callers_model(tmp_path: Path) -> None:
    class Lazy(Dense):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.LazyLinear(4)

    model = Model(None, Lazy())
    found = run(model, tmp_path)
    assert found.kind == "arches"
    assert "lazy" in found.reason
    assert torch.equal(found.output["ctr"], expected())
    assert isinstance(model.dense.first.weight, nn.UninitializedParameter)


def test_precision_of_autocast_is_noticed(tmp_path: Path) -> None:
    def forward(model, data):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model.dense(model.sparse(data))

    assert run(Model(forward), tmp_path).precision == torch.bfloat16
    assert run(Model(), tmp_path / "2").precision is None


def test_rows_are_the_sources_own_where_settings_change_them(tmp_path: Path) -> None:
    """Cast, prune and a choice among duplicates change what serving gets, and nothing of the reference."""
    finder = open_finder(tmp_path / "ck", {"user": table_of(IDS, num_parts=1)})
    code = CODE_BY_NAME["BF16"]
    finder._casts = {"user": RowCast(CODE_BY_NAME["F32"], code, "", 2)}
    finder._source = dataclasses.replace(
        finder._source,
        is_pruned=lambda part, rows, ids: ids == 5,
        dropped_in=lambda part, first, num: np.array([2]),
    )
    ids = np.array(IDS)
    has_row, rows = finder.find("user", ids)
    assert has_row.tolist() == [True, False, False, True]
    assert finder.left_behind == {"user": 1}
    own = finder.unmodified()
    has_row, rows = own.find("user", ids)
    assert has_row.all()
    assert own.decode("user", rows).view(np.float32).tolist() == [row(i).tolist() for i in IDS]
    assert own.left_behind == {}
    found = run(Model(), tmp_path, finder=finder)
    assert found.blocks["user"].tolist() == [row(i).tolist() for i in IDS]


def test_a_table_is_scanned_once_for_both_sides(tmp_path: Path, monkeypatch) -> None:
    from dist_export.dense import source_rows as rows

    finder = open_finder(tmp_path / "ck", {"user": table_of(IDS, num_parts=1)})
    scans = []
    real = rows.read_ids

    def read(checkpoint, part):
        scans.append(part)
        return real(checkpoint, part)

    monkeypatch.setattr(rows, "read_ids", read)
    finder.find("user", np.array([3, 8]))
    finder.unmodified().find("user", np.array([3, 8]))
    assert len(scans) == 1
    has_row, _ = finder.unmodified().find("user", np.array([3, 4, 5]))
    assert (has_row.tolist(), len(scans)) == ([True, False, True], 2)
    assert finder.find("user", np.array([3, 4, 5, 8]))[0].tolist() == [True, False, True, True]
    assert len(scans) == 2
