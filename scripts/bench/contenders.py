"""The work of each contender. ``prepare`` imports all that it needs and returns what is to be timed.

A peer is the script that one would write with that library, in the way that suits it best: it gets files that hold the
kept rows alone where it could not skip the others, and no check of what it wrote.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench.generate import KEPT_SLOTS
from scripts.bench.limit import sync_files
from scripts.bench.watch import MemoryWatch

if TYPE_CHECKING:
    from torch.distributed.checkpoint import FileSystemReader

Work = Callable[[MemoryWatch], dict[str, Any]]
"""Returns what is to be told besides time and memory."""


def prepare(job: dict[str, Any]) -> Work:
    """Return the work of a job after importing what it needs; ``job`` has kind, source, target and settings."""
    import torch  # noqa: F401 -- every contender starts from the same baseline

    return _PREPARE[job["kind"]](job)


def _prepare_export(job: dict[str, Any]) -> Work:
    """dist_export, called as a program would call it."""
    from dist_export.model.user_objects import Objects
    from dist_export.pipeline.run import run_export
    from dist_export.runtime.joining import join

    config = _make_config(job)

    def work(_: MemoryWatch) -> dict[str, Any]:
        with join(timeout_secs=config.timeout) as ranks:
            manifest = run_export(ranks, config, Objects(), is_shown=False)[0]
        return {"stages": manifest.run["seconds"]}

    return work


def _prepare_plan(job: dict[str, Any]) -> Work:
    """dist_export's planning alone, then the rendering of the files that describe the package."""
    from dist_export.commit.audit import TableAccount
    from dist_export.commit.publish import describe_tables, list_versions, render_indexes
    from dist_export.manifest import FileEntry, Manifest, SourceEntry, encode_manifest, seal
    from dist_export.pipeline.planning import open_checkpoint, plan_sparse
    from dist_export.runtime.joining import join
    from dist_export.storage.urls import open_directory

    config = _make_config(job)

    def work(watch: MemoryWatch) -> dict[str, Any]:
        clock = [time.monotonic()]
        with join(timeout_secs=config.timeout) as ranks:
            checkpoint = open_checkpoint(ranks, open_directory(config.ckpt_dir))
            clock.append(time.monotonic())
            planned = plan_sparse(ranks, checkpoint, config, world_size=1)
            clock.append(time.monotonic())
        peak_of_plan = watch.peak_anonymous
        plan, parts = planned.plan, checkpoint.parts
        indexes = render_indexes(plan, [])
        clock.append(time.monotonic())
        # nothing was written that could be counted; the numbers have the same width
        accounts = [
            TableAccount(int(parts.rows[parts.of_table(n)].sum()), 1 << 63) for n in range(len(checkpoint.tables))
        ]
        manifest = Manifest(
            mode="filter",
            num_shards=plan.num_shards,
            source=SourceEntry(
                path=config.ckpt_dir,
                format=checkpoint.format,
                fingerprint=checkpoint.fingerprint,
                num_files=len(checkpoint.files),
                num_bytes=checkpoint.num_bytes,
            ),
            tables=describe_tables(plan, planned.census, accounts),
            dense_tensors=(),
            dropped_dense_tensors=(),
            files=tuple(
                FileEntry(path=file.name, num_bytes=file.num_bytes, digest=f"xxh3:{0:032x}") for file in plan.files
            ),
            dense=None,
            parity=None,
            notes=(),
            versions=list_versions(),
        )
        encoded = encode_manifest(seal(manifest))
        clock.append(time.monotonic())
        names = ("open", "plan", "render indexes", "render manifest")
        return {
            "stages": {name: end - begin for name, (begin, end) in zip(names, itertools.pairwise(clock), strict=True)},
            "peak_of_plan": peak_of_plan,
            "rendered_bytes": sum(map(len, indexes.values())) + len(encoded),
        }

    return work


def _make_config(job: dict[str, Any]) -> Any:
    """Return the settings of an export."""
    from dist_export.config.schema import ExportConfig

    return ExportConfig(ckpt_dir=job["source"], export_dir=job["target"], filter_sparse_opt=True, **job["settings"])


