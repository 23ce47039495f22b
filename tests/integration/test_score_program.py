"""The score program: the whole model as one exported program, whose lookups read rows from the package's shards."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export.api import Exporter
from dist_export.errors import ConfigError, ModelError, PackageError, ParityError, UserError
from dist_export.package.score import PackageRows
from dist_export.score.bags import MISFIT
from dist_export.verify.verify import verify
from tests.support import score_models as models


def run(tmp_path: Path, build, dataset=None, *, out: str = "out", seed: int = 5, **settings):
    """Export a trained model from a checkpoint into ``out``; return the package and the trained model."""
    trained = models.train(build(), seed)
    checkpoint = models.save(trained, tmp_path / f"{out}.pth")
    settings = {"score_program": "require", **settings}
    dataset = [models.inputs_of(trained, models.batch_of())] if dataset is None else dataset
    Exporter(build(), "sparse_arch", "dense_arch", dataset, checkpoint, tmp_path / out, **settings).export(
        progress=False
    )
    return dist_export.open_package(tmp_path / out), trained


def three_tables() -> nn.Module:
    return models.Model(models.ThreeTables(), 3 * models.DIM + 1)


def one_table(look=models.WAYS["embedding"][1], make=lambda: nn.Embedding(models.ROWS, models.DIM)):
    return lambda: models.Model(models.Lookups(make(), look), models.DIM + 1)


def scores(model: nn.Module, batch: Any) -> np.ndarray:
    with torch.no_grad():
        return model(batch)["ctr"].numpy()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def reason_of(tmp_path: Path, build, dataset=None, **settings) -> str:
    """Return the one note on the score program of an export that goes on without it."""
    package, _ = run(tmp_path, build, dataset, score_program="auto", **settings)
    notes = [note for note in package.manifest.notes if "score program" in note]
    assert len(notes) == 1
    assert "score" not in {file.path.split("_")[0] for file in package.manifest.files}
    with pytest.raises(PackageError, match="has no score program"):
        package.score({})
    return notes[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A package of three tables, which no test changes, and the trained model. The sample has more than the model reads."""
    folder = tmp_path_factory.mktemp("plain")
    _, trained = run(folder, three_tables, [models.batch_of()])
    return folder / "out", trained


def test_a_package_scores_from_ids_as_the_trained_model_does(plain) -> None:
    package, trained = dist_export.open_package(plain[0]), plain[1]
    for num_examples in (1, 2, 128):
        batch = models.batch_of(num_examples, seed=num_examples)
        found = package.score(batch)
        assert list(found) == ["ctr"]
        assert_close(found["ctr"], scores(trained, batch))
    entry = package.manifest.score
    assert entry.parity.batch_sizes == (6, 1, 2, 301)
    assert entry.parity.reference == "model"
    assert entry.dropped_inputs == ("tags_weights", "tags_bounds", "factor", "label")
    assert entry.tables == ("sparse_arch.clicks.weight", "sparse_arch.tags.weight", "sparse_arch.user.weight")
    shapes = {tensor.name: tensor.shape for tensor in entry.inputs}
    assert shapes == {
        "user": ("batch",),
        "clicks": ("batch", "clicks_size_1"),
        "tags_values": ("tags_values_size",),
        "tags_offsets": ("batch",),
        "price": ("batch", 1),
    }
    assert entry.outputs[0].shape == ("batch", 1)


def test_the_program_holds_no_table_and_has_the_manifests_names(plain) -> None:
    package = dist_export.open_package(plain[0])
    program = package.load_score_program()
    assert sorted(program.state_dict) == [
        f"model.dense_arch.mlp.{layer}.{name}" for layer in (0, 2) for name in ("bias", "weight")
    ]
    raw = (plain[0] / package.manifest.score.program).read_bytes()
    assert b'"sparse_arch.user.weight"' in raw
    assert b"\\u001f" not in raw


