"""Lookups in the sample see the checkpoint's rows, and the model's own rows are there again afterwards."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import nn

from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.source_rows import SourceRows
from dist_export.errors import ModelError
from dist_export.pipeline.planning import open_checkpoint
from dist_export.runtime.joining import join
from dist_export.storage.range_reader import RangeReader
from dist_export.storage.urls import open_directory
from tests.support.recis_writer import PartSpec, Raw
from tests.support.table_cases import HashTable, Sparse, open_finder, rows, run, table_of

SHIFT = 52
MASK = (1 << SHIFT) - 1


@pytest.fixture
def make_finder(tmp_path):
    return lambda misplaced=None, **tables: open_finder(
        tmp_path / "ckpt", {name.replace("__", "."): parts for name, parts in tables.items()}, misplaced
    )


class Named(nn.Module):
    """A table that has a public name only, and is called with a keyword."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.inner = HashTable(name)
        self.ids, self.insert = self.inner.ids, self.inner.insert

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner.forward(ids)


IDS = [5, -1, 70000, 1 << 60, -(1 << 62), 65535, 3]


@pytest.mark.parametrize("table", [HashTable("user"), Named("user")], ids=["_name", "name"])
def test_a_lookup_sees_the_rows_of_the_checkpoint(table, make_finder) -> None:
    asked = torch.tensor([[70000, -1, 5], [5, 1 << 60, -(1 << 62)]])
    sparse = Sparse(lambda s, ids: s.t(ids=ids), t=table)
    found, counts = run(sparse, asked, make_finder(user=table_of(IDS)))
    assert torch.equal(found, rows(*asked.flatten().tolist()).reshape(2, 3, 2))
    assert counts.asked == {"user": 5}
    assert counts.missing == {"user": 0}
    assert counts.unknown_tables == []
    assert not table._forward_pre_hooks


def test_ids_that_the_checkpoint_lacks_are_counted(make_finder) -> None:
    table = HashTable("user")
    found, counts = run(
        Sparse(lambda s, ids: s.t(ids), t=table), torch.tensor([5, 9, 9, 11]), make_finder(user=table_of(IDS))
    )
    assert torch.equal(found, torch.cat([rows(5), torch.zeros(3, 2)]))
    assert counts.asked["user"] == 3
    assert counts.missing["user"] == 2


def test_rows_that_were_overwritten_are_put_back(make_finder) -> None:
    table = HashTable("user")
    own = {5: torch.tensor([-5.0, -5.0]), 9: torch.tensor([-9.0, -9.0]), 3: torch.tensor([-3.0, -3.0])}
    table.rows = dict(own)
    found, _ = run(Sparse(lambda s, ids: s.t(ids), t=table), torch.tensor([5, 9, -1]), make_finder(user=table_of(IDS)))
    assert torch.equal(found, torch.cat([rows(5), torch.zeros(1, 2), rows(-1)]))  # 9 has no row: serving gives zeros
    for i, value in own.items():
        assert torch.equal(table.rows[i], value), i
    assert table.inserted[-1:] == [5], "what the checkpoint does not overwrite is not written back"


def test_rows_are_put_back_when_the_forward_fails(make_finder) -> None:
    table = HashTable("user")
    table.rows = {5: torch.tensor([-5.0, -5.0])}

    def fail(sparse, ids):
        assert torch.equal(sparse.t(ids), rows(5))
        raise ValueError("boom")

    with pytest.raises(ModelError, match="ValueError: boom"):
        run(Sparse(fail, t=table), torch.tensor([5]), make_finder(user=table_of(IDS)))
    assert torch.equal(table.rows[5], torch.tensor([-5.0, -5.0]))
    assert not table._forward_pre_hooks


def test_two_lookups_of_overlapping_ids(make_finder) -> None:
    table = HashTable("user")
    own = torch.tensor([-5.0, -5.0])
    table.rows = {5: own}
    sparse = Sparse(lambda s, ids: torch.cat([s.t(ids[:2]), s.t(ids[1:])]), t=table)
    found, counts = run(sparse, torch.tensor([5, 3, -1]), make_finder(user=table_of(IDS)))
    assert torch.equal(found, rows(5, 3, 3, -1))
    assert counts.asked["user"] == 3
    assert torch.equal(table.rows[5], own)
    assert sorted(table.inserted) == [-1, 3, 5, 5], "each row once, and one put back"


def test_no_ids_at_all(make_finder) -> None:
    sparse = Sparse(lambda s, ids: s.t(ids), t=HashTable("user"))
    found, counts = run(sparse, torch.zeros(0, dtype=torch.int64), make_finder(user=table_of(IDS)))
    assert found.shape == (0, 2)
    assert sum(counts.asked.values()) == 0


