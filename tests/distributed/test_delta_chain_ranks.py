"""A model is trained three times on; a full package and two deltas on top of each other, on several real ranks, are its state.

The opened chain, what ``compact`` makes of it, and a full export agree row for row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_export.pipeline.compact_command import OPTIONS, compact
from dist_export.runtime.joining import join
from dist_export.verify.verify import verify
from tests.integration.test_compact import compare
from tests.integration.test_delta_chain_export import looked_up
from tests.integration.test_delta_export import export
from tests.support import dcp_writer
from tests.support.deltas import manifest_of, put_chain_together, read_deleted, read_package
from tests.support.distributed.ranks import run_ranks
from tests.support.recis_writer import split_table, write_checkpoint

pytestmark = pytest.mark.distributed

NUM_IDS, DIM = 900, 8
SHARDS = (3, 1, 2)
"""Of the full package and of each delta."""
RULES: dict[str, Any] = {"prune": [{"tables": ["*"], "norm_at_most": 0.6}], "keep_slots": [], "on_overflow": "clamp"}
SETTINGS: dict[str, dict[str, Any]] = {
    "recis": RULES | {"dtype": {"item": "int8", "user": "float16"}},
    "dcp": RULES | {"dtype": {"*": "float16"}, "treat_as_tables": ["sparse_arch.*"], "to_hash_tables": ["*"]},
}


def train_and_save(folder: Path) -> None:
    """Train two tables on clicks, and save three states: as hash tables with evictions, and as matrices."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    tables = {name: torch.zeros(NUM_IDS, DIM, requires_grad=True) for name in ("item", "user")}
    optimizer = torch.optim.SGD(tables.values(), lr=0.8, weight_decay=0.002)
    known: set[int] = set()
    for step in range(3):
        ids = random.permutation(NUM_IDS)[: 600 if step == 0 else 60]
        known |= set(ids.tolist())
        fresh = [number for number in ids.tolist() if not tables["item"][number].any()]
        with torch.no_grad():
            for table in tables.values():
                table[fresh] = torch.randn(len(fresh), DIM) * 0.4
        for _ in range(3):
            optimizer.zero_grad()
            scores = (tables["item"][ids] * tables["user"][ids[::-1].copy()]).sum(1)
            clicks = torch.from_numpy((ids % 2 == step % 2).astype(np.float32))
            torch.nn.functional.binary_cross_entropy_with_logits(scores, clicks, reduction="sum").backward()
            for table in tables.values():  # weight decay is for the rows of the batch alone, as for sparse gradients
                assert table.grad is not None
                table.grad[np.setdiff1d(np.arange(NUM_IDS), ids)] = (
                    -0.002 * table.detach()[np.setdiff1d(np.arange(NUM_IDS), ids)]
                )
            optimizer.step()
        gone = random.choice(sorted(known), 25, replace=False).tolist()
        known -= set(gone)
        with torch.no_grad():
            for table in tables.values():
                table[gone] = 0.0
        kept = np.array(sorted(known)) * 7919 - 10**6
        rows = {name: table.detach().numpy()[sorted(known)] for name, table in tables.items()}
        hashed = {name: split_table(kept, {"embedding": its.copy()}, 2) for name, its in rows.items()}
        write_checkpoint(folder / f"recis-{step}", hashed)
        state = {f"sparse_arch.{name}.weight": table.detach().clone() for name, table in tables.items()}
        dcp_writer.save(folder / f"dcp-{step}", state)


def export_all(_: int, folder: str, out: str) -> None:
    """Export the first state whole, the others as deltas on the one before, and the last one whole; compact. Any rank."""
    for name, settings in SETTINGS.items():
        sources = [Path(f"{folder}/{name}-{step}") for step in range(3)]
        links = [Path(f"{out}/{name}-link{step}") for step in range(3)]
        for step, source in enumerate(sources):
            more = {"base": str(links[step - 1]), "delta_chain": 8} if step else {"row_fingerprints": True}
            export(source, links[step], num_shards=SHARDS[step], threads=2, **settings, **more)
        export(sources[-1], Path(f"{out}/{name}-full"), num_shards=2, row_fingerprints=True, threads=2, **settings)
        arguments: dict[str, Any] = {key: option.default for key, option in OPTIONS.items()}
        arguments |= {"delta": str(links[-1]), "out": f"{out}/{name}-compact", "threads": 2, "progress": False}
        with join(timeout_secs=60) as ranks:
            compact(ranks, arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints, and what one rank makes of them in ``one``."""
    base = tmp_path_factory.mktemp("trained")
    train_and_save(base)
    export_all(0, str(base), str(base / "one"))
    return base


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_chain_compact_and_full_export_agree(folder: Path, tmp_path: Path, world_size: int) -> None:
    out = tmp_path / "out"
    run_ranks(export_all, world_size, tmp_path / "store", str(folder), str(out))
    for name in SETTINGS:
        links = [out / f"{name}-link{step}" for step in range(3)]
        full = read_package(out / f"{name}-full")
        for table in manifest_of(links[-1])["tables"]:
            account = table["delta"]
            assert min(account["same"], account["changed"], account["new"], account["deleted"]) > 0, (name, account)
        assert any(read_deleted(links[1]).values())
        assert [manifest_of(link)["num_shards"] for link in links] == list(SHARDS)
        assert put_chain_together(links) == full
        assert looked_up(links[-1], full) == full
        compare(out / f"{name}-compact", out / f"{name}-full")
        for link in links:
            assert verify(str(link)).findings == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_ranks(folder: Path, tmp_path: Path, world_size: int) -> None:
    run_ranks(export_all, world_size, tmp_path / "store", str(folder), str(tmp_path / "out"))
    for name in SETTINGS:
        for link in (f"{name}-link1", f"{name}-link2", f"{name}-compact"):
            one, found = folder / "one" / link, tmp_path / "out" / link
            files = sorted(path.name for path in one.iterdir() if path.is_file())
            assert sorted(path.name for path in found.iterdir() if path.is_file()) == files
            for file in set(files) - {"manifest.json"}:
                assert (found / file).read_bytes() == (one / file).read_bytes(), file
