from __future__ import annotations

import numpy as np
import pytest

from dist_export.errors import ConfigError, PlanError
from dist_export.plan.selection import select, select_all
from tests.support.recis_writer import (
    PartSpec,
    make_rows,
    make_tables,
    read_back,
    read_dense,
    truth_of,
    write_checkpoint,
)
from tests.support.sparse_cases import ADAM, assert_exact, copy, export, open_source

# every slot and dense name that RecIS's sparse optimizers write; the adagrad and row-wise ones were never run by us
SLOTS = (
    "sparse_adam_exp_avg",
    "sparse_adam_exp_avg_sq",
    "sparse_adamw_exp_avg",
    "sparse_adamw_exp_avg_sq",
    "sparse_adamw_tf_exp_avg",
    "sparse_adamw_tf_exp_avg_sq",
    "sparse_adagrad_state_sum",
    "sparse_row_wise_adagrad_state_sum",
    "sparse_row_wise_adagrad_sum_state_sum",
)
STEPS = (
    *(f"sparse_{name}_{what}" for name in ("adam", "adamw", "adamw_tf") for what in ("beta1", "beta2", "step")),
    "sparse_adagrad_step",
    "sparse_row_wise_adagrad_step",
    "sparse_row_wise_adagrad_sum_step",
    "sparse_row_wise_adagrad_user_step",
    "sparse_row_wise_adagrad_sum_user_step",
    "sparse_row_wise_adagrad_a_coalesced_group_step",
)
OTHER_SLOTS = ("step_filter", "sparse_adam", "sparse_adam_exp_avg_2", "sparse_mine", "exp_avg")
OTHER_DENSE = ("w", "sparse_adam_beta3", "sparse_row_wise_adagrad_user", "my_sparse_adam_step", "step", "sparse_step")


@pytest.fixture
def everything(tmp_path):
    ids, _ = make_rows(12)
    slots = {"embedding": np.zeros((12, 4), np.float32)}
    for slot in (*SLOTS, *OTHER_SLOTS):
        slots[slot] = np.zeros((12, 1) if "row_wise" in slot else (12, 4), np.float32)
    slots["step_filter"] = np.arange(12).reshape(12, 1)
    dense = {name: np.zeros(1) for name in (*STEPS, *OTHER_DENSE)}
    full = (0, 65536, 65536)
    parts = {"user": [PartSpec(ids, slots, full)], "item": [PartSpec(ids, {"embedding": slots["embedding"]}, full)]}
    return write_checkpoint(tmp_path / "in", parts, dense=dense)


def names(slots):
    return tuple(slot.name for slot in slots)


def test_optimizer_state_goes_by_name_and_nothing_else_does(everything, tmp_path):
    found = select(open_source(everything))
    assert names(found.kept[0]) == ("id", "embedding", *OTHER_SLOTS)
    assert {slot.name: why for slot, why in found.dropped[0]} == dict.fromkeys(SLOTS, "optimizer")
    assert names(found.kept[1]) == ("id", "embedding")
    assert {tensor.name for tensor in found.kept_dense} == set(OTHER_DENSE)
    assert {tensor.name: why for tensor, why in found.dropped_dense} == dict.fromkeys(STEPS, "optimizer")


def test_the_manifest_tells_what_was_kept_and_dropped(everything, tmp_path):
    manifest = export(everything, tmp_path / "out")
    user = manifest.tables[0]
    assert [slot.name for slot in user.kept] == ["id", "embedding", *OTHER_SLOTS]
    assert {(slot.name, slot.reason) for slot in user.dropped} == {(name, "optimizer") for name in SLOTS}
    assert {slot.num_bytes for slot in user.dropped} == {12 * 4 * 4, 12 * 4}
    assert {tensor.name for tensor in manifest.dense_tensors} == set(OTHER_DENSE)
    assert {tensor.name for tensor in manifest.dropped_dense_tensors} == set(STEPS)
    assert set(read_back(tmp_path / "out")["user"]) == {"id", "embedding", *OTHER_SLOTS}
    assert set(read_dense(tmp_path / "out")) == set(OTHER_DENSE)


