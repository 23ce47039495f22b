"""The server in this process, and requests by the client of another project."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import uvicorn
from tritonclient import http as triton

from dist_export.serve.app import build_app
from dist_export.serve.run import listen
from dist_export.serve.served import Watcher


@contextlib.contextmanager
def running(watcher: Watcher, **options: Any) -> Iterator[str]:
    """Run the server in this process; give its address. ``options`` as of ``build_app``."""
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(build_app(watcher, **options), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server has ended at its start"
            time.sleep(0.01)
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def infer(client: Any, model: str, inputs: dict[str, np.ndarray], *, binary: bool = True, **more: Any) -> Any:
    """Send one request to a model, and return the result."""
    given = []
    for name, value in inputs.items():
        datatype = {"int64": "INT64", "float32": "FP32"}[str(value.dtype)]
        given.append(triton.InferInput(name, list(value.shape), datatype))
        given[-1].set_data_from_numpy(np.ascontiguousarray(value), binary_data=binary)
    return client.infer(model, given, **more)
