"""Reads tables whose rows go by number back from a package, by ``manifest.json`` and the safetensors library alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open


def read_row_tables(package: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Return table and slot -> all rows, once the parts are known to lie where the manifest says, under the right keys."""
    manifest = json.loads((package / "manifest.json").read_text())
    found: dict[tuple[str, str], list[torch.Tensor]] = {}
    for table in manifest["tables"]:
        assert table["is_hashed"] is False
        assert table["rows_in"] == table["rows_out"] == sum(part["rows"] for part in table["parts"])
        next_row = 0
        for number, part in enumerate(table["parts"]):
            assert part["first_row"] == next_row
            next_row += part["rows"]
            assert part["keys"]["embedding"] == f"{table['name']}/part_{number}_{len(table['parts'])}"
            with safe_open(package / part["file"], "pt") as file:
                for slot, key in part["keys"].items():
                    rows = file.get_tensor(key)
                    assert len(rows) == part["rows"]
                    found.setdefault((table["name"], slot), []).append(rows)
    return {key: torch.cat(rows) for key, rows in found.items()}