def _prepare_safetensors(job: dict[str, Any]) -> Work:
    """The safetensors library: each file's kept tensors to a file of its own."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    source, target = Path(job["source"]), Path(job["target"])

    def work(_: MemoryWatch) -> dict[str, Any]:
        target.mkdir()
        for path in sorted(source.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                kept = {key: file.get_tensor(key) for key in file.keys() if is_kept(key)}  # noqa: SIM118 -- no dict
                if kept:
                    save_file(kept, target / path.name)
        sync_files(target)
        return {}

    return work


def _prepare_torch(job: dict[str, Any]) -> Work:
    """torch.load and torch.save of files that hold the kept rows alone, mapped rather than read."""
    import torch

    source, target = Path(job["source"]), Path(job["target"])

    def work(_: MemoryWatch) -> dict[str, Any]:
        target.mkdir()
        for path in sorted(source.glob("*.pt")):
            torch.save(torch.load(path, mmap=True, weights_only=True), target / path.name)
        sync_files(target)
        return {}

    return work


def _make_empty(reader: FileSystemReader, prefix: str) -> dict[str, Any]:
    """Return a tensor to load into for each tensor of a DCP checkpoint whose name begins with ``prefix``."""
    import torch
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
    }


def _prepare_dcp(job: dict[str, Any]) -> Work:
    """torch.distributed.checkpoint: load the kept tensors of its own checkpoint, save them as safetensors."""
    import torch.distributed.checkpoint as dcp

    source, target = job["source"], job["target"]
    num_files = job["settings"]["num_shards"]

    def work(_: MemoryWatch) -> dict[str, Any]:
        reader = dcp.FileSystemReader(source)
        state = _make_empty(reader, "")
        dcp.load(state, storage_reader=reader)
        # as many files as the export has: RecIS's own numbering of parts
        places = {name: int(name.rsplit("/part_", 1)[1].split("_")[0]) % num_files + 1 for name in state}
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(target, fqn_to_index_mapping=places))
        sync_files(Path(target))
        return {}

    return work


def _prepare_dcp_whole(job: dict[str, Any]) -> Work:
    """torch.distributed.checkpoint on a TorchRec job's checkpoint: load the tables, save them as safetensors.

    Of the optimizer state nothing is loaded: DCP reads what it is asked for.
    """
    import torch.distributed.checkpoint as dcp

    from scripts.bench.torchrec_source import PREFIX

    source, target = job["source"], job["target"]
    num_files = job["settings"]["num_shards"]

    def work(_: MemoryWatch) -> dict[str, Any]:
        reader = dcp.FileSystemReader(source)
        state = _make_empty(reader, f"model.{PREFIX}")
        dcp.load(state, storage_reader=reader, no_dist=True)
        places = {name: number % num_files + 1 for number, name in enumerate(state)}
        writer = dcp.HuggingFaceStorageWriter(target, fqn_to_index_mapping=places)
        dcp.save(state, storage_writer=writer, no_dist=True)
        sync_files(Path(target))
        return {}

    return work


def _prepare_dcp_to_torch(job: dict[str, Any]) -> Work:
    """torch's own converter, ``dcp_to_torch_save``: one file with everything, optimizer state included."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    target = Path(job["target"])

    def work(_: MemoryWatch) -> dict[str, Any]:
        target.mkdir()
        dcp_to_torch_save(job["source"], target / "model.pt")
        sync_files(target)
        return {}

    return work


def _prepare_torchrec_source(job: dict[str, Any]) -> Work:
    """Write what a TorchRec job leaves; not timed."""
    from scripts.bench.torchrec_source import write_source

    def work(_: MemoryWatch) -> dict[str, Any]:
        write_source(job, by=job["kind"].removeprefix("torchrec_"))
        return {}

    return work


def _prepare_dcp_source(job: dict[str, Any]) -> Work:
    """Write what DCP loads; not timed."""
    import torch.distributed.checkpoint as dcp

    def work(_: MemoryWatch) -> dict[str, Any]:
        dcp.save(_read_kept(Path(job["source"])), storage_writer=dcp.FileSystemWriter(job["target"]))
        return {}

    return work


def _prepare_torch_source(job: dict[str, Any]) -> Work:
    """Write what torch.load loads, one file for each shard; not timed."""
    import torch

    target = Path(job["target"])

    def work(_: MemoryWatch) -> dict[str, Any]:
        target.mkdir()
        shards: dict[str, dict[str, Any]] = {}
        for key, tensor in _read_kept(Path(job["source"])).items():
            shards.setdefault(key.rsplit("/", 1)[1], {})[key] = tensor.clone()
        for name, state in shards.items():
            torch.save(state, target / f"{name}.pt")
        sync_files(target)
        return {}

    return work


def is_kept(key: str) -> bool:
    """Whether a block of a generated source is one that an export keeps."""
    return key.split("/", 1)[0].rsplit(".", 1)[1] in KEPT_SLOTS


def _read_kept(source: Path) -> dict[str, Any]:
    from safetensors import safe_open

    state: dict[str, Any] = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            state |= {key: file.get_tensor(key) for key in file.keys() if is_kept(key)}  # noqa: SIM118 -- no dict
    return state


_PREPARE: dict[str, Callable[[dict[str, Any]], Work]] = {
    "export": _prepare_export,
    "plan": _prepare_plan,
    "safetensors": _prepare_safetensors,
    "torch": _prepare_torch,
    "dcp": _prepare_dcp,
    "dcp_source": _prepare_dcp_source,
    "torch_source": _prepare_torch_source,
    "dcp_whole": _prepare_dcp_whole,
    "dcp_to_torch": _prepare_dcp_to_torch,
    "torchrec_rows": _prepare_torchrec_source,
    "torchrec_columns": _prepare_torchrec_source,
}
