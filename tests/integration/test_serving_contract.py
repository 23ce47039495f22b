"""The serving contract: what manifest.serving says of ids, carried out with numpy, gives the trained model's dense inputs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export.errors import ConfigError, PackageError, ParityError, UserError
from dist_export.formats.serving_entries import IdsEntry, TransformEntry
from dist_export.manifest import MANIFEST, decode_manifest, encode_manifest, seal
from dist_export.package.dense_inputs import build_dense_inputs
from dist_export.verify.verify import verify
from tests.integration.test_score_program import one_table, run, three_tables
from tests.support import score_models as models

FG = {
    "features": [
        {"feature_name": name, "feature_type": "id_feature", "value_type": "Integer", "gen_key_type": "idle"}
        | {"gen_val_type": "lookup", "shared_name": f"sparse_arch.{name}.weight", "embedding_dimension": models.DIM}
        for name in ("user", "clicks", "tags")
    ]
    + [
        {"feature_name": "price", "feature_type": "raw_feature", "value_type": "Double", "gen_key_type": "idle"}
        | {"gen_val_type": "idle", "value_dimension": 1}
    ]
}
MC = {"user": ["user"], "clicks": ["clicks"], "tags": ["tags"], "price": ["price"]}


def fg_with(name: str, **fields: Any) -> dict[str, Any]:
    entries = [entry | (fields if entry["feature_name"] == name else {}) for entry in FG["features"]]
    return {"features": entries}


def dense_inputs(package, batch) -> dict[str, np.ndarray]:
    """Carry out what is known of the contract."""
    arrays = {name: tensor.numpy() for name, tensor in batch.items()}

    def rows_of(table: str, slot: str, ids: np.ndarray) -> np.ndarray:
        return package.lookup(table, ids, slot=slot)[0]

    return build_dense_inputs(package.manifest.serving, arrays, rows_of, where="the test")


def assert_same_inputs(package, trained: nn.Module, batch, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    found = dense_inputs(package, batch)
    with torch.no_grad():
        expected = trained.sparse_arch(batch)
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name].numpy(), rtol=rtol, atol=atol, err_msg=name)


def known_inputs(package) -> list[str]:
    return [entry.name for entry in package.manifest.serving.inputs if entry.unknown is msgspec.UNSET]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A package of three tables, with its contract, and the trained model."""
    path = tmp_path_factory.mktemp("plain")
    package, trained = run(path, three_tables, [models.batch_of()])
    return path / "out", package, trained


def test_the_contract_of_three_tables_gives_the_models_dense_inputs(plain) -> None:
    _, package, trained = plain
    serving = package.manifest.serving
    assert serving.is_known
    assert serving.replay.inputs == ("clicks", "price", "tags", "user")
    for num_examples in (1, 2, 128):
        batch = models.batch_of(num_examples, seed=num_examples)
        assert set(dense_inputs(package, batch)) == {"clicks", "price", "tags", "user"}
        assert_same_inputs(package, trained, batch)
    features = {feature.name: feature for feature in serving.features}
    assert (features["clicks"].pooling, features["clicks"].padding_id) == ("mean", 0)
    assert (features["tags"].pooling, features["tags"].padding_id) == ("sum", None)
    assert features["tags"].ids.offsets == "tags_offsets"
    assert (features["user"].pooling, features["user"].transforms) == ("none", ())


def test_the_summary_and_inspect_say_what_is_known(plain) -> None:
    path, package, _ = plain
    assert "  contract 4 of 4 dense inputs from ids: largest difference of a score " in str(package.manifest)
    done = subprocess.run(
        [sys.executable, "-m", "dist_export", "inspect", str(path)], check=True, capture_output=True, text=True
    )
    assert "  contract   features clicks, tags, user\n" in done.stdout


