"""The HTTP server: the Open Inference Protocol v2 for the models of a package, with health and metrics.

Source: https://github.com/kserve/open-inference-protocol, and Triton's binary tensor data extension.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import time
import zlib
from collections.abc import AsyncIterator
from typing import Any

import prometheus_client
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from dist_export._version import VERSION
from dist_export.errors import DistExportError, PackageError, UserError
from dist_export.serve.models import Model
from dist_export.serve.served import Served, Watcher
from dist_export.serve.tensors import HEADER_LENGTH, decode_request, describe_tensors, encode_response

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 256 << 20
"""The largest body of a request, also when decompressed."""
_WINDOW_BITS = 32 + zlib.MAX_WBITS
"""Lets zlib see for itself whether a body is gzip or deflate."""


class Metrics:
    """What ``/metrics`` shows, as Prometheus text."""

    def __init__(self, watcher: Watcher) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "dist_export_requests", "Inference requests.", ["model", "code"], registry=self.registry
        )
        self.seconds = prometheus_client.Histogram(
            "dist_export_request_seconds",
            "Seconds of an inference request.",
            ["model"],
            registry=self.registry,
            buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
        )
        for name, text, value in (
            ("swaps", "Packages that took the place of another one.", lambda: watcher.num_swaps),
            ("refused_packages", "New packages that were not taken.", lambda: watcher.num_refused),
        ):
            gauge = prometheus_client.Gauge(f"dist_export_{name}", text, registry=self.registry)
            gauge.set_function(value)


def build_app(watcher: Watcher, *, workers: int | None = None, most_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """Return the server of what ``watcher`` serves. It starts and stops the watcher.

    ``workers``: how many requests are computed at once; None takes the number of cores. ``most_bytes``: of the body of a request.
    """
    metrics = Metrics(watcher)
    pool = concurrent.futures.ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)), thread_name_prefix="infer")

    @contextlib.asynccontextmanager
    async def run(_: FastAPI) -> AsyncIterator[None]:
        watcher.start()
        yield
        await asyncio.to_thread(watcher.stop)
        pool.shutdown()

    app = FastAPI(lifespan=run, title="dist_export", version=VERSION, openapi_url=None)
    _answer_errors(app)
    _describe_server(app, metrics)
    _describe_models(app, watcher)

    @app.post("/v2/models/{name}/infer")
    @app.post("/v2/models/{name}/versions/{version}/infer")
    async def infer(request: Request, name: str, version: str | None = None) -> Response:
        begin, code = time.perf_counter(), 500
        served, model = _find(watcher, name, version)
        try:
            body = await _read_body(request, most_bytes)
            loop = asyncio.get_running_loop()
            length = request.headers.get(HEADER_LENGTH)
            response = await loop.run_in_executor(pool, _answer, watcher, served, model, body, length, version)
            code = response.status_code
        except HTTPException as error:
            code = error.status_code
            raise
        finally:
            metrics.requests.labels(name, str(code)).inc()
            metrics.seconds.labels(name).observe(time.perf_counter() - begin)
        return response

    return app


def _answer_errors(app: FastAPI) -> None:
    """Make errors JSON."""

    @app.exception_handler(HTTPException)
    async def tell(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code)

    @app.exception_handler(Exception)
    async def tell_bug(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": f"{type(error).__name__}; the log of the server has more"}, 500)


def _describe_server(app: FastAPI, metrics: Metrics) -> None:
    """Add what the server says of itself."""

    @app.get("/v2")
    def describe_server() -> dict[str, Any]:
        return {"name": "dist_export", "version": VERSION, "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live")
    def tell_live() -> Response:
        return Response()

    @app.get("/v2/health/ready")
    def tell_ready() -> Response:
        return Response()  # a server without a package does not start

    @app.get("/metrics")
    def show_metrics() -> Response:
        return Response(prometheus_client.generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")


def _describe_models(app: FastAPI, watcher: Watcher) -> None:
    """Add what the server says of its models."""

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/{version}")
    def describe_model(name: str, version: str | None = None) -> dict[str, Any]:
        served, model = _find(watcher, name, version)
        return {
            "name": name,
            "versions": [served.version],
            "platform": "dist_export",
            "inputs": describe_tensors([(t.name, t.dtype, t.shape) for t in model.inputs]),
            "outputs": describe_tensors([(t.name, t.dtype, t.shape) for t in model.outputs]),
        }

    @app.get("/v2/models/{name}/ready")
    @app.get("/v2/models/{name}/versions/{version}/ready")
    def tell_model_ready(name: str, version: str | None = None) -> Response:
        _find(watcher, name, version)
        return Response()


def _find(watcher: Watcher, name: str, version: str | None) -> tuple[Served, Model]:
    served = watcher.current
    if name not in served.models:
        raise HTTPException(404, f"there is no model {name!r}; the package has {', '.join(served.models)}")
    if version is not None and version != served.version:
        raise HTTPException(404, f"model {name!r} has no version {version!r}; {served.version} is served")
    return served, served.models[name]


async def _read_body(request: Request, most_bytes: int) -> bytes:
    """Return the body of a request, decompressed."""
    encoding = request.headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("identity", "gzip", "deflate"):
        raise HTTPException(415, f"Content-Encoding {encoding!r} is not known; gzip and deflate are")
    pieces, size = [], 0
    unpacker = (
        None if encoding == "identity" else zlib.decompressobj(_WINDOW_BITS if encoding == "gzip" else zlib.MAX_WBITS)
    )
    async for chunk in request.stream():
        try:
            piece = chunk if unpacker is None else unpacker.decompress(chunk, most_bytes + 1 - size)
        except zlib.error as error:
            raise HTTPException(400, f"the body is no {encoding}: {error}") from None
        size += len(piece)
        if size > most_bytes:
            raise HTTPException(413, f"the body has more than {most_bytes:,} bytes; send fewer examples at once")
        pieces.append(piece)
    if unpacker is not None and not unpacker.eof:
        raise HTTPException(400, f"the body ends before its {encoding} data does")
    return b"".join(pieces)


def _answer(
    watcher: Watcher, served: Served, model: Model, body: bytes, header_length: str | None, version: str | None
) -> Response:
    """Run one request with one package. In a thread of the pool. ``version``: the one that the request asks for, if it does."""
    try:
        request, inputs = decode_request(body, header_length)
        try:
            outputs = model.infer(inputs)
        except PackageError:  # files that were not open went with a package that was replaced
            watcher.check_now()
            if watcher.current is served or model.name not in watcher.current.models:
                raise
            if version is not None:  # another one is no answer
                _find(watcher, model.name, version)
            served = watcher.current
            outputs = served.models[model.name].infer(inputs)
        content, length = encode_response(request, outputs, model=model.name, version=served.version)
    except UserError as error:
        raise HTTPException(400, str(error)) from None
    except PackageError as error:
        raise HTTPException(503, str(error)) from None
    except DistExportError as error:
        raise HTTPException(500, str(error)) from None
    if length is None:
        return Response(content, media_type="application/json")
    headers = {HEADER_LENGTH: str(length)}
    return Response(content, media_type="application/octet-stream", headers=headers)
