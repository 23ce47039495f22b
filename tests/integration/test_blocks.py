"""The mapping that the dense arch gets: its order, its type, its constants, and what is refused in it."""

from __future__ import annotations

import collections
import enum
import types
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from dist_export.dense.blocks import Outline, read_blocks
from dist_export.dense.eager import run_dense_arch
from dist_export.dense.same_blocks import cut_batch, is_shown_constant, refuse_other_orders, refuse_varying
from dist_export.dense.trace import trace_dense
from dist_export.errors import ModelError

NAMES = ["user", "block_10", "block_2", "context", "a"]
"""In no order that sorting gives, by text or by number."""


class Sub(dict):
    def twice(self, name: str) -> torch.Tensor:
        return self[name] * 2


class Needy(dict):
    """A constructor with an argument of its own."""

    def __init__(self, entries: Any, label: str) -> None:
        super().__init__(entries)
        self.label = label


class Sharing(MutableMapping):
    """Copies made by ``copy.copy`` share the entries with what they were copied from."""

    def __init__(self, entries: Any) -> None:
        self._data = dict(entries)

    def __getitem__(self, key):
        return self._data[key]

    def __setitem__(self, key, value) -> None:
        self._data[key] = value

    def __delitem__(self, key) -> None:
        del self._data[key]

    def __iter__(self):
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)


class Frozen(Mapping):
    """No way to set an entry."""

    def __init__(self, entries: Any) -> None:
        self._entries = tuple(entries.items())

    def __getitem__(self, key):
        return dict(self._entries)[key]

    def __iter__(self):
        return iter(name for name, _ in self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Lazy(Frozen):
    """Each look gives another tensor, so what it holds cannot be replaced."""

    def __getitem__(self, key):
        return super().__getitem__(key) * 1


class Sorting(Sub):
    """Gives its entries in another order than they were set in."""

    def __iter__(self):
        return iter(sorted(super().keys()))

    def keys(self):
        return list(self)

    def values(self):
        return [self[name] for name in self]

    def items(self):
        return [(name, self[name]) for name in self]


KEPT = {
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "defaultdict": lambda entries: collections.defaultdict(list, entries),
    "subclass": Sub,
    "subclass with an argument": lambda entries: Needy(entries, "a"),
    "proxy": types.MappingProxyType,
    "proxy of an OrderedDict": lambda entries: types.MappingProxyType(collections.OrderedDict(entries)),
    "UserDict": collections.UserDict,
    "shares its inside": Sharing,
    "frozen": Frozen,
    "sorts itself": Sorting,
}


def entries_of(names=NAMES, num_rows: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(num_rows, 3) for name in names}


@pytest.mark.parametrize("kind", KEPT)
def test_type_and_order_are_kept_and_each_fill_is_fresh(kind: str) -> None:
    mapping = KEPT[kind](entries_of())
    before = list(mapping.items())
    blocks = read_blocks(mapping)
    assert [(key, id(value)) for key, value in mapping.items()] == [(key, id(value)) for key, value in before]
    assert list(blocks.tensors) == list(mapping)
    other = {name: torch.ones(2, 3) * place for place, name in enumerate(NAMES)}
    for _ in range(2):
        filled = blocks.fill(other)
        assert type(filled) is type(mapping)
        assert [(key, id(value)) for key, value in filled.items()] == [(key, id(other[key])) for key in mapping]
        assert [id(value) for value in filled.values()] == [id(other[key]) for key in mapping]
        if isinstance(filled, MutableMapping):
            filled.pop("context")
            filled["user"] = None
    assert blocks.notes == ()
    assert getattr(blocks.fill(other), "label", None) == getattr(mapping, "label", None)


def test_a_mapping_that_the_sparse_arch_uses_again_is_not_ours_to_change() -> None:
    own = collections.OrderedDict(entries_of())
    blocks = read_blocks(own)
    own.clear()
    own["other"] = torch.ones(1)
    assert list(blocks.fill(entries_of())) == NAMES


def test_what_cannot_be_filled_becomes_a_dict_with_a_note() -> None:
    blocks = read_blocks(Lazy(entries_of()))
    filled = blocks.fill(entries_of())
    assert type(filled) is dict
    assert list(filled) == NAMES
    (note,) = blocks.notes
    assert "a Lazy" in note
    assert "gets a dict in the same order" in note


class Seq(NamedTuple):
    values: torch.Tensor
    lengths: torch.Tensor


class Kind(enum.Enum):
    SUM = 1


def test_entries_may_be_nested_and_their_tensors_get_names_of_their_own() -> None:
    a, b, c, d, e = (torch.full((2, 1), float(i)) for i in range(5))
    mapping = {"z": Seq(a, b), "k": {"y": [c, None], "n": 3}, "z_values": d, "z_0": e, "kind": Kind.SUM, "t": (1, "x")}
    blocks = read_blocks(mapping)
    assert list(blocks.tensors) == ["z_0_", "z_1", "k_y_0", "z_values", "z_0"]
    assert blocks.constants == {
        "k['y'][1]": "None",
        "k['n']": "3",
        "kind": "<Kind.SUM: 1>",
        "t[0]": "1",
        "t[1]": "'x'",
    }
    fresh = {name: tensor + 10 for name, tensor in blocks.tensors.items()}
    filled = blocks.fill(fresh)
    assert type(filled["z"]) is Seq
    assert filled["z"].lengths is fresh["z_1"]
    assert filled["k"] == {"y": [fresh["k_y_0"], None], "n": 3}
    assert (filled["kind"], filled["t"]) == (Kind.SUM, (1, "x"))
    assert list(filled) == list(mapping)


@dataclass
class Extra:
    mask: Any


class Attributed(dict):
    pass


@pytest.mark.parametrize("beside", [torch.ones(5), [torch.ones(5)], {"m": (torch.ones(5),)}, Extra(torch.ones(5))])
@pytest.mark.parametrize("is_inner", [False, True])
def test_a_tensor_beside_the_entries_is_refused(beside, is_inner: bool) -> None:
    mapping = Attributed(entries_of())
    mapping.mask = beside
    with pytest.raises(ModelError, match=r"a[n]? (Attributed|dict) with a tensor in its attribute mask"):
        read_blocks({"x": mapping} if is_inner else mapping)


def test_a_number_beside_the_entries_is_a_constant() -> None:
    mapping = Attributed(entries_of())
    mapping.size = 5
    mapping.names = NAMES
    assert read_blocks(mapping).constants == {"its attribute size": "5"}


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (object(), "'x' as object"),
        ([object()], r"'x\[0\]' as object"),
        ({"y": {1}}, r"\"x\['y'\]\" as set"),
        (lambda: 1, "'x' as function"),
        (torch.ones(2).numpy(), "'x' as ndarray"),
        (nn.Linear(1, 1), "'x' as Linear"),
        ((torch.eye(2).to_sparse(),), r"'x\[0\]' as a sparse"),
    ],
)
def test_other_entries_are_refused_by_name(entry, told) -> None:
    with pytest.raises(ModelError, match=told):
        read_blocks({"a": torch.ones(2), "x": entry})


