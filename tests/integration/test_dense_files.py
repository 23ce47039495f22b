"""The dense folder, file by file as serving reads it, and what it must not tell of the machine that wrote it."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_export.archive.safe_load import check_archive, load_program
from dist_export.dense.blocks import read_blocks
from dist_export.dense.eager import run_dense_arch
from dist_export.dense.folder import PROGRAM, describe_dense, write_dense_folder
from dist_export.dense.trace import trace_dense
from tests.support import ROOT

FORMATS = ["pt2", "legacy"]


class Net(nn.Module):
    """A transformer, a tied weight, buffers of both kinds, a constant, writes through a view, an unused input."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("scale", torch.ones(1) * 2, persistent=False)

    def forward(self, inputs):
        hidden = self.norm(self.tied(self.head(self.encoder(inputs["Seq"]).mean(1)))) * self.scale
        out = torch.zeros_like(hidden) + torch.tensor([1.0, 2.0, 3.0, 4.0])
        out[:, 0] = hidden[:, 0] + inputs["ids"].sum(1)
        return {
            "ctr": torch.sigmoid(out),
            "wide": torch.cat([inputs["Seq"]] * 2, 1),
            "any": inputs["ids"].unsqueeze(1) > 1,
        }


INPUTS = {"Seq": (3, 4), "half": (2,), "ids": (2,), "unused": (5,)}
DIMS = {"Seq": {1: "length"}}


def write(folder: Path, archive_format: str = "pt2", net: nn.Module | None = None):
    torch.manual_seed(0)
    net = (net or Net()).eval()
    inputs = {name: torch.randn(6, *shape) for name, shape in INPUTS.items()}
    inputs["ids"] = torch.randint(0, 3, (6, 2))
    inputs["half"] = inputs["half"].half()
    sample = run_dense_arch(net, read_blocks(inputs), export_outputs=None)
    traced = trace_dense(sample, max_batch_size=1000, dynamic_dims=DIMS)
    write_dense_folder(
        folder,
        sample,
        traced,
        export_model_name="user_model",
        archive_format=archive_format,
        mc_conf={"Seq": ["clicks"], "ids": ["a", "b"]},
        looked_up={"u": {7: "00ff", -3: None}},
        default_rows={"u": "ff00"},
    )
    return sample, traced


@pytest.fixture(scope="module", params=FORMATS)
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "fx_user_model"
    return folder, *write(folder, request.param), request.param


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_the_folder_has_the_files_that_serving_reads_and_no_other(written) -> None:
    found = {path.relative_to(written[0]).as_posix() for path in written[0].rglob("*") if path.is_file()}
    fx = {f"user_model/{name}" for name in ("module.py", "__init__.py", "state_dict.pt")}
    jsons = {"output_info.json", "params_order.json", "inputs_dict.json", "inputs_dict_lite.json", "input_columns.json"}
    jsons |= {"blocks.json", "sample_rows.json", "default_rows.json", "outputs_dict.json"}
    assert found == fx | jsons | {"exported_model.pt", "graph.txt", "inputs_dict.pkl", "output_base.pkl"}


def test_inputs_are_listed_in_call_order(written) -> None:
    folder, sample, traced, _ = written
    assert read(folder, "params_order.json") == ["Seq", "ids"]
    assert traced.dropped == ("half", "unused")
    lite = read(folder, "inputs_dict_lite.json")
    assert lite == {
        "Seq": {"idx": 0, "shape": [6, 3, 4], "dtype": "torch.float32"},
        "ids": {"idx": 1, "shape": [6, 2], "dtype": "torch.int64"},
    }
    assert list(lite) == ["Seq", "ids"]
    full = read(folder, "inputs_dict.json")
    for name, entry in full.items():
        assert torch.equal(torch.tensor(entry.pop("values")), sample.inputs[name])
    assert full == lite
    pickled = pickle.loads((folder / "inputs_dict.pkl").read_bytes())
    assert list(pickled) == ["Seq", "ids"]
    assert all(torch.equal(tensor, sample.inputs[name]) for name, tensor in pickled.items())


def test_outputs_are_listed_in_their_order(written) -> None:
    folder, sample, _, _ = written
    assert read(folder, "output_info.json") == {
        "OutputNodes": [
            {"OutputNodeName": "ctr", "dtype": "torch.float32", "shape": [6, 4]},
            {"OutputNodeName": "wide", "dtype": "torch.float32", "shape": [6, 6, 4]},
            {"OutputNodeName": "any", "dtype": "torch.bool", "shape": [6, 1, 2]},
        ]
    }
    base = pickle.loads((folder / "output_base.pkl").read_bytes())
    assert type(base) is tuple
    assert all(torch.equal(left, right) for left, right in zip(base, sample.outputs, strict=True))


def test_a_bare_tensor_is_pickled_as_such(tmp_path) -> None:
    class Single(nn.Module):
        def forward(self, inputs):
            return inputs["Seq"].sum((1, 2)).expand(3, -1)[0]

    sample, _ = write(tmp_path, net=Single())
    base = pickle.loads((tmp_path / "output_base.pkl").read_bytes())
    assert torch.equal(base, sample.outputs[0])
    assert base.untyped_storage().nbytes() == base.numel() * 4
    assert read(tmp_path, "output_info.json")["OutputNodes"][0]["OutputNodeName"] == "torch_output_0"


