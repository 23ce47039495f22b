"""Hash tables of the source that the model holds as plain parameters: their rows are in the sample and in the drift."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_export.manifest import Manifest
from tests.support import exports

IDS = torch.arange(3, 19)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Parameter(torch.randn(50, 4))
        self.more = nn.ParameterList([nn.Parameter(torch.randn(40, 4))])

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"user": self.user[ids], "more": self.more[0].index_select(0, ids)}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.linear(torch.cat([blocks["user"], blocks["more"]], dim=1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse_arch = Bare()
        self.dense_arch = Dense()


def build(seed: int) -> Model:
    torch.manual_seed(seed)
    return Model()


def export(source: Path, out: Path, **settings: Any) -> Manifest:
    exporter = exports.exporter(
        build(7), "sparse_arch", "dense_arch", iter([IDS]), str(source), str(out), filter_sparse_opt=True, **settings
    )
    return exporter.export(progress=False)


def check_sample(out: Path) -> None:
    inputs = json.loads((out / "fx_user_model" / "inputs_dict.json").read_text())
    trained = build(2).sparse_arch(IDS)
    for name in ("user", "more"):
        assert torch.equal(torch.tensor(inputs[name]["values"]), trained[name]), name


def test_tables_that_become_hash_tables(tmp_path: Path) -> None:
    """The scores from the shards were of the model's own rows: a ParityError that explained nothing."""
    torch.save(build(2).state_dict(), tmp_path / "ckpt.pt")
    manifest = export(tmp_path / "ckpt.pt", tmp_path / "out", to_hash_tables=["*"])
    check_sample(tmp_path / "out")
    assert manifest.drift is not None
    assert [drift.max_abs for drift in manifest.drift.outputs.values()] == [0.0]


@pytest.mark.parametrize("settings", [{}, {"dtype": {"*": "int8"}}])
def test_a_checkpoint_of_hash_tables_as_the_source(settings: dict[str, Any], tmp_path: Path) -> None:
    """The tables were passed over in silence: the sample had random rows."""
    torch.save(build(2).state_dict(), tmp_path / "ckpt.pt")
    exports.exporter(
        None,
        "sparse_arch",
        "dense_arch",
        None,
        str(tmp_path / "ckpt.pt"),
        str(tmp_path / "first"),
        filter_sparse_opt=True,
        treat_as_tables=["sparse_arch.*"],
        to_hash_tables=["*"],
    ).export(progress=False)
    dense = {name: value for name, value in build(2).state_dict().items() if name.startswith("dense_arch")}
    torch.save(dense, tmp_path / "first" / "model.pt")
    (tmp_path / "first" / "manifest.json").unlink()  # without it, the files are those of a RecIS checkpoint
    manifest = export(tmp_path / "first", tmp_path / "out", **settings)
    assert manifest.drift is not None
    (drift,) = manifest.drift.outputs.values()
    if settings:
        assert 1e-5 < drift.max_abs < 0.1
    else:
        check_sample(tmp_path / "out")
        assert drift.max_abs == 0.0
