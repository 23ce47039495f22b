"""A disk that one rank cannot look at ends all ranks together."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import dist_export
from dist_export.errors import DistExportError
from dist_export.manifest import MANIFEST
from dist_export.pipeline.target_state import OnDisk
from tests.support.distributed.ranks import run_ranks
from tests.support.recis_writer import make_tables, write_checkpoint

pytestmark = pytest.mark.distributed


def replace(rank: int, source: str, out: str) -> str:
    def fail(_: OnDisk) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), f"{out}/{MANIFEST}")

    if rank == 1:
        OnDisk._find = fail
    try:
        dist_export.export(settings(source, out, overwrite=True))
    except DistExportError as error:
        return f"{error.exit_code} {error}"
    return "exported"


def settings(source: str, out: str, **more: object) -> dict[str, object]:
    return {"ckpt_dir": source, "export_dir": out, "filter_sparse_opt": True, "num_shards": 2, **more}


def test_an_error_of_the_disk_on_one_rank_is_everyones(tmp_path: Path) -> None:
    source, out = write_checkpoint(tmp_path / "in", make_tables({"t": 60}, 2)), tmp_path / "out"
    first = dist_export.export(settings(str(source), str(out)))
    said = run_ranks(replace, 2, tmp_path / "store", str(source), str(out))
    assert all(text.startswith("1 ") and os.strerror(errno.EIO) in text for text in said), said
    assert dist_export.open_package(out).manifest.digest == first.digest, "the old package stays"
