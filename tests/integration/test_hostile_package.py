"""Packages that came from elsewhere: a finding of verify, one line of inspect, a PackageError of open_package."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

import dist_export
from dist_export.errors import PackageError
from dist_export.manifest import compute_digest
from tests.support import exports, tiny_model
from tests.support.hostile_cases import (
    Damage,
    assert_refused,
    edit,
    edit_json,
    instead,
    link_out,
    run,
    sparse_file,
    swap,
)

MANIFEST = "manifest.json"
SHARD = "model-000000-of-000002.safetensors"
PROGRAM = "fx_user_model/exported_model.pt"
ESCAPE = "\x1b]0;owned\x07\x1b[31m\u202e\x9b2J\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("exported")
    settings = {
        "ckpt_dir": str(tiny_model.write_tiny_checkpoint(base / "ckpt")),
        "export_dir": str(base / "out"),
        "filter_sparse_opt": True,
        "num_shards": 2,
        "model": tiny_model.MODEL,
        "dataset": tiny_model.DATASET,
    }
    exports.export(settings)
    return base / "out"


@pytest.fixture
def package(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "package")


def forge(change: Any) -> Damage:
    """Change the manifest and give it the digest that fits, as whoever makes a package can."""

    def apply(raw: bytes) -> bytes:
        document = json.loads(raw)
        change(document)
        document["digest"] = compute_digest(document)
        return json.dumps(document).encode()

    return edit(MANIFEST, apply)


def put(value: object, *path: str | int) -> Damage:
    """Set one value of the manifest and seal it again."""

    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = value

    return forge(change)


TABLE = ("tables", 0)
PART = (*TABLE, "parts", 0)
KEPT = (*TABLE, "kept", 1)
MANIFESTS: dict[str, tuple[Damage, str]] = {
    "cut": (edit(MANIFEST, lambda raw: raw[:-40]), "is no package manifest"),
    "nothing": (edit(MANIFEST, lambda _: b""), "is no package manifest"),
    "a list": (edit(MANIFEST, lambda _: b"[]"), "is no package manifest"),
    "no UTF-8": (edit(MANIFEST, swap(b'"format"', b'"\xff":0,"format"')), "manifest.json"),
    "a byte order mark": (edit(MANIFEST, lambda raw: b"\xef\xbb\xbf" + raw), "is no package manifest"),
    "a key twice": (edit(MANIFEST, swap(b'"format"', b'"mode":"filter","format"')), "'mode' stands there twice"),
    "a key twice, once escaped": (edit(MANIFEST, swap(b'"format"', b'"\\u006dode":0,"format"')), "manifest.json"),
    "a key twice in an entry": (edit(MANIFEST, swap(b'"rows_in"', b'"rows_in":1,"rows_in"')), "'rows_in' stands there twice"),
    "a key twice in what varies": (edit(MANIFEST, swap(b'"started"', b'"started":1,"started"')), "'started' stands there"),
    "NaN": (edit(MANIFEST, swap(b'"started"', b'"a":NaN,"started"')), "manifest.json"),
    "1e400": (edit(MANIFEST, swap(b'"started"', b'"a":1e400,"started"')), "manifest.json"),
    "half a surrogate pair": (edit(MANIFEST, swap(b'"started"', b'"\\ud800":1,"started"')), "manifest.json"),
    "100,000 levels": (edit(MANIFEST, swap(b'"started"', b'"a":' + b"[" * 100_000 + b',"started"')), "manifest.json"),
    "a zero byte": (edit(MANIFEST, swap(b'"started"', b'"\0":1,"started"')), "is zero where text should be"),
    "a hole": (sparse_file(MANIFEST, 3 << 30, b'{"format":"dist_export",'), "is zero where text should be"),
    "5 GB": (sparse_file(MANIFEST, 5 << 30), "too many for what it should be"),
    "a directory": (instead(MANIFEST, os.mkdir), "is no regular file"),
    "a pipe": (instead(MANIFEST, os.mkfifo), "is no regular file"),
    "a link out": (link_out(MANIFEST), "is a link that leads out of the directory"),
    "another format": (put(ESCAPE, "format"), r"'\x1b]0;owned"),
    "a later schema": (put(1 << 60, "schema_version"), "A newer dist_export may read it"),
    "a field with escape codes": (edit_json(MANIFEST, lambda m: m.update(digest=ESCAPE)), r"says \x1b]0;owned\x07\x1b[31m"),
    "changed rows": (edit_json(MANIFEST, lambda m: m["tables"][0].update(rows_out=1)), "is not what was committed"),
    "negative rows": (put(-1, *PART, "rows"), "is damaged"),
    "negative rows in all": (put(-5, *TABLE, "rows_out"), "is damaged"),
    "huge rows": (put(1 << 70, *PART, "rows"), "is damaged"),
    "float rows": (put(1.5, *PART, "rows"), "is damaged"),
    "bool rows": (put(True, *PART, "rows"), "is damaged"),
    "rows as text": (put("5", *PART, "rows"), "is damaged"),
    "a negative shape": (put([-4], *KEPT, "shape"), "is damaged"),
    "a nested shape": (put([[4]], *KEPT, "shape"), "is damaged"),
    "rows of a petabyte": (put([1 << 50], *KEPT, "shape"), "which no table has"),
    "rows beyond 64 bits": (put([1 << 33, 1 << 33], *KEPT, "shape"), "which no table has"),
    "a shape of a thousand sizes": (put([1] * 1000, *KEPT, "shape"), "is damaged"),
    "a file of negative size": (put(-1, "files", 0, "num_bytes"), "is damaged"),
    **{
        f"{what} {path!a}": (put(path, *place), "does not lie in the package")
        for what, place in (
            ("a file", ("files", 0, "path")),
            ("a part in", (*PART, "file")),
            ("a program", ("dense", "program")),
            ("a folder", ("dense", "folder")),
        )
        for path in ("../x", "/etc/passwd", "a/../../x", "a\\b", "a\0b", ESCAPE, "")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest_is_one_line(name, package, tmp_path, capsys):
    damage, said = MANIFESTS[name]
    damage(package)
    with pytest.raises(PackageError) as caught:
        dist_export.open_package(package)
    assert said in str(caught.value)
    assert str(caught.value).isprintable()
    assert f"{package}/{MANIFEST}" in str(caught.value)
    outcome = run(capsys, tmp_path, "verify", package)
    assert outcome.code == 1
    assert outcome.lines == []
    assert outcome.out.splitlines()[-1].startswith("unsound: package with ")
    assert said in outcome.out
    assert_refused(run(capsys, tmp_path, "inspect", package), said)


FINDINGS: dict[str, tuple[Damage, str]] = {
    "a shard behind a link out": (link_out(SHARD), "leads out of the directory"),
    "a program behind a link out": (link_out(PROGRAM.split("/", maxsplit=1)[0]), "leads out of the directory"),
    "a shard that is a pipe": (instead(SHARD, os.mkfifo), SHARD),
    "a shard that is a directory": (instead(SHARD, os.mkdir), SHARD),
    "a shard that is a loop": (instead(SHARD, lambda path: path.symlink_to(path.name)), SHARD),
    "a shard that is a hole": (sparse_file(SHARD, 1 << 40), SHARD),
    "an index that is a hole": (sparse_file("index", 3 << 30), "index"),
    "an index that is a pipe": (instead("index", os.mkfifo), "index"),
    "a program that is no archive": (edit(PROGRAM, lambda _: b"\x80\x02cos\nsystem\n."), PROGRAM),
    "a slice in other digits": (put("\u0660@\u0663@\u0664", *PART, "slice"), "manifest.json"),
    "a slice the wrong way round": (put("5@1@65536", *PART, "slice"), "manifest.json"),
    "an unknown dtype": (put("os.system", *KEPT, "dtype"), "manifest.json"),
    "a table twice": (forge(lambda m: m["tables"].append(m["tables"][0])), "twice"),
    "a name with escape codes": (put(ESCAPE, *TABLE, "name"), r"\x1b]0;owned\x07"),
    "rows that are not there": (put((1 << 61), *TABLE, "rows_out"), "does not add up"),
    "an index with a key twice": (edit("index", lambda raw: b'{"file_index":{},' + raw[1:]), "index"),
    "a sample of 100,000 levels": (
        edit("fx_user_model/inputs_dict.json", lambda _: b"[" * 100_000),
        "inputs_dict.json",
    ),
}


def forge_files(folder: Path) -> None:
    """Let the manifest say of every file what is there now, as far as it is a plain file."""

    def change(document: Any) -> None:
        for entry in document["files"]:
            if (folder / entry["path"]).is_file():
                entry["num_bytes"] = (folder / entry["path"]).stat().st_size
            entry["digest"] = ""

    forge(change)(folder)


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("name", FINDINGS)
def test_a_hostile_file_is_a_finding(name, forged, package, tmp_path, capsys):
    """Also where the manifest vouches for it: whoever makes a package makes its manifest."""
    damage, said = FINDINGS[name]
    if not forged and name == "a shard that is a hole":
        pytest.skip("its size tells")
    damage(package)
    if forged:
        forge_files(package)
    outcome = run(capsys, tmp_path, "verify", package)
    assert outcome.code == 1, outcome
    assert outcome.lines == []
    assert said in outcome.out
    outcome = run(capsys, tmp_path, "verify", package, "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["findings"]
    assert run(capsys, tmp_path, "inspect", package).code == 0


def test_the_base_is_sound(package, tmp_path, capsys):
    forge_files(package)
    assert run(capsys, tmp_path, "verify", package).code == 0


def test_what_a_lookup_meets_is_one_error(package):
    """A table's rows, dtype, slice and keys are what the package says they are; each is compared with the file."""
    ids = [1, 2, 3]
    for damage in (
        put([1 << 36], *KEPT, "shape"),
        put([5], *KEPT, "shape"),
        put("float99", *KEPT, "dtype"),
        put("x", *PART, "slice"),
        put({}, *PART, "keys"),
        put({"id": ESCAPE, "embedding": ESCAPE}, *PART, "keys"),
        put("manifest.json", *PART, "file"),
        put("absent", *PART, "file"),
        instead(SHARD, os.mkfifo),
        link_out(SHARD),
    ):
        before = (package / MANIFEST).read_bytes()
        damage(package)
        opened = dist_export.open_package(package)
        every = [part.slice for part in opened.manifest.tables[0].parts]
        assert every
        with pytest.raises(PackageError) as caught:
            opened.lookup(opened.manifest.tables[0].name, [*ids, -1, 40_000])
        assert str(caught.value).isprintable()
        (package / MANIFEST).write_bytes(before)


def test_no_pickle_of_a_package_is_opened(package, tmp_path, capsys):
    """The program's is looked at before, those of the sample go through a reader of their own, others are left alone."""
    made = tmp_path / "made"
    bomb = b"\x80\x02cos\nmkdir\nX" + struct.pack("<I", len(str(made))) + str(made).encode() + b"\x85R."
    for name in ("output_base.pkl", "inputs_dict.pkl", "user_model/state_dict.pt"):
        path = package / "fx_user_model" / name
        assert path.exists()
        path.write_bytes(bomb)
    forge_files(package)
    opened = dist_export.open_package(package)
    opened.load_program()
    found = run(capsys, tmp_path, "verify", package)
    assert found.code == 1
    assert "it names 'os', 'mkdir', which no sample needs; it was not run" in found.out
    assert not made.exists()


def test_a_field_that_is_unknown_is_no_fault(package):
    forge(lambda document: document.update(of_a_later_version={"a": [1]}))(package)
    assert msgspec.json.decode((package / MANIFEST).read_bytes())["of_a_later_version"]
    assert dist_export.open_package(package).manifest.tables
