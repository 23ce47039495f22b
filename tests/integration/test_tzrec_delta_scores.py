"""A trainer's own deltas over a base with a model: the dense part is the base's, and scores are those of the dumps' rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export import cli
from dist_export.api import Exporter
from dist_export.formats.digests import digest_bytes
from dist_export.manifest import MANIFEST, compute_digest
from dist_export.verify.verify import verify
from tests.support import score_models as models
from tests.support.deltas import manifest_of, put_together, read_package
from tests.support.tzrec_dumps import write_dump


def build() -> nn.Module:
    return models.Model(models.ThreeTables(), 3 * models.DIM + 1)


def export(checkpoint: str, out: Path, **settings: Any) -> Path:
    Exporter(build(), "sparse_arch", "dense_arch", [models.batch_of()], checkpoint, out, **settings).export(
        progress=False
    )
    return out


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, a delta of dumps in which rows changed and the dense arch did not, and the full export of that state."""
    folder, model = tmp_path_factory.mktemp("packages"), models.train(build())
    base = export(models.save(model, folder / "before.pth"), folder / "base", score_program="require")
    looked_up = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("sparse_arch"):
                parameter[:3] += 0.25
                looked_up[name.removesuffix(".weight")] = np.arange(5), parameter[:5].numpy().copy()
    write_dump(folder / "dumps", 20, looked_up)
    full = export(models.save(model, folder / "after.pth"), folder / "full", score_program="require")
    settings = {"format": "tzrec_delta", "since_step": 10, "base": str(base), "progress": False}
    dist_export.export({"ckpt_dir": str(folder / "dumps"), "export_dir": str(folder / "delta"), **settings})
    return base, folder / "delta", full


def test_scores_are_those_of_the_full_export(packages) -> None:
    base, delta, full = packages
    assert put_together(base, delta) == read_package(full)
    assert [table["rows_out"] for table in manifest_of(delta)["tables"]] == [3, 3, 3]
    for size in (1, 2, 64):
        inputs = {name: value for name, value in models.batch_of(size, seed=size).items() if name != "label"}
        with dist_export.open_package(delta) as package, dist_export.open_package(full) as whole:
            found, expected = package.score(inputs), whole.score(inputs)
        assert found.keys() == expected.keys()
        assert all(scores.tobytes() == expected[name].tobytes() for name, scores in found.items())


def test_all_that_is_no_table_is_the_base_s(packages) -> None:
    base, delta, _ = packages
    ours, theirs = manifest_of(delta), manifest_of(base)
    assert ours["base"]["has_dense"] is True
    for name in ("dense", "parity", "drift", "score", "serving"):
        assert ours.get(name) == theirs.get(name)
    folder = theirs["dense"]["folder"]
    taken = [file["path"] for file in theirs["files"] if file["path"].startswith((f"{folder}/", "score_program/"))]
    assert len(taken) > 5
    assert all((delta / path).read_bytes() == (base / path).read_bytes() for path in taken)
    assert any("the rows are those of step 20; all else is the base's" in note for note in ours["notes"])


def test_verify_compares_what_was_taken_over(packages, tmp_path: Path) -> None:
    """Its samples are of the base's rows, so they are not run on those of the delta."""
    _, delta, _ = packages
    report = verify(str(delta))
    assert report.findings == []
    assert any("byte for byte that of the base" in line for line in report.checked)
    file = delta / "score_program" / "sample.npz"
    content = file.read_bytes()
    document = manifest_of(delta)
    changed = content + b"\0"
    for entry in document["files"]:
        if entry["path"] == "score_program/sample.npz":
            entry |= {"num_bytes": len(changed), "digest": digest_bytes(changed, "xxh3")}
    document["parity"]["atol"] = 1.0
    document["digest"] = compute_digest(document)
    manifest = (delta / MANIFEST).read_bytes()
    try:
        file.write_bytes(changed)
        (delta / MANIFEST).write_text(json.dumps(document))
        told = [str(finding) for finding in verify(str(delta)).findings]
    finally:
        file.write_bytes(content)
        (delta / MANIFEST).write_bytes(manifest)
    assert any("sample.npz" in line and "is not the file of the base" in line for line in told)
    assert any("parity is not what the base has" in line for line in told)


def test_no_full_package_is_made_of_samples_that_are_of_other_rows(packages, tmp_path: Path, capsys) -> None:
    _, delta, _ = packages
    assert cli.main(["compact", str(delta), str(tmp_path / "made")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "its stored samples are of the base's rows" in line
    assert not (tmp_path / "made").exists()
