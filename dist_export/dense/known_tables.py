"""The tables of a checkpoint by name, those that the settings leave out included."""

from __future__ import annotations

from collections.abc import Mapping

from dist_export.errors import ModelError


class KnownTables:
    """Names of tables, as the source has them."""

    def __init__(self, exported: Mapping[str, int], left_out: Mapping[str, str]) -> None:
        """Take the places of exported tables, and the settings that leave others out, by name."""
        self._numbers = dict(exported)
        self._left_out = dict(left_out)

    def has_table(self, table: str) -> bool:
        """Whether the checkpoint has this table. ModelError where it has, but the settings leave it out."""
        if table in self._left_out and table not in self._numbers:
            raise ModelError(
                f"the model looks rows of table {table!r} up, which {self._left_out[table]} leaves out of the package; export "
                "it too, or export a model that does not use it"
            )
        return table in self._numbers

    def table_names(self) -> list[str]:
        """Return the names of all tables, those that are left out as well."""
        return [*self._numbers, *(name for name in self._left_out if name not in self._numbers)]
