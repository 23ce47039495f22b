"""The documentation is about this code: generated pages are up to date, examples load, texts of errors are those of the code."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import dist_export
from dist_export.config.describe import SETTINGS
from dist_export.config.loader import load_config
from dist_export.config.schema import ExportConfig
from dist_export.errors import ConfigError
from scripts.docs import schema, settings
from tests.support import ROOT
from tests.support.recis_writer import make_tables, write_checkpoint

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
FIELDS = [field.name for field in dataclasses.fields(ExportConfig)]

NEEDED = {
    "on_overflow": {"dtype": {"*": "float16"}},
    "on_empty_table": {"prune": [{"tables": "*", "norm_at_most": 0}]},
    "layouts": {"dense_formats": ["onnx"]},
    "keep_versions": {"export_dir": "versions:b"},
    "on_base_mismatch": {"base": "c"},
    "compare": {"base": "c"},
    "delta_chain": {"base": "c"},
    "delta_ignore_slots": {"base": "c", "compare": "exact"},
    "format": {"base": "c"},  # tzrec_delta cannot do without
    **{name: {"format": "tzrec_delta", "base": "c"} for name in ("since_step", "until_step", "allow_ragged")},
    "filter": {"filter_sparse_opt": True},
}
"""What a setting's example needs beside it."""


def test_the_page_of_settings_is_up_to_date() -> None:
    for path, text in settings.render_files().items():
        assert path.read_text() == text, f"{path} is stale: run python -m scripts.docs.settings"


def test_the_page_of_settings_has_every_setting_once_in_the_order_of_the_yaml_file() -> None:
    listed = [name for group in settings.read_groups().values() for name, its in group.items() if its.text]
    assert sorted(listed) == sorted(FIELDS)
    assert sorted(settings.EXAMPLES) == sorted(FIELDS)
    assert re.findall(r"^### `(\w+)`$", settings.PAGE.read_text(), re.MULTILINE) == listed


@pytest.mark.parametrize("name", FIELDS)
def test_the_example_of_each_setting_loads(name: str) -> None:
    value = yaml.safe_load(f"{name}: {settings.EXAMPLES[name]}")
    base: dict[str, Any] = {"ckpt_dir": "a", "export_dir": "b", **NEEDED.get(name, {})}
    if name == "publish":  # in place of export_dir
        assert load_config({"ckpt_dir": "a", **value}).export_dir == f"versions:{value[name]}"
        return
    try:
        config = load_config(base | value)
    except ConfigError as error:
        assert "filter_sparse_opt: true" in str(error)
        config = load_config(base | NEEDED["filter"] | value)
    assert getattr(config, name) == value[name]


def test_a_changed_default_makes_page_and_yaml_file_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = dataclasses.replace(SETTINGS["timeout"], default=1.0)
    monkeypatch.setitem(SETTINGS, "timeout", changed)
    for path, text in settings.render_files().items():
        assert path.read_text() != text


def test_the_schema_of_the_manifest_is_up_to_date() -> None:
    assert schema.FILE.read_text() == schema.render(), "run python -m scripts.docs.schema"


def test_a_manifest_is_valid_under_the_schema_and_a_damaged_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="no jsonschema in this environment; the extra test has it")
    validator = jsonschema.Draft202012Validator(json.loads(schema.FILE.read_text()))
    write_checkpoint(tmp_path / "ckpt", make_tables({"user_emb": 40, "item_emb": 30}, num_parts=2))
    dist_export.export(
        {
            "ckpt_dir": str(tmp_path / "ckpt"),
            "export_dir": str(tmp_path / "out"),
            "filter_sparse_opt": True,
            "num_shards": 2,
            "drop_tables": ["item_*"],
            "dtype": {"user_emb": "int8"},
            "prune": [{"tables": "user_emb", "norm_at_most": 0}],
            "default_row": {"user_emb": "zeros"},
        }
    )
    document = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert not list(validator.iter_errors(document))
    for damage in (("num_shards", -1), ("tables", None), ("source", {}), ("files", [{"path": "x"}])):
        damaged = copy.deepcopy(document) | dict([damage])
        assert list(validator.iter_errors(damaged)), damage


def find_messages() -> Iterator[str]:
    """Yield every text in the code, f-strings with ``...`` in the place of their values."""
    for path in (ROOT / "dist_export").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_text_on_the_page_of_errors_is_one_of_the_code() -> None:
    text = (DOCS / "reference" / "errors.md").read_text().partition("## Settings")[2]
    quoted = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(quoted) > 30
    messages = list(find_messages())
    patterns = {one: re.escape(one).replace(re.escape("..."), ".*") for one in quoted}
    missing = [one for one, pattern in patterns.items() if not any(re.search(pattern, its) for its in messages)]
    assert not missing


