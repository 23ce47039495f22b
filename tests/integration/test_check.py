from __future__ import annotations

import numpy as np
import pytest

import dist_export.pipeline.shards
from dist_export.commit import audit
from dist_export.commit.audit import TableAccount, audit_files, check_accounts
from dist_export.errors import CommitError
from dist_export.formats.recis import mix
from dist_export.storage.urls import open_directory
from tests.support.recis_writer import make_tables, truth_of, write_checkpoint
from tests.support.sparse_cases import export, plan


@pytest.fixture
def exported(tmp_path):
    """(planned, target, tables) of a finished export."""
    tables = make_tables({"a": 120, "b": 40}, 3)
    write_checkpoint(tmp_path / "in", tables)
    export(tmp_path / "in", tmp_path / "out", num_shards=2)
    return plan(tmp_path / "in", num_shards=2), open_directory(tmp_path / "out"), tables


def edit(target, name, change):
    data = bytearray(target.read(name))
    change(data)
    target.write(name, bytes(data))


@pytest.mark.parametrize("run_rows", [1 << 20, 7])
@pytest.mark.parametrize("shares", [[range(2)], [range(1), range(1, 2)], [range(1, 2), range(0), range(1)]])
def test_a_sound_export_has_the_rows_and_ids_of_its_source(exported, shares, run_rows):
    planned, target, tables = exported
    found = [audit_files(planned.plan, target, share, run_rows=run_rows).accounts for share in shares]
    totals = check_accounts(planned.plan, planned.census, found)
    assert [total.rows for total in totals] == [120, 40]
    for total, rows in zip(totals, truth_of(tables).values(), strict=True):
        assert total.id_sum == int(mix(rows["id"]).sum(dtype=np.uint64))


def id_offset(planned, file, table=0):
    rows = planned.plan.blocks_of(table, 0)
    (row,) = rows[planned.plan.blocks.file[rows] == file]
    return int(planned.plan.blocks.offset[row])


def test_an_id_outside_its_slice_is_found(exported):
    planned, target, _ = exported
    file = planned.plan.files[1]
    offset = id_offset(planned, 1)

    def change(data):
        data[offset : offset + 8] = (5).to_bytes(8, "little")

    edit(target, file.name, change)
    with pytest.raises(CommitError, match=rf"{file.name}: 'a.id/part_1_2' holds 1 ids outside its slice .* first 5"):
        audit_files(planned.plan, target, range(2))


def test_an_id_that_is_another_one_is_found(exported):
    planned, target, _ = exported
    offset = id_offset(planned, 0)

    def change(data):
        data[offset + 7] ^= 1  # the same slice, another id

    edit(target, planned.plan.files[0].name, change)
    found = [audit_files(planned.plan, target, range(2)).accounts]
    with pytest.raises(CommitError, match="table 'a': the shards hold 120 rows of 120, but their ids are not those"):
        check_accounts(planned.plan, planned.census, found)


def test_a_changed_header_is_found(exported):
    planned, target, _ = exported
    edit(target, planned.plan.files[0].name, lambda data: data.__setitem__(slice(10, 11), b"x"))
    with pytest.raises(CommitError, match="the header on disk is not the planned one"):
        audit_files(planned.plan, target, range(2))
    audit_files(planned.plan, target, range(1, 2))


@pytest.mark.parametrize("change", [lambda data: data.pop(), lambda data: data.append(0)])
def test_another_size_is_found(exported, change):
    planned, target, _ = exported
    edit(target, planned.plan.files[1].name, change)
    with pytest.raises(CommitError, match=r"bytes on disk, .* planned"):
        audit_files(planned.plan, target, range(2))


def test_rows_that_no_rank_reports_are_missing(exported):
    planned, target, _ = exported
    found = [audit_files(planned.plan, target, range(1)).accounts]
    with pytest.raises(CommitError, match=r"table 'a': the shards hold \d+ rows of 120\. No manifest was written"):
        check_accounts(planned.plan, planned.census, found)
    with pytest.raises(CommitError, match="hold 0 rows of 120"):
        check_accounts(planned.plan, planned.census, [{}])
    with pytest.raises(CommitError, match="hold 240 rows of 120"):
        check_accounts(planned.plan, planned.census, [audit_files(planned.plan, target, range(2)).accounts] * 2)


def test_sums_wrap():
    assert audit._add((1 << 64) - 1, 2) == 1
    assert TableAccount(1, 2) == (1, 2)


def test_a_failed_check_stops_the_commit(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "in", make_tables({"a": 20}, 2))
    original = dist_export.pipeline.shards.audit_files

    def lose(*arguments, **more):
        audited = original(*arguments, **more)
        fewer = {table: TableAccount(rows - 1, id_sum) for table, (rows, id_sum) in audited.accounts.items()}
        return audited._replace(accounts=fewer)

    monkeypatch.setattr(dist_export.pipeline.shards, "audit_files", lose)
    with pytest.raises(CommitError, match="hold 19 rows of 20"):
        export(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out" / "index").exists()
