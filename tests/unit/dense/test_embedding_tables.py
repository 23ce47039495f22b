"""nn.Embedding and nn.EmbeddingBag as tables: known by their path, fed by row, put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_export.errors import ModelError
from tests.support.table_cases import Sparse, open_finder, rows, run, table_of

IDS = [5, -1, 70000]


@pytest.fixture
def make_finder(tmp_path):
    return lambda misplaced=None, **tables: open_finder(
        tmp_path / "ckpt", {name.replace("__", "."): parts for name, parts in tables.items()}, misplaced
    )


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
    expected = torch.cat([rows(3, 5, 5), torch.zeros(1, 2)]).reshape(
        2, 2, 2
    )  # 0 is not there: zeros, as a lookup gives
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
    found, counts = run(sparse, torch.tensor([0, 3, 4]), finder)
    assert counts.changed == {"sparse.norm": "max_norm=1"}
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


def test_a_shared_weight_that_the_checkpoint_has_under_one_name_is_not_lacking(make_finder) -> None:
    a, b = embed(), embed()
    b.weight = a.weight
    found, counts = run(
        Sparse(lambda s, ids: s.b(ids), a=a, b=b),
        torch.tensor([1, 2]),
        make_finder(sparse__a=table_of([1, 2], num_parts=1)),
    )
    assert torch.equal(found, rows(1, 2))
    assert counts.unknown_tables == []
    assert counts.embeddings == ["sparse.a", "sparse.b"]


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


def as_held_by_torchrec(weight: torch.Tensor) -> nn.Module:
    """What torchrec's sharded collections register of a table: a module of torch's own, with this rank's shard as its weight."""
    holder = nn.Module()
    holder.weight = nn.Parameter(weight)
    return holder


@pytest.mark.parametrize("shape", [(5, 2), (10, 1), (5, 1)], ids=["rows", "columns", "both"])
def test_a_shard_of_a_table_in_a_module_of_torch_takes_no_rows_and_is_named(shape, make_finder) -> None:
    shard = torch.full(shape, -1.0)
    sparse = Sparse(lambda s, ids: s.user.weight[ids], user=as_held_by_torchrec(shard))
    finder = make_finder(sparse__user=table_of(list(range(10)), num_parts=1))
    finder.rows_by_number = lambda _: 10
    found, counts = run(sparse, torch.tensor([1, 3]), finder)
    assert torch.equal(found, torch.full((2, shape[1]), -1.0))
    assert "holds a part of it" in counts.unseen["sparse.user"]


def test_a_view_of_a_registered_weight_in_a_list_is_not_called_unregistered(make_finder) -> None:
    """A block of unknown origin makes every parameter of its width count that is in no state, but not a view of one that is."""
    sparse = Sparse(lambda s, ids: s.user(ids) + s.kept[0], user=embed())
    sparse.kept = [torch.zeros(2)]  # as what other ranks send: made by no operator that is seen
    sparse.lookups = [nn.Parameter(sparse.user.weight.detach()[2:])]
    _, counts = run(sparse, torch.tensor([3]), make_finder(sparse__user=table_of([3], num_parts=1)))
    assert counts.outside
    assert not counts.unregistered
    sparse.lookups.append(nn.Parameter(torch.zeros(3, 2)))
    _, counts = run(sparse, torch.tensor([3]), make_finder(sparse__user=table_of([3], num_parts=1)))
    assert list(counts.unregistered) == ["sparse.lookups[1]"]
