"""``verify`` against a score program of which one part was exchanged, with digests made anew."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from dist_export.api import Exporter
from dist_export.formats.digests import algorithm_of, digest_bytes
from dist_export.manifest import MANIFEST, Manifest, decode_manifest, encode_manifest, seal
from dist_export.verify.verify import verify
from tests.support import score_models as models

PROGRAM, SAMPLE = "score_program/exported_model.pt", "score_program/sample.npz"
replace = msgspec.structs.replace


class TwoScores(nn.Module):
    """A dense arch with two outputs of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(models.DIM + 1, 2)

    def forward(self, blocks: models.Batch) -> models.Batch:
        scores = torch.sigmoid(self.layer(torch.cat(list(blocks.values()), dim=1)))
        return {"ctr": scores[:, :1], "like": scores[:, 1:]}


def build() -> nn.Module:
    table = nn.Embedding(models.ROWS, models.DIM)
    model = models.Model(models.Lookups(table, models.WAYS["embedding"][1]), models.DIM + 1)
    model.dense_arch = TwoScores()
    return model


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> tuple[Path, Path]:
    """Packages of two trainings, which have the same tables and other dense parameters."""
    folder = tmp_path_factory.mktemp("forged")
    trained = models.train(build())
    for name in ("one", "other"):
        checkpoint = models.save(trained, folder / f"{name}.pth")
        Exporter(
            build(),
            "sparse_arch",
            "dense_arch",
            [models.batch_of()],
            checkpoint,
            folder / name,
            score_program="require",
        ).export(progress=False)
        with torch.no_grad():
            trained.dense_arch.layer.weight.mul_(-1.5)
    return folder / "one", folder / "other"


@pytest.fixture
def package(packages, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packages[0], tmp_path / "out"))


def forge(package: Path, change: Callable[[Manifest], Manifest] = lambda manifest: manifest) -> list[str]:
    """Make the manifest anew for the files as they are, with a change; return the findings of ``verify``."""
    manifest = decode_manifest((package / MANIFEST).read_bytes(), where="")
    files = []
    for file in manifest.files:
        data = (package / file.path).read_bytes()
        digest = digest_bytes(data, algorithm_of(file.digest))
        files.append(replace(file, num_bytes=len(data), digest=digest))
    forged = change(replace(manifest, files=tuple(files)))
    (package / MANIFEST).write_bytes(encode_manifest(seal(forged)))
    return verify(str(package)).findings


def change_score(package: Path, **changes: Any) -> list[str]:
    return forge(package, lambda manifest: replace(manifest, score=replace(manifest.score, **changes)))


def score_of(package: Path) -> Any:
    return decode_manifest((package / MANIFEST).read_bytes(), where="").score


def change_sample(package: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    with np.load(package / SAMPLE) as stored:
        arrays = {name: change(stored[name]) if stored[name].ndim else stored[name] for name in stored.files}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    (package / SAMPLE).write_bytes(buffer.getvalue())


def test_a_package_made_anew_without_a_change_is_sound(package: Path) -> None:
    assert forge(package) == []


def test_outputs_in_another_order_are_found(package: Path) -> None:
    """The names of outputs are bound to the sample, and to the names of the dense arch's outputs."""
    findings = change_score(package, outputs=score_of(package).outputs[::-1])
    assert findings == [
        f"{SAMPLE}: outputs is ['ctr', 'like'], the manifest's score.outputs is ['like', 'ctr']",
        f"{MANIFEST}: score.outputs are ['like', 'ctr'], dense.outputs are ['ctr', 'like']",
    ]


@pytest.mark.parametrize(
    "changes", [{"dropped_inputs": ("label", "more")}, {"row_modules": {"table": "other"}}], ids=["inputs", "modules"]
)
def test_what_the_manifest_says_of_inputs_and_modules_is_that_of_the_sample(package: Path, changes) -> None:
    (finding,) = change_score(package, **changes)
    assert finding.startswith(f"{SAMPLE}: {next(iter(changes))} is ")


def test_a_forged_parity_does_not_let_another_program_pass(package: Path, packages) -> None:
    """The tolerance does not grow with ``score.parity`` beyond what an export lets pass."""
    shutil.copy(packages[1] / PROGRAM, package / PROGRAM)
    parity = replace(score_of(package).parity, max_abs={"ctr": 9e9, "like": 9e9})
    findings = change_score(package, parity=parity)
    assert len(findings) == 2
    assert all("is not what was stored in" in finding for finding in findings)


def test_a_forged_parity_atol_is_a_finding(package: Path, packages) -> None:
    shutil.copy(packages[1] / PROGRAM, package / PROGRAM)
    findings = forge(package, lambda manifest: replace(manifest, parity=replace(manifest.parity, atol=9e9)))
    assert findings
    assert "allow output 'ctr' to be anything" in findings[0]


def test_a_sample_without_rows_is_a_finding(package: Path) -> None:
    change_sample(package, lambda array: array[:0])
    findings = forge(package)
    assert any("output 'ctr' has no rows, so the sample proves nothing" in finding for finding in findings)


def test_the_score_program_of_another_training_is_found(package: Path, packages) -> None:
    """Even with its own sample: the dense arch's sample has other outputs for the same examples."""
    for name in (PROGRAM, SAMPLE):
        shutil.copy(packages[1] / name, package / name)
    findings = change_score(package, parity=score_of(packages[1]).parity)
    assert len(findings) == 2
    assert all("the score program and the dense program are of two models" in finding for finding in findings)


def test_files_of_a_score_program_without_an_entry_are_a_finding(package: Path) -> None:
    (finding,) = forge(package, lambda manifest: replace(manifest, score=msgspec.UNSET))
    assert finding == f"{MANIFEST}: lists {PROGRAM}, but has no entry `score`, which an export writes with that file"
