"""A score program from elsewhere: it may call the lookup, with tables of the manifest, and torch's own operators."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from torch import nn

import dist_export
from dist_export.api import Exporter
from dist_export.archive.safe_load import check_archive, load_program
from dist_export.errors import PackageError
from dist_export.formats.digests import algorithm_of, digest_bytes
from dist_export.manifest import MANIFEST, decode_manifest, encode_manifest, seal
from dist_export.verify.verify import verify
from tests.support import score_models as models

TABLE = "sparse_arch.table.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A package with one table and a score program."""
    folder = tmp_path_factory.mktemp("score")

    def build() -> nn.Module:
        return models.Model(
            models.Lookups(nn.Embedding(models.ROWS, models.DIM), models.WAYS["embedding"][1]), models.DIM + 1
        )

    checkpoint = models.save(models.train(build()), folder / "model.pth")
    Exporter(
        build(), "sparse_arch", "dense_arch", [models.batch_of()], checkpoint, folder / "out", score_program="require"
    ).export(progress=False)
    return folder / "out"


@pytest.fixture
def package(whole: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(whole, tmp_path / "out"))


def rewrite(raw: bytes, change: Callable[[list[dict[str, Any]]], object]) -> bytes:
    """Return a program after ``change`` was applied to the nodes of its graph."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("models/model.json"):
                document = json.loads(content)
                change(document["graph_module"]["graph"]["nodes"])
                content = json.dumps(document).encode()
            target.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def lookup_of(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    return next(node for node in nodes if node["target"] == "torch.ops.dist_export.lookup.default")


def put(package: Path, path: str, data: bytes, **changes: Any) -> None:
    """Replace a file, and make the manifest anew so that nothing but the content tells."""
    (package / path).write_bytes(data)
    old = decode_manifest((package / MANIFEST).read_bytes(), where="")
    files = tuple(
        msgspec.structs.replace(entry, num_bytes=len(data), digest=digest_bytes(data, algorithm_of(entry.digest)))
        if entry.path == path
        else entry
        for entry in old.files
    )
    (package / MANIFEST).write_bytes(encode_manifest(seal(msgspec.structs.replace(old, files=files, **changes))))


def rename_table(nodes: list[dict[str, Any]]) -> None:
    lookup_of(nodes)["inputs"][1]["arg"] = {"as_string": "other"}


def add_argument(nodes: list[dict[str, Any]]) -> None:
    node = lookup_of(nodes)
    node["inputs"].append({**node["inputs"][1], "name": "path"})


def give_a_number(nodes: list[dict[str, Any]]) -> None:
    lookup_of(nodes)["inputs"][1]["arg"] = {"as_int": 3}


def call_another(nodes: list[dict[str, Any]]) -> None:
    lookup_of(nodes)["target"] = "torch.ops.dist_export.erase.default"


def call_foreign(nodes: list[dict[str, Any]]) -> None:
    nodes[-1]["target"] = "torch.ops.fbgemm.jagged_to_padded_dense.default"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (rename_table, "a lookup in the table 'other', which the manifest does not have"),
        (add_argument, "a lookup with the arguments ids, table, path"),
        (give_a_number, "a lookup whose arguments are not a tensor and a name"),
        (call_another, r"an operator 'torch\.ops\.dist_export\.erase\.default'"),
        (call_foreign, r"an operator 'torch\.ops\.fbgemm\.jagged_to_padded_dense\.default', which is not torch's own"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_programs_that_do_more_are_refused_before_torch_loads_them(package: Path, change, told: str) -> None:
    entry = dist_export.open_package(package).manifest.score
    data = rewrite((package / entry.program).read_bytes(), change)
    with pytest.raises(PackageError, match=told):
        check_archive(data, tables={TABLE})
    put(package, entry.program, data)
    with pytest.raises(PackageError, match=told):
        dist_export.open_package(package).load_score_program()
    findings = verify(str(package)).findings
    assert len(findings) == 1
    assert findings[0].startswith(entry.program)


def test_a_dense_program_may_not_look_rows_up(whole: Path) -> None:
    entry = dist_export.open_package(whole).manifest.score
    with pytest.raises(PackageError, match=r"an operator 'torch\.ops\.dist_export\.lookup\.default'"):
        load_program(whole / entry.program)


def test_a_manifest_that_names_other_tables_or_paths_is_refused(package: Path) -> None:
    manifest = dist_export.open_package(package).manifest
    entry = manifest.score
    data = (package / entry.program).read_bytes()
    put(package, entry.program, data, score=msgspec.structs.replace(entry, tables=()))
    with pytest.raises(PackageError, match=r"looks rows up in .*, the manifest says"):
        dist_export.open_package(package).load_score_program()
    put(package, entry.program, data, score=msgspec.structs.replace(entry, program="../elsewhere"))
    with pytest.raises(PackageError, match="does not lie in the package"):
        dist_export.open_package(package)


def test_verify_runs_it_on_the_stored_sample(package: Path) -> None:
    report = verify(str(package))
    assert report.findings == []
    assert any(line.startswith("score program: loads, gives the stored outputs") for line in report.checked)
    entry = dist_export.open_package(package).manifest.score
    with np.load(package / entry.sample) as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays["output_0"] = arrays["output_0"] + np.float32(0.01)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    put(package, entry.sample, buffer.getvalue())
    of_dense, of_program = verify(str(package)).findings
    assert of_dense.startswith(f"{entry.sample}: output 'ctr' is not what fx_user_model/outputs_dict.json has")
    assert of_program.startswith(f"{entry.program}: output 'ctr' is not what was stored")
    put(package, entry.sample, b"nothing")
    (finding,) = verify(str(package)).findings
    assert "not the sample of a score program" in finding


def test_pickles_in_the_sample_are_not_read(package: Path) -> None:
    entry = dist_export.open_package(package).manifest.score
    buffer = io.BytesIO()
    np.savez(buffer, input_0=np.array([{}], dtype=object))
    put(package, entry.sample, buffer.getvalue())
    (finding,) = verify(str(package)).findings
    assert "Object arrays cannot be loaded" in finding
