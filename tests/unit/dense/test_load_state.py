"""Loading model.pt into the dense arch: nothing is missed, nothing is guessed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_export.dense.load_state import load_dense_parameters
from dist_export.dense.own_parameters import values_within
from dist_export.dense.own_values import list_own_values
from dist_export.errors import ModelError


def make_net() -> nn.ModuleDict:
    return nn.ModuleDict({"mlp": nn.Linear(2, 3), "norm": nn.BatchNorm1d(3)})


def state_for(net: nn.Module, prefix: str = "dense_arch.") -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": torch.full_like(tensor, 7) for name, tensor in net.state_dict().items()}


def load(net: nn.Module, state: dict, *, name: str = "dense_arch", allow: list[str] | None = None) -> tuple[str, ...]:
    return load_dense_parameters(net, state, dense_model_name=name, allow_missing=allow or [], where="model.pt")


def test_all_parameters_and_buffers_are_loaded() -> None:
    net = make_net()
    assert load(net, state_for(net)) == ()
    assert all((tensor == 7).all() for tensor in net.state_dict().values())


@pytest.mark.parametrize("name", ["dense_arch", "towers.dense", "module.dense_arch", ""])
def test_the_prefix_is_a_path_of_any_depth(name: str) -> None:
    net = make_net()
    load(net, state_for(net, f"{name}." if name else ""), name=name)
    assert (net["mlp"].weight == 7).all()


def test_the_prefix_is_stripped_at_the_front_only() -> None:
    net = nn.ModuleDict({"sub": nn.ModuleDict({"dense": nn.Linear(2, 2)}), "dense": nn.Linear(2, 2)})
    state = state_for(net, "dense.")
    assert "dense.sub.dense.weight" in state
    state["dense.sub.dense.weight"] = torch.full((2, 2), 3.0)
    load(net, state, name="dense")
    assert (net["sub"]["dense"].weight == 3).all()
    assert (net["dense"].weight == 7).all()


def test_other_parts_of_the_model_are_ignored() -> None:
    net = make_net()
    others = {"dense_arch_2.mlp.weight": torch.ones(9), "sparse_arch.x": torch.ones(1), "module.sparse_arch.x": None}
    load(net, {**others, **state_for(net)})
    assert (net["mlp"].weight == 7).all()


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", "_fsdp_wrapped_module"])
def test_wrapper_elements_are_ignored_in_the_checkpoint(wrapper: str) -> None:
    net = make_net()
    state = {f"{wrapper}.dense_arch.{wrapper}.{name}": torch.full_like(t, 7) for name, t in net.state_dict().items()}
    load(net, state)
    assert (net["mlp"].weight == 7).all()


def test_wrapper_elements_are_ignored_in_the_dense_arch() -> None:
    net = nn.ModuleDict({"mlp": nn.DataParallel(nn.Linear(2, 2)), "module": nn.Linear(2, 1)})
    state = {"dense_arch.mlp.weight": torch.ones(2, 2), "dense_arch.mlp.bias": torch.ones(2)}
    load(net, {**state, "dense_arch.weight": torch.ones(1, 2), "dense_arch.bias": torch.ones(1)})
    assert (net["mlp"].module.weight == 1).all()
    assert (net["module"].weight == 1).all()


def test_two_names_that_are_one_without_wrappers_are_refused() -> None:
    net = make_net()
    state = state_for(net) | {"dense_arch.module.mlp.weight": torch.ones(3, 2)}
    with pytest.raises(ModelError, match=r"'dense_arch.mlp.weight' and 'dense_arch.module.mlp.weight' are one name"):
        load(net, state)


def test_missing_unexpected_and_misshapen_keys_are_told_together() -> None:
    net = make_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = state_for(net)
    del state["dense_arch.mlp.bias"], state["dense_arch.norm.running_mean"]
    state |= {"dense_arch.gone": torch.ones(1), "dense_arch.mlp.weight": torch.ones(4, 2), "dense_arch.norm.bias": 3}
    with pytest.raises(ModelError) as caught:
        load(net, state)
    for part in (
        "model.pt does not fit the dense arch 'dense_arch'",
        "missing: mlp.bias, norm.running_mean (allow_missing_dense",
        "unexpected under 'dense_arch.': gone",
        "mlp.weight is [4, 2], the dense arch has [3, 2]",
        "norm.bias is a int",
    ):
        assert part in str(caught.value)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} was loaded all the same"


def test_every_missing_key_is_listed() -> None:
    net = nn.ModuleList([nn.Linear(1, 1) for _ in range(30)])
    with pytest.raises(ModelError) as caught:
        load(net, {"dense_arch.0.weight": torch.ones(1, 1)})
    assert all(f"{i}.bias" in str(caught.value) for i in range(30))


def test_a_wrong_prefix_says_what_there_is() -> None:
    with pytest.raises(ModelError, match=r"no parameter under 'dense_arch\.'; its names begin with sparse, tower"):
        load(make_net(), state_for(make_net(), "tower.") | {"sparse.x": torch.ones(1)})


def test_missing_keys_pass_where_they_are_allowed() -> None:
    net = make_net()
    bias = net["mlp"].bias.detach().clone()
    state = state_for(net)
    del state["dense_arch.mlp.bias"]
    (note,) = load(net, state, allow=["mlp.b*"])
    assert "mlp.bias" in note
    assert torch.equal(net["mlp"].bias, bias)
    assert (net["mlp"].weight == 7).all()


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'mlp\.typo' matches no parameter"):
        load(make_net(), state_for(make_net()), allow=["mlp.typo"])


def test_an_allowed_pattern_does_not_excuse_others() -> None:
    state = state_for(make_net())
    del state["dense_arch.mlp.bias"], state["dense_arch.mlp.weight"]
    with pytest.raises(ModelError, match=r"missing: mlp.weight \("):
        load(make_net(), state, allow=["mlp.bias"])


def test_another_dtype_is_cast_and_noted() -> None:
    net = make_net()
    state = state_for(net) | {"dense_arch.mlp.weight": torch.full((3, 2), 7, dtype=torch.bfloat16)}
    (told,) = load(net, state)
    assert told.startswith(
        "dense parameters are bfloat16 in the checkpoint and float32 in the dense arch: they are cast"
    )
    assert told.endswith("the program has them as float32: mlp.weight")
    assert net["mlp"].weight.dtype == torch.float32


def make_tied() -> nn.ModuleDict:
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    net["b"].weight = net["a"].weight
    return net


def test_tied_parameters_load_and_stay_tied() -> None:
    net = make_tied()
    load(net, state_for(net))
    assert net["a"].weight is net["b"].weight
    assert (net["a"].weight == 7).all()


@pytest.mark.parametrize("lost", ["dense_arch.a.weight", "dense_arch.b.weight"])
def test_one_name_of_a_tied_parameter_is_enough(lost: str) -> None:
    """safetensors.torch.save_model writes it once."""
    net = make_tied()
    state = state_for(net)
    del state[lost]
    assert load(net, state) == ()
    assert net["a"].weight is net["b"].weight
    assert (net["a"].weight == 7).all()
    assert list_own_values(net, state, dense_model_name="dense_arch") == []


def test_a_parameter_that_is_only_a_part_of_another_is_missing() -> None:
    net = nn.ParameterDict({"whole": torch.zeros(4)})
    net["part"] = nn.Parameter(net["whole"].data[:2])
    with pytest.raises(ModelError, match="missing: part "):
        load(net, {"dense_arch.whole": torch.ones(4)})


def test_a_checkpoint_that_tears_a_tie_is_refused() -> None:
    net = make_tied()
    state = state_for(net) | {"dense_arch.b.weight": torch.ones(2, 2)}
    with pytest.raises(
        ModelError, match=r"different values for what is one tensor in the dense arch: a.weight and b.weight"
    ):
        load(net, state)


def test_lazy_parameters_take_the_shape_of_the_checkpoint() -> None:
    net = nn.LazyLinear(2)
    load(net, {"dense_arch.weight": torch.ones(2, 5), "dense_arch.bias": torch.ones(2)})
    assert net.weight.shape == (2, 5)


def test_a_dense_arch_without_parameters_needs_none() -> None:
    assert load(nn.ReLU(), {"sparse.x": torch.ones(1)}) == ()


def test_unexpected_keys_are_left_out_where_they_are_allowed() -> None:
    net = make_net()
    state = state_for(net) | {"dense_arch.head.weight": torch.ones(1), "dense_arch.gone": torch.ones(1)}
    (note,) = load_dense_parameters(
        net,
        state,
        dense_model_name="dense_arch",
        allow_missing=(),
        allow_unexpected=["head.*", "go*"],
        where="model.pt",
    )
    assert "head.weight, gone" in note
    assert (net["mlp"].weight == 7).all()
    with pytest.raises(ModelError, match=r"unexpected under 'dense_arch.': gone \(allow_unexpected_dense"):
        load_dense_parameters(
            net, state, dense_model_name="dense_arch", allow_missing=(), allow_unexpected=["head.*"], where="model.pt"
        )


def test_a_pattern_of_unexpected_keys_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ModelError, match=r"allow_unexpected_dense: the pattern 'typo' matches no parameter"):
        load_dense_parameters(
            make_net(),
            state_for(make_net()),
            dense_model_name="dense_arch",
            allow_missing=(),
            allow_unexpected=["typo"],
            where="model.pt",
        )


@pytest.mark.parametrize(
    ("held", "own", "told"),
    [
        (torch.complex(torch.ones(3), torch.ones(3)), torch.zeros(3), "its imaginary part would be lost"),
        (torch.complex(torch.ones(3), torch.zeros(3)), torch.zeros(3), ""),
        (torch.tensor([0.5, 1.0, 2.0]), torch.zeros(3, dtype=torch.int64), "no such number"),
        (torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, dtype=torch.int64), ""),
        (torch.tensor([1.0, float("nan"), 3.0]), torch.zeros(3, dtype=torch.int64), "no such number"),
        (torch.tensor([1, 2, 1 << 40]), torch.zeros(3, dtype=torch.int32), "no such number"),
        (torch.tensor([2, 0, 1]), torch.zeros(3, dtype=torch.bool), "no such number"),
        (torch.tensor([1e30, 0.0, 1.0]), torch.zeros(3, dtype=torch.float16), "too large would become infinite"),
        (torch.tensor([1e30, 0.0, float("inf")]), torch.zeros(3, dtype=torch.bfloat16), ""),
        (torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), torch.zeros(3), ""),
        (torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3, dtype=torch.complex64), ""),
        (torch.tensor([0.5, 1.0, 2.0]).to(torch.float8_e4m3fn), torch.zeros(3), ""),
        (torch.tensor([1, 2, (1 << 63) + 5], dtype=torch.uint64), torch.zeros(3, dtype=torch.int64), "no such number"),
    ],
)
def test_a_cast_that_loses_more_than_rounding_is_refused(held: torch.Tensor, own: torch.Tensor, told: str) -> None:
    net = nn.Module()
    net.register_buffer("b", own)
    if not told:
        assert "they are cast" in load(net, {"dense_arch.b": held})[0]
        return
    with pytest.raises(ModelError, match=told):
        load(net, {"dense_arch.b": held})


def test_a_value_of_the_sparse_arch_that_loses_more_than_rounding_is_refused() -> None:
    sparse = nn.Module()
    sparse.register_buffer("count", torch.zeros(2, dtype=torch.int64))
    halves = {"sparse_arch.count": torch.tensor([0.5, 1.0])}
    with (
        pytest.raises(ModelError, match=r"sparse_arch\.count is float32 in the checkpoint and int64 in the model"),
        values_within(sparse, halves, path="sparse_arch", except_below="dense_arch"),
    ):
        pass
    whole = {"sparse_arch.count": torch.tensor([3.0, 1.0])}
    with values_within(sparse, whole, path="sparse_arch", except_below="dense_arch"):
        assert sparse.count.tolist() == [3, 1]
