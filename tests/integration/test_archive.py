"""The bytes of exported_model.pt: they load, they are the same everywhere, and they tell nothing of this machine."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import logging
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

from dist_export.archive import legacy
from dist_export.archive.pt2 import pack_program
from dist_export.errors import ConfigError, TraceError
from tests.support import ROOT
from tests.support import archive_programs as programs

FORMATS = ("pt2", "legacy")


def local_paths() -> list[bytes]:
    here = {os.getcwd(), sys.prefix, sys.base_prefix, sysconfig.get_path("purelib"), tempfile.gettempdir()}
    here |= {str(Path(__file__).parent), str(Path(torch.__file__).parent), str(Path.home())}
    return [path.encode() for path in here if len(path) > 2]


def unpack_all(data: bytes) -> dict[str, bytes]:
    """Every member, and every member of the zips within."""
    found = {}
    for name, content in programs.members_of(data).items():
        found[name] = content
        if zipfile.is_zipfile(io.BytesIO(content)):
            found |= {f"{name}/{inner}": data for inner, data in programs.members_of(content).items()}
    return found


def load(data: bytes) -> torch.export.ExportedProgram:
    logging.getLogger("torch.export").setLevel(logging.ERROR)
    return torch.export.load(io.BytesIO(data))


@pytest.mark.parametrize("archive_format", FORMATS)
@pytest.mark.parametrize("name", programs.NAMES)
def test_a_loaded_program_gives_what_the_model_gives(name, archive_format):
    """torch.export.load reads both formats, and the outputs are equal to the last bit, for other batch sizes too."""
    program, inputs, expected = programs.case(name)
    loaded = load(pack_program(program, archive_format=archive_format))
    programs.assert_same(loaded.module()(**inputs), expected)
    twice = {key: torch.cat([value, value]) for key, value in inputs.items()}
    programs.assert_same(loaded.module()(**twice), programs.as_tuple(program.module()(**twice)))


@pytest.mark.parametrize("archive_format", FORMATS)
@pytest.mark.parametrize("name", programs.NAMES)
def test_no_member_names_a_place_on_this_machine(name, archive_format):
    members = unpack_all(pack_program(programs.case(name).program, archive_format=archive_format))
    for member, content in members.items():
        assert b"stack_trace" not in content, member
        for path in local_paths():
            assert path not in content, (member, path)


@pytest.mark.parametrize("archive_format", FORMATS)
def test_the_program_is_as_before(archive_format):
    """Packing hides the metadata of nodes for a while; it is back afterwards, also when packing fails."""
    program = programs.case("regions").program
    nodes = [node for module in program.graph_module.modules() for node in module.graph.nodes]
    before = [(node.meta, dict(node.meta)) for node in nodes]
    assert any("stack_trace" in meta for meta, _ in before)
    pack_program(program, archive_format=archive_format)
    for node, (meta, content) in zip(nodes, before, strict=True):
        assert node.meta is meta
        assert node.meta.keys() == content.keys()


def test_the_root_folder_is_fixed_and_members_are_stored():
    data = pack_program(programs.case("mlp").program, archive_format="pt2")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {"archive"}
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.read("archive/archive_format") == b"pt2"


WRITE_BOTH = """
import sys, hashlib
sys.path[:0] = sys.argv[1:]
from tests.support import archive_programs as programs
from dist_export.archive.pt2 import pack_program
for name in ("mlp", "transformer", "shapes"):
    for archive_format in ("pt2", "legacy"):
        print(hashlib.sha256(pack_program(programs.case(name).program, archive_format=archive_format)).hexdigest())
