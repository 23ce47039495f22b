"""Pickles that would take gigabytes or for ever take little memory; what is legal is read as Python reads it."""

from __future__ import annotations

import os
import pickle
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_export.checkpoint.dcp.metadata import decode_metadata
from dist_export.formats.pickle_machine import Machine
from dist_export.formats.pickle_values import Global, PickleError, Record, recorded
from dist_export.formats.torch_pickle import load_pickled
from tests.support import pickle_attacks
from tests.support.hostile_cases import limited_memory
from tests.support.warm import run_script
from tests.support.zip_layouts import write_zip

MEMORY = 64 << 20
SECONDS = 20.0
"""Of the processor, for one attack: ten times what the slowest takes, and a fifth of what one takes that is not refused."""

CHILD = """
import sys
import time
from tests.support import pickle_attacks
from tests.support.hostile_cases import limited_memory
from tests.integration.test_pickle_attacks import MEMORY, READERS, SECONDS
read = READERS[sys.argv[1]]
for name, make in getattr(pickle_attacks, sys.argv[2]).items():
    raw = make()
    print(name, len(raw), flush=True)
    begin = time.process_time()
    with limited_memory(MEMORY):
        read(raw)
    assert time.process_time() - begin < SECONDS, name
print("done")
"""


def read_metadata(raw: bytes) -> None:
    from dist_export.checkpoint.dcp.tables import read_dcp
    from dist_export.errors import CheckpointError
    from dist_export.storage.urls import open_directory

    folder = Path(os.environ["FOLDER"])
    (folder / ".metadata").write_bytes(raw)
    (folder / "f").write_bytes(bytes(64))
    try:
        read_dcp(open_directory(folder))
    except CheckpointError as error:
        assert str(error).isprintable()


def read_pickle(raw: bytes) -> None:
    try:
        Machine(raw, lambda _, name: recorded(name)).load()
    except PickleError as error:
        assert str(error).isprintable()


def pack(raw: bytes) -> bytes:
    return write_zip([("data.pkl", raw), ("byteorder", b"little"), ("data/0", bytes(16)), ("version", b"3")])


def read_torch(raw: bytes) -> None:
    """As a checkpoint, as the dense parameters of RecIS, and as an item of DCP."""
    from dist_export.checkpoint.recis.model_pt import load_dense_state
    from dist_export.checkpoint.tensors.torch_save import TorchReader
    from dist_export.checkpoint.torch_items import ItemFinder
    from dist_export.errors import CheckpointError
    from dist_export.storage.urls import open_directory

    folder = Path(os.environ["FOLDER"])
    packed = pack(raw)
    (folder / "model.pt").write_bytes(packed)
    directory = open_directory(folder)

    def read_checkpoint() -> None:
        reader = TorchReader(directory)
        reader.assemble([reader.read_headers(range(len(reader.files)))])

    def read_item() -> None:
        with directory.open_reader("model.pt") as reader:
            ItemFinder().locate(reader, 0, len(packed), shape=(4,), dtype="float32", where="f")

    for read in (read_checkpoint, lambda: load_dense_state(directory), read_item):
        try:
            read()
        except CheckpointError as error:
            assert str(error).isprintable()


def read_legacy(raw: bytes) -> None:
    from dist_export.checkpoint.recis.model_pt import load_dense_state
    from dist_export.errors import CheckpointError
    from dist_export.storage.urls import open_directory

    folder = Path(os.environ["FOLDER"])
    begin = [pickle_attacks.number(0x1950A86A20F9469CFC6C), b"M\xe9\x03", b"}"]
    (folder / "model.pt").write_bytes(b"".join(map(pickle_attacks.whole, begin)) + raw + pickle.dumps([], 2))
    try:
        load_dense_state(open_directory(folder))
    except CheckpointError as error:
        assert str(error).isprintable()


def read_sample(raw: bytes) -> None:
    from dist_export.archive.safe_pickle import read_sample_pickle
    from dist_export.errors import PackageError

    try:
        read_sample_pickle(raw, where="x")
    except PackageError as error:
        assert str(error).isprintable()


def read_program(raw: bytes) -> None:
    """As the weights in an exported program."""
    from dist_export.archive import safe_load
    from dist_export.errors import PackageError

    try:
        safe_load._check_torch_pickle(pack(raw), "x", "weights.pt")
    except PackageError as error:
        assert str(error).isprintable()


READERS = {
    "read_torch": read_torch,
    "read_legacy": read_legacy,
    "read_sample": read_sample,
    "read_program": read_program,
    "read_metadata": read_metadata,
    "read_pickle": read_pickle,
}


@pytest.mark.parametrize(
    ("reader", "attacks"),
    [
        ("read_metadata", "METADATA"),
        ("read_pickle", "ANYWHERE"),
        ("read_torch", "TORCH"),
        ("read_legacy", "TORCH"),
        ("read_sample", "SAMPLES"),
        ("read_program", "TORCH"),
    ],
)
def test_no_pickle_takes_much_memory_or_for_ever(reader: str, attacks: str, tmp_path: Path) -> None:
    """In a process of its own, because a hash of 2^60 steps cannot be interrupted."""
    child = run_script(tmp_path, CHILD, reader, attacks, FOLDER=str(tmp_path), timeout=600)
    assert child.returncode == 0, child.stdout[-200:] + child.stderr[-2000:]
    assert child.stdout.splitlines()[-1] == "done"
    assert len(child.stdout.splitlines()) == len(getattr(pickle_attacks, attacks)) + 1


