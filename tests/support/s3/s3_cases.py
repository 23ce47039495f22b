"""What the tests of S3 share: checkpoints on a store, exports to it, and what lies there."""

from __future__ import annotations

import os
import signal
import uuid
from pathlib import Path
from typing import Any

import fsspec

import dist_export
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.s3.s3_server import BUCKET, S3Server

MIB = 1 << 20


class Store:
    """A folder of its own in the server's bucket."""

    def __init__(self, server: S3Server) -> None:
        self.server = server
        self.options = server.options()
        self.fs = fsspec.filesystem("s3", **self.options, use_listings_cache=False)
        self.root = f"{BUCKET}/{uuid.uuid4().hex[:8]}"

    def url(self, name: str) -> str:
        return f"s3://{self.root}/{name}"

    def put_tree(self, folder: Path, name: str) -> str:
        """Put a local directory up; return its URL."""
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            self.fs.put_file(str(file), f"{self.root}/{name}/{file.name}")
        return self.url(name)

    def files(self, name: str) -> dict[str, bytes]:
        """Return all objects below a folder."""
        bucket, _, prefix = f"{self.root}/{name}/".partition("/")
        found = self.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix).get("Contents") or ()
        return {entry["Key"].removeprefix(prefix): self.fs.cat_file(f"{bucket}/{entry['Key']}") for entry in found}

    def uploads(self, name: str) -> list[str]:
        """Return the keys of the uploads that are neither finished nor given up."""
        bucket, _, prefix = f"{self.root}/{name}/".partition("/")
        found = self.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
        return [entry["Key"] for entry in found.get("Uploads") or ()]

    def export(self, source: str | Path, target: str | Path, **more: Any) -> dist_export.Manifest:
        return dist_export.export(self.settings(source, target, **more))

    def settings(self, source: str | Path, target: str | Path, **more: Any) -> dict[str, Any]:
        given = {"ckpt_dir": str(source), "export_dir": str(target), "storage_options": self.options}
        # auto would make a package on a disk another one
        plain = {"filter_sparse_opt": True, "num_shards": 2, "threads": 2, "row_fingerprints": False}
        return {**given, **plain, **more}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_manifest(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name != "manifest.json"}


def write_small(folder: Path) -> Path:
    write_checkpoint(folder, make_tables({"t": 600, "u": 300}, 3))
    return folder


def write_large(folder: Path) -> Path:
    """Write four parts, of whose embeddings each is a part of an upload by itself."""
    write_checkpoint(folder, make_tables({"small": 600, "big": 200_000, "other": 40_000}, 4, dim=32, slots=("adam_m",)))
    return folder


def export_and_die(rank: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Kill rank 1 when it has had the store copy a part; no lease is waited for long."""
    from dist_export.transfer import multipart_upload as uploads
    from dist_export.workdir import lock

    lock.LEASE_SECS, lock.RENEW_SECS = 1.0, 0.2
    real = uploads.Uploads.copy

    def copy(self: uploads.Uploads, number: int, place: Any) -> Any:
        done = real(self, number, place)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(uploads.Uploads, "copy", copy)  # noqa: B010 -- types forbid to put another function in its place
    return export_on_rank(rank, settings)


def export_on_rank(rank: int, settings: dict[str, Any]) -> dict[str, Any]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return dist_export.export(settings).run
