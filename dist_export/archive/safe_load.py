"""Check ``exported_model.pt`` before torch opens it, because ``torch.export.load`` runs code that an archive contains.

Five kinds of content are code: pickles; size expressions, which sympy evaluates; guards; names of inputs and weights,
which are compiled, like guards, when the program becomes a module; and operators, which torch looks up anywhere in itself
(it finds ``torch.os.system`` by name). Each kind is compared with a list of what exported programs contain.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

from dist_export.archive.allowlist import (
    UnsafeContentError,
    check_attribute_name,
    check_pickle,
    check_program,
    expect,
    read_version,
)
from dist_export.errors import PackageError
from dist_export.formats.pickle_values import PickleError
from dist_export.formats.pickled_tensor import Storage
from dist_export.formats.torch_pickle import load_pickled

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Source: TypeAlias = str | os.PathLike[str] | bytes | IO[bytes]

MAX_MEMBERS = 100_000

_LOADING = threading.Lock()
"""torch loads one program at a time: it refuses a second thread that loads meanwhile."""

_LEGACY_PROGRAM = "serialized_exported_program.json"
_LEGACY_PICKLES = ("serialized_state_dict.pt", "serialized_constants.pt", "serialized_example_inputs.pt")
_WRITTEN_BY_TORCH = re.compile(r"^(\.data/.*|byteorder|version)$")
_PAYLOAD_CONFIG = re.compile(r"^data/(weights|constants)/.*_config\.json$", re.DOTALL)
_PAYLOAD_NAME = {"weights": re.compile(r"weight_\d+"), "constants": re.compile(r"tensor_\d+")}
_REBUILD = "export the model anew, or ask whoever sent the file"


@dataclass(frozen=True)
class ArchiveInfo:
    """The description of an archive that has passed the check."""

    format: Literal["pt2", "legacy"]
    schema_version: str
    """The version of the program's JSON, such as "8.20"."""
    member_names: tuple[str, ...]
    """The names in the zip, in its order, with the root folder if the archive has one."""


def check_archive(source: Source, *, tables: Collection[str] | None = None) -> ArchiveInfo:
    """Refuse an archive that is broken, or that would run code when torch loads or calls it. Needs no torch.

    Reads the whole file into memory, unpickles nothing and changes nothing.

    Args:
        source: A local path, the bytes, or a seekable binary file, which is left where it was.
        tables: of a score program, the tables that its lookups may name; None refuses lookups.

    Raises:
        PackageError: One line that names the file, the member, what was found there and what to do.
    """
    archive_info, _ = _read_checked(source, tables)
    return archive_info


def load_program(source: Source, *, tables: Collection[str] | None = None) -> ExportedProgram:
    """Check the archive, then load it with ``torch.export.load``. Memory holds the whole archive, for a while twice.

    torch reads a copy made of the checked members, because two zip readers can read one file differently. Each pickle is
    opened with ``weights_only=True`` before it is opened without.

    Args:
        source: as :func:`check_archive` takes it.
        tables: of a score program, the tables that its lookups may name. The lookup operator must be registered.

    Raises:
        PackageError: As :func:`check_archive`, and if torch cannot make a program from the content.
    """
    archive_info, members = _read_checked(source, tables)
    import torch

    label = _describe(source)
    for name, content in members.items():
        if _is_pickle_member(name) and content:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            except Exception as error:
                raise _refusal(label, name, f"torch cannot load it as weights only ({_one_line(error)})") from error
    copy = _repack_pt2(members) if archive_info.format == "pt2" else _repack_legacy(members)
    members.clear()
    try:
        return _load_quietly(copy)
    except Exception as error:
        raise PackageError(
            f"{label}: torch {torch.__version__} cannot load this program of schema {archive_info.schema_version} "
            f"({_one_line(error)}); load it with the torch that wrote it, or {_REBUILD}"
        ) from error


def _read_checked(source: Source, tables: Collection[str] | None) -> tuple[ArchiveInfo, dict[str, bytes]]:
    """Return the archive's description and its members, with names relative to the root folder."""
    label = _describe(source)
    data = _read(source, label)
    raw = _read_zip(data, label)
    names = tuple(raw)
    if "version" in raw and _LEGACY_PROGRAM in raw:
        return ArchiveInfo("legacy", _check_legacy(raw, label, tables), names), raw
    roots = {name.split("/", 1)[0] for name in names}
    # torch writes no member with the name of the root folder itself
    if len(roots) != 1 or f"{next(iter(roots))}/archive_format" not in raw or not roots.isdisjoint(raw):
        raise _refusal(label, names[0], "neither a PT2 archive nor the legacy layout of torch.export.save")
    members = {name.split("/", 1)[1]: content for name, content in raw.items()}
    return ArchiveInfo("pt2", _check_pt2(members, label, tables), names), members


