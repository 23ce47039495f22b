"""Reads packages by their manifests and raw bytes alone, and puts a delta on top of its base as the format says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

Rows = dict[str, dict[int, tuple[bytes, ...]]]
"""Table -> id -> the bytes of its slots, in the order of the manifest."""


def read_package(package: Path) -> Rows:
    """Return the rows of a package's own shards. Row-indexed tables have row numbers for ids."""
    manifest = json.loads((package / "manifest.json").read_text())
    found: Rows = {}
    for table in manifest["tables"]:
        rows = found.setdefault(table["name"], {})
        names = [slot["name"] for slot in table["kept"] if slot["name"] != "id"]
        for part in table["parts"]:
            blocks = [_read_block(package / part["file"], part["keys"][name]) for name in names]
            if table.get("is_hashed", True):
                ids = np.frombuffer(b"".join(_read_block(package / part["file"], part["keys"]["id"])), "<i8").tolist()
            else:
                ids = range(part["first_row"], part["first_row"] + part["rows"])
            assert len(ids) == part["rows"]
            assert not rows.keys() & set(ids)
            rows.update(zip(ids, zip(*blocks, strict=True), strict=True))
    return found


def _read_block(file: Path, key: str) -> list[bytes]:
    """Return the bytes of each row of a block of a safetensors file."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        entry = json.loads(opened.read(size))[key]
        begin, end = entry["data_offsets"]
        opened.seek(8 + size + begin)
        data = opened.read(end - begin)
    count = entry["shape"][0]
    width = len(data) // count if count else 0
    return [data[row * width : (row + 1) * width] for row in range(count)]


def read_deleted(delta: Path) -> dict[str, set[int]]:
    """Return table -> the deleted ids of a delta."""
    manifest = json.loads((delta / "manifest.json").read_text())
    found: dict[str, set[int]] = {}
    for table in manifest["tables"]:
        its = found.setdefault(table["name"], set())
        for entry in table["delta"]["deleted_ids"]:
            raw = (delta / entry["file"]).read_bytes()
            assert raw[:8] == b"deleted\0"
            ids = np.frombuffer(raw, "<i8", entry["ids"], entry["offset"])
            assert (ids[1:] > ids[:-1]).all()
            its |= set(ids.tolist())
    return found


def put_together(base: Path, delta: Path) -> Rows:
    """Return what serving gets of a delta on top of its base. Each account is counted anew."""
    return put_chain_together([base, delta])


def put_chain_together(links: list[Path]) -> Rows:
    """Return what serving gets of a chain of deltas, the full package first. Each account is counted anew."""
    rows = read_package(links[0])
    for delta in links[1:]:
        own, deleted = read_package(delta), read_deleted(delta)
        for table in json.loads((delta / "manifest.json").read_text())["tables"]:
            name, account = table["name"], table["delta"]
            assert account["rows_base"] == len(rows[name])
            assert account["changed"] == len(rows[name].keys() & own[name].keys())
            assert account["new"] == len(own[name].keys() - rows[name].keys())
            assert all(rows[name][its] != own[name][its] for its in rows[name].keys() & own[name].keys())
            assert account["deleted"] == len(deleted[name])
            assert deleted[name] <= rows[name].keys() - own[name].keys()
            assert account["same"] == account["rows_base"] - account["changed"] - account["deleted"]
            assert table["rows_out"] == len(own[name])
            for its in deleted[name]:
                del rows[name][its]
            rows[name] |= own[name]
    return rows


def manifest_of(package: Path) -> Any:
    """Return the manifest as plain values."""
    return json.loads((package / "manifest.json").read_text())
