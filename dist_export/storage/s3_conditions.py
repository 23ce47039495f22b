"""Conditional requests to an S3 store, and how to recognize that the condition does not hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def get_matching(fs: Any, path: str, ranges: Sequence[tuple[int, int]], etag: str) -> list[Any]:
    """Return ranges (first byte, byte after the last) of the object that has this ETag, requested at once.

    Each result is bytes, or the exception of that request. s3fs's own methods take no conditions.
    """
    import asyncio

    import fsspec.asyn

    bucket, _, key = path.partition("/")

    async def get(begin: int, end: int) -> bytes:
        asked = {"Range": f"bytes={begin}-{end - 1}", "IfMatch": etag}
        found = await fs._call_s3("get_object", Bucket=bucket, Key=key, **asked)  # noqa: SLF001 -- call_s3 within the loop
        try:
            return bytes(await found["Body"].read())
        finally:
            found["Body"].close()

    async def get_all() -> list[Any]:
        return await asyncio.gather(*(get(*edges) for edges in ranges), return_exceptions=True)

    return list(fsspec.asyn.sync(fs.loop, get_all))


def is_refused(error: BaseException) -> bool:
    """Return whether the store answered that the condition of a request does not hold."""
    cause = error.__cause__
    response = getattr(cause, "response", None) or getattr(error, "response", None)
    if isinstance(error, FileExistsError):
        return True
    if not isinstance(response, dict):
        return False
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    # 409: another request to the same key won while this one was under way
    return status == 412 or response.get("Error", {}).get("Code") in (
        "PreconditionFailed",
        "ConditionalRequestConflict",
    )
