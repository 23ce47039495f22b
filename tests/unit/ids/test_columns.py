from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dist_export.ids.columns import read_runs
from dist_export.storage.range_reader import Stream
from tests.support.properties import examples

PROPERTY = examples(100)


class Memory:
    """Files of consecutive numbers; remembers what was read."""

    def __init__(self):
        self.reads = []

    def __getitem__(self, number):
        memory = self

        class Reader:
            def read_into(self, view, offset):
                memory.reads.append((number, offset, len(view)))
                values = np.arange(len(view) // 8) + offset // 8 + 10_000 * number
                view[:] = values.astype(np.int64).tobytes()

            def read_many(self, ranges):
                for view, offset in ranges:
                    self.read_into(view, offset)

            def ahead(self, offset, num_bytes):
                return Stream(self, offset, num_bytes, window_bytes=1)

            is_ranged = False

        return Reader()


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20), st.booleans()), max_size=12), st.integers(1, 6))
def test_every_id_comes_once_with_its_block(blocks, run_rows):
    ends = [0, 0, 0]
    columns = []
    for number, rows, has_gap in blocks:
        ends[number] += 8 * has_gap
        columns.append((number, ends[number], rows))
        ends[number] += 8 * rows
    order = np.random.default_rng(len(blocks)).permutation(len(columns))
    file, offset, rows = np.array([columns[i] for i in order], np.int64).reshape(-1, 3).T
    memory, found = Memory(), {}
    for run in read_runs(memory, file, offset, rows, run_rows=run_rows):
        assert 0 < len(run.ids) < 2 * run_rows or len(run.blocks) == 1
        assert len(run.ids) <= max(2 * run_rows - 1, 1)
        assert run.first_row == 0 or len(run.blocks) == 1
        stops = [*run.starts[1:].tolist(), len(run.ids)]
        for block, start, stop in zip(run.blocks.tolist(), run.starts.tolist(), stops, strict=True):
            assert len(found.setdefault(block, [])) == run.first_row
            found[block] += run.ids[start:stop].tolist()
    for block in range(len(columns)):
        first = offset[block] // 8 + 10_000 * file[block]
        assert found.get(block, []) == list(range(first, first + rows[block]))
    assert sum(size for _, _, size in memory.reads) == 8 * rows.sum()


def test_neighbours_in_a_file_are_one_read():
    memory = Memory()
    rows = np.full(100, 3)
    list(read_runs(memory, np.zeros(100, np.int64), np.arange(100) * 24, rows))
    assert memory.reads == [(0, 0, 2400)]


def test_no_blocks_make_no_runs():
    assert list(read_runs(Memory(), *np.zeros((3, 0), np.int64))) == []
    assert list(read_runs(Memory(), *np.zeros((3, 4), np.int64))) == []