def _describe(source: Source) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else "<archive in memory>"


def _read(source: Source, label: str) -> bytes:
    try:
        if isinstance(source, bytes):
            return source
        if isinstance(source, (str, os.PathLike)):
            return Path(source).read_bytes()
        position = source.tell()
        try:
            source.seek(0)
            return source.read()
        finally:
            source.seek(position)
    except OSError as error:
        raise PackageError(f"{label}: cannot be read ({_one_line(error)})") from error


def _read_zip(data: bytes, label: str, inside: str = "") -> dict[str, bytes]:
    """Return every member of a zip. The sizes in its directory are checked before any member is unpacked."""
    where = f"{label}: {inside}" if inside else label
    # zipfile also searches further up for a directory; in a truncated archive it finds that of a zip inside.
    if not data.startswith(b"PK\x03\x04") or data[-22:-18] != b"PK\x05\x06" or any(data[-2:]):
        raise PackageError(
            f"{where}: not a zip archive, or truncated (it does not begin and end as one); copy it again"
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            _check_directory(infos, len(data), label, inside)
            return {entry.filename: archive.read(entry) for entry in infos}
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise PackageError(f"{where}: not a zip archive, or truncated ({_one_line(error)}); copy it again") from error


def _check_directory(infos: list[zipfile.ZipInfo], num_bytes: int, label: str, inside: str) -> None:
    at = f"{inside}/" if inside else ""
    if not infos or min(entry.header_offset for entry in infos) != 0:
        raise _refusal(label, inside or "(directory)", "a directory of nothing, or of another file's members")
    if len(infos) > MAX_MEMBERS:
        raise _refusal(label, inside or "(directory)", f"{len(infos):,} members, more than {MAX_MEMBERS:,}")
    # Readers that ignore case find the first of two equal names, and zipfile finds the last.
    count = Counter(entry.filename.casefold() for entry in infos)
    total = 0
    for entry in infos:
        name = entry.orig_filename
        parts = name.split("/")
        if name != entry.filename or not name or "\\" in name or ":" in parts[0] or {"", ".", ".."}.intersection(parts):
            raise _refusal(label, at + repr(name)[1:-1], "a member name that leaves the archive or is malformed")
        if count[name.casefold()] > 1:
            raise _refusal(label, at + name, "two members of this name")
        # torch stores its members uncompressed, so that none can unpack to more than the file
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise _refusal(label, at + name, "a member that is compressed or encrypted")
        total += entry.file_size
    if total > num_bytes:
        raise _refusal(label, inside or "(directory)", f"{total:,} bytes of members in a file of {num_bytes:,}")


def _check_pt2(members: dict[str, bytes], label: str, tables: Collection[str] | None) -> str:
    if members["archive_format"] != b"pt2":
        raise _refusal(label, "archive_format", f"{members['archive_format'][:20]!r} where 'pt2' was expected")
    if members.get("byteorder", b"little").decode(errors="replace") != sys.byteorder:
        raise _refusal(
            label,
            "byteorder",
            f"{members.get('byteorder', b'little')[:20]!r}, and this machine is {sys.byteorder} endian",
        )
    schema_version = None
    for name, content in members.items():
        if name.startswith("data/aotinductor/"):
            raise _refusal(label, name, "compiled code, which loading would run")
        if name == "models/model.json":
            schema_version = _check_json_program(content, label, name, tables)
        elif name.startswith("models/"):
            raise _refusal(label, name, "a second program, where torch.export.save writes one")
        elif config := _PAYLOAD_CONFIG.match(name):
            _check_payloads(members, label, name, config[1])
        elif _is_pickle_member(name):
            _check_torch_pickle(content, label, name)
    if schema_version is None:
        raise _refusal(label, "models/model.json", "no such member, so no program")
    return schema_version


def _check_legacy(members: dict[str, bytes], label: str, tables: Collection[str] | None) -> str:
    for name in _LEGACY_PICKLES:
        if name not in members:
            raise _refusal(label, name, "no such member")
    for name, content in members.items():
        if _is_pickle_member(name):
            _check_torch_pickle(content, label, name)
        elif name in ("serialized_state_dict.json", "serialized_constants.json"):
            raise _refusal(label, name, "a member of torch 2.1, which is a pickle in spite of its name")
    return _check_json_program(members[_LEGACY_PROGRAM], label, _LEGACY_PROGRAM, tables)


def _check_json_program(content: bytes, label: str, name: str, tables: Collection[str] | None) -> str:
    try:
        document = _parse_json(content)
        check_program(document, tables)
        return read_version(document)
    except UnsafeContentError as error:
        raise _refusal(label, name, str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _refusal(label, name, f"not the JSON of an exported program ({_one_line(error)})") from error


def _parse_json(content: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            raise UnsafeContentError("an object that has one key twice")
        return parsed

    document = json.loads(content, object_pairs_hook=unique)
    if not isinstance(document, dict):
        raise ValueError("not an object")  # noqa: TRY004 -- json raises the same for text that is not JSON
    return document


def _check_payloads(members: dict[str, bytes], label: str, name: str, folder: str) -> None:
    try:
        payloads = expect(_parse_json(members[name]).get("config"), dict, "config")
        for fqn, entry in payloads.items():
            check_attribute_name(fqn)
            payload = expect(entry, dict, f"{fqn!r}")
            path = expect(payload.get("path_name"), str, f"the path of {fqn!r}")
            if payload.get("use_pickle") is not False or not _PAYLOAD_NAME[folder].fullmatch(path):
                raise _refusal(label, name, f"{fqn!r} is a pickled or custom object ({path!r})")
            if f"data/{folder}/{path}" not in members:
                raise _refusal(label, name, f"{fqn!r} is in {path!r}, which is not in the archive")
    except UnsafeContentError as error:
        raise _refusal(label, name, str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _refusal(label, name, f"not a table of payloads ({_one_line(error)})") from error


def _is_pickle_member(name: str) -> bool:
    return name.endswith((".pt", ".pth", ".pkl"))


def _check_torch_pickle(content: bytes, label: str, name: str) -> None:
    """Refuse a file that ``torch.load`` would not read as a plain ``torch.save`` zip, then check the pickle in it."""
    if not content:  # no example inputs
        return
    members = _read_zip(content, label, name)
    roots = {member.split("/", 1)[0] for member in members}
    pickles = [member for member in members if member.endswith(".pkl")]
    root = next(iter(roots))
    # constants.pkl would make torch.load read the file as TorchScript, which is code.
    if len(roots) != 1 or pickles != [f"{root}/data.pkl"] or any(".py" in m or "/code/" in m for m in members):
        raise _refusal(label, name, "not the layout of torch.save")
    try:
        check_pickle(members[pickles[0]])
        load_pickled(members[pickles[0]], lambda storage: _check_storage(storage, members, root), is_any_known=True)
    except UnsafeContentError as error:
        raise _refusal(label, name, str(error)) from error
    except PickleError as error:
        raise _refusal(label, name, f"a pickle that {error}") from error


def _check_storage(storage: Storage, members: dict[str, bytes], root: str) -> None:
    content = members.get(f"{root}/data/{storage.key}")
    if content is None or len(content) != storage.num_bytes:
        raise PickleError(f"has a storage of {storage.num_bytes:,} bytes that the archive does not hold")


def _repack_pt2(members: dict[str, bytes]) -> io.BytesIO:
    import torch

    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)  # noqa: SLF001 -- aligns the members as torch's reader requires
    for name, content in members.items():
        if not _WRITTEN_BY_TORCH.match(name):
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    buffer.seek(0)
    return buffer


def _repack_legacy(members: dict[str, bytes]) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    buffer.seek(0)
    return buffer


def _load_quietly(file: io.BytesIO) -> ExportedProgram:
    """Load without torch's warnings that a legacy archive is not a PT2 archive, because that is intended."""
    import logging

    import torch

    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.export.pt2_archive._package")]
    with _LOADING:
        levels = [logger.level for logger in loggers]
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            return torch.export.load(file)
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def _refusal(label: str, member: str, found: str) -> PackageError:
    return PackageError(f"{label}: {member}: {found}; not loaded: {_REBUILD}")
