"""``report``: the page about a package that was exported, in a browser, and its figures against the rows of the test itself."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from dist_export.cli import main
from dist_export.diff.compare import diff
from dist_export.package.reader import Package, open_package
from dist_export.report.entries import Found, FoundEvents
from dist_export.report.facts import describe_report
from dist_export.report.page import render_page
from dist_export.report.read import read_norms
from tests.support import browser, exports
from tests.support import score_models as models
from tests.support.recis_writer import split_table, write_checkpoint

HOSTILE = "</Script><img src=x onerror=alert(1)>\"'&" + "long_" * 40
DIM = 8
ROWS = {"item": 3000, "user": 500, HOSTILE: 40}


def rows_of(nudge: float = 0.0) -> dict[str, np.ndarray]:
    """Return rows by table: of ``item`` 5 are dead, 2 have a NaN and 3 an infinity."""
    random = np.random.default_rng(0)
    tables = {name: random.normal(size=(count, DIM)).astype(np.float32) for name, count in ROWS.items()}
    tables["item"][10:15] = 0
    tables["item"][20:22, 3] = np.nan
    tables["item"][30:33, 4] = -np.inf
    tables["user"][:7] += np.float32(nudge)
    return tables


def export(base: Path, tables: dict[str, np.ndarray], **settings: Any) -> str:
    """Write a checkpoint with an optimizer slot, and export it; return the place of the package."""
    parts = {}
    for name, rows in tables.items():
        ids = np.random.default_rng(7).permutation(len(rows)).astype(np.int64) * 7919
        parts[name] = split_table(ids, {"embedding": rows, "sparse_adam_exp_avg": rows}, 3)
    source = write_checkpoint(base / "ckpt", parts)
    given = {"ckpt_dir": str(source), "export_dir": str(base / "out"), "filter_sparse_opt": True, "num_shards": 3}
    if "publish" in settings:
        del given["export_dir"]
    exports.export(given | settings)
    return str(settings.get("export_dir", base / "out"))


def report(path: str | Path, out: Path, *options: str) -> dict[str, Any]:
    """Write the page, and return its facts."""
    assert main(["report", str(path), "--out", str(out), *options]) == 0
    found = re.search(r'<script type="application/json" id="facts">(.*?)</script>', out.read_text())
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> str:
    return export(tmp_path_factory.mktemp("first"), rows_of(), events=True)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return export(tmp_path_factory.mktemp("second"), rows_of(nudge=0.25))


def figures_of(facts: dict[str, Any], name: str) -> dict[str, Any]:
    return next(table["norms"] for table in facts["tables"] if table["name"] == name)


def test_figures_are_those_of_the_rows(package: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    facts = report(package, tmp_path / "report.html", "--sample_rows", "0")
    assert capsys.readouterr().out.startswith(f"{tmp_path}/report.html is written, ")
    rows = rows_of()["item"]
    found = figures_of(facts, "item")
    assert [found[name] for name in ("rows_read", "dead", "nan", "inf")] == [3000, 5, 2, 3]
    norms = torch.linalg.vector_norm(torch.from_numpy(rows), dim=1)
    norms = norms[norms.isfinite() & (norms > 0)]
    assert sum(found["counts"]) == len(norms) == 2990
    assert found["median"] == pytest.approx(float(norms.median()), rel=0.025)
    assert found["largest"] == pytest.approx(float(norms.max()), rel=1e-5)
    item = next(table for table in facts["tables"] if table["name"] == "item")
    assert (item["rows_in"], item["rows_out"], item["kept"], item["dropped"]) == (3000, 3000, 3000 * 40, 3000 * 32)
    assert sum(rows for _, _, rows in facts["shards"]["bars"]) == sum(ROWS.values())
    assert {bar["stage"] for bar in facts["timeline"]["bars"]} >= {"read", "plan", "transfer", "commit"}
    assert "events.jsonl" in facts["timeline"]["text"]
    assert HOSTILE in {table["name"] for table in facts["tables"]}


def test_a_sample_reads_as_many_rows(package: str, tmp_path: Path) -> None:
    facts = report(package, tmp_path / "report.html", "--sample-rows", "300")
    assert 270 <= figures_of(facts, "item")["rows_read"] <= 300
    assert figures_of(facts, HOSTILE)["rows_read"] == 40
    assert "At most 300 rows of each table were read" in facts["sampled"]


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float16"])
def test_cast_rows_are_read_as_serving_gets_them(dtype: str, tmp_path: Path) -> None:
    tables = {"user": rows_of()["user"]}
    facts = report(export(tmp_path, tables, dtype={"*": dtype}), tmp_path / "report.html")
    norms = np.linalg.norm(tables["user"], axis=1)
    found = figures_of(facts, "user")
    assert found["largest"] == pytest.approx(norms.max(), rel=0.01)
    assert found["median"] == pytest.approx(np.median(norms), rel=0.03)
    assert facts["tables"][0]["casts"][0].startswith("from float32, largest error ")


def test_a_package_in_a_store(tmp_path: Path) -> None:
    path = export(tmp_path, {"user": rows_of()["user"]}, export_dir="memory://report/out")
    facts = report(path, tmp_path / "report.html")
    assert figures_of(facts, "user")["rows_read"] == 500
    assert main(["report", path, "--out", "memory://report/page/report.html"]) == 0
    assert main(["report", path, "--out", "memory://report/out/report.html"]) == 2


def test_a_published_package_has_its_versions(tmp_path: Path) -> None:
    for nudge in (0.0, 0.5):
        export(tmp_path / str(nudge), {"user": rows_of(nudge)["user"]}, publish=str(tmp_path / "pub"))
    facts = report(f"versions:{tmp_path / 'pub'}", tmp_path / "report.html")
    assert [row[3] for row in facts["versions"]["rows"]] == ["current, this package", ""]
    assert facts["versions"]["rows"][0][0] == facts["title"].rpartition("/")[2]
    (tmp_path / "pub" / "current.json").write_text("{")
    (folder,) = [
        path for path in (tmp_path / "pub" / "versions").iterdir() if path.name == facts["title"].rpartition("/")[2]
    ]
    assert "is damaged" in report(folder, tmp_path / "report.html")["versions"]["text"]


def test_against_says_what_diff_says(package: str, newer: str, tmp_path: Path) -> None:
    found = report(newer, tmp_path / "report.html", "--against", package)["against"]
    expected = {table.name: table for table in diff(package, newer).tables}
    (user,) = found["tables"]
    assert user["name"] == "user"
    assert (user["same"], user["changed"]) == (expected["user"].same, expected["user"].changed) == (493, 7)
    assert found["num_tables"] == 3
    assert found["lines"][:2] == [f"A {package}", f"B {newer}"]
    assert any("7 changed by up to 0.25" in line for line in found["lines"])


def test_programs_parity_and_drift(tmp_path: Path) -> None:
    model = models.train(models.Model(models.ThreeTables(), 3 * models.DIM + 1))
    checkpoint = models.save(model, tmp_path / "model.pth")
    build = models.Model(models.ThreeTables(), 3 * models.DIM + 1)
    exporter = exports.exporter(build, "sparse_arch", "dense_arch", [models.batch_of()], checkpoint, tmp_path / "out")
    exporter.export(progress=False)
    facts = report(tmp_path / "out", tmp_path / "report.html")
    assert ["dense", "output", "ctr", "float32"] in [row[:4] for row in facts["tensors"]]
    assert {row[2] for row in facts["tensors"] if row[1] == "input"} == {"user", "clicks", "tags", "price"}
    assert {row[1] for row in facts["scores"]["rows"]} == {"ctr"}
    assert [row[0] for row in facts["scores"]["drift"]] == ["ctr"]


# ---- mistakes ----


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "--out is missing"),
        (["--out", "{out}/report.html"], "it would be a file of the package"),
        (["--out", "{out}/new/report.html"], "it would be a file of the package"),
        (["--out", "{link}/report.html"], "it would be a file of the package"),
        (["--out", "{tmp}"], "it is a directory"),
        (["--out", "{tmp}/file/report.html"], "Not a directory"),
        (["--out", "{tmp}/r.html", "--sample_rows", "-1"], "--sample_rows is -1"),
        (["--out", "{tmp}/r.html", "--events", "{tmp}/none.jsonl"], "--events {tmp}/none.jsonl cannot be read"),
        (["--out", "{tmp}/r.html", "--against", "{tmp}"], "no manifest.json"),
    ],
)
def test_a_mistake_is_one_line(
    package: str, tmp_path: Path, capsys: pytest.CaptureFixture, options: Any, told: str
) -> None:
    (tmp_path / "link").symlink_to(package)
    (tmp_path / "file").touch()
    names = {"out": package, "tmp": tmp_path, "link": tmp_path / "link"}
    before = sorted(os.listdir(package))
    assert main(["report", package, *(option.format(**names) for option in options)]) == 2
    error = capsys.readouterr().err
    assert told.format(**names) in error
    assert error.count("\n") == 1
    assert sorted(os.listdir(package)) == before
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_what_cannot_be_read_is_one_line_and_leaves_the_page_as_it_was(
    package: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "report.html"
    out.write_text("old")
    broken = export(tmp_path, {"user": rows_of()["user"]})
    shard = Path(broken) / "model-000000-of-000003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    for path in (str(tmp_path / "none"), str(tmp_path), broken):
        assert main(["report", path, "--out", str(out)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert out.read_text() == "old"
    report(package, out)
    assert sorted(os.listdir(tmp_path)) == ["ckpt", "out", "report.html"]


def test_rows_are_read_in_blocks(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of any size is read with little memory."""
    read_run, sizes = Package.read_run, []

    def note(self: Package, table: str, part: int, first: int, last: int) -> Any:
        sizes.append(last - first)
        return read_run(self, table, part, first, last)

    with open_package(package) as opened:
        whole = read_norms(opened, sample_rows=0)
        monkeypatch.setattr(Package, "read_run", note)
        assert read_norms(opened, sample_rows=0, block_values=64 * DIM) == whole
    assert max(sizes) == 64


