"""Triton's model repository of the dense arch: Triton's own protobufs read it, and it stays one with the ONNX file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import dist_export
from dist_export.errors import ConfigError
from dist_export.formats.digests import digest_bytes
from dist_export.formats.package_entries import DenseEntry, TensorEntry
from dist_export.formats.triton_layout import DATA_TYPES, render_config
from dist_export.manifest import decode_manifest, encode_manifest, seal
from dist_export.verify.verify import verify
from tests.integration.test_dense_formats import export
from tests.support.sparse_cases import export as export_again

REPOSITORY = "fx_user_model/triton"
CONFIG = f"{REPOSITORY}/user_model/config.pbtxt"
COPY = f"{REPOSITORY}/user_model/1/model.onnx"


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("triton")
    export(folder, layouts=["triton"])
    return folder / "out"


def parse(text: str):
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_triton_reads_the_configuration(package: Path) -> None:
    config = parse((package / CONFIG).read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("user_model", "onnxruntime", 0)
    fp32 = model_config_pb2.TYPE_FP32
    found = {its.name: (its.data_type, list(its.dims)) for its in config.input}
    assert found == {"item": (fp32, [-1, 4]), "price": (fp32, [-1, 1]), "user": (fp32, [-1, 4])}
    assert [(its.name, its.data_type, list(its.dims)) for its in config.output] == [
        ("ctr", fp32, [-1, 1]),
        ("like", fp32, [-1, 1]),
    ]


def test_the_repository_has_the_onnx_file_as_version_1_by_a_hard_link(package: Path) -> None:
    files = sorted(path.relative_to(package / REPOSITORY).as_posix() for path in (package / REPOSITORY).rglob("*"))
    assert files == ["user_model", "user_model/1", "user_model/1/model.onnx", "user_model/config.pbtxt"]
    config = parse((package / CONFIG).read_text())
    graph = onnx.load(package / REPOSITORY / config.name / "1" / config.default_model_filename).graph
    assert {its.name for its in graph.input} == {its.name for its in config.input}
    assert os.path.samefile(package / COPY, package / "fx_user_model" / "model.onnx")
    manifest = dist_export.open_package(package).manifest
    assert manifest.dense.layouts == {"triton": REPOSITORY}
    assert {CONFIG, COPY} <= {file.path for file in manifest.files if file.digest}


def test_verify_compares_it_with_the_manifest(package: Path) -> None:
    report = verify(str(package))
    assert report.findings == []
    assert f"{CONFIG}: says what the manifest says; {COPY} is the ONNX file" in report.checked


def test_it_goes_along_when_the_program_is_taken_over(package: Path, tmp_path: Path) -> None:
    export_again(package, tmp_path / "again", num_shards=3)
    assert verify(str(tmp_path / "again")).findings == []
    assert (tmp_path / "again" / CONFIG).read_bytes() == (package / CONFIG).read_bytes()
    assert os.path.samefile(tmp_path / "again" / COPY, tmp_path / "again" / "fx_user_model" / "model.onnx")
    dense = [dist_export.open_package(folder).manifest.dense for folder in (package, tmp_path / "again")]
    assert dense[0] == dense[1]


def change_config(folder: Path) -> str:
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace("dims: [ -1, 4 ]", "dims: [ -1, 5 ]", 1))
    return CONFIG


def change_copy(folder: Path) -> str:
    content = (folder / COPY).read_bytes()
    (folder / COPY).unlink()
    (folder / COPY).write_bytes(content.replace(b"like", b"lice"))
    return COPY


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_config, f"{CONFIG}: is not what the manifest says of the dense arch"),
        (change_copy, f"{COPY}: is not the ONNX file fx_user_model/model.onnx"),
    ],
)
def test_verify_finds_a_wrong_repository_with_right_digests(change, told: str, package: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(package, tmp_path / "copied"))
    name = change(folder)
    content = (folder / name).read_bytes()
    manifest = decode_manifest((folder / "manifest.json").read_bytes(), where="")
    files = tuple(
        msgspec.structs.replace(its, num_bytes=len(content), digest=digest_bytes(content, "xxh3"))
        if its.path == name
        else its
        for its in manifest.files
    )
    (folder / "manifest.json").write_bytes(encode_manifest(seal(msgspec.structs.replace(manifest, files=files))))
    assert verify(str(folder)).findings == [told]


def test_names_and_dtypes_of_every_kind_are_read_back() -> None:
    names = ["plain", 'a "quoted" \\ name', "line\nbreak\ttab\x01\x7f", "日本"]
    tensors = tuple(TensorEntry(name=name, dtype="float32", shape=("batch", 2)) for name in names)
    outputs = (
        *(TensorEntry(name=dtype, dtype=dtype, shape=("batch", "2*length", 3)) for dtype in DATA_TYPES),
        TensorEntry(name="scalar", dtype="int64", shape=()),
    )
    entry = DenseEntry(
        folder="f",
        program="f/p",
        archive_format="pt2",
        inputs=tensors,
        outputs=outputs,
        dropped_inputs=(),
        max_batch_size=9,
    )
    config = parse(render_config(entry, "m", "f/model.onnx"))
    assert [its.name for its in config.input] == names
    kinds = {its.name: model_config_pb2.DataType.Name(its.data_type) for its in config.output}
    assert kinds == {**DATA_TYPES, "scalar": "TYPE_INT64"}
    assert list(config.output[0].dims) == [-1, -1, 3]
    assert (list(config.output[-1].dims), config.output[-1].HasField("reshape")) == ([1], True)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"layouts": ["triton"], "dense_formats": []},
            r"layouts has triton, which serves the ONNX file; set dense_formats",
        ),
        ({"layouts": ["triton", "triton"]}, "layouts has 'triton' twice"),
        ({"layouts": ["seldon"]}, "layouts.*seldon"),
    ],
)
def test_a_layout_that_cannot_be_written_is_refused(settings, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        export(tmp_path, **settings)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
