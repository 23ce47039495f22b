"""A checkpoint with a model and its moving average is exported as one of them: tables and dense parameters of one state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dist_export
from dist_export.archive.safe_load import load_program
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.errors import UserError
from dist_export.inspect.describe import describe
from tests.support import dcp_writer, exports
from tests.support.plain_cases import read_numbered

TABLES = ["*user.weight", "*item.weight"]


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(50, 4)
        self.item = nn.Embedding(40, 4)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"user": self.user(batch["user"]), "item": self.item(batch["item"])}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(8, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"ctr": torch.sigmoid(self.mlp(torch.cat([blocks["user"], blocks["item"]], dim=1)))}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse_arch = Sparse()
        self.dense_arch = Dense()

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.dense_arch(self.sparse_arch(batch))


def make_model(seed: int) -> Model:
    torch.manual_seed(seed)
    return Model()


def make_batch() -> dict[str, torch.Tensor]:
    return {"user": torch.tensor([3, 49, 0, 7]), "item": torch.tensor([1, 39, 5, 5])}


def flatten(states: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{root}.{name}": tensor for root, its in states.items() for name, tensor in its.items()}


def save_torch(path: Path, states: dict[str, Any]) -> Path:
    torch.save({**states, "epoch": 3}, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def save_safetensors(path: Path, states: dict[str, Any]) -> Path:
    path.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in flatten(states).items()}, path / "model.safetensors")
    return path


SAVERS: dict[str, Callable[[Path, dict[str, Any]], Path]] = {
    "torch": save_torch,
    "torch, flat": lambda path, states: save_torch(path, flatten(states)),
    "torch, nested": lambda path, states: save_torch(path, {"app": states}),
    "dcp": lambda path, states: dcp_writer.save(path, {**states, "epoch": 3}),
    "dcp, flat": lambda path, states: dcp_writer.save(path, flatten(states)),
    "dcp, nested": lambda path, states: dcp_writer.save(path, {"app": states}),
    "safetensors": save_safetensors,
}


def export(source: Path, target: Path, **settings: Any) -> dist_export.Manifest:
    exporter = exports.exporter(
        make_model(1),
        "sparse_arch",
        "dense_arch",
        [make_batch()],
        source,
        target,
        filter_sparse_opt=True,
        treat_as_tables=TABLES,
        progress=False,
        **settings,
    )
    return exporter.export()


def assert_is(package: Path, manifest: dist_export.Manifest, model: Model) -> None:
    """The package holds the rows of this model, and its program gives this model's scores."""
    state = model.state_dict()
    rows = read_numbered(package)
    for name in ("sparse_arch.user.weight", "sparse_arch.item.weight"):
        assert torch.equal(rows[name], state[name])
    assert manifest.dense is not None
    with torch.no_grad():
        blocks = model.sparse_arch(make_batch())
        (scores,) = load_program(package / manifest.dense.program).module()(**blocks)
        assert torch.allclose(scores, model(make_batch())["ctr"], atol=1e-6)


@pytest.mark.parametrize("case", SAVERS)
def test_the_model_is_exported_and_state_root_exports_its_average(case: str, tmp_path: Path) -> None:
    """In every format and nesting: the rows and the scores are those of one state, and the note names the other one."""
    trained, average = make_model(2), make_model(3)
    source = SAVERS[case](tmp_path / "ckpt", {"model": trained.state_dict(), "ema": average.state_dict()})
    ema = "app.ema" if "nested" in case else "ema"
    manifest = export(source, tmp_path / "model")
    assert_is(tmp_path / "model", manifest, trained)
    assert any(f"left out: {ema} (state_root takes another one)" in note for note in manifest.notes)
    assert_is(tmp_path / "ema", export(source, tmp_path / "ema", state_root=ema), average)


@pytest.mark.parametrize("case", ["torch", "dcp", "safetensors"])
def test_a_state_root_that_is_not_there_is_refused(case: str, tmp_path: Path) -> None:
    states = {"model": make_model(2).state_dict(), "ema": make_model(3).state_dict()}
    source = SAVERS[case](tmp_path / "ckpt", states)
    with pytest.raises(
        UserError, match=r"state_root is 'emma', but no tensor .* ema \(4 tensors\), model \(4 tensors\)"
    ):
        export(source, tmp_path / "out", state_root="emma")
    with pytest.raises(UserError, match=r"'ema\.\*' matches no tensor; .* left out: set state_root: ema"):
        exports.export(
            {
                "ckpt_dir": str(source),
                "export_dir": str(tmp_path / "out"),
                "filter_sparse_opt": True,
                "treat_as_tables": ["ema.*"],
            }
        )
    assert not (tmp_path / "out").exists()