CHARGED = {
    "_codecs.encode", "builtins.bytearray", "builtins.set", "collections.Counter", "torch.Size",
    "torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_qtensor", "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_nested_tensor",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
}  # fmt: skip
"""What makes a copy of its arguments."""
FREE = {
    "collections.OrderedDict", "builtins.complex", "torch.device", "torch.serialization._get_layout",
    "torch.nn.parameter.Parameter", "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_wrapper_subclass",
    "torch._utils._rebuild_meta_tensor_no_storage", "torch._utils._rebuild_device_tensor_from_numpy",
}  # fmt: skip
"""What takes as much for any arguments that it is let have: views, names, and arrays, none of which torch lets be made."""


def test_of_all_that_torch_calls_each_is_charged_or_takes_little_or_is_not_called() -> None:
    import torch._weights_only_unpickler as unpickler

    admitted = unpickler._get_allowed_globals()
    assert admitted.keys() >= CHARGED | FREE
    for full in admitted.keys() - CHARGED - FREE:
        module, _, attribute = full.rpartition(".")
        for body in (b")R", b")\x81", b"K\x04\x85R"):
            raw = pickle_attacks.whole(pickle_attacks.name(module.encode(), attribute) + body)
            with pytest.raises(PickleError, match="nothing that it may call"):
                load_pickled(raw, lambda _: None, is_any_known=True)


COPIED = pickle_attacks.STORAGE.replace(b"K\x04tQ", pickle_attacks.number(1 << 20) + b"tQ")
WHOLE = pickle_attacks.view(1 << 20, strides=(1,), storage=COPIED)
LAYOUT = pickle_attacks.call(b"torch.serialization", "_get_layout", pickle_attacks.text("torch.sparse_coo"))
PER_CHANNEL = pickle_attacks.name(b"torch", "per_channel_affine")
COPIES = {
    "_rebuild_device_tensor_from_cpu_tensor": b"(h\x00"
    + pickle_attacks.FLOAT16
    + pickle_attacks.text("cpu")
    + b"\x89t",
    "_rebuild_sparse_tensor": LAYOUT + b"(h\x00h\x00K\x04\x85t\x86",
    "_rebuild_nested_tensor": b"(h\x00h\x00h\x00h\x00t",
    "_rebuild_qtensor": b"(" + COPIED + b"K\0K\4\x85K\1\x85(" + PER_CHANNEL + b"h\x00h\x00K\0t\x89}t",
}


@pytest.mark.parametrize("function", COPIES)
def test_tensors_that_torch_copies_are_copied_a_few_times(function: str) -> None:
    """Four megabytes are in the file once, and each call of thirty bytes takes as many again."""
    begin = (
        WHOLE + b"q\x000" + COPIES[function] + b"q\x010" + pickle_attacks.name(b"torch._utils", function) + b"q\x020"
    )

    def raw(count: int) -> bytes:
        return pickle_attacks.whole(begin + b"](" + b"h\x02h\x01R" * count + b"e")

    assert len(load_pickled(raw(4), lambda _: None)[0]) == 4
    with pytest.raises(PickleError, match="copies the same content again and again"):
        load_pickled(raw(17), lambda _: None)


def test_a_counter_is_read_wherever_torch_reads_one() -> None:
    found, _ = load_pickled(pickle.dumps({"n": Counter(a=2), "e": Counter()}, 2), lambda _: None)
    assert {type(value) for value in found.values()} == {Record}
    assert {value.kind for value in found.values()} == {"collections.Counter"}
    for argument in (b"K\x05", b"]]a"):
        with pytest.raises(PickleError):
            load_pickled(pickle_attacks.whole(pickle_attacks.call(b"collections", "Counter", argument)), lambda _: None)


def load(raw: bytes, **names: Any) -> Any:
    return Machine(raw, lambda module, name: names.get(name, Global(f"{module}.{name}"))).load()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_what_python_makes_of_them(protocol: int) -> None:
    shared = ["x", 1]
    value = {
        "numbers": [0, 1, 255, 256, 65_535, 65_536, -1, 1 << 31, -(1 << 40), 1 << 200, -(1 << 63), 2.5, float("inf")],
        "texts": ["", "é", "x" * 300, "\ud800", "\U0001f600" * 3],
        "others": [None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, {"a": {}}],
        "shared": [shared, shared],
        1: "a number", (1, "a"): "a tuple", None: 0, 2.5: 1, 1 << 70: 2,
        "many": list(range(3_000)),
        "long": {f"key {n}": (n, str(n)) for n in range(3_000)},
    }  # fmt: skip
    if protocol > 2:
        value[b"k"] = 3
        value["bytes"] = [b"", b"abc", b"\xff" * 300]
    raw = pickle.dumps(value, protocol)
    found = load(raw)
    assert found == value
    assert list(found) == list(value)
    assert found["shared"][0] is found["shared"][1]
    assert [type(key) for key in found] == [type(key) for key in value]


