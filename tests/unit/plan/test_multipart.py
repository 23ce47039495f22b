"""How shards are cut into the parts of an upload: what a store may copy, and what has to come from here."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dist_export
from dist_export.errors import PlanError
from dist_export.plan.multipart import MAX_PARTS, MIN_PART_BYTES, Part, plan_parts
from tests.support.recis_writer import make_tables, write_checkpoint

MIB = 1 << 20


def plan_of(header: int, runs: list[tuple[int, bool]]) -> SimpleNamespace:
    """Return what plan_parts looks at: one file of a header and runs, each (bytes, whether it is a copy at all)."""
    position, rows = header, []
    for number, (num_bytes, is_copy) in enumerate(runs):
        if is_copy:
            rows.append((0, position, number, 1000 * number, num_bytes))
        position += num_bytes
    columns = np.array(rows, np.int64).reshape(-1, 5).T
    names = ("file", "offset", "source_file", "source_offset", "num_bytes")
    copies = SimpleNamespace(**dict(zip(names, columns, strict=True)))
    file = SimpleNamespace(name="model", num_bytes=position, header=b" " * header)
    return SimpleNamespace(files=(file,), copies=copies, files_of_runs=np.zeros(0, np.int64))


RUNS = st.lists(st.tuples(st.integers(1, 40 * MIB), st.booleans()), max_size=12)


@given(st.integers(1, 8 * MIB), RUNS)
def test_parts_cover_a_file_and_keep_to_the_limits(header: int, runs: list[tuple[int, bool]]) -> None:
    """Every byte once; only the last part is short; what the store copies lies in one run, at its place in the source."""
    plan = plan_of(header, runs)
    found = plan_parts(plan, part_bytes=8 * MIB, may_copy=True)[0].parts
    size = plan.files[0].num_bytes
    assert [part.begin for part in found] == [0, *(part.end for part in found[:-1])]
    assert found[-1].end == size
    assert all(part.end - part.begin >= MIN_PART_BYTES for part in found[:-1])
    assert all(part.end - part.begin < 16 * MIB for part in found if not part.is_remote)
    for part in found:
        if part.is_remote:
            row = int(np.searchsorted(plan.copies.offset, part.begin, side="right")) - 1
            begin, num_bytes = int(plan.copies.offset[row]), int(plan.copies.num_bytes[row])
            assert begin <= part.begin < part.end <= begin + num_bytes
            assert part.source_file == plan.copies.source_file[row]
            assert part.source_offset - int(plan.copies.source_offset[row]) == part.begin - begin
    here = sum(part.end - part.begin for part in found if not part.is_remote)
    small = header + sum(num_bytes for num_bytes, is_copy in runs if not is_copy or num_bytes < 2 * MIN_PART_BYTES)
    # at most what fills one part before each run goes through here besides
    assert here <= small + MIN_PART_BYTES * (len(runs) + 1)


def test_a_shard_of_a_gigabyte_costs_one_part() -> None:
    plan = plan_of(4096, [(30_000, True), (1000, False), *[(64 * MIB, True)] * 16])
    found = plan_parts(plan, part_bytes=16 * MIB, may_copy=True)[0].parts
    assert [part for part in found if not part.is_remote] == [Part(0, MIN_PART_BYTES)]


def test_a_long_run_is_several_copies() -> None:
    found = plan_parts(plan_of(MIN_PART_BYTES, [(7 << 30, True)]), part_bytes=8 * MIB, may_copy=True)[0].parts
    assert len(found) == 29
    assert max(part.end - part.begin for part in found) <= 256 * MIB


def test_runs_beyond_the_number_of_parts_go_through_here_together() -> None:
    runs = [(6 * MIB, True), (50 * MIB, True)] * 12
    found = plan_parts(plan_of(MIN_PART_BYTES, runs), part_bytes=8 * MIB, may_copy=True, most_parts=20)[0]
    assert len(found.parts) <= 20
    assert not found.has_remote or any(part.is_remote for part in found.parts)


def test_without_copies_parts_lie_on_a_grid() -> None:
    found = plan_parts(plan_of(8, [(40 * MIB, True)]), part_bytes=16 * MIB, may_copy=False)[0]
    assert not found.has_remote
    assert [part.begin for part in found.parts] == [0, 16 * MIB, 32 * MIB]


def test_a_shard_that_no_upload_takes() -> None:
    with pytest.raises(PlanError, match=r"more than an S3 store takes in 10,000 parts of 64 MiB; raise num_shards"):
        plan_parts(plan_of(8, [(MAX_PARTS * 64 * MIB, True)]), part_bytes=16 * MIB, may_copy=False)


def test_small_runs_lie_first_on_every_storage(tmp_path) -> None:
    """A table in the middle whose rows are long runs goes behind all others; elsewhere the order is the tables'."""
    tables = make_tables({"a": 50, "b": 90_000, "c": 50}, 1, dim=16, slots=())
    write_checkpoint(tmp_path / "ckpt", tables)
    settings = {"ckpt_dir": str(tmp_path / "ckpt"), "filter_sparse_opt": True, "num_shards": 1}
    dist_export.export({**settings, "export_dir": str(tmp_path / "out")})
    package = dist_export.open_package(tmp_path / "out")
    keys = [key.partition("/")[0] for key in package.header("model-000000-of-000001.safetensors").keys]
    assert keys == ["a.id", "a.embedding", "b.id", "c.id", "c.embedding", "b.embedding"]
