"""Rows that rules leave behind on several ranks: RecIS's own checkpoints, less what numpy says, and the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dist_export
from dist_export.errors import DistExportError
from dist_export.verify.verify import verify
from tests.distributed.test_row_account import parts_of, repeat
from tests.support import exports, torchrec_shape
from tests.support.dcp_writer import save
from tests.support.distributed.ranks import run_ranks
from tests.support.recis_writer import read_back, truth_of, write_checkpoint
from tests.support.row_model import truth_of_model

pytestmark = pytest.mark.distributed

NUM_SHARDS = (1, 2, 3, 4)
CASES = ("stepfilter2", "scored", "hostile_misplaced2", "repeats")


def rules_of(sources: str, case: str) -> list[dict[str, Any]]:
    deny = [{"tables": "item_emb", "deny": f"{sources}/deny.npy"}, {"tables": "*", "norm_at_most": 0}]
    if case == "stepfilter2":  # RecIS's filter is 0 in all of its rows
        return [{"tables": "user_*", "slot": "step_filter", "below": 1}, *deny]
    return [{"tables": "user_*", "slot": "step_filter", "below": 10}, *deny] if case == "scored" else deny


def settings(sources: str, target: str, case: str, num_shards: int) -> dict[str, Any]:
    return {
        "ckpt_dir": f"{sources}/{case}",
        "export_dir": target,
        "filter_sparse_opt": True,
        "drop_slots": ["step_filter"] if case == "scored" else [],
        "num_shards": num_shards,
        "on_duplicate": "last",
        "prune": rules_of(sources, case),
        "on_empty_table": "allow",
        "threads": 2,
    }


def export_all(_: int, sources: str, out: str) -> None:
    for case in CASES:
        for num_shards in NUM_SHARDS:
            exports.export(settings(sources, f"{out}/{case}/{num_shards}", case, num_shards))


@pytest.fixture(scope="module")
def sources(recis_fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of RecIS's checkpoints, one of these with scores in its filter and zeros, the other with repeats and zeros."""
    folder = tmp_path_factory.mktemp("sources")
    random = np.random.default_rng(3)
    for case in ("stepfilter2", "hostile_misplaced2"):
        (folder / case).symlink_to(recis_fixtures / case)
    scored = parts_of(recis_fixtures / "stepfilter2")
    for parts in scored.values():
        for part in parts:
            part.slots["embedding"] = np.where(random.random((len(part.ids), 1)) < 0.2, 0, part.slots["embedding"])
    for part in scored["user_emb"]:
        part.slots["step_filter"] = random.integers(0, 20, (len(part.ids), 1))
    write_checkpoint(folder / "scored", scored)
    repeats = repeat(parts_of(recis_fixtures / "hostile_misplaced2"), 1)
    for parts in repeats.values():
        for part in parts:
            part.slots["embedding"] = np.where(random.random((len(part.ids), 1)) < 0.3, 0, part.slots["embedding"])
    write_checkpoint(folder / "repeats", repeats)
    np.save(folder / "deny.npy", truth_of(scored)["item_emb"]["id"][::2])
    return folder


