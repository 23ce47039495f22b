"""The copy of the dense arch: no wrappers, no gradients, nothing shared with the caller's modules."""

from __future__ import annotations

import collections
import copy
import functools
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.join import Joinable

from dist_export.errors import ModelError
from dist_export.model.unwrap import copy_dense_arch, is_lazy, move_to, unwrap


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))


def kinds(module: nn.Module) -> list[type]:
    return [type(child) for child in module.modules()]


def test_the_copy_computes_the_same_and_is_in_eval_mode() -> None:
    net = make_net()
    net(torch.randn(8, 3))
    plain = copy_dense_arch(net)
    assert net.training
    assert not any(child.training for child in plain.modules())
    x = torch.randn(4, 3)
    torch.testing.assert_close(plain(x), net.eval()(x), rtol=0, atol=0)
    assert kinds(plain) == kinds(net)
    assert list(plain.state_dict()) == list(net.state_dict())


def test_nothing_of_the_caller_changes_when_the_copy_does() -> None:
    net = make_net()
    net[0].bias.requires_grad_(requires_grad=False)
    net(torch.randn(8, 3)).sum().backward()
    before = copy.deepcopy(net.state_dict())
    gradients = {name: p.grad for name, p in net.named_parameters()}
    plain = copy_dense_arch(net)
    assert all(parameter.grad is None for parameter in plain.parameters())
    assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in net.parameters()]
    with torch.no_grad():
        for tensor in (*plain.parameters(), *plain.buffers()):
            tensor.add_(1)
    plain[1].eps = 9.0
    assert net[1].eps != 9.0
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is gradients[name] for name, p in net.named_parameters())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))])
def test_wrappers_are_taken_off_at_any_depth(wrap) -> None:
    net = make_net()
    expected = kinds(net)
    net[2] = wrap(net[2])
    plain = copy_dense_arch(wrap(net))
    assert kinds(plain) == expected
    assert list(plain.state_dict()) == list(make_net().state_dict())
    assert unwrap(wrap(net)) is net


def test_a_module_compiled_in_place_is_copied_uncompiled() -> None:
    net = make_net()
    net.compile()
    assert copy_dense_arch(net)._compiled_call_impl is None
    assert net._compiled_call_impl is not None


def test_torchrecs_wrapper_is_taken_off() -> None:
    class DistributedModelParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self._dmp_wrapped_module = module

    net = make_net()
    assert unwrap(DistributedModelParallel(net)) is net
    assert kinds(copy_dense_arch(DistributedModelParallel(net))) == kinds(net)


def test_what_is_shared_inside_is_shared_in_the_copy() -> None:
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    net["b"].weight = net["a"].weight
    net["c"] = net["a"]
    net.register_buffer("x", torch.ones(2))
    net.register_buffer("y", net.x)
    plain = copy_dense_arch(net)
    assert plain["b"].weight is plain["a"].weight
    assert plain["c"] is plain["a"]
    assert plain.x is plain.y
    assert plain["a"].weight is not net["a"].weight


