"""Scores by the package and by its server against the eager model: seconds of a batch, median and 99th percentile.

The model has three tables of 200,000 x 32 float32 (one id, a list of 20 ids that is averaged, a bag) and a dense arch of three
layers.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dist_export
from scripts.bench.report import render_table
from scripts.bench.scenarios import Bench

ROWS, DIM, LENGTH = 200_000, 32, 20
BATCHES = (1, 128)
_CALLS = 400


class SparseArch(nn.Module):
    """Three tables, by the module, by a mean over a list, and as a bag."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.clicks = nn.Embedding(ROWS, DIM), nn.Embedding(ROWS, DIM)
        self.tags = nn.EmbeddingBag(ROWS, DIM, mode="sum")

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the pooled blocks of a batch."""
        return {
            "user": self.user(batch["user"]),
            "clicks": self.clicks(batch["clicks"]).mean(1),
            "tags": self.tags(batch["tags"]),
        }


class DenseArch(nn.Module):
    """Three layers over the concatenated blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3 * DIM, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid()
        )

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the scores of the blocks."""
        return {"ctr": self.layers(torch.cat([blocks["user"], blocks["clicks"], blocks["tags"]], 1))}


class Model(nn.Module):
    """Both arches."""

    def __init__(self) -> None:
        super().__init__()
        self.sparse_arch, self.dense_arch = SparseArch(), DenseArch()

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the scores of a batch."""
        scores: dict[str, torch.Tensor] = self.dense_arch(self.sparse_arch(batch))
        return scores


def make_batch(size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a batch of random ids."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"user": (size,), "clicks": (size, LENGTH), "tags": (size, 5)}
    return {name: torch.randint(0, ROWS, shape, generator=random) for name, shape in shapes.items()}


def run_serving(bench: Bench) -> None:
    """Score batches of 1 and 128 by the eager model, the package, and the server on loopback. Not on disk."""
    folder = bench.place.directory / "serving"
    folder.mkdir()
    torch.manual_seed(0)
    model = Model().eval()
    torch.save(model.state_dict(), folder / "model.pth")
    lines = []
    for kind, to_hash in (("by row number", []), ("by id, hash tables", ["sparse_arch.*"])):
        out = folder / ("hashed" if to_hash else "indexed")
        dist_export.Exporter(
            Model(), "sparse_arch", "dense_arch", [make_batch(8)], str(folder / "model.pth"), out,
            score_program="require", to_hash_tables=to_hash, progress=False,
        ).export()  # fmt: skip
        package = dist_export.open_package(out)
        with _server(out) as ask:
            for size in BATCHES:
                batch = make_batch(size)
                given = {name: tensor.numpy() for name, tensor in batch.items()}
                body = _body(given)
                contenders: dict[str, Callable[[], Any]] = {
                    "eager model": partial(_eager, model, batch),
                    "package.score": partial(package.score, given),
                    "server, JSON on loopback": partial(ask, body),
                }
                timed = {name: _time(call) for name, call in contenders.items()}
                base = timed["eager model"][0]
                lines += [
                    [kind, str(size), name, f"{p50 * 1e3:.2f}", f"{p99 * 1e3:.2f}", f"{p50 / base:.1f}"]
                    for name, (p50, p99) in timed.items()
                ]
    header = ["rows", "batch", "by", "p50 ms", "p99 ms", "p50 to the eager model"]
    bench.note("scores of 3 tables\n\n" + "\n".join(render_table(header, lines)))


def _eager(model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
    with torch.no_grad():
        return model(batch)


def _time(call: Callable[[], Any]) -> tuple[float, float]:
    """Return the median and the 99th percentile of the seconds of a call."""
    for _ in range(20):
        call()
    seconds = []
    for _ in range(_CALLS):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds)), float(np.quantile(seconds, 0.99))


def _body(given: dict[str, np.ndarray]) -> bytes:
    inputs = [
        {"name": name, "datatype": "INT64", "shape": list(value.shape), "data": value.ravel().tolist()}
        for name, value in given.items()
    ]
    return json.dumps({"inputs": inputs}).encode()


class _server:  # noqa: N801 -- used as a function
    """Runs ``dist_export serve`` in a process of its own; gives what sends a body and returns the answer."""

    def __init__(self, package: Path) -> None:
        command = [sys.executable, "-m", "dist_export", "serve", str(package), "--port", "0", "--checks", "false"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Callable[[bytes], Any]:
        assert self._process.stdout is not None
        address = self._process.stdout.readline().split("http://")[1].split("/")[0]
        connection = http.client.HTTPConnection(address)

        def ask(body: bytes) -> Any:
            connection.request("POST", "/v2/models/score/infer", body)
            answer = json.loads(connection.getresponse().read())
            if "outputs" not in answer:
                raise RuntimeError(answer)
            return answer

        return ask

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
