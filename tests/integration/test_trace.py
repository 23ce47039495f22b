"""The trace: inputs by keyword, a free batch, unused inputs dropped, refusals with their line, all put back."""

from __future__ import annotations

import contextlib
import logging
import os

import pytest
import torch
from torch import nn

from dist_export.dense.eager import exporting
from dist_export.dense.sample import check_input_names
from dist_export.dense.trace import check_dynamic_dims, output_shapes
from dist_export.dense.used_inputs import as_loaded, input_names
from dist_export.errors import ConfigError, ModelError, TraceError
from tests.support.dense_nets import Net, operators, some_inputs, trace

# ---- inputs ------------------------------------------------------------------------------------------------------


def test_inputs_are_keywords_by_their_sorted_names_and_the_batch_is_free() -> None:
    inputs = some_inputs(a=(3,), self_x=(3,), input=(3,), weight=(3,), kwargs=(3,), User_Emb=(3,))
    inputs = dict(sorted(inputs.items()))
    check_input_names(inputs)
    traced = trace(lambda s, i: sum(s.linear(x) * k for k, x in enumerate(i.values())), inputs, max_batch_size=1000)
    assert input_names(traced.program) == list(traced.inputs) == list(inputs)
    assert traced.dropped == ()
    (bounds,) = traced.program.range_constraints.values()
    assert bounds.upper == 1000
    run = traced.program.module()
    for num_rows in (1, 2, 7, 1000):
        assert run(**{name: x[:1].repeat(num_rows, 1) for name, x in inputs.items()}).shape == (num_rows, 2)
    with pytest.raises((AssertionError, RuntimeError)):
        run(**{name: x[:1].repeat(1001, 1) for name, x in inputs.items()})


def test_integers_and_more_dimensions_mix() -> None:
    inputs = {
        "ids": torch.randint(0, 9, (5, 4)),
        "mask": torch.ones(5, 4, dtype=torch.bool),
        "seq": torch.randn(5, 4, 3),
    }
    traced = trace(lambda s, i: (i["seq"] * (i["ids"] * i["mask"]).unsqueeze(-1)).sum(1), inputs)
    assert list(traced.inputs) == ["ids", "mask", "seq"]


SHAPE_ONLY = {
    "shape": lambda s, i: i["b"] * i["a"].shape[0],
    "size": lambda s, i: i["b"] + torch.ones(i["a"].size(0), 3),
    "numel": lambda s, i: i["b"] * i["a"].numel(),
    "zeros_like": lambda s, i: i["b"] + torch.zeros_like(i["a"]),
    "ones_like": lambda s, i: i["b"] + torch.ones_like(i["a"], dtype=torch.float64),
    "full_like": lambda s, i: i["b"] + torch.full_like(i["a"], 3.0),
    "new_zeros": lambda s, i: i["b"] + i["a"].new_zeros(i["a"].shape[0], 3),
    "new_tensor": lambda s, i: i["b"] + i["a"].new_full((3,), 2.0),
    "expand_as": lambda s, i: i["b"].sum(1, keepdim=True).expand_as(i["a"]),
    "view_as": lambda s, i: i["b"].view_as(i["a"]),
    "reshape": lambda s, i: i["b"].reshape(i["a"].shape),
    "expand": lambda s, i: i["b"][:, :1].expand(i["a"].shape),
    "type_as": lambda s, i: i["b"].type_as(i["a"]),
    "of what follows from it": lambda s, i: i["b"] + torch.zeros_like(s.linear(i["a"]).sum(1, keepdim=True)),
    "arange": lambda s, i: i["b"] + torch.arange(i["a"].shape[0])[:, None],
    "indexed": lambda s, i: (i["a"], i["b"] * 2)[1],
    "sum": lambda s, i: i["b"] + (i["a"] * 2).sum(1).new_zeros(3),
}


@pytest.mark.parametrize("case", SHAPE_ONLY)
def test_an_input_of_which_only_the_shape_is_used_is_dropped(case: str) -> None:
    inputs = some_inputs()
    net = Net(SHAPE_ONLY[case]).eval()
    traced = trace(net, inputs)
    assert traced.dropped == ("a",)
    assert list(traced.inputs) == input_names(traced.program) == ["b"]
    for num_rows in (1, 3, 8):
        some = {name: x[:1].repeat(num_rows, 1) for name, x in inputs.items()}
        torch.testing.assert_close(traced.program.module()(b=some["b"]), net(some))