def test_every_way_to_look_rows_up_gives_the_models_scores(tmp_path: Path) -> None:
    build = lambda: models.Model(models.AllWays(), len(models.WAYS) * models.DIM + 1)
    package, trained = run(tmp_path, build)
    for num_examples in (1, 2, 50):
        batch = models.batch_of(num_examples, seed=num_examples)
        assert_close(package.score(batch)["ctr"], scores(trained, batch))
    shapes = {tensor.name: tensor.shape for tensor in package.manifest.score.inputs}
    assert shapes["tags_bounds"] == ("batch + 1",)
    whole = models.batch_of(4, seed=4)
    for name, shift in (("tags_bounds", 1), ("tags_bounds", -1), ("tags_offsets", 100)):
        batch = {**whole, name: whole[name].clone()}
        batch[name][-1] += shift
        with pytest.raises(UserError, match=MISFIT):
            package.score(batch)


def test_a_batch_without_ids_and_with_one_is_scored(plain) -> None:
    package, trained = dist_export.open_package(plain[0]), plain[1]
    for num_ids in (0, 1):
        batch = models.batch_of(3)
        batch["tags_values"] = torch.zeros(num_ids, dtype=torch.int64)
        batch["tags_offsets"] = torch.tensor([0, 0, num_ids])
        assert_close(package.score(batch)["ctr"], scores(trained, batch))


def test_a_sample_of_one_example_is_enough(tmp_path: Path) -> None:
    package, trained = run(tmp_path, three_tables, [models.batch_of(1)])
    batch = models.batch_of(9, seed=3)
    assert_close(package.score(batch)["ctr"], scores(trained, batch))


def test_it_works_with_torch_alone_far_from_the_models_code(plain, tmp_path: Path) -> None:
    package, trained = dist_export.open_package(plain[0]), plain[1]
    batch = models.batch_of(4, seed=8)
    np.savez(tmp_path / "in.npz", expected=scores(trained, batch), **{name: its.numpy() for name, its in batch.items()})
    code = """
import sys
import numpy as np
import dist_export
inputs = dict(np.load(sys.argv[2]))
expected = inputs.pop("expected")
np.testing.assert_allclose(dist_export.open_package(sys.argv[1]).score(inputs)["ctr"], expected, rtol=1e-5, atol=1e-6)
rooms = ("score.", "dense.", "pipeline.", "checkpoint.", "model.", "transfer.", "plan.")
assert not [name for name in sys.modules if name.startswith(tuple("dist_export." + room for room in rooms))]
assert "score_models" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, package.directory.path, str(tmp_path / "in.npz")], cwd="/", check=True)


def test_packages_with_the_same_table_names_live_side_by_side_in_threads(tmp_path: Path) -> None:
    pairs = [run(tmp_path, three_tables, out=f"out{seed}", seed=seed) for seed in (1, 2)]
    batches = [models.batch_of(5, seed=seed) for seed in range(4)]
    wrong: list[int] = []

    def work(number: int) -> None:
        package, trained = pairs[number % 2]
        for batch in batches * 3:
            if not np.allclose(package.score(batch)["ctr"], scores(trained, batch), rtol=1e-5, atol=1e-6):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not np.allclose(pairs[0][0].score(batches[0])["ctr"], pairs[1][0].score(batches[0])["ctr"])


def test_a_program_keeps_its_package_and_a_package_is_not_kept_by_its_scores(plain) -> None:
    import weakref

    package, trained = dist_export.open_package(plain[0]), plain[1]
    batch = models.batch_of(3)
    package.score(batch)
    module = package.load_score_program().module()
    gone = weakref.ref(package.files)
    del package
    gc.collect()
    inputs = {name: batch[name] for name in ("user", "clicks", "tags_values", "tags_offsets", "price")}
    assert_close(module(**inputs)[0].detach().numpy(), scores(trained, batch))
    del module
    gc.collect()
    assert gone() is None
    scored = dist_export.open_package(plain[0])
    scored.score(batch)
    gone = weakref.ref(scored.files)
    gc.disable()
    try:
        del scored
        assert gone() is None  # at once: a server that swaps packages must not wait for the collector
    finally:
        gc.enable()


def test_the_callers_tensors_stay_as_they_are(tmp_path: Path) -> None:
    """A sparse arch may write into its batch; a server's tensors are not written into."""
    package, trained = run(tmp_path, one_table(lambda its, batch: its.table(batch["user"].clamp_(max=3))))
    batch = {"user": torch.arange(8), "price": torch.ones(8, 1)}
    found = package.score(batch)["ctr"]
    assert torch.equal(batch["user"], torch.arange(8))
    assert_close(found, scores(trained, batch))


