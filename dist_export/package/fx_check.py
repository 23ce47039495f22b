"""Check the FX folder of a package: its weights and its code must be those of the exported program."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from dist_export.errors import CheckpointError, DistExportError, PackageError
from dist_export.formats.pickle_values import PickleError
from dist_export.formats.torch_pickle import as_tensor, load_archive
from dist_export.formats.torch_zip import StateArchive, check_state_archive
from dist_export.manifest import DenseEntry
from dist_export.package.reader import Package

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


def check_fx_folder(
    package: Package, entry: DenseEntry, program: ExportedProgram, findings: list[str], checked: list[str]
) -> None:
    """Make the FX module of the program again, and compare it with the package's. The package's code is not run.

    The text of the code depends on the version of torch. It is compared only if this version wrote the package.
    """
    import torch

    from dist_export.archive.fx_folder import (
        GRAPH,
        INIT_NAME,
        INIT_TEXT,
        MODULE_NAME,
        STATE_DICT_NAME,
        graph_text,
        render_fx_module,
    )

    where = f"{entry.folder}/{GRAPH}"
    listed = [file.path for file in package.manifest.files if file.path.startswith(f"{entry.folder}/")]
    folders = [path.rpartition("/")[0] for path in listed if path.endswith(f"/{STATE_DICT_NAME}")]
    if len(folders) != 1:
        findings.append(f"{entry.folder}: has {len(folders)} FX modules among the files of the manifest, expected one")
        return
    name = folders[0].rpartition("/")[2]
    before = len(findings)
    try:
        source, weights = render_fx_module(program, name)
        graph = graph_text(program)
    except DistExportError as error:
        findings.append(f"{folders[0]}: no FX module can be made of the program: {error}")
        return
    _compare_weights(package.files.read(f"{folders[0]}/{STATE_DICT_NAME}"), folders[0], weights, findings)
    is_same_torch = entry.torch == torch.__version__
    texts = {f"{folders[0]}/{INIT_NAME}": INIT_TEXT}
    if is_same_torch:
        texts |= {f"{folders[0]}/{MODULE_NAME}": source, where: graph}
    for path, text in texts.items():
        if path not in listed:
            findings.append(f"{path}: is not among the files of the manifest")
        elif package.files.read(path) != text.encode():
            findings.append(f"{path}: is not what the exported program gives")
    if len(findings) == before:
        code = "and its code " if is_same_torch else ""
        other = "" if is_same_torch else f" (its code is of torch {entry.torch}, and was not compared)"
        checked.append(f"FX module {name}: its weights {code}are the program's{other}")


def _compare_weights(raw: bytes, folder: str, weights: dict[str, torch.Tensor], findings: list[str]) -> None:
    from dist_export.archive.fx_folder import STATE_DICT_NAME

    where = f"{folder}/{STATE_DICT_NAME}"
    try:
        archive = check_state_archive(io.BytesIO(raw), where=where)
        held = load_archive(archive)
    except (PickleError, CheckpointError) as error:
        raise PackageError(f"{where}: cannot be read as weights: {str(error)[:200]}") from None
    if not isinstance(held, dict) or list(held) != list(weights):
        found = f"{len(held):,} names" if isinstance(held, dict) else f"a {type(held).__name__}"
        findings.append(f"{where}: holds {found}, not the {len(weights):,} weights of the exported program")
        return
    for name, expected in weights.items():
        if not _is_same(raw, archive, held[name], expected):
            findings.append(f"{where}: {name!r} is not the weight of the exported program")
            return  # one finding is enough for a file


def _is_same(raw: bytes, archive: StateArchive, value: Any, expected: torch.Tensor) -> bool:
    """Return whether a tensor of the file has the expected dtype, shape and bytes."""
    import torch

    found = as_tensor(value)
    if found is None or found.storage is None or archive.is_big_endian:
        return False
    if f"torch.{found.dtype}" != str(expected.dtype) or found.shape != tuple(expected.shape):
        return False
    if not expected.numel():
        return True
    first, num_bytes = archive.storages[found.storage.key]
    flat = torch.frombuffer(bytearray(raw[first : first + num_bytes]), dtype=expected.dtype)
    mine = torch.as_strided(flat, found.shape, found.strides, found.first)
    sides = [side.detach().contiguous().reshape(-1).view(torch.uint8) for side in (mine, expected)]
    return bool(torch.equal(sides[0], sides[1]))