def write_in_place(s, i):
    out = torch.zeros_like(i["b"])
    out[:, 0] = i["a"][:, 0]
    return out + i["b"]


def write_through_views(s, i):
    out = i["b"].clone()
    out.view(-1).unflatten(0, (-1, 3)).split(1, dim=1)[1].copy_(i["a"][:, :1])
    return out


def change_the_input(s, i):
    i["b"].add_(i["a"])
    return i["b"] * 2


def write_in_a_region(s, i):
    out = i["b"].clone()
    with torch.no_grad():
        out[:, 0] = i["a"][:, 0]
    with torch.enable_grad():
        return out * 2


VALUES = {
    "in place": write_in_place,
    "through views": write_through_views,
    "into the other input": change_the_input,
    "in a region": write_in_a_region,
    "item": lambda s, i: i["b"] * i["a"].sum().item(),
    "size by value": lambda s, i: i["b"].sum() + torch.ones(i["a"].argmax().item()),
    "mask": lambda s, i: i["b"].masked_fill(i["a"] > 0, 0),
    "index": lambda s, i: i["b"].gather(1, i["a"].argsort(1)),
    "cond": lambda s, i: torch.cond(i["a"].sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (i["b"],)),
    "fill": lambda s, i: torch.full_like(i["b"], i["a"].max().item()) + i["b"],
    "expand_as": lambda s, i: i["a"].sum(1, keepdim=True).expand_as(i["b"]) + i["b"],
    "split": lambda s, i: i["a"].split(1, dim=1)[2] + i["b"],
}


@pytest.mark.parametrize("case", VALUES)
def test_an_input_whose_values_reach_an_output_is_kept(case: str) -> None:
    assert trace(VALUES[case]).dropped == ()


def test_an_input_that_is_an_output_is_kept() -> None:
    traced = trace(lambda s, i: (i["a"], i["a"]))
    assert traced.dropped == ("b",)
    found = traced.program.module()(a=torch.ones(3, 3))
    assert isinstance(found, tuple)
    assert [x.shape for x in found] == [(3, 3), (3, 3)]


def test_an_integer_input_that_is_indexed_and_dropped_keeps_its_dtype() -> None:
    table = nn.Embedding(3, 3)
    inputs = {"a": torch.randn(5, 3), "ids": torch.randint(0, 3, (5, 2))}
    traced = trace(lambda s, i: (table(i["ids"]), s.linear(i["a"]))[1], inputs)
    assert traced.dropped == ("ids",)


@pytest.mark.parametrize("fn", [lambda s, i: torch.ones(5, 2), lambda s, i: torch.zeros_like(i["a"]) + i["b"].shape[0]])
def test_outputs_that_no_input_reaches_are_refused(fn) -> None:
    with pytest.raises(TraceError, match="no input of the dense arch has a data path"):
        trace(fn)


# ---- further free dimensions -------------------------------------------------------------------------------------


def pool(s, i):
    return (i["x"] + i["y"]).sum(1)


def test_a_shared_label_is_one_free_size() -> None:
    inputs = some_inputs(x=(4, 3), y=(4, 3))
    dims = {"x": {1: "length"}, "y": {1: "length"}}
    traced = trace(lambda s, i: (pool(s, i), i["x"] * 2, torch.cat([i["x"], i["y"]], 1)), inputs, dims=dims)
    found = traced.program.module()(x=torch.ones(7, 9, 3), y=torch.ones(7, 9, 3))
    assert [tuple(x.shape) for x in found] == [(7, 3), (7, 9, 3), (7, 18, 3)]
    assert output_shapes(traced, dims) == [("batch", 3), ("batch", "length", 3), ("batch", "2*length", 3)]


def test_two_labels_are_two_sizes() -> None:
    inputs = some_inputs(x=(4, 3), y=(5, 3))
    traced = trace(lambda s, i: i["x"].sum(1) + i["y"].sum(1), inputs, dims={"x": {1: "m"}, "y": {1: "n"}})
    assert traced.program.module()(x=torch.ones(7, 9, 3), y=torch.ones(7, 2, 3)).shape == (7, 3)


