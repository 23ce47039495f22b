"""torchrec's own modules in the sample: fed with the checkpoint's rows, scored from the package as torchrec scores."""

from __future__ import annotations

import importlib.util
import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed.ranks import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.torchrec,
    pytest.mark.fixtures,
    pytest.mark.skipif(
        importlib.util.find_spec("torchrec") is None and os.environ.get("DIST_EXPORT_REQUIRE_TORCHREC") != "1",
        reason="torchrec is not installed",
    ),
]


def export_and_score(_: int, fixtures: str, out: str) -> dict[str, Any]:
    """Export the row-wise fixture with a model of torchrec, and score a batch with both."""
    import numpy as np
    import torch

    import dist_export
    from tests.support.with_torchrec import torchrec_model

    manifest = dist_export.export(
        {
            "ckpt_dir": f"{fixtures}/row_wise",
            "export_dir": out,
            "filter_sparse_opt": True,
            "num_shards": 3,
            "model": "tests.support.with_torchrec.torchrec_model:build_model",
            "dataset": "tests.support.with_torchrec.torchrec_model:build_dataset",
            "sparse_model_name": "sparse",
            "dense_model_name": "mlp",
        }
    )
    golden = torch.load(f"{fixtures}/row_wise.golden.pt", weights_only=True)
    model = torchrec_model.build_model().eval()
    model.load_state_dict({name: golden[name.removeprefix("sparse.")] for name in model.state_dict()})
    package = dist_export.open_package(out)
    (_, batch), *_ = torchrec_model.build_dataset(9)
    blocks = {"numbers": batch["numbers"]}
    for name in torchrec_model.TABLES:
        feature = batch["features"][name]
        rows, found = package.lookup(f"ebc.embedding_bags.{name}.weight", feature.values().numpy())
        assert found.all()
        edges = feature.offsets().tolist()
        blocks[name] = torch.from_numpy(
            np.stack([rows[begin:end].sum(axis=0) for begin, end in itertools.pairwise(edges)])
        )
    with torch.no_grad():
        expected, scored = model.mlp(model.sparse(batch)), package.load_program().module()(**blocks)
    torch.testing.assert_close(scored, expected)
    assert manifest.parity is not None
    return {"notes": manifest.notes, "sample": manifest.run["sample"], "scores": manifest.parity.from_files}


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_unsharded_collection_is_fed_and_scored(world_size: int, torchrec_fixtures: Path, tmp_path: Path) -> None:
    found = run_ranks(
        export_and_score, world_size, tmp_path / "store", str(torchrec_fixtures), str(tmp_path / "out"), timeout=240
    )[0]
    assert not any("own rows" in note for note in found["notes"])
    assert set(found["sample"]["asked"]) == {"ebc.embedding_bags.t_user.weight", "ebc.embedding_bags.t_item.weight"}
    assert not any(found["sample"]["missing"].values())
    assert found["scores"].reads_rows
    assert all(ulp == 0 for ulp in found["scores"].max_ulp.values())
