"""Requests to one S3 store, through s3fs. Each is a single request, is repeated in one place (``retry.py``) and is counted.

The retries of s3fs and botocore are switched off (:class:`S3`). Paths are ``bucket/key``. Source of the requests
and their limits: Amazon's S3 API reference. MinIO, Ceph and SeaweedFS serve the same parts of it.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from dist_export.errors import UserError
from dist_export.storage.retry import is_transient, why_unreachable, with_retries
from dist_export.storage.s3_conditions import get_matching, is_refused
from dist_export.storage.traffic import TRAFFIC

T = TypeVar("T")

_PROTOCOLS = ("s3", "s3a")
_MOST_CONNECTIONS = 64
_DELETED_AT_ONCE = 1000

_ANSWERED: set[str] = set()
"""File systems, by fsspec's token of their options, whose store has answered this process at least once."""


class Found(NamedTuple):
    """An object: size in bytes, and its ETag, which changes when its content does."""

    size: int
    etag: str


class UploadedPart(NamedTuple):
    """A part of an upload that the store has. ``sha256`` is empty if the store does not report it."""

    number: int
    etag: str
    size: int
    sha256: bytes


def adapt_options(protocol: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options for fsspec. For S3, botocore's retries and fsspec's cache of listings are switched off."""
    if protocol not in _PROTOCOLS:
        return dict(options)
    config: dict[str, Any] = {"connect_timeout": 10, "read_timeout": 120, "max_pool_connections": _MOST_CONNECTIONS}
    config |= dict(options.get("config_kwargs") or {})
    config["retries"] = {"total_max_attempts": 1}
    return {**options, "config_kwargs": config, "use_listings_cache": False}


def is_s3(fs: Any) -> bool:
    """Return whether a file system of fsspec is s3fs's."""
    protocols = fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)
    return bool(set(_PROTOCOLS) & set(protocols))


def _prefix_of(folder: str) -> str:
    """Return the common prefix of the keys of all objects below a folder (``bucket/key``)."""
    return f"{folder}/".partition("/")[2]


