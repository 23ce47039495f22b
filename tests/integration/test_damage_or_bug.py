"""What is damaged is told in one line; what fails because of us keeps its traceback."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_export
from dist_export.archive.pt2 import pack_program
from dist_export.archive.safe_load import check_archive
from dist_export.archive.safe_pickle import read_sample_pickle
from dist_export.dense.folder import _pickled
from dist_export.errors import DistExportError, PackageError
from dist_export.inspect.describe import describe, render
from dist_export.manifest import Manifest, compute_digest
from dist_export.reporting.events import samples_of
from dist_export.reporting.summary import summarize_same
from dist_export.verify.verify import verify
from tests.support import archive_programs as programs
from tests.support import exports, tiny_model
from tests.support import pickle_attacks as pickles
from tests.support.fuzzing import damage_bytes, damage_index, damage_json, damage_shard
from tests.support.hostile_cases import edit

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")

PROGRAM = "archive/models/model.json"
WEIGHTS = "archive/data/weights/model_weights_config.json"
BUGS = (KeyError, TypeError, AttributeError, AssertionError)


@pytest.fixture(scope="module")
def archive() -> bytes:
    return pack_program(programs.case("mlp").program, archive_format="pt2")


def change_json(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def apply(raw: bytes) -> bytes:
        document = json.loads(raw)
        change(document)
        return json.dumps(document).encode()

    return apply


def refuse(data: bytes) -> None:
    with pytest.raises(PackageError) as caught:
        check_archive(data)
    assert str(caught.value).isprintable()


def put(value: Any, *path: str | int) -> Callable[[bytes], bytes]:
    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = value

    return change_json(change)


def spec(value: Any) -> str:
    return json.dumps([1, value])


LEAF = {"type": None, "context": None, "children_spec": []}
SIGNATURE = ("graph_module", "module_call_graph", 0, "signature")
WRONG_TYPES: dict[str, tuple[str, Any, tuple[str | int, ...]]] = {
    **{f"ranges {value!r}": (PROGRAM, value, ("range_constraints",)) for value in (None, [], "s0", 1, [["s0", {}]])},
    **{f"a range {value!r}": (PROGRAM, {"s0": value}, ("range_constraints",)) for value in (None, [1], "x", 1)},
    **{f"guards {value!r}": (PROGRAM, value, ("guards_code",)) for value in (None, 1, {}, "True", [[]], [{}])},
    **{f"version {value!r}": (PROGRAM, value, ("schema_version",)) for value in (None, 8, "8.20", [8, 20], {"major": 8})},
    **{f"major {value!r}": (PROGRAM, value, ("schema_version", "major")) for value in (None, "8", 8.0, True, [8])},
    **{f"inputs {value!r}": (PROGRAM, value, (*SIGNATURE, "in_spec"))
       for value in ("{}", "[]", "[1]", "null", "1", spec([]), spec(None), spec({}), spec({**LEAF, "type": []}),
                     spec({**LEAF, "type": {}}), spec({**LEAF, "context": 5}), spec({**LEAF, "context": []}),
                     spec({**LEAF, "children_spec": None}), spec({**LEAF, "children_spec": {"a": LEAF}}),
                     spec({**LEAF, "children_spec": [None]}), spec({**LEAF, "context": "{}"}))},
    **{f"names {value!r}": (PROGRAM, value, (*SIGNATURE, "forward_arg_names")) for value in (1, [None], [[]], {"a": 1})},
    **{f"text input {value!r}": (PROGRAM, {"constant_input": value}, ("graph_module", "signature", "input_specs", 0))
       for value in (1, [], {}, {"value": None}, {"value": ["x"]}, {"value": 1})},
    **{f"weights {value!r}": (WEIGHTS, value, ("config",)) for value in (None, [], "x", 1)},
    **{f"weight {value!r}": (WEIGHTS, {"a": value}, ("config",))
       for value in (None, [], "x", {}, {"path_name": 1, "use_pickle": False}, {"path_name": ["weight_0"]},
                     {"path_name": "weight_0"}, {"path_name": "weight_0", "use_pickle": 0})},
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_json_of_other_types_is_one_line(name: str, archive: bytes) -> None:
    member, value, path = WRONG_TYPES[name]
    refuse(programs.exchange(archive, {member: put(value, *path)}))


def test_a_program_that_is_no_object_is_one_line(archive: bytes) -> None:
    for value in (b"[]", b"null", b"1", b'"x"', b"", b"[" * 100_000):
        for member in (PROGRAM, WEIGHTS):
            refuse(programs.exchange(archive, {member: lambda _, value=value: value}))


def test_a_member_that_is_called_as_the_root_folder_is_one_line(archive: bytes) -> None:
    file = BytesIO(archive)
    with zipfile.ZipFile(file, "a") as added:
        added.writestr("archive", b"")
    refuse(file.getvalue())


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize(
    "place", ["safe_load.check_program", "safe_load.check_attribute_name", "safe_load.check_pickle"]
)
def test_a_bug_in_the_look_at_a_program_keeps_its_traceback(place, bug, archive, monkeypatch) -> None:
    monkeypatch.setattr(f"dist_export.archive.{place}", fail_with(bug))
    with pytest.raises(bug, match="a bug of ours"):
        check_archive(archive)


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("place", ["_rebuild", "_make", "_load_storage", "check_state_archive"])
def test_a_bug_in_the_look_at_a_sample_keeps_its_traceback(place, bug, monkeypatch) -> None:
    monkeypatch.setattr(f"dist_export.archive.safe_pickle.{place}", fail_with(bug))
    with pytest.raises(bug, match="a bug of ours"):
        read_sample_pickle(_pickled(torch.ones(2)), where="x")


def fail_with(bug: type[Exception]) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise bug("a bug of ours")

    return fail


def sample_over(storage: bytes) -> bytes:
    loaded = pickles.call(b"torch.storage", "_load_from_bytes", b"B" + pickles.sized(storage))
    return pickles.whole(pickles.view(1, strides=(1,), storage=loaded), 4)


def older_storage(kind: str, *, module: str = "torch") -> bytes:
    buffer = BytesIO()
    torch.save(torch.FloatStorage([1.0, 2.0, 3.0, 4.0]), buffer, _use_new_zipfile_serialization=False)
    raw = buffer.getvalue()
    assert b"ctorch\nFloatStorage\n" in raw
    return raw.replace(b"ctorch\nFloatStorage\n", f"c{module}\n{kind}\n".encode())


@pytest.mark.parametrize("module", ["torch", "torch.storage"])
@pytest.mark.parametrize("kind", ["QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4", "Double"])
def test_a_storage_of_another_kind_is_one_line(kind: str, module: str) -> None:
    with pytest.raises(PackageError) as caught:
        read_sample_pickle(sample_over(older_storage(f"{kind}Storage", module=module)), where="x")
    assert str(caught.value).isprintable()


def test_a_storage_of_the_older_format_has_as_many_values_as_it_says() -> None:
    raw = older_storage("FloatStorage")
    assert read_sample_pickle(sample_over(raw), where="x").tolist() == [1.0]
    assert read_sample_pickle(sample_over(raw + raw[-24:-16] + bytes(16)), where="x").tolist() == [1.0]
    for damaged in (raw[:-1], raw[:-24] + b"\5" + raw[-23:], raw[:-24], raw[:-16]):
        with pytest.raises(PackageError):
            read_sample_pickle(sample_over(damaged), where="x")


def test_damaged_samples_give_one_line_or_tensors() -> None:
    values = (torch.arange(6.0).reshape(2, 3), (torch.ones(2).half(), torch.tensor([True])), {"a": torch.ones(2)})
    bases = [save(value) for value in values for save in (_pickled, pickle.dumps)]
    draw = random.Random(5)
    refused = 0
    for _ in range(400):
        raw = damage_bytes(draw.choice(bases), draw)
        try:
            read_sample_pickle(raw, where="x")
        except PackageError as error:
            refused += 1
            assert str(error).isprintable()
    assert 100 < refused < 400


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("package")
    checkpoint = str(tiny_model.write_tiny_checkpoint(base / "ckpt"))
    settings = {"ckpt_dir": checkpoint, "export_dir": str(base / "out"), "filter_sparse_opt": True, "num_shards": 2}
    exports.export(settings)
    return base / "out"


DAMAGE = {".safetensors": damage_shard, ".row_index": damage_index}


@pytest.mark.parametrize("seed", range(6))
def test_damaged_packages_give_findings_or_one_line(seed: int, package: Path, tmp_path: Path) -> None:
    """As whoever makes a package can damage it: its manifest vouches for what is there."""
    draw = random.Random(seed)
    names = [path.name for path in package.iterdir()]
    for number in range(8):
        folder = shutil.copytree(package, tmp_path / str(number))
        name = draw.choice(names)
        raw = (folder / name).read_bytes()
        changed = DAMAGE.get(Path(name).suffix, damage_json)(raw, draw)
        (folder / name).write_bytes(changed)
        if changed != raw and name != "manifest.json":
            assert verify(str(folder)).findings
        seal_again(folder)
        look_at(folder)


def seal_again(folder: Path) -> None:
    try:
        document = json.loads((folder / "manifest.json").read_bytes())
        for entry in document["files"]:
            entry.update(digest="", num_bytes=(folder / entry["path"]).stat().st_size)
        document["digest"] = compute_digest(document)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        return  # damaged beyond that
    (folder / "manifest.json").write_text(json.dumps(document))


def look_at(folder: Path) -> None:
    for finding in verify(str(folder)).findings:
        assert str(finding).isprintable()
    for look in (lambda: render(describe(str(folder))), lambda: look_up(folder)):
        try:
            look()
        except DistExportError as error:
            assert all(line.isprintable() for line in error.args)


def look_up(folder: Path) -> None:
    with dist_export.open_package(folder) as package:
        assert all(line.isprintable() for line in str(package.manifest).splitlines())
        for table in package.manifest.tables:
            package.lookup(table.name, [1, -1, 40_000, 1 << 62])


HOSTILE_RUNS: dict[str, dict[str, Any]] = {
    "ranks that are none": {"ranks": 5},
    "a rank without anything": {"ranks": [{}]},
    "no time at all": {
        "ranks": [{"rank": 0, "num_units": 1, "num_helped": 0, "num_bytes": 1 << 60, "seconds": 1e-300}]
    },
    "a rank of texts": {"ranks": [{"rank": "0", "num_units": "1", "num_helped": [], "num_bytes": {}, "seconds": None}]},
    "seconds that are a list": {"seconds": [1]},
    "seconds that are text": {"seconds": {"plan": "\x1b[31m"}},
    "a store that is none": {"store": [1]},
    "a store of lists": {"store": {"requests": []}},
    "a sample that is none": {"sample": [1]},
    "a sample of texts": {"sample": {"asked": {"t": "1"}}},
    "shards that are a list": {"reused_shards": [1]},
    "files that are a number": {"left_alone": 1},
    "files with escape codes": {"left_alone": ["\x1b[31m"]},
    "a drift that is none": {"drift": [1]},
    "a start with escape codes": {"started": "\x1b[31m\n"},
}


@pytest.mark.parametrize("name", HOSTILE_RUNS)
def test_whatever_run_holds_the_manifest_is_told(name: str, package: Path, tmp_path: Path) -> None:
    """No digest covers it: a package stays sound, and both who opens it and who exports it again read its summary."""
    folder = shutil.copytree(package, tmp_path / "copy")
    edit("manifest.json", put(HOSTILE_RUNS[name], "run"))(folder)
    assert not verify(str(folder)).findings
    manifest: Manifest = dist_export.open_package(folder).manifest
    for line in (*str(manifest).split("\n"), *summarize_same(manifest, "out")):
        assert line.isprintable()
    assert "tables   2" in str(manifest)
    assert samples_of(manifest, export_dir="out", seconds={}, rank_bytes={})
