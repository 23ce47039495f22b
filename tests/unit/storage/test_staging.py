"""Files for a store are built in a directory that ranks share."""

from __future__ import annotations

import os

from dist_export.storage.staging import Staging
from dist_export.storage.urls import open_directory


def test_ranks_build_in_one_directory_which_its_owner_removes() -> None:
    target = open_directory("memory://shared_staging/out")
    first, second = Staging(target), Staging(target)
    folder, unused = first.make(), second.make()
    first.join(folder)
    second.join(folder)
    first.create("x", 10)
    assert second.path("x") == first.path("x")
    assert os.path.getsize(second.path("x")) == 10
    second.close()
    assert not os.path.exists(unused)
    assert os.path.isdir(folder), "a guest leaves it to its owner"
    first.close()
    assert not os.path.exists(folder)


def test_a_file_with_holes_takes_no_room() -> None:
    staging = Staging(open_directory("memory://shared_staging/out"))
    staging.create("x", 64 << 20, has_holes=True)
    assert os.stat(staging.path("x")).st_size == 64 << 20
    assert os.stat(staging.path("x")).st_blocks * 512 < 1 << 20
    staging.close()
