"""Hold the written rows of a sample against the source's own, in arithmetic that shares nothing with how they were written.

A cast row must be as near as its dtype allows; any other row must be the source's, byte by byte. A table must have the name that
``rename_tables`` gives it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping

import numpy as np
import torch

from dist_export.dense.found_rows import FoundRows
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.sample_rows import SampleRows
from dist_export.errors import ParityError
from dist_export.formats.dtypes import DTYPES

NO_PACKAGE = "No manifest was written, so there is no package"

_HALF_STEPS = {
    torch.float64: (-53, -1075),
    torch.float32: (-24, -150),
    torch.float16: (-11, -25),
    torch.bfloat16: (-8, -134),
}
"""Half a unit in the last place of a dtype: relative to the value, and least of all; as exponents of 2."""

_INT8_LIMIT = 1.7e38


def check_rows(source: RowFinder, written: RowFinder) -> None:
    """Compare every row that the sample has looked up on both sides. Any rank, for its own lookups.

    Args:
        source: of the checkpoint, as it looked up the sample's rows.
        written: of the shards, as it looked up the same.

    Raises:
        ParityError: a row is lost, is there without a source, or has other values than a cast explains.
    """
    for table in source.looked_up():
        before, now = source.known(table), written.known(table) if written.has_table(table) else None
        if before is None or now is None:
            continue
        common = np.intersect1d(before.ids, now.ids, assume_unique=True)
        _check_table(table, source, written, before.of(common), now.of(common))


def check_whole_rows(source: RowFinder, written: RowFinder, sample: SampleRows) -> None:
    """Compare in the same way the tables that the sample has read whole, a piece at a time. ParityError. Any rank."""
    for whole in sample.whole.values():
        if written.has_table(whole.table):
            for ids in source.pieces(whole.table, whole.num_rows):
                _check_table(
                    whole.table, source, written, source.scan(whole.table, ids), written.scan(whole.table, ids)
                )


def check_names(names: Mapping[str, str], rename: Mapping[str, str]) -> None:
    """Compare the names of the tables in the package with what ``rename_tables`` says. Any rank, for itself.

    Args:
        names: table of the checkpoint -> of the package.
        rename: the setting: pattern -> template, the first that matches gives the name.

    Raises:
        ParityError: a table has another name.
    """
    for name, written in names.items():
        expected = expected_name(name, rename)
        if written != expected:
            raise ParityError(
                f"table {name!r} is written as {written!r}, but rename_tables makes it {expected!r}. {NO_PACKAGE}"
            )


def expected_name(name: str, rename: Mapping[str, str]) -> str:
    """Return what ``rename_tables`` makes of a name. ``{0}`` is what the first ``*`` or ``?`` of the pattern matched."""
    for pattern, template in rename.items():
        pieces = match_name(pattern, name)
        if pieces is not None:
            return re.sub(r"\{(\d+)\}", lambda found, its=pieces: its[int(found[1])], template)  # type: ignore[misc]
    return name


def match_name(pattern: str, name: str) -> list[str] | None:
    """Return what the wildcards match, each as much as it can, None where the pattern does not match the whole name."""
    if not pattern:
        return None if name else []
    if pattern[0] == "*":
        for length in range(len(name), -1, -1):
            rest = match_name(pattern[1:], name[length:])
            if rest is not None:
                return [name[:length], *rest]
        return None
    end = pattern.find("]", 2) if pattern[0] == "[" else 0
    if not name or not fnmatch.fnmatchcase(name[0], pattern[: max(end, 0) + 1]):
        return None
    rest = match_name(pattern[max(end, 0) + 1 :], name[1:])
    return None if rest is None else [*([name[0]] if pattern[0] == "?" else []), *rest]


def _check_table(table: str, source: RowFinder, written: RowFinder, before: FoundRows, now: FoundRows) -> None:
    lost = before.has_row & ~now.has_row & ~before.is_pruned
    extra = now.has_row & ~before.has_row
    for flags, what in ((lost, "is in the checkpoint, but not in the shards"), (extra, "is in the shards alone")):
        if flags.any():
            number = int(before.ids[flags][0])
            raise ParityError(f"table {table!r}: the id {number} of the sample {what}. {NO_PACKAGE}")
    both = before.has_row & now.has_row
    if not both.any():
        return
    slot, stored = source.stored_embedding(table), written.stored_embedding(table)
    # of an id with several rows, the one that was chosen; which one that is, is no question of values
    rows = np.where(before.is_kept[both, None], before.kept[both], before.rows[both])
    if slot.dtype == stored.dtype and slot.inner_shape == stored.inner_shape:
        is_other = (rows != now.rows[both]).any(axis=1)
        why = "has other bytes in the shards than in the checkpoint"
    else:
        values = read_values(rows, slot.dtype)
        is_int8 = now.rows.shape[1] == values.shape[1] + 8 and DTYPES[stored.dtype].torch == "uint8"
        is_other = (is_far_int8 if is_int8 else is_far)(values, now.rows[both], stored.dtype)
        why = "has values in the shards that the cast of the checkpoint's does not explain"
    if is_other.any():
        raise ParityError(
            f"table {table!r}: the id {int(before.ids[both][is_other][0])} of the sample {why}. {NO_PACKAGE}"
        )


def read_values(rows: np.ndarray, dtype: int) -> torch.Tensor:
    """Return rows (uint8, (n, bytes)) as float64, read by torch."""
    kind = getattr(torch, DTYPES[dtype].torch)
    return torch.from_numpy(np.ascontiguousarray(rows)).view(kind).double()


def is_far(values: torch.Tensor, stored: np.ndarray, dtype: int) -> np.ndarray:
    """Return which rows (bool, (n,)) have a value that is further away than the nearest that the dtype has."""
    kind = getattr(torch, DTYPES[dtype].torch)
    found = read_values(stored, dtype)
    relative, least = _HALF_STEPS[kind]
    limit = torch.finfo(kind).max
    clamped = values.clamp(-limit, limit)
    is_near = (found - clamped).abs() <= torch.maximum(clamped.abs() * 2.0**relative, torch.tensor(2.0**least))
    return (~(is_near | (values.isnan() & found.isnan()))).any(dim=1).numpy()


def is_far_int8(values: torch.Tensor, stored: np.ndarray, _: int) -> np.ndarray:
    """Return the same for rows of ``dim`` bytes with scale and bias behind them: a value is ``byte * scale + bias``."""
    dim = values.shape[1]
    tail = torch.from_numpy(np.ascontiguousarray(stored[:, dim:])).view(torch.float32).double()
    found = torch.from_numpy(np.ascontiguousarray(stored[:, :dim])).double() * tail[:, :1] + tail[:, 1:]
    clamped = values.nan_to_num(0.0).clamp(-_INT8_LIMIT, _INT8_LIMIT)
    spread = clamped.amax(dim=1, keepdim=True) - clamped.amin(dim=1, keepdim=True)
    largest = clamped.abs().amax(dim=1, keepdim=True)
    # half a step; what the 1e-8 of the format takes from a narrow row; and float32's own rounding
    allowed = spread / 510 + spread * 1e-8 / (spread + 1e-8) + largest * 2.0**-21
    return ((found - clamped).abs() > allowed).any(dim=1).numpy()
