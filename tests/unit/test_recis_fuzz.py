"""Damaged checkpoints of every kind: an error that the user can read, or an export that reads back; never anything else."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recis_writer import INDEX, MERGED, TENSORKEY, make_tables, read_back, write_checkpoint
from sparse_cases import export

from dist_export.errors import UserError

FILES = (INDEX, TENSORKEY, MERGED, "model-000000-of-000002.safetensors", "model-000001-of-000002.safetensors")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "in"
    return write_checkpoint(
        folder, make_tables({"user": 5, "x@y": 3}, 2), dense={"w": np.ones(2), "b": np.array(1)}, manifest="v1"
    )


@st.composite
def edits(draw):
    kind = draw(st.sampled_from(["set", "digit", "cut", "insert", "repeat"]))
    return kind, draw(st.floats(0, 1)), draw(st.integers(0, 255)), draw(st.integers(1, 12))


def damage(raw: bytes, edit, stop: int) -> bytes:
    kind, where, byte, length = edit
    place = min(int(where * stop), len(raw) - 1)
    if kind == "digit":  # numbers are what contradictions are made of
        digits = [i for i in range(stop) if raw[i : i + 1].isdigit()]
        place = digits[int(where * (len(digits) - 1))]
        return raw[:place] + str(byte % 10).encode() + raw[place + 1 :]
    if kind == "set":
        return raw[:place] + bytes([byte]) + raw[place + 1 :]
    if kind == "cut":
        return raw[:place] + raw[place + length :]
    if kind == "insert":
        return raw[:place] + bytes([byte]) * length + raw[place:]
    return raw[:place] + raw[place : place + length] * 2 + raw[place + length :]


@given(name=st.sampled_from(FILES), changes=st.lists(edits(), min_size=1, max_size=2))
@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_damage_is_refused_or_harmless(sound, tmp_path, name, changes):
    folder = tmp_path / "in"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    raw = (folder / name).read_bytes()
    stop = len(raw) if not name.startswith("model") else 8 + int.from_bytes(raw[:8], "little")
    for edit in changes:
        raw = damage(raw, edit, stop)
    (folder / name).write_bytes(raw)
    for number, config in enumerate(({"num_shards": 3}, {"num_shards": "source"}, {"filter_sparse_opt": False})):
        target = tmp_path / f"out{number}"
        shutil.rmtree(target, ignore_errors=True)
        message = ""
        try:
            manifest = export(folder, target, **config)
        except UserError as error:
            message = str(error)
        if message:
            assert "\n" not in message
            assert len(message) < 1000
            assert not target.exists()
        else:
            found = read_back(target)
            assert {table.name: table.rows_out for table in manifest.tables} == {
                name: len(rows["id"]) for name, rows in found.items()
            }
