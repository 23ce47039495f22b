"""Upload a local file to S3, and compute the checksum that a store keeps of an object uploaded in parts."""

from __future__ import annotations

import base64
import concurrent.futures
import hashlib
import os
from collections.abc import Callable, Sequence

from dist_export.storage.s3 import S3, UploadedPart

MAX_PARTS = 10_000

_FILE_PART_BYTES = 8 << 20


def put_file(s3: S3, local: str, path: str, *, note_progress: Callable[[], None]) -> None:
    """Upload a local file in parts, two at a time; on an error nothing of it stays."""
    size = os.path.getsize(local)
    part_bytes = _FILE_PART_BYTES
    while -(-size // part_bytes) > MAX_PARTS:
        part_bytes *= 2
    with open(local, "rb") as file:
        if size <= part_bytes:
            s3.put(path, file.read())
            return
        upload = s3.begin_upload(path)

        def send(number: int) -> UploadedPart:
            part = s3.upload_part(path, upload, number + 1, os.pread(file.fileno(), part_bytes, number * part_bytes))
            note_progress()
            return part

        try:
            with concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="upload") as pool:
                parts = list(pool.map(send, range(-(-size // part_bytes))))
            s3.complete_upload(path, upload, parts)
        except BaseException:
            s3.abort_upload(path, upload)
            raise


def composite_checksum(sha256s: Sequence[bytes]) -> str:
    """Return the checksum that a store keeps of an object uploaded in parts, from the SHA-256 of each part."""
    whole = hashlib.sha256(b"".join(sha256s)).digest()
    return f"{base64.b64encode(whole).decode()}-{len(sha256s)}"
