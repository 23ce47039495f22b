"""Damaged input of every kind: an error that the user can read, or what the sound one gives; never anything else.

Ten thousand pieces of damage, from fixed seeds, most of them given to the readers directly; the seeds are the parameters,
so that a run on several processes shares them.
"""

from __future__ import annotations

import io
import json
import random
import shutil
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from dist_export.archive.pt2 import pack_program
from dist_export.archive.safe_load import check_archive, load_program
from dist_export.checkpoint.metadata import Checkpoint
from dist_export.dense.fg import check_conf
from dist_export.dense.fg_load import load_conf
from dist_export.errors import CheckpointError, ConfigError, DistExportError, PackageError, UserError
from dist_export.manifest import compute_digest, decode_manifest, encode_manifest
from tests.support import archive_programs
from tests.support.fuzzing import damage_bytes, damage_json, damage_shard
from tests.support.hostile_cases import limited_memory
from tests.support.properties import examples, seeds
from tests.support.recis_writer import INDEX, MERGED, TENSORKEY, make_tables, read_back, write_checkpoint
from tests.support.sparse_cases import export, open_source

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
@examples(40, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


# ---- in bulk, by the readers ------------------------------------------------------------------------------------


def facts_of(checkpoint: Checkpoint) -> object:
    """Return what an export goes by."""
    parts, blocks = checkpoint.parts, checkpoint.blocks
    columns = (parts.table, parts.begin, parts.end, parts.size, parts.rows, blocks.file, blocks.offset)
    return (
        checkpoint.tables,
        checkpoint.dense,
        [column.tolist() for column in columns],
        blocks.key.tolist(),
        checkpoint.copy_hindrances,
    )


@pytest.mark.parametrize("seed", seeds(20))
def test_damaged_metadata_is_refused_or_means_the_same(seed, sound, tmp_path):
    """Where it does not mean the same, it is sound in itself: then an export of it reads back."""
    draw = random.Random(seed)
    folder = tmp_path / "in"
    shutil.copytree(sound, folder)
    facts = facts_of(open_source(folder))
    refused = 0
    with limited_memory(1 << 30):
        for number in range(350):
            name = FILES[number % len(FILES)]
            raw = (sound / name).read_bytes()
            (folder / name).write_bytes((damage_shard if name.startswith("model") else damage_json)(raw, draw))
            try:
                found = facts_of(open_source(folder))
            except CheckpointError as error:
                refused += 1
                assert str(error).isprintable()
                assert str(folder) in str(error)
            else:
                if found != facts:
                    refuse_or_read_back(folder, tmp_path / f"out{number}")
            (folder / name).write_bytes(raw)
    assert refused > 200


def refuse_or_read_back(folder: Path, target: Path) -> None:
    try:
        manifest = export(folder, target, num_shards=2)
    except UserError as error:
        assert str(error).isprintable()
        assert not target.exists()
        return
    found = read_back(target)
    assert {table.name: table.rows_out for table in manifest.tables} == {
        name: len(rows["id"]) for name, rows in found.items()
    }


@pytest.fixture(scope="module")
def manifest(sound, tmp_path_factory) -> bytes:
    return encode_manifest(export(sound, tmp_path_factory.mktemp("fuzz") / "out", num_shards=3))


@pytest.mark.parametrize("seed", seeds(8))
def test_a_damaged_manifest_is_refused_or_says_the_same(seed, manifest):
    """Half of it sealed again, as whoever makes a package can."""
    draw = random.Random(seed)
    expected = decode_manifest(manifest, where="x")
    refused = 0
    with limited_memory(1 << 30):
        for number in range(200):
            raw = damage_json(manifest, draw)
            if number % 2:
                raw = reseal(raw)
            try:
                found = decode_manifest(raw, where="x/manifest.json")
            except PackageError as error:
                refused += 1
                assert str(error).isprintable()
                continue
            if number % 2 == 0:  # what varies from run to run is under no digest
                assert msgspec.structs.replace(found, run={}) == msgspec.structs.replace(expected, run={})
            assert encode_manifest(found)
    assert refused > 80


def reseal(raw: bytes) -> bytes:
    try:
        document = json.loads(raw)
        document["digest"] = compute_digest(document)
        return json.dumps(document).encode()
    except (ValueError, TypeError, AttributeError, RecursionError, msgspec.MsgspecError):
        return raw


@cache
def program(archive_format) -> bytes:
    return pack_program(archive_programs.case("shapes").program, archive_format=archive_format)


@pytest.mark.parametrize("archive_format", ["pt2", "legacy"])
@pytest.mark.parametrize("seed", seeds(4))
def test_a_damaged_program_is_refused_or_computes_the_same(seed, archive_format):
    """Damage in the archive, and in its JSON, where no checksum gives it away."""
    draw = random.Random(seed)
    raw = program(archive_format)
    member = "archive/models/model.json" if archive_format == "pt2" else "serialized_exported_program.json"
    _, inputs, expected = archive_programs.case("shapes")
    passed = 0
    with limited_memory(2 << 30):
        for number in range(60):
            if number % 3:
                damaged = damage_bytes(raw, draw)
            else:
                damaged = archive_programs.exchange(raw, {member: lambda text: damage_json(text, draw)})
            try:
                check_archive(io.BytesIO(damaged))
                loaded = load_program(damaged)
            except PackageError as error:
                assert str(error).isprintable()
                continue
            passed += 1
            if number % 3:
                archive_programs.assert_same(loaded.module()(**inputs), expected)
    assert passed < 60


FG = {
    "features": [
        {"feature_name": name, "feature_type": "id_feature", "value_type": "String", "gen_key_type": "hash",
         "gen_val_type": "lookup", "hash_bucket_size": 100, "embedding_dimension": 4}
        for name in ("user", "item")
    ]
    + [{"sequence_name": "s", "sequence_length": 5, "features": [
        {"feature_name": "item", "feature_type": "raw_feature", "value_type": "Double", "gen_key_type": "idle",
         "gen_val_type": "idle", "value_dimension": 2}]}]
}  # fmt: skip
MC = {"a": ["user"], "b": ["s", "item"]}


@pytest.mark.parametrize("seed", seeds(4))
def test_a_damaged_feature_configuration_is_refused_or_checked(seed, tmp_path):
    draw = random.Random(seed)
    sound = {name: json.dumps(document).encode() for name, document in (("fg", FG), ("mc", MC))}
    refused = 0
    with limited_memory(1 << 30):
        for number in range(150):
            name = ("fg", "mc")[number % 2]
            for each, raw in sound.items():
                (tmp_path / each).write_bytes(damage_json(raw, draw) if each == name else raw)
            try:
                fg, mc = (load_conf(tmp_path / each, what=each) for each in sound)
                check_conf(fg, mc, fg_rules="rtp", tables={"user": 4, "item": 4})
                msgspec.json.encode([fg, mc])  # as it would be written
            except ConfigError as error:
                refused += 1
                assert all(line.isprintable() for line in str(error).split("\n"))
    assert refused > 50


def test_the_sound_ones_are_sound(manifest):
    assert check_conf(FG, MC, fg_rules="rtp", tables={"user": 4, "item": 4}).blocks
    assert decode_manifest(manifest, where="x").tables
    for archive_format in ("pt2", "legacy"):
        check_archive(program(archive_format))
    assert issubclass(PackageError, DistExportError)
