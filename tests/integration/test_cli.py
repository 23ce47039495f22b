"""The command line in one process: exit codes, one line an error, nothing written, help and print_config."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import dist_export
from dist_export.cli import main
from dist_export.kernels.selection import select_kernels
from tests.support import ROOT, tiny_model
from tests.support.recis_writer import make_tables, write_checkpoint

EXPORT_YAML = ROOT / "launch" / "export.yaml"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "ckpt", make_tables({"user_emb": 50, "item_emb": 30}, 2))
    return tmp_path / "ckpt"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def own_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("dist_export: ")]


def test_it_tells_its_version(capsys) -> None:
    assert main(["--version"]) == 0
    version, kernels = capsys.readouterr().out.splitlines()
    assert version == f"dist_export {dist_export.__version__}"
    assert kernels == f"kernels: {select_kernels().description}"


def test_a_choice_of_kernels_that_is_none_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setenv("DIST_EXPORT_KERNELS", "fortran")
    for arguments in (["--version"], ["verify", "nowhere"]):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "")
        assert own_lines(err) == ["dist_export: $DIST_EXPORT_KERNELS is 'fortran'; give one of auto, numpy, compiled"]


def test_export_then_inspect_then_verify(checkpoint: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    code, text, _ = run(capsys, "--ckpt_dir", checkpoint, "--export_dir", out, "--filter_sparse_opt", "true")
    assert code == 0
    assert "80 rows in 1 shard (" in text
    assert "sparse_adam_exp_avg" in text, "the summary names what was dropped"
    code, text, _ = run(capsys, "inspect", out)
    assert code == 0
    assert "user_emb" in text
    code, text, _ = run(capsys, "inspect", out, "--json")
    assert {table["name"]: table["rows"] for table in json.loads(text)["tables"]} == {"user_emb": 50, "item_emb": 30}
    code, text, _ = run(capsys, "inspect", checkpoint, "--json")
    assert json.loads(text)["kind"] == "RecIS checkpoint"
    assert json.loads(text)["tables"][0]["slots"][:2] == ["id", "embedding"]
    code, text, _ = run(capsys, "verify", out)
    assert code == 0
    code, text, _ = run(capsys, "verify", out, "--json")
    assert json.loads(text)["findings"] == []


def test_plan_writes_nothing_and_tells_what_goes(checkpoint: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--ckpt_dir", checkpoint, "--export_dir", tmp_path / "out", "--filter_sparse_opt", "true"]
    code, text, _ = run(capsys, "plan", *arguments, "--num_shards", 3, "--world_size", 2)
    assert code == 0
    assert "drop (optimizer)" in text
    assert "rank 1:" in text
    code, text, _ = run(capsys, "plan", *arguments, "--num_shards", 3, "--world_size", 2, "--json")
    report = json.loads(text)
    assert len(report["files"]) == 3
    assert sum(rank["bytes"] for rank in report["ranks"]) >= sum(
        slot["bytes"] for table in report["tables"] for slot in table["slots"] if not slot["reason"]
    )
    assert not (tmp_path / "out").exists()


def test_what_plan_says_is_what_export_writes(checkpoint: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    arguments = ["--ckpt_dir", checkpoint, "--export_dir", out, "--filter_sparse_opt", "true", "--num_shards", 4]
    _, text, _ = run(capsys, "plan", *arguments, "--json")
    planned = {file["name"]: file["bytes"] for file in json.loads(text)["files"]}
    assert run(capsys, *arguments)[0] == 0
    assert planned == {path.name: path.stat().st_size for path in out.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--ckpt_dir", "{tmp}/none", "--export_dir", "{tmp}/out"], 2, "does not exist"),
        (["--ckpt_dir", "{tmp}", "--export_dir", "{tmp}/out"], 2, "holds no files"),
        (["--ckpt_dir", "{ckpt}", "--export_dir", "{tmp}/out", "--num_shard", "3"], 2, "did you mean num_shards"),
        (["--ckpt_dir", "{ckpt}", "--export_dir", "{tmp}/out", "--num_shards", "3"], 2, "filter_sparse_opt: true"),
        (
            [
                "--ckpt_dir",
                "{ckpt}",
                "--export_dir",
                "{tmp}/out",
                "--filter_sparse_opt",
                "true",
                "--num_shards",
                "70000",
            ],
            2,
            "65,536",
        ),
        (
            [
                "--ckpt_dir",
                "{ckpt}",
                "--export_dir",
                "{tmp}/out",
                "--filter_sparse_opt",
                "true",
                "--drop_slots",
                "[nope]",
            ],
            2,
            "'nope' matches no slot",
        ),
        (
            ["--ckpt_dir", "{ckpt}", "--export_dir", "{ckpt}", "--filter_sparse_opt", "true"],
            2,
            "Give another export_dir",
        ),
        (["--ckpt_dir", "{ckpt}", "--export_dir", "{ckpt}/index"], 2, "is a file"),
        (["--ckpt_dir", "{ckpt}", "--export_dir", "nofs://x"], 2, "no file system"),
        (
            ["--ckpt_dir", "{ckpt}", "--export_dir", "{tmp}/out", "--model", "nowhere:f", "--dataset", "a:b"],
            2,
            "no module 'nowhere'",
        ),
        (
            ["--ckpt_dir", "{ckpt}", "--export_dir", "{tmp}/out", "--model", "json:nope", "--dataset", "a:b"],
            2,
            "has no 'nope'",
        ),
        (["--ckpt_dir", "{ckpt}", "--export_dir", "{tmp}/out", "--model", "json:dumps"], 2, "dataset is not"),
        (
            ["--ckpt_dir", "{ckpt}", "--export_dir", "{tmp}/out", "--need_export_sparse", "false"],
            2,
            "nothing would be exported",
        ),
        (["--config", "{tmp}/none.yaml"], 2, "No such file"),
        ([], 2, "nothing to do"),
        (["stray"], 2, "'stray' is no command; the commands are export, init, plan, inspect, verify"),
        (["inspect", "{tmp}/none"], 2, "does not exist"),
        (["inspect", "{tmp}"], 2, "holds no files; looked for manifest.json (package), index"),
        (["verify", "{tmp}/none"], 2, "does not exist"),
        (["verify", "{tmp}"], 2, "is no package and nothing that RecIS wrote"),
        (["verify", "{ckpt}", "--threads", "0"], 2, "give a number from 1 up"),
        (["verify", "{ckpt}", "--max_memory", "1MiB"], 2, "raise max_memory or lower threads"),
        (["verify", "{ckpt}", "--max_memory", "much"], 2, "give bytes"),
        (["verify", "{ckpt}", "--timeout", "0"], 2, "give seconds above 0"),
        (["inspect", "{ckpt}", "--storage_options", "[1"], 2, "storage_options has the wrong type"),
    ],
)
def test_mistakes_give_one_line_and_their_exit_code(
    arguments, code, message, checkpoint: Path, tmp_path: Path, capsys
) -> None:
    before = sorted(path.name for path in checkpoint.iterdir())
    filled = [argument.format(tmp=tmp_path, ckpt=checkpoint) for argument in arguments]
    found, text, errors = run(capsys, *filled)
    assert found == code
    (line,) = own_lines(errors)
    assert message in line
    assert "Traceback" not in errors
    assert not text
    assert not (tmp_path / "out").exists(), "nothing was written"
    assert sorted(path.name for path in checkpoint.iterdir()) == before


def test_arguments_that_the_model_does_not_take_are_named(checkpoint: Path, tmp_path: Path, capsys) -> None:
    arguments = [
        "--ckpt_dir",
        checkpoint,
        "--export_dir",
        tmp_path / "out",
        "--dataset",
        tiny_model.DATASET,
    ]
    code, _, errors = run(capsys, *arguments, "--model", tiny_model.MODEL, "--model_args.depth", 3)
    assert code == 2
    assert "model_args do not fit tests.support.tiny_model:build_model" in errors


def test_a_run_and_an_unfinished_save_are_called_so(checkpoint: Path, tmp_path: Path, capsys) -> None:
    """What is no checkpoint for a reason that can be seen is told with the reason, as an export tells it."""
    for step in (100, 200):
        (tmp_path / "run" / f"ckpt_{step}").mkdir(parents=True)
    code, _, errors = run(capsys, "verify", tmp_path / "run")
    assert code == 2
    assert errors.rstrip().endswith("It holds the directories ckpt_100, ckpt_200: give one of them")
    (checkpoint / "index").unlink()
    for command in (["inspect", checkpoint], ["--ckpt_dir", checkpoint, "--export_dir", tmp_path / "out"]):
        code, _, errors = run(capsys, *command)
        assert code == 2
        assert "no index among its" in errors
        assert "its save did not finish" in errors


def test_options_deep_in_a_mapping_are_all_kept(checkpoint: Path, tmp_path: Path) -> None:
    """Given one by one, for every command; the parser alone would keep the last one of each mapping."""
    from dist_export.config.loader import PATH_OPTIONS, parse_path, parse_settings

    options = ["--storage_options.key", "K", "--storage_options.client_kwargs.endpoint_url=http://h:1"]
    options += ["--storage_options.client_kwargs.config.a", "{x: 1}", "--storage_options.client_kwargs.config.b", "no"]
    expected = {"key": "K", "client_kwargs": {"endpoint_url": "http://h:1", "config": {"a": {"x": 1}, "b": False}}}
    settings = parse_settings(["--ckpt_dir", str(checkpoint), "--export_dir", str(tmp_path), *options])
    assert settings.storage_options == expected
    assert parse_path("verify", [str(checkpoint), *options], PATH_OPTIONS)["storage_options"] == expected


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_path_that_is_not_given_is_asked_for(command: str, capsys) -> None:
    code, _, errors = run(capsys, command)
    assert code == 2
    assert f"which path? Usage: dist_export {command} PATH" in errors


def test_options_on_the_command_line_are_laid_over_those_of_the_file(checkpoint: Path, tmp_path: Path) -> None:
    """Key by key, however deep; and an option that is given whole stays, but for what is said after it."""
    from dist_export.config.loader import parse_settings

    config = tmp_path / "export.yaml"
    config.write_text("storage_options: {client_kwargs: {endpoint_url: 'http://a:1', region_name: eu}}\n")
    given = ["--config", str(config), "--ckpt_dir", str(checkpoint), "--export_dir", str(tmp_path)]
    found = parse_settings([*given, "--storage_options.client_kwargs.region_name", "us"])
    assert found.storage_options == {"client_kwargs": {"endpoint_url": "http://a:1", "region_name": "us"}}
    whole = ["--storage_options", "{client_kwargs: {b: 2}}", "--storage_options.client_kwargs.a", "1e-7"]
    assert parse_settings([*given, *whole]).storage_options == {"client_kwargs": {"a": 1e-7, "b": 2}}


@pytest.mark.parametrize("after", [[], ["--overwrite", "true"]])
def test_an_option_without_its_value_is_told(after: list[str], checkpoint: Path, tmp_path: Path, capsys) -> None:
    places = ("--ckpt_dir", checkpoint, "--export_dir", tmp_path / "out")
    code, _, errors = run(capsys, *places, "--storage_options.client_kwargs.endpoint_url", *after)
    assert code == 2
    assert "--storage_options.client_kwargs.endpoint_url needs a value" in errors


def test_a_value_has_nothing_below_it(checkpoint: Path, capsys) -> None:
    options = ["--storage_options.a.b", "1", "--storage_options.a.b.c", "s3cr3t"]
    code, _, errors = run(capsys, "inspect", checkpoint, *options)
    assert code == 2
    assert "storage_options.a.b.c lies below a value" in errors
    assert "s3cr3t" not in errors


def test_a_committed_package_is_not_overwritten(checkpoint: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--ckpt_dir", checkpoint, "--export_dir", tmp_path / "out"]
    assert run(capsys, *arguments)[0] == 0
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    code, _, errors = run(capsys, *arguments, "--digest", "sha256")
    assert code == 2
    assert "committed package" in errors
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_a_bug_keeps_its_traceback(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_export.pipeline.steps.plan_sparse", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["--ckpt_dir", str(checkpoint), "--export_dir", str(tmp_path / "out")])


def test_help_explains_what_most_people_need_and_names_all_settings(capsys) -> None:
    """In the groups of launch/export.yaml."""
    listed = yaml.safe_load(EXPORT_YAML.read_text())
    titles = re.findall(r"# ---- (.*) ----", EXPORT_YAML.read_text())
    code, shown, _ = run(capsys, "--help")
    assert code == 0
    for command in ("dist_export plan", "inspect PATH", "verify PATH"):
        assert command in shown
    explained = re.findall(r"^  --(\w+)", shown, re.MULTILINE)
    assert (len(explained), explained[:2]) == (10, ["ckpt_dir", "export_dir"])
    groups = shown.split("--help-all", 1)[1]
    assert [title for title in titles if f"  {title}:" in groups] == titles
    assert re.findall(r"\w+", groups.split("How:")[1]) == list(listed)[-6:]
    assert set(listed) <= set(re.findall(r"\w+", groups))


@pytest.mark.parametrize("command", [(), ("export",), ("plan",)])
@pytest.mark.parametrize("option", ["--help-all", "--help_all"])
def test_help_all_explains_every_setting(command: tuple[str, ...], option: str, capsys) -> None:
    """With the type, the default and the text of launch/export.yaml, in its groups and its order."""
    code, shown, _ = run(capsys, *command, option)
    assert code == 0
    listed = yaml.safe_load(EXPORT_YAML.read_text())
    explained = re.findall(r"^  --(\w+)", shown, re.MULTILINE)
    assert [name for name in explained if name in listed] == list(listed)
    assert set(explained) - set(listed) == ({"json", "world_size"} if "plan" in command else set())
    words, comment = " ".join(shown.split()), ""
    for line in EXPORT_YAML.read_text().split("# ---- ", 1)[1].splitlines()[1:]:
        comment = f"{comment} {line[2:]}" if line.startswith("# ") and "----" not in line else comment
        if re.match(r"\w+:", line):
            assert comment.strip() in words, line
        if not line.startswith("# ") or "----" in line:
            comment = ""
    assert "--timeout  a number (default: 1800.0)" in shown


@pytest.mark.parametrize("command", ["inspect", "verify", "report"])
def test_help_of_a_command_explains_its_options(command: str, capsys) -> None:
    code, shown, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"dist_export {command} PATH" in shown
    assert "--storage_options  a mapping" in shown
    own = {"verify": "--finite", "inspect": "--treat_as_tables", "report": "--sample_rows"}
    assert [name for name, option in own.items() if option in shown] == [command]


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from dist_export.cli import main; main(['--help-all']); assert 'torch' not in sys.modules, 'torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr


def test_print_config_gives_yaml_that_can_be_used(checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dist_export", "--ckpt_dir", str(checkpoint), "--export_dir", "x", "--print_config"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert yaml.safe_load(done.stdout)["ckpt_dir"] == str(checkpoint)


SLOW_TO_IMPORT = ("asyncio", "fsspec", "rich", "yaml")
"""Needed for stores, terminals and files of settings alone."""


def test_inspect_of_tables_imports_nothing_slow(checkpoint: Path) -> None:
    code = (
        "import sys; from dist_export.cli import main; "
        f"main(['inspect', {str(checkpoint)!r}]); assert not {{'torch', *{SLOW_TO_IMPORT}}} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr


def test_an_export_to_a_disk_imports_nothing_slow_beyond_torch(checkpoint: Path, tmp_path: Path) -> None:
    settings = {"ckpt_dir": str(checkpoint), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True}
    code = (
        "import sys; import torch; before = set(sys.modules); import dist_export; "
        f"dist_export.export({settings}, progress=False); assert not {{*{SLOW_TO_IMPORT}}} & (set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"), [([], 7.0), (["--timeout", "9"], 9.0), (["--timeout", "nan"], 1800.0)]
)
def test_the_timeout_of_the_file_counts_from_the_start(
    arguments, expected, checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    """The ranks wait for each other as long as the settings say, also where only the file says it."""
    import dist_export.runtime.joining

    file = tmp_path / "export.yaml"
    file.write_text(f"ckpt_dir: {checkpoint}\nexport_dir: {tmp_path / 'out'}\ntimeout: 7\n")
    seen: list[float] = []
    real = dist_export.runtime.joining.join_as

    def join_as(kind, *, timeout_secs: float, is_own_process: bool):
        assert is_own_process
        seen.append(timeout_secs)
        return real(kind, timeout_secs=timeout_secs)

    monkeypatch.setattr(dist_export.runtime.joining, "join_as", join_as)
    main(["--config", str(file), *arguments])
    assert seen == [expected]


@pytest.mark.parametrize("command", ["export", "plan", "inspect"])
@pytest.mark.parametrize("tables", [[], ["--treat_as_tables", "x"]])
@pytest.mark.parametrize("format_", ["auto", "dcp", "safetensors", "torch", "dynamicemb", "recis"])
def test_a_place_without_a_checkpoint_is_told_with_what_was_looked_for(
    command: str, tables: list[str], format_: str, tmp_path: Path, capsys
) -> None:
    """Whatever else is asked of it: it is no checkpoint of any format."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    expected = {
        "nope/sd.pt": "nope/sd.pt: does not exist; looked for ",
        "empty": "empty: holds no files; looked for ",
        "other": "other: no checkpoint that is known among its 1 files; looked for ",
    }
    asked = [*tables] if command == "inspect" else [*(f"[{each}]" if each == "x" else each for each in tables)]
    for name, said in expected.items():
        place = str(tmp_path / name)
        arguments = [place] if command == "inspect" else ["--ckpt_dir", place, "--export_dir", str(tmp_path / "out")]
        if command != "inspect":
            arguments += ["--filter_sparse_opt", "true"]
        code, _, errors = run(capsys, command, *arguments, "--format", format_, *asked)
        assert code == 2
        (line,) = own_lines(errors)
        if format_ == "auto":
            assert said in line
            assert "*.safetensors (safetensors)" in line
        elif name.startswith("nope"):
            assert said in line
        else:
            assert "which says itself" not in line
