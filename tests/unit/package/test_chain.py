"""What a chain has of a table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from dist_export.manifest import list_entries
from dist_export.package.chain import Layer, list_links


class Package:
    """A package with some tables, whose readers are named after them."""

    delta_ids = None

    def __init__(self, number: int, *tables: str) -> None:
        self._number = number
        self.manifest = SimpleNamespace(tables=[SimpleNamespace(name=name, number=number) for name in tables])

    def rows_of(self, table: str, *, slot: str) -> str:
        return f"{table} of {self._number}"


@pytest.mark.parametrize(
    ("layers", "links", "base"),
    [
        ([Package(2, "t", "u"), Package(1, "t", "u"), Package(0, "t", "u")], [2, 1], "u of 0"),
        ([Package(2, "t", "u"), Package(1, "t"), Package(0, "t", "u")], [2], None),  # what it was before is gone
        ([Package(2, "t", "u"), Package(1, "t", "u"), Package(0, "t")], [2, 1], None),
        ([Package(1, "u"), Package(0, "u")], [1], "u of 0"),
    ],
)
def test_what_lies_below_a_package_without_the_table_is_not_served(layers, links: list[int], base: str | None) -> None:
    found, below = list_links(cast("list[Layer]", layers), "u", "embedding")
    assert [cast("Any", its.table).number for its in found] == links
    assert cast("Any", below) == base
    entries = list_entries([layer.manifest for layer in layers], "u")
    assert [cast("Any", its).number for its in entries] == links + ([0] if base else [])