def test_wrong_inputs_are_one_sentence(plain) -> None:
    package = dist_export.open_package(plain[0])
    batch = models.batch_of(3)
    for change, told in (
        ({"user": None}, "input 'user' is missing; the score program takes user, clicks"),
        ({"price": torch.rand(3)}, r"input 'price' has the shape \[3\], expected \[batch, 1\]"),
        ({"price": torch.rand(3, 2)}, r"input 'price' has the shape \[3, 2\]"),
        ({"user": torch.rand(3)}, "input 'user' is torch.float32, expected torch.int64"),
        ({"user": torch.tensor([1, 2])}, r"refuses inputs of these shapes: user \[2\]"),
    ):
        changed = {name: its for name, its in (batch | change).items() if its is not None}
        with pytest.raises(UserError, match=told):
            package.score(changed)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (
            one_table(make=lambda: nn.Embedding(models.ROWS, models.DIM, max_norm=1.0)),
            r"has max_norm.*score_models\.py",
        ),
        (
            one_table(lambda its, batch: its.table(batch["user"]) + its.table.weight.mean(0)),
            r"reads table 'sparse_arch\.table\.weight' by \.mean, not by looking ids up.*test_score_program\.py",
        ),
        (
            one_table(lambda its, batch: its.table(batch["user"]) * (2 if batch["user"].sum().item() else 1)),
            r"takes a Python number from a tensor.*test_score_program\.py:\d+ .*item\(\)",
        ),
        (
            one_table(lambda its, batch: its.table(batch["user"]).reshape(6, models.DIM)),
            r"the first dimension of input 'user' stays 6",
        ),
    ],
    ids=["max_norm", "whole", "item", "fixed"],
)
def test_what_cannot_be_exported_is_a_note_that_names_the_line(tmp_path: Path, build, told: str) -> None:
    note = reason_of(tmp_path, build)
    assert note.startswith("the package has no score program: ")
    import re

    assert re.search(told, note)


@pytest.fixture
def doubled():
    with torch.library._scoped_library("dist_export_tests", "DEF") as library:
        library.define("doubled(Tensor x) -> Tensor")
        library.impl("doubled", lambda x: x * 2, "CPU")
        torch.library.register_fake("dist_export_tests::doubled", torch.empty_like, lib=library)
        yield torch.ops.dist_export_tests.doubled


def test_require_is_an_error_before_anything_is_written(tmp_path: Path, doubled) -> None:
    build = one_table(lambda its, batch: doubled(its.table(batch["user"])))
    with pytest.raises(
        ModelError, match=r"require.*operator dist_export_tests\.doubled.*not torch's own at .*score_models\.py:\d+ "
    ):
        run(tmp_path, build)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_batch_that_gives_no_inputs_is_a_note(tmp_path: Path) -> None:
    batch = models.batch_of()
    build = one_table(lambda its, batch: its.table(batch["my user"]))
    assert "cannot be an argument named 'my user'" in reason_of(tmp_path, build, [{**batch, "my user": batch["user"]}])


def test_off_writes_none_and_says_nothing(tmp_path: Path) -> None:
    package, _ = run(tmp_path, three_tables, score_program="off")
    assert "score" not in json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert not (tmp_path / "out" / "score_program").exists()
    assert not any("score program" in note for note in package.manifest.notes)


def test_settings_that_contradict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lookup_modules are of the score program, but score_program is off"):
        run(tmp_path, three_tables, score_program="off", lookup_modules=["*"])
    with pytest.raises(ConfigError, match="needs model, dataset and tables"):
        Exporter(
            None, "sparse_arch", "dense_arch", None, models.save(three_tables(), tmp_path / "a.pth"), tmp_path / "out",
            score_program="require", treat_as_tables=["sparse_arch.*"],
        ).export(progress=False)  # fmt: skip


