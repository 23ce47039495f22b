"""Run the server: ``python -m dist_export serve PATH``."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any

from dist_export.errors import ConfigError
from dist_export.serve.served import Watcher

_KEEP_ALIVE_SECS = 75
"""How long an idle connection stays open: longer than most clients and proxies pause, so that they do not meet its end."""


def serve(
    path: str,
    *,
    host: str,
    port: int,
    workers: int | None,
    watching: Mapping[str, Any],
    announce: Callable[[str], object],
) -> None:
    """Serve a package until the process is ended.

    Args:
        path: the package.
        host: the address to listen on.
        port: the port; 0 takes a free one.
        workers: how many requests are computed at once; None takes the number of cores.
        announce: is called with one line when the server listens.
        watching: further arguments of :class:`~dist_export.serve.served.Watcher`.

    Raises:
        ConfigError: a package that serving needs is missing, or the address cannot be taken.
        PackageError: the package is unsound.
    """
    try:
        import torch
        import uvicorn

        from dist_export.serve.app import build_app
    except ImportError as error:
        raise ConfigError(
            f"serve needs a package that is not installed ({error.name}): pip install 'dist_export[serve]'"
        ) from None
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers is {workers}; give a number from 1 up")
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port is {port}; give a number from 0 to 65535")
    try:
        listening = listen(host, port)
    except OSError as error:
        raise ConfigError(f"{host}:{port} cannot be listened on: {error}; give another --host or --port") from None
    with listening:
        watcher = Watcher(path, **watching)
        torch.set_num_threads(1)  # requests run beside each other, one on each core
        app = build_app(watcher, workers=workers)
        address = f"http://{host}:{listening.getsockname()[1]}"
        models = ", ".join(watcher.current.models)
        announce(f"serving package {watcher.current.version} of {path} on {address}/v2: {models}")
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=_KEEP_ALIVE_SECS)
        )
        server.run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. OSError if the address cannot be taken.

    Its protocol is stated, because asyncio sends small pieces at once (TCP_NODELAY) only then. Otherwise each answer waits 40 ms
    for the client's acknowledgement of its first piece.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError:
        listening.close()
        raise
    return listening
