"""The score program of torchrec's own collections, which look jagged tensors up: from ids to scores without torchrec."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # torchrec's own, on import
    pytest.mark.torchrec,
    pytest.mark.skipif(
        importlib.util.find_spec("torchrec") is None and os.environ.get("DIST_EXPORT_REQUIRE_TORCHREC") != "1",
        reason="torchrec is not installed",
    ),
]

ROWS, DIM, LONGEST = 20, 4, 3

_SCORE = """
import sys
import numpy as np
import dist_export
inputs = dict(np.load(sys.argv[2]))
expected = inputs.pop("expected")
found = dist_export.open_package(sys.argv[1]).score(inputs)["torch_output_0"]
np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
assert not {"torchrec", "fbgemm_gpu"} & set(sys.modules)
"""


def build(kind: str, pooling: str = "SUM", *, is_weighted: bool = False) -> Any:
    import torch
    import torchrec
    from torch import nn

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = ("user", "item")
            if kind == "bags":
                types = torchrec.PoolingType
                self.tables = torchrec.EmbeddingBagCollection(
                    tables=[
                        torchrec.EmbeddingBagConfig(
                            name=f"t_{name}",
                            embedding_dim=DIM,
                            num_embeddings=ROWS,
                            feature_names=[name],
                            pooling=types[pooling],
                        )
                        for name in names
                    ],
                    is_weighted=is_weighted,
                )
            else:
                self.tables = torchrec.EmbeddingCollection(
                    tables=[
                        torchrec.EmbeddingConfig(
                            name=f"t_{name}", embedding_dim=DIM, num_embeddings=ROWS, feature_names=[name]
                        )
                        for name in names
                    ]
                )

        def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
            found = self.tables(batch["features"])
            if kind == "bags":
                return {**found.to_dict(), "numbers": batch["numbers"]}
            padded = {name: its.to_padded_dense(LONGEST).flatten(1) for name, its in found.items()}
            return {**padded, "numbers": batch["numbers"]}

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2 * (DIM if kind == "bags" else DIM * LONGEST) + 1, 1)

        def forward(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.sigmoid(self.head(torch.cat([blocks["user"], blocks["item"], blocks["numbers"]], dim=1)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sparse_arch, self.dense_arch = Sparse(), Dense()

        def forward(self, batch: dict[str, Any]) -> torch.Tensor:
            return self.dense_arch(self.sparse_arch(batch))

    return Model()


def batch_of(num_examples: int, seed: int, *, is_weighted: bool = False) -> dict[str, Any]:
    import torch
    from torchrec import KeyedJaggedTensor

    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, LONGEST + 1, (2 * num_examples,), generator=random)
    num_ids = int(lengths.sum())
    features = KeyedJaggedTensor(
        keys=["user", "item"],
        values=torch.randint(0, ROWS, (num_ids,), generator=random),
        lengths=lengths,
        weights=torch.rand(num_ids, generator=random) if is_weighted else None,
    )
    return {"features": features, "numbers": torch.rand(num_examples, 1, generator=random)}


@pytest.mark.parametrize(
    ("kind", "pooling", "is_weighted", "has_weights"),
    [
        ("bags", "SUM", False, False),
        ("bags", "MEAN", False, False),
        ("bags", "SUM", True, True),
        ("lists", "", False, False),
        ("bags", "SUM", False, True),
        ("bags", "MEAN", False, True),
        ("lists", "", False, True),
    ],
)
def test_collections_score_from_ids(
    kind: str, pooling: str, is_weighted: bool, has_weights: bool, tmp_path: Path
) -> None:
    """Weights that the collection does not read are no input."""
    import numpy as np
    import torch

    import dist_export
    from dist_export.api import Exporter

    torch.manual_seed(3)
    trained = build(kind, pooling, is_weighted=is_weighted).eval()
    torch.save(trained.state_dict(), tmp_path / "model.pth")
    out = tmp_path / "out"
    manifest = Exporter(
        build(kind, pooling, is_weighted=is_weighted),
        "sparse_arch",
        "dense_arch",
        [batch_of(5, 0, is_weighted=has_weights)],
        tmp_path / "model.pth",
        out,
        score_program="require",
    ).export(progress=False)
    names = ["features_values", "features_lengths", *(["features_weights"] if is_weighted else []), "numbers"]
    assert [entry.name for entry in manifest.score.inputs] == names
    assert dict(zip(names, (entry.shape[0] for entry in manifest.score.inputs), strict=True))["numbers"] == "batch"
    assert manifest.score.parity.batch_sizes == (5, 1, 2, 301)
    package = dist_export.open_package(out)
    for num_examples in (1, 2, 128):
        batch = batch_of(num_examples, num_examples, is_weighted=has_weights)
        features = batch["features"]
        inputs = {
            "features_values": features.values(),
            "features_lengths": features.lengths(),
            "numbers": batch["numbers"],
        }
        inputs |= {"features_weights": features.weights()} if is_weighted else {}
        with torch.no_grad():
            expected = trained(batch).numpy()
        found = package.score(inputs)["torch_output_0"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        blocks = package.build_dense_inputs(inputs)
        with torch.no_grad():
            own = trained.sparse_arch(batch)
        for name, values in own.items():
            np.testing.assert_allclose(blocks[name], values.numpy(), rtol=1e-5, atol=1e-6)
    stated = {feature.name: feature for feature in package.manifest.serving.features}
    assert {name: (its.ids.key, its.pooling) for name, its in stated.items()} == {
        "user": (0, pooling.lower() or "none"),
        "item": (1, pooling.lower() or "none"),
    }
    assert stated["user"].stated_by["pooling"] == "collection"
    np.savez(tmp_path / "inputs.npz", expected=expected, **{name: its.numpy() for name, its in inputs.items()})
    subprocess.run([sys.executable, "-c", _SCORE, str(out), str(tmp_path / "inputs.npz")], cwd="/", check=True)


def test_lists_of_a_fixed_length_are_stated_without_other_lengths_to_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the lengths of the sample alone can be tried, it was stated that lists are as long as the longest of a batch."""
    import torch

    from dist_export.api import Exporter
    from dist_export.contract.made_up import Trials

    run = Trials.run
    monkeypatch.setattr(
        Trials, "run", lambda self, *, vary_sizes, fixed=None: None if vary_sizes else run(self, vary_sizes=False)
    )
    torch.manual_seed(3)
    torch.save(build("lists").state_dict(), tmp_path / "model.pth")
    given = [build("lists"), "sparse_arch", "dense_arch", [batch_of(5, 0)], tmp_path / "model.pth", tmp_path / "out"]
    manifest = Exporter(*given, score_program="require").export(progress=False)
    assert [feature.longest for feature in manifest.serving.features] == [LONGEST, LONGEST]
