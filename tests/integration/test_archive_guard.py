"""What may be loaded: honest archives pass; of others nothing runs, and one line tells why."""

from __future__ import annotations

import io
import json
import math
import operator
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile

import pytest
import torch

from dist_export.archive.allowlist import UnsafeContentError, check_pickle, check_program
from dist_export.archive.pt2 import pack_program
from dist_export.archive.safe_load import ArchiveInfo, check_archive, load_program
from dist_export.errors import PackageError
from tests.support import ROOT
from tests.support import archive_programs as programs

FORMATS = ("pt2", "legacy")
PROGRAM = {"pt2": "archive/models/model.json", "legacy": "serialized_exported_program.json"}
SAMPLE = {"pt2": "archive/data/sample_inputs/model.pt", "legacy": "serialized_example_inputs.pt"}


@pytest.fixture(params=FORMATS)
def archive_format(request):
    return request.param


@pytest.fixture
def archive(archive_format) -> bytes:
    return pack_program(programs.case("mlp").program, archive_format=archive_format)


@pytest.fixture
def pt2() -> bytes:
    return pack_program(programs.case("mlp").program, archive_format="pt2")


class Payload:
    """Unpickling one makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def saved(value, **kwargs) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


def refuse(source, *patterns: str) -> None:
    for check in (check_archive, load_program):
        with pytest.raises(PackageError) as caught:
            check(source)
        text = str(caught.value)
        assert "\n" not in text
        for pattern in patterns:
            assert pattern in text


@pytest.mark.parametrize("name", programs.NAMES)
def test_honest_archives_pass_and_load(name, archive_format, tmp_path):
    """From bytes, a file object and a path; the loaded program computes what the model does."""
    program, inputs, expected = programs.case(name)
    data = pack_program(program, archive_format=archive_format)
    path = tmp_path / "exported_model.pt"
    path.write_bytes(data)
    found = check_archive(data)
    assert found == check_archive(path) == check_archive(str(path)) == check_archive(io.BytesIO(data))
    assert isinstance(found, ArchiveInfo)
    assert found.format == archive_format
    assert found.schema_version.startswith("8.")
    assert found.member_names == tuple(programs.members_of(data))
    for source in (data, path, io.BytesIO(data)):
        programs.assert_same(load_program(source).module()(**inputs), expected)


def test_a_file_object_is_left_where_it_was(archive):
    file = io.BytesIO(archive)
    file.seek(7)
    check_archive(file)
    assert file.tell() == 7


def test_loading_a_legacy_archive_says_nothing(capfd):
    """torch would warn, with a traceback, that it is no PT2 archive."""
    load_program(pack_program(programs.case("mlp").program, archive_format="legacy"))
    assert capfd.readouterr() == ("", "")


def test_the_guard_needs_no_torch(tmp_path, archive):
    """A process that only looks does not pay for importing torch."""
    path = tmp_path / "exported_model.pt"
    path.write_bytes(archive)
    code = (
        "import sys; from dist_export.archive.safe_load import check_archive; print(check_archive(sys.argv[1]).format)"
    )
    command = [sys.executable, "-c", code + "; assert 'torch' not in sys.modules", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_what_is_no_archive_is_refused(tmp_path, archive):
    (tmp_path / "text.pt").write_text("hello")
    refuse(tmp_path / "text.pt", "text.pt", "not a zip")
    refuse(tmp_path / "absent.pt", "absent.pt", "cannot be read")
    refuse(b"", "not a zip")
    refuse(archive[: len(archive) // 2], "truncated")
    refuse(archive[:-30], "truncated")
    refuse(archive[len(archive) // 3 :], "truncated")
    refuse(b"#!/bin/sh\n" + archive, "not a zip")
    refuse(archive + b"more", "not a zip")
    refuse(programs.exchange(saved({}), {}), "neither a PT2 archive nor the legacy layout")


def test_a_flipped_byte_is_noticed(archive_format, archive):
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        member = opened.getinfo(PROGRAM[archive_format])
    position = member.header_offset + member.file_size // 2
    refuse(archive[:position] + bytes([archive[position] ^ 1]) + archive[position + 1 :], "CRC")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "archive/../../x", "archive\\x", "C:/x", "archive//x", "archive/x/"]
)
def test_member_names_that_leave_the_archive_are_refused(archive, name):
    refuse(programs.exchange(archive, {name: b"x"}), "leaves the archive")


def test_two_members_of_one_name_are_refused(archive_format, archive):
    """Of a name twice, zipfile reads the last and torch the first; torch does not look at the case either."""
    file = io.BytesIO(archive)
    with zipfile.ZipFile(file, "a") as opened:
        content = opened.read(PROGRAM[archive_format])
        with pytest.warns(UserWarning, match="Duplicate"):
            opened.writestr(PROGRAM[archive_format], content)
    refuse(file.getvalue(), "two members of this name", PROGRAM[archive_format])
    refuse(programs.exchange(archive, {PROGRAM[archive_format].upper(): b"{}"}), "two members of this name")


def test_zip_bombs_are_refused_by_what_they_declare(archive, archive_format):
    folder = "archive/" if archive_format == "pt2" else ""
    bomb = programs.exchange(archive, {folder + "extra": bytes(10_000_000)}, compression=zipfile.ZIP_DEFLATED)
    refuse(bomb, "a member that is compressed")
    packed = programs.exchange(archive, {folder + "extra": b"x"}, compression=zipfile.ZIP_BZIP2)
    refuse(packed, "a member that is compressed")
    for_one = lambda entry: zipfile.ZIP_DEFLATED if entry.endswith("extra") else zipfile.ZIP_STORED
    members = {**programs.members_of(archive), folder + "extra": bytes(10_000_000)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for name, content in members.items():
            opened.writestr(name, content, compress_type=for_one(name))
    refuse(buffer.getvalue(), "extra", "a member that is compressed")


def test_members_that_overlap_are_refused(archive):
    """A directory may point many entries at one stretch of bytes."""
    end = archive.rindex(b"PK\x05\x06")
    count, size, offset = struct.unpack("<HII", archive[end + 10 : end + 20])
    directory = archive[offset : offset + size]
    biggest = max(zipfile.ZipFile(io.BytesIO(archive)).infolist(), key=lambda entry: entry.file_size)
    entries = [b"PK\x01\x02" + entry for entry in directory.split(b"PK\x01\x02")[1:]]
    model = next(entry for entry in entries if biggest.filename.encode() in entry)
    name = biggest.filename.encode()
    copies = [model.replace(name, name[:-4] + b"%04d" % number) for number in range(9)]
    directory += b"".join(copies)
    count += len(copies)
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(directory), offset, 0)
    refuse(archive[:offset] + directory + tail)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_act_is_refused_and_does_not(archive_format, archive, tmp_path, protocol):
    target = tmp_path / "made"
    bomb = saved(((Payload(target),), {}), pickle_protocol=protocol)
    refuse(programs.exchange(archive, {SAMPLE[archive_format]: bomb}), "pickle that calls", "mkdir", ".pt")
    assert not target.exists()
    torch.load(io.BytesIO(bomb), weights_only=False)
    assert target.exists(), "the payload was never live"


@pytest.mark.parametrize("member", ["serialized_state_dict.pt", "serialized_constants.pt"])
def test_legacy_weights_that_would_act_are_refused(tmp_path, member):
    data = pack_program(programs.case("mlp").program, archive_format="legacy")
    bomb = saved({"weight": Payload(tmp_path / "made")})
    refuse(programs.exchange(data, {member: bomb}), member, "mkdir")
    assert not (tmp_path / "made").exists()


def edit_json(change):
    def edit(content: bytes) -> bytes:
        document = json.loads(content)
        change(document)
        return json.dumps(document).encode()

    return edit


@pytest.mark.parametrize("folder", ["weights", "constants"])
@pytest.mark.parametrize(
    "change",
    [
        {"use_pickle": True},
        {"use_pickle": 1},
        {"path_name": "custom_obj_0"},
        {"path_name": "opaque_obj_0"},
        {"path_name": "../weights/weight_0"},
        {"path_name": "weight_99"},
        {"path_name": None},
    ],
)
def test_pickled_and_custom_payloads_are_refused(pt2, tmp_path, folder, change):
    member = f"archive/data/{folder}/model_{folder}_config.json"
    bomb = pickle.dumps(Payload(tmp_path / "made"))

    def point_at_bomb(document):
        next(iter(document["config"].values())).update(change)

    changes = {member: edit_json(point_at_bomb), f"archive/data/{folder}/opaque_obj_0": bomb}
    refuse(programs.exchange(pt2, changes), f"model_{folder}_config.json")
    assert not (tmp_path / "made").exists()


def test_weights_pickled_as_torch_2_8_did_are_looked_at(pt2, tmp_path):
    bomb = saved({"weight": Payload(tmp_path / "made")})
    refuse(programs.exchange(pt2, {"archive/data/weights/model.pt": bomb}), "data/weights/model.pt", "mkdir")
    assert not (tmp_path / "made").exists()


def test_a_second_program_is_refused(pt2):
    """torch loads every program in an archive, with its own weights and samples, and returns one."""
    model = programs.members_of(pt2)["archive/models/model.json"]
    refuse(programs.exchange(pt2, {"archive/models/deep/er.json": model}), "models/deep/er.json", "a second program")
    deep = json.dumps({"config": {"w": {"path_name": "opaque_obj_0", "use_pickle": True}}}).encode()
    name = "archive/data/constants/deep/er_constants_config.json"
    refuse(programs.exchange(pt2, {name: deep}), "pickled or custom object")


def test_compiled_code_is_refused(pt2):
    refuse(programs.exchange(pt2, {"archive/data/aotinductor/model/model.so": b"\x7fELF"}), "compiled code")


def test_torchscript_and_bare_pickles_are_refused(archive_format, archive, tmp_path):
    bare = pickle.dumps(Payload(tmp_path / "made"))
    refuse(
        programs.exchange(archive, {SAMPLE[archive_format]: bare}),
        f"{SAMPLE[archive_format].removeprefix('archive/')}: not a zip archive",
    )
    script = programs.exchange(saved({}), {"archive/constants.pkl": b"\x80\x02}."})
    refuse(programs.exchange(archive, {SAMPLE[archive_format]: script}), "not the layout of torch.save")
    assert not (tmp_path / "made").exists()


def a_node(document):
    return document["graph_module"]["graph"]["nodes"][0]


def first_signature(document):
    return document["graph_module"]["module_call_graph"][0]["signature"]


def change_size(text):
    def change(document):
        sizes = document["graph_module"]["graph"]["sym_int_values"].values()
        next(size["as_expr"] for size in sizes if "as_expr" in size)["expr_str"] = text

    return change


def rename_input(new):
    def change(document):
        signature = first_signature(document)
        signature["in_spec"] = signature["in_spec"].replace("self_x", new)

    return change


CODE = "__import__('os').mkdir('made')"
HOSTILE_JSON = {
    "a size that sympy would evaluate": (change_size(CODE), "size expression"),
    "a size with a name of sympy": (change_size("lambdify(1, 2)"), "size expression"),
    "a size with an attribute": (change_size("Integer(1).func"), "size expression"),
    "a symbol": (
        lambda document: document["range_constraints"].update({CODE: {"min_val": 0, "max_val": 1}}),
        "expression",
    ),
    "a guard": (lambda document: document.update(guards_code=[f"{CODE} is None"]), "guard"),
    "a guard of two lines": (lambda document: document.update(guards_code=["L['a'].size()[0] ==\\\n1"]), "guard"),
    "a guard with a quote": (lambda document: document.update(guards_code=["L['\"'].size()[0] == 1"]), "guard"),
    "no guard": (lambda document: document.update(guards_code=[None, 1, "a b"]), "guard"),
    "an operator": (lambda document: a_node(document).update(target="torch.os.system"), "operator"),
    "an operator that writes": (
        lambda document: a_node(document).update(target="torch.ops.aten.from_file.default"),
        "op",
    ),
    "a dunder": (lambda document: a_node(document).update(target="torch.ops.aten.__class__"), "operator"),
    "a node's name": (lambda document: a_node(document).update(name=f"x={CODE}"), "a name"),
    "an argument's name": (lambda document: first_signature(document).update(forward_arg_names=[CODE]), "a name"),
    "an input's name": (rename_input("x=f(1)"), "a name"),
    "a container": (rename_input('\\"], \\"type\\": \\"x'), "model.json|serialized"),
    "a weight's name": (
        lambda document: document["graph_module"]["signature"]["input_specs"][0]["parameter"].update(
            parameter_name='x")'
        ),
        "a name",
    ),
    "keys that are no list": (
        lambda document: first_signature(document).update(
            in_spec=json.dumps([1, {"type": "builtins.dict", "context": json.dumps({CODE: 1}), "children_spec": []}])
        ),
        "the keys",
    ),
    "a text input": (
        lambda document: document["graph_module"]["signature"]["input_specs"].append(
            {"constant_input": {"name": "x", "value": {"as_string": f"' + {CODE} + '"}}}
        ),
        "a name",
    ),
    "a range": (
        lambda document: document["range_constraints"].update(s1={"min_val": CODE, "max_val": None}),
        "a range",
    ),
    "no version": (lambda document: document.pop("schema_version"), "not the JSON"),
}


@pytest.mark.parametrize("case", HOSTILE_JSON)
def test_a_program_that_would_act_is_refused_and_does_not(archive_format, archive, tmp_path, monkeypatch, case):
    """Without any pickle: sizes are evaluated when torch loads a program, guards when it becomes a module."""
    monkeypatch.chdir(tmp_path)
    change, message = HOSTILE_JSON[case]
    bad = programs.exchange(archive, {PROGRAM[archive_format]: edit_json(change)})
    refuse(bad, PROGRAM[archive_format].removeprefix("archive/"), *([] if "|" in message else [message]))
    assert not list(tmp_path.iterdir())


def test_a_container_type_that_would_import_is_refused(archive_format, archive):
    def change(document):
        signature = first_signature(document)
        signature["out_spec"] = signature["out_spec"].replace("builtins.tuple", "collections.defaultdict")

    refuse(programs.exchange(archive, {PROGRAM[archive_format]: edit_json(change)}), "collections.defaultdict")


def test_json_that_readers_may_read_differently_is_refused(archive_format, archive):
    name = PROGRAM[archive_format]
    twice = lambda content: b'{"graph_module": {}, ' + content.lstrip()[1:]
    refuse(programs.exchange(archive, {name: twice}), "one key twice")
    refuse(programs.exchange(archive, {name: b"[" * 100_000}), "not the JSON")
    refuse(programs.exchange(archive, {name: b"\xff\x00"}), "not the JSON")


def test_what_torch_cannot_load_is_one_line_too(archive_format, archive):
    def change(document):
        document["graph_module"]["graph"]["nodes"][0]["inputs"][0]["arg"] = {"as_tensor": {"name": "absent"}}

    broken = programs.exchange(archive, {PROGRAM[archive_format]: edit_json(change)})
    with pytest.raises(PackageError, match="cannot load this program of schema 8") as caught:
        load_program(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_tensors_pass(protocol):
    """Of every dtype, of parameters and containers, in every protocol that torch.save may be asked for."""
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex64"
    small = "float8_e4m3fn float8_e5m2 float8_e4m3fnuz"
    tensors = {name: torch.zeros(2, 3).to(getattr(torch, name)) for name in f"{names} {small}".split()}
    shared = torch.nn.Parameter(torch.ones(2))
    value = (tensors, [shared, shared, torch.Size([1, 2])], {"f": 1.5, "n": None, "t": True, "i": -(2**70), 3: "x"})
    check_pickle(programs.members_of(saved(value, pickle_protocol=protocol))["archive/data.pkl"])


def assembled(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Payload("x"), protocol=0),
        pickle.dumps(Payload("x"), protocol=2),
        pickle.dumps(Payload("x"), protocol=5),
        assembled(text("os"), text("system"), b"\x93"),
        assembled(text("os"), b"\x94", text("system"), b"\x94", b"h\x00h\x01\x93"),  # by way of the memo
        assembled(text("os"), b"q\x07", text("system"), b"q\x07", b"h\x07h\x07\x93"),  # a slot written twice
        assembled(text("torch"), b"N", b"\x93"),
        assembled(text("torch"), text("Size"), b"\x85", b"\x93"),  # a tuple where a string was
        assembled(b"\x93"),
        b"\x80\x02ctorch.storage\n_load_from_bytes\n.",
        b"\x80\x02c__builtin__\neval\n.",
        b"\x80\x02cbuiltins\ngetattr\n.",
        b"\x80\x02ctorch._utils\n_rebuild_wrapper_subclass\n.",
        b"(S'x'\nios\nsystem\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02}}b.",
        b"\x80\x02}",
        b"",
        b"\xff",
    ],
)
def test_pickles_that_name_more_than_tensors_do_not_pass(data):
    with pytest.raises(UnsafeContentError):
        check_pickle(data)


def test_strings_in_the_memo_are_followed():
    check_pickle(assembled(text("torch"), b"\x94", text("Size"), b"\x94", b"h\x00h\x01\x93"))
    assert [opcode.name for opcode, _, _ in pickletools.genops(pickle.dumps(os.mkdir, 4))].count("STACK_GLOBAL") == 1


def test_operators_on_sizes_pass():
    """Every operator that torch serializes for symbolic sizes, by the name it gives them."""
    from torch._export.serde import serialize

    named = {operator: "_operator", math: "math", torch: "torch"}
    for function in serialize._SYM_OPS:
        homes = [name for home, name in named.items() if getattr(home, function.__name__, None) is function]
        assert homes, function
        check_program({"target": f"{homes[0]}.{function.__name__}"})
    for name in ("torch.ops.aten.add.Tensor", "torch.ops.aten._softmax.default", "torch.ops.aten.__and__.Tensor"):
        check_program({"target": name})
    check_program({"target": "torch.ops.higher_order.wrap_with_autocast"})


def test_size_expressions_of_torch_pass():
    """As sympy writes what torch makes of arithmetic on sizes, and as people abbreviate it."""
    import sympy
    from torch.utils._sympy import functions

    size = sympy.Symbol("s31", positive=True, integer=True)
    for expression in (
        functions.FloorDiv(size + 1, 2),
        functions.Mod(size, 3),
        functions.CeilToInt(size / 2.5),
        functions.IntTrueDiv(size, 2),
        sympy.Max(size, 5),
        sympy.Eq(size, 4),
        sympy.And(size < 4, size > 2),
        size**2 - 2 * size,
        sympy.Rational(1, 3) * size,
    ):
        check_program({"expr_str": sympy.srepr(expression)})
    check_program({"range_constraints": {"s31": {}, "u0": {}}, "expr_str": "s0 + 2*s1"})
