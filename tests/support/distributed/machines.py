"""Two machines on one: network namespaces joined by a veth pair, with process ids and host names of their own.

A rank of one sees no process of the other, only its network; directories are shared, as by a network file system, but for the one
that ``OWN_DISK`` in the environment of a command names: there each command finds an empty disk of its own.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

from tests.support import ROOT
from tests.support.distributed import crash
from tests.support.needed import lack, need_programs

LAUNCH = ROOT / "launch"

RETRIES = "4"
"""net.ipv4.tcp_retries2: TCP gives a silent connection up after some three seconds, where the default of 15 takes a quarter of
an hour. What an agent of torchrun is told of a cut link it is told by TCP."""


class Machine:
    """One of two machines: ``number`` 0 or 1, with an address that the other one reaches."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.namespace = f"de{os.getpid()}m{number}"
        self.link = f"de{os.getpid()}v{number}"
        self.address = f"10.213.7.{number + 1}"

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command there."""
        own_disk = '{ [ -z "$OWN_DISK" ] || mount -t tmpfs none "$OWN_DISK"; }'
        inside = f'echo machine{self.number} >/proc/sys/kernel/hostname && {own_disk} && exec "$@"'
        return subprocess.Popen(
            [
                *("ip", "netns", "exec", self.namespace),
                *("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "bash", "-c", inside, "bash"),
                *command,
            ],
            cwd=ROOT, env=crash.environment(**environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start_export(self, *arguments: str, ranks: int = 2, **environment: str) -> subprocess.Popen[str]:
        """Start this machine's share of an export as an engineer would, by launch/torchrun.sh; ``ranks`` on each machine."""
        return self.start(
            "bash", str(LAUNCH / "torchrun.sh"), *arguments,
            **{
                "NNODES": "2", "NODE_RANK": str(self.number), "NPROC_PER_NODE": str(ranks), "MASTER_ADDR": "10.213.7.1",
                "PYTHON": sys.executable, **environment,
            },
        )  # fmt: skip


class Pair:
    """Both machines, and the link between them."""

    def __init__(self) -> None:
        self.machines = (Machine(0), Machine(1))

    def cut(self) -> None:
        """Take machine 1's end of the link down: what machine 0 sends is lost in silence, what machine 1 sends has no way."""
        _ip("-n", self.machines[1].namespace, "link", "set", self.machines[1].link, "down")

    def mend(self) -> None:
        """Join them again."""
        _ip("-n", self.machines[1].namespace, "link", "set", self.machines[1].link, "up")


@contextlib.contextmanager
def joined() -> Iterator[Pair]:
    """Make two machines. Skips the test, or fails it, where namespaces cannot be made."""
    need_programs("ip", "unshare", package="iproute2")
    pair = Pair()
    first, second = pair.machines
    try:
        try:
            for machine in pair.machines:
                _ip("netns", "add", machine.namespace)
            _ip("link", "add", first.link, "netns", first.namespace, "type", "veth", "peer", "name", second.link,
                "netns", second.namespace)  # fmt: skip
            for machine in pair.machines:
                _ip("-n", machine.namespace, "addr", "add", f"{machine.address}/24", "dev", machine.link)
                for link in ("lo", machine.link):
                    _ip("-n", machine.namespace, "link", "set", link, "up")
                retries = f"echo {RETRIES} >/proc/sys/net/ipv4/tcp_retries2"
                _run("ip", "netns", "exec", machine.namespace, "sh", "-c", retries)
                _run(
                    "ip",
                    "netns",
                    "exec",
                    machine.namespace,
                    "unshare",
                    "--pid",
                    "--fork",
                    "--mount-proc",
                    "--uts",
                    "true",
                )
        except OSError as error:
            lack(f"network namespaces cannot be made here: {error}")
        yield pair
    finally:
        for machine in pair.machines:
            with contextlib.suppress(OSError):  # it may not have come to be
                _ip("netns", "delete", machine.namespace)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
