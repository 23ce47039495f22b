"""``verify`` of delta packages finds each kind of wrong account; ``inspect`` shows them; nothing reads their rows as a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_export.cli import main
from dist_export.errors import CheckpointError
from dist_export.formats.tuning import Tuning
from dist_export.inspect.describe import describe, render
from dist_export.verify import delta as delta_check
from dist_export.verify.report import Report
from dist_export.verify.verify import verify
from tests.integration.test_delta_packages import NEW, OLD, Deltas, swap_two_ids
from tests.integration.test_package import restate
from tests.support.delta_by_hand import DELETED, change_rows, edit, write_delta, write_full
from tests.support.exports import export
from tests.support.recis_writer import make_rows

MANIFEST = "manifest.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Deltas:
    folder = tmp_path_factory.mktemp("deltas")
    base = write_full(folder / "base", OLD, num_shards=3)
    return Deltas(base, write_delta(folder / "delta", base, OLD, NEW, num_shards=2), folder / "none")


@pytest.fixture
def delta(written: Deltas, tmp_path: Path) -> Path:
    """A copy to break. Its base is found at the path in its manifest."""
    return Path(shutil.copytree(written.delta, tmp_path / "delta"))


def told(report: Report) -> set[tuple[str, str]]:
    return {(finding.file, finding.check) for finding in report.found}


def account(table: str, **changes: Any) -> Callable[[Path], None]:
    """Change the account of a table in a manifest."""

    def change(document: Any) -> None:
        next(entry for entry in document["tables"] if entry["name"] == table)["delta"].update(changes)

    return lambda package: edit(package, change)


@pytest.mark.parametrize("piece", [1 << 20, 7])
def test_a_sound_delta_is_sound(piece: int, written: Deltas) -> None:
    report = verify(str(written.delta), threads=2, tuning=Tuning(compared_ids=piece))
    assert report.findings == []
    assert report.checked[-1] == (
        f"delta of {written.base}: 580 same, 40 changed, 55 new, 40 deleted by the ids of both; the base has the right digest, "
        "and is verified by itself"
    )


def test_a_delta_without_changes_is_sound(written: Deltas, tmp_path: Path) -> None:
    delta = write_delta(tmp_path / "delta", written.base, OLD, OLD, num_shards=2)
    assert verify(str(delta)).findings == []


@pytest.mark.parametrize(
    ("change", "check", "text"),
    [
        (account("t", same=429), "account", "429 same, 30 changed and 40 deleted rows are 499, and the base has 500"),
        (account("t", new=26), "account", "30 changed and 26 new rows are 56, and the delta has 55"),
        (
            account("t", same=430, changed=31, new=24, rows_base=501),
            "account",
            "the base has 500 rows, and the account says 501",
        ),
        (account("t", same=431, deleted=39), "account", "431 rows are the same, and 430 were left to the base"),
        (account("t", same=431, deleted=39), "account", "39 ids are deleted, and its files have 40"),
        (
            account("u", rows_base=121, same=111),
            "account",
            "the base has 120 rows, and the account says 121",
        ),
    ],
)
def test_an_account_that_does_not_add_up_is_found(change, check: str, text: str, delta: Path) -> None:
    change(delta)
    report = verify(str(delta))
    assert (MANIFEST, check) in told(report)
    assert any(text in finding for finding in report.findings)


def test_rows_that_are_called_new_and_are_in_the_base_are_found(written: Deltas, tmp_path: Path) -> None:
    """The sums of this account are right: the ids alone tell."""
    later = change_rows(OLD["t"], changed=30, new=25, deleted=40)
    delta = write_delta(tmp_path / "delta", written.base, OLD, {**OLD, "t": later}, num_shards=2)
    account("t", changed=29, new=26, same=431)(delta)

    def restate_same(document: Any) -> None:
        table = next(entry for entry in document["tables"] if entry["name"] == "t")
        table["rows_dropped"]["same"], table["rows_in"] = 431, table["rows_in"] + 1

    edit(delta, restate_same)
    report = verify(str(delta))
    assert told(report) == {(MANIFEST, "delta")}
    assert (
        "table 't': 30 of its 55 rows are in the base, and 25 are not; the account says 29 changed and 26 new"
        in str(report.findings)
    )


def write_lists(delta: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the deleted ids of table t, which stay in two sorted lists, and their digest with them."""
    document = json.loads((delta / MANIFEST).read_text())
    entries = next(entry for entry in document["tables"] if entry["name"] == "t")["delta"]["deleted_ids"]
    content = bytearray((delta / DELETED).read_bytes())
    ids = change(np.concatenate([np.frombuffer(content, "<i8", its["ids"], its["offset"]) for its in entries]))
    for its in entries:
        mine, ids = np.sort(ids[: its["ids"]]), ids[its["ids"] :]
        content[its["offset"] : its["offset"] + 8 * len(mine)] = mine.astype("<i8").tobytes()
    (delta / DELETED).write_bytes(content)
    restate(delta, DELETED)


