"""Joining what the sources state of features: what one does not know another one may, and a contradiction names both."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from dist_export.config.serving import read_serving
from dist_export.contract.draft import Draft
from dist_export.contract.read import Reading
from dist_export.contract.statements import FeatureStatement, Statements
from dist_export.errors import ConfigError
from dist_export.formats.serving_entries import ColumnsEntry, DenseInputEntry, FeatureEntry, IdsEntry
from dist_export.manifest import TableEntry
from dist_export.score.inputs import Jagged

DIM = 4
TENSORS = {
    "clicks": torch.zeros(2, 3, dtype=torch.int64),
    "user": torch.zeros(2, dtype=torch.int64),
    "price": torch.zeros(2, 1),
}


def known(name: str, table: str, pooling: str, **fields: Any) -> FeatureEntry:
    fields = {"padding_id": None, "transforms": (), "ids": IdsEntry(values=name)} | fields
    stated = dict.fromkeys(("table", "pooling", "ids"), "program")
    return FeatureEntry(name=name, table=table, dim=DIM, pooling=pooling, stated_by=stated, **fields)


def columns(*names: str) -> tuple[ColumnsEntry, ...]:
    return tuple(ColumnsEntry(begin=DIM * i, end=DIM * (i + 1), feature=name) for i, name in enumerate(names))


def draft_of(*features: FeatureEntry, unknown: str = "", jagged: tuple[Jagged, ...] = ()) -> Draft:
    """A draft with one dense input, of which the program knows these features side by side."""
    entry = DenseInputEntry(name="block", dtype="float32", dims=2, columns=columns(*(one.name for one in features)))
    if unknown:
        entry = DenseInputEntry(name="block", dtype="float32", dims=2, unknown=unknown)
    reading = Reading(features={one.name: one for one in features}, inputs={"block": entry})
    return Draft(reading, TENSORS, jagged)


def finish(draft: Draft, *tables: str):
    entries = {
        name: TableEntry(
            name=name, rows_in=1, rows_out=1, rows_dropped={}, misplaced=0, id_sum="0", kept=(), dropped=(), parts=()
        )
        for name in tables
    }
    return draft.finish(entries, ["block"])


def fg(*features: tuple[str, str, str | None]) -> Statements:
    stated = {name: FeatureStatement("fg", table=table, dim=DIM, pooling=pooling) for name, table, pooling in features}
    return Statements(stated, {"block": tuple((name, DIM) for name, _, _ in features)})


def test_mc_gives_features_their_names_and_fg_confirms_them() -> None:
    draft = draft_of(known("clicks", "item", "mean"), known("user", "user", "none"))
    draft.add_fg(fg(("recent_items", "item", "mean"), ("user_id", "user", "sum")))
    serving = finish(draft, "item", "user")
    assert [one.feature for one in serving.inputs[0].columns] == ["recent_items", "user_id"]
    features = {one.name: one for one in serving.features}
    assert features["recent_items"].stated_by["pooling"] == "fg"
    assert features["user_id"].pooling == "none"  # of one id, each pooling is the same


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        (
            ("clicks", "item", "sum"),
            "fg.json says that its pooling is 'sum', the model's own sparse arch that it is 'mean'",
        ),
        (
            ("clicks", "other", "mean"),
            "fg.json says that its table is 'other', the model's own sparse arch that it is 'item'",
        ),
    ],
)
def test_fg_that_contradicts_the_program_is_refused(stated: tuple[str, str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        draft_of(known("clicks", "item", "mean")).add_fg(fg(stated))


def test_mc_with_other_columns_is_refused() -> None:
    draft = draft_of(known("clicks", "item", "mean"))
    wide = Statements({"clicks": FeatureStatement("fg", table="item", dim=2)}, {"block": (("clicks", 2), ("user", 2))})
    with pytest.raises(
        ConfigError, match=r"mc: block 'block' has feature 'clicks' in columns 0 to 1, but there .* columns 0 to 3"
    ):
        draft.add_fg(wide)


def test_what_is_unknown_names_what_is_missing_and_the_setting_states_it() -> None:
    draft = draft_of(unknown="a layer is there")
    draft.add_fg(fg(("clicks", "item", "mean")))
    assert "of feature 'clicks', padding_id, transforms is not known" in finish(draft, "item").inputs[0].unknown

    draft = draft_of(unknown="a layer is there")
    draft.add_fg(fg(("clicks", "item", "mean")))
    draft.add_settings(read_serving({"features": {"clicks": {"padding_id": 0, "transforms": []}}}))
    serving = finish(draft, "item")
    assert serving.is_known
    assert serving.features[0].stated_by["padding_id"] == "settings"
    assert serving.features[0].ids == IdsEntry(values="clicks")


def test_features_that_the_setting_adds_have_the_columns_of_their_tables() -> None:
    """A server places them by begin and end."""
    draft = draft_of(unknown="a layer is there")
    its = {"ids": "clicks", "pooling": "mean", "padding_id": None, "transforms": []}
    features = {"c": {"table": "item", **its}, "u": {"table": "user", **its, "ids": "user"}}
    stated = read_serving({"features": features, "inputs": {"block": ["c", "price", "u"]}})
    draft.add_settings(stated, {"item": 3, "user": 8})
    (block,) = finish(draft, "item", "user").inputs
    assert [(one.begin, one.end) for one in block.columns] == [(0, 3), (3, 4), (4, 12)]
    with pytest.raises(ConfigError, match="the package has no table 'item'; it has user"):
        draft_of(unknown="a layer is there").add_settings(stated, {"user": 8})


def test_a_collection_finds_its_ids_by_the_key() -> None:
    jagged = Jagged(("f_values", "f_weights"), "f_lengths", 2, ("user", "item"))
    draft = draft_of(unknown="a layer is there", jagged=(jagged,))
    draft.add_collections({"item": FeatureStatement("collection", table="t_item", dim=DIM, pooling="sum")})
    (feature,) = finish(draft, "t_item").features
    assert feature.ids == IdsEntry(values="f_values", lengths="f_lengths", key=1, num_keys=2, weights="f_weights")
    assert finish(draft_of(unknown="a layer is there")).inputs[0].unknown == "a layer is there"


def test_a_setting_cannot_give_a_known_input_other_columns() -> None:
    draft = draft_of(known("clicks", "item", "mean"), known("user", "user", "none"))
    with pytest.raises(ConfigError, match="has clicks, user, the setting user, clicks"):
        draft.add_settings(read_serving({"inputs": {"block": ["user", "clicks"]}}))
    draft.add_settings(read_serving({"inputs": {"block": ["clicks", "user"]}}))
    assert finish(draft, "item", "user").is_known


def test_default_rows_are_those_of_the_tables() -> None:
    draft = draft_of(known("clicks", "item", "mean"))
    entry = finish(draft, "item").features[0]
    assert entry.default_row is msgspec.UNSET
    table = TableEntry(
        name="item",
        rows_in=1,
        rows_out=1,
        rows_dropped={},
        misplaced=0,
        id_sum="0",
        kept=(),
        dropped=(),
        parts=(),
        default_row="zeros",
    )
    assert draft.finish({"item": table}, ["block"]).features[0].default_row == "zeros"
