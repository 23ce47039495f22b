"""Of a model and its moving average in one checkpoint the model is read, whatever they are called and however they are nested."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from dist_export.checkpoint.state_keys import Member
from dist_export.checkpoint.state_roots import State, choose_state
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.errors import UnaskedError

MODEL = {
    "sparse_arch.user.weight": (50, 4),
    "sparse_arch.item.weight": (40, 4),
    "dense_arch.mlp.weight": (8, 10),
    "dense_arch.mlp.bias": (8,),
}


def wrapped(names: Mapping[str, Any], wrapper: str) -> dict[str, Any]:
    return {f"{wrapper}.{name}": shape for name, shape in names.items()}


def members_of(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[Member]:
    """Return the tensors of nested dicts; a tuple is a shape."""
    found = []
    for key, value in tree.items():
        if isinstance(value, tuple):
            found.append(Member(".".join((*path, key)), (*path, key), value))
        else:
            found += members_of(value, (*path, key))
    return found


def flat(tree: Mapping[str, Any]) -> list[Member]:
    """The same, of a file that has names alone."""
    return [Member(name, (name,), shape) for name, _, shape in members_of(tree)]


def no_optimizer(_: Mapping[str, set[str]]) -> set[str]:
    return set()


def choose(members: list[Member], root: str | None = None, **settings: Any) -> State:
    settings = {"model_paths": ("sparse_arch", "dense_arch"), **settings}
    return choose_state(
        members, TensorSettings(state_root=root, **settings), where="ck", find_optimizer=no_optimizer, leaves_rest=False
    )


TWO_STATES: dict[str, tuple[dict[str, Any], str, str]] = {
    "ema": ({"model": MODEL, "ema": MODEL}, "model", "ema"),
    "state_dict": ({"state_dict": MODEL, "ema_state_dict": MODEL}, "state_dict", "ema_state_dict"),
    "model_state_dict": ({"model_state_dict": MODEL, "model_ema": MODEL}, "model_state_dict", "model_ema"),
    "camel": ({"net": MODEL, "netEMA": MODEL}, "net", "netEMA"),
    "module": ({"module": MODEL, "ema_model": MODEL}, "module", "ema_model"),
    "swa": ({"model": MODEL, "swa": {**wrapped(MODEL, "module"), "n_averaged": ()}}, "model", "swa"),
    "compiled": ({"model": wrapped(MODEL, "_orig_mod"), "ema": MODEL}, "model", "ema"),
    "nested": ({"app": {"model": MODEL, "ema": MODEL}}, "app.model", "app.ema"),
    "nested below": ({"model": MODEL, "ema": {"module": MODEL, "updates": ()}}, "model", "ema.module"),
    "best": ({"model": MODEL, "best": MODEL}, "model", "best"),
    "at the top": ({**MODEL, "ema": MODEL}, "", "ema"),
}


@pytest.mark.parametrize("case", TWO_STATES)
def test_the_model_is_taken_and_the_other_state_is_told(case: str) -> None:
    """Names are those within the model; the note names what is left out, and the setting that takes it."""
    tree, model, other = TWO_STATES[case]
    found = choose(members_of(tree))
    begin = f"{model}." if model else ""
    plain = {within.removeprefix("_orig_mod.") for within in found.names.values()} - {"updates", "n_averaged"}
    assert plain == set(MODEL)
    taken = {name for name, within in found.names.items() if within.removeprefix("_orig_mod.") in MODEL}
    assert taken == {name for name in (m.name for m in members_of(tree)) if name.startswith(begin)} - set(
        found.left_out
    )
    assert other in found.left_out.values()
    assert other in found.notes[0]
    assert "state_root" in found.notes[0]


@pytest.mark.parametrize("case", [case for case in TWO_STATES if case not in ("compiled", "at the top")])
@pytest.mark.parametrize("is_flat", [False, True])
def test_state_root_takes_the_other_state(case: str, is_flat: bool) -> None:
    """By its dotted path, in nested dicts and in flat names; its own wrappers stay in the names."""
    tree, _, other = TWO_STATES[case]
    found = choose((flat if is_flat else members_of)(tree), other)
    assert {name for name in found.names if name.startswith(f"{other}.")} == set(found.names)
    assert {within.removeprefix("module.") for within in found.names.values()} >= set(MODEL)


@pytest.mark.parametrize("case", ["ema", "state_dict", "model_state_dict", "module", "swa", "nested", "compiled"])
def test_flat_names_are_told_apart_by_their_begin(case: str) -> None:
    """A safetensors file has no keys; the state_dict of a Lightning module has none either."""
    tree, model, other = TWO_STATES[case]
    found = choose(flat(tree))
    assert {within.removeprefix("_orig_mod.") for within in found.names.values()} == set(MODEL)
    assert set(found.left_out.values()) == {other}
    assert repr(model) in found.notes[0]


def test_a_begin_of_names_that_the_export_asks_for_is_the_models_own() -> None:
    """A module that holds the model as ``model`` and its average as ``ema`` keeps these names; so does one in a root."""
    inner = {**wrapped(MODEL, "model"), **wrapped(MODEL, "ema")}
    paths = ("model.sparse_arch", "model.dense_arch")
    for tree in (inner, {"state_dict": inner}):
        found = choose(members_of(tree), model_paths=paths)
        assert set(found.names.values()) == set(wrapped(MODEL, "model"))
    ema = choose(members_of(inner), model_paths=("ema.sparse_arch", "ema.dense_arch"))
    assert set(ema.names.values()) == set(inner)
    kept = choose(members_of({"sparse_arch": {"user.weight": (5, 4)}, "dense_arch": {"mlp.weight": (1, 4)}}))
    assert set(kept.names.values()) == {"sparse_arch.user.weight", "dense_arch.mlp.weight"}


def test_an_average_within_the_dense_arch_is_the_models_own() -> None:
    """A module called ``ema`` beside one of the same shape, as codebooks have it, is no copy of a model."""
    tree = {"dense_arch.codebook.weight": (8, 4), "dense_arch.ema.weight": (8, 4), "sparse_arch.user.weight": (50, 4)}
    for members in (flat(tree), members_of({"model": tree})):
        found = choose(members)
        assert set(found.names.values()) == set(tree)
        assert found.left_out == {}


ROWS = (100, 8)
TABLES: dict[str, dict[str, Any]] = {
    "collection": {"ebc.embedding_bags.price.weight": ROWS, "ebc.embedding_bags.avg_price.weight": ROWS},
    "collection of averages": {"embeddings.user.weight": ROWS, "embeddings.ema.weight": ROWS, "mlp.weight": (3, 4)},
    "whole modules": {"price.weight": ROWS, "avg_price.weight": ROWS},
    "beside the dense arch": {"price.weight": ROWS, "avg_price.weight": ROWS, "dense_arch.mlp.weight": (3, 4)},
    "two tensors each": {
        **wrapped({"emb.weight": ROWS, "norm.weight": (8,)}, "user_tower"),
        **wrapped({"emb.weight": ROWS, "norm.weight": (8,)}, "avg_tower"),
    },
    "with the same word": {
        **wrapped({"emb.weight": ROWS, "norm.weight": (8,)}, "price"),
        **wrapped({"emb.weight": ROWS, "norm.weight": (8,)}, "price_avg"),
        "mlp.weight": (3, 4),
    },
    "within the model": wrapped({"price.weight": ROWS, "avg_price.weight": ROWS}, "model"),
}


def nested(names: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Make dicts of the first ``depth`` dots of each name."""
    tree: dict[str, Any] = {}
    for name, shape in names.items():
        *keys, last = name.split(".", min(depth, name.count(".")))
        place = tree
        for key in keys:
            place = place.setdefault(key, {})
        place[last] = shape
    return tree


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("depth", [0, 1, 8])
@pytest.mark.parametrize("leaves_rest", [False, True])
def test_a_table_is_no_moving_average_for_its_name(case: str, depth: int, *, leaves_rest: bool) -> None:
    """Only the copy of a whole model is left out; a table or tower that is called so is the model's own, trained and served."""
    members = members_of(nested(TABLES[case], depth))
    found = choose_state(
        members,
        TensorSettings(model_paths=("sparse_arch", "dense_arch")),
        where="ck",
        find_optimizer=no_optimizer,
        leaves_rest=leaves_rest,
    )
    assert found.left_out == {}
    assert found.names.keys() == TABLES[case].keys()
    assert len({*found.names.values()}) == len(found.names)


