"""The file of row fingerprints: where each part's are, what is computed of which bytes, and what cannot be."""

from __future__ import annotations

import numpy as np
import pytest

from dist_export.formats import row_fingerprints
from dist_export.formats.row_fingerprints import (
    ALIGNMENT,
    MAGIC,
    Fingerprinter,
    PartSlots,
    Piece,
    SlotBlock,
    find_fault,
    fingerprint_rows,
    fingerprints_name,
    group_pieces,
    lay_out,
)
from tests.support.kernels import IMPLEMENTATIONS, open_kernels
from tests.support.row_fingerprints import fingerprint_by_specification

FILES = [np.random.default_rng(seed).integers(0, 256, 40_000, dtype=np.uint8).tobytes() for seed in (1, 2)]


def read_many(file: int, ranges) -> None:
    for view, offset in ranges:
        assert offset + len(view) <= len(FILES[file])
        view[:] = FILES[file][offset : offset + len(view)]


def test_the_name_is_that_of_the_shard() -> None:
    assert fingerprints_name("model-000001-of-000002.safetensors") == "model-000001-of-000002.row_fingerprints"


def test_each_part_begins_at_a_multiple_of_the_alignment() -> None:
    assert len(MAGIC) == 16
    assert lay_out([1, 8, 9, 3]) == ([64, 128, 192, 320], 344)
    assert all(offset % ALIGNMENT == 0 for offset in lay_out(range(1, 50))[0])


@pytest.mark.parametrize(
    ("offset", "num_rows", "file_size", "fault"),
    [
        (64, 3, 88, None),
        (64, 3, 87, "3 fingerprints from byte 64 on do not lie in a file of 87 bytes"),
        (0, 3, 88, "begin at byte 0"),
        (72, 1, 88, "begin at byte 72, which is no multiple of 64"),
        (1 << 62, 1 << 62, 88, "do not lie in a file"),
    ],
)
def test_fingerprints_that_cannot_be_there(offset: int, num_rows: int, file_size: int, fault: str | None) -> None:
    found = find_fault(offset=offset, num_rows=num_rows, file_size=file_size)
    assert found is None if fault is None else fault in found


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_examples_of_the_specification(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = open_kernels(name)
    monkeypatch.setattr(row_fingerprints, "select_kernels", lambda: kernels)
    twelve = np.arange(1, 13, dtype=np.uint8)[None]
    floats = np.array([[1.0, -2.5]], "<f4").view(np.uint8)
    assert fingerprint_rows(1, []).tolist() == [6662693382782705028]
    assert fingerprint_rows(1, [twelve]).tolist() == [3999719009437039500]
    assert fingerprint_rows(1, [twelve, np.ones((1, 1), np.uint8)]).tolist() == [4150889141465761225]
    assert fingerprint_rows(1, [floats]).tolist() == [5140432216080494128]


@pytest.mark.parametrize("most_bytes", [1, 100, 1_000, 1 << 20])
def test_the_size_of_a_group_changes_no_fingerprint(most_bytes: int) -> None:
    """Parts with slots in two files, of any width, also without bytes."""
    parts = [
        PartSlots(30, (SlotBlock(0, 3, 12), SlotBlock(1, 5, 1))),
        PartSlots(1, (SlotBlock(1, 700, 2_000),)),
        PartSlots(40, (SlotBlock(0, 9, 0),)),
        PartSlots(5, (SlotBlock(0, 11, 8), SlotBlock(0, 400, 0), SlotBlock(0, 600, 3))),
        PartSlots(3, ()),
    ]
    pieces = [Piece(part, 0, its.num_rows) for part, its in enumerate(parts)]
    fingerprinter, found = Fingerprinter(parts, read_many), [[] for _ in parts]
    for group in group_pieces(pieces, parts, most_bytes, most_rows=17):
        assert group
        is_small = sum(piece.num_rows * parts[piece.part].row_bytes for piece in group) <= most_bytes
        assert is_small or [piece.num_rows for piece in group if parts[piece.part].row_bytes] == [1]
        assert sum(piece.num_rows for piece in group) <= 17
        for piece, fingerprints in zip(group, fingerprinter.compute(group), strict=True):
            assert piece.first_row == len(found[piece.part])
            found[piece.part] += fingerprints.tolist()
    for part, its in zip(parts, found, strict=True):
        assert its == [
            fingerprint_by_specification(
                [
                    FILES[slot.file][slot.offset + row * slot.row_bytes : slot.offset + (row + 1) * slot.row_bytes]
                    for slot in part.slots
                ]
            )
            for row in range(part.num_rows)
        ]