def test_a_tuple_in_itself_is_read() -> None:
    """Pickle writes it with POP: the only thing that does."""
    inner: list[Any] = []
    value = (inner, 1)
    inner.append(value)
    found = load(pickle.dumps(value, 4))
    assert found[0][0] is found


def test_objects_are_records_of_what_they_were_made_of() -> None:
    import argparse

    raw = pickle.dumps([argparse.Namespace(a=1, b=[2])] * 2, 4)
    one, other = load(raw, Namespace=recorded("Namespace"))
    assert one is other
    assert type(one) is Record
    assert (one.kind, one.state) == ("Namespace", {"a": 1, "b": [2]})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"0", "cut short or damaged"),  # POP of nothing
        (b"N(0N", None),  # POP of a mark
        (b"(N0a", "cut short or damaged"),  # beyond a mark
        (b"N(ta", "appends to a NoneType"),
        (b"}(Nu", "cut short or damaged"),
        (b"]Nb", "restores a list"),
        (b"NN\x81", "calls NoneType"),
        (b"h\x00", "cut short or damaged"),
        (b"j\x00\x00\x00", "cut short or damaged"),
        (b"X\x01\x00\x00\x00\xff", "a text that is none"),
        (b"NQ", "refers to something outside"),
        (b"S'x'\n", "opcode 0x53"),
        (b"\x82\x01", "opcode 0x82"),
        (b"cos\nsystem", "cut short or damaged"),
        (b"}]Ns", "a key that is a list"),
        (b"}N]\x86Ns", "a key with a list in it"),
        (b"NNN\x93", "computes the name"),
    ],
)
def test_a_broken_pickle_says_why(body: bytes, said: str | None) -> None:
    raw = pickle_attacks.whole(body)
    if said is None:
        assert load(raw) is None
        return
    with pytest.raises(PickleError, match=said):
        load(raw)


@pytest.mark.parametrize("raw", [b"", b"\x80", b"N.", b"\x80\x01N.", b"\x80\x06N.", b"garbage", b"\x80\x04N"])
def test_what_is_no_pickle_is_refused(raw: bytes) -> None:
    with pytest.raises(PickleError):
        load(raw)


def test_a_bug_in_what_stands_for_a_name_stays_a_bug() -> None:
    def broken(*_: Any) -> None:
        raise TypeError("a bug of ours")

    with pytest.raises(TypeError, match="a bug of ours"):
        load(pickle.dumps(pickle_attacks.fill, 4).replace(b"\x93", b"\x93)R"), fill=Global("x", broken))


@pytest.mark.parametrize("bug", [IndexError, KeyError, TypeError, struct.error])
@pytest.mark.parametrize("where", ["make", "find", "persistent"])
def test_a_bug_of_the_caller_is_not_taken_for_damage(bug: type[Exception], where: str) -> None:
    def broken(*_: Any) -> None:
        raise bug("a bug of ours")

    raw = pickle_attacks.whole(
        b"NQ" if where == "persistent" else pickle_attacks.name(b"m", "n") + (b")R" if where == "make" else b"")
    )
    find = broken if where == "find" else lambda *_: Global("x", broken)
    with pytest.raises(bug, match="a bug of ours"):
        Machine(raw, find, broken).load()
    with pytest.raises(PickleError, match="cut short or damaged"):
        Machine(raw[:-1], lambda *_: Global("x", lambda *_: None), lambda _: None).load()


@pytest.mark.fixtures
def test_metadata_of_real_checkpoints_is_what_torch_reads(torchrec_fixtures: Path) -> None:
    files = sorted(torchrec_fixtures.glob("*/.metadata"))
    assert files
    for file in files:
        raw = file.read_bytes()
        with limited_memory(MEMORY):
            found = decode_metadata(raw, where="x", file_sizes=lambda _: 1 << 40)
        expected = pickle.loads(raw)
        tensors = {k: v for k, v in expected.state_dict_metadata.items() if hasattr(v, "chunks")}
        assert {name: (t.shape, t.dtype) for name, t in found.tensors.items()} == {
            name: (tuple(t.size), str(t.properties.dtype).removeprefix("torch.")) for name, t in tensors.items()
        }
        assert set(found.objects) == set(expected.state_dict_metadata) - set(tensors)
        assert found.paths == expected.planner_data
        places = {(index.fqn, index.offset): info for index, info in expected.storage_data.items()}
        for name, tensor in found.tensors.items():
            assert [c.sizes for c in tensor.chunks] == [tuple(c.sizes) for c in tensors[name].chunks]
            for chunk in tensor.chunks:
                info = places[name, torch.Size(chunk.offsets)]
                assert (chunk.file, chunk.begin, chunk.num_bytes) == (info.relative_path, info.offset, info.length)
