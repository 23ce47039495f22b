"""A look at ``model.pt`` before torch maps it: whether the zip is one that ``torch.save`` wrote, and holds what it says.

``torch.load(weights_only=True)`` runs no code of a file, but with ``mmap`` it takes positions and lengths on trust: a
member that was packed again comes out as the packed bytes, a storage that claims more bytes than its member has goes on
into its neighbour, and a small member may unpack to any size. So each is held against the zip's directory first.
"""

from __future__ import annotations

import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from dist_export.errors import CheckpointError

_MAX_PICKLE_BYTES = 256 << 20
"""The names, shapes and positions of two million tensors."""
_LOCAL_HEADER_BYTES = 30
_REASON = re.compile(r"WeightsUnpickler error: .*?(?=\. Please use|$)|Trying to load unsupported .*", re.MULTILINE)
"""Behind it torch advises Python calls, which nobody can make from the command line."""

_ITEMSIZES = {
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Byte", "Char", "Bool", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4"), 1),
    "ComplexDouble": 16,
}
_STORAGES = {f"torch {name}Storage": itemsize for name, itemsize in _ITEMSIZES.items()}
_STORAGES["torch.storage UntypedStorage"] = 1
"""Storage class, as pickle names it -> bytes of an element."""


class StateArchive(NamedTuple):
    """What a zip of ``torch.save`` says of itself, checked."""

    pickled: bytes
    """The content of its ``data.pkl``."""
    storages: tuple[tuple[int, int], ...]
    """(position in the file, size in bytes) of each storage that the pickle asks for, in its order."""
    is_big_endian: bool
    """Whether torch would turn the bytes of each element around."""


def is_zip(file: IO[bytes]) -> bool:
    """Whether the file begins as a zip. What ``torch.save`` wrote before torch 1.6 is none."""
    file.seek(0)
    return file.read(4) == b"PK\x03\x04"


def say_refusal(error: Exception) -> str:
    """Return in one line why ``torch.load`` refused a file, without its advice to load it unprotected."""
    found = _REASON.search(str(error)) or re.search(r"\S.*", str(error))
    return found[0] if found else type(error).__name__


def check_state_archive(file: IO[bytes], *, where: str) -> StateArchive:
    """Refuse a zip that ``torch.save`` did not write, or that torch would read beyond or unpack. Reads no payload.

    Returns what it says of itself.

    Args:
        file: seekable; left anywhere.
        where: for messages.

    Raises:
        CheckpointError: it is cut short, a member is packed, overlaps another one or has its name, or a storage is not
            as long as the pickle says.
    """
    size = file.seek(0, 2)
    file.seek(max(size - 22, 0))
    end = file.read()
    # zipfile looks further up for a directory, torch does too, and they need not find the same one
    if end[:4] != b"PK\x05\x06" or end[-2:] != b"\0\0":
        raise CheckpointError(f"{where} is truncated, or no file of torch.save; save or copy it again")
    try:
        with zipfile.ZipFile(file) as archive:
            _refuse_numpy(archive, where)
            sizes, starts = _check_members(file, archive, where)
            roots = {name.split("/", 1)[0] for name in sizes}
            pickled = f"{next(iter(roots))}/data.pkl" if len(roots) == 1 else ""
            if pickled not in sizes:
                raise CheckpointError(f"{where} is a zip, but none that torch.save writes: it has no data.pkl")
            root = pickled.removesuffix("data.pkl")
            for name, num_bytes in sizes.items():  # torch reads all but the storages into memory
                if num_bytes > _MAX_PICKLE_BYTES and not name.startswith(f"{root}data/"):
                    raise CheckpointError(f"{where}: {name!r} has {num_bytes:,} bytes, more than any state_dict needs")
            raw = archive.read(pickled)
            order = f"{root}byteorder"
            is_big_endian = order in sizes and archive.read(order) == b"big"
    except (
        zipfile.BadZipFile,
        EOFError,
        OSError,
        ValueError,
        NotImplementedError,
        RuntimeError,
        struct.error,
    ) as error:
        raise CheckpointError(f"{where} is a damaged zip: {error}; save or copy it again") from None
    storages = []
    for key, num_bytes in _claimed_storages(raw, where):
        member = f"{root}data/{key}"
        if sizes.get(member) != num_bytes:
            has = f"has {sizes[member]:,}" if member in sizes else "is not there"
            raise CheckpointError(
                f"{where}: a tensor lies in {num_bytes:,} bytes of {member!r}, which {has}; it is damaged, or made to "
                "deceive"
            )
        storages.append((starts[member], num_bytes))
    return StateArchive(raw, tuple(storages), is_big_endian)


