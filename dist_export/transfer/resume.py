"""Make a receipt for each complete shard, and find the receipts of an interrupted export that are still valid."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dist_export.formats.digests import NONE, SHA256_PARTS, algorithm_of, digest_of_parts, root_digest
from dist_export.humanize import count
from dist_export.manifest import PartDigest
from dist_export.plan.plan import SparsePlan
from dist_export.storage.directory import Directory
from dist_export.storage.s3 import UploadedPart
from dist_export.transfer.multipart_upload import Uploads
from dist_export.workdir.state import Receipt, is_partial, read_receipt

logger = logging.getLogger(__name__)


class Receipts:
    """The receipts of one plan's shards in ``target``. It makes and reads receipts, but does not write them."""

    def __init__(self, plan: SparsePlan, target: Directory, uploads: Uploads | None, *, digest: str) -> None:
        self._plan = plan
        self._target = target
        self._uploads = uploads
        self._digest = digest

    def make(self, number: int, chunks: Sequence[bytes], sent: Sequence[UploadedPart] = ()) -> Receipt:
        """Return the receipt of a file. ``chunks`` are the digests of its chunks, or of its parts if the store copies parts."""
        file = self._plan.files[number]
        digest = ""
        parts: tuple[PartDigest, ...] = ()
        if self._digest != NONE and self._uploads is not None and self._uploads.has_remote(number):
            sizes = [part.end - part.begin for part in self._uploads.parts[number].parts]
            digest = digest_of_parts(list(chunks))
            parts = tuple(PartDigest(num_bytes=n, sha256=c.hex()) for n, c in zip(sizes, chunks, strict=True))
        elif self._digest != NONE:
            digest = root_digest(list(chunks), self._digest)
        return Receipt(
            plan=self._plan.digest,
            name=file.name,
            num_bytes=file.num_bytes,
            digest=digest,
            parts=parts,
            stored="" if self._uploads is None else self._uploads.checksum(sent),
        )

    def find(self) -> tuple[dict[int, Receipt], dict[int, Receipt]]:
        """Return the receipts of the same plan whose shards exist, and remove half-written files. Rank 0.

        Returns:
            First the receipts of shards that must be read to check them. Then those of shards whose checksum in the S3
            store proves them.
        """
        found, vouched, others = {}, {}, 0
        self._target.make()
        for name in self._target.names():
            if is_partial(name):
                self._target.remove(name)
        for number, file in enumerate(self._plan.files):
            receipt = read_receipt(self._target, file.name)
            if receipt is None or not self._target.exists(file.name):
                continue
            others += receipt.plan != self._plan.digest
            size = self._target.stat(file.name).size
            has_parts = self._uploads is not None and self._uploads.has_remote(number) and self._digest != NONE
            expected = SHA256_PARTS if has_parts else self._digest
            is_hashed_alike = algorithm_of(receipt.digest) == expected
            if not (
                receipt.plan == self._plan.digest and receipt.num_bytes == size == file.num_bytes and is_hashed_alike
            ):
                continue
            s3 = self._target.s3
            if s3 is not None and receipt.stored:
                if s3.checksum(self._target.join(file.name)) == receipt.stored:
                    vouched[number] = receipt
            elif not has_parts:
                found[number] = receipt
        if others:
            logger.info(
                "%s: an unfinished export has left %s for another state of the checkpoint's files, other settings or another "
                "version; they are written anew",
                self._target.url,
                count(others, "shard"),
            )
        return found, vouched