# ---- in a browser ----

NAMES = "[...document.querySelectorAll('#tables tbody tr td:first-child')].map(cell => cell.textContent)"
SEARCH = (
    "(() => {{ const e = document.getElementById('search'); e.value = {!r}; e.dispatchEvent(new Event('input')); }})()"
)
CHOOSE = (
    "(() => {{ const label = [...document.querySelectorAll('#tables label')].find(l => l.firstChild.textContent === {!r}); "
    "const select = label.querySelector('select'); "
    "select.value = [...select.options].find(o => o.textContent === {!r}).value; select.dispatchEvent(new Event('change')); }})()"
)
SORT = "[...document.querySelectorAll('#tables th button')].find(b => b.textContent === {!r}).click()"


@pytest.fixture(scope="module")
def page(package: str, newer: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the page is not opened")
    base = tmp_path_factory.mktemp("browser")
    report(newer, base / "report.html", "--against", package)
    with browser.Page(base / "report.html", base / "profile") as opened:
        yield opened


def test_the_page_opens_without_an_error_and_without_a_request(page: browser.Page) -> None:
    titles = page.ask("[...document.querySelectorAll('h2')].map(title => title.textContent)")
    assert titles[:3] == ["Package", "Account of the checkpoint's bytes", "Tables"]
    assert titles[-1] == "Comparison with another package"
    assert page.ask("document.querySelectorAll('rect').length") > 60
    assert page.ask("document.querySelectorAll('img').length") == 0
    assert page.errors == []


def test_search_and_sort(page: browser.Page) -> None:
    assert page.ask(NAMES) == ["item", "user", HOSTILE]
    page.ask(SORT.format("Table"))
    assert sorted(page.ask(NAMES)[1:]) == ["item", "user"]
    page.ask(SORT.format("Table"))
    assert page.ask(NAMES) == ["user", "item", HOSTILE]
    page.ask(SORT.format("Dead"))
    assert page.ask(NAMES)[0] == "item"
    assert page.ask("document.querySelector('#tables th[aria-sort=descending]').textContent") == "Dead"
    page.ask(SEARCH.format("US e"))
    assert page.ask(NAMES) == ["user"]
    assert page.ask("document.getElementById('total').textContent") == "1 of 3 tables, 1 shown."
    assert page.ask("document.querySelectorAll('figure').length") == 1
    page.ask(SEARCH.format("</SCRIPT"))
    assert page.ask(NAMES) == [HOSTILE]
    page.ask(SEARCH.format(""))
    assert len(page.ask(NAMES)) == 3
    assert page.errors == []


def test_a_bar_under_the_pointer_has_its_figures(page: browser.Page) -> None:
    page.ask("document.querySelector('#shards rect').scrollIntoView({block: 'center'})")
    x, y = page.ask("(({x, y}) => [x + 5, y + 5])(document.querySelector('#shards rect').getBoundingClientRect())")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    page.wait_for("!document.getElementById('tip').hidden")
    told = page.ask("document.getElementById('tip').textContent")
    assert re.fullmatch(r"model-00000\d-of-000003\.safetensors\n.* kB, 1,\d+ rows", told)


def test_a_narrow_screen_does_not_scroll_sideways_and_the_page_prints(page: browser.Page) -> None:
    page.call("Emulation.setDeviceMetricsOverride", width=420, height=900, deviceScaleFactor=1, mobile=False)
    assert page.ask("document.documentElement.scrollWidth") <= 420
    page.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
    assert page.print_to_pdf().startswith(b"%PDF")
    assert page.errors == []


@pytest.mark.parametrize("breakage", ["fetch('http://127.0.0.1:9/')", "console.error('x')", "setTimeout(() => lost())"])
def test_the_browser_reports_errors_and_requests(page: browser.Page, breakage: str) -> None:
    """The checks above can fail."""
    page.errors.clear()
    page.ask(f"void {breakage}")
    deadline = time.monotonic() + 20
    while not page.errors and time.monotonic() < deadline:
        page.ask("1")
        time.sleep(0.05)
    assert page.errors
    page.errors.clear()


def test_two_thousand_tables_stay_readable(package: str, tmp_path: Path) -> None:
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the page is not opened")
    with open_package(package) as opened:
        manifest, (entry, *_) = opened.manifest, opened.manifest.tables
        norms = read_norms(opened, sample_rows=0)[entry.name]
    tables = tuple(
        msgspec.structs.replace(entry, name=f"table_{number}", rows_in=number, rows_out=number)
        for number in range(2000)
    )
    found = Found(
        norms={table.name: norms for table in tables}, events=FoundEvents("", []), versions=None, against=None
    )
    many = msgspec.structs.replace(manifest, tables=tables)
    out = tmp_path / "report.html"
    out.write_bytes(render_page(describe_report(many, "out", found, sample_rows=0, made_by="a test")))
    with browser.Page(out, tmp_path / "profile") as page:
        assert page.ask("document.getElementById('total').textContent") == "2,000 of 2,000 tables, 10 shown."
        assert page.ask("document.querySelectorAll('figure').length") == 10
        page.ask(SORT.format("Rows in"))
        assert page.ask(NAMES)[:2] == ["table_1999", "table_1998"]
        page.ask(SEARCH.format("_19"))
        assert page.ask("document.getElementById('total').textContent") == "111 of 2,000 tables, 10 shown."
        page.ask(CHOOSE.format("Show", "100"))
        assert len(page.ask(NAMES)) == 100
        page.ask(SEARCH.format(""))
        page.ask(CHOOSE.format("Show", "all"))
        assert len(page.ask(NAMES)) == 2000
        assert page.ask("document.querySelectorAll('figure').length") == 100
        assert page.errors == []
