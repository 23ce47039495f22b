"""``model.pt`` from elsewhere: nothing of it runs, nothing is read beyond what it holds, and no size is taken on trust."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_export.checkpoint.recis.model_pt import describe_dense_state, load_dense_state
from dist_export.errors import CheckpointError
from dist_export.storage.urls import open_directory
from tests.support import tiny_model
from tests.support.archive_programs import exchange, members_of
from tests.support.fuzzing import damage_bytes
from tests.support.hostile_cases import assert_refused, limited_memory, link_out, run

STATE = {"dense_arch.w": torch.arange(4.0), "dense_arch.b": torch.ones(6, dtype=torch.int64)}


class Payload:
    """Unpickling one makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def saved(value: object, **kwargs: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


def edit_pickle(old: bytes, new: bytes, *, state: object = STATE) -> Callable[[Path], bytes]:
    def change(raw: bytes) -> bytes:
        assert old in raw
        return raw.replace(old, new, 1)

    return lambda _: exchange(saved(state), {"archive/data.pkl": change})


def packed(names: str, size: int = 0) -> Callable[[Path], bytes]:
    """Compress the members whose names end so; with ``size`` they are zeros, a bomb."""

    def make(_: Path) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in members_of(saved(STATE)).items():
                is_chosen = name.endswith(names)
                kind = zipfile.ZIP_DEFLATED if is_chosen else zipfile.ZIP_STORED
                archive.writestr(name, bytes(size) if is_chosen and size else content, compress_type=kind)
        return buffer.getvalue()

    return make


def overlapping(_: Path) -> bytes:
    """Point one entry of the directory at another one's bytes."""
    raw = exchange(saved(STATE), {})
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        first, second = (archive.getinfo(f"archive/data/{key}").header_offset for key in (0, 1))
    end = raw.rindex(b"PK\x05\x06")
    (directory,) = struct.unpack("<I", raw[end + 16 : end + 20])
    place = raw.index(struct.pack("<I", second), directory)
    return raw[:place] + struct.pack("<I", first) + raw[place + 4 :]


def far_away(_: Path) -> bytes:
    """The name in a member's own header is longer than the file, and torch goes by it to find the content."""
    raw = bytearray(exchange(saved(STATE), {}))
    with zipfile.ZipFile(io.BytesIO(bytes(raw))) as archive:
        last = max(info.header_offset for info in archive.infolist())
    raw[last + 28 : last + 30] = b"\xff\xff"
    return bytes(raw)


def twice(_: Path) -> bytes:
    buffer = io.BytesIO(exchange(saved(STATE), {}))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/DATA.PKL", b"x")
    return buffer.getvalue()


SHAPE = b"QK\x00K\x04\x85q\x08K\x01\x85"  # storage, offset 0, (4,), stride (1,)
HUGE = b"\x8a\x06\x00\x00\x00\x00\x00\x01"  # 2^40
CASES = {
    "code": (lambda path: saved({"dense_arch.w": Payload(path)}), "mkdir"),
    "code in the older format": (
        lambda path: saved({"w": Payload(path)}, _use_new_zipfile_serialization=False),
        "weights_only",
    ),
    "a bare pickle": (lambda path: pickle.dumps({"w": Payload(path)}), "cannot be read as a state_dict"),
    "nothing": (lambda _: b"", "cannot be read as a state_dict"),
    "text": (lambda _: b"hello", "cannot be read as a state_dict"),
    "a zip of something else": (lambda _: exchange(saved(STATE), {"archive/data.pkl": None}), "it has no data.pkl"),
    "two roots": (lambda _: exchange(saved(STATE), {"other/data.pkl": b"x"}), "it has no data.pkl"),
    "a program": (lambda _: exchange(saved(STATE), {"archive/constants.pkl": b"\x80\x02}."}), "cannot be read as"),
    "cut": (lambda _: saved(STATE)[:-50], "is truncated"),
    "more behind it": (lambda _: saved(STATE) + b"more", "is truncated"),
    "packed weights": (packed("data/0"), "'archive/data/0' is compressed or encrypted"),
    "a bomb of a pickle": (packed("data.pkl", 50_000_000), "'archive/data.pkl' is compressed"),
    "a bomb of weights": (packed("data/1", 50_000_000), "'archive/data/1' is compressed"),
    "members that overlap": (overlapping, "overlaps the member before it"),
    "a member that lies elsewhere": (far_away, "damaged"),
    "a name twice but for case": (twice, "two members are called"),
    "a name with escape codes": (
        lambda _: exchange(saved(STATE), {"\x1b[31m": b""}),
        "it has no data.pkl",
    ),
    "a storage beyond its member": (edit_pickle(b"K\x04tq", b"K\x06tq"), "24 bytes of 'archive/data/0', which has 16"),
    "a storage beyond the file": (edit_pickle(b"K\x04tq", b"J\0\0\0\x7ftq"), "which has 16"),
    "a storage before the file": (edit_pickle(b"K\x04tq", b"J\xf0\xff\xff\xfftq"), "-64 bytes"),
    "a storage of no member": (edit_pickle(b"X\x01\0\0\x000q\x05", b"X\x01\0\0\x007q\x05"), "is not there"),
    "a storage of no type": (edit_pickle(b"torch\nFloatStorage\n", b"os\nsystem\n"), "no storage of a tensor"),
    "a shape beyond its storage": (edit_pickle(SHAPE, b"QK\0" + HUGE + b"\x85q\x08K\x01\x85"), "cannot be read as"),
    "an offset before its storage": (edit_pickle(SHAPE, b"QJ\xf0\xff\xff\xffK\x04\x85q\x08K\x01\x85"), "impossible sizes"),
    "a shape that repeats one value": (
        edit_pickle(SHAPE, b"QK\0" + HUGE + b"\x85q\x08K\x00\x85"),
        "has shape [1099511627776], 4,398,046,511,104 bytes, made of 16",
    ),
    "a tensor and no dict": (lambda _: saved(torch.ones(2)), "expected a state_dict"),
    "names that are numbers": (lambda _: saved({1: torch.ones(2)}), "expected a state_dict"),
    "names that are no text": (lambda _: saved({"\ud800": torch.ones(2)}), "state_dict"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("model", [True, False])
def test_a_hostile_model_pt_is_one_line(name, model, tmp_path, capsys):
    """For an export with the dense arch and for one of the tables alone."""
    make, said = CASES[name]
    folder = tiny_model.write_tiny_checkpoint(tmp_path / "in")
    (folder / "model.pt").write_bytes(make(tmp_path / "made"))
    dense = ("--model", tiny_model.MODEL, "--dataset", tiny_model.DATASET) if model else ()
    places = ("--ckpt_dir", folder, "--export_dir", tmp_path / "out")
    outcome = run(capsys, tmp_path, *places, "--filter_sparse_opt", "true", *dense)
    assert_refused(outcome, said)
    assert f"{folder}/model.pt" in outcome.lines[0]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "made").exists()


def test_a_model_pt_behind_a_link_out_is_refused(tmp_path, capsys):
    folder = tiny_model.write_tiny_checkpoint(tmp_path / "in")
    link_out("model.pt")(folder)
    places = ("--ckpt_dir", folder, "--export_dir", tmp_path / "out")
    assert_refused(run(capsys, tmp_path, *places), "model.pt cannot be read: is a link that leads out of the directory")
    assert run(capsys, tmp_path, *places, "--follow_links", "true").code == 0


def test_a_sparse_model_pt_is_not_read_whole(tmp_path):
    """128 GB of zero that a pickle of two hundred bytes could be in."""
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04")
    os.truncate(tmp_path / "model.pt", 128 << 30)
    with pytest.raises(CheckpointError, match="is truncated"):
        describe_dense_state(open_directory(tmp_path))


def test_honest_states_pass(tmp_path):
    """Shared storages, views, expanded and empty tensors, parameters, every dtype, the older format."""
    base = torch.arange(12.0).reshape(3, 4)
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 bool complex64 float8_e4m3fn"
    state = {
        **{f"é.{name}": torch.ones(2, 3).to(getattr(torch, name)) for name in names.split()},
        "view": base.t()[1:],
        "base": base,
        "expanded": torch.ones(1).expand(1000),
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(7),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "extra": {"step": 3, "list": [1, 2.5, None, True, "x"]},
    }
    for options in ({}, {"pickle_protocol": 3}, {"_use_new_zipfile_serialization": False}):
        if "_use_new_zipfile_serialization" in options:  # torch cannot read these back from it
            state = {name: value for name, value in state.items() if name not in ("é.uint16", "é.float8_e4m3fn")}
        (tmp_path / "model.pt").write_bytes(saved(state, **options))
        found = load_dense_state(open_directory(tmp_path))
        assert list(found) == list(state)
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                assert found[name].tolist() == value.tolist()
        described = {name: shape for name, _, shape in describe_dense_state(open_directory(tmp_path)) or []}
        assert described["view"] == (3, 3)


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_state_is_refused_or_says_the_same(seed, tmp_path):
    """Half of the damage is done to the pickle, which the zip's checksum would else keep from being looked at."""
    draw = random.Random(seed)
    sound = saved(STATE)
    with limited_memory(1 << 30):
        refused = sum(is_refused(tmp_path, damage_state(sound, number, draw)) for number in range(250))
    assert 100 < refused < 250


def damage_state(sound: bytes, number: int, draw: random.Random) -> bytes:
    if number % 2:
        return damage_bytes(sound, draw)
    return exchange(sound, {"archive/data.pkl": lambda pickled: damage_bytes(pickled, draw)})


def is_refused(folder: Path, raw: bytes) -> bool:
    (folder / "model.pt").write_bytes(raw)
    try:
        found = load_dense_state(open_directory(folder))
    except CheckpointError as error:
        assert str(error).isprintable()
        return True
    for value in found.values():
        if isinstance(value, torch.Tensor):
            assert value.numel() < 1 << 30
            value.clone()  # all of it is there
    return False
