"""The sample scored from the written files by several real ranks, through a sparse arch that is collective."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dist_export.errors import DistExportError
from dist_export.pipeline import steps
from dist_export.verify.verify import verify
from tests.distributed.test_dense_ranks import DIM, IDS, Model, hooks_of, local_state, make_exporter, write_source
from tests.support.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

OWNER_OF = [int(i & 65535) // 32768 for i in IDS]
SAMPLED = [0, 1, 30, 31, 32, 10, 11, 12, 40, 41]
"""Places in IDS: what rank 0 asks for, then rank 1; each asks for ids of both."""


def batches(rank: int) -> list[tuple[bool, dict[str, torch.Tensor]]]:
    ids = torch.from_numpy(IDS[SAMPLED[rank * 5 : rank * 5 + 5]])
    return [(False, {"ids": ids, "price": torch.full((5, 1), float(rank))})]


def damage(target: Path, place: int) -> None:
    """Flip a bit in the row of ``IDS[place]``."""
    for path in target.glob("*.safetensors"):
        raw = bytearray(path.read_bytes())
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        for key, entry in header.items():
            if not key.startswith("user.id/"):
                continue
            begin, end = entry["data_offsets"]
            ids = np.frombuffer(bytes(raw[8 + length + begin : 8 + length + end]), np.int64)
            if IDS[place] in ids:
                rows = header[key.replace(".id/", ".embedding/")]["data_offsets"][0]
                raw[8 + length + rows + int(np.flatnonzero(ids == IDS[place])[0]) * 4 * DIM + 2] ^= 1
                path.write_bytes(raw)
                return
    raise AssertionError("not there")


def export_damaged(rank: int, folder: str, place: int | None, later_failure: int | None) -> dict[str, Any]:
    """Export with a row that is spoilt after the shards were checked; return what came of it and of the model."""
    model = Model()
    model.train()
    model.sparse.table.rows = {int(IDS[0]): torch.full((DIM,), -1.0), int(IDS[12]): torch.full((DIM,), -2.0)}
    before = local_state(model)
    rows = copy.deepcopy(model.sparse.table.rows)
    plain = steps.check

    def check(ranks, planned, target, **more):
        found = plain(ranks, planned, target, **more)
        if ranks.rank == 0 and place is not None:
            damage(Path(target.path), place)
        dist.barrier()
        if later_failure is not None:
            model.sparse.failing_rank = later_failure
        return found

    steps.check = check
    told: dict[str, Any] = {"kind": "", "text": ""}
    try:
        manifest = make_exporter(model, batches(rank), folder, "out").export()
        told |= {"digest": manifest.digest, "sample": manifest.run["sample"], "parity": manifest.parity}
    except DistExportError as error:
        told |= {"kind": type(error).__name__, "text": str(error), "code": error.exit_code}
    after = local_state(model)
    told["is_left"] = (
        all(torch.equal(before[name], after[name]) for name in before)
        and all(torch.equal(model.sparse.table.rows[i], row) for i, row in rows.items())
        and all(module.training for module in model.modules())
        and not any(hooks_of(model))
    )
    return told


def test_all_ranks_score_from_the_shards_together(tmp_path: Path) -> None:
    write_source(tmp_path / "ckpt", "dense.")
    results = run_ranks(export_damaged, 2, tmp_path / "store", str(tmp_path), None, None)
    assert [result["text"] for result in results] == ["", ""]
    assert all(result["is_left"] for result in results)
    found = results[0]
    assert found["sample"]["asked"] == {"user": 10}, "the ids of both ranks, each looked up by the rank that owns it"
    assert found["parity"].from_files.reads_rows
    assert found["parity"].from_files.max_ulp == {"ctr": 0, "like": 0}
    assert verify(str(tmp_path / "out")).findings == []


@pytest.mark.parametrize("owner", [0, 1])
def test_a_row_that_one_rank_finds_wrong_is_told_on_all(owner: int, tmp_path: Path) -> None:
    place = next(place for place in SAMPLED if OWNER_OF[place] == owner)
    write_source(tmp_path / "ckpt", "dense.")
    for result in run_ranks(export_damaged, 2, tmp_path / "store", str(tmp_path), place, None):
        assert result["kind"] == "StepFailedError"
        assert result["code"] == 1
        assert (
            f"failed on rank {owner} of 2: table 'user': the id {IDS[place]} of the sample has another row"
            in result["text"]
        )
        assert result["is_left"]
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_sparse_arch_that_fails_on_one_rank_in_its_second_run_ends_that_rank_with_its_own_error(
    failing: int, tmp_path: Path
) -> None:
    write_source(tmp_path / "ckpt", "dense.")
    other = 1 - failing
    results = run_ranks(export_damaged, 2, tmp_path / "store", str(tmp_path), None, failing, may_end=(other,))
    assert results[failing]["kind"] == "ParityError"
    assert "ValueError: only here at" in results[failing]["text"]
    assert "fails with those of the written shards" in results[failing]["text"]
    assert results[failing]["is_left"]
    assert results[other] is None or results[other]["kind"]
    assert not (tmp_path / "out" / "manifest.json").exists()
