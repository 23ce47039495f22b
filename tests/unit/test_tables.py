"""Lookups in the sample see the checkpoint's rows, and the model's own rows are there again afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from recis_writer import PartSpec, Raw, split_table, write_checkpoint
from torch import nn

from dist_export.collective import Ranks
from dist_export.dense.rows import RowFinder
from dist_export.dense.sample import run_sparse_arch
from dist_export.errors import ModelError
from dist_export.source import open_checkpoint
from dist_export.storage import Directory, RangeReader

SHIFT = 52
MASK = (1 << SHIFT) - 1


class HashTable(nn.Module):
    """RecIS's surface: rows by id, an unknown id gives zeros; refuses what RecIS's kernel would refuse."""

    def __init__(self, name: str | None, dim: int = 2, children: list[str] | None = None, dtype=torch.float32) -> None:
        super().__init__()
        self._name = name
        self.children_hashtable = children or [name]
        self.rows: dict[int, torch.Tensor] = {}
        self.dim = dim
        self.dtype = dtype
        self.inserted: list[int] = []

    @property
    def coalesce(self) -> bool:
        return len(self.children_hashtable) > 1

    def ids(self, child: str | None = None) -> torch.Tensor:
        return torch.tensor(list(self.rows), dtype=torch.int64)

    def insert(self, ids: torch.Tensor, embeddings: torch.Tensor) -> None:
        if embeddings.shape != (len(ids), self.dim) or embeddings.dtype != self.dtype:
            raise RuntimeError("insert: shape or dtype")
        self.inserted += ids.tolist()
        self.rows |= dict(zip(ids.tolist(), embeddings.clone(), strict=True))

    def forward(self, ids: torch.Tensor, admit_hook: object = None) -> torch.Tensor:
        zeros = torch.zeros(self.dim, dtype=self.dtype)
        found = [self.rows.get(i, zeros) for i in ids.reshape(-1).tolist()]
        return torch.stack(found).reshape(*ids.shape, self.dim) if found else torch.zeros(0, self.dim)


class Named(nn.Module):
    """A table that has a public name only, and is called with a keyword."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.inner = HashTable(name)
        self.ids, self.insert = self.inner.ids, self.inner.insert

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner.forward(ids)


class Sparse(nn.Module):
    def __init__(self, fn, **tables: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        for name, table in tables.items():
            setattr(self, name, table)

    def forward(self, data):
        return {"x": self.fn(self, data)}


def row(i: int, dim: int = 2) -> np.ndarray:
    """What the checkpoint holds for an id."""
    return np.arange(dim) + (i % 1000)


def table_of(ids: list[int], dim: int = 2, dtype="<f4", num_parts: int = 2) -> list[PartSpec]:
    rows = np.stack([row(i, dim) for i in ids]).astype(dtype)
    return split_table(np.array(ids, np.int64), {"embedding": rows, "sparse_adam_exp_avg": rows + 1}, num_parts)


@pytest.fixture
def make_finder(tmp_path):
    def make(misplaced=None, **tables) -> RowFinder:
        write_checkpoint(tmp_path / "ckpt", {name.replace("__", "."): parts for name, parts in tables.items()})
        return RowFinder(open_checkpoint(Ranks(0, 1, None, None, False), Directory(tmp_path / "ckpt")), misplaced)

    return make


def run(sparse: nn.Module, data, finder: RowFinder, name: str = "sparse"):
    inputs, counts = run_sparse_arch(sparse, data, sparse_model_name=name, finder=finder)
    return inputs["x"], counts


def rows(*ids: int, dim: int = 2) -> torch.Tensor:
    return torch.tensor(np.stack([row(i, dim) for i in ids]), dtype=torch.float32)


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
    assert torch.equal(found, torch.cat([rows(5), own[9][None], rows(-1)]))
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


def embed(num_rows: int = 10, **settings) -> nn.Embedding:
    embedding = nn.Embedding(num_rows, 2, **settings)
    nn.init.constant_(embedding.weight, -1)
    return embedding


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel])
def test_an_embedding_is_known_by_its_path(wrap, make_finder) -> None:
    sparse = Sparse(lambda s, ids: s.user(ids), user=wrap(embed()))
    weight = (sparse.user.module if isinstance(sparse.user, nn.DataParallel) else sparse.user).weight
    finder = make_finder(tower__sparse__user=table_of([3, 5, 9], num_parts=1))
    found, counts = run(sparse, torch.tensor([[3, 5], [5, 0]]), finder, name="tower.sparse")
    expected = torch.cat([rows(3, 5, 5), torch.full((1, 2), -1.0)]).reshape(2, 2, 2)
    assert torch.equal(found, expected)
    assert counts.asked == {"tower.sparse.user": 3}
    assert counts.missing == {"tower.sparse.user": 1}
    assert (weight == -1).all()
    assert weight.requires_grad