def _refuse_numpy(archive: zipfile.ZipFile, where: str) -> None:
    """Say of an archive that ``numpy.savez`` wrote, packed or not, what it is: it cannot be saved again as something else."""
    names = archive.namelist()
    if names and all(name.endswith(".npy") for name in names):
        raise CheckpointError(
            f"{where} is an archive of numpy (.npz) with {len(names)} arrays, no file of torch.save; arrays are no checkpoint of "
            "any format that is read here, so give the checkpoint itself"
        )


def _check_members(file: IO[bytes], archive: zipfile.ZipFile, where: str) -> tuple[dict[str, int], dict[str, int]]:
    """Return the size of each member by name, and the position of its content."""
    sizes: dict[str, int] = {}
    starts: dict[str, int] = {}
    seen: set[str] = set()
    end = 0
    for entry in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = entry.orig_filename
        if name.casefold() in seen:  # torch does not look at the case
            raise CheckpointError(f"{where}: two members are called {name!r}; it is no file of torch.save")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise CheckpointError(
                f"{where}: {name!r} is compressed or encrypted, which torch.save never does, and torch.load would take "
                "the packed bytes for values; save it again"
            )
        if entry.header_offset < end:
            raise CheckpointError(f"{where}: {name!r} overlaps the member before it; it is no file of torch.save")
        file.seek(entry.header_offset)
        header = file.read(_LOCAL_HEADER_BYTES)
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        starts[name] = entry.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        end = starts[name] + entry.file_size
        sizes[name] = entry.file_size
        seen.add(name.casefold())
    if end > archive.start_dir:
        raise CheckpointError(f"{where}: a member reaches into the zip's directory; it is damaged, or made to deceive")
    return sizes, starts


def _claimed_storages(raw: bytes, where: str) -> Iterator[tuple[str, int]]:
    """Yield (key, number of bytes) of each storage that the pickle asks for. Runs nothing: follows the stack alone."""
    try:
        claims = list(_persistent_ids(raw))
    except Exception as error:  # noqa: BLE001 -- pickletools raises anything on a broken pickle
        raise CheckpointError(f"{where} holds a broken pickle: {error}") from None
    for claim in claims:
        match claim:
            case ("storage", _Global(name), str(key), str(), int(numel)) if name in _STORAGES:
                yield key, numel * _STORAGES[name]
            case _:
                raise CheckpointError(f"{where} asks for what is no storage of a tensor; it is no file of torch.save")


class _Global:
    __match_args__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


_MARK = object()


def _persistent_ids(raw: bytes) -> Iterator[Any]:
    """Yield what stands on the stack at each BINPERSID, as far as it is made of texts, numbers, names and tuples."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(raw):
        name = opcode.name
        if name == "BINPERSID":
            yield stack.pop()
            stack.append(None)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "GLOBAL":
            stack.append(_Global(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_Global(f"{module} {attribute}"))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(_pop_to_mark(stack)))
        elif pickletools.markobject in opcode.stack_before:
            _pop_to_mark(stack)
            for _ in range(opcode.stack_before.index(pickletools.markobject)):
                stack.pop()
            stack.extend([None] * len(opcode.stack_after))
        elif not opcode.stack_before and len(opcode.stack_after) == 1:
            stack.append(argument)  # a text, a number, or None for whatever else is pushed
        else:
            for _ in opcode.stack_before:
                stack.pop()
            stack.extend([None] * len(opcode.stack_after))


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    place = len(stack) - 1
    while stack[place] is not _MARK:
        place -= 1
        if place < 0:
            raise IndexError("no mark on the stack")
    found = stack[place + 1 :]
    del stack[place:]
    return found
