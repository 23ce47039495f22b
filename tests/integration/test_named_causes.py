"""Forms of models that are common and were refused without a cause: they are exported, or the error says what is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.utils import parametrizations

import dist_export
from dist_export.errors import ModelError, ParityError
from tests.support import exports

IDS = torch.arange(16)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(50, 4), nn.Embedding(40, 4)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"user": self.user(ids), "item": self.item(ids)}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"ctr": torch.sigmoid(self.linear(torch.cat([blocks["user"], blocks["item"]], dim=1)))}


class Model(nn.Module):
    def __init__(self, sparse: type[nn.Module] = Sparse, dense: type[nn.Module] = Dense) -> None:
        super().__init__()
        self.sparse_arch, self.dense_arch = sparse(), dense()

    def forward(self, batch: Any) -> Any:
        return self.dense_arch(self.sparse_arch(batch))


def export(
    folder: Path, model: nn.Module, state: Any = None, batch: Any = IDS, **settings: Any
) -> dist_export.Manifest:
    """Export a fresh ``model`` with the values of ``state``, by default those of another fresh one."""
    torch.save(type(model)().state_dict() if state is None else state, folder / "ckpt.pt")
    return exports.exporter(
        model, "sparse_arch", "dense_arch", [batch], str(folder / "ckpt.pt"), str(folder / "out"), **settings
    ).export(progress=False)


def score(folder: Path, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
    output: Any = dist_export.open_package(folder / "out").load_program().module()(**blocks)
    return output[0] if isinstance(output, tuple) else output


class Closing(Dense):
    def __init__(self) -> None:
        super().__init__()
        score = lambda x: torch.sigmoid(self.linear(x))
        self.forward = lambda blocks: {"ctr": score(torch.cat([blocks["user"], blocks["item"]], dim=1))}


def test_a_forward_that_closes_over_self_is_exported(tmp_path: Path) -> None:
    trained = Model(dense=Closing).eval()
    manifest = export(tmp_path, Model(dense=Closing), trained.state_dict())
    assert manifest.parity is not None
    blocks = trained.sparse_arch(IDS)
    assert torch.allclose(score(tmp_path, blocks), trained.dense_arch(blocks)["ctr"], atol=1e-6)


def make_closed_class() -> Model:
    linear = nn.Linear(8, 1)

    class Closed(Dense):
        def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"ctr": torch.sigmoid(linear(torch.cat([blocks["user"], blocks["item"]], dim=1)))}

    model = Model(dense=Closed)
    model.dense_arch.linear = linear
    return model


def test_a_class_that_closes_over_a_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ParityError, match=r"reaches parameters of the model .*dense_arch\.forward\.linear.*through self"
    ):
        export(tmp_path, make_closed_class(), Model().state_dict())


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 0.5


class Normed(Sparse):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.user)


class OldNormed(Sparse):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(self.user)


class Parametrized(Sparse):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrize.register_parametrization(self.user, "weight", Halved())


COMPUTED: dict[type[Sparse], str] = {
    Normed: r"parametrize \(WeightNorm\)",
    OldNormed: r"a hook before its forward",
    Parametrized: r"parametrize \(Halved\)",
}


@pytest.mark.parametrize("sparse", COMPUTED)
def test_a_computed_weight_is_refused_with_its_cause(sparse: type[Sparse], tmp_path: Path) -> None:
    """The checkpoint holds what the weight is made of, and serving cannot compute it."""
    state = Model(sparse).state_dict()
    with pytest.raises(
        ModelError, match=rf"the weight of sparse_arch\.user is computed by .*{COMPUTED[sparse]}.*remove_"
    ):
        export(tmp_path, Model(sparse), state)
    manifest = export(tmp_path, Model(sparse), state, allow_missing_tables=["*.user"])
    assert [table.name for table in manifest.tables] == ["sparse_arch.item.weight"]


def export_live(folder: Path, model: nn.Module, **settings: Any) -> dist_export.Manifest:
    return exports.exporter(model, "sparse_arch", "dense_arch", [IDS], None, str(folder / "out"), **settings).export(
        progress=False
    )


@pytest.mark.parametrize("sparse", [Normed, Parametrized])
def test_of_a_model_in_memory_a_parametrized_weight_is_exported(sparse: type[Sparse], tmp_path: Path) -> None:
    """The drift of its cast cannot be measured, because the model computes its rows anew; it was reported as 0."""
    model = Model(sparse)
    manifest = export_live(tmp_path, model, dtype={"*user*": "float16"})
    rows, _ = dist_export.open_package(tmp_path / "out").lookup("sparse_arch.user.weight", IDS.numpy())
    assert torch.equal(torch.as_tensor(rows), model.sparse_arch.user.weight[IDS].half())
    assert manifest.drift is not None
    assert "the weight of sparse_arch.user is computed by" in str(manifest.drift.not_measured)
    with pytest.raises(ModelError, match="max_drift bounds the drift, which cannot be measured"):
        export_live(tmp_path / "bounded", model, dtype={"*user*": "float16"}, max_drift=1.0)


def test_of_a_model_in_memory_a_stale_weight_is_refused(tmp_path: Path) -> None:
    """It is computed before a forward: an optimizer has changed its parts since, and parity and drift could not see it."""
    model = Model(OldNormed)
    model(IDS)
    with torch.no_grad():
        model.sparse_arch.user.weight_g.mul_(2)
    with pytest.raises(
        ModelError, match=r"sparse_arch\.user is computed by .*that of the last forward.*remove_weight_norm"
    ):
        export_live(tmp_path, model)


def save_torch(state: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(state, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def save_lightning(state: dict[str, torch.Tensor], folder: Path) -> Path:
    moments = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    torch.save({"state_dict": state, "epoch": 1, "optimizer_states": [moments], "lr_schedulers": []}, folder / "a.ckpt")
    return folder / "a.ckpt"


def save_safetensors(state: dict[str, torch.Tensor], folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def save_dcp(state: dict[str, torch.Tensor], folder: Path) -> Path:
    dcp.save({"state_dict": state}, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


@pytest.mark.parametrize("save", [save_torch, save_lightning, save_safetensors, save_dcp])
@pytest.mark.parametrize("prefix", ["model.", "net."])
def test_a_prefix_of_lightning_is_taken_off(prefix: str, save: Callable[..., Path], tmp_path: Path) -> None:
    """A LightningModule has the model as an attribute, whose name is in front of every key."""
    trained = Model().eval()
    source = save({prefix + name: value for name, value in trained.state_dict().items()}, tmp_path)
    manifest = exports.exporter(Model(), "sparse_arch", "dense_arch", [IDS], str(source), str(tmp_path / "out")).export(
        progress=False
    )
    assert sorted(table.name for table in manifest.tables) == ["sparse_arch.item.weight", "sparse_arch.user.weight"]
    rows, _ = dist_export.open_package(tmp_path / "out").lookup("sparse_arch.user.weight", IDS.numpy())
    assert torch.equal(torch.as_tensor(rows), trained.sparse_arch.user.weight[IDS])
    blocks = trained.sparse_arch(IDS)
    assert torch.allclose(score(tmp_path, blocks), trained.dense_arch(blocks)["ctr"], atol=1e-6)
    assert not isinstance(manifest.account, msgspec.UnsetType)
    assert (manifest.account.exported, manifest.account.in_program) == (1440, 36)


class Training(Model):
    """Takes what a training loop has, and gives its loss."""

    def forward(self, batch: Any) -> Any:
        features, labels = batch
        scores = self.dense_arch(self.sparse_arch(features))["ctr"]
        return nn.functional.binary_cross_entropy(scores[:, 0], labels)


class Named(Sparse):
    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return super().forward(batch["ids"])


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize(("sparse", "features"), [(Sparse, IDS), (Named, {"ids": IDS})])
def test_a_pair_with_labels_is_named(sparse: type[Sparse], features: Any, kind: type, tmp_path: Path) -> None:
    batch = kind([features, torch.zeros(16)])
    told = rf"a {kind.__name__} of {type(features).__name__}, Tensor.*\(features, labels\).*yield the features alone"
    with pytest.raises(ModelError, match=told):
        export(tmp_path, Training(sparse), Training(sparse).state_dict(), batch)


def quantized(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def test_a_quantized_dense_arch_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"dense arch's linear \(Linear\) is quantized by torch\.ao.*before quantize_dynamic"
    ):
        export(tmp_path, quantized(Model()), Model().state_dict())
    (tmp_path / "live").mkdir()
    with pytest.raises(ModelError, match=r"dense arch's linear \(Linear\) is quantized by torch\.ao"):
        export_live(tmp_path / "live", quantized(Model()))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_a_quantized_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"missing: linear\.weight.*_packed_params are those of modules quantized by torch\.ao"
    ):
        export(tmp_path, Model(), quantized(Model()).state_dict())
