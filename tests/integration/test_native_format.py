"""The dense arch as AOTInductor compiles it: what is in the archive, that it is not run unasked, and what is refused."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import msgspec
import pytest
import torch
from torch._inductor.exc import LoweringException

import dist_export
from dist_export.archive import native_program
from dist_export.dense import aoti_format, other_formats
from dist_export.errors import ConfigError, PackageError, ParityError, TraceError, UserError
from dist_export.manifest import decode_manifest, encode_manifest, seal
from dist_export.verify.verify import verify
from tests.integration.test_dense_formats import export
from tests.integration.test_dense_stage import model_with
from tests.support import ROOT
from tests.support.dense_nets import trace
from tests.support.made_once import make_once

MODEL = "fx_user_model/model.pt2"


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    return make_once(tmp_path_factory, "native", lambda folder: export(folder, dense_formats=["aoti"])) / "out"


@pytest.fixture
def copied(package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package, tmp_path / "copied"))


def test_it_scores_as_the_program_does_at_any_batch_size(package: Path) -> None:
    opened = dist_export.open_package(package)
    native, program = opened.load_native_program(allow_native_code=True), opened.load_program().module()
    for size in (1, 7):
        shapes = {its.name: (size, *its.shape[1:]) for its in opened.manifest.dense.inputs}
        inputs = {name: torch.randn(shape) for name, shape in shapes.items()}
        torch.testing.assert_close(native(**inputs), program(**inputs), rtol=1e-5, atol=1e-5)


def test_the_archive_has_the_names_and_no_sources(package: Path) -> None:
    opened = dist_export.open_package(package)
    metadata = opened.load_native_program(allow_native_code=True).metadata()
    assert json.loads(metadata["outputs"]) == ["ctr", "like"]
    assert json.loads(metadata["inputs"]) == [its.name for its in opened.manifest.dense.inputs]
    with zipfile.ZipFile(package / MODEL) as archive:
        names = archive.namelist()
        content = b"".join(archive.read(name) for name in names)
    assert {name.rpartition(".")[2] for name in names if "aotinductor" in name} == {"so", "json"}
    private = [str(ROOT), tempfile.gettempdir(), "site-packages", "#include", "tiny_model.py"]
    assert [text for text in private if text.encode() in content] == []


def test_the_manifest_says_what_the_code_needs(package: Path) -> None:
    (entry,) = dist_export.open_package(package).manifest.dense.formats
    assert (entry.format, entry.file, entry.parity.batch_sizes) == ("aoti", MODEL, (5, 1, 2, 301))
    assert max(entry.parity.max_abs.values()) <= 1e-5
    flags = native_program.read_processor_features()
    assert set(entry.features) <= flags
    assert {"sse2", "avx2", "avx512f", "amx_tile", "avx512_vnni"} & flags <= set(entry.features)
    assert native_program.explain_wrong_machine(entry.machine, entry.features) == ""
    assert list(entry.versions) == ["g++"]


def test_verify_compares_the_digest_and_runs_nothing(copied: Path, monkeypatch) -> None:
    monkeypatch.setattr(native_program.NativeProgram, "__init__", lambda *_, **__: pytest.fail("it was loaded"))
    report = verify(str(copied))
    assert report.findings == []
    assert f"{MODEL}: its digest alone, because it is native code, which verify does not run" in report.checked
    (copied / MODEL).write_bytes((copied / MODEL).read_bytes()[:-1] + b"x")
    assert any(MODEL in finding for finding in verify(str(copied)).findings)


def test_it_is_not_loaded_without_the_flag(package: Path) -> None:
    with pytest.raises(UserError, match=r"model.pt2 is native code.*pass allow_native_code=True"):
        dist_export.open_package(package).load_native_program()


def test_a_changed_file_is_not_loaded(copied: Path) -> None:
    content = bytearray((copied / MODEL).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / MODEL).write_bytes(content)
    with pytest.raises(PackageError, match=r"model.pt2 is not what the manifest says; it was not loaded"):
        dist_export.open_package(copied).load_native_program(allow_native_code=True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"features": ("avx9",)}, "it uses avx9, which this processor lacks"),
        ({"machine": "vax"}, "it was compiled for vax"),
    ],
)
def test_code_for_another_processor_is_not_loaded(changes, told: str, copied: Path) -> None:
    manifest = decode_manifest((copied / "manifest.json").read_bytes(), where="")
    (entry,) = manifest.dense.formats
    dense = msgspec.structs.replace(manifest.dense, formats=(msgspec.structs.replace(entry, **changes),))
    (copied / "manifest.json").write_bytes(encode_manifest(seal(msgspec.structs.replace(manifest, dense=dense))))
    with pytest.raises(PackageError, match=f"model.pt2 cannot run here: {told}"):
        dist_export.open_package(copied).load_native_program(allow_native_code=True)


def test_code_that_scores_otherwise_stops_the_commit(package: Path, tmp_path: Path, monkeypatch) -> None:
    """The written file decides: here it is that of another model."""
    compiled = aoti_format.CompiledDense((package / MODEL).read_bytes(), "x86_64", (), {})
    monkeypatch.setattr(other_formats, "compile_dense", lambda *_: compiled)
    other = model_with(dense=lambda scores: {name: score * 1.001 for name, score in scores.items()})
    with pytest.raises(
        ParityError, match="output 'ctr' at batch size 5: the compiled dense arch differs from the dense arch"
    ):
        export(tmp_path, other, dense_formats=["aoti"])
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_missing_compiler_is_refused_at_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ConfigError, match=r"needs a C.. compiler, but there is no no-such-compiler: install g"
    ) as caught:
        export(tmp_path, dense_formats=["aoti"])
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_compiler_that_fails_stops_the_commit(package: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(TraceError, match=r"AOTInductor cannot compile the dense arch: .*leave aoti out") as caught:
        export(tmp_path, model_with(dense=lambda x: {k: v + 3 for k, v in x.items()}), dense_formats=["aoti"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_operator_that_cannot_be_compiled_is_named_with_its_line(monkeypatch) -> None:
    traced = trace(lambda net, x: net.linear(x["a"]) + x["b"].sum(1, keepdim=True))

    def fail(*_, **__):
        raise LoweringException(NotImplementedError("no such kernel"), torch.ops.aten.linear.default, [], {})

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(
        TraceError, match=r"aten.linear.default: .*no such kernel at .*\.py:\d+ .*Use other operators there"
    ):
        aoti_format.compile_dense(traced, ["out"])
