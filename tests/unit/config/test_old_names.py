"""Names that settings had before, and short forms on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

import dist_export
from dist_export.cli import main
from dist_export.config.arguments import RENAMED
from dist_export.config.loader import load_config, parse_settings
from dist_export.config.schema import ExportConfig
from dist_export.errors import ConfigError

OLD = sorted(RENAMED.items())
PLACES = {"ckpt_dir": "in", "export_dir": "out", "filter_sparse_opt": True}


@pytest.mark.parametrize(("old", "new"), OLD)
def test_an_old_name_is_an_error_that_names_the_new_one(old: str, new: str, tmp_path: Path) -> None:
    """In a mapping, in YAML, on the command line with underscores and dashes, and as an argument of the Exporter."""
    says = f"{old}.* is no setting; it is called {new} now"
    with pytest.raises(ConfigError, match=says):
        load_config({**PLACES, old: "x"})
    (tmp_path / "export.yaml").write_text(f"ckpt_dir: in\nexport_dir: out\n{old}: x\n")
    with pytest.raises(ConfigError, match=says):
        load_config(tmp_path / "export.yaml")
    for option in (f"--{old}", f"--{old.replace('_', '-')}"):
        with pytest.raises(ConfigError, match=says):
            parse_settings(["--ckpt_dir=in", "--export_dir=out", option, "x"])
    with pytest.raises((ConfigError, TypeError), match=says):
        dist_export.Exporter(None, "", "", None, "in", "out", **{old: "x"}).export()
    assert new in ExportConfig.__dataclass_fields__
    assert old not in ExportConfig.__dataclass_fields__


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_commands_for_a_path_name_the_new_option_too(command: str, tmp_path: Path, capsys) -> None:
    assert main([command, str(tmp_path), "--tables", "x*"]) == 2
    assert (
        f"--tables is no option of dist_export {command}; it is called treat_as_tables now" in capsys.readouterr().err
    )


def parse(*argv: str) -> ExportConfig:
    return parse_settings(["--ckpt_dir=in", "--export_dir=out", "--filter_sparse_opt=true", *argv])


def test_dashes_stand_for_underscores_in_names_alone() -> None:
    found = parse("--filter-sparse-opt=true", "--num-shards=3", "--storage-options.a-b", "c-d", "--drop-slots=x-y")
    assert found.filter_sparse_opt is True
    assert found.num_shards == 3
    assert found.storage_options == {"a-b": "c-d"}
    assert found.drop_slots == ["x-y"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("step_filter", ["step_filter"]),
        ("*_emb.weight", ["*_emb.weight"]),
        ("12", ["12"]),
        ("true", ["true"]),
        ("a, b", ["a, b"]),
        ("[a, b]", ["a", "b"]),
        ('["*_b"]', ["*_b"]),
        ("[]", []),
    ],
)
def test_one_plain_value_is_a_list_of_it(given: str, expected: list[str], tmp_path: Path) -> None:
    assert parse("--drop_slots", given).drop_slots == expected
    assert parse(f"--drop_slots={given}").drop_slots == expected


def test_one_plain_value_in_a_file_is_a_list_of_it(tmp_path: Path) -> None:
    (tmp_path / "export.yaml").write_text(
        "ckpt_dir: in\nexport_dir: out\nfilter_sparse_opt: true\ndrop_slots: step_filter\n"
    )
    assert load_config(tmp_path / "export.yaml").drop_slots == ["step_filter"]
    assert load_config({**PLACES, "drop_slots": "step_filter"}).drop_slots == ["step_filter"]


def test_a_list_without_its_value_is_an_error() -> None:
    with pytest.raises(ConfigError):
        parse("--drop_slots")
    with pytest.raises(ConfigError):
        parse("--drop_slots", "--num_shards=2")


def test_a_former_value_is_an_error_that_names_the_new_setting(tmp_path: Path) -> None:
    """Of digest, in a mapping, in YAML, on the command line, and in a config that was built by hand."""
    says = "digest: require is no value any more; set server_side_copy: false instead"
    with pytest.raises(ConfigError, match=says):
        load_config({**PLACES, "digest": "require"})
    (tmp_path / "export.yaml").write_text("ckpt_dir: in\nexport_dir: out\ndigest: require\n")
    with pytest.raises(ConfigError, match=says):
        load_config(tmp_path / "export.yaml")
    with pytest.raises(ConfigError, match=says):
        parse("--digest", "require")
    with pytest.raises(ConfigError, match=says):
        ExportConfig(ckpt_dir="in", export_dir="out", digest="require")  # type: ignore[arg-type]
    assert parse("--server-side-copy=false").server_side_copy is False
    assert parse().server_side_copy is True
