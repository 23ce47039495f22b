"""The sizes of pieces that are passed to an export and to ``verify`` reach all code that cuts by them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from dist_export.formats.tuning import Tuning
from dist_export.verify.verify import verify
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.sparse_cases import export


class Recorded(Tuning):
    """Remembers which of its numbers are read."""

    read: ClassVar[set[str]] = set()

    def __getattribute__(self, name: str) -> Any:
        type(self).read.add(name)
        return super().__getattribute__(name)


OF_VERIFY = {"verified_ids", "compared_ids", "value_bytes", "scan_bytes", "json_bytes", "verified_fingerprints"}
OF_BOTH = {"run_rows", "held_ids", "chunk_bytes", "fingerprint_bytes", "fingerprint_rows"}


def test_every_number_is_read_from_what_is_passed(tmp_path: Path) -> None:
    """A package, and a delta on it, whose rows are pruned and cast, are exported and verified."""
    source = write_checkpoint(tmp_path / "in", make_tables({"a": 90, "b": 20}, 2))
    later = write_checkpoint(tmp_path / "later", make_tables({"a": 80, "b": 20}, 2, seed=1))
    tuning, settings = Recorded(), {"num_shards": 3, "dtype": {"a": "float16"}, "row_fingerprints": True}
    settings["prune"] = [{"tables": "b", "norm_at_most": 0}]
    Recorded.read.clear()
    export(source, tmp_path / "base", tuning=tuning, **settings)
    export(later, tmp_path / "out", base=str(tmp_path / "base"), compare="exact", tuning=tuning, **settings)
    assert {field.name for field in dataclasses.fields(Tuning)} - Recorded.read == OF_VERIFY
    Recorded.read.clear()
    assert verify(str(tmp_path / "out"), finite=True, tuning=tuning).findings == []
    assert Recorded.read >= OF_VERIFY | OF_BOTH
