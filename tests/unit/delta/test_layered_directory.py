"""Files of a delta and of all below it under one roof: each name leads to one file, and messages name it as it is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_export.delta.layered_directory import LayeredDirectory, MadeFile, name_in_layer
from dist_export.storage.range_reader import RangeReader
from dist_export.storage.urls import open_directory


class Made(RangeReader):
    where = "made"

    def _fill(self, view: memoryview, offset: int) -> None:
        view[:] = bytes(range(offset, offset + len(view)))


@pytest.fixture
def directory(tmp_path: Path) -> LayeredDirectory:
    for name, content in (("delta", b"of delta"), ("base", b"of the base"), ("full", b"of the full one")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard").write_bytes(content)
    (tmp_path / "base" / "more").write_bytes(b"")
    layers = [open_directory(str(tmp_path / name)) for name in ("delta", "base", "full")]
    return LayeredDirectory(layers, {"rows": MadeFile(100, "v1", Made)})


def test_each_name_is_one_file(directory: LayeredDirectory) -> None:
    contents = [b"of delta", b"of the base", b"of the full one"]
    names = [name_in_layer(layer, "shard") for layer in range(3)]
    for name, content in [*zip(names, contents, strict=True), ("rows", bytes(range(100)))]:
        assert directory.stat(name).size == len(content)
        with directory.open_reader(name) as reader:
            assert reader.fetch(0, len(content)) == content
    assert directory.is_local


def test_many_at_once_are_those_that_exist(directory: LayeredDirectory) -> None:
    names = [
        "shard",
        name_in_layer(1, "shard"),
        name_in_layer(1, "more"),
        "more",
        "rows",
        name_in_layer(1, "rows"),
        name_in_layer(2, "shard"),
    ]
    found = directory.find_many(names)
    assert {name: stat.size for name, stat in found.items()} == {
        "shard": 8,
        name_in_layer(1, "shard"): 11,
        name_in_layer(1, "more"): 0,
        name_in_layer(2, "shard"): 15,
        "rows": 100,
    }
    with pytest.raises(FileNotFoundError, match="delta/more"):
        directory.stat_many(["more"])


def test_messages_name_the_file_of_its_package(directory: LayeredDirectory, tmp_path: Path) -> None:
    assert directory.describe(name_in_layer(1, "shard")) == str(tmp_path / "base" / "shard")
    assert directory.describe("shard") == directory.join("shard") == str(tmp_path / "delta" / "shard")
    assert directory.describe(name_in_layer(2, "shard")) == str(tmp_path / "full" / "shard")
    assert str(tmp_path / "full") in directory.describe("rows")
