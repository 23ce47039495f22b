"""The dense arch in further formats: what is in the files, how they score, and what is refused and when."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import dist_export
from dist_export.archive import onnx_model
from dist_export.dense import onnx_format, other_formats
from dist_export.errors import ConfigError, PackageError, ParityError, TraceError
from dist_export.formats.digests import digest_bytes
from dist_export.manifest import decode_manifest, encode_manifest, seal
from dist_export.verify import dense as verify_dense
from dist_export.verify.verify import verify
from tests.integration.test_dense_stage import model_with
from tests.support import ROOT, exports, tiny_model
from tests.support.dense_nets import trace

MODEL = "fx_user_model/model.onnx"


def export(folder: Path, model=None, **settings):
    checkpoint = tiny_model.write_tiny_checkpoint(folder / "ckpt")
    exporter = exports.exporter(
        model or tiny_model.build_model(),
        "sparse_arch",
        "dense_arch",
        settings.pop("dataset", tiny_model.build_dataset()),
        checkpoint,
        folder / "out",
        **{"filter_sparse_opt": True, "dense_formats": ["onnx"], **settings},
    )
    return exporter.export()


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    export(folder)
    return folder / "out"


def test_the_onnx_file_has_the_true_names_and_a_free_batch_dimension(package: Path) -> None:
    manifest = dist_export.open_package(package).manifest
    graph = onnx.load(package / MODEL).graph
    assert [value.name for value in graph.input] == [tensor.name for tensor in manifest.dense.inputs]
    assert [value.name for value in graph.output] == ["ctr", "like"]
    for value in [*graph.input, *graph.output]:
        dims = value.type.tensor_type.shape.dim
        assert (dims[0].dim_param, len(dims)) == ("batch", 2)
    onnx.checker.check_model(str(package / MODEL), full_check=True)


def test_the_manifest_has_its_digest_and_its_parity(package: Path) -> None:
    manifest = dist_export.open_package(package).manifest
    (entry,) = manifest.dense.formats
    assert (entry.format, entry.file, entry.parity.batch_sizes) == ("onnx", MODEL, (5, 1, 2, 301))
    assert entry.parity.reference == manifest.parity.reference
    assert 0 <= max(entry.parity.max_abs.values()) <= 1e-5
    assert entry.versions == {name: importlib.import_module(name).__version__ for name in onnx_format.PACKAGES}
    (file,) = [file for file in manifest.files if file.path == MODEL]
    assert file.digest.startswith("xxh3:")
    assert any(line.startswith("  onnx     fx_user_model/model.onnx") for line in str(manifest).splitlines())


def test_the_onnx_file_has_no_path_and_no_stack_trace(package: Path) -> None:
    content = (package / MODEL).read_bytes()
    found = [
        text
        for text in (str(ROOT), str(package.parent), "site-packages", ".py", 'File "', "forward")
        if text.encode() in content
    ]
    assert found == []


def test_one_program_gives_the_same_bytes_twice() -> None:
    traced = trace(lambda net, x: net.linear(x["a"]) + x["b"].sum(1, keepdim=True))
    contents = {onnx_format.make_onnx(traced, ["out"], {})[0] for _ in range(2)}
    assert len(contents) == 1


def test_onnxruntime_alone_scores_as_the_program_does(package: Path) -> None:
    """The names of the manifest are all that a caller needs, at any batch size."""
    opened = dist_export.open_package(package)
    session = onnxruntime.InferenceSession(package / MODEL)
    for size in (1, 7):
        rng = np.random.default_rng(size)
        shapes = {its.name: (size, *its.shape[1:]) for its in opened.manifest.dense.inputs}
        inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        expected = [value.detach().numpy() for value in opened.load_program().module()(**tensors)]
        np.testing.assert_allclose(session.run(["ctr", "like"], inputs), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose([v.numpy() for v in opened.load_onnx()(**tensors)], expected, rtol=1e-5, atol=1e-6)


def test_a_further_free_dimension_keeps_its_name() -> None:
    inputs = {"a": torch.randn(5, 4, 3)}
    traced = trace(lambda net, x: net.linear(x["a"]).sum(1), inputs, dims={"a": {1: "length"}})
    model = onnx.load_from_string(onnx_format.make_onnx(traced, ["out"], {"a": {1: "length"}})[0])
    assert [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", "length", ""]


def test_the_logarithm_of_a_sigmoid_is_finite_where_the_sigmoid_is_zero() -> None:
    """No sample has such logits, and served scores of minus infinity are those of no model."""
    traced = trace(lambda _, x: torch.nn.functional.logsigmoid(x["a"]), {"a": torch.rand(5, 3)})
    content, _ = onnx_format.make_onnx(traced, ["out"], {})
    logits = torch.tensor([[-1e4, -1e3, -100.0], [-88.0, -5.0, 0.0], [1e-3, 5.0, 1e4]])
    (found,) = onnx_model.OnnxProgram(content, ["out"], where="here")(a=logits)
    torch.testing.assert_close(found, torch.nn.functional.logsigmoid(logits))


def test_a_maximum_over_all_elements_is_written_beside_those_with_dimensions() -> None:
    def forward(_, x):
        a = torch.nn.functional.logsigmoid(x["a"])
        return a.amax(1) * a.amax() + a.amin((0, 1), keepdim=True)[0] - torch.amax(a, (), keepdim=True)[0, 0] * a.amin()

    inputs = {"a": torch.randn(5, 3)}
    content, _ = onnx_format.make_onnx(trace(forward, inputs), ["out"], {})
    (found,) = onnx_model.OnnxProgram(content, ["out"], where="here")(**inputs)
    torch.testing.assert_close(found, forward(None, inputs))


def swapped(net, x):
    return {"relu": x["Seq"] + 1, "mul": torch.relu(x["seq"]) * net.linear.weight[0], "add": x["Seq"]}


def test_names_that_torch_would_change_stay(tmp_path: Path) -> None:
    """torch writes Seq as seq, and calls values within the graph as the outputs here; one output is an input itself."""
    torch.manual_seed(0)
    inputs = {name: torch.randn(5, 3) for name in ("Seq", "seq")}
    traced = trace(swapped, inputs)
    names = ["relu", "mul", "add"]
    content, _ = onnx_format.make_onnx(traced, names, {})
    graph = onnx.load_from_string(content).graph
    assert [value.name for value in graph.input] == ["Seq", "seq"]
    assert [value.name for value in graph.output] == names
    found = onnx_model.OnnxProgram(content, names, where="here")(**inputs)
    torch.testing.assert_close(found, traced.program.module()(**inputs))


def test_values_of_branches_are_renamed_too() -> None:
    def branches(net, x):
        other = x["Big"] * 2
        return torch.cond(
            x["Big"].sum() > 0, lambda y: net.linear(y) + other[:, :2], lambda y: -net.linear(y), (x["Big"],)
        )

    inputs = {"Big": torch.randn(5, 3)}
    traced = trace(branches, inputs)
    content, _ = onnx_format.make_onnx(traced, ["mul"], {})
    for sign in (1, -1):
        given = {"Big": torch.full((4, 3), 0.5 * sign)}
        (found,) = onnx_model.OnnxProgram(content, ["mul"], where="here")(**given)
        torch.testing.assert_close(found, traced.program.module()(**given))


def test_verify_runs_the_onnx_file(package: Path) -> None:
    report = verify(str(package))
    assert report.findings == []
    assert any(line.startswith(f"{MODEL}: ONNX Runtime gives the stored outputs") for line in report.checked)


def test_verify_says_that_it_did_not_run_the_onnx_file(package: Path, monkeypatch) -> None:
    monkeypatch.setattr(onnx_model, "has_runtime", lambda: False)
    report = verify(str(package))
    assert report.findings == []
    assert f"{MODEL}: its digest alone, because onnxruntime is not installed" in report.checked


def change_weights(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("out.weight"))
    weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * 1.01).astype(np.float32).tobytes()
    return model.SerializeToString()


def rename_output(content: bytes) -> bytes:
    return content.replace(b"like", b"lice")


DAMAGES = {
    "weights": (change_weights, r"model.onnx: output 'ctr' is not what was stored in output_base.pkl: max abs"),
    "names": (rename_output, r"model.onnx: has the inputs .* and the outputs \['ctr', 'lice'\], the manifest says"),
    "no model": (lambda _: b"nonsense", r"model.onnx: ONNX Runtime .* cannot load the file"),
    "cut short": (lambda content: content[: len(content) // 2], r"model.onnx: ONNX Runtime .* cannot load the file"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_verify_finds_a_wrong_onnx_file_with_a_right_digest(case: str, package: Path, tmp_path: Path) -> None:
    """A writer who also changed the digests does not get past the run on the sample."""
    change, told = DAMAGES[case]
    copy = tmp_path / "copy"
    shutil.copytree(package, copy)
    content = change((copy / MODEL).read_bytes())
    (copy / MODEL).write_bytes(content)
    report = verify(str(copy))
    assert any(MODEL in finding for finding in report.findings)
    manifest = decode_manifest((copy / "manifest.json").read_bytes(), where="")
    files = tuple(
        msgspec.structs.replace(file, num_bytes=len(content), digest=digest_bytes(content, "xxh3"))
        if file.path == MODEL
        else file
        for file in manifest.files
    )
    (copy / "manifest.json").write_bytes(encode_manifest(seal(msgspec.structs.replace(manifest, files=files))))
    (finding, *_) = verify(str(copy)).findings
    assert re.search(told, finding), finding


def test_a_package_without_the_format_says_so(package: Path, tmp_path: Path) -> None:
    export(tmp_path, dense_formats=[])
    assert not (tmp_path / "out" / MODEL).exists()
    opened = dist_export.open_package(tmp_path / "out")
    assert opened.manifest.dense.formats is msgspec.UNSET
    with pytest.raises(
        PackageError, match=r"no format 'onnx' .further formats: none.; export with dense_formats: .onnx."
    ):
        opened.load_onnx()


def find_no(*names: str):
    plain = importlib.util.find_spec
    return lambda name, *rest: None if name in names else plain(name, *rest)


def half_model() -> torch.nn.Module:
    return model_with(dense=lambda scores: {name: score.bfloat16() for name, score in scores.items()})


EARLY = {
    "unknown": ({"dense_formats": ["tensorrt"]}, r"dense_formats.*tensorrt"),
    "twice": ({"dense_formats": ["onnx", "onnx"]}, "has 'onnx' twice"),
    "no model": ({"dataset": None}, "needs? .*model and dataset|dataset is None"),
    "one name": ({"export_outputs": ["price", "like"]}, "has an input and an output 'price'.*Set export_outputs"),
    "dtype": ({"model": half_model()}, "output 'ctr' of the dense arch is bfloat16, which ONNX Runtime does not take"),
}


@pytest.mark.parametrize("case", EARLY)
def test_it_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    settings, told = EARLY[case]
    with pytest.raises(ConfigError, match=told) as caught:
        export(tmp_path, **settings)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_missing_extra_is_refused_at_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", find_no("onnxscript", "onnxruntime"))
    with pytest.raises(ConfigError, match=r"needs onnxscript, onnxruntime: pip install 'dist_export\[onnx\]'"):
        export(tmp_path)
    assert not (tmp_path / "out").exists()


class EigenDense(tiny_model.DenseArch):
    def forward(self, blocks):
        scores = super().forward(blocks)
        rows = scores["ctr"].unsqueeze(2) * scores["like"].unsqueeze(1)
        return {"ctr": torch.linalg.eigvalsh(rows)}


def test_an_operator_that_onnx_lacks_is_named_with_its_line(tmp_path: Path) -> None:
    model = tiny_model.build_model()
    model.dense_arch = EigenDense()
    with pytest.raises(
        TraceError, match=r"no form for aten._linalg_eigh.default at .*formats.py:\d+ .return .*eigvalsh"
    ):
        export(tmp_path, model)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_file_that_scores_otherwise_stops_the_commit(tmp_path: Path, monkeypatch) -> None:
    """Nothing but the outputs of the written file decides."""
    make = onnx_format.make_onnx
    monkeypatch.setattr(other_formats, "make_onnx", lambda *rest: (change_weights(make(*rest)[0]), 20))
    with pytest.raises(
        ParityError, match=r"output 'ctr' at batch size 5: the ONNX file differs from the dense arch by"
    ):
        export(tmp_path)
    assert not (tmp_path / "out" / "manifest.json").exists()


class WritingDense(tiny_model.DenseArch):
    """Writes into a block that it was given."""

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scores = super().forward(blocks)
        doubled = blocks["price"].mul_(2)
        return {name: score + doubled for name, score in scores.items()}


def test_verify_finds_nothing_in_a_program_that_writes_into_its_inputs(tmp_path: Path) -> None:
    model = tiny_model.build_model()
    model.dense_arch = WritingDense()
    export(tmp_path, model)
    report = verify(tmp_path / "out")
    assert report.findings == []
    assert any("model.onnx: ONNX Runtime gives the stored outputs" in line for line in report.checked)


def test_measuring_the_rounding_leaves_the_program_as_it_is(package: Path) -> None:
    """The checks that follow compare the program's weights with those of the FX module."""
    opened = dist_export.open_package(package)
    program = opened.load_program()
    random = torch.Generator().manual_seed(0)
    widths = {tensor.name: tensor.shape[1] for tensor in opened.manifest.dense.inputs}
    inputs = {name: torch.rand(3, width, generator=random) for name, width in widths.items()}
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    found = verify_dense._call(program, inputs)
    rounding = [measure() for measure in verify_dense._measures(program, inputs, found)]
    assert all(allowed is not None for allowed in rounding)
    for name, tensor in program.state_dict.items():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor, before[name]), name