def test_one_table_at_two_places_is_fed_once(make_finder) -> None:
    table = HashTable("user")
    table.rows = {5: torch.tensor([-5.0, -5.0])}
    sparse = Sparse(lambda s, ids: s.b(ids) + s.c(ids), t=table, b=table, c=torch.compile(table, backend="eager"))
    found, counts = run(sparse, torch.tensor([5]), make_finder(user=table_of(IDS)))
    assert torch.equal(found, rows(5) * 2)
    assert counts.asked["user"] == 1
    assert torch.equal(table.rows[5], torch.tensor([-5.0, -5.0]))


def encode(child: int, i: int) -> int:
    value = (child << SHIFT) | (i & MASK)
    return value - (1 << 64) if value >= 1 << 63 else value


def test_a_coalesced_table_finds_the_rows_of_its_children(make_finder) -> None:
    table = HashTable("group", children=["a", "b"])
    own = {encode(1, 7): torch.tensor([-7.0, -7.0])}
    table.rows = dict(own)
    asked = torch.tensor([encode(0, 7), encode(1, 7), encode(1, 8), encode(0, -3), encode(1, 99)])
    finder = make_finder(a=table_of([7, (-3) & MASK]), b=table_of([8, 7], num_parts=1))
    found, counts = run(Sparse(lambda s, ids: s.t(ids), t=table), asked, finder)
    assert torch.equal(found, torch.cat([rows(7, 7, 8, (-3) & MASK), torch.zeros(1, 2)]))
    assert counts.asked == {"a": 2, "b": 3}
    assert counts.missing == {"a": 0, "b": 1}
    assert torch.equal(table.rows[encode(1, 7)], own[encode(1, 7)])


def test_a_child_past_2047_has_negative_ids(make_finder) -> None:
    children = [f"c{i}" for i in range(2050)]
    table = HashTable("group", children=children)
    finder = make_finder(**{name: table_of([7, 8], num_parts=1) for name in ("c2048", "c2049", "c0")})
    finder.has_table = lambda _: True  # the other 2047 need not be there
    assert encode(2049, 7) < 0
    asked = torch.tensor([encode(2049, 7), encode(2048, 8), encode(0, 8)])
    found, counts = run(Sparse(lambda s, ids: s.t(ids), t=table), asked, finder)
    assert torch.equal(found, rows(7, 8, 8))
    assert counts.asked == {"c0": 1, "c2048": 1, "c2049": 1}
    assert sum(counts.missing.values()) == 0


def test_a_child_that_is_not_there_is_told(make_finder) -> None:
    table = HashTable("group", children=["a", "b"])
    finder = make_finder(a=table_of([7]), b=table_of([7]))
    with pytest.raises(ModelError, match=r"asked for child 2, but has 2"):
        run(Sparse(lambda s, ids: s.t(ids), t=table), torch.tensor([encode(2, 7)]), finder)


def test_a_table_with_one_child_is_plain(make_finder) -> None:
    big = (9 << SHIFT) | 3
    found, _ = run(
        Sparse(lambda s, ids: s.t(ids), t=HashTable("user")), torch.tensor([big]), make_finder(user=table_of([big]))
    )
    assert torch.equal(found, rows(big))


@pytest.mark.parametrize(("numpy", "dtype"), [("<f2", torch.float16), ("<f8", torch.float64)])
def test_rows_keep_their_dtype(numpy, dtype, make_finder) -> None:
    table = HashTable("user", dtype=dtype)
    found, _ = run(
        Sparse(lambda s, ids: s.t(ids), t=table), torch.tensor([3, 5]), make_finder(user=table_of(IDS, dtype=numpy))
    )
    assert found.dtype == dtype
    assert torch.equal(found, rows(3, 5).to(dtype))


def test_bf16_rows(make_finder) -> None:
    bits = rows(3, 5).bfloat16().view(torch.int16).numpy().view("<u2")
    parts = [PartSpec(np.array([3, 5]), {"embedding": Raw("BF16", bits)}, (0, 65536, 65536))]
    table = HashTable("user", dtype=torch.bfloat16)
    found, _ = run(Sparse(lambda s, ids: s.t(ids), t=table), torch.tensor([5, 3]), make_finder(user=parts))
    assert torch.equal(found, rows(5, 3).bfloat16())


def test_a_table_that_the_checkpoint_lacks_is_refused(make_finder) -> None:
    with pytest.raises(ModelError, match=r"table 'item' \(sparse.t\) is not in the checkpoint, which has user"):
        run(Sparse(lambda s, ids: s.t(ids), t=HashTable("item")), torch.tensor([5]), make_finder(user=table_of(IDS)))


def test_a_table_without_a_name_is_refused(make_finder) -> None:
    with pytest.raises(ModelError, match=r"sparse\.t has neither a name nor a _name"):
        run(Sparse(lambda s, ids: s.t(ids), t=HashTable(None)), torch.tensor([5]), make_finder(user=table_of(IDS)))


