"""Join the ranks of a job: an existing process group, one that ``torchrun`` asks for, or a single process."""

from __future__ import annotations

import itertools
import os
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from dist_export.errors import ConfigError, ExportError
from dist_export.redact import first_line
from dist_export.runtime.process_identity import find_launcher
from dist_export.runtime.ranks import Ranks
from dist_export.runtime.rendezvous import agree_on_start, connect_anew
from dist_export.runtime.watchdog import Watchdog

if TYPE_CHECKING:
    import torch.distributed as dist

R = TypeVar("R", bound=Ranks)

_NO_LIMIT = timedelta(days=30)
"""A rank waits without a limit while another one makes progress. The watchdog checks that it does."""

_sequence = itertools.count()
"""The number of the export within this process: two exports in one job must not share keys in the job's store.
Exports are collective, so every rank counts the same."""


def alone() -> Ranks:
    """Return the ranks of a process that works alone, even if it belongs to a job."""
    return Ranks(0, 1, None, None, owns_default_group=False, timeout_secs=0.0)


def join(*, timeout_secs: float, is_own_process: bool = False) -> Ranks:
    """Join the other ranks of this job for one export; see :func:`join_as`."""
    return join_as(Ranks, timeout_secs=timeout_secs, is_own_process=is_own_process)


def join_as(kind: type[R], *, timeout_secs: float, is_own_process: bool = False) -> R:
    """Join the other ranks of this job. All ranks, in the same order of calls.

    An existing process group is used through a gloo subgroup. Under ``torchrun`` a group is started. A process without
    either is alone. Until :meth:`Ranks.close` a watchdog ends this process when the export cannot go on. There is no
    watchdog if the process is alone and not ``is_own_process``.

    Args:
        kind: the class that is returned.
        timeout_secs: seconds without progress after which a rank counts as hanging and the export ends, and for which a rank
            waits for the others to come.
        is_own_process: this process exists only for the export, so the export handles SIGTERM.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    # until the ranks know each other, only the launcher can be watched; if it died, they would wait for its store
    early = Watchdog(
        rank,
        world_size,
        None,
        timeout_secs=timeout_secs,
        launcher=find_launcher(),
        request_stop=_ignore,
        has_failure=lambda: False,
    )
    early.start()
    try:
        ranks = _join(kind, timeout_secs)
    finally:
        early.stop()
    if ranks.world_size > 1 or is_own_process:
        ranks.watch(catches_sigterm=is_own_process and threading.current_thread() is threading.main_thread())
    return ranks


def _join(kind: type[R], timeout_secs: float) -> R:
    timeout = timedelta(seconds=timeout_secs)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1 and not _is_initialized():
        return kind(0, 1, None, None, owns_default_group=False, timeout_secs=timeout_secs)
    import torch._C._distributed_c10d as torch_store
    import torch.distributed as dist

    owns = not dist.is_initialized()
    if owns:
        try:
            _start_group(timeout)
        except (ValueError, RuntimeError, TimeoutError) as error:
            raise ConfigError(
                f"WORLD_SIZE is {started}, but the ranks cannot find each other: {first_line(error)}. Start them with "
                "torchrun, or unset WORLD_SIZE to export with one rank"
            ) from error
    group = _make_group(timeout)
    prefix = f"dist_export/{next(_sequence)}"
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 -- torch offers no public way to the job's store
    return kind(
        dist.get_rank(),
        dist.get_world_size(),
        torch_store.PrefixStore(prefix, store),
        group,
        owns_default_group=owns,
        timeout_secs=timeout_secs,
        watched_store=connect_anew(store, f"{prefix}/watchdog"),
    )


def _make_group(timeout: timedelta) -> dist.ProcessGroup:
    """Return a group for this export alone. ExportError if another rank does not come in time: no watchdog runs yet."""
    import torch.distributed as dist

    try:
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, TimeoutError) as error:
        raise ExportError(
            f"the ranks do not find each other for the export: {first_line(error)}. Nothing was written; see whether a rank has "
            "ended, and start all of them again"
        ) from error
    dist.distributed_c10d._set_pg_timeout(_NO_LIMIT, group)  # noqa: SLF001 -- torch offers no public way
    return group


def _start_group(timeout: timedelta) -> None:
    import torch._C._distributed_c10d as torch_store
    import torch.distributed as dist

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group("gloo", timeout=timeout)
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kept = torch_store.TCPStore(host, port, world_size, False, timeout)
    name = agree_on_start(
        torch_store.PrefixStore("dist_export/start", kept), rank, world_size, timeout_secs=timeout.total_seconds()
    )
    store = torch_store.PrefixStore(f"dist_export/{name}", kept)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)


def _is_initialized() -> bool:
    import sys

    if "torch" not in sys.modules:  # a group cannot exist before torch is imported
        return False
    import torch.distributed as dist

    return bool(dist.is_available() and dist.is_initialized())


def _ignore(_: str) -> None:
    return None