class S3:
    """Objects of one store. Any thread. Errors are s3fs's: OSError, and FileNotFoundError if an object does not exist."""

    def __init__(self, fs: Any) -> None:
        fs.retries = 1  # s3fs reads it at each request; 1 means a single try
        self._fs = fs

    def _call(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        bucket, _, key = path.partition("/")
        return self._ask(method, path, Bucket=bucket, Key=key, **more)

    def _ask(self, method: str, where: str, **arguments: Any) -> dict[str, Any]:
        return dict(self._ask_again(lambda _: self._try(method, **arguments), where))

    def _ask_again(self, call: Callable[[bool], T], where: str) -> T:
        """Do as :func:`with_retries`, and explain an address that cannot be reached or a name that is not valid.

        Raises:
            UserError: the library refuses to send the request, for example because of an invalid bucket name.
        """
        token = str(getattr(self._fs, "_fs_token", id(self._fs)))
        try:
            found = with_retries(call, where, is_known=token in _ANSWERED)
        except Exception as error:
            if type(error).__name__ == "ParamValidationError":  # botocore's; the reason is in its second line
                reason = " ".join(str(error).split()).removeprefix("Parameter validation failed: ")
                # not a ValueError, which means that nothing can exist at this path
                raise UserError(f"s3://{where}: {reason}") from error
            reached = why_unreachable(error)
            if reached is None:
                if isinstance(error, OSError) or getattr(error, "response", None):
                    _ANSWERED.add(token)  # other errors, such as missing credentials, come without a request
                raise
            client = getattr(self._fs, "_s3", None)
            endpoint = getattr(getattr(client, "meta", None), "endpoint_url", "its endpoint")
            advice = (
                "it has answered before"
                if token in _ANSWERED
                else "say where the store is with client_kwargs.endpoint_url in storage_options, or with AWS_ENDPOINT_URL"
            )
            raise OSError(errno.EHOSTUNREACH, f"no server is reached at {endpoint} ({reached}); {advice}") from error
        _ANSWERED.add(token)
        return found

    def _try(self, method: str, **arguments: Any) -> dict[str, Any]:
        body = arguments.pop("Body", None)
        if body is not None:
            arguments["Body"] = io.BytesIO(body)  # new for each try; aiohttp warns that bytes are slow
        return dict(self._fs.call_s3(method, **arguments))

    def head(self, path: str) -> Found:
        """Return size and ETag."""
        try:
            found = self._call("head_object", path)
        except PermissionError:
            self.get(path, 0, 1)  # a refused HEAD gives no reason; a refused GET gives the store's reason
            raise
        return Found(int(found["ContentLength"]), str(found["ETag"]))

    def checksum(self, path: str) -> str:
        """Return the SHA-256 that the store keeps of an object, in the store's notation; empty if it keeps none."""
        return str(self._call("head_object", path, ChecksumMode="ENABLED").get("ChecksumSHA256") or "")

    def objects(self, folder: str, *, is_deep: bool = False) -> Iterator[tuple[str, Found]]:
        """Yield (path within ``folder``, object) for each object in it, ordered by path, in pages of 1,000."""
        prefix = _prefix_of(folder)
        for page in self._pages(folder, {} if is_deep else {"Delimiter": "/"}):
            for entry in page.get("Contents") or ():
                name = entry["Key"][len(prefix) :]
                if name and not name.endswith("/"):  # consoles create empty objects to represent folders
                    yield name, Found(int(entry["Size"]), str(entry["ETag"]))

    def folders(self, folder: str) -> Iterator[str]:
        """Yield the names of the folders directly in ``folder``."""
        prefix = _prefix_of(folder)
        for page in self._pages(folder, {"Delimiter": "/"}):
            for entry in page.get("CommonPrefixes") or ():
                yield entry["Prefix"][len(prefix) :].rstrip("/")

    def _pages(self, folder: str, more: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield a listing of the objects below ``folder``, in pages of at most 1,000 entries."""
        bucket = folder.partition("/")[0]
        while True:
            page = self._ask("list_objects_v2", folder, Bucket=bucket, Prefix=_prefix_of(folder), **more)
            yield page
            if not page.get("IsTruncated"):
                return
            more = {**more, "ContinuationToken": page["NextContinuationToken"]}

    def has_any(self, folder: str) -> bool:
        """Return whether there is an object in ``folder`` or below it."""
        bucket, _, prefix = f"{folder}/".partition("/")
        page = self._ask("list_objects_v2", folder, Bucket=bucket, Prefix=prefix, MaxKeys=1)
        return bool(page.get("Contents"))

    def why_no_bucket(self, path: str) -> str | None:
        """Return why nothing can exist below ``path``, if its bucket is the reason; None otherwise."""
        bucket = path.partition("/")[0]
        try:
            self._ask("head_bucket", bucket, Bucket=bucket)
        except FileNotFoundError:
            return f"there is no bucket {bucket!r}"
        except PermissionError:
            return None  # the bucket may still be usable
        return None

    def get(self, path: str, begin: int = 0, end: int | None = None, *, etag: str = "") -> bytes:
        """Return bytes ``begin`` to ``end`` of an object; fewer if it ends before.

        With ``etag`` only the object with this ETag is read: OSError(ESTALE) if it was replaced by another one.
        """
        if end is not None and end <= begin:
            return b""
        if etag:
            assert end is not None
            return self.get_ranges(path, [(begin, end)], etag=etag)[0]
        given = {} if begin == 0 and end is None else {"start": begin, "end": end}
        data = bytes(self._ask_again(lambda _: self._fs.cat_file(path, **given), path))
        TRAFFIC.add(downloaded=len(data))
        return data

    def get_ranges(self, path: str, ranges: Sequence[tuple[int, int]], *, etag: str = "") -> list[bytes]:
        """Return several ranges (first byte, byte after the last), requested at once; only failed ones are repeated.

        ``etag`` as in :meth:`get`.
        """
        found: list[bytes | None] = [None] * len(ranges)
        missing = [place for place, (begin, end) in enumerate(ranges) if end > begin]
        if len(missing) == 1 and not etag:
            found[missing[0]] = self.get(path, *ranges[missing[0]])
            missing = []

        def ask(_: bool) -> None:
            TRAFFIC.add(requests=len(missing) - 1)
            if etag:
                outcomes = get_matching(self._fs, path, [ranges[place] for place in missing], etag)
            else:
                starts, ends = zip(*(ranges[place] for place in missing), strict=True)
                outcomes = self._fs.cat_ranges([path] * len(missing), list(starts), list(ends), on_error="return")
            failed = {}
            for place, outcome in zip(tuple(missing), outcomes, strict=True):
                if isinstance(outcome, BaseException):
                    failed[place] = outcome
                else:
                    found[place] = bytes(outcome)
                    TRAFFIC.add(downloaded=len(outcome))
            missing[:] = list(failed)
            if failed:
                raise next(iter(failed.values()))

        try:
            if missing:
                self._ask_again(ask, path)
        except OSError as error:
            if not etag or not is_refused(error):
                raise
            raise OSError(errno.ESTALE, "is another object than the one that was opened") from error
        return [b"" if data is None else data for data in found]

    def put(self, path: str, data: bytes) -> str:
        """Write an object, even if one exists; return its ETag."""
        found = self._call("put_object", path, Body=data)
        TRAFFIC.add(uploaded=len(data))
        return str(found["ETag"])

    def copy_if_same(self, source: str, path: str, data: bytes) -> bool:
        """Make the store copy an object that has the content ``data``; return whether it did.

        Its ETag is the MD5 of its content if it was written by one request and not encrypted with a key of the user's. Any
        other object is not copied.
        """
        bucket, _, key = source.partition("/")
        etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
        try:
            found = self._call("copy_object", path, CopySource={"Bucket": bucket, "Key": key}, CopySourceIfMatch=etag)
        except OSError as error:
            if is_transient(error):
                raise
            return False  # another content, no such object, or no right to copy it
        if _unquoted(str(found["CopyObjectResult"]["ETag"])) != etag:  # a store that does not know the condition
            return False
        TRAFFIC.add(copied=len(data))
        return True

    def put_if(self, path: str, data: bytes, *, etag: str | None) -> str | None:
        """Write an object only if there is none (``etag`` None), or only over the one with this ETag; return the new ETag.

        Returns None if the condition does not hold. If the answer to a try is lost, the condition fails for the next try.
        (aiohttp also repeats a request if a kept-alive connection was cut.) Therefore the object in the store is compared
        with ``data``, which must differ from what any other process would write.
        """
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        bucket, _, key = path.partition("/")

        def ask(_: bool) -> str | None:
            try:
                found = self._try("put_object", Bucket=bucket, Key=key, Body=data, **condition)
            except FileNotFoundError:
                if etag is None:
                    raise
                return None  # the object is gone, so it cannot have this ETag
            except OSError as error:
                if not is_refused(error):
                    raise
                return self._etag_if_same(path, data)
            TRAFFIC.add(uploaded=len(data))
            return str(found["ETag"])

        return self._ask_again(ask, path)

    def _etag_if_same(self, path: str, data: bytes) -> str | None:
        try:
            found = self.head(path)
            return found.etag if found.size == len(data) and self.get(path) == data else None
        except FileNotFoundError:  # another process has removed it since it refused the write
            return None

    def delete(self, path: str) -> None:
        """Remove an object, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            self._call("delete_object", path)

    def delete_tree(self, folder: str) -> None:
        """Remove all objects in ``folder`` and below it."""
        bucket, _, prefix = f"{folder}/".partition("/")
        keys = [{"Key": prefix + name} for name, _ in self.objects(folder, is_deep=True)]
        for first in range(0, len(keys), _DELETED_AT_ONCE):
            some = {"Objects": keys[first : first + _DELETED_AT_ONCE], "Quiet": True}
            self._ask("delete_objects", folder, Bucket=bucket, Delete=some)

    # ---- uploads in parts ----

    def list_uploads(self, folder: str) -> Iterator[tuple[str, str]]:
        """Yield (name, upload id) of the unfinished uploads to objects directly in ``folder``."""
        bucket, _, prefix = f"{folder}/".partition("/")
        more: dict[str, Any] = {}
        while True:
            page = self._ask("list_multipart_uploads", folder, Bucket=bucket, Prefix=prefix, **more)
            for entry in page.get("Uploads") or ():
                name = entry["Key"][len(prefix) :]
                if name and "/" not in name:
                    yield name, entry["UploadId"]
            if not page.get("IsTruncated"):
                return
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page.get("NextUploadIdMarker", "")}

    def begin_upload(self, path: str) -> str:
        """Begin an upload in parts, each of them with a SHA-256; return its id."""
        return str(self._call("create_multipart_upload", path, ChecksumAlgorithm="SHA256")["UploadId"])

    def list_parts(self, path: str, upload: str) -> dict[int, UploadedPart] | None:
        """Return the parts of an upload, by number; None if the upload does not exist."""
        parts: dict[int, UploadedPart] = {}
        more: dict[str, Any] = {}
        while True:
            try:
                page = self._call("list_parts", path, UploadId=upload, **more)
            except FileNotFoundError:
                return None
            for entry in page.get("Parts") or ():
                number = int(entry["PartNumber"])
                sha256 = base64.b64decode(entry.get("ChecksumSHA256") or "")
                parts[number] = UploadedPart(number, _unquoted(entry["ETag"]), int(entry["Size"]), sha256)
            if not page.get("IsTruncated"):
                return parts
            more = {"PartNumberMarker": page["NextPartNumberMarker"]}

    def upload_part(self, path: str, upload: str, number: int, data: bytes) -> UploadedPart:
        """Send a part with its SHA-256, which the store checks."""
        sha256 = hashlib.sha256(data).digest()
        found = self._call(
            "upload_part",
            path,
            UploadId=upload,
            PartNumber=number,
            Body=data,
            ChecksumSHA256=base64.b64encode(sha256).decode(),
        )
        TRAFFIC.add(uploaded=len(data))
        return UploadedPart(number, _unquoted(found["ETag"]), len(data), sha256)

    def copy_part(
        self, path: str, upload: str, number: int, source: str, *, begin: int, end: int, etag: str
    ) -> UploadedPart:
        """Make the store copy bytes ``begin`` to ``end`` of ``source`` into a part, if its ETag is still ``etag``."""
        bucket, _, key = source.partition("/")
        found = self._call(
            "upload_part_copy",
            path,
            UploadId=upload,
            PartNumber=number,
            CopySource={"Bucket": bucket, "Key": key},
            CopySourceRange=f"bytes={begin}-{end - 1}",
            CopySourceIfMatch=etag,
        )["CopyPartResult"]
        TRAFFIC.add(copied=end - begin)
        sha256 = base64.b64decode(found.get("ChecksumSHA256") or "")
        return UploadedPart(number, _unquoted(found["ETag"]), end - begin, sha256)

    def complete_upload(self, path: str, upload: str, parts: Sequence[UploadedPart]) -> None:
        """Assemble the object from the parts."""
        listed = [
            {"PartNumber": part.number, "ETag": part.etag}
            | ({"ChecksumSHA256": base64.b64encode(part.sha256).decode()} if part.sha256 else {})
            for part in parts
        ]
        bucket, _, key = path.partition("/")
        size = sum(part.size for part in parts)

        def ask(is_again: bool) -> None:
            try:
                self._fs.call_s3(
                    "complete_multipart_upload",
                    Bucket=bucket,
                    Key=key,
                    UploadId=upload,
                    MultipartUpload={"Parts": listed},
                )
            except FileNotFoundError:  # an earlier try may have succeeded and its answer been lost
                if not is_again or self.head(path).size != size:
                    raise

        self._ask_again(ask, path)

    def abort_upload(self, path: str, upload: str) -> None:
        """Abort an upload and remove its parts. Does nothing if the upload does not exist."""
        with contextlib.suppress(FileNotFoundError):
            self._call("abort_multipart_upload", path, UploadId=upload)


def _unquoted(etag: str) -> str:
    return str(etag).strip('"')
