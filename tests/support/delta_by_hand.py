"""Delta packages by hand: the rows that differ, compared with numpy alone, and an ordinary export of a checkpoint of these rows.

The exporter's own deltas cannot be the judge of what reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dist_export.formats.deleted_ids import MAGIC
from dist_export.formats.digests import digest_bytes
from dist_export.manifest import MANIFEST, compute_digest
from tests.support.exports import export
from tests.support.recis_writer import split_table, write_checkpoint

Rows = tuple[np.ndarray, dict[str, np.ndarray]]
"""Ids, and the rows of each slot."""
State = Mapping[str, Rows]
"""Table -> its rows."""
DELETED = "base.deleted_ids"


def write_full(folder: Path, state: State, *, num_shards: int, **settings: Any) -> Path:
    """Export a state as a full package."""
    tables = {name: split_table(*rows, 2) for name, rows in state.items()}
    source = write_checkpoint(folder.with_name(folder.name + "-ckpt"), tables)
    export(
        {
            "ckpt_dir": str(source),
            "export_dir": str(folder),
            "filter_sparse_opt": True,
            "num_shards": num_shards,
            "progress": False,
            **settings,
        }
    )
    return folder


def write_delta(
    folder: Path, base: Path, old: State, new: State, *, num_shards: int, num_lists: int = 2, **settings: Any
) -> Path:
    """Write the delta package of ``new`` on top of ``base``, the full package of ``old``.

    ``num_lists``: into how many sorted lists the deleted ids of a table are dealt.
    """
    parts = {name: _compare(old.get(name), rows) for name, rows in new.items()}
    write_full(folder, {name: rows for name, (rows, _, _) in parts.items()}, num_shards=num_shards, **settings)
    document = json.loads((folder / MANIFEST).read_text())
    content = bytearray(MAGIC)
    for table in document["tables"]:
        _, delta, deleted = parts[table["name"]]
        lists = [np.sort(deleted[number::num_lists]) for number in range(num_lists)] if len(deleted) else []
        entries = []
        for ids in lists:
            content += bytes(-len(content) % 64)
            entries.append({"file": DELETED, "offset": len(content), "ids": len(ids)})
            content += ids.astype("<i8").tobytes()
        table["delta"] = {**delta, "deleted_ids": entries}
        table["rows_in"] += delta["same"]
        table["rows_dropped"] = {**table["rows_dropped"], **({"same": delta["same"]} if delta["same"] else {})}
    if len(content) > len(MAGIC):
        (folder / DELETED).write_bytes(content)
        document["files"].append({"path": DELETED, "num_bytes": len(content), "digest": digest_bytes(bytes(content))})
    document["schema_version"] = 2
    document["base"] = {"path": str(base), "digest": json.loads((base / MANIFEST).read_text())["digest"]}
    return seal_document(folder, document)


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    """Change the manifest of a package, and its digest with it."""
    document = json.loads((folder / MANIFEST).read_text())
    change(document)
    seal_document(folder, document)


def seal_document(folder: Path, document: Any) -> Path:
    """Write a manifest with the right digest."""
    document["digest"] = compute_digest(document)
    (folder / MANIFEST).write_text(json.dumps(document, indent=1) + "\n")
    return folder


def change_rows(rows: Rows, *, changed: int, new: int, deleted: int, seed: int = 0) -> Rows:
    """Return a later state of a table: other rows of some ids, new ids, and ids that are gone."""
    random = np.random.default_rng(seed)
    ids, slots = rows
    order = random.permutation(len(ids))
    later = {name: values.copy() for name, values in slots.items()}
    for values in later.values():
        values[order[:changed]] += 1
    kept = np.sort(order[: len(ids) - deleted])
    fresh = np.setdiff1d(random.integers(-(1 << 63), (1 << 63) - 1, 2 * new + 8, np.int64), ids)[:new]
    return np.concatenate([ids[kept], fresh]), {
        name: np.concatenate([values[kept], random.standard_normal((new, *values.shape[1:])).astype(values.dtype)])
        for name, values in later.items()
    }


def _compare(old: Rows | None, new: Rows) -> tuple[Rows, dict[str, int], np.ndarray]:
    """Return the rows that are changed or new, the account, and the ids that are gone."""
    ids, slots = new
    if old is None:
        return new, {"rows_base": 0, "same": 0, "changed": 0, "new": len(ids), "deleted": 0}, ids[:0]
    place_of = {number: place for place, number in enumerate(old[0].tolist())}
    places = np.array([place_of.get(number, -1) for number in ids.tolist()], np.int64)
    is_known = places >= 0
    is_same = is_known.copy()
    for name, values in slots.items():
        is_same[is_known] &= (
            (old[1][name][places[is_known]] == values[is_known]).reshape(is_known.sum(), -1).all(axis=1)
        )
    deleted = np.setdiff1d(old[0], ids)
    account = {
        "rows_base": len(old[0]),
        "same": int(is_same.sum()),
        "changed": int((is_known & ~is_same).sum()),
        "new": int((~is_known).sum()),
        "deleted": len(deleted),
    }
    return (ids[~is_same], {name: values[~is_same] for name, values in slots.items()}), account, deleted