def test_an_entry_that_holds_itself_is_refused() -> None:
    entry: list[Any] = [torch.ones(1)]
    entry.append(entry)
    with pytest.raises(ModelError, match="holds itself"):
        read_blocks({"x": entry})


def outline(num_rows=5, order=("b", "a"), **constants: str) -> Outline:
    return Outline(num_rows, order, constants)


@pytest.mark.parametrize(
    ("outlines", "told"),
    [
        ([outline(5, n="5"), outline(7, n="7")], "'n' as 5 for one batch and as 7"),
        ([outline(5, n="1"), outline(7, n="1.0")], "'n' as 1 for one batch and as 1.0"),
        ([outline(5), outline(7, n="1")], "'n' as nothing for one batch and as 1"),
        ([outline(5, n="1"), outline(5, n="1")], "'n' as 1, which becomes a constant .* all batches .* 5 rows"),
        ([outline(5, n="1")], "it may follow from the size"),
        ([outline(5, ("a",)), outline(5, ("a", "b"))], "'b' for one batch and not for another"),
    ],
)
def test_what_varies_or_may_vary_is_refused_by_name(outlines, told) -> None:
    with pytest.raises(ModelError, match=told):
        refuse_varying(outlines)


def test_what_is_the_same_for_two_sizes_passes() -> None:
    refuse_varying([outline(5, n="1"), outline(5, n="1"), outline(2, n="1")])
    refuse_varying([outline(), outline(order=("a", "b"))])  # the order is another question
    assert not is_shown_constant([outline(5, n="1"), outline(5, n="1")])
    assert is_shown_constant([outline()])


def test_a_batch_is_cut_to_its_first_half() -> None:
    data = {
        "a": torch.arange(6),
        "b": [(torch.arange(12).reshape(6, 2), 6)],
        "c": torch.arange(3),
        "d": torch.tensor(1),
    }
    cut = cut_batch(data, 6)
    assert cut["a"].tolist() == [0, 1, 2]
    assert cut["b"][0][0].shape == (3, 2)
    assert cut["b"][0][1] == 6
    assert cut["c"].shape == (3,)
    assert data["a"].shape == (6,)
    assert cut_batch({"a": torch.ones(1, 2)}, 1)["a"].shape == (2, 2)
    assert cut_batch({"a": torch.ones(4)}, 6) is None


