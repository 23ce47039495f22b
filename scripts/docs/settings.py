"""Write docs/reference/settings.md and launch/export.yaml from the settings: python -m scripts.docs.settings [--check].

Groups, names, types, defaults and texts are those of ``config/schema.py``. ``identity.HOW`` says whether a setting shapes the
package. Only the examples are written here; a test loads each of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

from dist_export.config.describe import read_groups, render_yaml
from dist_export.pipeline.config_agreement import MAY_DIFFER
from dist_export.pipeline.identity import HOW

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "settings.md"
YAML = ROOT / "launch" / "export.yaml"

EXAMPLES = {
    "ckpt_dir": "/ckpts/run7/ckpt_120000",
    "export_dir": "s3://serving/ctr/20260101",
    "publish": "/serving/ctr",
    "keep_versions": "10",
    "base": "/serving/ctr/20251231",
    "on_base_mismatch": "full",
    "delta_chain": "8",
    "compare": "exact",
    "delta_ignore_slots": "[step]",
    "step": "120000",
    "register": "models:/ctr_serving",
    "registry_options": '{models: {registry_uri: "http://mlflow.internal:5000"}}',
    "format": "dcp",
    "since_step": "120000",
    "until_step": "121000",
    "allow_ragged": "true",
    "overwrite": "true",
    "on_unfinished": "restart",
    "follow_links": "true",
    "filter_sparse_opt": "true",
    "num_shards": "8",
    "treat_as_tables": '["*_emb.weight"]',
    "optimizer_slots": '["*.momentum1"]',
    "state_root": "ema",
    "drop_slots": "[step_filter]",
    "keep_slots": '["user_emb.*"]',
    "dtype": '{user_emb: int8, "item_*": bfloat16, "*": float16}',
    "on_overflow": "clamp",
    "on_misplaced": "error",
    "on_duplicate": "last",
    "select_tables": '["user_*", item_emb]',
    "drop_tables": '["*_experiment"]',
    "rename_tables": '{"user_*_v2": "user_{0}"}',
    "to_hash_tables": '["city_emb"]',
    "default_row": '{"user_*": zeros, item: [0.5, 0, 0, 0.1]}',
    "dynamicemb_dims": "{user: 16}",
    "allow_hashed_ids": '["user_emb"]',
    "allow_missing_tables": '["*.new_feature.weight"]',
    "prune": '[{tables: "user_*", slot: step_filter, below: 10}]',
    "on_empty_table": "allow",
    "digest": "sha256",
    "server_side_copy": "false",
    "row_index": "false",
    "row_fingerprints": "true",
    "max_memory": "2GiB",
    "threads": "2",
    "need_export_sparse": "false",
    "add_subfolder": "true",
    "model": "my_team.models:build_model",
    "model_args": "{dim: 16}",
    "sparse_model_name": "embeddings",
    "dense_model_name": "towers.ranking",
    "dataset": "my_team.data:build_dataset",
    "dataset_args": "{batch_size: 128}",
    "allow_missing_dense": '["head.temperature"]',
    "allow_unexpected_dense": '["aux_loss.*"]',
    "allow_load_hooks": "[model, sparse_arch.user]",
    "export_folder_name": "fx_user_model",
    "export_model_name": "ranking",
    "export_outputs": "[ctr, like]",
    "max_batch_size": "4096",
    "dynamic_dims": "{clicks: {1: history}}",
    "device": "cpu",
    "archive_format": "legacy",
    "dense_formats": "[onnx, aoti]",
    "layouts": "[triton]",
    "atol": "1.0e-05",
    "rtol": "0.0001",
    "drift_batches": "16",
    "max_drift": "{ctr: 0.01}",
    "score_program": "require",
    "lookup_modules": '["sparse_arch.tables.*"]',
    "serving": "{features: {clicks: {padding_id: 0}}}",
    "fg": "my_team.features:build_fg",
    "fg_args": "{version: 3}",
    "fg_conf_or_path": "conf/fg.json",
    "mc_conf_or_path": "conf/mc.json",
    "fg_rules": "none",
    "storage_options": '{client_kwargs: {endpoint_url: "http://store.internal:9000"}}',
    "target_storage_options": "{profile: serving}",
    "events": "true",
    "metrics": "/var/lib/node_exporter/dist_export.prom",
    "progress": "false",
    "timeout": "3600",
}
"""Setting -> a value as YAML that is not the default, or is a usual choice."""

THROUGH = {
    "ckpt_dir": "yes, through the checkpoint that it names",
    "step": "yes, through the checkpoint that it chooses",
    "num_shards": "yes, through the number of shards that it gives",
}
"""What shapes a package, but not by how it is spelt: two spellings that lead to the same give the same package."""

_YAML_HEAD = (
    "# Every setting of dist_export with its default. Copy it, keep what you change, and run:",
    "#   torchrun --nproc-per-node 2 -m dist_export --config export.yaml",
    "# On the command line, --key value replaces the value here; nested keys have dots (--model_args.dim 16).",
    "# Relative paths are relative to the working directory. This file is written by scripts/docs/settings.py.",
)

_HEAD = """\
# Settings

