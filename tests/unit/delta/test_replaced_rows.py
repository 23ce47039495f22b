"""What a thread holds of the deleted ids is what one shard of the base loses, however many all shards lose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dist_export.delta.layered_source import OF_BASE, LayeredReader
from dist_export.delta.replaced_rows import ReplacedRows, plan_replacing
from dist_export.errors import PlanError
from dist_export.package.reader import open_package
from dist_export.pipeline.planning import read_metadata
from dist_export.runtime.joining import alone
from tests.integration.test_delta_export import change, export, save, tables_of
from tests.support.deltas import read_deleted, read_package


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, before = tmp_path_factory.mktemp("replaced"), tables_of()
    rules = [{"tables": ["item"], "slot": "step", "below": 2000}]
    old, new = save(folder / "old", before, 2), save(folder / "new", change(before), 2)
    base = export(old, folder / "base", num_shards=5)
    export(new, folder / "delta", base=str(base), prune=rules)
    return folder


def test_which_rows_are_needless_and_what_that_takes(folder: Path) -> None:
    with open_package(folder / "delta") as package:
        checkpoint = read_metadata(alone(), lambda: LayeredReader(package))
        replaced = ReplacedRows(checkpoint, package, threads=2)
        deleted, own = read_deleted(folder / "delta"), read_package(folder / "delta")
        total = sum(map(len, deleted.values()))
        assert total > 1900
        assert total * 24 * 2 / 5 < replaced.num_bytes < total * 24 * 2 / 3
        assert checkpoint.parts.layer is not None
        found: dict[str, set[int]] = {name: set() for name in deleted}
        for part in np.flatnonzero(checkpoint.parts.layer == OF_BASE).tolist():
            name = checkpoint.tables[int(checkpoint.parts.table[part])].name
            ids = np.array(
                list(read_package(folder / "base")[name])
            )  # of all parts: a list is that of one part's shard
            in_part = checkpoint.parts.slice_of(part)
            ids = ids[(ids % in_part.size >= in_part.begin) & (ids % in_part.size < in_part.end)]
            is_kept = np.ones(len(ids), bool)
            is_kept[:1] = False
            is_needless = replaced.find(part, 0, ids, is_kept, None)  # type: ignore[arg-type]
            assert not is_needless[:1].any()
            is_needless |= replaced.find(part, 0, ids, ~is_kept, None)  # type: ignore[arg-type]
            found[name] |= set(ids[is_needless].tolist())
        for name, ids_of in found.items():
            assert ids_of == deleted[name] | (own[name].keys() & read_package(folder / "base")[name].keys())
        most = replaced.num_bytes
        plan_replacing(checkpoint, package, threads=2, most_bytes=most)
        with pytest.raises(PlanError, match="deleted from one shard of the base"):
            plan_replacing(checkpoint, package, threads=2, most_bytes=most - 1)
