"""A package does not depend on which kernels made it, and each implementation verifies and opens what the other wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import dist_export
from dist_export.kernels import selection
from dist_export.kernels.selection import VARIABLE, select_kernels
from dist_export.verify.verify import verify
from tests.support.kernels import open_kernels
from tests.support.recis_writer import make_tables, truth_of, write_checkpoint
from tests.support.sparse_cases import export

TABLES = {"wide": 3_000, "narrow": 70_000, "half": 2_000, "brain": 1_500, "small": 40}
SETTINGS = {
    "num_shards": 3,
    "dtype": {"half": "float16", "brain": "bfloat16", "wide": "int8"},
    "prune": [{"tables": "narrow", "norm_at_most": 0.8}],
}


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    def chosen(name: str) -> None:
        monkeypatch.setenv(VARIABLE, name)
        selection._select.cache_clear()
        assert select_kernels().description.startswith(name)

    open_kernels("plain C")  # skips without the library
    yield chosen
    selection._select.cache_clear()


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    del found["manifest.json"]  # it has times
    return found


def test_both_implementations_write_the_same_package(choose, tmp_path: Path) -> None:
    tables = make_tables(TABLES, 2, dim=12)
    write_checkpoint(tmp_path / "ckpt", tables)
    manifests = {}
    for name in ("numpy", "compiled"):
        choose(name)
        export(tmp_path / "ckpt", tmp_path / name, **SETTINGS)
        manifests[name] = dist_export.open_package(tmp_path / name).manifest
    assert contents(tmp_path / "numpy") == contents(tmp_path / "compiled")
    assert manifests["numpy"].digest == manifests["compiled"].digest, "sums of errors too have the same bits"
    text = (tmp_path / "numpy" / "manifest.json").read_text()
    assert '"mean_abs_error"' in text, "the sums that are compared are in the manifest"
    truth = truth_of(tables)["small"]
    for writer, reader in (("numpy", "compiled"), ("compiled", "numpy")):
        choose(reader)
        assert not verify(str(tmp_path / writer)).count()
        rows, found = dist_export.open_package(tmp_path / writer).lookup("small", [*truth["id"].tolist(), -77])
        assert found.tolist() == [True] * 40 + [False]
        assert np.array_equal(rows[:40], truth["embedding"])
        assert not rows[40].any(), "the row of an unknown id is zero"
