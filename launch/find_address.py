"""Print the address by which other machines reach this one, and its network interface.

usage: find_address.py MACHINE_0 NUMBER_OF_THIS_MACHINE. It is the address that this machine itself would use towards machine 0.
Nothing is sent. IPv4, Linux.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import sys

SIOCGIFADDR = 0x8915  # linux/sockios.h: the address of an interface
OUTSIDE = "192.0.2.1"
"""An address of nobody (RFC 5737): the way there is the way to everybody who is not near."""


def source_towards(host: str) -> str:
    """Return this machine's address on the way to ``host``. OSError where there is no way, or no such name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # a datagram socket: looks at the routes and sends nothing
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """Return the name of the interface that has ``address``. LookupError where none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    raise LookupError(f"no interface has the address {address}")


def is_loopback(host: str) -> bool:
    """Return whether a name or address means this machine itself, on all machines."""
    return host == "localhost" or host.startswith("127.")


def main(host: str, node_rank: int) -> int:
    """Print ``<address> <interface>``; return the exit code."""
    try:
        address = source_towards(host)
        if is_loopback(address) and not is_loopback(host):
            address = source_towards(OUTSIDE)  # machine 0's own name is often 127.0.1.1 in its /etc/hosts
        elif is_loopback(address) and node_rank == 0:
            # some schedulers tell machine 0 localhost, and the others its name
            with contextlib.suppress(OSError):  # no way out of here, so all are on this machine
                address = source_towards(OUTSIDE)
        print(address, interface_of(address))
    except (OSError, LookupError) as error:
        print(
            f"find_address.py: no address of this machine towards {host} was found ({error}); set LOCAL_ADDR and "
            "GLOO_SOCKET_IFNAME",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
