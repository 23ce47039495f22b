"""Of the rows that dumps have of one key, the last step's counts; and which files of a directory are dumps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_export.checkpoint.tzrec.files import DumpFile, Listing, choose_files, list_dumps
from dist_export.checkpoint.tzrec.spool import ChosenRows, Spool
from dist_export.checkpoint.tzrec.winners import Conflict, Keyed, choose_rows
from dist_export.errors import CheckpointError
from dist_export.storage.urls import open_directory
from tests.support.properties import examples
from tests.support.tzrec_dumps import write_file

FILES = st.lists(
    st.tuples(st.integers(1, 4), st.lists(st.tuples(st.integers(-3, 6), st.integers(0, 1)), max_size=8)), max_size=6
)
"""(step, [(key, fingerprint)]) of each file."""


@examples(300)
@given(FILES)
def test_the_last_row_of_each_key_is_chosen_once(files: list[tuple[int, list[tuple[int, int]]]]) -> None:
    files = sorted(files, key=lambda file: file[0])
    rows_of: dict[tuple[int, int], set[int]] = {}
    for step, rows in files:
        for key, fingerprint in rows:
            rows_of.setdefault((key, step), set()).add(fingerprint)
    keyed = [
        Keyed(step, np.array([key for key, _ in rows], np.int64), np.array([its for _, its in rows], np.uint64))
        for step, rows in files
    ]
    if any(len(found) > 1 for found in rows_of.values()):
        with pytest.raises(Conflict) as conflict:
            choose_rows(keyed)
        assert len(rows_of[conflict.value.key, conflict.value.step]) > 1
        assert {files[place][0] for place in conflict.value.files} == {conflict.value.step}
        return
    chosen = choose_rows(keyed)
    found = [
        (files[number][1][row][0], files[number][0]) for number, rows in enumerate(chosen) for row in rows.tolist()
    ]
    last: dict[int, int] = {}
    for key, step in rows_of:
        last[key] = max(last.get(key, 0), step)
    assert sorted(found) == sorted(last.items())
    assert all((np.diff(rows) > 0).all() for rows in chosen)


def dump(step: int, rank: int = 0, world_size: int = 1, prefix: str = "delta") -> DumpFile:
    return DumpFile(f"{prefix}-{step}-{rank}-{world_size}", prefix, step, rank, world_size)


def test_steps_after_the_base_up_to_the_last_one_are_taken() -> None:
    listing = Listing(tuple(dump(step) for step in (5, 10, 15, 20)), ())
    chosen = choose_files(listing, since=5, until=15, allow_ragged=False, where="there")
    assert chosen.steps == (10, 15)
    assert choose_files(listing, since=0, until=None, allow_ragged=False, where="there").steps == (5, 10, 15, 20)


def test_two_files_of_a_rank_are_of_two_trainers() -> None:
    listing = Listing((dump(5), dump(5, prefix="other")), ())
    with pytest.raises(CheckpointError, match=r"step 5 has delta-5-0-1, other-5-0-1 of rank 0"):
        choose_files(listing, since=0, until=None, allow_ragged=True, where="there")


def test_several_missing_ranks_are_told() -> None:
    listing = Listing((dump(5, 1, 4),), ())
    with pytest.raises(CheckpointError, match=r"step 5 lacks ranks 0, 2, 3, so"):
        choose_files(listing, since=0, until=None, allow_ragged=False, where="there")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("step_5/delta_step_6_rank_0_of_2.parquet", "is named otherwise"),
        ("delta_step_5_rank_2_of_2.parquet", "there is no rank 2 of 2"),
        ("part-0.parquet", "is named otherwise"),
        ("other/delta_step_5.parquet", "holds no dump"),
        ("delta_step_5.parquet.rank0.tmp", "holds no dump"),
    ],
)
def test_files_that_are_no_dumps(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=text):
        list_dumps(open_directory(str(tmp_path)))


def test_a_prefix_may_hold_what_names_end_with(tmp_path: Path) -> None:
    folder = tmp_path / "step_7"
    folder.mkdir()
    (folder / "a_step_5_rank_1_of_2_step_7_rank_0_of_1.parquet").write_bytes(b"")
    (file,) = list_dumps(open_directory(str(tmp_path))).files
    assert (file.prefix, file.step, file.rank, file.world_size) == ("a_step_5_rank_1_of_2", 7, 0, 1)


def test_chosen_rows_are_read_at_any_byte(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(50, 3)).astype(np.float32)
    keys = random.permutation(50)
    write_file(
        tmp_path / "delta_step_5.parquet",
        {"other": (keys[:7], rows[:7, :2].copy()), "item": (keys, rows)},
        step=5,
        rank=0,
        world_size=1,
    )
    directory, spool = open_directory(str(tmp_path)), Spool()
    held = spool.add_file(directory, list_dumps(directory).files[0])["item"]
    chosen = np.array([0, 1, 2, 9, 11, 12, 30, 31, 49])
    its = ChosenRows(spool, held, chosen)
    all_rows, all_ids = rows[chosen].tobytes(), keys[chosen].astype(np.int64).tobytes()
    for read, expected in ((its.fill_rows, all_rows), (its.fill_ids, all_ids)):
        for begin in range(len(expected)):
            for end in (begin, begin + 1, begin + 5, begin + 30, len(expected)):
                found = bytearray(max(0, min(end, len(expected)) - begin))
                read(memoryview(found), begin)
                assert bytes(found) == expected[begin:end]
