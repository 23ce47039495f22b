"""Managed-collision tables that torchrec itself trained: the package gives raw ids what the module's own forward gives them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed.ranks import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.torchrec,
    pytest.mark.skipif(
        importlib.util.find_spec("torchrec") is None and os.environ.get("DIST_EXPORT_REQUIRE_TORCHREC") != "1",
        reason="torchrec is not installed",
    ),
]
MCH, ZCH = (f"sparse.mc._embedding_module.embedding_bags.{name}.weight" for name in ("t_mch", "t_zch"))


def export_and_compare(rank: int, folder: str, saved_as: str) -> dict[str, Any]:
    """Train until ids are evicted, save, export with a fresh model, and look all ids up in both."""
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    import dist_export
    from tests.support.with_torchrec import collision_model

    source = Path(folder) / "in"
    model = collision_model.train()
    if saved_as == "dcp":
        dcp.save({"model": model.state_dict()}, checkpoint_id=source)
    elif rank == 0:
        source.mkdir()
        torch.save(model.state_dict(), source / "model.pt")
    dist.barrier()
    manifest = dist_export.export(
        {
            "ckpt_dir": str(source),
            "export_dir": f"{folder}/out",
            "filter_sparse_opt": True,
            "num_shards": 3,
            "model": "tests.support.with_torchrec.collision_model:build_model",
            "dataset": "tests.support.with_torchrec.collision_model:build_dataset",
            "sparse_model_name": "sparse",
            "dense_model_name": "mlp",
        }
    )
    known = {
        "t_mch": collision_model.modules_of(model)["t_mch"]._mch_sorted_raw_ids.tolist()[:-1],
        "t_zch": collision_model.PLACED,
    }
    ids = sorted({*range(-20, 110), *known["t_mch"], *known["t_zch"], -(1 << 63)})
    package = dist_export.open_package(f"{folder}/out")
    found = {}
    model.eval()
    with torch.no_grad():
        pooled = model.sparse(collision_model.make_batch(dict.fromkeys(collision_model.TABLES, ids)))
    for table, name in ((MCH, "t_mch"), (ZCH, "t_zch")):
        rows, is_known = package.lookup(table, np.array(ids))
        is_same = (rows == pooled[name].numpy()).all(axis=1)
        assert sorted(np.array(ids)[is_known].tolist()) == sorted(known[name])
        found[name] = {
            "same": int(is_same.sum()),
            "known_same": bool(is_same[is_known].all()),
            "known": len(known[name]),
        }
    return {
        "ids": len(ids),
        **found,
        "dropped": {table.name: table.rows_dropped for table in manifest.tables},
        "parity": manifest.parity.max_abs if manifest.parity else None,
        "notes": manifest.notes,
    }


@pytest.mark.parametrize(("world_size", "saved_as"), [(1, "torch"), (2, "dcp")])
def test_raw_ids_get_what_torchrec_gives_them(world_size: int, saved_as: str, tmp_path: Path) -> None:
    """Known, unknown and evicted ids of MCH, bit for bit; of HashZCH those that have a slot of their own."""
    found = run_ranks(export_and_compare, world_size, tmp_path / "store", str(tmp_path), saved_as, timeout=240)[0]
    assert found["t_mch"]["same"] == found["ids"]
    assert 0 < found["t_mch"]["known"] < 24
    assert found["t_zch"]["known_same"]
    assert found["dropped"] == {
        MCH: {"empty": 24 - found["t_mch"]["known"]},
        ZCH: {"empty": 32 - found["t_zch"]["known"]},
    }
    assert found["parity"] == {"torch_output_0": 0}
    assert any("may fall back to the row of another id" in note for note in found["notes"])


def export_hashed(_: int, folder: str) -> list[str]:
    import torch

    import dist_export
    from dist_export.errors import ModelError
    from tests.support.with_torchrec import collision_model

    torch.save(collision_model.train(is_hashed=True).state_dict(), f"{folder}/model.pt")
    settings = {
        "ckpt_dir": f"{folder}/model.pt",
        "export_dir": f"{folder}/out",
        "filter_sparse_opt": True,
        "model": "tests.support.with_torchrec.collision_model:build_model",
        "model_args": {"is_hashed": True},
        "dataset": "tests.support.with_torchrec.collision_model:build_dataset",
        "sparse_model_name": "sparse",
        "dense_model_name": "mlp",
    }
    try:
        dist_export.export(settings)
    except ModelError as error:
        manifest = dist_export.export(settings | {"allow_hashed_ids": [MCH]})
        return [str(error), str(manifest.parity is not None)]
    return []


def test_hashed_ids_are_refused_unless_they_are_allowed(tmp_path: Path) -> None:
    said, is_exported = run_ranks(export_hashed, 1, tmp_path / "store", str(tmp_path), timeout=240)[0]
    assert f"table {MCH!r}" in said
    assert "hashes ids with its input_hash_func" in said
    assert is_exported == "True"
