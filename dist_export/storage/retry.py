"""Repeat failed requests to an object store. This is the only place that does."""

from __future__ import annotations

import logging
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from dist_export.redact import redact_text
from dist_export.storage.traffic import TRAFFIC

logger = logging.getLogger(__name__)

T = TypeVar("T")

SPAN_SECS = 60.0
"""How many seconds a request is repeated: a restarted server answers after 10 to 20 seconds."""
LEAST_RETRIES = 2
"""Retries that are made even if one try took longer than that, such as a large copy whose answer did not come."""
FIRST_SECS = 0.2
LONGEST_SECS = 5.0

_TOLD_FROM = 4
"""The number of the first retry that is logged as a warning, about two seconds after the first try."""

_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_TRANSIENT_CODES = (
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "RequestTimeTooSkewed",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
)
_TRANSIENT_NAMES = frozenset(
    {
        # botocore, aiohttp, asyncio before Python 3.11; not imported here, because an export to a disk does not need them
        "ClientConnectionError",
        "ClientConnectorError",
        "ClientOSError",
        "ClientPayloadError",
        "ConnectionClosedError",
        "ConnectTimeoutError",
        "EndpointConnectionError",
        "HTTPClientError",
        "IncompleteRead",
        "IncompleteReadError",
        "ReadTimeoutError",
        "ResponseParserError",
        "TimeoutError",
        "ResponseStreamingError",
        "ServerDisconnectedError",
        "ServerTimeoutError",
    }
)


def with_retries(call: Callable[[bool], T], where: str, *, is_known: bool = True) -> T:
    """Return the result of ``call``. Transient errors repeat it for :data:`SPAN_SECS`, with growing pauses.

    Args:
        call: makes the request; its argument is whether an earlier try may have reached the store.
        where: the object, for the log.
        is_known: whether this store has ever answered. If not, a host that the name service does not know is taken
            for a mistake after :data:`LEAST_RETRIES`.
    """
    deadline = time.monotonic() + SPAN_SECS
    pause, number = FIRST_SECS, 0
    while True:
        TRAFFIC.add(requests=1)
        try:
            return call(number > 0)
        except Exception as error:
            is_over = time.monotonic() + pause > deadline or (not is_known and is_unknown_host(error))
            if not is_transient(error) or (number >= LEAST_RETRIES and is_over):
                raise
            TRAFFIC.add(retries=1)
            number += 1
            # a short failure is not worth a warning; a longer one also reaches users who have not configured logging
            level = logging.DEBUG if number < _TOLD_FROM else logging.WARNING if number == _TOLD_FROM else logging.INFO
            left = max(0.0, deadline - time.monotonic())
            logger.log(level, "%s: %s; trying again (%d) for %.0f s at most", where, _say(error), number, left)
            # a store's failure hits all ranks at the same moment, and they must not all retry at the same moment
            time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 -- not used for security
            pause = min(pause * 2, LONGEST_SECS)


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed a little later."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore's ClientError: the store has answered, so its answer decides
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str(response.get("Error", {}).get("Code", ""))
            return status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES or code in map(str, _TRANSIENT_STATUS)
        if isinstance(cause, (ConnectionError, TimeoutError)):
            return True
        if any(kind.__name__ in _TRANSIENT_NAMES for kind in type(cause).__mro__):
            return True
    return False


def why_unreachable(error: BaseException) -> str | None:
    """Return why no server was reached, such as a wrong address or a stopped server; None if one was reached."""
    causes = list(_causes(error))
    if not any(type(cause).__name__ == "EndpointConnectionError" for cause in causes):
        return None
    system = next((cause for cause in reversed(causes) if isinstance(cause, OSError)), error)
    return system.strerror or _say(system) if isinstance(system, OSError) else _say(system)


def is_unknown_host(error: BaseException) -> bool:
    """Return whether the name service said that the host does not exist; False if the name service did not answer."""
    unknown = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
    return any(isinstance(cause, socket.gaierror) and cause.errno in unknown for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _say(error: BaseException) -> str:
    return redact_text(next(iter(str(error).strip().splitlines()), type(error).__name__))