<!-- Written by scripts/docs/settings.py. Change dist_export/config/schema.py, and run the script. -->

Each setting has the same name in a YAML file, on the command line (`--key value`) and in Python (a keyword).
A value on the command line replaces the value of the file. See [the command line](command-line.md) for nested keys and lists.
[`launch/export.yaml`](../../launch/export.yaml) is a file with all of them, to copy.

*Shapes the package* says whether the setting changes what is in the package. Two exports of one source with equal values of these
settings give the same bytes. If the target holds a package of the same source and the same values, a rerun succeeds at once
([rerun](../how-to/resume.md)). *May differ between ranks* says that the value is not compared between the ranks. All other
settings must be equal on all ranks.

A *pattern* matches names: `*` stands for any characters, `?` for one. A pattern that matches nothing is an error. Write
quotes around a pattern that begins with `*`, because YAML needs them.
"""


def say_type(hint: Any) -> str:
    """Return a type of the settings in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(say_type(argument) for argument in arguments)
    if origin is list:
        return (
            f"list of ({say_type(arguments[0])})"
            if " " in say_type(arguments[0])
            else f"list of {say_type(arguments[0])}"
        )
    if origin is dict:
        return f"mapping from {say_type(arguments[0])} to {say_type(arguments[1])}"
    words = {
        int: "whole number",
        float: "number",
        bool: "`true` or `false`",
        str: "text",
        type(None): "`null`",
        Any: "any value",
    }
    return words[hint]


def say_default(default: Any) -> str:
    """Return a default as YAML, or that there is none."""
    if default is dataclasses.MISSING:
        return "none: it must be set"
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def escape(text: str) -> str:
    """Return a comment of YAML as Markdown, with values in braces and paths with placeholders as code."""
    text = re.sub(r"[\w.-]*<\w+>[\w./<>]*\w|[\w-]*<\w+>", r"`\g<0>`", text)
    out, depth, start = "", 0, 0
    for i, sign in enumerate(text):
        if sign == "{":
            start = i if depth == 0 else start
            depth += 1
        elif sign == "}":
            depth -= 1
            out += f"`{text[start : i + 1]}`" if depth == 0 else ""
        elif depth == 0:
            out += sign
    pieces = out.replace("|", "\\|").split("`")
    for i in range(0, len(pieces), 2):  # the others are code already
        pieces[i] = re.sub(r"\b[a-z]+(_[a-z]+)+\b(\.[a-z]\w*|\(\))?", _mark_setting, pieces[i])
    return "`".join(pieces)


def _mark_setting(found: re.Match[str]) -> str:
    """Return the name of a setting as a link to it, and any other word with underscores as code."""
    return f"[`{found[0]}`](#{found[0]})" if found[0] in EXAMPLES else f"`{found[0]}`"


def render() -> str:
    """Return the page."""
    lines = [_HEAD]
    for title, settings in read_groups().items():
        lines.append(f"## {title}\n")
        for name, option in settings.items():
            scope = THROUGH.get(name, "no" if name in HOW else "yes")
            ranks = "yes" if name in MAY_DIFFER else "no"
            lines += [
                f"### `{name}`\n",
                f"{escape(option.text)}\n",
                "| | |",
                "|---|---|",
                f"| Type | {say_type(option.hint)} |",
                f"| Default | {say_default(option.default)} |",
                f"| Example | `{name}: {EXAMPLES[name]}` |",
                f"| Shapes the package | {scope} |",
                f"| May differ between ranks | {ranks} |",
                "",
            ]
    return "\n".join(lines)


def render_files() -> dict[Path, str]:
    """Return the files with what they should hold."""
    return {PAGE: render(), YAML: "\n".join([*_YAML_HEAD, *render_yaml(read_groups()), ""])}


def main() -> int:
    """Write the files, or say with ``--check`` whether they are what they should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    is_check = parser.parse_args().check
    code = 0
    for path, text in render_files().items():
        if not is_check:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            print(f"{path.relative_to(ROOT)} is not up to date; run python -m scripts.docs.settings", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