@pytest.mark.parametrize("pattern", ["step_filter", "user.step_filter", "step_*", "*.step_filter"])
def test_drop_slots(everything, pattern):
    found = select(open_source(everything), drop_slots=(pattern,))
    assert "step_filter" not in names(found.kept[0])
    assert ("step_filter", "drop_slots") in [(slot.name, why) for slot, why in found.dropped[0]]


@pytest.mark.parametrize("pattern", ["sparse_mine", "user.sparse_mine", "sparse_mi?e"])
def test_optimizer_slots_add_to_the_names(everything, pattern):
    found = select(open_source(everything), optimizer_slots=(pattern,))
    assert ("sparse_mine", "optimizer") in [(slot.name, why) for slot, why in found.dropped[0]]
    assert "step_filter" in names(found.kept[0])


def test_keep_slots_goes_before_optimizer_names(everything, tmp_path):
    found = select(open_source(everything), optimizer_slots=("sparse_*",), keep_slots=("sparse_adam_exp_avg*",))
    assert names(found.kept[0]) == ("id", "embedding", *SLOTS[:2], "step_filter", "sparse_adam_exp_avg_2", "exp_avg")
    assert {tensor.name for tensor in found.kept_dense} == {"w", "my_sparse_adam_step", "step"}


def test_dense_tensors_match_patterns_too(everything):
    found = select(open_source(everything), drop_slots=("w",), keep_slots=("sparse_adam_step",))
    kept = {tensor.name for tensor in found.kept_dense}
    assert "w" not in kept
    assert "sparse_adam_step" in kept
    assert ("w", "drop_slots") in [(tensor.name, why) for tensor, why in found.dropped_dense]


def test_a_pattern_for_one_table_leaves_the_others(tmp_path):
    tables = make_tables({"a": 9, "b": 9}, 2)
    write_checkpoint(tmp_path / "in", tables)
    export(tmp_path / "in", tmp_path / "out", keep_slots=["a.*"], num_shards=3)
    found = read_back(tmp_path / "out")
    assert set(found["a"]) == {"id", "embedding", *ADAM}
    assert set(found["b"]) == {"id", "embedding"}
    truth = truth_of(tables)
    for slot in ADAM:
        assert (found["a"][slot] == truth["a"][slot]).all()
    export(tmp_path / "in", tmp_path / "all", keep_slots=["*"])
    assert_exact(tmp_path / "all", truth, slots=("id", "embedding", *ADAM))


@pytest.mark.parametrize("setting", ["optimizer_slots", "drop_slots", "keep_slots"])
@pytest.mark.parametrize("pattern", ["sparse_adamx", "id", "embedding", "user.id", "nobody.step_filter", "STEP_FILTER"])
def test_a_pattern_that_matches_nothing_is_an_error(everything, tmp_path, setting, pattern):
    with pytest.raises(PlanError) as caught:
        export(everything, tmp_path / "out", **{setting: [pattern, "step_filter"]})
    assert str(caught.value).startswith(f"{setting}: the pattern {pattern!r} matches no slot")
    assert "step_filter" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_id_and_embedding_always_stay(everything):
    found = select(open_source(everything), drop_slots=("*",))
    assert names(found.kept[0]) == ("id", "embedding")
    assert found.kept_dense == ()


def test_one_slot_both_kept_and_dropped_is_an_error(everything, tmp_path):
    with pytest.raises(PlanError, match=r"'user.step_filter' is named both by keep_slots and by drop_slots"):
        export(everything, tmp_path / "out", keep_slots=["step_*"], drop_slots=["*filter"])
    assert not (tmp_path / "out").exists()


