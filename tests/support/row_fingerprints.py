"""Row fingerprints by docs/reference/package-format.md alone: with Python's integers and the safetensors package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

_MASK = (1 << 64) - 1


def fingerprint_by_specification(slots: Sequence[bytes]) -> int:
    """Return the fingerprint of one row, from its bytes in each slot without ``id``."""
    state = 0x9E3779B97F4A7C15
    for raw in slots:
        if raw:
            words = [int.from_bytes(raw[begin : begin + 8], "little") for begin in range(0, len(raw), 8)]
            for word in (len(raw), *words):
                state = _mix(state ^ word)
    state = _mix(state ^ state >> 32)
    return state ^ state >> 32


def _mix(value: int) -> int:
    value = value * 0xBF58476D1CE4E5B9 & _MASK
    return (value ^ value >> 32) * 0x94D049BB133111EB & _MASK


def read_fingerprints(package: Path) -> dict[tuple[str, int], tuple[list[int], list[int]]]:
    """Return (table, part) -> the stored fingerprints, and those by the specification. Parts without rows are left out."""
    manifest = json.loads((package / "manifest.json").read_text())
    file_of_key: dict[str, str] = {}
    for entry in manifest["files"]:
        if entry["path"].endswith(".safetensors"):
            with safe_open(package / entry["path"], "np") as shard:
                file_of_key |= dict.fromkeys(shard.keys(), entry["path"])
    found = {}
    for table in manifest["tables"]:
        slots = [slot["name"] for slot in table["kept"] if slot["name"] != "id"]
        for number, part in enumerate(table["parts"]):
            if not part["rows"]:
                assert "row_fingerprints" not in part
                continue
            place = part["row_fingerprints"]
            assert place["file"] == part["file"].removesuffix(".safetensors") + ".row_fingerprints"
            raw = (package / place["file"]).read_bytes()
            assert raw[:16] == b"rowprint\x01" + bytes(7)
            end = place["offset"] + 8 * part["rows"]
            assert place["offset"] % 64 == 0
            assert end <= len(raw)
            stored = [int.from_bytes(raw[at : at + 8], "little") for at in range(place["offset"], end, 8)]
            rows = [_read_rows(package / file_of_key[part["keys"][slot]], part["keys"][slot]) for slot in slots]
            expected = [fingerprint_by_specification([of_slot[row] for of_slot in rows]) for row in range(part["rows"])]
            found[table["name"], number] = stored, expected
    return found


def _read_rows(path: Path, key: str) -> list[bytes]:
    """Return the bytes of each row of a block, by its header."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])[key]
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    num_rows = entry["shape"][0]
    width = (end - begin) // num_rows
    return [raw[at : at + width] for at in range(begin, end, width)] if width else [b""] * num_rows
