"""Score with a package alone: its score program, with rows from its shards. Imports torch, and no code of the model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np
import torch

from dist_export.archive.lookup_operator import RowSource, bind, list_lookups, register_source
from dist_export.archive.safe_load import load_program
from dist_export.errors import PackageError, UserError
from dist_export.formats.recis import EMBEDDING_SLOT
from dist_export.formats.row_encodings import widen_bfloat16
from dist_export.manifest import Manifest, ScoreEntry, TableEntry
from dist_export.package.opened_files import OpenedFiles
from dist_export.package.score_inputs import read_inputs
from dist_export.storage.directory import Directory

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_PACKAGE = "dist_export_rows"
"""In the graph module's ``meta``: keeps the package open as long as the program is used."""


class ScoredPackage(Protocol):
    """What scoring needs of an open :class:`~dist_export.package.reader.Package`."""

    directory: Directory
    files: OpenedFiles
    manifest: Manifest

    def table(self, name: str) -> TableEntry:
        """Return a table's entry in the manifest."""

    def lookup(self, table: str, ids: Any, *, slot: str = ..., raw: bool = ...) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of ids, and whether each has one."""


class PackageRows:
    """Gives the lookup operator the rows of one open package. Any thread."""

    def __init__(self, package: ScoredPackage) -> None:
        self._package = package
        self._kinds: dict[str, tuple[tuple[int, ...], torch.dtype, bool]] = {}

    def describe_rows(self, table: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and the dtype of one row: rows of int8 with scale and bias are float32."""
        shape, dtype, _ = self._kind(table)
        return shape, dtype

    def find_rows(self, table: str, ids: np.ndarray) -> torch.Tensor:
        """Return the rows (n, ...) of ids (int64, (n,)), with the default row for out-of-vocabulary ids."""
        shape, dtype, is_encoded = self._kind(table)
        rows, _ = self._package.lookup(table, ids, raw=not is_encoded)
        found = torch.from_numpy(np.ascontiguousarray(rows))
        return found if is_encoded else found.reshape(-1).view(dtype).reshape(len(ids), *shape)

    def _kind(self, table: str) -> tuple[tuple[int, ...], torch.dtype, bool]:
        if table not in self._kinds:
            entry = self._package.table(table)
            slot = next((slot for slot in entry.kept if slot.name == EMBEDDING_SLOT), None)
            dtype = None if slot is None else getattr(torch, slot.dtype, None)
            if slot is None or not isinstance(dtype, torch.dtype):
                raise PackageError(f"{self._package.directory.url}: table {table!r} has no embedding that can be read")
            is_encoded = slot.encoding is not msgspec.UNSET
            shape = (int(slot.dim),) if is_encoded and slot.dim is not msgspec.UNSET else slot.shape
            self._kinds[table] = shape, torch.float32 if is_encoded else dtype, is_encoded
        return self._kinds[table]


def bind_program(program: ExportedProgram, rows: RowSource) -> ExportedProgram:
    """Let the lookups of a program read from ``rows``, which stays as long as the program. Returns the program."""
    bind(program.graph_module, register_source(rows))
    program.graph_module.meta[_PACKAGE] = rows
    return program


def load_score_program(package: ScoredPackage, *, rows: RowSource | None = None) -> ExportedProgram:
    """Return the score program of a package, bound to it. Its archive is checked before anything is unpickled.

    ``rows`` gives the rows; None takes the package's own, and keeps it open as long as the program is used.

    Raises:
        PackageError: there is no score program, or it is damaged.
    """
    entry = score_entry(package)
    data = package.files.read(entry.program)
    program = load_program(data, tables={table.name for table in package.manifest.tables})
    named = {table for _, table in list_lookups(program.graph_module)}
    if named != set(entry.tables):
        raise PackageError(
            f"{package.files.describe(entry.program)}: looks rows up in {', '.join(sorted(named)) or 'no table'}, the manifest "
            f"says {', '.join(entry.tables)}"
        )
    return bind_program(program, PackageRows(package) if rows is None else rows)


def score_entry(package: ScoredPackage) -> ScoreEntry:
    """Return what the manifest says of the score program. PackageError if there is none."""
    entry = package.manifest.score
    if entry is msgspec.UNSET:
        raise PackageError(
            f"{package.directory.url}: the package has no score program; its manifest's notes say why. Export it with "
            "score_program: require to see the reason as an error"
        )
    return entry


class Scorer:
    """Scores batches with one package. Any thread."""

    def __init__(self, package: ScoredPackage) -> None:
        self._entry = score_entry(package)
        self._url = package.directory.url
        # a proxy, because the package keeps this object: it is closed when its last user is gone
        self._module = load_score_program(package, rows=PackageRows(weakref.proxy(package))).module()

    def score(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the outputs of a batch by name. Tensors that the program does not take are passed over.

        Raises:
            UserError: an input is missing, has another dtype or shape, or holds a value that the program's dtype cannot hold.
        """
        given = read_inputs(self._entry.inputs, inputs, where=self._url)
        try:
            with torch.no_grad():
                found = self._module(**given)
        except (RuntimeError, AssertionError) as error:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in given.items())
            text = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"{self._url}: the score program refuses inputs of these shapes: {shapes} ({text})"
            ) from error
        values = [found] if isinstance(found, torch.Tensor) else list(found)
        return {entry.name: _to_numpy(value) for entry, value in zip(self._entry.outputs, values, strict=True)}


def _to_numpy(value: torch.Tensor) -> np.ndarray:
    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:
        return widen_bfloat16(value.view(torch.int16).numpy().view(np.uint16))
    array: np.ndarray = value.numpy()
    return array