def test_the_glossary_has_each_word_once_in_order() -> None:
    text = (DOCS / "reference" / "glossary.md").read_text()
    terms = re.findall(r"^(\w[^\n]*)\n  \S", text, re.MULTILINE)
    assert terms == sorted(terms)
    assert len(terms) == len(set(terms)) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_a_page_loads_nothing_from_elsewhere_and_links_to_files_that_are_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert not re.search(r"!\[[^]]*\]\((?!_static/|\.\./_static/)", text), "a picture that is no file of this site"
    assert not re.search(r"<(script|img|link|iframe)", text)
    for target in re.findall(r"(?<!!)\[[^]]*\]\(([^)#\s]+)", text):
        if not re.match(r"https?://", target):
            assert (page.parent / target).exists(), target


def test_pictures_are_drawings_without_links() -> None:
    for picture in (DOCS / "_static").iterdir():
        assert picture.suffix == ".svg"
        assert not re.search(r"href|url\(['\"]?http|<script", picture.read_text())


def test_the_front_page_is_short_and_begins_with_a_first_success() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 200
    first_screen = "\n".join(lines[:40])
    assert all(
        text in first_screen
        for text in ("pip install", "ckpt_dir:", "torchrun", "from dist_export import Exporter", ".svg")
    )


def test_links_of_the_front_page_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", README.read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_no_file_of_the_site_names_a_host_of_a_package_registry() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "docs", "scripts/docs", "scripts/docs.sh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    hosts = re.compile(r"pypi\.org|pythonhosted|anaconda\.org|files\.python")
    assert not [name for name in tracked if hosts.search((ROOT / name).read_text())]


@pytest.mark.parametrize(
    "page", [DOCS / "architecture.md", *sorted((DOCS / "decisions").glob("0*.md"))], ids=lambda page: page.stem
)
def test_files_that_the_architecture_names_are_there(page: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in re.findall(r"`([\w/]+\.(?:py|c|sh))`", page.read_text()):
        assert any(path == name or path.endswith(f"/{name}") for path in tracked), name


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_yaml_is_a_config(page: Path) -> None:
    for block in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        given = yaml.safe_load(block)
        needed = {"ckpt_dir": "a", "filter_sparse_opt": True} | ({} if "publish" in given else {"export_dir": "b"})
        load_config(needed | given)


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_in_the_text_are_settings(page: Path) -> None:
    """A setting that is quoted with a value, such as `on_overflow: clamp`, is one, and may have that value."""
    for name, value in re.findall(r"`(\w+): ([\w.]+|\{[^`]*\}|\[[^`]*\])`", page.read_text()):
        if name in {
            "encoding",
            "schema_version",
            "is_hashmap",
            "restartPolicy",
            "shelf",
        }:  # fields of files, not settings
            continue
        assert name in FIELDS, name
        if value == "N" or "pattern" in value:  # stands for any value
            continue
        needed = {"ckpt_dir": "a", "export_dir": "b", "filter_sparse_opt": True, **NEEDED.get(name, {})}
        if name == "publish":
            del needed["export_dir"]
        if (name, value) == ("base", "latest"):
            needed["export_dir"] = "versions:b"
        text = value if "..." not in value else "{}"
        load_config(needed | ({"ckpt_dir": None} if value == "live" else {}) | {name: yaml.safe_load(text)})


def test_the_table_of_rooms_lists_every_room_and_what_it_imports() -> None:
    rows = re.findall(r"^\| `(\w+)/` \|.*\| ([^|]*) \|$", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    listed = {room: set(re.findall(r"\w+", imports)) for room, imports in rows}
    code = ROOT / "dist_export"
    assert sorted(listed) == sorted(path.parent.name for path in code.glob("*/__init__.py"))
    shared = {"errors", "redact", "humanize", "tuning", "_version"}
    for room in sorted(listed.keys() - {"pipeline"}):  # which imports nearly all
        modules = (ast.parse(path.read_text()) for path in (code / room).rglob("*.py"))
        nodes = (node for module in modules for node in ast.walk(module) if isinstance(node, ast.ImportFrom))
        imported = {node.module.split(".")[1] for node in nodes if (node.module or "").startswith("dist_export.")}
        assert imported - shared - {room} <= listed[room], room
