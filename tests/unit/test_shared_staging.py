"""Files for a store are built where all ranks see them: in rank 0's directory, or nowhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dist_export.errors import TransferError
from dist_export.staging import Staging
from dist_export.storage import Directory


def test_ranks_build_in_one_directory_which_its_owner_removes() -> None:
    target = Directory("memory://shared_staging/out")
    first, second = Staging(target), Staging(target)
    folder = first.share()
    second.join(folder)
    first.create("x", 10)
    assert second.path("x") == first.path("x")
    assert os.path.getsize(second.path("x")) == 10
    second.close()
    assert os.path.isdir(folder), "a guest leaves it to its owner"
    first.close()
    assert not os.path.exists(folder)


def test_a_rank_on_another_machine_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"Set TMPDIR to a directory that all machines share"):
        Staging(Directory("memory://shared_staging/out")).join(str(tmp_path / "elsewhere"))


def test_a_file_with_holes_takes_no_room() -> None:
    staging = Staging(Directory("memory://shared_staging/out"))
    staging.create("x", 64 << 20, has_holes=True)
    assert os.stat(staging.path("x")).st_size == 64 << 20
    assert os.stat(staging.path("x")).st_blocks * 512 < 1 << 20
    staging.close()
