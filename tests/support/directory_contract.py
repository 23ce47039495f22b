"""What every back end of ``Directory`` promises, whatever store is behind it. A back end's tests inherit all of it.

A subclass gives the fixture ``directory``: one that is not there yet, and that is removed after the test.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dist_export.errors import TransferError
from dist_export.storage.directory import Directory, FileStat, digest_file, pieces_of

MIB = 1 << 20


def winners(count: int, attempt: Callable[[int], bool]) -> list[int]:
    """Return the numbers below ``count`` with which ``attempt``, in a thread each, returned true."""
    with ThreadPoolExecutor(count) as pool:
        return [number for number, won in enumerate(pool.map(attempt, range(count))) if won]


class DirectoryContract:
    """The tests. Of a store without directories of its own, one is there as long as there is a file in it."""

    def test_a_file_that_repeats_another_one(self, directory: Directory) -> None:
        """It may be a link on a disk: then a new content of one of the two must not change the other."""
        for data in (b"one", b"one", b"two"):
            directory.write("folder/a", data)
            directory.write_again("other/b", "folder/a", data)
            assert (directory.read("folder/a"), directory.read("other/b")) == (data, data)
            assert sorted(directory.walk()) == ["folder/a", "other/b"]
        directory.write("folder/a", b"three")
        assert directory.read("other/b") == b"two"

    @pytest.mark.parametrize("there", [b"same", b"else", b"longer", None])
    def test_a_file_that_repeats_one_of_another_directory(self, directory: Directory, there: bytes | None) -> None:
        """The content that is given is written, whatever the other file holds, and that one stays as it is."""
        other, data = directory.child("other"), b"same"
        if there is not None:
            other.write("deep/b", there)
        for name in ("a", "sub/a"):
            directory.write_again(name, "deep/b", data, other)
            directory.write_again(name, "deep/b", data, other)  # over itself
            assert directory.read(name) == data
        kept = {} if there is None else {"other/deep/b": there}
        assert {name: directory.read(name) for name in directory.walk()} == {"a": data, "sub/a": data, **kept}
        directory.write("a", b"new")
        other.remove("deep/b")
        assert directory.read("sub/a") == data

    def test_what_is_not_there(self, directory: Directory) -> None:
        assert directory.names() == []
        assert directory.folders() == []
        assert list(directory.walk()) == []
        assert not directory.exists()
        assert not directory.exists("a")
        assert directory.find_many(["a", "b"]) == {}
        assert "exist" in directory.say_missing() or "no bucket" in directory.say_missing()
        for ask in (directory.stat, directory.read, directory.read_text):
            with pytest.raises(FileNotFoundError) as caught:
                ask("a")
            assert "a" in str(caught.value.filename)
        with pytest.raises(FileNotFoundError, match="a"):
            directory.stat_many(["a"])
        directory.remove("a")
        directory.remove_tree("a")

    def test_files_come_and_go(self, directory: Directory) -> None:
        directory.make()
        directory.write("b", b"12345")
        directory.write("a", b"")
        directory.write("sub/deep/c", b"x")
        assert directory.names() == ["a", "b"]
        assert directory.folders() == ["sub"]
        assert sorted(directory.walk()) == ["a", "b", "sub/deep/c"]
        assert directory.exists()
        assert all(directory.exists(name) for name in ("a", "b", "sub", "sub/deep", "sub/deep/c"))
        assert directory.read("b") == b"12345"
        assert directory.read("a") == directory.read_text("a") == b""
        assert directory.stat("b").size == 5
        directory.write("b", b"new")
        assert directory.read("b") == b"new"
        directory.remove("b")
        assert directory.names() == ["a"]
        assert not directory.exists("b")
        directory.remove_tree("sub")
        assert not directory.exists("sub/deep/c")
        assert directory.names() == ["a"]

    def test_a_name_that_begins_like_another_is_not_it(self, directory: Directory) -> None:
        directory.make()
        directory.write("model", b"1")
        directory.write("model.old/x", b"2")
        directory.write("sub2/x", b"3")
        assert not directory.exists("mod")
        assert not directory.exists("sub")
        directory.remove_tree("sub")
        assert directory.read("sub2/x") == b"3"
        assert directory.names() == ["model"]

    def test_many_files_are_looked_at_at_once(self, directory: Directory) -> None:
        directory.make()
        sizes = {f"f{number:02}": number for number in range(20)}
        for name, size in sizes.items():
            directory.write(name, bytes(size))
        assert {name: stat.size for name, stat in directory.stat_many(sizes).items()} == sizes
        found = directory.find_many([*sizes, "gone"])
        assert found == directory.stat_many(sizes)
        assert found == {name: directory.stat(name) for name in sizes}
        with pytest.raises(FileNotFoundError, match="gone"):
            directory.stat_many([*sizes, "gone"])

    def test_another_content_is_another_version(self, directory: Directory) -> None:
        directory.make()
        directory.write("f", b"1234")
        before = directory.stat("f")
        assert directory.stat("f") == before
        directory.write("f", b"5678")
        assert directory.stat("f") != before

    def test_ranged_reads(self, directory: Directory) -> None:
        directory.make()
        directory.write("f", bytes(range(100)))
        with directory.open_reader("f") as reader:
            buffer = bytearray(10)
            reader.read_into(memoryview(buffer), 37)
            assert bytes(buffer) == bytes(range(37, 47))
            reader.read_into(memoryview(buffer)[:0], 5)
            with pytest.raises(TransferError, match=r"f: ended at byte 100, 5 bytes before"):
                reader.read_into(memoryview(buffer), 95)
        reader.close()

    def test_a_large_file_is_read_in_pieces(self, directory: Directory) -> None:
        directory.make()
        content = bytes(range(256)) * (3 * MIB // 256) + b"end"
        directory.write("f", content)
        with directory.open_reader("f") as reader:
            assert b"".join(bytes(piece) for piece in pieces_of(reader, len(content))) == content
        before = digest_file(directory, "f")
        directory.write("f", content[:-1] + b"D")
        assert digest_file(directory, "f") != before
        with directory.open_stream("f") as stream:
            stream.seek(len(content) - 3)
            assert stream.read() == b"enD"

    def test_text_has_no_zero_bytes(self, directory: Directory) -> None:
        directory.make()
        directory.write("f", b'{"a": 1}')
        assert directory.read_text("f") == b'{"a": 1}'
        directory.write("f", b'{"a"\0: 1}')
        with pytest.raises(OSError, match=r"zero"):
            directory.read_text("f")
        assert directory.read("f") == b'{"a"\0: 1}'

    @pytest.mark.parametrize("ask", ["read", "read_text"])
    def test_a_file_that_is_replaced_between_look_and_read(
        self, directory: Directory, monkeypatch: pytest.MonkeyPatch, ask: str
    ) -> None:
        """A reader gets one whole content: what a publisher replaces while others read is no damaged file."""
        directory.write("a", b"short")
        stat, contents = type(directory).stat, [b"much longer", b"short again"]

        def look(its: Directory, name: str) -> FileStat:
            found = stat(its, name)
            if contents:
                its.write(name, contents.pop(0))
            return found

        monkeypatch.setattr(type(directory), "stat", look)
        assert getattr(directory, ask)("a") in (b"much longer", b"short again")

    def test_a_file_is_created_by_one_alone(self, directory: Directory) -> None:
        directory.make()
        directory.write("other", b"")
        won = winners(4, lambda number: directory.create("f", b"%d" % number))
        assert len(won) == 1
        assert directory.read("f") == b"%d" % won[0]
        assert not directory.create("f", b"late")

    def test_a_file_is_replaced_by_who_knows_its_content(self, directory: Directory) -> None:
        directory.make()
        assert not directory.replace_if("f", b"late", expected=b"other")
        assert directory.replace_if("f", b"first", expected=None)
        assert not directory.replace_if("f", b"late", expected=None)
        assert not directory.replace_if("f", b"late", expected=b"firs!")
        assert not directory.replace_if("f", b"late", expected=b"longer than it is")
        assert directory.read("f") == b"first"
        assert directory.replace_if("f", b"second", expected=b"first")
        assert directory.read("f") == b"second"

    def test_of_several_that_know_the_content_one_replaces_it(self, directory: Directory) -> None:
        if not (directory.is_local or directory.s3 is not None):
            pytest.skip("nothing excludes writers on this store")
        directory.make()
        directory.write("f", b"old")
        won = winners(8, lambda number: directory.replace_if("f", b"%d" % number, expected=b"old"))
        assert len(won) == 1
        assert directory.read("f") == b"%d" % won[0]

    def test_a_local_file_is_put_up_whole(self, directory: Directory, tmp_path: Path) -> None:
        directory.make()
        local = tmp_path / "built"
        content = bytes(range(256)) * (9 * MIB // 256)
        local.write_bytes(content)
        progress: list[int] = []
        directory.put_file("f", str(local), lambda: progress.append(1))
        assert directory.read("f") == content
        directory.write("f", b"replaced")
        assert directory.read("f") == b"replaced"

    def test_a_child_is_a_directory_of_the_same_store(self, directory: Directory) -> None:
        directory.make()
        directory.write("sub/f", b"1")
        child = directory.child("sub")
        assert type(child) is type(directory)
        assert child.names() == ["f"]
        assert child.read("f") == b"1"
        assert child.is_same_store(directory)
        assert child.is_same(directory.child("sub"))
        assert not child.is_same(directory)
        assert child.describe("f") == directory.describe("sub/f")
        assert child.locate("f") == directory.locate("sub/f")
        assert child.storage_options == directory.storage_options

    def test_one_folder_is_hinted_at_and_several_are_listed(self, directory: Directory) -> None:
        directory.make()
        directory.write("f", b"")
        assert directory.tell_folders() == ""
        directory.write("one/f", b"")
        assert directory.tell_folders() == ". It holds the directory one: give that"
        for number in range(8):
            directory.write(f"x{number}/f", b"")
        assert "one, x0, x1, x2, x3, x4 and 3 more" in directory.tell_folders()

    def test_a_file_can_be_made(self, directory: Directory) -> None:
        assert directory.why_not_writable() is None
        assert directory.why_not_there() is None
