"""What is in front of all names of a checkpoint, and not in the model, is taken off; nothing else is."""

from __future__ import annotations

import pytest

from dist_export.checkpoint.model_weights import ModelWeights
from dist_export.checkpoint.wrapping_prefix import strip_wrapping_prefix

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