@pytest.fixture(scope="module")
def one_rank(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one_rank")
    export_all(0, str(sources), str(out))
    return out


@pytest.mark.fixtures
@pytest.mark.parametrize("case", CASES)
def test_one_rank_gives_the_truth_less_what_numpy_says(sources: Path, one_rank: Path, case: str) -> None:
    """Rows are pruned first, then the last of each id stays."""
    denied = np.load(sources / "deny.npy")
    counts: dict[str, dict[str, int]] = {}
    expected = {}
    for table, parts in parts_of(sources / case).items():
        counts[table] = {"slot_value": 0, "deny_list": 0, "norm": 0}
        for part in parts:
            limit = 1 if case == "stepfilter2" else 10
            score = part.slots.get("step_filter", np.full((len(part.ids), 1), limit))[:, 0]
            is_low = (score < limit) & (table == "user_emb")
            is_denied = np.isin(part.ids, denied) & (table == "item_emb") & ~is_low
            is_zero = (np.linalg.norm(part.slots["embedding"], axis=1) == 0) & ~is_low & ~is_denied
            for reason, gone in (("slot_value", is_low), ("deny_list", is_denied), ("norm", is_zero)):
                counts[table][reason] += int(gone.sum())
            is_kept = ~(is_low | is_denied | is_zero)
            part.ids = part.ids[is_kept]
            part.slots = {slot: rows[is_kept] for slot, rows in part.slots.items()}
        expected[table] = truth_of_model(parts, keep="last")
        counts[table]["duplicate"] = sum(len(part.ids) for part in parts) - len(expected[table]["id"])
    assert sum(sum(its.values()) for its in counts.values()) > 100 or case == "hostile_misplaced2"
    for num_shards in NUM_SHARDS:
        target = one_rank / case / str(num_shards)
        found = read_back(target)
        assert ("step_filter" in found["user_emb"]) == (case == "stepfilter2")
        for table, slots in expected.items():
            for slot in ("id", "embedding"):
                assert found[table][slot].tobytes() == slots[slot].tobytes(), (table, slot, num_shards)
        for entry in json.loads((target / "manifest.json").read_text())["tables"]:
            assert entry["rows_dropped"] == {reason: rows for reason, rows in counts[entry["name"]].items() if rows}
        assert verify(str(target)).findings == []


@pytest.mark.fixtures
def test_two_ranks_give_the_same_bytes(sources: Path, one_rank: Path, tmp_path: Path) -> None:
    run_ranks(export_all, 2, tmp_path / "store", str(sources), str(tmp_path / "out"), timeout=240)
    paths = [path.relative_to(one_rank) for path in one_rank.rglob("*") if path.is_file()]
    assert len(paths) > len(CASES) * len(NUM_SHARDS) * 4
    for path in paths:
        found, expected = (folder / path for folder in (tmp_path / "out", one_rank))
        if path.name == "manifest.json":
            assert json.loads(found.read_bytes())["digest"] == json.loads(expected.read_bytes())["digest"], path
        else:
            assert found.read_bytes() == expected.read_bytes(), path


def export_with_a_model(_: int, ckpt: str, deny: str, out: str) -> None:
    exports.export({
        "ckpt_dir": ckpt, "export_dir": out, "filter_sparse_opt": True, "num_shards": 2, "to_hash_tables": ["*"],
        "model": torchrec_shape.MODEL, "dataset": torchrec_shape.DATASET,
        "prune": [{"tables": "*t_user*", "deny": deny}],
    })  # fmt: skip


def test_the_manifest_of_a_scored_sample_knows_no_ranks(tmp_path: Path) -> None:
    """How many of its ids were left behind is told for all ranks together, and so in ``run`` alone."""
    ckpt = save(tmp_path / "ckpt", {"model": torchrec_shape.build_trained().state_dict()})
    deny = tmp_path / "deny.npy"
    np.save(deny, np.arange(0, 1000, 2))
    export_with_a_model(0, str(ckpt), str(deny), str(tmp_path / "out1"))
    run_ranks(export_with_a_model, 2, tmp_path / "store", str(ckpt), str(deny), str(tmp_path / "out2"))
    one, two = (dist_export.open_package(tmp_path / name).manifest for name in ("out1", "out2"))
    assert sum(one.run["sample"]["left_behind"].values()) < sum(two.run["sample"]["left_behind"].values())
    assert one.notes == two.notes
    assert one.digest == two.digest


def export_with_a_list_of_its_own(rank: int, sources: str, out: str) -> str:
    np.save(f"{out}-{rank}.npy", np.arange(10 + rank))
    if rank == 1:
        import dist_export.pipeline.planning as planning

        original = planning.read_id_list
        planning.read_id_list = lambda path, **settings: original(path.replace("-0.npy", "-1.npy"), **settings)
    try:
        exports.export(
            settings(sources, out, "stepfilter2", 2) | {"prune": [{"tables": "item_emb", "deny": f"{out}-0.npy"}]}
        )
    except DistExportError as error:
        return str(error)
    return "exported"


@pytest.mark.fixtures
def test_ranks_that_read_other_lists_do_not_begin(sources: Path, tmp_path: Path) -> None:
    """As from disks of their own: their plans differ, and nothing is written."""
    np.save(tmp_path / "out-0.npy", np.arange(10))
    said = run_ranks(export_with_a_list_of_its_own, 2, tmp_path / "store", str(sources), str(tmp_path / "out"))
    assert all("the ranks came to different plans" in text for text in said), said
    assert not (tmp_path / "out").exists()
