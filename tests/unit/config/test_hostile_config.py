"""Settings and feature configurations from elsewhere: one line and exit code 2, nothing built, nothing repeated without end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.hostile_cases import assert_refused, run, write_base

ESCAPE = "\x1b[31m\u202e\n"
LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(
    f"  a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]\n" for number in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"  a{number}: &a{number} {{<<: [{', '.join([f'*a{number - 1}'] * 9)}]}}\n" for number in range(1, 12)
)

SETTINGS = {
    "an object of Python": ("model_args: !!python/object/apply:os.mkdir [made]", "could not determine a constructor"),
    "a name of Python": ("model_args: {a: !!python/name:os.system }", "could not determine a constructor"),
    "a module of Python": ("model_args: {a: !!python/module:antigravity }", "could not determine a constructor"),
    "a billion laughs": (f"model_args:\n  {LAUGHS}", "stands for more than 100,000 values"),
    "a billion merges": (f"model_args:\n  {MERGES}", "stands for more than 100,000 values"),
    "a value in itself": ("model_args: &a {b: *a}", "a value contains itself"),
    "a setting twice": ("threads: 1\nthreads: 2", "in line 4: the key 'threads' stands there twice"),
    "a setting twice, once in quotes": ('threads: 1\n"threads": 2', "the key 'threads' stands there twice"),
    "a key twice within": ("model_args: {a: 1, b: {c: 1, c: 1}}", "the key 'c' stands there twice"),
    "a number twice": ("dynamic_dims: {user: {1: a, 0x1: b}}", "the key '0x1' stands there twice"),
    "true and 1": ("model_args: {1: a, true: b}", "the key 'true' stands there twice"),
    "a key that is a list": ("? [a]\n: 1", "a key is a list or a mapping"),
    "an unknown setting": ("thread: 1", "'thread' is no setting; did you mean threads?"),
    "an unknown setting with escape codes": ('"\\e[31m": 1', r"'\x1b[31m' is no setting"),
    "a number for a setting": ("7: 1", "7 is no setting"),
    "100,000 levels": ("model_args: " + "[" * 100_000, "nested too deeply"),
    "3,000 levels": ("model_args: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    "2,000 levels by indent": ("model_args:\n" + "".join(" " * n + "a:\n" for n in range(1, 2000)), "nested too deeply"),
    "a number of 5,000 digits": (f"threads: {'9' * 5000}", "is not of its type"),
    "a date that is none": ("model_args: {a: 2001-99-99}", "month must be in 1..12"),
    "a float that is none": ("model_args: {a: !!float ''}", "is not of its type"),
    "an alias to nothing": ("drop_slots: [*step]", "quote a pattern that begins with *"),
    "two documents": ("threads: 1\n---\nthreads: 2", "another document"),
    "a control character": (f"model: {ESCAPE}", "is no YAML"),
    "threads beyond use": (f"threads: {10**30}", "give a number from 1 to 64"),
    "a negative number of shards": ("filter_sparse_opt: true\nnum_shards: -1", "give a number from 1 up"),
    "shards beyond use": (f"filter_sparse_opt: true\nnum_shards: {10**30}", "count up to 999,999"),
    "a bool for shards": ("filter_sparse_opt: true\nnum_shards: true", "num_shards"),
    "a fraction of a shard": ("filter_sparse_opt: true\nnum_shards: 1.5", "num_shards"),
    "memory beyond use": (f"max_memory: {10**30}", "no machine has that much"),
    "memory of 400 digits": ("max_memory: 1e400", "no machine has that much"),
    "a batch beyond use": (f"max_batch_size: {10**30}", "no batch is as large"),
    "a timeout without end": ("timeout: .inf", "give seconds above 0"),
    "a timeout that is none": ("timeout: .nan", "give seconds above 0"),
    "a timeout of ages": ("timeout: 1.0e+300", "give seconds above 0"),
    "a tolerance that is none": ("atol: .nan", "give a finite number from 0 up"),
    "a folder that climbs": ("export_folder_name: ../x", "give an identifier"),
    "a module with escape codes": ('export_model_name: "\\e[31m"', r"'\x1b[31m'"),
    "an output with escape codes twice": ('export_outputs: ["\\e", "\\e"]', r"'\x1b' stands there twice"),
    "code for a model": ("model: 'os:system(1)'", "expected package.module:callable"),
    "a fg with a key twice": ("fg_conf_or_path: {features: [], features: []}", "the key 'features' stands there twice"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_base(tmp_path / "in")


def settings(tmp_path: Path, folder: Path, text: str) -> Path:
    path = tmp_path / "export.yaml"
    path.write_text(f"ckpt_dir: {folder}\nexport_dir: {tmp_path / 'out'}\n{text}\n")
    return path


@pytest.mark.parametrize("name", SETTINGS)
def test_hostile_settings_are_one_line(name, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, said = SETTINGS[name]
    path = settings(tmp_path, folder, text)
    for command in ((), ("plan",)):
        assert_refused(run(capsys, tmp_path, *command, "--config", path), said)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"ckpt_dir: \xff", b"a: \0", b"", b"- 1", b"!!set {a}"])
def test_a_file_that_holds_no_settings(raw, tmp_path, capsys):
    (tmp_path / "export.yaml").write_bytes(raw)
    assert_refused(run(capsys, tmp_path, "--config", tmp_path / "export.yaml"), "export.yaml")


def test_an_alias_and_a_merge_are_still_welcome(folder, tmp_path, capsys):
    text = "model_args: {base: &base {a: 1, b: 2}, more: {<<: *base, b: 3}, list: [*base, *base]}"
    assert run(capsys, tmp_path, "--config", settings(tmp_path, folder, text)).code == 0


@pytest.mark.parametrize(
    "options", ["{a: 1, a: 2}", "!!python/name:os.system", "[1]", "{a: " + "[" * 5000, "{a: !!int x}"]
)
def test_hostile_storage_options(options, folder, tmp_path, capsys):
    for command in ("inspect", "verify"):
        assert_refused(run(capsys, tmp_path, command, folder, "--storage_options", options), "expected a YAML mapping")


SOUND = {
    "feature_name": "user",
    "feature_type": "id_feature",
    "value_type": "String",
    "gen_key_type": "hash",
    "gen_val_type": "lookup",
    "hash_bucket_size": 100,
    "embedding_dimension": 4,
}
CONFS = {
    "a key twice": (b'{"features": [], "features": []}', "has the key 'features' twice"),
    "a key twice, once escaped": (b'{"features": [], "\\u0066eatures": []}', "has the key 'features' twice"),
    "NaN": (b'{"features": [{"a": NaN}]}', "is NaN, which JSON does not know"),
    "Infinity": (b'{"features": [{"a": -Infinity}]}', "is -Infinity, which JSON does not know"),
    "1e400": (b'{"features": [{"a": 1e400}]}', "is 1e400, which JSON does not know"),
    "half a surrogate pair": (b'{"features": [], "x": "\\ud800"}', "half a surrogate pair"),
    "half a surrogate pair for a key": (b'{"features": [], "\\udfff": 1}', "half a surrogate pair"),
    "no UTF-8": (b'{"features": ["\xff"]}', "is not UTF-8"),
    "a byte order mark": (b'\xef\xbb\xbf{"features": []}', "line 1, column 1"),
    "100,000 levels": (b'{"features": ' + b"[" * 100_000, "is not JSON that can be read"),
    "900 levels": (b'{"features": ' + b"[" * 900 + b"]" * 900 + b"}", "nested more than 64 deep"),
    "a number of 5,000 digits": (b'{"features": [{"a": ' + b"9" * 5000 + b"}]}", "is not JSON that can be read"),
    "a list": (b"[]", "the top is []"),
    "nothing": (b"", "line 1, column 1"),
    "names with escape codes": (
        json.dumps({"features": [{**SOUND, "feature_name": ESCAPE, "gen_key_type": ESCAPE}]}).encode(),
        r"\x1b[31m\u202e\n",
    ),
    "a dimension beyond use": (json.dumps({"features": [{**SOUND, "embedding_dimension": 10**30}]}).encode(), "user"),
    "a dimension that is a bool": (json.dumps({"features": [{**SOUND, "embedding_dimension": True}]}).encode(), "user"),
}  # fmt: skip


@pytest.mark.parametrize("setting", ["fg_conf_or_path", "mc_conf_or_path"])
@pytest.mark.parametrize("name", CONFS)
def test_hostile_features_are_told_and_refused(name, setting, folder, tmp_path, capsys):
    """Each finding is a line of its own, below the first."""
    raw, said = CONFS[name]
    if setting == "mc_conf_or_path" and said in ("user", r"\x1b[31m\u202e\n"):
        pytest.skip("of a feature's entry")
    (tmp_path / "conf.json").write_bytes(raw)
    places = ("--ckpt_dir", folder, "--export_dir", tmp_path / "out", f"--{setting}", tmp_path / "conf.json")
    for command in ((), ("plan",)):
        outcome = run(capsys, tmp_path, *command, *places)
        assert outcome.code == 2, outcome
        assert said in "\n".join(outcome.lines)
        assert all(line.startswith(("dist_export: ", "  ")) for line in outcome.lines)
        assert sum(line.startswith("dist_export: ") for line in outcome.lines) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "is no regular file"),
        (os.mkdir, "is no regular file"),
        (lambda path: path.symlink_to(path.name), "symbolic links"),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
        (lambda path: (path.touch(), os.truncate(path, 5 << 30)), "too many for what it should be"),
        (lambda path: (path.touch(), os.truncate(path, 3 << 30)), "is zero where text should be"),
    ],
)
def test_a_configuration_that_is_no_file(make, said, folder, tmp_path, capsys):
    make(tmp_path / "conf.json")
    places = ("--ckpt_dir", folder, "--export_dir", tmp_path / "out", "--fg_conf_or_path", tmp_path / "conf.json")
    assert_refused(run(capsys, tmp_path, *places), said)