class Odd(nn.Module):
    """All that people hang onto modules."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("kept", torch.ones(1))
        self.register_buffer("passing", torch.ones(1) * 2, persistent=False)
        self.register_buffer("none", None)
        self.turned = self.linear.weight.t()  # a view of a parameter, and no leaf
        self.doubled = self.linear.weight * 2  # no leaf
        self.plain_list = [nn.Linear(3, 3), {"again": self.linear}]
        self.tensors = {"a": self.linear.weight * 3}
        self.lock = threading.Lock()
        self.method = self.run
        self.ordered = collections.OrderedDict(a=[1])
        self.linear.register_forward_hook(functools.partial(Odd.on_forward, self))

    def run(self) -> Odd:
        return self

    def on_forward(self, *_: object) -> None:
        self.has_run = True


def test_attributes_of_all_kinds_survive() -> None:
    net = Odd()
    plain = copy_dense_arch(net)
    assert plain.passing.item() == 2
    assert "passing" not in plain.state_dict()
    assert plain.none is None
    assert plain.doubled is not net.doubled
    assert not plain.doubled.requires_grad
    assert plain.tensors["a"] is not net.tensors["a"]
    assert plain.lock is net.lock  # cannot be copied
    assert plain.run() is plain
    assert plain.method() is plain
    assert plain.plain_list[0] is not net.plain_list[0]
    assert torch.equal(plain.plain_list[0].weight, net.plain_list[0].weight)
    assert plain.plain_list[1]["again"] is plain.linear
    plain.ordered["a"].append(2)
    assert net.ordered == {"a": [1]}
    plain.linear(torch.ones(1, 3))
    assert plain.has_run
    assert not hasattr(net, "has_run")


def test_a_view_of_a_parameter_follows_the_copied_parameter() -> None:
    plain = copy_dense_arch(Odd())
    with torch.no_grad():
        plain.linear.weight.fill_(5)
    assert torch.equal(plain.turned, torch.full((3, 3), 5.0))


def test_a_link_to_the_whole_model_does_not_draw_it_in() -> None:
    model = nn.Module()
    model.dense = make_net()
    model.dense.owner = [model]
    assert copy_dense_arch(model.dense).owner[0] is model


def test_parametrized_and_weight_normed_modules_work() -> None:
    nets = [
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
        torch.nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)),
    ]
    for net in nets:
        plain = copy_dense_arch(net)
        x = torch.randn(2, 3)
        torch.testing.assert_close(plain(x), net(x))
        assert list(plain.state_dict()) == list(net.state_dict())


def test_lazy_modules_stay_lazy() -> None:
    plain = copy_dense_arch(nn.LazyLinear(2))
    plain.load_state_dict({"weight": torch.ones(2, 5), "bias": torch.zeros(2)})
    assert torch.equal(plain(torch.ones(1, 5)), torch.full((1, 2), 5.0))


def test_hooks_of_the_user_stay_and_those_of_wrappers_go() -> None:
    net = make_net()
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    net[0].register_forward_hook(Joinable.join_hook)  # stands for any function that torch.distributed hangs in
    plain = copy_dense_arch(net)
    assert len(plain[0]._forward_hooks) == 1
    plain(torch.ones(2, 3))
    assert seen == [1]
    assert len(net[0]._forward_hooks) == 2


def test_a_sharded_tensor_is_refused_with_the_reason() -> None:
    net = make_net()
    net[0].weight.local_shards = list
    with pytest.raises(ModelError, match="Linear is a ShardedTensor"):
        copy_dense_arch(net)


def test_a_dtensor_that_cannot_be_gathered_is_refused_with_the_reason() -> None:
    class Sharded(torch.Tensor):
        def full_tensor(self) -> torch.Tensor:
            raise RuntimeError("no mesh")

    net = make_net()
    net[0].register_buffer("x", torch.ones(2).as_subclass(Sharded))
    with pytest.raises(ModelError, match="DTensor that cannot be gathered: no mesh"):
        copy_dense_arch(net)


def test_move_to_takes_plain_tensors_along() -> None:
    net = nn.Linear(2, 2)
    net.table = torch.ones(2)
    move_to(net, torch.device("meta"))
    assert net.weight.device.type == net.table.device.type == "meta"


@pytest.mark.parametrize("is_inner", [False, True])
def test_a_scripted_module_is_refused(is_inner: bool) -> None:
    """Its parameters would be copied, but it would go on computing with its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch call it deprecated
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"scripted by torch.jit \((0|itself)\)") as caught:
        copy_dense_arch(nn.Sequential(scripted) if is_inner else scripted)
    assert caught.value.exit_code == 2


def test_lazy_modules_stay_lazy_until_their_copy_is_loaded() -> None:
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    plain, trained = copy_dense_arch(net), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    plain.load_state_dict(trained.state_dict())
    x = torch.randn(5, 3)
    for _ in range(2):  # the first run removes a hook
        torch.testing.assert_close(plain(x), trained(x), rtol=0, atol=0)
    assert is_lazy(net[0].weight)
    assert is_lazy(net[1].running_mean)
