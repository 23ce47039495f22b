"""The drift of whole exports, against numbers that are computed here from the checkpoint's rows and the trainer's parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import dist_export
from dist_export.checkpoint import id_reader as ids_module
from dist_export.errors import ConfigError, DriftError
from tests.support import exports, tiny_model
from tests.support.live_models import LiveTable

USERS = {
    int(i): row for p in tiny_model.tables()["user_emb"] for i, row in zip(p.ids, p.slots["embedding"], strict=True)
}
ITEMS = {
    int(i): row for p in tiny_model.tables()["item_emb"] for i, row in zip(p.ids, p.slots["embedding"], strict=True)
}
USER_IDS, ITEM_IDS = sorted(USERS), sorted(ITEMS)
UNKNOWN = 999_999_999


def batch_of(users: list[int], items: list[int] | None = None) -> dict[str, torch.Tensor]:
    items = items or [ITEM_IDS[i % len(ITEM_IDS)] for i in range(len(users))]
    return {
        "user": torch.tensor(users),
        "item": torch.tensor(items),
        "price": torch.linspace(0, 1, len(users))[:, None],
    }


def batches(num: int = 3, rows: int = 6) -> list[dict[str, torch.Tensor]]:
    return [batch_of(USER_IDS[k * rows : (k + 1) * rows]) for k in range(num)]


def scores(batch, users) -> dict[str, torch.Tensor]:
    """What a trained dense arch gives for these rows."""
    dense = tiny_model.DenseArch()
    state = tiny_model.trained_dense_state()
    dense.load_state_dict({name.removeprefix("dense_arch."): value for name, value in state.items()})
    blocks = {
        "user": torch.from_numpy(np.stack([users(int(i)) for i in batch["user"]])),
        "item": torch.from_numpy(np.stack([ITEMS[int(i)] for i in batch["item"]])),
        "price": batch["price"],
    }
    with torch.no_grad():
        return dense.eval()(blocks)


def expected(data, users_now, users_then=lambda i: USERS.get(i, np.zeros(4, np.float32))):
    """By output: largest and mean difference and swapped pairs, over all pairs of every batch."""
    found = {}
    for name in ("ctr", "like"):
        then = [scores(b, users_then)[name].double().flatten() for b in data]
        now = [scores(b, users_now)[name].double().flatten() for b in data]
        apart = torch.cat([(x - y).abs() for x, y in zip(then, now, strict=True)])
        pairs = [
            ((x[i] - x[j]) * (y[i] - y[j])).item()
            for x, y in zip(then, now, strict=True)
            for i in range(len(x))
            for j in range(i)
        ]
        swapped = sum(product < 0 for product in pairs)
        found[name] = (float(apart.max()), float(apart.mean()), sum(product != 0 for product in pairs), swapped)
    return found


def export(tmp_path: Path, data, **settings):
    checkpoint = tmp_path / "ckpt"
    if not checkpoint.exists():
        tiny_model.write_tiny_checkpoint(checkpoint)
    model = settings.pop("model", None) or tiny_model.build_model()
    return exports.exporter(
        model, "sparse_arch", "dense_arch", data, checkpoint, tmp_path / "out", filter_sparse_opt=True, **settings
    ).export()


def check(drift, wanted) -> None:
    for name, (max_abs, mean_abs, pairs, swapped) in wanted.items():
        entry = drift.outputs[name]
        assert entry.max_abs == pytest.approx(max_abs, rel=1e-4, abs=1e-9), name
        assert entry.mean_abs == pytest.approx(mean_abs, rel=1e-4, abs=1e-9), name
        assert (entry.pairs, entry.pairs_swapped) == (pairs, swapped), name


def test_without_a_transformation_nothing_drifts(tmp_path: Path) -> None:
    manifest = export(tmp_path, batches(6))
    assert (manifest.drift.batches, manifest.drift.rows, manifest.drift.skipped) == (4, 24, 0)
    for entry in manifest.drift.outputs.values():
        assert (entry.max_abs, entry.mean_abs, entry.pairs_swapped, entry.not_finite) == (0.0, 0.0, 0, 0)
        assert entry.pairs == 4 * 15
    assert manifest.run["drift"] == {"ids": 48, "without_row": 0, "pruned": 0}


@pytest.mark.parametrize("default", [None, [0.5, -0.5, 2.0, 1.0]])
def test_pruned_rows_drift_by_what_they_were(default, tmp_path: Path) -> None:
    data = [*batches(2), batch_of([*USER_IDS[3:6], UNKNOWN])]
    gone = [USER_IDS[1], USER_IDS[4], USER_IDS[9]]
    (tmp_path / "deny.txt").write_text("".join(f"{i}\n" for i in gone))
    more = {} if default is None else {"default_row": {"user_emb": default}}
    rules = [{"tables": "user_emb", "deny": str(tmp_path / "deny.txt")}]
    manifest = export(tmp_path, data, prune=rules, **more)
    lacking = np.array(default or [0.0] * 4, np.float32)
    wanted = expected(
        data,
        lambda i: lacking if i in gone else USERS.get(i, lacking),
        lambda i: USERS.get(i, lacking),  # an id without a row has serving's row on both sides
    )
    assert wanted["ctr"][0] > 1e-3
    check(manifest.drift, wanted)
    assert manifest.run["drift"] == {"ids": 32, "without_row": 1, "pruned": 4}


def test_a_cast_drifts_by_its_rounding(tmp_path: Path) -> None:
    data = batches(3)
    manifest = export(tmp_path, data, dtype={"user_emb": "bfloat16"})
    wanted = expected(data, lambda i: torch.from_numpy(USERS[i]).bfloat16().float().numpy())
    assert wanted["ctr"][0] > 0
    check(manifest.drift, wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_an_id_without_a_row_has_servings_row_on_both_sides_as_the_cast_rounds_it(dtype, tmp_path: Path) -> None:
    """A pruned one does not: its own row is unmodified, and the package has the default row."""
    default, gone = [0.1, -0.37, 1.0 / 3, 0.7], USER_IDS[2]
    (tmp_path / "deny.txt").write_text(f"{gone}\n")
    settings = {
        "dtype": {"user_emb": dtype},
        "default_row": {"user_emb": default},
        "prune": [{"tables": "user_emb", "deny": str(tmp_path / "deny.txt")}],
    }
    manifest = export(tmp_path, [batch_of([UNKNOWN] * 3)], **settings)
    assert (manifest.drift.outputs["ctr"].max_abs, manifest.drift.outputs["like"].max_abs) == (0.0, 0.0)
    served = dist_export.open_package(tmp_path / "out").lookup("user_emb", [UNKNOWN])[0][0]
    assert not np.array_equal(served, np.array(default, np.float32)), "nothing is rounded"
    data = [batch_of([UNKNOWN, gone])]
    manifest = export(tmp_path, data, overwrite=True, **settings)
    check(manifest.drift, expected(data, lambda _: served, lambda i: USERS.get(i, served)))


def test_ids_without_a_row_have_the_default_row_in_hash_tables_and_none_is_left_there(tmp_path: Path) -> None:
    model = tiny_model.build_model()
    manifest = export(
        tmp_path, [batch_of([*USER_IDS[:3], UNKNOWN])], model=model, default_row={"user_emb": [1.0, 2.0, 3.0, 4.0]}
    )
    assert manifest.drift.outputs["ctr"].max_abs == 0.0
    assert manifest.run["drift"] == {"ids": 8, "without_row": 1, "pruned": 0}
    assert UNKNOWN not in model.sparse_arch.user.ids().tolist()
    sample = json.loads((tmp_path / "out" / "fx_user_model" / "inputs_dict.json").read_text())
    assert sample["user"]["values"][3] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_drift": 1e-4}, r"max_drift: .*'ctr' by up to .*allowed 0.0001"),
        ({"max_drift": {"like": 1e-5}}, r"'like' by up to .*allowed 1e-05"),
    ],
)
def test_a_drift_above_the_bound_stops_the_commit(settings, told, tmp_path: Path) -> None:
    (tmp_path / "deny.txt").write_text(f"{USER_IDS[0]}\n")
    prune = [{"tables": "user_emb", "deny": str(tmp_path / "deny.txt")}]
    with pytest.raises(DriftError, match=told) as caught:
        export(tmp_path, batches(1), prune=prune, **settings)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert export(tmp_path, batches(1), prune=prune, max_drift={"ctr": 1.0}).drift.outputs["ctr"].max_abs > 1e-4


def test_a_bound_for_an_output_that_is_not_there_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_drift: nope is no output of the dense arch; its outputs: ctr, like"):
        export(tmp_path, batches(1), max_drift={"nope": 1.0})
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    with pytest.raises(ConfigError, match="needs model and dataset"):
        exports.exporter(
            None, None, None, None, tmp_path / "ckpt", tmp_path / "out", filter_sparse_opt=True, max_drift=1.0
        ).export()


@pytest.mark.parametrize(("setting", "num"), [(0, None), (1, 1), (2, 2), (9, 3)])
def test_as_many_batches_as_there_are_and_as_are_asked_for(setting, num, tmp_path: Path) -> None:
    manifest = export(tmp_path, iter(batches(3)), drift_batches=setting)
    assert (manifest.drift and manifest.drift.batches) == num


def test_batches_of_one_buffer_are_batches_of_their_own(tmp_path: Path) -> None:
    data = batches(3)

    def load():
        buffer = {name: tensor.clone() for name, tensor in data[0].items()}
        for batch in data:
            for name, tensor in batch.items():
                buffer[name].copy_(tensor)
            yield buffer

    manifest = export(tmp_path, load(), dtype={"user_emb": "bfloat16"})
    check(manifest.drift, expected(data, lambda i: torch.from_numpy(USERS[i]).bfloat16().float().numpy()))
    sample = json.loads((tmp_path / "out" / "fx_user_model" / "inputs_dict.json").read_text())
    assert sample["user"]["values"] == [torch.from_numpy(USERS[i]).bfloat16().tolist() for i in USER_IDS[:6]]


class Whole(tiny_model.TinyModel):
    """Runs as a whole, and needs a label."""

    def forward(self, batch):
        return self.dense_arch(self.sparse_arch(batch))["ctr"].mean() + batch["label"]


class FailsAtThree(tiny_model.DenseArch):
    """Fails on a batch of three rows."""

    def forward(self, blocks):
        if not torch.compiler.is_compiling() and blocks["price"].shape[0] == 3:
            raise ValueError("three rows")
        return super().forward(blocks)


def whole_model() -> Whole:
    model = Whole()
    model.load_state_dict(tiny_model.build_model().state_dict())
    return model


def failing_model() -> tiny_model.TinyModel:
    model = tiny_model.build_model()
    model.dense_arch = FailsAtThree()
    return model


class NoNumbers(tiny_model.DenseArch):
    """One of its scores is NaN for every row."""

    def forward(self, blocks):
        scores = super().forward(blocks)
        return {"ctr": (scores["ctr"] - 2).sqrt(), "like": scores["like"]}


def ends_in_an_error():
    yield from batches(2)
    raise OSError("the next file is gone")


def labelled(data):
    return [{**batch, "label": torch.ones(())} for batch in data[:2]] + data[2:]


FAILING = {
    "dataset": (None, ends_in_an_error, "the dataset fails: OSError: the next file is gone"),
    "sparse arch": (None, lambda: [*batches(2), {"user": torch.tensor(USER_IDS[:2])}], "the sparse arch fails on it: KeyError"),
    "model": (whole_model, lambda: labelled(batches(4)), r"model\(batch\) fails: KeyError: 'label'"),
    "dense arch": (
        failing_model, lambda: [*batches(2), batch_of(USER_IDS[:3]), *batches(1)], "the dense arch fails on it: ValueError: three"
    ),
}  # fmt: skip


def test_scores_that_are_no_numbers_are_told_and_cannot_be_bounded(tmp_path: Path) -> None:
    model = tiny_model.build_model()
    model.dense_arch = NoNumbers()
    with pytest.raises(DriftError, match=r"max_drift: .*'ctr' has no finite score in any batch") as caught:
        export(tmp_path, batches(2), model=model, dtype={"user_emb": "int8"}, max_drift=1.0)
    assert "like" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = export(tmp_path, batches(2), model=model, dtype={"user_emb": "int8"}, max_drift={"like": 1.0})
    said = "the model's scores of the sample are not finite: 'ctr' in 6 of 6;"
    assert any(note.startswith(said) for note in manifest.notes)


@pytest.mark.parametrize("case", FAILING)
def test_a_later_batch_that_fails_ends_the_drift_and_not_the_export(case: str, tmp_path: Path) -> None:
    model, data, told = FAILING[case]
    manifest = export(tmp_path, data(), model=model and model(), dtype={"user_emb": "bfloat16"})
    assert any(re.match(f"drift is measured on the batches before batch 3: {told}", note) for note in manifest.notes)
    assert (manifest.drift.batches, manifest.drift.rows, manifest.drift.skipped) == (2, 12, 0)
    assert manifest.parity.reference == ("model" if case == "model" else "arches")
    check(manifest.drift, expected(batches(2), lambda i: torch.from_numpy(USERS[i]).bfloat16().float().numpy()))


def test_a_table_is_scanned_once_for_all_batches(tmp_path: Path, monkeypatch) -> None:
    scans = []
    real = ids_module.read_ids

    def read_ids(checkpoint, part):
        scans.append((id(checkpoint), part))
        return real(checkpoint, part)

    monkeypatch.setattr("dist_export.dense.source_rows.read_ids", read_ids)
    export(tmp_path, batches(4))
    assert len(scans) == len(set(scans)), "a part was scanned more than once"
    assert len(scans) == 4 + 2, "two parts of each of two tables in the source, and one in the package"


def test_batches_whose_rows_do_not_fit_into_memory_are_left_out_with_a_note(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dist_export.dense.drift_run._COPIES", 1 << 20)
    manifest = export(tmp_path, batches(4))
    assert manifest.drift.batches == 2
    assert any("drift is measured on 2 of 4 batches" in note for note in manifest.notes)


def test_a_batch_of_another_shape_is_left_out_and_counted(tmp_path: Path) -> None:
    class Wide(tiny_model.DenseArch):
        def forward(self, blocks):
            return super().forward(blocks | {"price": blocks["price"].mean(1, keepdim=True)})

    model = tiny_model.build_model()
    model.dense_arch = Wide()
    data = batches(3)
    data[1]["price"] = data[1]["price"].repeat(1, 2)
    drift = export(tmp_path, data, model=model).drift
    assert (drift.batches, drift.rows, drift.skipped) == (2, 12, 1)


def test_the_dense_arch_alone_has_a_drift_too(tmp_path: Path) -> None:
    manifest = export(tmp_path, batches(2), need_export_sparse=False)
    assert (manifest.drift.batches, manifest.drift.outputs["ctr"].max_abs) == (2, 0.0)


def test_a_pruned_row_of_a_model_in_memory_drifts_in_any_batch(tmp_path: Path) -> None:
    model = tiny_model.build_model()
    rows = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    model.sparse_arch.user = LiveTable("user_emb", np.arange(20), rows)
    model.sparse_arch.item = LiveTable("item_emb", np.arange(20), rows)
    (tmp_path / "deny.txt").write_text("9\n")
    data = [batch_of(list(range(a, b)), list(range(a, b))) for a, b in ((4, 8), (8, 13))]
    prune = [{"tables": "user_emb", "deny": str(tmp_path / "deny.txt")}]
    out = tmp_path / "out"
    manifest = exports.exporter(model, "sparse_arch", "dense_arch", data, None, out, prune=prune).export()
    assert manifest.drift.batches == 2
    assert manifest.drift.outputs["ctr"].max_abs > 1e-5
    assert manifest.run["drift"] == {"ids": 18, "without_row": 0, "pruned": 1}
    assert torch.equal(model.sparse_arch.user(torch.tensor([9]))[0], torch.from_numpy(rows[9]))
