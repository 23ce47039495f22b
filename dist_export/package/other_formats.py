"""Load the further formats of the dense arch from an open package: the ONNX file, and native code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from dist_export.errors import PackageError, UserError
from dist_export.formats.digests import algorithm_of, digest_bytes
from dist_export.manifest import FormatEntry, Manifest
from dist_export.package.opened_files import OpenedFiles
from dist_export.storage.directory import Directory

if TYPE_CHECKING:
    from dist_export.archive.native_program import NativeProgram
    from dist_export.archive.onnx_model import OnnxProgram


class Opened(Protocol):
    """What is asked of an open package."""

    directory: Directory
    files: OpenedFiles
    manifest: Manifest


def load_onnx(package: Opened) -> OnnxProgram:
    """See :meth:`~dist_export.package.reader.Package.load_onnx`."""
    from dist_export.archive.onnx_model import OnnxProgram

    entry = _find(package, "onnx")
    assert package.manifest.dense is not None
    names = [output.name for output in package.manifest.dense.outputs]
    return OnnxProgram(package.files.read(entry.file), names, where=package.directory.describe(entry.file))


def load_native_program(package: Opened, *, allow_native_code: bool) -> NativeProgram:
    """See :meth:`~dist_export.package.reader.Package.load_native_program`."""
    from dist_export.archive.native_program import NativeProgram, explain_wrong_machine

    entry = _find(package, "aoti")
    where = package.directory.describe(entry.file)
    if not allow_native_code:
        raise UserError(
            f"{where} is native code, which runs as soon as it is loaded; pass allow_native_code=True if you trust its source"
        )
    content = package.files.read(entry.file)
    digest = next((file.digest for file in package.manifest.files if file.path == entry.file), "")
    if not digest or digest_bytes(content, algorithm_of(digest)) != digest:
        raise PackageError(f"{where} is not what the manifest says; it was not loaded. `verify` reports the difference")
    machine = "" if entry.machine is msgspec.UNSET else entry.machine
    wrong = explain_wrong_machine(machine, () if entry.features is msgspec.UNSET else entry.features)
    if wrong:
        raise PackageError(f"{where} cannot run here: {wrong}. Use load_program, or export on such a machine")
    return NativeProgram(content, where=where)


def _find(package: Opened, name: str) -> FormatEntry:
    dense = package.manifest.dense
    formats = () if dense is None or dense.formats is msgspec.UNSET else dense.formats
    found = next((entry for entry in formats if entry.format == name), None)
    if found is None:
        has = ", ".join(entry.format for entry in formats) or "none"
        raise PackageError(
            f"{package.directory.url}: the dense arch has no format {name!r} (further formats: {has}); export with "
            f"dense_formats: [{name}]"
        )
    return found