def test_dense_inputs_are_built_without_torch(plain) -> None:
    path, package, _ = plain
    batch = {name: tensor.numpy() for name, tensor in models.batch_of(5, seed=3).items()}
    np.savez(path.parent / "batch.npz", **batch)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\nfrom dist_export import open_package\n"
        f"found = open_package({str(path)!r}).build_dense_inputs(dict(np.load({str(path.parent / 'batch.npz')!r})))\n"
        f"np.savez({str(path.parent / 'found.npz')!r}, **found)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")
    found = np.load(path.parent / "found.npz")
    expected = package.build_dense_inputs(batch)
    assert set(found.files) == set(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    del batch["tags_offsets"]
    with pytest.raises(UserError, match="'tags_offsets' is missing"):
        package.build_dense_inputs(batch)


def test_each_way_of_looking_up_is_stated_or_unknown(tmp_path: Path) -> None:
    package, trained = run(tmp_path, lambda: models.Model(models.AllWays(), len(models.WAYS) * models.DIM + 1))
    assert set(models.WAYS) - set(known_inputs(package)) == {"padded", "with_gradients"}
    for seed in range(3):
        assert_same_inputs(package, trained, models.batch_of(20, seed=seed))
    unknown = next(entry for entry in package.manifest.serving.inputs if entry.name == "with_gradients")
    assert "it is more than lookups, pooling and columns side by side" in unknown.unknown
    assert any(
        "does not say how these dense inputs come about: padded, with_gradients" in n for n in package.manifest.notes
    )
    with pytest.raises(PackageError, match="does not know dense input 'padded'"):
        package.build_dense_inputs({})


def _modulo(its: Any, batch: Any) -> torch.Tensor:
    return its.table(batch["user"] % 7 + 2)


def _list(its: Any, batch: Any) -> torch.Tensor:
    rows = its.table(batch["clicks"])
    return rows * (batch["clicks"] != 0).unsqueeze(-1)


def _columns(its: Any, batch: Any) -> torch.Tensor:
    return torch.cat([batch["price"], its.table(batch["clicks"][:, 1]), its.table(batch["user"])], dim=1)


def test_remainders_lists_and_single_columns_are_stated(tmp_path: Path) -> None:
    package, trained = run(tmp_path, one_table(_modulo), out="modulo")
    feature = package.manifest.serving.features[0]
    assert [(step.op, step.value) for step in feature.transforms] == [("modulo", 7), ("add", 2)]
    assert_same_inputs(package, trained, models.batch_of(9))

    class Lists(models.Head):
        def forward(self, blocks):
            return super().forward({"rows": blocks["block"].mean(1), "price": blocks["price"]})

    def lists() -> nn.Module:
        model = one_table(_list)()
        model.dense_arch = Lists(models.DIM + 1)
        return model

    package, trained = run(tmp_path, lists, out="lists")
    feature = package.manifest.serving.features[0]
    assert (feature.pooling, feature.padding_id) == ("none", 0)
    assert_same_inputs(package, trained, models.batch_of(9))

    def columns() -> nn.Module:
        return models.Model(models.Lookups(nn.Embedding(models.ROWS, models.DIM), _columns), 2 * models.DIM + 2)

    batches = [models.batch_of() | {"clicks": torch.randint(0, models.ROWS, (6, 3))}]
    package, trained = run(tmp_path, columns, batches, out="columns")
    assert "the sparse arch takes only some sizes (clicks_size_1 >= 2)" in package.manifest.serving.inputs[0].unknown
    assert_same_inputs(package, trained, models.batch_of(9))


def _scaled(its: Any, batch: Any) -> torch.Tensor:
    return its.table(batch["user"]) * 2


def _wrapped_above(its: Any, batch: Any) -> torch.Tensor:
    return its.table(torch.where(batch["user"] >= 25, batch["user"] % 25, batch["user"]))


def _gated(its: Any, batch: Any) -> torch.Tensor:
    return torch.where(batch["price"] < 1e5, its.table(batch["user"]), 0.0)


def _gated_far(its: Any, batch: Any) -> torch.Tensor:
    return torch.where(batch["price"] < 1e30, its.table(batch["user"]), 0.0)


def _by_length(its: Any, batch: Any) -> torch.Tensor:
    return its.table(batch["clicks"]).sum(1) / batch["clicks"].shape[1] * (batch["clicks"] != 0).sum(1, keepdim=True)


def _one_id_apart(its: Any, batch: Any) -> torch.Tensor:
    rows = its.table(batch["user"])
    return torch.where((batch["user"] == 17).unsqueeze(-1), -rows, rows)


def _not_a_number_without_ids(its: Any, batch: Any) -> torch.Tensor:
    is_there = (batch["clicks"] != 0).unsqueeze(-1)
    return (its.table(batch["clicks"]) * is_there).sum(1) / is_there.sum(1)


def _without_repetitions(its: Any, batch: Any) -> torch.Tensor:
    clicks = batch["clicks"]
    is_new = torch.cat([torch.ones_like(clicks[:, :1], dtype=torch.bool), clicks[:, 1:] != clicks[:, :-1]], dim=1)
    return (its.table(clicks) * is_new.unsqueeze(-1)).sum(1)


def _by_a_list_of_ids(its: Any, batch: Any) -> torch.Tensor:
    rows = its.table(batch["user"])
    return rows * ~torch.isin(batch["user"], torch.tensor([21, 23])).unsqueeze(-1)


def _by_a_buffer(its: Any, batch: Any) -> torch.Tensor:
    renamed = torch.arange(models.ROWS)
    renamed[models.ROWS - 1] = 0
    return its.table(renamed[batch["user"]])


def _rows_without_zeros(its: Any, batch: Any) -> torch.Tensor:
    rows = its.table(batch["clicks"])
    is_there = (rows != 0).any(-1, keepdim=True)
    return rows.sum(1) / is_there.sum(1).clamp(min=1)


def _rows_cut(its: Any, batch: Any) -> torch.Tensor:
    return its.table(batch["user"]).clamp(max=100.0)


def _ids_of_one_space(its: Any, batch: Any) -> torch.Tensor:
    return its.table(torch.where(batch["user"] >> 48 == 3, 0, batch["user"]))


def _first_ten(its: Any, batch: Any) -> torch.Tensor:
    return its.table(batch["clicks"][:, :10]).sum(1)


def _cut_at_its_length(its: Any, batch: Any) -> torch.Tensor:
    return its.table(batch["clicks"][:, : min(batch["clicks"].shape[1], 50)]).sum(1)


def _the_last_ones(its: Any, batch: Any) -> torch.Tensor:
    return its.table(batch["clicks"][:, max(batch["clicks"].shape[1] - 50, 0) :]).sum(1)


def _without_an_eighth(its: Any, batch: Any) -> torch.Tensor:
    return its.table(batch["clicks"][:, batch["clicks"].shape[1] // 8 :]).sum(1)


def _some_by_number(its: Any, batch: Any) -> torch.Tensor:
    return its.table(batch["clicks"][:, torch.arange(min(batch["clicks"].shape[1], 50))]).sum(1)


def _by_steps(its: Any, batch: Any) -> torch.Tensor:
    return its.table(batch["clicks"][:, :: max(1, batch["clicks"].shape[1] // 40)]).sum(1)


def _below_a_place(its: Any, batch: Any) -> torch.Tensor:
    is_in = (torch.arange(batch["clicks"].shape[1]) - 50) < 0
    return (its.table(batch["clicks"]) * is_in[None, :, None]).sum(1)


def _below_a_filled_number(its: Any, batch: Any) -> torch.Tensor:
    is_in = torch.arange(batch["clicks"].shape[1]) < torch.full((1,), 50)
    return (its.table(batch["clicks"]) * is_in[None, :, None]).sum(1)


def _the_first_ones_that_count(its: Any, batch: Any) -> torch.Tensor:
    is_in = ((batch["clicks"] != 0).cumsum(1) - 50) <= 0
    return (its.table(batch["clicks"]) * is_in[..., None]).sum(1)


def _by_batch_size(its: Any, batch: Any) -> torch.Tensor:
    return its.table(batch["user"]) * (batch["user"].shape[0] // 512 + 1)


WAYS_TO_DO_MORE = [
    _rows_without_zeros,
    _rows_cut,
    _ids_of_one_space,
    _first_ten,
    _cut_at_its_length,
    _the_last_ones,
    _without_an_eighth,
    _some_by_number,
    _by_steps,
    _below_a_place,
    _below_a_filled_number,
    _the_first_ones_that_count,
    _by_batch_size,
    _by_a_list_of_ids,
    _by_a_buffer,
    _scaled,
    _wrapped_above,
    _gated,
    _gated_far,
    _by_length,
    _one_id_apart,
]


@pytest.mark.parametrize("look", [*WAYS_TO_DO_MORE, _not_a_number_without_ids, _without_repetitions])
def test_what_is_more_than_a_lookup_is_unknown(tmp_path: Path, look: Any) -> None:
    package, _ = run(tmp_path, one_table(look))
    assert "block" not in known_inputs(package)


@pytest.mark.parametrize("dtype", ["float16", "int8", "bfloat16"])
def test_the_contract_holds_for_rows_that_were_cast(tmp_path: Path, dtype: str) -> None:
    package, trained = run(tmp_path, three_tables, dtype={"*": dtype})
    assert package.manifest.serving.is_known
    assert_same_inputs(package, trained, models.batch_of(9), rtol=0.05, atol=0.05)
    assert not verify(str(tmp_path / "out")).findings


# ---- fg and mc ----


def test_fg_and_mc_name_the_features(tmp_path: Path) -> None:
    package, _ = run(tmp_path, three_tables, fg_conf_or_path=fg_with("clicks", combiner="mean"), mc_conf_or_path=MC)
    features = {feature.name: feature for feature in package.manifest.serving.features}
    assert features["clicks"].stated_by["pooling"] == "fg"
    assert features["tags"].stated_by["pooling"] == "program"
    assert package.manifest.serving.is_known


def test_a_wrong_pooling_in_fg_fails_the_export(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'clicks': fg.json says that its pooling is 'max', .* 'mean'"):
        run(tmp_path, three_tables, fg_conf_or_path=fg_with("clicks", combiner="max"), mc_conf_or_path=MC)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_fg_alone_states_features_by_name(tmp_path: Path) -> None:
    serving = {"features": {name: {"padding_id": None, "transforms": []} for name in ("user", "tags")}}
    serving["features"]["clicks"] = {"padding_id": 0, "transforms": []}
    serving["features"]["tags"]["ids"] = {"values": "tags_values", "offsets": "tags_offsets"}
    serving["features"]["user"]["pooling"] = "none"
    fg = fg_with("clicks", combiner="mean")
    next(entry for entry in fg["features"] if entry["feature_name"] == "tags")["combiner"] = "sum"
    settings = {"score_program": "off", "fg_conf_or_path": fg, "mc_conf_or_path": MC}
    package, trained = run(tmp_path, three_tables, **settings, out="by_fg")
    unknown = {entry.name: entry.unknown for entry in package.manifest.serving.inputs}
    assert "of feature 'clicks', padding_id, transforms is not known" in unknown["clicks"]

    package, trained = run(tmp_path, three_tables, **settings, serving=serving, out="with_setting")
    assert package.manifest.serving.is_known
    assert_same_inputs(package, trained, models.batch_of(9))
    assert not verify(str(tmp_path / "with_setting")).findings

    fg = fg_with("clicks", combiner="max")
    with pytest.raises(ParityError, match=r"'clicks' otherwise than the model.*pooling max; stated: .*pooling by fg"):
        run(tmp_path, three_tables, **(settings | {"fg_conf_or_path": fg}), serving=serving, out="wrong")
    assert not (tmp_path / "wrong" / MANIFEST).exists()


# ---- the setting ----


def stated(**changes: Any) -> dict[str, Any]:
    tables = {name: f"sparse_arch.{name}.weight" for name in ("user", "clicks", "tags")}
    features = {
        "user": {"table": tables["user"], "ids": "user", "pooling": "none", "padding_id": None, "transforms": []},
        "clicks": {"table": tables["clicks"], "ids": "clicks", "pooling": "mean", "padding_id": 0, "transforms": []},
        "tags": {"table": tables["tags"], "pooling": "sum", "padding_id": None, "transforms": []}
        | {"ids": {"values": "tags_values", "offsets": "tags_offsets"}},
    }
    features["clicks"] |= changes
    return {"features": features, "inputs": {name: [name] for name in ("user", "clicks", "tags", "price")}}


def test_the_setting_states_a_contract_without_a_score_program(tmp_path: Path) -> None:
    package, trained = run(tmp_path, three_tables, score_program="off", serving=stated())
    assert package.manifest.serving.is_known
    assert package.manifest.score is msgspec.UNSET
    assert_same_inputs(package, trained, models.batch_of(9))


@pytest.mark.parametrize(
    "changes",
    [{"pooling": "sum"}, {"padding_id": None}, {"transforms": [{"op": "add", "value": 1}]}],
    ids=["pooling", "padding", "transforms"],
)
def test_a_wrong_setting_fails_the_export_and_names_the_input(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ParityError, match="gives dense input 'clicks' otherwise than the model"):
        run(tmp_path, three_tables, score_program="off", serving=stated(**changes))
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_a_setting_that_contradicts_the_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="serving says that its pooling is 'max', the model's own sparse arch"):
        run(tmp_path, three_tables, serving=stated(pooling="max"))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("serving", "told"),
    [
        ({"features": {"x": {"pooling": "sum"}}}, "'x' is no known feature"),
        ({"features": {"x": {"table": "none"}}}, "the package has no table 'none'"),
        (
            {"features": {"user": {"table": "sparse_arch.user.weight", "ids": "nowhere"}}},
            "the batch has no tensor 'nowhere'",
        ),
        ({"features": {"user": {"pool": "sum"}}}, "unknown field `pool`"),
        ({"inputs": {"nothing": ["user"]}}, "'nothing' is no input of the dense arch"),
        ({"inputs": {"user": ["nothing"]}}, "'nothing' is neither a feature nor a tensor"),
        ("of", "expected auto or off or a mapping"),
    ],
)
def test_a_setting_that_means_nothing_is_one_line(tmp_path: Path, serving: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        run(tmp_path, three_tables, score_program="off", serving=serving)


def test_off_states_nothing(tmp_path: Path) -> None:
    package, _ = run(tmp_path, three_tables, serving="off")
    assert package.manifest.serving is msgspec.UNSET
    with pytest.raises(PackageError, match="has no serving contract"):
        package.build_dense_inputs({})


def test_a_batch_without_examples_gives_inputs_without_rows(plain) -> None:
    path, _, _ = plain
    batch = {name: tensor[:0].numpy() for name, tensor in models.batch_of().items() if tensor.dim()}
    found = dist_export.open_package(path).build_dense_inputs(batch)
    widths = {"user": models.DIM, "clicks": models.DIM, "tags": models.DIM, "price": 1}
    assert {name: values.shape for name, values in found.items()} == {n: (0, width) for n, width in widths.items()}


# ---- verify, and a package as a source ----


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("pooling", "max", "dense input 'clicks' otherwise than the model did"),
        ("padding_id", 5, "dense input 'clicks' otherwise than the model did"),
        ("dim", 3, "'clicks' has 3 columns, its table"),
        ("table", "other", "looked up in 'other'"),
        ("default_row", (1.0,) * models.DIM, "has another default_row"),
    ],
)
def test_verify_finds_a_contract_that_is_not_the_models(
    plain, tmp_path: Path, field: str, value: Any, told: str
) -> None:
    path, _, _ = plain
    changed = forge(path, tmp_path / "changed", **{field: value})
    findings = verify(str(changed)).findings
    assert any(told in text for text in findings), findings


def forge(path: Path, target: Path, feature_name: str = "clicks", **fields: Any) -> Path:
    """Return a copy of a package whose manifest states other fields of a feature."""
    shutil.copytree(path, target)
    manifest = decode_manifest((path / MANIFEST).read_bytes(), where="the test")
    features = tuple(
        msgspec.structs.replace(feature, **fields) if feature.name == feature_name else feature
        for feature in manifest.serving.features
    )
    serving = msgspec.structs.replace(manifest.serving, features=features)
    (target / MANIFEST).write_bytes(encode_manifest(seal(msgspec.structs.replace(manifest, serving=serving))))
    return target


CLICKS = {"values": "clicks"}
FORGED = [
    ("ids", IdsEntry(**CLICKS, num_keys=0), "is key 0 of 0"),
    ("ids", IdsEntry(**CLICKS, key=1), "is key 1 of 1"),
    ("ids", IdsEntry(values="others"), "no tensor of a batch is 'others'"),
    ("ids", IdsEntry(**CLICKS, lengths="tags_offsets", offsets="tags_offsets"), "both lengths and offsets"),
    ("padding_id", 1 << 70, "a number that is no int64"),
    ("transforms", (TransformEntry(op="modulo", value=0),), "a remainder of 0"),
    ("transforms", (TransformEntry(op="add", value=1 << 70),), "a number that is no int64"),
    ("name", "user", "two features have one name"),
    ("table", "other", "looked up in 'other'"),
    ("dim", 3, "'clicks' has 3 columns, its table"),
    ("pooling", msgspec.UNSET, "feature 'clicks' is not known"),
]


@pytest.mark.parametrize(("field", "value", "told"), FORGED)
def test_a_contract_that_does_not_fit_is_a_package_error_and_a_finding(
    plain, tmp_path: Path, field: str, value: Any, told: str
) -> None:
    path, _, _ = plain
    changed = forge(path, tmp_path / "changed", **{field: value})
    package, batch = dist_export.open_package(changed), models.batch_of()
    with pytest.raises(PackageError, match=re.escape(told)):
        package.build_dense_inputs({name: tensor.numpy() for name, tensor in batch.items()})
    assert any(told in text for text in verify(str(changed)).findings)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"padding_id": 25}, "with ids 0"),
        ({"feature_name": "tags", "padding_id": 25}, "with the padding id"),
        ({"padding_id": None}, "with ids 0"),
        ({"transforms": (TransformEntry(op="modulo", value=models.ROWS),)}, "with ids that no table has"),
        ({"transforms": (TransformEntry(op="from_end", value=models.ROWS),)}, "with negative ids"),
        ({"transforms": (TransformEntry(op="mask", value=(1 << 40) - 1),)}, "by a power of two"),
        ({"transforms": (TransformEntry(op="from_end", value=9_000_001),)}, "with ids that its transforms make"),
    ],
)
def test_verify_tries_ids_that_the_sample_does_not_have(tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    """The sample has no padding, so it cannot tell one padding id from another."""
    batch = models.batch_of()
    batch["clicks"], batch["tags_values"] = batch["clicks"] % 20 + 1, batch["tags_values"] % 20
    package, _ = run(tmp_path, three_tables, [batch])
    assert verify(package.directory.path).findings == []
    changed = forge(Path(package.directory.path), tmp_path / "changed", **fields)
    findings = verify(str(changed)).findings
    assert len(findings) == 1
    assert "otherwise than the score program with " in findings[0]
    assert told in findings[0]


def test_a_package_as_a_source_keeps_the_contract_under_new_names(plain, tmp_path: Path) -> None:
    path, _, trained = plain
    settings = {"ckpt_dir": str(path), "export_dir": str(tmp_path / "again")}
    dist_export.export(settings | {"rename_tables": {"sparse_arch.*.weight": "{0}"}}, progress=False)
    package = dist_export.open_package(tmp_path / "again")
    assert {feature.table for feature in package.manifest.serving.features} == {"user", "clicks", "tags"}
    assert_same_inputs(package, trained, models.batch_of(9))
    assert not verify(str(tmp_path / "again")).findings


class Bag(nn.Module):
    """One list for each example, in tensors of any name."""

    def __init__(self, names: tuple[str, str], *, has_last: bool) -> None:
        super().__init__()
        self.names = names
        self.table = nn.EmbeddingBag(models.ROWS, models.DIM, mode="sum", include_last_offset=has_last)

    def forward(self, batch: models.Batch) -> models.Batch:
        return {"block": self.table(batch[self.names[0]], batch[self.names[1]]), "price": batch["price"]}


@pytest.mark.parametrize("has_last", [True, False])
@pytest.mark.parametrize(
    "names", [("tags_values", "tags_offsets"), ("v", "o"), ("tags", "ends"), ("values", "lengths")]
)
@pytest.mark.parametrize("last", [3, 0])
def test_what_bounds_lists_does_not_depend_on_names(
    names: tuple[str, str], has_last: bool, last: int, tmp_path: Path
) -> None:
    """Offsets with the last one were taken for offsets without it because of their name."""
    lengths = torch.tensor([2, 1, 0, 4, last])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    random = torch.Generator().manual_seed(1)
    batch = {
        names[0]: torch.randint(0, models.ROWS, (int(lengths.sum()),), generator=random),
        names[1]: offsets if has_last else offsets[:-1],
        "price": torch.rand(5, 1, generator=random),
    }
    build = lambda: models.Model(Bag(names, has_last=has_last), models.DIM + 1)
    package, trained = run(tmp_path, build, [batch])
    assert known_inputs(package) == ["block", "price"]
    assert_same_inputs(package, trained, batch)
