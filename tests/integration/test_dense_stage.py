"""The dense part of whole exports in one process: what is found before shards are written, and what is left as it was."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_export.archive.safe_load import load_program
from dist_export.dense.copied_arch import note_unregistered
from dist_export.errors import ConfigError, ModelError, ParityError, TraceError
from dist_export.verify.verify import verify
from tests.support import exports, tiny_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")


def run(checkpoint: Path, model=None, dataset=None, **settings):
    exporter = exports.exporter(
        model or tiny_model.build_model(),
        settings.pop("sparse_model_name", "sparse_arch"),
        settings.pop("dense_model_name", "dense_arch"),
        tiny_model.build_dataset() if dataset is None else dataset,
        checkpoint,
        checkpoint.parent / "out",
        filter_sparse_opt=True,
        **settings,
    )
    return exporter.export()


def model_with(sparse=None, dense=None) -> nn.Module:
    """A model whose sparse or dense arch passes what it returns through a function."""
    model = tiny_model.build_model()

    def change(module: nn.Module, fn) -> None:
        plain = type(module).forward
        module.__class__ = type("Changed", (type(module),), {"forward": lambda self, x: fn(plain(self, x))})

    if sparse:
        change(model.sparse_arch, sparse)
    if dense:
        change(model.dense_arch, dense)
    return model


EARLY = {
    "input name": ({"model": model_with(sparse=lambda d: {**d, "a-b": d["price"]})}, ModelError, "'a-b'"),
    "taken name": ({"model": model_with(sparse=lambda d: {**d, "torch": d["price"]})}, ModelError, "'torch'"),
    "split_seq": ({"model": model_with(sparse=lambda d: ((d, d), None))}, ModelError, "split_seq"),
    "sparse output": ({"model": model_with(sparse=lambda d: d["price"])}, ModelError, "returns a Tensor"),
    "batch sizes": (
        {"model": model_with(sparse=lambda d: {**d, "x": d["price"][:2]})},
        ModelError,
        "all must be equal",
    ),
    "dense output": ({"model": model_with(dense=lambda d: [d])}, ModelError, "output 0 .* is a dict"),
    "output count": ({"export_outputs": ["one"]}, ModelError, "has 1 names"),
    "output names": ({"export_outputs": ["one", "one"]}, ConfigError, "stands there twice"),
    "empty name": ({"export_outputs": ["one", ""]}, ConfigError, "needs a name"),
    "dynamic_dims": ({"dynamic_dims": {"nope": {1: "n"}}}, ConfigError, "no input of the dense arch"),
    "device": ({"device": "nonsense"}, ConfigError, "device is 'nonsense'"),
    "no device": ({"device": "cuda:77"}, ConfigError, "device is 'cuda:77'"),
    "no batch": ({"dataset": []}, ModelError, "no batch on rank 0"),
    "stopped": ({"dataset": [(True, None)]}, ModelError, "no batch on rank 0"),
    "no iterable": ({"dataset": 3}, ModelError, "cannot be iterated"),
    "no rows": ({"dataset": tiny_model.build_dataset(0)}, ModelError, "no rows|sparse arch fails"),
    "optimizer": ({"dense_optimizer": object()}, ModelError, "without zero_grad"),
    "model": ({"model": object()}, ModelError, "expected a torch.nn.Module"),
    "sparse path": ({"sparse_model_name": "nope"}, ModelError, "has no module 'nope' .it has sparse_arch, dense_arch"),
    "dense path": ({"dense_model_name": "dense_arch.nope"}, ModelError, "DenseArch has no module 'nope'"),
    "width": (
        {"model": tiny_model.build_model(3)},
        ModelError,
        r"hidden.weight is \[8, 9\], the dense arch has \[3, 9\]",
    ),
    "pattern": ({"allow_missing_dense": ["nope"]}, ModelError, "'nope' matches no parameter"),
}


@pytest.mark.parametrize("case", EARLY)
def test_it_is_found_before_anything_is_written(case: str, checkpoint: Path) -> None:
    settings, kind, told = EARLY[case]
    with pytest.raises(kind, match=told) as caught:
        run(checkpoint, **settings)
    assert caught.value.exit_code == 2
    out = checkpoint.parent / "out"
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(
    ("dense", "kind", "told"),
    [
        (lambda d: {k: v + 1 if v.shape[0] == 1 else v for k, v in d.items()}, ParityError, "at batch size 1"),
        (lambda d: {k: v.squeeze() for k, v in d.items()}, ParityError, "squeeze"),
        (lambda d: {k: v if v.sum() > 0 else -v for k, v in d.items()}, TraceError, r"test_dense_stage.py:\d+"),
        (lambda d: {k: v.new_zeros(v.shape) for k, v in d.items()}, TraceError, "no input of the dense arch"),
    ],
)
def test_what_is_found_later_stops_the_commit(dense, kind, told, checkpoint: Path) -> None:
    with pytest.raises(kind, match=told) as caught:
        run(checkpoint, model_with(dense=dense))
    assert caught.value.exit_code == 1
    assert not (checkpoint.parent / "out" / "manifest.json").exists()


def test_the_callers_model_is_left_as_it_was(checkpoint: Path) -> None:
    model = tiny_model.build_model()
    model.dense_arch.exported = False
    model.sparse_arch.exported = False
    model.dense_arch.norm.eval()
    model.dense_arch.out.bias.requires_grad_(requires_grad=False)
    ids = tiny_model.build_dataset()[0][1]["user"]
    model.sparse_arch.user.insert(ids[:1], torch.full((1, tiny_model.DIM), -3.0))
    optimizer = torch.optim.SGD(model.dense_arch.parameters(), lr=1.0)
    for parameter in model.dense_arch.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    run(checkpoint, model, dense_optimizer=optimizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.dense_arch.out.parameters()] == [True, False]
    assert all(p.grad is None for p in model.parameters())
    assert model.dense_arch.exported is model.sparse_arch.exported is False
    assert torch.equal(model.sparse_arch.user(ids[:1]), torch.full((1, tiny_model.DIM), -3.0))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_gradients_stay_where_no_optimizer_is_given(checkpoint: Path) -> None:
    model = tiny_model.build_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    run(checkpoint, model)
    assert all(p.grad is not None for p in model.parameters())


def test_the_package_has_the_checkpoints_weights_and_the_samples_rows(checkpoint: Path) -> None:
    manifest = run(checkpoint)
    program = load_program(checkpoint.parent / "out" / "fx_user_model" / "exported_model.pt")
    trained = tiny_model.trained_dense_state()
    assert torch.equal(program.state_dict["dense_arch.hidden.weight"], trained["dense_arch.hidden.weight"])
    assert manifest.run["sample"]["missing"] == {"item_emb": 0, "user_emb": 0}
    assert [output.name for output in manifest.dense.outputs] == ["ctr", "like"]
    assert manifest.parity.batch_sizes == (5, 1, 2, 301)


def test_a_sample_larger_than_serving_may_send_is_cut(checkpoint: Path) -> None:
    manifest = run(checkpoint, dataset=tiny_model.build_dataset(50), max_batch_size=7)
    assert manifest.parity.batch_sizes == (7, 1, 2)
    assert manifest.dense.max_batch_size == 7


def test_one_row_is_enough(checkpoint: Path) -> None:
    assert run(checkpoint, dataset=tiny_model.build_dataset(1)).parity.batch_sizes == (2, 1, 301)


def test_missing_parameters_that_are_allowed_are_the_models_own(checkpoint: Path) -> None:
    state = tiny_model.trained_dense_state()
    del state["dense_arch.out.bias"]
    torch.save(state, checkpoint / "model.pt")
    with pytest.raises(ModelError, match=r"missing: out\.bias"):
        run(checkpoint)
    model = tiny_model.build_model()
    manifest = run(checkpoint, model, allow_missing_dense=["out.*"])
    assert any("out.bias" in note for note in manifest.notes)
    program = load_program(checkpoint.parent / "out" / "fx_user_model" / "exported_model.pt")
    assert torch.equal(program.state_dict["dense_arch.out.bias"], model.dense_arch.out.bias)


class KeepsAList(tiny_model.DenseArch):
    """Keeps a layer, and a module that is registered elsewhere, in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(1, 1, bias=False)]
        self.others: list[nn.Module] = []

    def forward(self, blocks):
        return {name: self.layers[0](score.reshape(-1, 1)) for name, score in super().forward(blocks).items()}


