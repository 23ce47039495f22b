"""Pickles of a few bytes, or of many, that would take gigabytes or for ever, put together by hand."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator

SIZE = 1 << 18
LARGE = 1 << 20
"""Of attacks on the time alone. They are refused at their first steps, so they cost no more than small ones."""
META = b"torch.distributed.checkpoint.metadata"


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(module: bytes, attribute: str) -> bytes:
    return b"c" + module + b"\n" + attribute.encode() + b"\n"


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def whole(body: bytes, protocol: int = 2) -> bytes:
    return bytes([0x80, protocol]) + body + b"."


def repeat(body: bytes, once: bytes = b"", *, begin: bytes = b"", end: bytes = b"", room: int = SIZE) -> bytes:
    """``once``, then ``body`` until the room is full."""
    count = max((room - len(once) - len(begin) - len(end) - 16) // len(body), 1)
    return whole(once + begin + body * count + end, 4)


def doubling(kind: bytes, steps: int = 60) -> bytes:
    """A tuple of two of a tuple of two of ..., on the stack."""
    return b")" + b"".join(b"q%c" % n + b"h%c" % n + kind for n in range(steps))


def record(kind: str, module: bytes = META, **fields: bytes) -> bytes:
    body = b"".join(text(key) + value for key, value in fields.items())
    return name(module, kind) + b")\x81}(" + body + b"ub"


def size(*numbers: int) -> bytes:
    return name(b"torch", "Size") + b"(" + b"".join(map(number, numbers)) + b"t\x85R"


def metadata(described: bytes = b"}", stored: bytes = b"}", **more: bytes) -> bytes:
    return record("Metadata", state_dict_metadata=described, storage_data=stored, **more)


def tensor(sizes: bytes, chunks: bytes, properties: bytes | None = None) -> bytes:
    if properties is None:
        properties = name(META, "TensorProperties") + b")\x81" + name(b"torch", "float32") + b"\x85b"
    return record("TensorStorageMetadata", size=sizes, chunks=chunks, properties=properties)


def info() -> bytes:
    module = b"torch.distributed.checkpoint.filesystem"
    return record("_StorageInfo", module, relative_path=text("f"), offset=b"K\0", length=b"K\1")


def colliding_tuples() -> Iterator[bytes]:
    """Pairs of numbers whose tuples have one hash: solved for the second number (CPython's Objects/tupleobject.c)."""
    mask, p1, p2, p5 = (1 << 64) - 1, 11400714785074694791, 14029467366897019727, 2870177450012600261

    def step(seed: int, lane: int) -> int:
        seed = (seed + lane * p2) & mask
        return ((seed << 31 | seed >> 33) & mask) * p1 & mask

    inverse, wanted = pow(p2, -1, 1 << 64), step(p5, 1) + 7 * p2
    for first in itertools.count(1):
        second = (wanted - step(p5, first)) * inverse & mask
        if second < (1 << 61) - 1:
            assert hash((first, second)) == hash((1, 7))
            yield number(first) + number(second) + b"\x86"


def fill(pieces: Iterator[bytes], *, room: int = SIZE - 100) -> bytes:
    out = bytearray()
    for piece in pieces:
        if len(out) + len(piece) > room:
            break
        out += piece
    return bytes(out)


def many_tensors(one: bytes, used: bytes = b"}") -> bytes:
    """One description under as many names as there is room for."""
    entries = fill((text(f"{n:x}") + b"h\x00" for n in itertools.count()), room=SIZE - len(one) - len(used) - 1000)
    return whole(metadata(one + b"q\x000}(" + entries + b"u", used))


def shared_chunks() -> bytes:
    """Each of many tensors has all of many chunks, of no elements."""
    chunk = record("ChunkStorageMetadata", offsets=size(0), sizes=size(0)) + b"q\x000"
    names = [text(f"{n:x}") for n in range(3_000)]
    stored = b"".join(record("MetadataIndex", fqn=n, offset=size(0)) + b"h\x01" for n in names)
    one = chunk + info() + b"q\x010" + tensor(size(0), b"](" + b"h\x00" * 50_000 + b"e") + b"q\x020"
    entries = b"".join(n + b"h\x02" for n in names)
    return whole(one + metadata(b"}(" + entries + b"u", b"}(" + stored + b"u"))


def large_grids() -> bytes:
    """Tensors of 2^24 cells each, made of 25 chunks: halves along each of 24 dimensions."""
    dims = 24
    chunks = b""
    for cut in range(dims + 1):
        offsets = [1] * cut + [0] * (dims - cut)
        sizes = ([1] * (cut + 1) + [2] * (dims - cut - 1))[:dims]
        chunks += record("ChunkStorageMetadata", offsets=size(*offsets), sizes=size(*sizes))
    one = tensor(size(*[2] * dims), b"](" + chunks + b"e")
    names = [f"{n:x}" for n in range(40)]
    stored = b"".join(
        record("MetadataIndex", fqn=text(n), offset=size(*([1] * cut + [0] * (dims - cut)))) + info()
        for n in names
        for cut in range(dims + 1)
    )
    entries = b"".join(text(n) + b"h\x00" for n in names)
    return whole(metadata(one + b"q\x000}(" + entries + b"u", b"}(" + stored + b"u"))


def named(value: bytes, **more: bytes) -> bytes:
    """Metadata with one tensor ``t``, which is this."""
    return whole(metadata(b"}" + text("t") + value + b"s", **more))


FEW_BYTES: dict[str, Callable[[], bytes]] = {
    "a key of 2^60 parts": lambda: whole(b"}" + doubling(b"\x86") + b"Ns"),
    "a member of a set of 2^60 parts": lambda: whole(b"\x8f(" + doubling(b"\x86") + b"\x90", 4),
    "a frozen set of sets of 2^60 parts": lambda: whole(b"(" + doubling(b"\x86") + b"\x91", 4),
    "a key of a hundred thousand tuples in each other": lambda: whole(b"})" + b"\x85" * 100_000 + b"Ns"),
    "a memo of four thousand million": lambda: whole(b"Nr\xff\xff\xff\xff"),
    "a memo of a hundred million": lambda: whole(b"Nr\x00\xe1\xf5\x05"),
    "a frame of 2^60 bytes": lambda: whole(b"\x95" + bytes(7) + b"\x10N", 4),
    "bytes of a terabyte": lambda: whole(b"\x8e" + struct.pack("<Q", 1 << 40), 4),
    "a bytearray of a terabyte": lambda: whole(b"\x96" + struct.pack("<Q", 1 << 40), 5),
    "a text of a terabyte": lambda: whole(b"\x8d" + struct.pack("<Q", 1 << 40), 4),
}
"""For every reader of pickles."""

ANYWHERE: dict[str, Callable[[], bytes]] = {
    **FEW_BYTES,
    "a number of a megabyte, as key again and again": lambda: whole(
        b"\x8b" + struct.pack("<i", LARGE // 2) + b"\x01" * (LARGE // 2) + b"q\x000}(" + b"h\x00N" * (LARGE // 8) + b"u"
    ),
    "a hundred thousand numbers of one hash": lambda: whole(
        b"}(" + fill((number(n * ((1 << 61) - 1)) + b"N" for n in itertools.count(1)), room=LARGE) + b"u"
    ),
    "a hundred thousand tuples of one hash": lambda: whole(
        b"}(" + fill((t + b"N" for t in colliding_tuples()), room=LARGE) + b"u"
    ),
    "two long texts that are equal, as keys": lambda: repeat(
        b"h\x01N", text(b"x" * 300_000) + b"q\x000" + text(b"x" * 300_000) + b"q\x010}(h\x00N", end=b"u", room=LARGE
    ),
    "a million dicts": lambda: repeat(b"}"),
    "a million dicts of one": lambda: repeat(b"}NNs"),
    "a million sets": lambda: repeat(b"\x8f"),
    "a million lists": lambda: repeat(b"]"),
    "a million marks": lambda: repeat(b"("),
    "a million tuples": lambda: repeat(b"\x85", b")"),
    "a million in the memo": lambda: repeat(b"\x94", b"N"),
    "a million copies of the top": lambda: repeat(b"2", b"N"),
    "one state for many objects": lambda: repeat(
        b"h\x01)\x81h\x00b",
        b"}(" + fill((text(f"{n:x}") + b"N" for n in itertools.count()), room=SIZE // 2) + b"uq\x000"
        + name(META, "StorageMeta") + b"q\x010",
    ),
    "calls with a hundred thousand arguments": lambda: repeat(
        b"h\x01h\x00R0", b"(" + b"N" * (SIZE // 2) + b"tq\x000" + name(META, "StorageMeta") + b"q\x010"
    ),
    "a name of a megabyte, asked for again and again": lambda: repeat(
        b"h\x00h\x00\x93", text(b"x" * (SIZE // 2)) + b"q\x000"
    ),
}  # fmt: skip
"""The same, and what is small but many: for what they all read with."""

METADATA: dict[str, Callable[[], bytes]] = {
    **FEW_BYTES,
    "sizes of 2^60 parts": lambda: named(tensor(doubling(b"\x86"), b"]")),
    "a list of sizes, copied again and again": lambda: repeat(
        b"h\x01h\x00R0", b"](" + b"N" * (SIZE // 2) + b"e\x85q\x000" + name(b"torch", "Size") + b"q\x010"
    ),
    "a path that is joined to itself": lambda: whole(
        text(b"x" * 1000) + b"q\x00" + name(b"pathlib", "PosixPath") + b"q\x0100"
        + (b"h\x01(" + b"h\x00" * 50 + b"tRq\x000") * 20 + b"N"
    ),
    "a dtype of 2^60 parts": lambda: named(
        tensor(size(0), b"]", record("TensorProperties", dtype=record("StorageMeta", name=doubling(b"\x86"))))
    ),
    "a length of 2^60 parts": lambda: named(
        tensor(size(1), b"](" + record("ChunkStorageMetadata", offsets=size(0), sizes=size(1)) + b"e"),
    )[:-1] + b".",
    "a path of keys of 2^60 parts": lambda: whole(metadata(planner_data=b"}" + text("t") + doubling(b"\x86") + b"s")),
    "one path of keys for many names": lambda: whole(
        metadata(
            planner_data=b"(" + text("p" * 60) * 60 + b"tq\x000}("
            + fill((text(f"{n:x}") + b"h\x00" for n in itertools.count()), room=SIZE - 8000) + b"u"
        )
    ),
    "one tensor of 64 dimensions under many names": lambda: many_tensors(tensor(size(*[0] * 64), b"]")),
    "chunks that many tensors share": shared_chunks,
    "grids of 2^24 cells": large_grids,
    "names of thousands of steps": lambda: whole(
        metadata(
            b"}(" + fill(text(f"{n:x}" + ".state" * 8_000) + tensor(size(0), b"]") for n in itertools.count()) + b"u"
        )
    ),
    "many names of many steps": lambda: whole(
        metadata(
            b"}(" + fill(text(f"{n:x}" + ".state" * 60) + tensor(size(0), b"]") for n in itertools.count()) + b"u"
        )
    ),
}  # fmt: skip
"""For the metadata of DCP."""


STORAGE = b"(" + text("storage") + name(b"torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04tQ"  # of 16 bytes
UTILS = b"torch._utils"


def view(
    *sizes: int, strides: tuple[int, ...], function: str = "_rebuild_tensor_v2", storage: bytes = STORAGE
) -> bytes:
    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    return (
        name(UTILS, function) + b"(" + storage + b"K\0" + numbers(sizes) + numbers(strides) + b"\x89"
        + name(b"collections", "OrderedDict") + b")RtR"
    )  # fmt: skip


def call(module: bytes, function: str, *arguments: bytes) -> bytes:
    return name(module, function) + b"(" + b"".join(arguments) + b"tR"


def holding(value: bytes) -> bytes:
    return whole(b"}" + text("t") + value + b"s")


EXPANDED = view(1 << 40, strides=(0,))
FLOAT16 = name(b"torch", "float16")
MANY_ENTRIES = b"}(" + fill((text(f"a{n:x}") + b"N" for n in itertools.count()), room=SIZE // 2) + b"u"
TORCH: dict[str, Callable[[], bytes]] = {
    **FEW_BYTES,
    "a bytearray of a number": lambda: holding(call(b"builtins", "bytearray", number(1 << 40))),
    "a tensor of a size": lambda: holding(call(b"torch", "FloatTensor", number(1 << 40))),
    "a new tensor of a size": lambda: holding(name(b"torch", "Tensor") + number(1 << 40) + b"\x85\x81"),
    "an odd codec": lambda: holding(call(b"_codecs", "encode", text("x" * 400_000), text("punycode"))),
    "one text encoded again and again": lambda: repeat(
        b"h\x01h\x00R0",
        text("x" * (SIZE // 2)) + text("latin1") + b"\x86q\x000" + name(b"_codecs", "encode") + b"q\x010",
    ),
    "one list made a set again and again": lambda: repeat(
        b"h\x01h\x00R0", b"](" + b"N" * (SIZE // 2) + b"e\x85q\x000" + name(b"builtins", "set") + b"q\x010"
    ),
    "one dict counted again and again": lambda: repeat(
        b"h\x01h\x00R0", MANY_ENTRIES + b"\x85q\x000" + name(b"collections", "Counter") + b"q\x010"
    ),
    "one state for many dicts": lambda: repeat(
        b"h\x01)Rh\x00b", MANY_ENTRIES + b"q\x000" + name(b"collections", "OrderedDict") + b"q\x010"
    ),
    "one state for many parameters": lambda: repeat(
        b"h\x01h\x00R0",
        b"(" + view(4, strides=(1,)) + b"\x89}" + MANY_ENTRIES + b"tq\x000"
        + name(UTILS, "_rebuild_parameter_with_state") + b"q\x010",
    ),
    "one state for many tensors of a class": lambda: repeat(
        b"h\x01h\x00R0",
        b"(" + name(UTILS, "_rebuild_tensor_v2") + name(b"torch", "Tensor") + b"(" + STORAGE + b"K\0K\4\x85K\1\x85\x89}t"
        + MANY_ENTRIES + b"tq\x000" + name(b"torch._tensor", "_rebuild_from_type_v2") + b"q\x010",
    ),
    "a set of tuples of 2^60 parts": lambda: holding(call(b"builtins", "set", b"]" + doubling(b"\x86") + b"a")),
    "a cast of an expanded tensor": lambda: holding(
        call(UTILS, "_rebuild_device_tensor_from_cpu_tensor", EXPANDED, FLOAT16, text("cpu"), b"\x89")
    ),
    "a quantized tensor of a terabyte": lambda: holding(
        name(UTILS, "_rebuild_qtensor") + b"(" + STORAGE + b"K\0" + number(1 << 40) + b"\x85K\0\x85"
        + b"(" + name(b"torch", "per_tensor_affine") + b"K\1K\0t\x89" + name(b"collections", "OrderedDict") + b")RtR"
    ),
    "a sparse tensor of expanded ones": lambda: holding(
        call(
            UTILS, "_rebuild_sparse_tensor", call(b"torch.serialization", "_get_layout", text("torch.sparse_coo")),
            b"(" + EXPANDED + EXPANDED + number(1 << 40) + b"\x85t",
        )
    ),
    "a nested tensor of expanded ones": lambda: holding(
        call(UTILS, "_rebuild_nested_tensor", EXPANDED, EXPANDED, EXPANDED, EXPANDED)
    ),
    "a tensor that is set to a size": lambda: holding(
        view(4, strides=(1,)) + b"(" + STORAGE + b"K\0" + number(1 << 40) + b"\x85K\1\x85tb"
    ),
    "a tensor beyond its storage": lambda: holding(view(1 << 40, strides=(1,))),
    "a call within a call": lambda: holding(
        call(b"torch._tensor", "_rebuild_from_type_v2", name(b"torch", "FloatTensor"), name(b"torch", "Tensor"),
             number(1 << 40) + b"\x85", b"}")
    ),
    "lists in lists, many times over": lambda: holding(
        b"]q\x000" + b"".join(b"](" + b"h%c" % n * 9 + b"eq%c" % (n + 1) + b"0" for n in range(40)) + b"h\x28"
    ),
    "one tensor under many names": lambda: whole(
        view(4, strides=(1,)) + b"q\x000}(" + fill((text(f"{n:x}") + b"h\x00" for n in itertools.count()), room=SIZE - 400)
        + b"u"
    ),
    "one long name above many tensors": lambda: whole(
        view(4, strides=(1,)) + b"q\x000}(" + text("x" * 60_000) + b"}("
        + fill((text(f"{n:x}") + b"h\x00" for n in itertools.count()), room=SIZE - 70_000) + b"uu"
    ),
    "names of many steps": lambda: whole(
        view(4, strides=(1,)) + b"q\x000}("
        + fill((text(f"{n:x}" + ".state" * 600) + b"h\x00" for n in itertools.count()), room=SIZE - 400) + b"u"
    ),
}  # fmt: skip
"""For what torch.save writes, with one storage, ``0``, of 16 bytes."""

SAMPLES: dict[str, Callable[[], bytes]] = {
    **FEW_BYTES,
    "a storage that claims a terabyte": lambda: whole(
        view(4, strides=(1,), storage=call(b"torch.storage", "_load_from_bytes", b"B" + legacy(1 << 40))), 4
    ),
    "a memo in a storage": lambda: whole(
        view(4, strides=(1,), storage=call(b"torch.storage", "_load_from_bytes", b"B" + sized(whole(b"Nr\xff\xff\xff\xff")))),
        4,
    ),
    "one storage for many tensors": lambda: repeat(
        b"h\x01h\x00R",
        b"(" + call(b"torch.storage", "_load_from_bytes", b"B" + legacy(4)) + b"K\0K\4\x85K\1\x85\x89}tq\x000"
        + name(UTILS, "_rebuild_tensor_v2") + b"q\x010(",
        end=b"t",
    ),
    "one storage loaded again and again": lambda: repeat(
        b"h\x01h\x00R",
        b"B" + sized(bytes(SIZE // 2)) + b"\x85q\x000" + name(b"torch.storage", "_load_from_bytes") + b"q\x010(",
        end=b"t",
    ),
}  # fmt: skip
"""For the sample of a package."""


def sized(raw: bytes) -> bytes:
    return struct.pack("<I", len(raw)) + raw


def legacy(numel: int) -> bytes:
    """A storage of four numbers in the older format that says it has this many, with the length before it."""
    content = b"(" + text("storage") + name(b"torch", "FloatStorage") + text("0") + text("cpu") + number(numel) + b"NtQ"
    pickles = [number(0x1950A86A20F9469CFC6C), b"M\xe9\x03", b"}", content, b"]" + text("0") + b"a"]
    return sized(b"".join(map(whole, pickles)) + struct.pack("<q", 4) + bytes(16))
