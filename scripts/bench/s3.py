"""The scenario on an S3 server: how many bytes go through the client, and how long exports take there, against two peers.

SeaweedFS runs on loopback, on the same cores and in memory: seconds say what the work costs, not what a network does.
"""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.bench.generate import Source, generate
from scripts.bench.processes import ROOT
from scripts.bench.report import render_table
from scripts.bench.scenarios import Bench

sys.path.insert(0, str(ROOT / "tests"))
_SHARDS = 2


def run_s3(bench: Bench) -> None:
    """A filter and a merge within one store: by the store, through the client, and by downloading all. Not on disk."""
    from s3_server import BUCKET, S3Server, why_not_here

    reason = why_not_here()
    if reason is not None:
        bench.fail("s3", RuntimeError(reason))
        return
    server = S3Server(bench.place.directory / "server")
    try:
        for name, shards in (("filter 2 -> 2", 2), ("merge 8 -> 2", 8)):
            # real bytes in the dropped slots: a download takes them along
            source = Source.of_size(bench.kept_bytes, dim=64, tables=2, shards=shards, files_per_shard=1, holes="none")
            _run_case(bench, f"s3, {name}, dim 64", source, server, f"{BUCKET}/{shards}")
    finally:
        server.kill()
        shutil.rmtree(server.folder, ignore_errors=True)


def _run_case(bench: Bench, name: str, source: Source, server: Any, root: str) -> None:
    import s3fs

    import dist_export
    from dist_export.storage.traffic import TRAFFIC

    scratch = bench.place.directory / "s3"
    generate(scratch / "ckpt", source)
    fs = s3fs.S3FileSystem(**server.options())
    fs.put(f"{scratch / 'ckpt'}/", f"{root}/ckpt/", recursive=True)
    shutil.rmtree(scratch)
    settings = {"filter_sparse_opt": True, "num_shards": _SHARDS, "storage_options": server.options(), **bench.settings}

    def export(out: str, **more: Any) -> tuple[int, int]:
        before = TRAFFIC.snapshot()
        given = {"ckpt_dir": f"s3://{root}/ckpt", "export_dir": f"s3://{root}/{out}"}
        dist_export.export({**settings, **given, **more})
        moved = TRAFFIC.since(before)
        return moved["downloaded"], moved["uploaded"]

    def download(_: str) -> tuple[int, int]:
        fs.get(f"{root}/ckpt/", f"{scratch / 'down'}/", recursive=True)
        given = {"ckpt_dir": str(scratch / "down"), "export_dir": str(scratch / "out")}
        dist_export.export({**settings, **given})
        fs.put(f"{scratch / 'out'}/", f"{root}/downloaded/", recursive=True)
        return _size(scratch / "down"), _size(scratch / "out")

    def write_with_dcp(_: str) -> tuple[int, int]:
        import torch
        from torch.distributed.checkpoint import save
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        # what DCP would write if its rows were in memory already: it reads no RecIS checkpoint
        rows = {
            f"{table}": torch.rand(source.rows, source.dim) for table in map(source.table_name, range(source.tables))
        }
        nonlocal started
        started = time.perf_counter()
        writer = FsspecWriter(f"s3://{root}/dcp", **server.options())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no process group is there
            save(rows, storage_writer=writer, no_dist=True)
        return 0, sum(tensor.numel() * 4 for tensor in rows.values())

    contenders: dict[str, Callable[[str], tuple[int, int]]] = {
        "ours, copied by the store": export,
        "ours, server_side_copy: false": lambda out: export(out, server_side_copy=False),
        "download, filter, upload": download,
        "peer: DCP's writer (no reading)": write_with_dcp,
    }
    rows: list[list[str]] = []
    kept = source.kept_bytes
    for number, (label, run) in enumerate(contenders.items()):
        seconds, moved = [], (0, 0)
        for turn in range(bench.rounds):
            started = time.perf_counter()
            try:
                moved = run(f"out_{number}_{turn}")
            except Exception as error:  # noqa: BLE001 -- the others are still measured
                bench.fail(f"{name}, {label}", error)
                break
            seconds.append(time.perf_counter() - started)
            shutil.rmtree(scratch, ignore_errors=True)
        if not seconds:
            continue
        bench.results.append(
            {"case": name, "label": label, "kept_bytes": kept, "moved": moved, "seconds": seconds, "where": "s3"}
        )
        shares = [f"{count / 1e6:,.1f} ({count / kept:.1%})" for count in moved]
        rows.append([label, *shares, f"{sorted(seconds)[len(seconds) // 2]:.2f}"])
    header = [f"{kept / 1e6:,.0f} MB kept", "MB down", "MB up", "seconds (median)"]
    bench.note(f"### {name}\n\n" + "\n".join(render_table(header, rows)))
    fs.rm(root, recursive=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
