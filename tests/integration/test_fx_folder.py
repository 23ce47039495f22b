"""The FX folder: a package that can be moved, holds no pickled code and no path, and computes what the program does."""

from __future__ import annotations

import importlib.util
import os
import pickletools
import shutil
import sys
import sysconfig
import tempfile

import pytest
import torch

from dist_export.archive.fx_folder import graph_text, write_fx_folder
from dist_export.errors import ConfigError
from tests.support import archive_programs as programs


@pytest.fixture
def import_moved(tmp_path, monkeypatch):
    """Write the folder, move it, remove where it was, change the directory, and import its class."""

    def run(program, name="user_model"):
        written, moved = tmp_path / "first" / name, tmp_path / "second" / "elsewhere"
        write_fx_folder(program, written, name)
        moved.parent.mkdir(exist_ok=True)
        shutil.move(written, moved)
        shutil.rmtree(written.parent)
        (tmp_path / "cwd").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "cwd")
        for module in ("elsewhere", "elsewhere.module"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        spec = importlib.util.spec_from_file_location("elsewhere", moved / "__init__.py")
        package = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "elsewhere", package)
        spec.loader.exec_module(package)
        monkeypatch.delitem(sys.modules, "elsewhere.module")
        return getattr(package, name)

    return run


@pytest.mark.parametrize("name", programs.NAMES)
def test_a_moved_folder_gives_what_the_model_gives(name, import_moved):
    program, inputs, expected = programs.case(name)
    module = import_moved(program)()
    programs.assert_same(module(**inputs), expected)
    programs.assert_same(module(*inputs.values()), expected)
    twice = {key: torch.cat([value, value]) for key, value in inputs.items()}
    programs.assert_same(module(**twice), programs.as_tuple(program.module()(**twice)))


@pytest.mark.parametrize("hidden", ["device", "torch", "inf"])
def test_an_input_may_be_named_like_a_global_of_the_code(hidden, import_moved):
    """ExportedProgram.module() fails on an input named torch; the folder does not."""
    source = f"def forward(self, *, {hidden}):\n    return double({hidden})\n"
    scope = {"double": lambda x: x * 2 + torch.arange(x.shape[0])[:, None].clamp(max=float("inf"))}
    exec(source, scope)
    module_class = type("Hidden", (torch.nn.Module,), {"forward": scope["forward"]})
    program, inputs, expected = programs.trace(module_class(), {hidden: torch.randn(4, 2)})
    programs.assert_same(import_moved(program)()(**inputs), expected)


@pytest.mark.parametrize("name", programs.NAMES)
def test_files_hold_no_path_and_no_code_but_python(name, tmp_path):
    """Three files; the weights load as weights only; no file names a place on this machine."""
    program = programs.case(name).program
    write_fx_folder(program, tmp_path / "user_model", "user_model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "user_model").iterdir()}
    assert sorted(files) == ["__init__.py", "module.py", "state_dict.pt"]
    assert b"weights_only=True" in files["module.py"]
    files["graph.txt"] = graph_text(program).encode()
    here = {os.getcwd(), str(tmp_path), sys.prefix, sysconfig.get_path("purelib"), tempfile.gettempdir()}
    for name_, content in files.items():
        for path in here:
            assert path.encode() not in content, (name_, path)
    pickled = programs.members_of(files["state_dict.pt"])["archive/data.pkl"]
    globals_ = {str(argument) for opcode, argument, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL"}
    assert all(name_.startswith(("torch ", "torch._utils ", "collections ")) for name_ in globals_)


def test_the_same_program_writes_the_same_files(tmp_path):
    program = programs.case("mlp").program
    for folder in ("a", "b"):
        write_fx_folder(program, tmp_path / folder, "user_model")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert graph_text(program) == graph_text(program)


def test_weights_are_flat_and_only_those_in_use(tmp_path):
    program = programs.case("mlp").program
    write_fx_folder(program, tmp_path / "user_model", "user_model")
    state = torch.load(tmp_path / "user_model" / "state_dict.pt", weights_only=True)
    assert {"weight_weight", "norm_running_mean", "scale", "offsets"} <= state.keys()
    assert not [name for name in state if "unused" in name or "." in name]
    assert len([name for name in state if name in ("head_weight", "tied_weight")]) == 1


def test_the_program_is_as_before(tmp_path):
    program, inputs, expected = programs.case("regions")
    before = str(program.graph), [dict(node.meta) for node in program.graph.nodes]
    write_fx_folder(program, tmp_path / "user_model", "user_model")
    graph_text(program)
    assert str(program.graph) == before[0]
    assert [node.meta.keys() for node in program.graph.nodes] == [meta.keys() for meta in before[1]]
    programs.assert_same(program.module()(**inputs), expected)


def test_a_view_is_written_without_what_it_is_a_view_of(tmp_path, import_moved):
    class Sliced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(100_000)[:6])

        def forward(self, *, x):
            return x * self.weight

    program, inputs, expected = programs.trace(Sliced(), {"x": torch.randn(4, 6)})
    write_fx_folder(program, tmp_path / "user_model", "user_model")
    assert (tmp_path / "user_model" / "state_dict.pt").stat().st_size < 10_000
    programs.assert_same(import_moved(program)()(**inputs), expected)


def test_guards_and_assertions_are_gone(tmp_path):
    """What is left is arithmetic: no guard module, no assertion, nothing that unpacks a pytree."""
    for name in programs.NAMES:
        text = graph_text(programs.case(name).program)
        assert "_guards_fn" not in text
        assert "_assert" not in text
        assert "tree_flatten" not in text


def test_graph_text_has_the_graph_then_its_code():
    text = graph_text(programs.case("mlp").program)
    assert text.startswith("graph():\n")
    assert 0 < text.index("return (") < text.index("def forward(self, input, self_x, weight):")
    assert "torch.ops.aten.linear.default" in text


@pytest.mark.parametrize("name", ["user-model", "1st", "class", "torch", "Path", ""])
def test_a_name_that_no_class_can_have_is_refused_before_anything_is_written(name, tmp_path):
    with pytest.raises(ConfigError, match="cannot be the name"):
        write_fx_folder(programs.case("mlp").program, tmp_path / "folder", name)
    assert not (tmp_path / "folder").exists()
