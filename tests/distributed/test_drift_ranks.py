"""The drift where the ranks' sparse arches are collective and their datasets end at different times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_export.errors import DistExportError
from tests.distributed.test_dense_ranks import IDS, Model, make_exporter, trained_state, write_source
from tests.support.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed


def several(rank: int) -> list[dict[str, torch.Tensor]]:
    """Three batches on rank 0, two on rank 1, of different sizes."""
    sizes = [(0, 5), (5, 9), (9, 12)] if rank == 0 else [(12, 15), (15, 20)]
    return [{"ids": torch.from_numpy(IDS[a:b]), "price": torch.linspace(0, 1, b - a)[:, None]} for a, b in sizes]


def expected_max(gone: int) -> float:
    """The largest difference of ctr over rank 0's first two batches, with zeros in the place of one id's row."""
    dense = Model().dense
    dense.load_state_dict({name.removeprefix("dense."): value for name, value in trained_state("dense.").items()})
    worst = 0.0
    for batch in several(0)[:2]:
        rows = torch.tensor([[float(i % 97)] * 4 for i in batch["ids"].tolist()])
        pruned = torch.where((batch["ids"] == gone)[:, None], torch.zeros(()), rows)
        with torch.no_grad():
            then, now = (dense.eval()({"user": x, "price": batch["price"]})["ctr"] for x in (rows, pruned))
        worst = max(worst, float((then.double() - now.double()).abs().max()))
    return worst


def export_both(rank: int, folder: str) -> dict[str, Any]:
    prune = [{"tables": "user", "deny": f"{folder}/deny.txt"}]
    found: dict[str, Any] = {}
    manifest = make_exporter(Model(), several(rank), folder, "plain").export()
    found["plain"] = manifest.drift
    manifest = make_exporter(Model(), several(rank), folder, "pruned", prune=prune).export()
    found["pruned"], found["counts"] = manifest.drift, manifest.run["drift"]
    try:
        make_exporter(Model(), several(rank), folder, "bounded", prune=prune, max_drift=1e-6).export()
    except DistExportError as error:
        found["error"] = (str(error), error.exit_code)
    return found


def test_every_rank_sees_the_same_drift_and_the_same_end(tmp_path: Path) -> None:
    write_source(tmp_path / "ckpt", "dense.")
    gone = int(IDS[6])
    np.savetxt(tmp_path / "deny.txt", [gone, int(IDS[13])], fmt="%d")
    for found in run_ranks(export_both, 2, tmp_path / "store", str(tmp_path), timeout=300):
        assert (found["plain"].batches, found["plain"].rows) == (2, 9)
        assert found["plain"].outputs["ctr"].max_abs == 0.0
        assert found["pruned"].outputs["ctr"].max_abs == pytest.approx(expected_max(gone), rel=1e-4)
        assert found["counts"]["pruned"] >= 2
        text, code = found["error"]
        assert "max_drift: scores of the package differ" in text
        assert code == 1
    assert not (tmp_path / "bounded" / "manifest.json").exists()


def fail_later(rank: int, how: str):
    """Two batches, and a third that fails on rank 1 alone."""
    data = several(0) if rank == 0 else [*several(1), {"ids": torch.from_numpy(IDS[:2]), "price": torch.ones(2, 1)}]
    if rank and how == "sparse arch":
        data[2]["prices"] = data[2].pop("price")  # it fails behind its collectives
    yield from data[:2]
    if rank and how == "dataset":
        raise OSError("the next file is gone")
    yield data[2]


def export_failing(rank: int, folder: str) -> list[tuple[int, list[str]]]:
    found = []
    for how in ("dataset", "sparse arch"):
        manifest = make_exporter(Model(), fail_later(rank, how), folder, how.replace(" ", "_")).export()
        found.append((manifest.drift.batches, [note for note in manifest.notes if note.startswith("drift is")]))
    return found


def test_a_later_batch_that_fails_on_one_rank_ends_the_drift_on_all(tmp_path: Path) -> None:
    write_source(tmp_path / "ckpt", "dense.")
    start = "drift is measured on the batches before batch 3 of rank 1: "
    for found in run_ranks(export_failing, 2, tmp_path / "store", str(tmp_path), timeout=300):
        assert [num for num, _ in found] == [2, 2]
        told = ("the dataset fails: OSError: the next file is gone", "the sparse arch fails on it: KeyError: 'price'")
        for (_, notes), reason in zip(found, told, strict=True):
            assert len(notes) == 1
            assert notes[0].startswith(start + reason)