def replace_first(new: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda ids: np.concatenate([[new], ids[1:]])


def kept_id() -> int:
    """Return an id that has a row in the base and in the delta: one that changed."""
    ids, slots = OLD["t"]
    later = dict(zip(NEW["t"][0].tolist(), NEW["t"][1]["embedding"].tolist(), strict=True))
    rows = zip(ids.tolist(), slots["embedding"].tolist(), strict=True)
    return next(number for number, row in rows if number in later and later[number] != row)


@pytest.mark.parametrize(
    ("new", "check", "text"),
    [
        (lambda: 12345, (MANIFEST, "delta"), "1 of 40 deleted ids are not in the base"),
        (kept_id, (MANIFEST, "delta"), "1 of 40 deleted ids have a row in the delta"),
    ],
)
def test_deleted_ids_that_are_wrong_are_found(new, check: tuple[str, str], text: str, delta: Path) -> None:
    write_lists(delta, replace_first(new()))
    report = verify(str(delta))
    assert told(report) == {check}
    assert text in str(report.findings)


def test_an_id_in_two_lists_is_found(delta: Path) -> None:
    write_lists(delta, lambda ids: np.concatenate([[ids[-1]], ids[1:]]))
    report = verify(str(delta))
    assert told(report) == {(DELETED, "deleted_ids")}
    assert "1 deleted ids of table 't' are there twice" in str(report.findings)


def test_deleted_ids_that_are_not_sorted_are_found(delta: Path) -> None:
    content = bytearray((delta / DELETED).read_bytes())
    swap_two_ids(content, 64)
    (delta / DELETED).write_bytes(content)
    restate(delta, DELETED)
    report = verify(str(delta))
    assert told(report) == {(DELETED, "deleted_ids")}
    assert "its ids are not in ascending order" in str(report.findings)


def test_a_changed_bit_of_the_deleted_ids_is_found_by_the_digest(delta: Path) -> None:
    content = bytearray((delta / DELETED).read_bytes())
    content[64] ^= 1
    (delta / DELETED).write_bytes(content)
    assert (DELETED, "digest") in told(verify(str(delta)))


@pytest.mark.parametrize("is_whole_list", [False, True])
def test_a_list_that_the_manifest_cuts_is_found(is_whole_list: bool, delta: Path) -> None:
    """Else a deleted id would have its row back, with an account that adds up."""

    def cut(document: Any) -> None:
        for table in document["tables"]:
            its = table["delta"]
            lists = its["deleted_ids"]
            if lists:
                lost = lists[-1]["ids"] if is_whole_list else 1
                lists[-1]["ids"] -= lost
                its["deleted"], its["same"] = its["deleted"] - lost, its["same"] + lost
                table["rows_in"], table["rows_dropped"]["same"] = table["rows_in"] + lost, its["same"]
                its["deleted_ids"] = [entry for entry in lists if entry["ids"]]

    edit(delta, cut)
    assert (DELETED, "deleted_ids") in told(verify(str(delta)))


def test_deleted_ids_that_are_gone_are_one_finding(delta: Path) -> None:
    (delta / DELETED).unlink()
    assert told(verify(str(delta))) == {(DELETED, "size")}


def test_deleted_ids_that_no_file_entry_names_are_found(delta: Path) -> None:
    def forget(document: Any) -> None:
        document["files"] = [file for file in document["files"] if file["path"] != DELETED]

    edit(delta, forget)
    report = verify(str(delta))
    assert told(report) == {(MANIFEST, "manifest")}
    assert f"does not name {DELETED}, so nothing vouches for it" in str(report.findings)


def test_a_deleted_row_of_a_row_indexed_table_is_found() -> None:
    from dist_export.formats.delta_entries import DeltaEntry
    from dist_export.manifest import TableEntry

    common: dict[str, Any] = {
        "name": "t",
        "rows_in": 0,
        "rows_dropped": {},
        "misplaced": 0,
        "duplicates": 0,
        "id_sum": "",
        "kept": (),
        "dropped": (),
        "parts": (),
    }
    below = TableEntry(**common, rows_out=1, is_hashed=False)
    entry = DeltaEntry(rows_base=1, same=0, changed=0, new=0, deleted=1)
    faults = delta_check._find_faults(TableEntry(**common, rows_out=0, delta=entry), below, has_base=True)
    assert "1 rows are deleted, which a row-indexed table of the base does not have" in faults


def test_a_base_that_is_not_there_is_a_finding_and_the_rest_is_checked(delta: Path) -> None:
    edit(delta, lambda document: document["base"].update(path="/nowhere/base"))
    report = verify(str(delta))
    assert told(report) == {(MANIFEST, "base")}
    assert "/nowhere/base" in str(report.findings)


def test_a_base_may_be_given_to_verify(delta: Path, written: Deltas, capsys: pytest.CaptureFixture[str]) -> None:
    edit(delta, lambda document: document["base"].update(path="/nowhere/base"))
    assert main(["verify", str(delta), "--base", str(written.base)]) == 0
    capsys.readouterr()
    assert main(["verify", str(written.base), "--base", str(written.base)]) == 2
    assert "is no delta package, so it has no base; leave base out" in capsys.readouterr().err


@pytest.mark.parametrize("base", ["delta", "full", "none", "damaged"])
def test_a_wrong_base_is_the_same_mistake_of_the_user_for_all_commands(
    base: str, delta: Path, written: Deltas, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and exit code 2. A base that is not there, and was not given, is what the package lacks."""
    write_full(tmp_path / "full", NEW, num_shards=1)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / MANIFEST).write_text("{")
    given, other, out = str(tmp_path / base), str(written.base), str(tmp_path / "out")
    commands = {
        "verify": [str(delta), "--base", given],
        "serve": [str(delta), "--base", given, "--port", "0"],
        "score": [str(delta), "--base", given, "--input", "in.npz", "--output", out],
        "report": [str(delta), "--base", given, "--out", f"{out}.html"],
        "compact": [str(delta), out, "--base", given],
        "diff": [str(delta), other, "--base_a", given],
    }
    for command, arguments in commands.items():
        capsys.readouterr()
        assert main([command, *arguments]) == 2, command
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"dist_export: {delta} is a delta package of {other}, and needs that base"), command
        assert line.endswith("To read the delta, give the right base"), command


def test_a_damaged_row_index_of_the_base_is_a_finding(written: Deltas, tmp_path: Path) -> None:
    base = Path(shutil.copytree(written.base, tmp_path / "base"))
    delta = Path(shutil.copytree(written.delta, tmp_path / "delta"))
    for index in base.glob("*.row_index"):
        index.write_bytes(b"damaged!" + index.read_bytes()[8:])
    report = verify(str(delta), base=str(base))
    assert told(report) == {(MANIFEST, "delta")}
    assert "its ids cannot be looked up in the base" in str(report.findings)


# ---- inspect, sources, diff ----


def test_inspect_shows_the_base_and_the_account(written: Deltas) -> None:
    found = describe(str(written.delta))
    assert found["kind"] == "delta package"
    assert found["base"]["path"] == str(written.base)
    table = next(table for table in found["tables"] if table["name"] == "t")
    assert table["delta"] == {"rows_base": 500, "same": 430, "changed": 30, "new": 25, "deleted": 40}
    text = "\n".join(render(found))
    assert f"base       {written.base} (digest xxh3:" in text
    assert "of 500 rows of the base: 430 same, 30 changed, 40 deleted; 25 new" in text


def test_inspect_of_a_full_package_says_nothing_of_deltas(written: Deltas) -> None:
    found = describe(str(written.base))
    assert found["kind"] == "package"
    assert "base" not in found
    assert all("delta" not in table for table in found["tables"])


def test_inspect_needs_no_base(delta: Path) -> None:
    edit(delta, lambda document: document["base"].update(path="/nowhere/base"))
    found = describe(str(delta))
    assert found["base"]["path"] == "/nowhere/base"
    assert "chain" not in found
    assert any("lack       it" in line and "/nowhere/base" in line for line in render(found))


@pytest.mark.parametrize("settings", [{}, {"format": "recis"}, {"format": "safetensors", "treat_as_tables": ["t*"]}])
def test_a_delta_is_no_source_of_an_export(settings: dict[str, Any], delta: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"is a delta package of .*, whose rows alone are not the model. Export from"
    ):
        export({"ckpt_dir": str(delta), "export_dir": str(tmp_path / "out"), **settings})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["init", "plan"])
def test_a_delta_is_no_source_of_a_plan(command: str, delta: Path, tmp_path: Path, capsys) -> None:
    more = ["--ckpt_dir", str(delta), "--export_dir", str(tmp_path / "out")] if command == "plan" else [str(delta)]
    assert main([command, *more]) == 2
    assert "whose rows alone are not the model" in capsys.readouterr().err


@pytest.mark.parametrize("is_first", [True, False])
def test_a_delta_without_its_base_is_not_compared(is_first: bool, delta: Path, written: Deltas, capsys) -> None:
    edit(delta, lambda document: document["base"].update(path="/nowhere/base"))
    paths = [str(delta), str(written.base)]
    assert main(["diff", *(paths if is_first else paths[::-1])]) == 2
    assert "is a delta package of /nowhere/base, and needs that base" in capsys.readouterr().err


def test_a_table_that_the_base_lacks_is_verified(tmp_path: Path) -> None:
    base = write_full(tmp_path / "base", {"kept": OLD["kept"]}, num_shards=1)
    new = {"kept": OLD["kept"], "added": make_rows(30, 4, seed=4)}
    delta = write_delta(tmp_path / "delta", base, {"kept": OLD["kept"]}, new, num_shards=1)
    assert verify(str(delta)).findings == []


def test_a_report_says_that_its_rows_are_those_of_a_delta(written: Deltas, tmp_path: Path) -> None:
    for package, is_told in ((written.delta, True), (written.base, False)):
        assert main(["report", str(package), "--out", str(tmp_path / "report.html")]) == 0
        page = (tmp_path / "report.html").read_text()
        assert ("without the base" in page) == is_told
        assert ("Delta package of" in page) == is_told


def test_a_delta_without_its_manifest_is_not_sound(delta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was checked as a directory of RecIS, and ended well."""
    (delta / MANIFEST).unlink()
    report = verify(str(delta))
    assert (report.kind, told(report)) == ("package without manifest", {(MANIFEST, "manifest")})
    assert "nor whether it is a delta. Copy the package again" in report.findings[0]
    assert main(["verify", str(delta)]) == 1
    assert "unsound: package without manifest with 1 finding" in capsys.readouterr().out


def test_a_delta_without_its_manifest_is_no_source(delta: Path, tmp_path: Path) -> None:
    """Its rows alone were exported as the model."""
    (delta / MANIFEST).unlink()
    settings = {"ckpt_dir": str(delta), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True}
    with pytest.raises(CheckpointError, match=r"\.deleted_ids and no .*: this is a delta package without its manifest"):
        export(settings)
    for path in delta.glob("*.deleted_ids"):
        path.unlink()
    assert any("if it is a package that lost it, it may be a delta" in note for note in export(settings).notes)
