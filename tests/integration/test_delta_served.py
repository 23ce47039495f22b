"""Delta packages score and are served like full ones, and a server opens their base once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dist_export
from dist_export.cli import main
from dist_export.errors import PackageError
from dist_export.package.reader import Package
from dist_export.registry.base import Registered, resolve
from dist_export.registry.versions import VersionDirectory
from dist_export.serve.served import Watcher
from dist_export.verify.verify import verify
from dist_export.workdir import swap
from tests.support import score_models as models
from tests.support.delta_by_hand import edit


def change(model: Any, step: int) -> Any:
    """Change some rows of each table, and the dense arch."""
    with torch.no_grad():
        for number, table in enumerate((model.sparse_arch.user, model.sparse_arch.clicks, model.sparse_arch.tags)):
            table.weight[step + number :: 7] += 0.5
        model.dense_arch.mlp[0].bias += 0.1 * step
    return model


def export(model: Any, folder: Path, out: str, **settings: Any) -> Path:
    exporter = dist_export.Exporter(
        models.Model(models.ThreeTables(), 3 * models.DIM + 1),
        "sparse_arch",
        "dense_arch",
        [models.inputs_of(models.Model(models.ThreeTables(), 3 * models.DIM + 1), models.batch_of())],
        models.save(model, folder / f"{out}.pth"),
        folder / out,
        score_program="require",
        to_hash_tables=["sparse_arch.user.weight"],
        max_batch_size=1000,
        progress=False,
        **settings,
    )
    exporter.export()
    return folder / out


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base, two deltas on top of it, and the full package of the first delta's state."""
    folder = tmp_path_factory.mktemp("scores")
    model = models.train(models.Model(models.ThreeTables(), 3 * models.DIM + 1))
    found = {"base": export(model, folder, "base")}
    for step in (1, 2):
        change(model, step)
        found[f"delta-{step}"] = export(model, folder, f"delta-{step}", base=str(found["base"]))
        if step == 1:
            found["full-1"] = export(model, folder, "full-1")
    return found


def inputs_of(package: Path, seed: int = 0) -> dict[str, np.ndarray]:
    taken = [entry.name for entry in dist_export.open_package(package).manifest.score.inputs]
    return {name: value.numpy() for name, value in models.batch_of(50, seed).items() if name in taken}


def test_a_delta_scores_as_the_full_package_of_its_state(packages: dict[str, Path]) -> None:
    delta, full = (dist_export.open_package(packages[name]) for name in ("delta-1", "full-1"))
    inputs = inputs_of(packages["full-1"])
    assert [table.rows_out for table in delta.manifest.tables] == [4, 4, 5]
    assert np.array_equal(delta.score(inputs)["ctr"], full.score(inputs)["ctr"])
    assert not np.array_equal(delta.score(inputs)["ctr"], delta.base.score(inputs)["ctr"])
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.no_grad():
        found = delta.load_score_program().module()(**given)
    assert np.array_equal(np.asarray(found).reshape(-1), full.score(inputs)["ctr"].reshape(-1))
    stated, expected = (package.build_dense_inputs(inputs) for package in (delta, full))
    assert stated.keys() == expected.keys()
    assert all(np.array_equal(stated[name], expected[name]) for name in expected)


def test_the_sample_of_a_delta_is_verified_with_the_rows_of_both(packages: dict[str, Path]) -> None:
    report = verify(str(packages["delta-1"]))
    assert report.findings == []
    assert any(line.startswith("score program: loads") for line in report.checked)
    assert any(line.startswith("serving contract: gives") for line in report.checked)


def test_a_file_is_scored_with_a_delta(packages: dict[str, Path], tmp_path: Path) -> None:
    inputs = inputs_of(packages["full-1"])
    np.savez(tmp_path / "in.npz", **inputs)
    moved = shutil.copytree(packages["base"], tmp_path / "moved")
    written = {}
    for name, more in {"delta-1": ["--base", str(moved)], "full-1": []}.items():
        out = tmp_path / f"{name}.parquet"
        assert (
            main(["score", str(packages[name]), "--input", str(tmp_path / "in.npz"), "--output", str(out), *more]) == 0
        )
        written[name] = out.read_bytes()
    assert written["delta-1"] == written["full-1"]