def test_a_layer_that_is_not_registered_is_told(checkpoint: Path) -> None:
    model, dense_arch = tiny_model.build_model(), KeepsAList()
    dense_arch.load_state_dict(model.dense_arch.state_dict())
    model.dense_arch = dense_arch
    model.dense_arch.others.append(model.sparse_arch)
    notes = run(checkpoint, model).notes
    (note,) = [note for note in notes if note.startswith("the dense arch does not register")]
    assert "dense_arch.layers[0].weight," in note


class KeepsTensors(tiny_model.DenseArch):
    """Keeps tensors as attributes: its own, in a layer that nobody registers, a view of a weight, numbers that count rows."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.rand(1, requires_grad=True)
        self.made_of_weights = self.out.weight.detach() * 2
        self.layers = [nn.BatchNorm1d(1, affine=False)]
        self.view = self.out.weight.detach()[:1]
        self.places = torch.arange(3)

    def forward(self, blocks):
        return {name: score * self.factor for name, score in super().forward(blocks).items()}


def test_tensors_that_are_neither_parameter_nor_buffer_are_told(checkpoint: Path) -> None:
    model, dense_arch = tiny_model.build_model(), KeepsTensors()
    dense_arch.load_state_dict(model.dense_arch.state_dict())
    model.dense_arch = dense_arch
    notes = run(checkpoint, model).notes
    (note,) = [note for note in notes if note.startswith("the dense arch keeps")]
    assert (
        "keeps dense_arch.factor, dense_arch.made_of_weights, dense_arch.layers[0].running_mean and 1 more, neither"
        in note
    )


def test_what_torch_computes_anew_is_not_told() -> None:
    model = tiny_model.build_model()
    model.dense_arch.sequence = nn.LSTM(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have its newer function
        model.dense_arch.hidden = torch.nn.utils.weight_norm(model.dense_arch.hidden)
    assert note_unregistered(model, model.dense_arch, "dense_arch") == []
    model.dense_arch.table = torch.ones(3)
    (note,) = note_unregistered(model, model.dense_arch, "dense_arch")
    assert "keeps dense_arch.table, neither" in note


def test_parameters_that_the_dense_arch_lacks_are_left_out_where_they_are_allowed(checkpoint: Path) -> None:
    state = tiny_model.trained_dense_state() | {"dense_arch.aux.weight": torch.ones(3)}
    torch.save(state, checkpoint / "model.pt")
    with pytest.raises(ModelError, match=r"unexpected under 'dense_arch\.': aux\.weight"):
        run(checkpoint)
    manifest = run(checkpoint, allow_unexpected_dense=["aux.*"])
    assert any("aux.weight" in note for note in manifest.notes)


def test_the_program_has_the_extra_state_of_the_checkpoint(checkpoint: Path) -> None:
    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = 1.0

        def get_extra_state(self) -> dict[str, float]:
            return {"by": self.by}

        def set_extra_state(self, state: dict[str, float]) -> None:
            self.by = state["by"]

        def forward(self, logits: torch.Tensor) -> torch.Tensor:
            return logits * self.by

    model = tiny_model.build_model()
    model.dense_arch.out = torch.nn.Sequential(model.dense_arch.out, Scale())
    state = {name.replace("out.", "out.0."): value for name, value in tiny_model.trained_dense_state().items()}
    scores = {}
    for by in (1.0, 3.0):
        torch.save(state | {"dense_arch.out.1._extra_state": {"by": by}}, checkpoint / "model.pt")
        run(checkpoint, model, overwrite=True)
        program = load_program(checkpoint.parent / "out" / "fx_user_model" / "exported_model.pt").module()
        rows = {name: torch.ones(2, n) for name, n in (("user", 4), ("item", 4), ("price", 1))}
        scores[by] = program(**rows)
    assert not any(map(torch.equal, scores[1.0], scores[3.0]))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_inputs_and_outputs_are_exported_and_verified(checkpoint: Path, dtype: torch.dtype) -> None:
    def sparse(blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**blocks, "phase": torch.complex(blocks["user"], blocks["item"]).to(dtype)}

    model = model_with(sparse=sparse)
    plain = type(model.dense_arch).forward

    class WithPhase(type(model.dense_arch)):
        def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {**plain(self, blocks), "turned": blocks["phase"] * (2 - 1j)}

    model.dense_arch.__class__ = WithPhase
    manifest = run(checkpoint, model)
    assert {entry.name: entry.dtype for entry in manifest.dense.inputs}["phase"] == str(dtype).removeprefix("torch.")
    assert manifest.parity.from_files.max_abs["turned"] == 0
    assert not verify(str(checkpoint.parent / "out")).findings


def test_the_dense_arch_alone_from_a_checkpoint_without_tables(tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    torch.save(tiny_model.trained_dense_state(), tmp_path / "ckpt" / "model.pt")
    exporter = exports.exporter(
        tiny_model.build_model(),
        "sparse_arch",
        "dense_arch",
        tiny_model.build_dataset(),
        tmp_path / "ckpt",
        tmp_path / "out",
        need_export_sparse=False,
    )
    manifest = exporter.export()
    assert any("the model's own rows" in note for note in manifest.notes)
    assert manifest.dense is not None


def test_a_legacy_archive_is_committed_and_named(checkpoint: Path) -> None:
    manifest = run(checkpoint, archive_format="legacy")
    assert manifest.dense.archive_format == "legacy"
    torch.export.load(str(checkpoint.parent / "out" / "fx_user_model" / "exported_model.pt"))