def test_a_state_root_that_lies_deeper_is_told(tmp_path: Path) -> None:
    source = SAVERS["torch"](tmp_path / "ckpt", {"state_dict": flatten({"net": make_model(2).state_dict()})})
    with pytest.raises(UserError, match=r"there are state_dict\.net \(\d+ tensors\); set state_root to one of them$"):
        export_plain(source, tmp_path / "out", state_root="net")


@pytest.mark.parametrize("root", [None, "ema"])
def test_optimizer_state_beside_two_states_stays_optimizer_state(root: str | None, tmp_path: Path) -> None:
    """A slot of the table by name, dropped unless asked for, whichever state is read."""
    states = {"model": make_model(2).state_dict(), "ema": make_model(3).state_dict()}
    slot = {"sparse_arch.user.weight": {"exp_avg": torch.rand(50, 4)}}
    source = dcp_writer.save(tmp_path / "ckpt", {**states, "optim": {"state": slot, "param_groups": [{"lr": 0.1}]}})
    found = describe(str(source), settings=TensorSettings(tuple(TABLES), state_root=root))
    assert {table["name"]: table["slots"] for table in found["tables"]} == {
        "sparse_arch.item.weight": ["embedding"],
        "sparse_arch.user.weight": ["embedding", "exp_avg"],
    }
    assert [tensor["name"] for tensor in found["dense_parameters"]] == ["dense_arch.mlp.weight", "dense_arch.mlp.bias"]
    assert {its["name"].partition(".")[0] for its in found["left_out"]} == {"model" if root else "ema"}


def test_a_state_in_one_piece_is_told(tmp_path: Path) -> None:
    """DCP saves a nested dict as one object where it is told not to flatten it."""
    from torch.distributed import checkpoint as dcp

    for name, state in (("whole", {"model": make_model(2).state_dict()}), ("top", make_model(2).state_dict())):
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
        dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / name), planner=planner, no_dist=True)
    with pytest.raises(
        UserError, match=r"has no tensor; it holds objects in one piece: 'model' .*flatten_state_dict=True"
    ):
        export(tmp_path / "whole", tmp_path / "out")
    assert_is(tmp_path / "out", export(tmp_path / "top", tmp_path / "out"), make_model(2))


def test_a_list_of_states_is_told(tmp_path: Path) -> None:
    """One alone is the model's; of several each can be taken."""
    states = [make_model(2).state_dict(), make_model(3).state_dict()]
    torch.save(states, tmp_path / "two.pt")
    torch.save(states[:1], tmp_path / "one.pt")
    assert_is(tmp_path / "one", export(tmp_path / "one.pt", tmp_path / "one"), make_model(2))
    assert_is(tmp_path / "1", export(tmp_path / "two.pt", tmp_path / "1", state_root="1"), make_model(3))
    found = describe(str(tmp_path / "two.pt"), settings=TensorSettings(tuple(TABLES)))
    assert any("holds several states with the same names: 0, 1" in warning for warning in found["warnings"])


def test_formats_that_hold_one_model_refuse_state_root(tmp_path: Path) -> None:
    from tests.support import tiny_model

    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    with pytest.raises(UserError, match="which holds one model only; remove state_root"):
        exports.export({"ckpt_dir": str(source), "export_dir": str(tmp_path / "out"), "state_root": "ema"})
    with pytest.raises(UserError, match="state_root is ''"):
        exports.export({"ckpt_dir": str(source), "export_dir": str(tmp_path / "out"), "state_root": ""})


def arches_of(model: Model) -> dict[str, Any]:
    return {"sparse": model.sparse_arch.state_dict(), "dense": model.dense_arch.state_dict()}