"""


def test_two_processes_write_the_same_bytes(tmp_path):
    """Neither the hash seed nor the working directory is in the archive."""
    running = []
    for seed in ("1", "2"):
        cwd = tmp_path / seed
        cwd.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-W", "ignore", "-c", WRITE_BOTH, str(ROOT)]
        running.append(subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True))
    first, second = (process.communicate(timeout=120)[0].split() for process in running)
    assert len(first) == 6
    assert first == second


def test_the_same_process_writes_the_same_bytes_again():
    program = programs.case("mlp").program
    for archive_format in FORMATS:
        assert pack_program(program, archive_format=archive_format) == pack_program(
            program, archive_format=archive_format
        )


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match="'pt3'"):
        pack_program(programs.case("mlp").program, archive_format="pt3")


def assert_known(kind: str, value, where: str) -> int:
    """Walk the JSON beside the table, as a decoder that passes fields to constructors would; return objects seen."""
    if kind == "" or value is None:
        return 0
    if kind[0] in "[{":
        items = enumerate(value) if kind[0] == "[" else value.items()
        return sum(assert_known(kind[1:-1], item, f"{where}.{key}") for key, item in items)
    if kind == "ScalarType":
        assert value in legacy.SCALAR_TYPES, where
        return 0
    table = legacy.UNIONS.get(kind) or legacy.STRUCTS[kind]
    assert value.keys() <= table.keys(), where
    assert kind not in legacy.UNIONS or len(value) == 1, where
    return 1 + sum(assert_known(table[key], item, f"{where}.{key}") for key, item in value.items())


@pytest.mark.parametrize("name", programs.NAMES)
def test_the_legacy_json_has_only_fields_of_schema_8_7(name):
    members = programs.members_of(pack_program(programs.case(name).program, archive_format="legacy"))
    assert list(members) == [
        "serialized_exported_program.json",
        "serialized_state_dict.pt",
        "serialized_constants.pt",
        "serialized_example_inputs.pt",
        "version",
    ]
    assert members["version"] == b"8.7"
    document = json.loads(members["serialized_exported_program.json"])
    assert document["schema_version"] == {"major": 8, "minor": 7}
    assert assert_known("ExportedProgram", document, "$") > 20


def test_the_table_is_a_part_of_what_this_torch_knows():
    """Schema versions of one major only grow: a name in the table that this torch lacks is a slip of the pen."""
    from torch._export.serde import schema

    for name, fields in (legacy.STRUCTS | legacy.UNIONS).items():
        known = {field.name for field in dataclasses.fields(getattr(schema, name))} | set(
            getattr(schema, name).__annotations__
        )
        assert fields.keys() <= known, name
    named = {kind.strip("[]{}") for fields in (legacy.STRUCTS | legacy.UNIONS).values() for kind in fields.values()}
    assert named - {"", "ScalarType"} <= legacy.STRUCTS.keys() | legacy.UNIONS.keys()
    assert {int(value) for value in schema.ScalarType} >= legacy.SCALAR_TYPES


def minimal_document() -> dict:
    members = programs.members_of(pack_program(programs.case("shapes").program, archive_format="legacy"))
    return json.loads(members["serialized_exported_program.json"])


def test_pruning_drops_what_says_nothing():
    document = minimal_document()
    newer = copy.deepcopy(document)
    newer["schema_version"] = {"major": 8, "minor": 99}
    newer["guards_code"] = ["L['a'].size()[0] == 4"]
    newer["graph_module"]["graph"]["invented"] = None
    newer["graph_module"]["graph"]["nodes"][0]["name"] = "sym_size"
    assert legacy.prune(newer) == document


def change_argument(document, argument):
    document["graph_module"]["graph"]["nodes"][0]["inputs"][0]["arg"] = argument


def change_dtype(document):
    next(iter(document["graph_module"]["graph"]["tensor_values"].values()))["dtype"] = 34


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: change_argument(document, {"as_complex": {"real": 0.0, "imag": 1.0}}), "Argument.as_complex"),
        (lambda document: change_argument(document, {"as_int_lists": [[1]]}), r"nodes\[0\].*Argument.as_int_lists"),
        (lambda document: document["graph_module"].update(invented={"x": 1}), "GraphModule.invented"),
        (change_dtype, "dtype number 34"),
        (lambda document: document["schema_version"].update(major=9), "schema 9.7"),
    ],
)
def test_pruning_refuses_to_change_what_a_program_computes(change, message):
    document = minimal_document()
    change(document)
    with pytest.raises(TraceError, match=message):
        legacy.prune(document)
