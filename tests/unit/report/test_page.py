"""The facts of a manifest, and the page: hostile strings, its policy, and 2,000 tables."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import time
from html.parser import HTMLParser
from typing import Any

import msgspec
import numpy as np

from dist_export.diff.entries import PackageDiff, TableDiff
from dist_export.manifest import (
    AccountEntry,
    AccountTensor,
    DriftEntry,
    DriftOutputEntry,
    FileEntry,
    LeftOutEntry,
    Manifest,
    ParityEntry,
    PartEntry,
    PruneEntry,
    SlotEntry,
    SourceEntry,
    TableEntry,
)
from dist_export.registry.versions import Version
from dist_export.report.entries import Found, FoundEvents, FoundVersions
from dist_export.report.facts import describe_report
from dist_export.report.norms import NormCounter, NormEntry
from dist_export.report.page import render_page

HOSTILE = "</script><script>alert(1)</script>\"'&<img src=x onerror=alert(1)>%facts%%script%\u202e\n<!--"


@functools.cache
def norms() -> NormEntry:
    counter = NormCounter()
    counter.add(np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32))
    return counter.close()


def table(name: str, rows: int = 10) -> TableEntry:
    return TableEntry(
        name=name,
        rows_in=rows + 3,
        rows_out=rows,
        rows_dropped={"duplicate": 1, "norm": 2},
        misplaced=0,
        id_sum="0",
        kept=(
            SlotEntry(name="id", dtype="int64", shape=(), num_bytes=8 * rows),
            SlotEntry(name="embedding", dtype="float32", shape=(8,), num_bytes=32 * rows),
        ),
        dropped=(SlotEntry(name="adam", dtype="float32", shape=(8,), num_bytes=64 * rows, reason="optimizer"),),
        parts=tuple(PartEntry(file=f"model-{shard}", slice="0@1@1", rows=rows // 2, keys={}) for shard in (0, 1)),
    )


def manifest_of(names: list[str], **fields: Any) -> Manifest:
    files = (
        FileEntry(path="model-0", num_bytes=100, digest=""),
        FileEntry(path="model-1", num_bytes=300, digest=""),
        FileEntry(path="index", num_bytes=9, digest=""),
    )
    given: dict[str, Any] = {
        "mode": "filter",
        "num_shards": 2,
        "source": SourceEntry(path="ckpt", format="recis", fingerprint="f", num_files=1, num_bytes=5, step=7),
        "tables": tuple(table(name) for name in names),
        "dense_tensors": (),
        "dropped_dense_tensors": (),
        "files": files,
        "dense": None,
        "parity": None,
        "notes": (),
        "versions": {"torch": "2"},
        "digest": "xxh3:1",
    }
    return Manifest(**{**given, **fields})


def facts_of(manifest: Manifest, *, sample_rows: int = 0, **found: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "norms": {entry.name: norms() for entry in manifest.tables},
        "events": FoundEvents("out.events.jsonl", [], "there is no such file"),
        "versions": None,
        "against": None,
    }
    return describe_report(manifest, "out", Found(**{**given, **found}), sample_rows=sample_rows, made_by="me")


class Collector(HTMLParser):
    """Collects tags, and the text of each script."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.policy = ""
        self.open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open = tag
        values = dict(attrs)
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"] or ""
        {"script": self.scripts, "style": self.styles}.get(tag, []).append("")

    def handle_data(self, data: str) -> None:
        if self.open == "script":
            self.scripts[-1] += data
        elif self.open == "style":
            self.styles[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.open = ""


def read(page: bytes) -> Collector:
    parser = Collector()
    parser.feed(page.decode())
    return parser


# ---- facts ----


def test_a_model_in_memory_is_a_source_with_a_name() -> None:
    """A source without a path would leave a gap in the page."""
    live = SourceEntry(path="", format="live", fingerprint="", num_files=0, num_bytes=0)
    facts = facts_of(manifest_of(["a"], source=live))
    assert dict(facts["overview"])["Source"] == "the model in memory (live), 0 files, 0 B"


def test_a_table_has_its_bytes_rows_and_norms() -> None:
    facts = facts_of(manifest_of(["a"]))
    (found,) = facts["tables"]
    assert (found["name"], found["kind"], found["row"]) == ("a", "hash", "float32 8")
    assert (found["rows_in"], found["rows_out"], found["rows_dropped"]) == (13, 10, {"duplicate": 1, "norm": 2})
    assert (found["kept"], found["dropped"], found["dropped_slots"]) == (400, 640, ["adam (optimizer)"])
    assert (found["norms"]["rows_read"], found["unread"]) == (2000, "")


def test_a_table_whose_rows_were_not_read_says_why() -> None:
    facts = facts_of(manifest_of(["a"]), norms={"a": "the table has no embedding"})
    assert (facts["tables"][0]["norms"], facts["tables"][0]["unread"]) == (None, "the table has no embedding")


def test_shards_are_those_files_that_have_rows_the_largest_first() -> None:
    shards = facts_of(manifest_of(["a", "b"]))["shards"]
    assert shards["bars"] == [("model-1", 300, 10), ("model-0", 100, 10)]
    assert "50.0 % above the mean" in shards["text"]


def test_the_overview_has_source_step_and_prune() -> None:
    rule = PruneEntry(tables=("*",), reason="norm", norm_at_most=0.5, rows=4)
    pairs = facts_of(manifest_of(["a"], prune=(rule,), run={"started": "now", "world_size": 3}))["overview"]
    overview = dict(pairs)
    assert (overview["Source"], overview["Training step"]) == ("ckpt (recis), 1 file, 5 B", "7")
    assert (overview["Prune"], overview["Ranks"], overview["Export began"]) == (
        "*: norm_at_most 0.5 pruned 4 rows",
        "3",
        "now",
    )
    assert overview["Dropped slots"] == "640 B: adam"


def test_an_odd_run_section_is_passed_over() -> None:
    overview = dict(facts_of(manifest_of(["a"], run={"started": 5, "world_size": "many"}))["overview"])
    assert not {"Ranks", "Export began"} & set(overview)


def test_account_left_out_tables_and_notes() -> None:
    account = AccountEntry(
        tensors=3,
        num_bytes=10,
        exported=4,
        in_program=0,
        dropped={"optimizer": 5},
        left_out={"no_model": 1},
        others=(AccountTensor(name="w", dtype="float32", shape=(1,), num_bytes=1, fate="left_out", reason="no_model"),),
    )
    left = (LeftOutEntry(name="old", rows=9, reason="drop_tables"),)
    facts = facts_of(manifest_of(["a"], account=account, left_out_tables=left, notes=("mind",)))
    assert facts["account"]["parts"] == [["exported", "", 4], ["dropped", "optimizer", 5], ["left out", "no_model", 1]]
    assert facts["account"]["others"] == [["w", "left out", "no_model", 1]]
    assert (facts["left_out"], facts["notes"]) == ([["old", 9, "drop_tables"]], ["mind"])
    assert facts_of(manifest_of(["a"]))["account"] is None


def test_parity_and_drift_are_by_output() -> None:
    parity = ParityEntry(
        batch_sizes=(8, 1), atol=1e-5, rtol=0, max_abs={"ctr": 1e-7}, max_rel={"ctr": 0.5}, max_ulp={"ctr": 2}
    )
    drift = DriftEntry(
        batches=2, rows=16, outputs={"ctr": DriftOutputEntry(max_abs=0.25, mean_abs=0.125, pairs=10, pairs_swapped=1)}
    )
    scores = facts_of(manifest_of([], parity=parity, drift=drift))["scores"]
    assert scores["rows"] == [["dense program, batches of 8, 1", "ctr", 1e-7, 0.5, 2]]
    assert scores["drift"] == [["ctr", 0.25, 0.125, "1 of 10", 0]]
    assert "16 rows of 2 batches" in scores["drift_text"]
    without = facts_of(manifest_of([]))["scores"]
    assert (without["rows"], without["drift_text"]) == ([], "Drift was not measured.")
    assert without["texts"] == ["No program was compared with the model."]


def test_versions_say_which_is_current_and_which_is_this_one() -> None:
    listed = [
        Version("b", "2026-11-30T08:00:00.5+00:00", 9, is_current=True, is_there=True, base="a", has_base=False),
        Version("a", "2026-11-29T08:00:00", None, is_current=False, is_there=False),
    ]
    found = facts_of(manifest_of([]), versions=FoundVersions("/pub", "b", listed))["versions"]
    assert found["rows"] == [
        ["b", "2026-11-30T08:00:00Z", "9", "current, delta over a, this package"],
        ["a", "2026-11-29T08:00:00Z", "", "removed"],
    ]
    damaged = facts_of(manifest_of([]), versions=FoundVersions("/pub", "b", [], "current.json is damaged"))["versions"]
    assert damaged["text"] == "/pub. They cannot be read: current.json is damaged"


def test_a_comparison_has_the_tables_that_differ() -> None:
    tables = (TableDiff(name="x", same=5), TableDiff(name="y", changed=2, default_row=True))
    diff = PackageDiff(a="old", b="new", digest_a="1", digest_b="2", tables=tables)
    found = facts_of(manifest_of([]), against=diff)["against"]
    assert [entry["name"] for entry in found["tables"]] == ["y"]
    assert (found["tables"][0]["slots"], found["num_tables"]) == (["another default row"], 2)
    assert found["lines"][:2] == ["A old", "B new"]


def test_the_page_states_the_bound_of_the_sample() -> None:
    assert "At most 1,000 rows of each table" in facts_of(manifest_of([]), sample_rows=1000)["sampled"]
    assert facts_of(manifest_of([]))["sampled"] == "All rows were read."


# ---- the page ----


def test_hostile_strings_stay_within_the_json() -> None:
    source = SourceEntry(path=HOSTILE, format="recis", fingerprint="f", num_files=1, num_bytes=5)
    others = {"notes": (HOSTILE,), "versions": {HOSTILE: HOSTILE}, "run": {"started": HOSTILE}}
    facts = facts_of(manifest_of([HOSTILE], source=source, **others))
    facts["title"] = HOSTILE
    page = read(render_page(facts))
    assert page.tags == read(render_page(facts_of(manifest_of([])))).tags
    assert len(page.scripts) == 2
    assert not re.search("[<>&]", page.scripts[0])
    found = json.loads(page.scripts[0])
    shown = HOSTILE.replace("\u202e", "\\u202e").replace("\n", "\\n")
    assert (found["tables"][0]["name"], found["title"], found["notes"]) == (shown, shown, [shown])


def test_credentials_are_not_in_the_page() -> None:
    page = render_page(facts_of(manifest_of([], notes=("s3://user:geheim@bucket/x was read",))))
    assert b"geheim" not in page


def test_the_policy_allows_the_pages_own_script_and_style_and_no_request() -> None:
    page = read(render_page(facts_of(manifest_of(["a"]))))
    texts = (page.styles[0], page.scripts[1])
    digests = ["sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    directives = dict(part.strip().split(" ", 1) for part in page.policy.split(";"))
    assert directives == {
        "default-src": "'none'",
        "style-src": f"'{digests[0]}'",
        "script-src": f"'{digests[1]}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_the_script_makes_no_markup_of_text_and_names_no_address() -> None:
    page = read(render_page(facts_of(manifest_of(["a"]))))
    script = page.scripts[1]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function\(|setAttribute\(.style", script
    )
    assert re.findall(r"https?://[^\"'\s]+", script + page.styles[0]) == ["http://www.w3.org/2000/svg"]


def test_two_thousand_tables_make_a_small_page_soon() -> None:
    manifest = manifest_of([f"a_table_with_a_name_{number}" for number in range(2000)])
    began = time.perf_counter()
    page = render_page(facts_of(manifest))
    assert time.perf_counter() - began < 5
    assert len(page) < 5_000_000
    assert len(msgspec.json.decode(read(page).scripts[0])["tables"]) == 2000