def test_a_size_that_equals_the_batch_by_coincidence_is_no_batch() -> None:
    inputs = some_inputs(5, x=(5,), y=(5,))
    traced = trace(lambda s, i: i["x"] @ torch.ones(5, 2) + i["y"][:, :2], inputs)
    assert traced.program.module()(x=torch.ones(9, 5), y=torch.ones(9, 5)).shape == (9, 2)
    dims = {"x": {1: "length"}, "y": {1: "length"}}
    traced = trace(lambda s, i: (i["x"] * i["y"]).sum(1), inputs, dims=dims)
    assert traced.program.module()(x=torch.ones(9, 3), y=torch.ones(9, 3)).shape == (9,)


def test_labels_that_should_be_one_are_told() -> None:
    with pytest.raises(TraceError, match=r"Constraints violated.*must always be equal"):
        trace(pool, some_inputs(x=(4, 3), y=(4, 3)), dims={"x": {1: "m"}, "y": {1: "n"}})


def test_a_dropped_input_takes_its_free_size_from_another() -> None:
    dims = {"x": {1: "length"}, "y": {1: "length"}}
    traced = trace(lambda s, i: i["x"] + torch.zeros_like(i["y"]), some_inputs(x=(4, 3), y=(4, 3)), dims=dims)
    assert traced.dropped == ("y",)
    assert traced.program.module()(x=torch.ones(7, 9, 3)).shape == (7, 9, 3)


def test_an_input_that_alone_tells_a_free_size_is_kept_if_that_is_used() -> None:
    inputs = some_inputs(x=(3,), y=(4, 3))
    traced = trace(lambda s, i: i["x"] * i["y"].shape[1], inputs, dims={"y": {1: "length"}})
    assert traced.dropped == ()
    assert torch.equal(traced.program.module()(x=torch.ones(2, 3), y=torch.ones(2, 9, 3)), torch.full((2, 3), 9.0))
    assert trace(lambda s, i: i["x"] * 2, inputs, dims={"y": {1: "length"}}).dropped == ("y",)


@pytest.mark.parametrize(
    ("dims", "told"),
    [
        ({"z": {1: "n"}}, "'z' is no input of the dense arch; its inputs: x, y"),
        ({"x": {3: "n"}}, r"dynamic_dims.x: no dimension 3 in a tensor of \[5, 4, 3\]"),
        ({"y": {2: "n"}}, "dynamic_dims.y.2: the sample has size 1 there"),
        ({"x": {1: "n", 2: "n"}}, "'n' is 4 in x but 3 in x"),
    ],
)
def test_dimensions_that_the_sample_does_not_have_are_refused(dims, told) -> None:
    with pytest.raises(ConfigError, match=told):
        check_dynamic_dims(some_inputs(x=(4, 3), y=(4, 1)), dims)


# ---- what is refused, and where ----------------------------------------------------------------------------------


def branch_on_a_value(s, i):
    if i["a"].sum() > 0:  # blamed: value
        return i["a"] + i["b"]
    return i["b"]


def branch_on_the_batch(s, i):
    if i["a"].shape[0] > 3:  # blamed: batch
        return i["a"] + i["b"]
    return i["b"]


def write_the_size_down(s, i):
    wide = i["a"].view(5, -1)  # blamed: view
    return wide + i["b"]


def make_a_list(s, i):
    first = i["a"].tolist()[0]  # blamed: tolist
    return i["b"] * first[0]


REFUSED = {
    "value": branch_on_a_value,
    "batch": branch_on_the_batch,
    "view": write_the_size_down,
    "tolist": make_a_list,
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_line_and_what_to_do(case: str) -> None:
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = logger.handlers, logger.level, logger.propagate
    with pytest.raises(TraceError) as caught:
        trace(REFUSED[case])
    with open(__file__) as file:
        line = next(number for number, text in enumerate(file, 1) if text.rstrip().endswith(f"# blamed: {case}"))
    assert f"{os.path.basename(__file__)}:{line} " in str(caught.value)
    assert "What usually helps" in str(caught.value)
    assert caught.value.__cause__ is not None
    assert (logger.handlers, logger.level, logger.propagate) == before


class Counting(nn.Module):
    def __init__(self, register=True) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, inputs):
        self.count.add_(1)
        return inputs["a"] + inputs["b"] + self.count