# ---- through the trace -------------------------------------------------------------------------------------------


def pop_last(blocks):
    if isinstance(blocks, MutableMapping):
        return blocks.popitem()[1] * 2 + blocks.pop(next(iter(blocks)))
    return list(blocks.values())[-1] * 2 + next(iter(blocks.values()))


ORDERED = {
    "cat": lambda blocks: torch.cat(list(blocks.values()), dim=1),
    "stack": lambda blocks: torch.stack(tuple(blocks.values()), dim=1),
    "zip": lambda blocks: sum(k * x for k, x in zip((1.0, 2.0, 4.0, 8.0, 16.0), blocks.values(), strict=True)),
    "first": lambda blocks: next(iter(blocks.values())) + 0 * blocks["a"].shape[0],
    "pop": pop_last,
    "items": lambda blocks: sum(x * (k + len(name)) for k, (name, x) in enumerate(blocks.items())),
}


class Net(nn.Module):
    def __init__(self, fn) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, blocks):
        return self.fn(blocks)


@pytest.mark.parametrize("kind", ["dict", "OrderedDict", "proxy", "shares its inside", "frozen", "UserDict"])
@pytest.mark.parametrize("case", ["cat", "pop"])
def test_every_mapping_is_traced_in_its_order(kind: str, case: str) -> None:
    check_order(KEPT[kind], ORDERED[case])


@pytest.mark.parametrize("case", ["stack", "zip", "first", "items"])
def test_every_use_of_the_order_is_traced(case: str) -> None:
    check_order(dict, ORDERED[case])


def check_order(kind, fn) -> None:
    net = Net(fn).eval()
    sample = run_dense_arch(net, read_blocks(kind(entries_of())), export_outputs=None)
    traced = trace_dense(sample, max_batch_size=100, dynamic_dims={})
    assert list(traced.inputs) == sorted(traced.inputs)
    fresh = {name: torch.randn(3, 3) for name in NAMES}
    expected = net(kind(dict(fresh)))
    found = traced.program.module()(**{name: fresh[name].clone() for name in traced.inputs})
    assert torch.equal(found, expected)
    # what is dropped must not matter in that order
    for name in traced.dropped:
        assert torch.equal(net(kind(fresh | {name: torch.zeros(3, 3)})), expected)
    assert set(traced.dropped) | set(traced.inputs) == set(NAMES)


def test_tuples_constants_and_nested_mappings_are_traced() -> None:
    def fn(blocks):
        values, lengths = blocks["seq"]
        mean = values.sum(1) / lengths
        scaled = mean * blocks["scale"] if blocks["mode"] == "mean" and blocks["none"] is None else mean
        return torch.cat([scaled, *blocks["more"].values()], dim=1)

    def make(num_rows: int) -> dict[str, Any]:
        more = collections.OrderedDict(z=torch.randn(num_rows, 1), b=torch.randn(num_rows, 2))
        seq = (torch.randn(num_rows, 4, 2), torch.full((num_rows, 1), 4.0))
        return {"seq": seq, "mode": "mean", "scale": 0.5, "none": None, "more": more}

    net = Net(fn).eval()
    sample = run_dense_arch(net, read_blocks(make(5)), export_outputs=None)
    traced = trace_dense(sample, max_batch_size=100, dynamic_dims={})
    assert list(traced.inputs) == ["more_b", "more_z", "seq_0", "seq_1"]
    fresh = make(7)
    found = traced.program.module()(
        more_b=fresh["more"]["b"], more_z=fresh["more"]["z"], seq_0=fresh["seq"][0], seq_1=fresh["seq"][1]
    )
    assert torch.equal(found, net(fresh))


@pytest.mark.parametrize("kind", KEPT)
def test_another_order_matters_only_where_the_outputs_depend_on_it(kind: str) -> None:
    blocks = read_blocks(KEPT[kind](entries_of()))
    orders = [[Outline(5, tuple(blocks.tensors), {})], [Outline(3, tuple(reversed(blocks.tensors)), {})]]
    by_name = Net(lambda b: torch.cat([b["user"], b["a"]], dim=1)).eval()
    refuse_other_orders(run_dense_arch(by_name, blocks, export_outputs=None), orders, atol=0, rtol=0)
    ordered = run_dense_arch(Net(ORDERED["cat"]).eval(), blocks, export_outputs=None)
    refuse_other_orders(ordered, orders[:1], atol=0, rtol=0)
    if kind == "sorts itself":
        return  # it has one order only
    with pytest.raises(ModelError, match="for batch 0 of rank 1 in the order a, context, block_2, block_10, user"):
        refuse_other_orders(ordered, orders, atol=0, rtol=0)
