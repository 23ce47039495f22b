"""What is in front of all names of a checkpoint, and not in the model, is taken off; nothing else is."""

from __future__ import annotations

import pytest

from dist_export.checkpoint.model_weights import ModelWeights
from dist_export.checkpoint.wrapping_prefix import say_below, strip_wrapping_prefix, take_below

WEIGHTS = ModelWeights(
    sparse_name="sparse_arch",
    dense_name="dense_arch",
    tables=frozenset({"sparse_arch.ebc.user.weight"}),
    elsewhere=frozenset(),
    dense_names=frozenset({"mlp.weight"}),
)
TABLE, DENSE = "sparse_arch.ebc.user.weight", "dense_arch.mlp.weight"


@pytest.mark.parametrize("prefix", ["model", "net", "a.b", "module.model", "model._orig_mod"])
def test_a_prefix_of_all_names_is_taken_off(prefix: str) -> None:
    names = {f"{prefix}.{name}": f"{prefix}.{name}" for name in (TABLE, DENSE)} | {"step": "step"}
    within, found = strip_wrapping_prefix(names, WEIGHTS)
    plain = {name: its.removeprefix("_orig_mod.") for name, its in within.items()}
    assert plain == {name: name.removeprefix(f"{prefix}.") for name in names}
    assert found == ".".join(part for part in prefix.split(".") if part not in ("module", "_orig_mod"))


@pytest.mark.parametrize(
    "names",
    [
        (TABLE, DENSE),
        (f"module.{TABLE}", f"module.{DENSE}"),
        (f"model.{TABLE}", DENSE),
        (f"model.{TABLE}", "loss.weight"),
        (f"model.{TABLE}", f"teacher.{TABLE}"),
        ("ebc.user.weight",),
        ("other.user.weight", "other.item.weight"),
        (f"model.{DENSE}", "model.weight", "weight"),
        ("step",),
    ],
)
def test_other_names_stay(names: tuple[str, ...]) -> None:
    """A name of the model, of the sparse arch alone, two beginnings, or none of the model's names behind the prefix."""
    same = {name: name for name in names}
    assert strip_wrapping_prefix(same, WEIGHTS) == (same, "")
    assert strip_wrapping_prefix(same, None) == (same, "")


@pytest.mark.parametrize("prefix", ["model", "a.b", "module.model", "model._orig_mod"])
def test_what_lies_beside_the_prefix_is_left_out(prefix: str) -> None:
    names = [
        f"{prefix}.{TABLE}",
        f"{prefix}.{DENSE}",
        f"{prefix}.sparse_arch.scale",
        "loss.weight",
        "modelling.x",
        "step",
    ]
    within, found = take_below({f"state.{name}": name for name in names}, WEIGHTS)
    plain = {name: its.removeprefix("_orig_mod.") for name, its in within.items()}
    assert plain == {f"state.{name}": name.removeprefix(f"{prefix}.") for name in names[:3]}
    assert found == ".".join(part for part in prefix.split(".") if part not in ("module", "_orig_mod"))


def test_of_tied_weights_one_is_enough() -> None:
    tied = WEIGHTS._replace(
        tables=WEIGHTS.tables | {"sparse_arch.b"}, ties=frozenset({("sparse_arch.a", "sparse_arch.b")})
    )
    names = {name: name for name in (f"model.{TABLE}", f"model.{DENSE}", "model.sparse_arch.a", "loss.weight")}
    assert take_below(names, tied)[1] == "model"
    del names["model.sparse_arch.a"]
    assert take_below(names, tied) == (names, "")


@pytest.mark.parametrize(
    "names",
    [
        (TABLE, DENSE, "loss.weight"),
        (f"model.{TABLE}", f"model.{DENSE}", DENSE),
        (f"model.{TABLE}", "loss.weight"),
        (f"model.{TABLE}", f"teacher.{DENSE}"),
        (f"model.{TABLE}", f"model.{DENSE}", f"teacher.{TABLE}", f"teacher.{DENSE}"),
        (f"module.model.{TABLE}", f"model.{TABLE}", f"model.{DENSE}", "loss.weight"),
    ],
)
def test_a_prefix_that_is_not_certain_is_not_taken(names: tuple[str, ...]) -> None:
    """A name of the model without it, a part of the model, or two prefixes."""
    same = {name: name for name in names}
    assert take_below(same, WEIGHTS) == (same, "")
    assert take_below(same, None) == (same, "")


def test_where_the_model_lies_is_told() -> None:
    names = [f"ema.{DENSE}", f"state_dict.model.{TABLE}", f"state_dict.model.{DENSE}", "x"]
    told = "of 2 tables and dense parameters that the model has, it holds 2 below 'state_dict.model', 1 below 'ema'; state_root"
    assert say_below(names, WEIGHTS, root=None).startswith(told)
    assert say_below(names, WEIGHTS, root="ema").startswith(
        f"no table of the model lies below state_root, 'ema'; {told}"
    )
    assert say_below(names, WEIGHTS, root=None).endswith("such as state_root: state_dict.model")
    assert say_below(["x.y"], WEIGHTS, root=None) == say_below(names, None, root=None) == ""
