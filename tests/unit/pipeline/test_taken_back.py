"""Which dumps over a base would take back what a later package has."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from dist_export.manifest import BaseEntry, DeltaEntry, Manifest
from dist_export.pipeline.taken_back import Dumps, Later, find_taken_back
from tests.unit.delta.test_carried_tables import entry, manifest
from tests.unit.delta.test_signature import dense


def package(digest: str, step: int | None, *, base: str = "", dense_step: int | None = None, **more: Any) -> Manifest:
    """Return a package of rows of ``step``; with ``base`` a delta on that digest, by default with a changed row.

    ``dense_step``: it has a dense part, of this step; ``steps``: it is of dumps; ``counts``: the account against the base.
    """
    counts = {"rows_base": 10, "same": 9, "changed": 1, "new": 0, "deleted": 0, **more.pop("counts", {})}
    made = manifest(entry(**({"delta": DeltaEntry(**counts)} if base else {})))
    source: dict[str, Any] = {"steps": more.pop("steps", msgspec.UNSET)}
    source["step"] = msgspec.UNSET if step is None else step
    if dense_step is not None and dense_step != step:
        source |= {"step": dense_step, "rows_step": step}
    fields: dict[str, Any] = {"source": msgspec.structs.replace(made.source, **source), "digest": digest}
    if base:
        has_dense = more.pop("has_dense", msgspec.UNSET)
        fields["base"] = BaseEntry(path="/base", digest=base, has_dense=has_dense)
    if dense_step is not None or more.pop("is_dense", False):
        fields["dense"] = dense([], [])
    return msgspec.structs.replace(made, **fields)


LISTED = (90, 110, 120, 130, 140, 150, 160)
BASE = package("b", 100)
OLD = package("o", 90)
LATE = package("l", 120)


@pytest.mark.parametrize(
    ("later", "text"),
    [
        (Later("versions:/p", BASE), ""),
        (Later("versions:/p", package("f", 100)), ""),
        (Later("versions:/p", package("f", 150)), "rows of step 150, and the base of step 100, of which no dump tells"),
        (Later("versions:/p", package("d", 150, base="b")), ""),
        (Later("versions:/p", package("d", None, base="b")), "of an unknown step, and the base of step 100, so nobody"),
        (Later("versions:/p", package("d", None, base="b", counts={"same": 10, "changed": 0})), ""),
        (Later("versions:/p", package("d", 150, base="b", counts={"same": 8, "deleted": 1})), "deletes 1 row of the base"),
        (Later("versions:/p", package("d", 170, base="b")), "the last dump that is taken is of step 160"),
        (Later("versions:/p", package("d", 105, base="b")), "no dump between them is taken"),
        (Later("versions:/p", package("d", 150, base="o"), OLD), "of which no dump tells all that changed"),
        (Later("versions:/p", package("d", 150, base="b", steps=(110, 150))), ""),
        (Later("versions:/p", package("d", 150, base="b", steps=(110, 145))), "the dump of step 145, which is not among"),
        (Later("versions:/p", package("d", 150, base="o", steps=(95, 110, 150)), OLD), ""),
        (Later("versions:/p", package("d", 150, base="l", steps=(130, 150)), LATE), "is over another base of a later or"),
        (Later("versions:/p", package("d", 150, base="x", steps=(130, 150))), "is over another base of a later or an unknown"),
    ],
)  # fmt: skip
def test_rows(later: Later, text: str) -> None:
    found = find_taken_back(Dumps(LISTED, 100, None, is_stated=False), BASE, later)
    assert text in found
    assert bool(found) == bool(text)


@pytest.mark.parametrize(
    ("dumps", "text"),
    [
        (
            Dumps((110, 150, 160), 100, None, is_stated=False),
            "the first dump is of step 110, so an earlier one may be gone",
        ),
        (Dumps((110, 150, 160), 100, None, is_stated=True), ""),
        (Dumps((100, 150, 160), 100, None, is_stated=False), ""),
        (Dumps(LISTED, 120, None, is_stated=True), "no dump between them is taken"),
        (Dumps(LISTED, 100, 140, is_stated=False), "the last dump that is taken is of step 140"),
        (Dumps((90, 160), 100, None, is_stated=True), "no dump between them is taken"),
    ],
)
def test_the_dumps_that_are_taken(dumps: Dumps, text: str) -> None:
    found = find_taken_back(dumps, BASE, Later("/delta", package("d", 150, base="b")))
    assert text in found
    assert bool(found) == bool(text)
    assert not text or "compact /delta OUT`, and give base: OUT" in found


@pytest.mark.parametrize(
    ("base_step", "later", "text"),
    [
        (100, package("d", 150, base="b", dense_step=150), "has a dense part of step 150, and that of the base, .* of step 100"),
        (100, package("d", 100, base="b", dense_step=150), "has a dense part of step 150"),
        (150, package("d", 100, base="b", dense_step=150), "^$"),
        (None, package("d", 100, base="b", dense_step=150), "is of an unknown step"),
        (100, package("d", 150, base="b", has_dense=True, is_dense=True, steps=(150,)), "^$"),
        (100, package("d", 150, base="o", has_dense=True, is_dense=True, steps=(150,)), "has a dense part of an unknown step"),
        (100, package("d", 150, base="b"), "^$"),
    ],
)  # fmt: skip
def test_the_dense_part(base_step: int | None, later: Manifest, text: str) -> None:
    base = package("b", 100, dense_step=base_step, is_dense=True)
    if base_step is None:
        unknown = msgspec.structs.replace(base.source, step=msgspec.UNSET, rows_step=100)
        base = msgspec.structs.replace(base, source=unknown)
    assert re.search(
        text, find_taken_back(Dumps(LISTED, 100, None, is_stated=False), base, Later("versions:/p", later))
    )