def test_another_setting_is_another_export(tmp_path: Path) -> None:
    run(tmp_path, three_tables, score_program="off")
    with pytest.raises(UserError, match="overwrite"):
        run(tmp_path, three_tables, score_program="auto")


def test_wrong_rows_stop_the_commit(tmp_path: Path, monkeypatch) -> None:
    find_rows = PackageRows.find_rows
    monkeypatch.setattr(PackageRows, "find_rows", lambda self, table, ids: find_rows(self, table, ids + 1))
    with pytest.raises(ParityError, match=r"output 'ctr' on the sample: the score program differs from the model"):
        run(tmp_path, three_tables)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_auto_leaves_a_program_out_that_alone_differs_on_the_written_rows(tmp_path: Path, monkeypatch) -> None:
    find_rows = PackageRows.find_rows
    monkeypatch.setattr(PackageRows, "find_rows", lambda self, table, ids: find_rows(self, table, ids + 1))
    note = reason_of(tmp_path, three_tables)
    assert "on rows of the written shards, output 'ctr' on the sample: the score program differs" in note
    assert not (tmp_path / "out" / "score_program").exists()
    assert verify(str(tmp_path / "out")).findings == []


class Counting(nn.Module):
    """A sparse arch with a buffer that each call changes; ``is_read`` tells whether the blocks depend on it."""

    def __init__(self, *, is_read: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(models.ROWS, models.DIM)
        self.register_buffer("calls", torch.zeros(()))
        self.is_read = is_read

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.calls += 1
        rows = self.table(batch["user"])
        return {"user": rows * self.calls if self.is_read else rows, "price": batch["price"]}


def test_scores_that_depend_on_the_call_before_are_a_note(tmp_path: Path) -> None:
    build = lambda: models.Model(Counting(is_read=True), models.DIM + 1)
    assert "no score program: forward changes sparse_arch.calls, and its outputs" in reason_of(tmp_path, build)


def test_a_counter_that_no_score_depends_on_is_no_hindrance(tmp_path: Path) -> None:
    package, trained = run(tmp_path, lambda: models.Model(Counting(is_read=False), models.DIM + 1))
    for seed in (1, 2):
        batch = models.batch_of(5, seed)
        assert_close(package.score(batch)["ctr"], scores(trained, batch))


def test_a_batch_that_cannot_be_cut_is_compared_on_further_batches(tmp_path: Path) -> None:
    def batch(seed: int) -> dict[str, torch.Tensor]:
        made = models.batch_of(6, seed)
        return {"user": made["user"], "price": made["price"], "history": torch.arange(9 + seed) % 5}

    build = one_table(lambda its, batch: its.table(batch["user"]) + its.table(batch["history"]).mean(0))
    package, trained = run(tmp_path, build, [batch(seed) for seed in range(3)])
    parity = package.manifest.score.parity
    assert (parity.batch_sizes, parity.further_batches) == ((6,), 2)
    assert_close(package.score(batch(7))["ctr"], scores(trained, batch(7)))
    assert verify(package.directory.path).findings == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_cast_rows_are_scored_as_they_are_served(tmp_path: Path, dtype: str) -> None:
    package, trained = run(tmp_path, three_tables, dtype={"*": dtype})
    assert package.manifest.score.parity.reference == "copy"
    for name in ("user", "clicks", "tags"):
        table = f"sparse_arch.{name}.weight"
        rows, _ = package.lookup(table, np.arange(models.ROWS))
        with torch.no_grad():
            getattr(trained.sparse_arch, name).weight.copy_(torch.from_numpy(rows))
    batch = models.batch_of(12, seed=4)
    assert_close(package.score(batch)["ctr"], scores(trained, batch))


def test_the_same_export_gives_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        package, _ = run(tmp_path, three_tables, out=name)
        entry = package.manifest.score
        files.append([(tmp_path / name / path).read_bytes() for path in (entry.program, entry.sample)])
    assert files[0] == files[1]
