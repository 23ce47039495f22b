"""Settings on the command line: every form of an option, and what a value of each type may look like."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_export.config.loader import load_config, parse_settings
from dist_export.errors import ConfigError

PLACES = ["--ckpt_dir=in", "--export_dir=out", "--filter_sparse_opt=true"]
RULE = {"tables": "a", "norm_at_most": 0}


@pytest.mark.parametrize(
    ("arguments", "name", "expected"),
    [
        (["--num_shards", "3"], "num_shards", 3),
        (["--num-shards=source"], "num_shards", "source"),
        (["--num_shards=3", "--num_shards", "null"], "num_shards", None),
        (["--ckpt_dir", "2024-01-01"], "ckpt_dir", "2024-01-01"),
        (["--ckpt_dir", "2024-99-99"], "ckpt_dir", "2024-99-99"),
        (["--ckpt_dir", "0123"], "ckpt_dir", "0123"),
        (["--ckpt_dir", "'quoted'"], "ckpt_dir", "'quoted'"),
        (["--ckpt_dir", "s3://a/b: c"], "ckpt_dir", "s3://a/b: c"),
        (["--ckpt_dir=a=b"], "ckpt_dir", "a=b"),
        (["--overwrite", "yes"], "overwrite", True),
        (["--atol", "1"], "atol", 1.0),
        (["--atol", "1e-3"], "atol", 1e-3),
        (["--events", "true"], "events", True),
        (["--events", "e.jsonl"], "events", "e.jsonl"),
        (["--max_memory", "134217728"], "max_memory", 134217728),
        (["--max_memory", "1e9"], "max_memory", "1e9"),
        (["--drop_slots+", "a", "--drop_slots+=b", "--drop_slots+", "[c, d]"], "drop_slots", ["a", "b", "c", "d"]),
        (["--drop_slots", "a", "--drop_slots", "b"], "drop_slots", ["b"]),
        (["--prune+", str(RULE), "--prune+", f"[{RULE}]"], "prune", [RULE, RULE]),
        (["--dtype", "{a: int8}", "--dtype.b", "float16"], "dtype", {"a": "int8", "b": "float16"}),
        (["--dtype.b", "float16", "--dtype", "[{a: int8}]"], "dtype", [{"a": "int8"}]),
        (
            ["--dynamic_dims.clicks.1", "n", "--dynamic_dims.clicks.2", "m"],
            "dynamic_dims",
            {"clicks": {1: "n", 2: "m"}},
        ),
        (["--max_drift.ctr", "1e-3"], "max_drift", {"ctr": 1e-3}),
        (["--default_row", "{a: [1e-3, 2]}"], "default_row", {"a": [1e-3, 2.0]}),
        (["--fg_conf_or_path", "fg.json"], "fg_conf_or_path", "fg.json"),
        (["--fg_conf_or_path", "{a: 1e-3}"], "fg_conf_or_path", {"a": 1e-3}),
        (["--model_args.a-b", "1e-3", "--model_args.c", "'1e-3'"], "model_args", {"a-b": 1e-3, "c": "1e-3"}),
        (["--export_outputs", "ctr"], "export_outputs", ["ctr"]),
        (["--export_outputs", "null"], "export_outputs", None),
    ],
)
def test_a_form_of_an_option(arguments: list[str], name: str, expected: Any) -> None:
    assert getattr(parse_settings([*PLACES, *arguments]), name) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_shards"], "--num_shards needs a value"),
        (["--num_shards", "--overwrite=true"], "--num_shards needs a value"),
        (["--num_shards", "true"], "num_shards is True; expected a whole number or world_size or source or null"),
        (["--num_shards", "1.5"], "num_shards is 1.5; expected"),
        (["--overwrite", "1"], "overwrite is 1; expected true or false"),
        (["--overwrite.a", "1"], "overwrite is {'a': 1}; expected true or false"),
        (["--overwrite+", "true"], r"--overwrite\+ adds to a list, and overwrite is none"),
        (["--dynamic_dims.clicks.one", "n"], "dynamic_dims is {'clicks': {'one': 'n'}}; expected a mapping"),
        (["--model_args.a", "1", "--model_args.a.b", "2"], "model_args.a.b lies below a value"),
        (["--model_args.a", "["], "model_args.a is no YAML"),
        (
            ["--model_args.a", "010"],
            "model_args.a is no YAML: YAML takes a number with a zero at its beginning for one to base 8",
        ),
        (["--step", "0100"], "step is '0100'; expected a whole number"),
        (["--model_args", "{1: 2}"], "model_args has keys that are no text"),
        (["--storage_options", "{1: hunter2}"], "storage_options has keys that are no text"),
        (["--storage_options.a", "[hunter2"], "storage_options.a is no YAML"),
        (["stray"], "'stray' belongs to no option"),
        (["compact"], "a command, such as verify, goes before all options"),
        (["-x"], "'-x' belongs to no option"),
        (["--", "x"], "is no setting"),
    ],
)
def test_what_is_no_option_or_no_value_of_it_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_settings([*PLACES, *arguments])
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_options_are_laid_over_the_file_and_a_whole_value_replaces_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("drop_slots: [x]\ndtype: {a: int8}\nrename_tables: {a: b}\nnum_shards: 4\n")
    found = parse_settings(
        [
            "--drop_slots+=y",
            "--dtype.b=float16",
            *PLACES,
            "--config",
            str(tmp_path / "a.yaml"),
            "--rename_tables",
            "{c: d}",
        ]
    )
    assert (found.drop_slots, found.dtype, found.rename_tables) == (
        ["x", "y"],
        {"a": "int8", "b": "float16"},
        {"c": "d"},
    )
    assert parse_settings(["--num_shards", "null", *PLACES, "--config", str(tmp_path / "a.yaml")]).num_shards is None


def test_python_values_keep_their_objects_and_numbers_of_numpy_are_numbers() -> None:
    """What is handed on to the caller's own code is not looked into."""
    today, seen = dt.date(2026, 1, 1), object()
    found = load_config(
        {
            "ckpt_dir": Path("in"),
            "export_dir": "out",
            "filter_sparse_opt": True,
            "num_shards": np.int64(3),
            "atol": np.float32(0.5),
            "drop_slots": ("a", "b"),
            "model_args": {"day": today, "it": seen, "pair": (1, 2), "text": "1e-7"},
        }
    )
    assert (found.ckpt_dir, found.num_shards, found.atol, found.drop_slots) == ("in", 3, 0.5, ["a", "b"])
    assert (type(found.num_shards), type(found.atol)) == (int, float)
    assert found.model_args == {"day": today, "it": seen, "pair": (1, 2), "text": "1e-7"}


@pytest.mark.parametrize("pattern", ["[ab]*", "*_emb", "a: b", "null", "12"])
def test_a_text_of_a_file_is_a_pattern_as_it_stands(pattern: str) -> None:
    settings = {"ckpt_dir": "in", "export_dir": "out", "filter_sparse_opt": True}
    assert load_config({**settings, "drop_slots": pattern}).drop_slots == [pattern]