def test_a_server_takes_a_base_that_was_moved(packages: dict[str, Path], tmp_path: Path) -> None:
    inputs = inputs_of(packages["full-1"])
    delta = shutil.copytree(packages["delta-1"], tmp_path / "served" / "delta")
    edit(delta, lambda its: its["base"].update(path=str(tmp_path / "gone")))
    with pytest.raises(PackageError):
        Watcher(str(delta))
    watcher = Watcher(str(delta), base=str(packages["base"]))
    expected = dist_export.open_package(packages["full-1"]).score(inputs)["ctr"]
    np.testing.assert_array_equal(ctr(watcher, inputs), expected)
    out = tmp_path / "report.html"
    assert main(["report", str(delta), "--out", str(out)]) == 2
    assert main(["report", str(delta), "--base", str(packages["base"]), "--out", str(out)]) == 0
    assert out.exists()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the packages that a server opens, without what ``verify`` opens."""
    names: list[str] = []
    inside = Package.__init__

    def record(package: Package, directory: Any, **more: Any) -> None:
        names.append(os.path.basename(directory.path))
        inside(package, directory, **more)

    monkeypatch.setattr(Package, "__init__", record)
    return names


def put(source: Path, path: Path) -> None:
    """Replace the package at a path as an export does."""
    later = shutil.copytree(source, path.with_name("later"))
    swap.replace_directory(str(later), str(path)) if path.exists() else later.rename(path)
    shutil.rmtree(path.with_name("later"), ignore_errors=True)


def ctr(watcher: Watcher, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return watcher.current.models["score"].infer(inputs)["ctr"]


def test_a_server_goes_from_delta_to_delta_with_one_base(packages: dict[str, Path], tmp_path: Path, opened) -> None:
    inputs, served = inputs_of(packages["full-1"]), tmp_path / "served"
    expected = {step: dist_export.open_package(packages[f"delta-{step}"]).score(inputs)["ctr"] for step in (1, 2)}
    put(packages["delta-1"], served)
    opened.clear()
    watcher = Watcher(str(served), checks=False)
    assert opened == ["served", "base"]
    assert np.array_equal(ctr(watcher, inputs), expected[1])
    before = watcher.current
    put(packages["delta-2"], served)
    watcher.check_now()
    assert opened == ["served", "base", "served"]
    assert watcher.num_swaps == 1
    assert watcher.current.package.base is before.package.base
    assert np.array_equal(ctr(watcher, inputs), expected[2])
    # requests that began with the old package end with it, and its end leaves the base to the new one
    assert np.array_equal(before.models["score"].infer(inputs)["ctr"], expected[1])
    before.package.close()
    assert np.array_equal(ctr(watcher, inputs), expected[2])


def test_a_server_goes_from_the_base_to_a_delta_and_back(packages: dict[str, Path], tmp_path: Path, opened) -> None:
    """As in a directory of versions: the package that is served becomes the base."""
    folder, inputs = tmp_path / "serving", inputs_of(packages["full-1"])
    names = ("base", "delta-1", "delta-2")
    expected = {name: dist_export.open_package(packages[name]).score(inputs)["ctr"] for name in names}
    registry, uri = VersionDirectory(), f"versions:{folder}"
    for name in expected:
        shutil.copytree(packages[name], folder / "versions" / name)

    def switch(name: str) -> None:
        where = folder / "versions" / name
        if any(version.name == name for version in (registry.list_versions(str(folder)) if registry.look(uri) else [])):
            registry.rollback(str(folder), name)
        else:
            digest = dist_export.open_package(where).manifest.digest
            registry.register(uri, Registered(str(where), "", digest, (), (), {}, seen=registry.look(uri)))
        assert resolve(uri, {}).uri.endswith(name)
        opened.clear()

    switch("base")
    watcher = Watcher(uri, checks=False)
    for name, anew in (("delta-1", ["delta-1"]), ("delta-2", ["delta-2"]), ("base", ["base"])):
        switch(name)
        watcher.check_now()
        assert opened == anew
        assert np.array_equal(ctr(watcher, inputs), expected[name])


def test_a_delta_is_checked_with_its_base_before_it_is_served(packages: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(packages["base"], tmp_path / packages["base"].name)
    delta = shutil.copytree(packages["delta-1"], tmp_path / "delta")
    assert Watcher(str(delta)).current.package.base is not None
    edit(delta, lambda document: document["base"].update(path=str(base)))
    shard = next(base.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        PackageError, match=r"base is unsound: model-000000-of-\d+.safetensors: its content is not what was"
    ):
        Watcher(str(delta))


def test_a_delta_without_its_base_is_not_served(packages: dict[str, Path], tmp_path: Path) -> None:
    served = tmp_path / "served"
    put(packages["full-1"], served)
    watcher = Watcher(str(served))
    broken = shutil.copytree(packages["delta-2"], tmp_path / "broken")
    edit(broken, lambda document: document["base"].update(path="/nowhere/x"))
    put(broken, served)
    watcher.check_now()
    assert (watcher.num_swaps, watcher.num_refused) == (0, 1)
    assert watcher.current.package.base is None