def test_wrapper_elements_in_the_checkpoints_names_do_not_matter(make_finder) -> None:
    sparse = Sparse(lambda s, ids: s.user(ids), user=embed())
    found, _ = run(sparse, torch.tensor([3]), make_finder(module__sparse__user=table_of([3], num_parts=1)))
    assert torch.equal(found, rows(3))


def test_an_embedding_with_padding_and_one_that_renormalizes(make_finder) -> None:
    sparse = Sparse(
        lambda s, ids: torch.cat([s.pad(ids), s.norm(ids)], -1), pad=embed(padding_idx=0), norm=embed(max_norm=1.0)
    )
    before = sparse.norm.weight.detach().clone()
    finder = make_finder(sparse__pad=table_of([0, 3], num_parts=1), sparse__norm=table_of([3], num_parts=1))
    found, _ = run(sparse, torch.tensor([0, 3, 4]), finder)
    assert torch.equal(found[:2, :2], rows(0, 3))
    torch.testing.assert_close(found[1, 2:].norm(), torch.tensor(1.0))
    assert torch.equal(sparse.norm.weight, before), "rows that the lookup itself changed are put back too"


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_an_embedding_bag_with_offsets_and_in_two_dimensions(mode, make_finder) -> None:
    bag = nn.EmbeddingBag(10, 2, mode=mode)
    before = bag.weight.detach().clone()
    truth = nn.EmbeddingBag.from_pretrained(rows(*range(10)), mode=mode)
    ids, offsets = torch.tensor([1, 2, 3, 4, 4]), torch.tensor([0, 2, 2])
    finder = make_finder(sparse__bag=table_of(list(range(10)), num_parts=1))
    found, counts = run(Sparse(lambda s, d: s.bag(d, offsets), bag=bag), ids, finder)
    assert torch.equal(found, truth(ids, offsets))
    assert counts.asked == {"sparse.bag": 4}
    square = torch.tensor([[1, 2], [0, 9]])
    found, _ = run(Sparse(lambda s, d: s.bag(input=d), bag=bag), square, finder)
    assert torch.equal(found, truth(square))
    assert torch.equal(bag.weight, before)


def test_tied_embeddings_are_put_back_in_the_right_order(make_finder) -> None:
    a, b = embed(), embed()
    b.weight = a.weight
    finder = make_finder(sparse__a=table_of([1, 2], num_parts=1), sparse__b=table_of([2, 3], num_parts=1))
    run(Sparse(lambda s, ids: s.a(ids[:1]) + s.b(ids[1:]) + s.a(ids[1:]), a=a, b=b), torch.tensor([1, 2]), finder)
    assert (a.weight == -1).all()


def test_an_embedding_that_the_checkpoint_lacks_is_noted(make_finder) -> None:
    sparse = Sparse(lambda s, ids: s.other(ids), other=embed())
    found, counts = run(sparse, torch.tensor([3]), make_finder(user=table_of(IDS)))
    assert torch.equal(found, torch.full((1, 2), -1.0))
    assert counts.unknown_tables == ["sparse.other"]


def test_an_embedding_of_another_width_is_refused(make_finder) -> None:
    sparse = Sparse(lambda s, ids: s.user(ids), user=embed())
    with pytest.raises(ModelError, match=r"'sparse.user' has rows of \[4\] in the checkpoint, the model has 2"):
        run(sparse, torch.tensor([3]), make_finder(sparse__user=table_of([3], dim=4, num_parts=1)))


def test_a_sharded_embedding_is_refused(make_finder) -> None:
    sparse = Sparse(lambda s, ids: s.user(ids), user=embed())
    sparse.user.weight = nn.Parameter(torch.zeros(3, 2))  # a rank's share
    with pytest.raises(ModelError, match="sharded by FSDP"):
        run(sparse, torch.tensor([1]), make_finder(sparse__user=table_of([3], num_parts=1)))


def test_an_id_out_of_range_is_the_modules_own_complaint(make_finder) -> None:
    sparse = Sparse(lambda s, ids: s.user(ids), user=embed())
    with pytest.raises(ModelError, match=r"the sparse arch fails.*IndexError"):
        run(sparse, torch.tensor([99]), make_finder(sparse__user=table_of([3], num_parts=1)))


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
    plain_read = RangeReader.read_into
    monkeypatch.setattr(
        RangeReader, "read_into", lambda self, view, offset: read.append(len(view)) or plain_read(self, view, offset)
    )
    found, _ = run(Sparse(lambda s, ids: s.t(ids), t=HashTable("user")), torch.tensor([16]), finder)
    assert torch.equal(found, rows(16))
    assert sum(read) == len(parts[0].ids) * 8 + 8
