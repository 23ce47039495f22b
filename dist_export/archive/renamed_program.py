"""A score program with other names of tables in its lookups. Nothing else of it changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from dist_export.archive.lookup_operator import rename_lookups
from dist_export.archive.pt2 import pack_program
from dist_export.archive.safe_load import check_archive, load_program


def rename_tables(data: bytes, names: Mapping[str, str], *, archive_format: Literal["pt2", "legacy"]) -> bytes:
    """Return the bytes of a score program whose lookups have the new names of tables.

    Args:
        data: the program, which is checked before anything of it is unpickled.
        names: every table that it may look up -> its new name.
        archive_format: of the result.

    Raises:
        PackageError: ``data`` is not such a program.
    """
    program = load_program(data, tables=set(names))
    rename_lookups(program.graph_module, names)
    packed = pack_program(program, archive_format=archive_format)
    check_archive(packed, tables=set(names.values()))
    return packed