def test_what_may_be_a_moving_average_is_taken_with_a_note() -> None:
    found = choose(flat(TABLES["whole modules"]))
    assert "ck: avg_price may be a moving average by its name" in found.notes[0]
    assert choose(flat(TABLES["collection"])).notes == ()


def test_a_whole_model_under_any_key_has_a_moving_average() -> None:
    """Where nothing else is in the checkpoint, and the names say the same but for the word."""
    for copy in ("netEMA", "ema"):
        for members in (members_of({"net": MODEL, copy: MODEL}), flat({"net": MODEL, copy: MODEL})):
            assert set(choose(members).left_out.values()) == {copy}


def test_states_of_which_none_is_the_model_keep_their_full_names() -> None:
    """Nothing is lost in silence: all are there, and the note names them."""
    for tree in ({"online": MODEL, "target": MODEL}, {"0": MODEL, "1": MODEL}):
        found = choose(members_of(tree))
        assert set(found.names.values()) == {member.name for member in members_of(tree)}
        assert f"several states with the same names: {', '.join(tree)}" in found.notes[0]
    towers = choose(members_of({"user": {"emb.weight": (50, 4)}, "item": {"emb.weight": (40, 4)}}))
    assert set(towers.names.values()) == {"user.emb.weight", "item.emb.weight"}
    assert towers.notes == ()


