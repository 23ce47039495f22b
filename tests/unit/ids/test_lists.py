"""Lists of ids in npy files whose header makes numpy raise anything: one line, as for any file that cannot be read."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from dist_export.errors import ConfigError
from dist_export.ids.lists import read_id_list

SOUND = "{'descr': '<i8', 'fortran_order': False, 'shape': (3,), }"


def write(path: Path, header: str | bytes, *, version: tuple[int, int] = (1, 0)) -> Path:
    raw = header if isinstance(header, bytes) else header.encode("latin-1")
    raw = raw.ljust(118 - 10) + b"\n"
    length = struct.pack("<H" if version == (1, 0) else "<I", len(raw))
    path.write_bytes(b"\x93NUMPY" + bytes(version) + length + raw + np.arange(3).tobytes())
    return path


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_a_sound_header_is_read(version: tuple[int, int], tmp_path: Path) -> None:
    found = read_id_list(str(write(tmp_path / "x.npy", SOUND, version=version)), most_bytes=1000, setting="deny")
    assert found.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i8', 'fortran_order': False, 'shape': (3,",  # TokenError
        "{'descr': '''",
        "   {'a': 1}\n  x\n x",  # IndentationError
        "(" * 5_000,
        "-" * 9_000 + "1",  # RecursionError
        "[" * 90 + "]" * 90,
        "{'descr': '<i8', 'fortran_order': False, 'shape': (3,), 'x': 1}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': 3}",
        "{'descr': 'nothing', 'fortran_order': False, 'shape': (3,)}",
        "{'descr': [('a', '<i8'), ('a', '<i8')], 'fortran_order': False, 'shape': (3,)}",
        "{'descr': ('<i8', (1 << 40,)), 'fortran_order': False, 'shape': (3,)}",
        "{'descr': '<i8', 'fortran_order': 5, 'shape': (3,)}",
        "{'descr': None, 'fortran_order': False, 'shape': (3,)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (-3,)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (True, )}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (3,)}",
        "{[]: 1}",
        "1" * 5_000,
        "open('x')",
        b"\x00" * 40,
        b"\xff" * 40,
        "",
        "x" * 40_000,
    ],
)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0), (9, 9)])
def test_a_header_that_numpy_cannot_parse_is_one_line(
    header: str | bytes, version: tuple[int, int], tmp_path: Path
) -> None:
    path = write(tmp_path / "x.npy", header, version=version)
    with pytest.raises(ConfigError, match=r"deny: .*x\.npy") as caught:
        read_id_list(str(path), most_bytes=1000, setting="deny")
    assert "\n" not in str(caught.value)


def test_a_file_of_the_first_bytes_alone_is_one_line(tmp_path: Path) -> None:
    sound = write(tmp_path / "x.npy", SOUND).read_bytes()
    for length in (6, 7, 8, 9, 10, 60, 127):
        (tmp_path / "x.npy").write_bytes(sound[:length])
        with pytest.raises(ConfigError, match=r"x\.npy"):
            read_id_list(str(tmp_path / "x.npy"), most_bytes=1000, setting="deny")