class Replacing(Counting):
    def forward(self, inputs):
        self.count = self.count * 0.5 + 1
        return inputs["a"] + inputs["b"] + self.count


@pytest.mark.parametrize("kind", [Counting, Replacing])
def test_state_that_every_run_changes_is_refused(kind) -> None:
    with pytest.raises(ModelError, match="changes count whenever it runs, in eval mode too"):
        trace(kind())


class Caching(nn.Module):
    """Sets something up in its first run, and writes the same into a buffer in each."""

    def __init__(self) -> None:
        super().__init__()
        self.lazy = nn.LazyLinear(2)
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("nothing", torch.full((2,), float("nan")))
        self.cache = None

    def forward(self, inputs):
        if self.cache is None:
            self.cache = torch.arange(3.0)
        self.mean = torch.full((1,), 4.0)
        return self.lazy(inputs["a"] + inputs["b"] + self.cache) + self.mean


class Filling(Counting):
    """Writes into its buffer what is there already."""

    def forward(self, inputs):
        self.count.fill_(0)
        return inputs["a"] + inputs["b"] + self.count


def test_what_the_first_run_sets_up_is_fine() -> None:
    assert trace(Caching()).dropped == ()


def test_a_program_is_loaded_anew_for_a_second_comparison_only_if_its_runs_change_it() -> None:
    anew = trace(lambda _, inputs: inputs["a"] + 1).program
    kept = trace(lambda _, inputs: inputs["a"] + 2).program
    assert as_loaded(kept, lambda: anew) is kept
    assert as_loaded(trace(Filling()).program, lambda: anew) is anew


def test_constants_become_part_of_the_program() -> None:
    scale = torch.tensor([1.0, 2.0, 3.0])
    other = nn.Linear(3, 2)
    traced = trace(lambda s, i: other(i["a"] * scale + i["b"] + torch.tensor([5.0])))
    inputs = some_inputs()
    expected = other(inputs["a"] * scale + inputs["b"] + 5)
    torch.testing.assert_close(traced.program.module()(**inputs), expected)


def test_what_torch_compile_made_is_traced_as_written() -> None:
    double = torch.compile(lambda x: x * 2, backend="eager")
    traced = trace(lambda s, i: double(i["a"]) + i["b"])
    assert operators(traced) == ["aten.mul.Tensor", "aten.add.Tensor"]


# ---- what holds during the trace ---------------------------------------------------------------------------------


class Marked(nn.Module):
    exported = False

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.inner.exported = None
        self.seen: list[tuple[object, object]] = []

    def forward(self, inputs):
        self.seen.append((self.exported, self.inner.exported))
        return self.inner(inputs["a"] + inputs["b"])


class ReadOnly(Marked):
    exported = property(lambda self: "mine")


class Calls(Marked):
    def exported(self) -> str:
        return "mine"


def test_exported_is_true_during_the_trace_and_put_back() -> None:
    net = Marked()
    trace(net)
    assert set(net.seen) == {(True, True)}
    assert net.exported is False
    assert "exported" not in net.__dict__
    assert net.inner.exported is None


@pytest.mark.parametrize("kind", [ReadOnly, Calls])
def test_an_attribute_of_that_name_that_is_something_else_stays(kind) -> None:
    net = kind()
    trace(net)
    assert all(inner is True and outer is not True for outer, inner in net.seen)


def test_all_is_put_back_after_a_failure() -> None:
    net = Marked()
    torch.backends.mha.set_fastpath_enabled(True)
    with contextlib.suppress(ValueError), exporting(net):
        assert not torch.backends.mha.get_fastpath_enabled()
        raise ValueError
    assert net.exported is False
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("is_fast", [True, False])
def test_the_fused_transformer_kernel_stays_out_of_the_graph(is_fast: bool) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, inputs):
            return self.encoder(inputs["seq"]).mean(1)

    torch.backends.mha.set_fastpath_enabled(is_fast)
    try:
        traced = trace(Attending(), some_inputs(seq=(3, 4)))
        assert torch.backends.mha.get_fastpath_enabled() is is_fast
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert operators(traced)
    assert not any("_transformer_encoder" in name or "_native_multi_head" in name for name in operators(traced))