def test_a_state_root_that_is_not_there_lists_what_is() -> None:
    with pytest.raises(
        UnaskedError, match=r"state_root is 'emma', but .*; there are ema \(4 tensors\), model \(4 tensors\)"
    ):
        choose(members_of({"model": MODEL, "ema": MODEL}), "emma")
    assert "set state_root: ema" in choose(members_of({"model": MODEL, "ema": MODEL})).explain("ema.*")


def test_a_point_takes_everything_under_its_full_name() -> None:
    members = members_of({"model": MODEL, "ema": MODEL})
    assert choose(members, ".").names == {member.name: member.name for member in members}


def test_optimizer_state_is_found_by_the_names_of_any_state() -> None:
    """It names parameters as the model does, or by their full names, wherever it lies."""
    for inner in ("", "model."):
        slots = {f"optimizer.state.{inner}{name}.exp_avg": shape for name, shape in MODEL.items()}
        for members in (members_of({"model": MODEL, "ema": MODEL}), flat({"model": MODEL, "ema": MODEL})):
            both = members + [Member(name, (name,), shape) for name, shape in slots.items()]

            def find(spellings: Mapping[str, set[str]], slots: dict[str, Any] = slots) -> set[str]:
                known = {spelling for its in spellings.values() for spelling in its}
                return {
                    name for name in slots if name.removeprefix("optimizer.state.").removesuffix(".exp_avg") in known
                }

            settings = TensorSettings(model_paths=("sparse_arch", "dense_arch"))
            found = choose_state(both, settings, where="ck", find_optimizer=find)
            assert found.optimizer == set(slots)
            assert set(found.names.values()) == set(MODEL)


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("outer", ["", "state_dict", "run.state_dict"])
def test_a_root_that_a_note_offers_is_one_that_state_root_takes(outer: str, is_flat: bool) -> None:
    """Also where the begin of flat names tells of a copy, within the keys of nested dicts."""
    inner: dict[str, Any] = {**wrapped(MODEL, "model"), **wrapped(MODEL, "ema_model")}
    tree = inner
    for key in reversed(outer.split(".") if outer else []):
        tree = {key: tree}
    members = flat(tree) if is_flat else members_of(tree)
    state = choose(members)
    root = ".".join(filter(None, (outer, "ema_model")))
    assert set(state.left_out.values()) == {root}
    assert any(f"left out: {root} (state_root takes another one)" in note for note in state.notes)
    taken = choose(members, root)
    assert set(taken.names) == set(state.left_out)
    assert set(taken.names.values()) == set(MODEL)
    if outer:
        with pytest.raises(UnaskedError) as refused:
            choose(members, "ema_model")
        assert str(refused.value).endswith(f"; there are {root} ({len(MODEL)} tensors); set state_root to one of them")