def test_a_copy_keeps_everything(everything):
    checkpoint = open_source(everything)
    found = select_all(checkpoint)
    assert found.kept == tuple(table.slots for table in checkpoint.tables)
    assert found.kept_dense == checkpoint.dense
    assert found.dropped_dense == ()


@pytest.mark.parametrize(
    "settings", [{"num_shards": 2}, {"drop_slots": ["w"]}, {"keep_slots": ["w"]}, {"optimizer_slots": ["w"]}]
)
def test_a_copy_takes_no_settings_of_the_filter(everything, tmp_path, settings):
    with pytest.raises(ConfigError, match="filter_sparse_opt: true"):
        copy(everything, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"drop_tables": ["user[0]"]},
        {"select_tables": ["user[0]"]},
        {"rename_tables": {"user[0]": "people"}},
        {"default_row": {"user[0]": "zeros"}},
        {"dtype": {"user[0]": "float16"}},
        {"prune": [{"tables": "user[0]", "norm_at_most": 0}]},
        {"to_hash_tables": ["user[0]"]},
    ],
    ids=str,
)
def test_the_name_of_a_table_that_as_a_pattern_means_another_is_an_error(tmp_path, settings):
    """Else the other table would be dropped, renamed, cast or pruned, and nothing would tell."""
    write_checkpoint(tmp_path / "in", make_tables({"user[0]": 9, "user0": 9, "item": 9}, 1))
    with pytest.raises(
        PlanError,
        match=r"'user\[0\]' is the name of a table, but as a pattern it matches user0, .* Write 'user\[\[\]0\]'",
    ):
        export(tmp_path / "in", tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("other", ["user0", "people"])
@pytest.mark.parametrize("pattern", ["user[0].sparse_adam_exp_avg", "user[0].*"])
@pytest.mark.parametrize("setting", ["optimizer_slots", "drop_slots", "keep_slots"])
def test_the_slot_of_a_table_with_brackets_is_no_pattern(tmp_path, setting, pattern, other):
    """Else slots of another table would be kept or dropped, and nothing would tell."""
    write_checkpoint(tmp_path / "in", make_tables({"user[0]": 9, other: 9}, 1))
    matched = rf"{other}\.\S*" if other == "user0" else "nothing"
    rest = pattern.removeprefix("user[0]").replace(".", r"\.").replace("*", r"\*")
    told = rf"^{setting}: 'user\[0\]{rest}' is the name of .* it matches {matched},.* Write 'user\[\[\]0\]{rest}'"
    with pytest.raises(PlanError, match=told):
        export(tmp_path / "in", tmp_path / "out", **{setting: [pattern]})
    assert not (tmp_path / "out").exists()


def test_the_name_of_a_table_with_brackets_is_told_how_to_write_it_where_it_matches_nothing(tmp_path):
    write_checkpoint(tmp_path / "in", make_tables({"user[0]": 9}, 1))
    for settings in ({"select_tables": ["user[0]"]}, {"dtype": {"user[0]": "float16"}}):
        with pytest.raises(PlanError, match=r"as a pattern it matches nothing, .* Write 'user\[\[\]0\]'"):
            export(tmp_path / "in", tmp_path / "out", **settings)


def test_the_name_of_a_table_with_brackets_in_brackets_is_that_table(tmp_path):
    tables = make_tables({"user[0]": 9, "user0": 9}, 1)
    write_checkpoint(tmp_path / "in", tables)
    export(tmp_path / "in", tmp_path / "out", select_tables=["user[[]0]"], num_shards=1)
    assert set(read_back(tmp_path / "out")) == {"user[0]"}
    export(tmp_path / "in", tmp_path / "kept", keep_slots=["user[[]0].*"], num_shards=1)
    found = read_back(tmp_path / "kept")
    assert set(found["user[0]"]) == {"id", "embedding", *ADAM}
    assert set(found["user0"]) == {"id", "embedding"}