def test_columns_are_those_of_mc(written) -> None:
    assert read(written[0], "input_columns.json") == {"Seq": ["clicks"], "ids": ["a", "b"]}


def test_graph_txt_has_the_graph_and_its_code(written) -> None:
    text = (written[0] / "graph.txt").read_text()
    assert text.index("placeholder[target=Seq]") < text.index("def forward(self, Seq, ids)")
    assert "_transformer_encoder_layer_fwd" not in text


def test_the_manifests_entry_has_names_dtypes_and_free_shapes(written) -> None:
    _folder, sample, traced, archive_format = written
    entry = describe_dense(
        sample,
        traced,
        folder_name="fx",
        archive_format=archive_format,
        max_batch_size=1000,
        dynamic_dims=DIMS,
    )
    assert [(i.name, i.dtype, i.shape) for i in entry.inputs] == [
        ("Seq", "float32", ("batch", "length", 4)),
        ("ids", "int64", ("batch", 2)),
    ]
    assert [(o.name, o.dtype, o.shape) for o in entry.outputs] == [
        ("ctr", "float32", ("batch", 4)),
        ("wide", "float32", ("batch", "2*length", 4)),
        ("any", "bool", ("batch", 1, 2)),
    ]
    assert entry.dropped_inputs == ("half", "unused")
    assert entry.program == "fx/exported_model.pt"
    assert (entry.archive_format, entry.max_batch_size, entry.folder) == (archive_format, 1000, "fx")


def test_the_program_loads_with_torch_and_through_the_guard(written) -> None:
    folder, sample, traced, archive_format = written
    assert check_archive(folder / PROGRAM).format == archive_format
    data = (folder / PROGRAM).read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = {name.split("/", 1)[-1] for name in archive.namelist()}
        if archive_format == "legacy":
            assert archive.read("version") == b"8.7"
            assert names == {
                "serialized_exported_program.json",
                "serialized_state_dict.pt",
                "serialized_constants.pt",
                "serialized_example_inputs.pt",
                "version",
            }
        else:
            assert "models/model.json" in names
    for program in (torch.export.load(io.BytesIO(data)), load_program(folder / PROGRAM)):
        found = program.module()(**traced.inputs)
        assert type(found) is tuple
        for left, right in zip(found, sample.outputs, strict=True):
            torch.testing.assert_close(left, right)


@pytest.mark.parametrize("written", ["pt2"], indirect=True)  # the folder is the same beside either archive
def test_the_fx_folder_works_elsewhere_and_alone(written, tmp_path) -> None:
    folder, sample, traced, _ = written
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "my_model"
    moved.mkdir()
    for file in (folder / "user_model").iterdir():
        if file.is_file():
            (moved / file.name).write_bytes(file.read_bytes())
    torch.save((traced.inputs, sample.outputs), tmp_path / "sample.pt")
    code = (
        "import sys, torch; from my_model import user_model\n"
        f"inputs, outputs = torch.load({str(tmp_path / 'sample.pt')!r})\n"
        "found = user_model()(**inputs)\n"
        "assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, outputs, strict=True))\n"
        "assert not any(m.startswith('dist_export') for m in sys.modules)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "elsewhere", check=True, env=environment, timeout=120)


@pytest.mark.parametrize("written", ["pt2"], indirect=True)
def test_the_fx_folder_keeps_writes_through_views(written) -> None:
    folder, sample, traced, archive_format = written
    name = f"moved_{archive_format}"
    spec = importlib.util.spec_from_file_location(
        name, folder / "user_model" / "__init__.py", submodule_search_locations=[str(folder / "user_model")]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    net = module.user_model()
    for found, expected in zip(net(**traced.inputs), sample.outputs, strict=True):
        torch.testing.assert_close(found, expected)
    smaller = {"Seq": torch.ones(1, 7, 4), "ids": torch.ones(1, 2, dtype=torch.int64)}
    assert [tuple(x.shape) for x in net(**smaller)] == [(1, 4), (1, 14, 4), (1, 1, 2)]


def contents(data: bytes, name: str):
    """Yield a file's bytes, and those of every member of the zips in it."""
    yield name, data
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.infolist():
                yield from contents(archive.read(member), f"{name}:{member.filename}")
                yield f"{name}:{member.filename} (name)", member.filename.encode()


def test_no_file_names_a_place_on_this_machine(written) -> None:
    folder = written[0]
    places = {os.getcwd(), str(ROOT), sys.prefix, sys.base_prefix, tempfile.gettempdir()}
    places |= {
        sysconfig.get_path("purelib"),
        os.path.dirname(torch.__file__),
        os.path.expanduser("~"),
        str(folder.parent),
    }
    forbidden = [place.encode() for place in places if len(place) > 1] + [
        b"site-packages",
        os.path.basename(__file__).encode(),
    ]
    for file in folder.rglob("*"):
        if not file.is_file() or "__pycache__" in file.parts:
            continue
        for name, data in contents(file.read_bytes(), file.relative_to(folder).as_posix()):
            for place in forbidden:
                if place == b"test_dense_files" and name.endswith("models/model.json"):
                    continue  # the class of a module is named, not its file
                if place == b"test_dense_files" and name.endswith("serialized_exported_program.json"):
                    continue
                assert place not in data, f"{name} holds {place!r}"


def test_the_same_net_gives_the_same_files(tmp_path) -> None:
    for place in ("a", "b"):
        write(tmp_path / place)
    for file in (tmp_path / "a").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes(), file
