"""One small checkpoint of each format that an export reads, and what ``filter_sparse_opt: null`` is for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import dist_export
from tests.support.dynamicemb_writer import make_table, write_dump
from tests.support.easyrec_writer import write_easyrec

EMBEDDINGS = {"ebc.embedding_bags.user.weight": torch.arange(20.0).reshape(5, 4), "dense_arch.w": torch.ones(3)}


def export(source: Path, target: Path, **settings: Any) -> dist_export.Manifest:
    """Export the tables of a checkpoint."""
    return dist_export.Exporter(None, "s", "d", None, source, target, **settings).export(progress=False)


def copy_recis(fixtures: Path, folder: Path) -> Path:
    return Path(shutil.copytree(fixtures / "recis" / "small2", folder / "recis"))


def copy_dcp(fixtures: Path, folder: Path) -> Path:
    return Path(shutil.copytree(fixtures / "torchrec" / "row_wise", folder / "dcp"))


def save_torch(_: Path, folder: Path) -> Path:
    torch.save(EMBEDDINGS, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def save_safetensors(_: Path, folder: Path) -> Path:
    (folder / "plain").mkdir()
    save_file(EMBEDDINGS, folder / "plain" / "model.safetensors")
    return folder / "plain"


def save_easyrec(_: Path, folder: Path) -> Path:
    return write_easyrec(folder / "easyrec")


def dump(_: Path, folder: Path) -> Path:
    return write_dump(folder / "dump", "user", make_table([3, 8, -1], 4), 2)


def export_package(fixtures: Path, folder: Path) -> Path:
    export(copy_recis(fixtures, folder), folder / "package", filter_sparse_opt=True)
    return folder / "package"


def export_indexed_package(fixtures: Path, folder: Path) -> Path:
    export(copy_dcp(fixtures, folder), folder / "package")
    return folder / "package"


def make_run(fixtures: Path, folder: Path) -> Path:
    for step in (1, 2):
        shutil.copytree(fixtures / "recis" / "small2", folder / "run" / f"ckpt_{step}")
    return folder / "run"


SOURCES: dict[str, tuple[Callable[[Path, Path], Path], bool]] = {
    "recis": (copy_recis, False),
    "a run of recis": (make_run, False),
    "dcp": (copy_dcp, True),
    "torch": (save_torch, True),
    "safetensors": (save_safetensors, True),
    "dynamicemb": (dump, True),
    "dcp+dynamicemb": (save_easyrec, True),
    "package": (export_package, True),
    "package of row-indexed tables": (export_indexed_package, True),
}
"""Name -> (makes it from the reference checkpoints in a folder and returns its path; whether new shards are the default)."""