@pytest.mark.parametrize("own", [{}, {5: torch.ones(3)}], ids=["empty", "with rows"])
def test_rows_of_another_width_are_refused(own, make_finder) -> None:
    table = HashTable("user", dim=3)
    table.rows = own
    with pytest.raises(ModelError, match=r"table 'user'.*\[2\]"):
        run(Sparse(lambda s, ids: s.t(ids), t=table), torch.tensor([5]), make_finder(user=table_of(IDS)))


def test_rows_that_the_table_does_not_take_are_told(make_finder) -> None:
    table = HashTable("user", dtype=torch.float16)
    with pytest.raises(
        ModelError, match=r"sparse.t does not take the checkpoint's rows, torch.float32 \[2\]: RuntimeError"
    ):
        run(Sparse(lambda s, ids: s.t(ids), t=table), torch.tensor([5]), make_finder(user=table_of(IDS)))


def test_a_lookup_without_a_tensor_is_refused(make_finder) -> None:
    with pytest.raises(ModelError, match="HashTable was called with list"):
        run(
            Sparse(lambda s, ids: s.t(ids.tolist()), t=HashTable("user")),
            torch.tensor([5]),
            make_finder(user=table_of(IDS)),
        )


def test_misplaced_rows_are_found_too(make_finder, tmp_path) -> None:
    parts = table_of(list(range(65530, 65540)))
    parts[0].ids, parts[1].ids = parts[1].ids, parts[0].ids
    parts[0].slots, parts[1].slots = parts[1].slots, parts[0].slots
    sparse = Sparse(lambda s, ids: s.t(ids), t=HashTable("user"))
    found, _ = run(sparse, torch.tensor([65531, 65538]), make_finder(user=parts))
    assert torch.equal(found, rows(65531, 65538))


def test_reads_are_the_id_columns_and_the_rows(make_finder, monkeypatch) -> None:
    num_rows, dim = 5000, 64
    parts = table_of(list(range(num_rows)), dim=dim)
    finder = make_finder(user=parts, other=table_of(list(range(num_rows)), dim=dim))
    read = []
    plain_read = RangeReader.read_into

    def counting(self, view, offset):
        read.append(len(view))
        return plain_read(self, view, offset)

    monkeypatch.setattr(RangeReader, "read_into", counting)
    table = HashTable("user", dim=dim)
    run(Sparse(lambda s, ids: s.t(ids), t=table), torch.tensor([1, 77, 4999]), finder)
    id_bytes = sum(len(part.ids) for part in parts) * 8
    assert sum(read) <= id_bytes + 3 * dim * 4
    assert len(table.rows) == 3


def test_parts_whose_slice_cannot_hold_the_ids_are_not_read(make_finder, monkeypatch) -> None:
    parts = table_of(list(range(0, 65536, 16)), num_parts=4)
    finder = make_finder(user=parts, misplaced=np.zeros(4, np.int64))
    read = []
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, views, offset: read.append(sum(map(len, views))) or preadv(fd, views, offset)
    )
    found, _ = run(Sparse(lambda s, ids: s.t(ids), t=HashTable("user")), torch.tensor([16]), finder)
    assert torch.equal(found, rows(16))
    assert sum(read) == len(parts[0].ids) * 8 + 8


@pytest.mark.fixtures
def test_rows_of_a_checkpoint_that_recis_wrote(recis_fixtures) -> None:
    truth = np.load(recis_fixtures / "small2.truth.npz")
    finder = RowFinder(
        SourceRows(
            checkpoint=open_checkpoint(join(timeout_secs=1), open_directory(recis_fixtures / "fullckpt" / "ckpt_3"))
        )
    )
    user, item = (torch.from_numpy(truth[f"{name}@id"][::3].copy()) for name in ("user_emb", "item_emb"))
    shop, brand = (torch.from_numpy(truth[f"{name}@id"][::5].copy()) for name in ("shop_emb", "brand_emb"))
    sparse = Sparse(
        lambda s, _: {
            "user": s.user(user),
            "item": s.item(item),
            "shops": s.group(torch.cat([shop, brand | (1 << SHIFT)])),
        }[s.asked],
        user=HashTable("user_emb", dim=4),
        item=HashTable("item_emb", dim=8),
        group=HashTable("group", dim=8, children=["shop_emb", "brand_emb"]),
    )
    expected = {
        "user": truth["user_emb@embedding"][::3],
        "item": truth["item_emb@embedding"][::3],
        "shops": np.concatenate([truth["shop_emb@embedding"][::5], truth["brand_emb@embedding"][::5]]),
    }
    for name, rows_of_truth in expected.items():
        sparse.asked = name
        found, counts = run(sparse, {}, finder)
        assert sum(counts.missing.values()) == 0
        assert torch.equal(found, torch.from_numpy(rows_of_truth)), name
