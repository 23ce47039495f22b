"""Settings: what is refused, and in which words; YAML, mappings and the command line give the same config."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from dist_export.config.loader import load_config, parse_settings
from dist_export.config.prune_rules import parse_rules
from dist_export.config.schema import ExportConfig
from dist_export.errors import ConfigError
from tests.support import ROOT

PLACES = {"ckpt_dir": "a", "export_dir": "b"}
YAML = ROOT / "launch" / "export.yaml"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ckpt_dir": ""}, "ckpt_dir is not set"),
        ({"num_shards": 0, "filter_sparse_opt": True}, "num_shards is 0"),
        ({"num_shards": 4, "filter_sparse_opt": False}, "set filter_sparse_opt: true"),
        ({"num_shards": "source", "filter_sparse_opt": False}, "set filter_sparse_opt: true"),
        (
            {"filter_sparse_opt": True, "on_empty_table": "allow"},
            "on_empty_table says what becomes of .* but prune has no rule",
        ),
        ({"drop_slots": ["x"], "filter_sparse_opt": False}, "drop_slots needs new shards.*filter_sparse_opt: true"),
        ({"optimizer_slots": ["x"], "filter_sparse_opt": False}, "set filter_sparse_opt: true"),
        ({"keep_slots": ["x"], "filter_sparse_opt": False}, "set filter_sparse_opt: true"),
        ({"num_shards": 4, "filter_sparse_opt": True, "need_export_sparse": False}, "need_export_sparse is false"),
        ({"model": "module"}, "expected package.module:callable"),
        ({"dataset": "a b:c"}, "expected package.module:callable"),
        ({"export_folder_name": "../up"}, "export_folder_name"),
        ({"export_model_name": "class"}, "export_model_name"),
        ({"max_batch_size": 1}, "max_batch_size is 1"),
        ({"atol": -1.0}, "atol is -1.0"),
        ({"rtol": float("inf")}, "rtol is inf"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"export_outputs": ["a", "a"]}, "'a' stands there twice"),
        ({"export_outputs": ["a", " "]}, "every output needs a name"),
        ({"dynamic_dims": {"x": {0: "n"}}}, "0 is the batch"),
        ({"dynamic_dims": {"x": {1: "batch"}}}, "no name for a dimension"),
        ({"dynamic_dims": {"x": {1: "a b"}}}, "no name for a dimension"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_when_the_config_is_built(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        ExportConfig(**(PLACES | settings))


def test_config_errors_are_value_errors() -> None:
    """Callers who know nothing of our tree can catch what they know."""
    with pytest.raises(ValueError, match="num_shards"):
        ExportConfig(**PLACES, num_shards=-1, filter_sparse_opt=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filter_sparse_op": True}, "the config: 'filter_sparse_op' is no setting; did you mean filter_sparse_opt?"),
        ({"zzz": 1}, "'zzz' is no setting; dist_export --help lists them"),
        ({"num_shards": "many"}, "num_shards is 'many'; expected a whole number or world_size or source or null"),
        ({"filter_sparse_opt": "maybe"}, "filter_sparse_opt.*expected true or false"),
        ({"drop_slots": 3}, r"drop_slots.*expected a list \[text, ...\]"),
        ({"fg_rules": "rpt"}, "fg_rules.*expected rtp or none"),
        ({"dynamic_dims": {"x": {"one": "n"}}}, "dynamic_dims"),
        ({"atol": "small"}, "atol.*expected a number"),
    ],
)
def test_unknown_keys_and_wrong_types_give_one_line(settings, message) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as caught:
        load_config(PLACES | settings)
    assert "\n" not in str(caught.value)


def test_missing_places_are_asked_for() -> None:
    with pytest.raises(ConfigError, match="export_dir must be set"):
        load_config({"ckpt_dir": "a"})


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    """Nested keys take dots, lists brackets or a plus."""
    file = tmp_path / "export.yaml"
    file.write_text(
        "ckpt_dir: a\nexport_dir: b\nfilter_sparse_opt: true\nnum_shards: 2\nmodel_args: {dim: 4, deep: true}\n"
    )
    config = parse_settings(
        [
            "--config",
            str(file),
            "--num_shards",
            "source",
            "--model_args.dim",
            "8",
            "--drop_slots",
            "[x, y]",
            "--keep_slots+",
            "z",
        ],
    )
    assert config == ExportConfig(
        **PLACES,
        filter_sparse_opt=True,
        num_shards="source",
        model_args={"dim": 8, "deep": True},
        drop_slots=["x", "y"],
        keep_slots=["z"],
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_shard", "2"], "--num_shard is no setting; did you mean num_shards?"),
        (["--ckpt", "x"], "--ckpt is no setting"),
        (["--confg", "x"], "--confg is no setting; did you mean config?"),
        (["stray"], "stray"),
        (["--config", "/nowhere/export.yaml"], "/nowhere/export.yaml: No such file"),
    ],
)
def test_wrong_arguments_give_one_line(arguments, message) -> None:
    """Abbreviations are not taken: a later setting could change what they mean."""
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as caught:
        parse_settings(["--ckpt_dir", "a", "--export_dir", "b", *arguments])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ckpt_dir: [", "is no YAML in line"),
        ("step: 00012000", "in line 1: YAML takes a number with a zero at its beginning for one to base 8"),
        ('prune: [{tables: "*", slot: s, below: 010}]', "for one to base 8"),
        ("default_row: {a: [1:30]}", "YAML takes a number with a colon for one to base 60"),
        ("atol: 1:30.5", "for one to base 60"),
        ("- a\n- b", "found a list"),
        ("ckpt_dirr: a", "did you mean ckpt_dir"),
        ("", "is empty"),
        ("drop_slots: [*filter]", r"quote a pattern that begins with \*"),
        ("\x00", "is no YAML|no text"),
    ],
)
def test_a_broken_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "export.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_the_yaml_file_lists_every_setting_with_its_default_and_an_explanation() -> None:
    lines = YAML.read_text().splitlines()
    listed = yaml.safe_load(YAML.read_text())
    for setting in dataclasses.fields(ExportConfig):
        assert setting.name in listed, setting.name
        if setting.default is not dataclasses.MISSING:
            assert listed[setting.name] == (None if setting.default == "" else setting.default), setting.name
        elif setting.default_factory is not dataclasses.MISSING:
            assert listed[setting.name] == setting.default_factory(), setting.name
        place = next(i for i, line in enumerate(lines) if line.startswith(f"{setting.name}:"))
        assert lines[place - 1].startswith("# "), setting.name
    assert len(listed) == len(dataclasses.fields(ExportConfig))


def test_what_the_users_own_code_takes_keeps_its_types(tmp_path: Path) -> None:
    """Text that looks like a number or null stays text: it may be a secret, a date or a path."""
    arguments = {"day": "20240101", "name": "yes", "path": "007", "none": None, "deep": {"key": "null", "n": 1}}
    file = tmp_path / "export.yaml"
    file.write_text(
        yaml.safe_dump(PLACES | {"model_args": arguments, "storage_options": {"secret": "0123", "pw": "1e5"}})
    )
    as_argument = parse_settings(["--config", str(file)])
    for config in (load_config(file), load_config(yaml.safe_load(file.read_text())), as_argument):
        assert config.model_args == arguments
        assert config.storage_options == {"secret": "0123", "pw": "1e5"}
    config = parse_settings(["--config", str(file), "--model_args.path", "x", "--storage_options", "{a: b}"])
    assert config.model_args == arguments | {"path": "x"}
    assert config.storage_options == {"a": "b"}, "a whole mapping takes the place of the file's"


@pytest.mark.parametrize("text", ["1e-7", "1E-7", "0.1e-6", "+0.1e-6", "10.e-8"])
def test_numbers_without_a_dot_before_the_exponent_are_numbers_in_every_setting(tmp_path: Path, text: str) -> None:
    """To YAML 1.1 they are text."""
    file = tmp_path / "export.yaml"
    file.write_text(
        yaml.safe_dump(PLACES | {"filter_sparse_opt": True})
        + f"atol: {text}\nrtol: {text}\ntimeout: {text}\ndefault_row: {{a: [{text}]}}\n"
        + f"prune: [{{tables: a, slot: s, below: {text}}}, {{tables: a, norm_at_most: {text}}}]\n"
    )
    rules = f"[{{tables: a, slot: s, below: {text}}}, {{tables: a, norm_at_most: {text}}}]"
    on_the_command_line = parse_settings(["--config", str(file), "--prune", rules])
    for config in (load_config(file), on_the_command_line):
        assert (config.atol, config.rtol, config.timeout, config.default_row) == (1e-7, 1e-7, 1e-7, {"a": [1e-7]})
        assert [rule.limit for rule in parse_rules(config.prune)] == [1e-7, 1e-7]


def test_what_a_setting_may_be_is_said_with_what_it_is() -> None:
    for arguments, said in (
        (["--on_overflow", "clampp"], "on_overflow is 'clampp'; expected error or clamp"),
        (["--atol", "small"], "atol is 'small'; expected a number"),
        (
            ["--treat_as_tables", "{a: 1}"],
            """treat_as_tables is {'a': 1}; expected a list [text, ...], such as""",
        ),
        (
            ["--treat_as_tables", "{a: 1}"],
            """on the command line --treat_as_tables '["*_b"]'""",
        ),
        (["--storage_options", "hunter2"], "storage_options has the wrong type; expected a YAML mapping such as"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_settings(["--ckpt_dir", "a", "--export_dir", "b", *arguments])
        assert said in str(caught.value)
        assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"ckpt_dir must be set.* \(format: live exports the model in memory"):
        load_config({"export_dir": "b"})


def test_a_key_left_empty_means_its_default(tmp_path: Path) -> None:
    file = tmp_path / "export.yaml"
    file.write_text(
        "ckpt_dir: a\nexport_dir: b\n" + "".join(f"{f.name}:\n" for f in dataclasses.fields(ExportConfig)[2:])
    )
    assert load_config(file) == ExportConfig(**PLACES)
    assert parse_settings(["--config", str(file)]) == ExportConfig(**PLACES)


def test_a_config_built_by_hand_is_checked_when_it_is_used() -> None:
    import dist_export

    for settings in ({"num_shards": "foo", "filter_sparse_opt": True}, {"archive_format": "zip"}, {"fg_rules": "x"}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            dist_export.export(ExportConfig(**PLACES, **settings))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (1 << 30, 1 << 30),
        ("134217728", 128 << 20),
        ("512MiB", 512 << 20),
        ("512 mib", 512 << 20),
        ("2GB", 2_000_000_000),
        ("1.5GiB", 3 << 29),
        ("1e9", 1_000_000_000),
        ("100000 kB", 100_000_000),
    ],
)
def test_memory_as_people_write_it(text, expected):
    assert load_config({"ckpt_dir": "a", "export_dir": "b", "max_memory": text}).max_memory_bytes == expected


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("max_memory", "much", "max_memory is 'much'; give bytes, or a number with a unit such as 512MiB or 2GB"),
        ("max_memory", "-1GB", "give bytes, or a number with a unit"),
        ("max_memory", "1e999", "no machine has that much"),
        ("max_memory", "63MiB", "max_memory is '63MiB'; give 64MiB or more"),
        ("max_memory", 5, "max_memory is 5; give 64MiB or more"),
        ("threads", 0, "threads is 0; give a number from 1 to 64, or null"),
        ("threads", 65, "threads is 65"),
        ("digest", "md5", "digest is 'md5'; expected xxh3 or sha256 or blake3 or none"),
    ],
)
def test_the_engines_settings_are_checked_when_the_config_is_built(setting, value, said):
    with pytest.raises(ConfigError) as caught:
        load_config({"ckpt_dir": "a", "export_dir": "b", setting: value})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
