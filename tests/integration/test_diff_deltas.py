"""``diff`` of delta packages: the counts of the full packages that they stand for, and nothing is read that no delta touches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_export.cli import main
from dist_export.diff import rows
from dist_export.diff.compare import diff
from dist_export.errors import UserError
from dist_export.package.slot_reader import SlotReader
from tests.integration.test_delta_export import change, export, save, tables_of
from tests.support import dcp_writer
from tests.support.delta_by_hand import edit

Packages = dict[str, Path]


def change_again(tables: Any) -> Any:
    """Return another later state: some rows that ``change`` touches too, some that it does not, ids that come back."""
    found = {}
    for name, (ids, before) in tables.items():
        slots = {slot: its.copy() for slot, its in before.items()}
        slots["embedding"][::50, 1] -= 0.5
        left = np.setdiff1d(np.arange(len(ids)), np.arange(7, len(ids), 90))
        fresh = np.arange(6) + (1 << 41)
        found[name] = (
            np.concatenate([ids[left], fresh]),
            {slot: np.concatenate([its[left], its[20:26]]) for slot, its in slots.items()},
        )
    return found


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """Three states: full packages of each (``f0``, ``f1``, ``f2``), and deltas (``d10`` is state 1 on top of state 0)."""
    folder = tmp_path_factory.mktemp("states")
    states = [tables_of(), change(tables_of()), change_again(tables_of())]
    sources = [save(folder / f"s{number}", state, 2) for number, state in enumerate(states)]
    found = {f"f{number}": export(source, folder / f"f{number}") for number, source in enumerate(sources)}
    for state, base in ((1, 0), (2, 0), (2, 1), (1, 2), (0, 0)):
        name = f"d{state}{base}"
        found[name] = export(sources[state], folder / name, base=str(folder / f"f{base}"), num_shards=2 + state)
    for name, state, below in (("c210", 2, "d10"), ("c110", 1, "d10"), ("c0210", 0, "c210"), ("c1210", 1, "c210")):
        chain = {"base": str(folder / below), "delta_chain": 8}
        found[name] = export(sources[state], folder / name, num_shards=3 - state, **chain)
    return found


def counts(a: Path, b: Path, **settings: Any) -> list[tuple[Any, ...]]:
    found = diff(a, b, **settings)
    return [(its.name, its.same, its.changed, its.new, its.deleted, its.max_abs) for its in found.tables]


PAIRS = ["f0 d10", "d10 f0", "d10 d20", "d20 d10", "d10 d10", "d10 f1", "f1 d10", "d10 f2", "f2 d10"]
PAIRS += ["d10 d21", "d21 d10", "d20 d21", "d12 d21", "d00 f0", "f0 d00", "d00 d10", "d10 d00", "d00 f1", "f1 d00"]
CHAINS = ["c210 d10", "d10 c210", "c210 f0", "f0 c210", "f2 c210", "c0210 c1210", "c1210 f1", "f0 c0210", "c110 c210"]
CHAINS += ["c0210 d10", "c1210 d21", "d20 c0210", "c110 d10", "c210 c110"]


@pytest.mark.parametrize("pair", [*PAIRS, *CHAINS])
def test_a_delta_counts_as_the_full_package_of_its_state(packages: Packages, pair: str) -> None:
    """Over one base, over two, against their base, and against a package of another one."""
    a, b = pair.split()
    expected = counts(packages[f"f{a[1]}"], packages[f"f{b[1]}"])
    assert counts(packages[a], packages[b]) == expected
    assert counts(packages[a], packages[b], max_memory=64 << 10) == expected
    assert diff(packages[a], packages[b]).is_equal == (a[1] == b[1])


@pytest.mark.parametrize("pair", ["d10 d20", "f0 d10", "d10 f0"])
def test_rows_that_no_delta_touches_are_not_read(packages: Packages, pair: str, monkeypatch) -> None:
    a, b = (packages[name] for name in pair.split())
    read: list[int] = []
    base, fill = str(packages["f0"]), SlotReader.fill

    def fill_noted(self: SlotReader, ids: np.ndarray, *more: Any) -> None:
        if base in self._files.url:
            read.append(len(ids))
        fill(self, ids, *more)

    monkeypatch.setattr(SlotReader, "fill", fill_noted)
    monkeypatch.setattr(rows, "is_said", None)
    diff(a, b)
    touched = sum(
        table["rows_out"] + table["delta"]["deleted"]
        for path in {a, b} - {packages["f0"]}
        for table in json.loads((path / "manifest.json").read_text())["tables"]
    )
    assert 0 < sum(read) <= 2 * 2 * touched  # two slots; both sides may ask


def test_a_row_indexed_table_has_numbers_in_its_delta(tmp_path: Path) -> None:
    def state(number: int, rows: int = 400) -> Path:
        weight = torch.arange(rows * 8, dtype=torch.float32).reshape(rows, 8)
        weight[3 : 3 + number] += 0.5
        return dcp_writer.save(tmp_path / f"s{number}", {"sparse_arch.item.weight": weight})

    given: dict[str, Any] = {"treat_as_tables": ["sparse_arch.item.weight"]}
    base = export(state(0), tmp_path / "base", **given)
    one = export(state(2), tmp_path / "one", base=str(base), **given)
    two = export(state(5, 410), tmp_path / "two", base=str(base), **given)
    full = export(tmp_path / "s5", tmp_path / "full", **given)
    for a, b, found in (
        (base, one, (398, 2, 0, 0)),
        (one, two, (397, 3, 10, 0)),
        (two, one, (397, 3, 0, 10)),
        (two, full, (410, 0, 0, 0)),
        (full, one, (397, 3, 0, 10)),
    ):
        assert counts(a, b)[0][1:5] == found


def test_the_command_names_bases_that_were_moved(packages: Packages, tmp_path: Path, capsys) -> None:
    delta, base = (shutil.copytree(packages[name], tmp_path / name / "x") for name in ("d10", "f0"))
    edit(delta, lambda document: document["base"].update(path="/nowhere/base"))
    assert main(["diff", str(packages["d20"]), str(delta)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "needs that base" in message
    assert main(["diff", str(packages["d20"]), str(delta), "--base_b", str(base), "--json"]) == 1
    tables = json.loads(capsys.readouterr().out)["tables"]
    expected = diff(packages["f2"], packages["f1"]).as_json()["tables"]
    assert tables == expected
    assert main(["diff", str(delta), str(packages["f1"]), "--base_a", str(base)]) == 0
    capsys.readouterr()
    assert main(["diff", str(packages["f1"]), str(packages["f2"]), "--base_a", str(base)]) == 2
    assert "is a full package, which needs no base" in capsys.readouterr().err


def test_a_wrong_account_is_no_difference(packages: Packages, tmp_path: Path) -> None:
    delta = Path(shutil.copytree(packages["d20"], tmp_path / "delta"))

    def lie(document: dict[str, Any]) -> None:
        document["tables"][0]["delta"]["same"] -= 1
        document["tables"][0]["delta"]["rows_base"] -= 1

    edit(delta, lie)
    with pytest.raises(UserError, match=r"its manifest says"):
        diff(packages["f1"], delta)