def save_torch_whole(path: Path, states: dict[str, Any]) -> Path:
    torch.save(states, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


NESTED: dict[str, Callable[[Path, dict[str, Any]], Path]] = {"torch": save_torch_whole, "dcp": dcp_writer.save}


def export_plain(source: Path, target: Path, **settings: Any) -> dist_export.Manifest:
    """Without patterns: the model alone says which tensors are tables."""
    return exports.exporter(
        make_model(1), "sparse_arch", "dense_arch", [make_batch()], source, target, filter_sparse_opt=True, progress=False,
        **settings,
    ).export()  # fmt: skip


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize(
    "nest",
    [
        lambda states: states,
        lambda states: {**states, "optimizer": {"state": {0: {"exp_avg": torch.ones(8)}}, "param_groups": []}},
        lambda states: {"model": states, "step": torch.tensor(3)},
        lambda states: {**states, "ema_sparse": states["sparse"], "ema_dense": states["dense"]},
        lambda states: {**states, "other": {"conv.weight": torch.ones(3, 3)}},
    ],
    ids=["alone", "optimizer", "within model", "averages", "another"],
)
def test_arches_that_were_saved_apart_are_the_model(kind: str, nest, tmp_path: Path) -> None:
    """``{"sparse": ..., "dense": ...}``: the names tell which root is which arch, and the note says so."""
    trained = make_model(2)
    manifest = export_plain(NESTED[kind](tmp_path / "ckpt", nest(arches_of(trained))), tmp_path / "out")
    assert_is(tmp_path / "out", manifest, trained)
    assert any("dense' holds the model's dense_arch and " in note for note in manifest.notes)


@pytest.mark.parametrize("kind", NESTED)
def test_a_whole_model_beside_arches_is_the_model(kind: str, tmp_path: Path) -> None:
    trained, other = make_model(2), make_model(3)
    source = NESTED[kind](tmp_path / "ckpt", {**arches_of(other), "model": trained.state_dict()})
    manifest = export_plain(source, tmp_path / "out")
    assert_is(tmp_path / "out", manifest, trained)
    assert manifest.account.left_out.popitem()[1] == 1476


@pytest.mark.parametrize("kind", NESTED)
def test_arches_are_not_guessed(kind: str, tmp_path: Path) -> None:
    """A root that lacks a parameter of the dense arch is not it."""
    states = arches_of(make_model(2))
    del states["dense"]["mlp.bias"]
    source = NESTED[kind](tmp_path / "ckpt", states)
    with pytest.raises(
        UserError, match=r"it holds 2 states: dense \(1 tensor\), sparse \(2 tensors\)|dense_model_name is"
    ):
        export_plain(source, tmp_path / "out")


def test_a_root_with_tables_alone_is_not_the_model(tmp_path: Path) -> None:
    """Where another one has the dense arch: neither is left out."""
    state = make_model(2).state_dict()
    states = {
        "a": {name: its for name, its in state.items() if name.startswith("sparse_arch.")},
        "b": {name: its for name, its in state.items() if name.startswith("dense_arch.")},
    }
    with pytest.raises(UserError, match=r"it holds 2 states: a \(2 tensors\), b \(2 tensors\)"):
        export_plain(save_torch_whole(tmp_path / "ckpt", states), tmp_path / "out")


ROOTS = ("", "nets")
PAIRS = (("student", "teacher"), ("generator", "discriminator"))
"""Names say the same in each format and under each root, so each name is tried with half of them."""


@pytest.mark.parametrize(
    ("kind", "root", "names"),
    [
        (kind, root, PAIRS[(number + bool(root)) % 2])
        for number, kind in enumerate([*NESTED, "safetensors"])
        for root in ROOTS
    ],
)
def test_several_states_are_named_and_state_root_takes_one(kind: str, root: str, names, tmp_path: Path) -> None:
    models = {name: make_model(number) for number, name in enumerate(names, 2)}
    states: dict[str, Any] = {name: model.state_dict() for name, model in models.items()}
    if root:
        states = {root: states if kind != "safetensors" else flatten(states)}
    source = (SAVERS | NESTED)[kind](tmp_path / "ckpt", states)
    begin = f"{root}." if root else ""
    told = ", ".join(f"{begin}{name} \\(4 tensors\\)" for name in sorted(names))
    if not (kind == "safetensors" and root):  # flat names of several parts do not tell where a state begins
        with pytest.raises(UserError, match=rf"it holds 2 states: {told}; state_root takes one of them") as refused:
            export_plain(source, tmp_path / "out")
        assert "\n" not in str(refused.value)
    for name, model in models.items():
        manifest = export_plain(source, tmp_path / name, state_root=begin + name)
        assert_is(tmp_path / name, manifest, model)


@pytest.mark.parametrize("kind", ["torch", "torch, flat", "dcp", "dcp, flat", "safetensors"])
@pytest.mark.parametrize("other", ["model", "state_dict"])
def test_a_wrapped_state_beside_another_is_not_guessed(kind: str, other: str, tmp_path: Path) -> None:
    """What DDP saves begins with ``module``, and so may be the model's by its names alone."""
    models = {"module": make_model(2), other: make_model(3)}
    source = SAVERS[kind](tmp_path / "ckpt", {name: model.state_dict() for name, model in models.items()})
    both = (
        f"both 'module.sparse_arch.item.weight' and '{other}.sparse_arch.item.weight', and either could be the model's"
    )
    with pytest.raises(UserError, match=both) as refused:
        export_plain(source, tmp_path / "out")
    assert str(refused.value).endswith(f"Set state_root: module, or state_root: {other}")
    for name, model in models.items():
        assert_is(tmp_path / name, export_plain(source, tmp_path / name, state_root=name), model)


@pytest.mark.parametrize("kind", NESTED)
def test_a_state_beside_the_model_is_left_out_by_name(kind: str, tmp_path: Path) -> None:
    trained = make_model(2)
    states = {"discriminator": {"conv.weight": torch.ones(3, 3)}, "generator": trained.state_dict()}
    manifest = export_plain(NESTED[kind](tmp_path / "ckpt", states), tmp_path / "out")
    assert_is(tmp_path / "out", manifest, trained)
    assert any("discriminator" in note or "conv.weight" in note for note in manifest.notes)
    assert manifest.account.left_out.popitem()[1] == 36


AVERAGES = ("ema", "model_ema", "swa_model")


@pytest.mark.parametrize(
    ("kind", "key"),
    [(kind, AVERAGES[number % 3]) for number, kind in enumerate([*NESTED, "safetensors", "nested", "nested"])],
)
def test_an_average_alone_is_exported_and_said_to_be_one(kind: str, key: str, tmp_path: Path) -> None:
    average = make_model(2)
    states = {key: average.state_dict()}
    if kind == "nested":
        source = save_torch_whole(tmp_path / "ckpt", {"state": {**states, "step": 3}})
    else:
        source = (SAVERS | NESTED)[kind](tmp_path / "ckpt", states)
    path = f"state.{key}" if kind == "nested" else key
    more = {"state_root": key} if kind == "safetensors" else {}
    manifest = export_plain(source, tmp_path / "out", **more)
    assert_is(tmp_path / "out", manifest, average)
    said = any(f"{path} is a moving average by its name, and what is exported" in note for note in manifest.notes)
    assert said is not bool(more), "a caller who names it knows"


def test_a_model_of_that_name_is_no_average(tmp_path: Path) -> None:
    source = save_torch_whole(tmp_path / "ckpt", {"model": make_model(2).state_dict()})
    assert not any("moving average" in note for note in export_plain(source, tmp_path / "out").notes)


@pytest.mark.parametrize("kind", ["torch", "torch, flat", "dcp", "dcp, flat", "safetensors"])
def test_state_of_a_module_around_the_model_is_left_out(kind: str, tmp_path: Path) -> None:
    """As PyTorch Lightning saves a module with a loss that has weights of its own."""
    trained = make_model(2)
    around = {f"model.{name}": its for name, its in trained.state_dict().items()} | {"loss.weight": torch.ones(3)}
    source = SAVERS[kind](tmp_path / "ckpt", {"state_dict": around})
    manifest = export_plain(source, tmp_path / "out")
    assert_is(tmp_path / "out", manifest, trained)
    assert any("all of the model's names lie below" in note and note.endswith(".loss") for note in manifest.notes)
    assert manifest.account.left_out == {"not of the model": 12}


@pytest.mark.parametrize("kind", NESTED)
def test_a_state_root_without_tables_says_where_they_are(kind: str, tmp_path: Path) -> None:
    state = make_model(2).state_dict()
    states = {"model": state, "ema": {name: its for name, its in state.items() if name.startswith("dense_arch.")}}
    source = NESTED[kind](tmp_path / "ckpt", states)
    told = "no table of the model lies below state_root, 'ema'; .* it holds 4 below 'model', 2 below 'ema'"
    with pytest.raises(UserError, match=told):
        export_plain(source, tmp_path / "out", state_root="ema")
