"""Upload shards to an S3 store in parts. All ranks send parts, or let the store copy them. Rank 0 begins the uploads.

The order: ``begin`` on rank 0, ``join`` with its result on every rank, then a :class:`PartWriter` in each thread. The
thread that knows that all parts are sent calls ``complete``. If an export is killed, its uploads stay in the store. ``begin``
of the next export finds them, and reuses their parts or aborts them.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import io
import re
from collections.abc import Sequence

import msgspec

from dist_export.errors import TransferError
from dist_export.formats.digests import NONE
from dist_export.plan.multipart import FileParts, Part, plan_parts
from dist_export.plan.plan import SparsePlan
from dist_export.runtime.io_activity import ACTIVITY
from dist_export.storage.directory import Directory
from dist_export.storage.local_io import naming_any
from dist_export.storage.range_reader import RangeReader
from dist_export.storage.s3 import S3, UploadedPart
from dist_export.storage.s3_conditions import is_refused
from dist_export.storage.s3_upload import composite_checksum
from dist_export.transfer.output_files import StagedFiles
from dist_export.workdir.state import UPLOADS

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_REQUESTS_AT_ONCE = 8


class _Record(msgspec.Struct, frozen=True):
    """The uploads that rank 0 began, as it records them."""

    layout: str
    """Identifies the plan and how it is cut into parts."""
    uploads: dict[str, str]
    """File -> upload id."""


_RECORDS = msgspec.json.Decoder(_Record)


class Begun(msgspec.Struct, frozen=True):
    """One upload: its id, and the parts that an interrupted export sent, by number."""

    upload: str
    there: dict[int, UploadedPart]


def plan_uploads(
    plan: SparsePlan, target: Directory, part_bytes: int, *, may_copy: bool, digest: str
) -> Uploads | None:
    """Return the uploads of an export to S3, without a request to the store; None for another target."""
    if target.s3 is None:
        return None
    parts = plan_parts(plan, part_bytes=part_bytes, may_copy=may_copy)
    return Uploads(plan, target, parts, needs_sha256=digest != NONE)


class Uploads:
    """The uploads of one export. One object for each process, shared by its threads."""

    def __init__(self, plan: SparsePlan, target: Directory, parts: dict[int, FileParts], *, needs_sha256: bool) -> None:
        """Set up the uploads without a request to the store.

        Args:
            plan: the plan of the export.
            target: the export directory, on S3.
            parts: the parts of each file that is uploaded in parts, by file number.
            needs_sha256: whether the store must return the SHA-256 of each part that it copies.
        """
        assert target.s3 is not None
        self.plan = plan
        self.parts = parts
        self._target = target
        self._s3: S3 = target.s3
        self._needs_sha256 = needs_sha256
        self._begun: dict[int, Begun] = {}

    def __contains__(self, number: object) -> bool:
        return number in self.parts

    def has_remote(self, number: int) -> bool:
        """Whether the store copies parts of this file."""
        return number in self.parts and self.parts[number].has_remote

    def is_built(self, number: int) -> bool:
        """Whether this file, or the bytes of it that ranks send, is built on a disk first."""
        return number not in self.parts or self.parts[number].is_built

    def begin(self, numbers: Sequence[int]) -> dict[int, Begun]:
        """Find or begin the uploads of these files, and abort uploads of other shards in the directory. Rank 0."""
        layout = self._layout()
        noted = self._read_record()
        names = {self.plan.files[number].name: number for number in numbers if self.parts[number].parts}
        usable = noted.uploads if noted is not None and noted.layout == layout else {}
        ours = {*names, *(noted.uploads if noted is not None else ())}
        with naming_any(self._target.url):
            listed = list(self._s3.list_uploads(self._target.path))
        found = [(name, upload) for name, upload in listed if name in ours or _SHARD.fullmatch(name)]
        with concurrent.futures.ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:

            def settle(entry: tuple[str, str]) -> tuple[int, Begun] | None:
                name, upload = entry
                with naming_any(self._target.describe(name)):
                    there = None
                    if name in names and usable.get(name) == upload:
                        there = self._s3.list_parts(self._target.join(name), upload)
                    if there is None:
                        self._s3.abort_upload(self._target.join(name), upload)
                        return None
                return names[name], Begun(upload, there)

            begun = dict(outcome for outcome in pool.map(settle, found) if outcome is not None)

            def start(number: int) -> tuple[int, Begun]:
                name = self.plan.files[number].name
                with naming_any(self._target.describe(name)):
                    return number, Begun(self._s3.begin_upload(self._target.join(name)), {})

            begun.update(pool.map(start, [number for number in names.values() if number not in begun]))
        uploads = {self.plan.files[number].name: its.upload for number, its in begun.items()}
        self._target.write(UPLOADS, msgspec.json.encode(_Record(layout, uploads)))
        return begun

    def join(self, begun: dict[int, Begun]) -> None:
        """Use the uploads that rank 0 began. Every rank."""
        self._begun = begun

    def _layout(self) -> str:
        edges = hashlib.sha256()
        for number in sorted(self.parts):
            edges.update(repr((number, self.parts[number].parts)).encode())
        return f"{self.plan.digest} {edges.hexdigest()}"

    def _read_record(self) -> _Record | None:
        try:
            return _RECORDS.decode(self._target.read(UPLOADS))
        except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def send(self, number: int, place: int, data: bytes) -> UploadedPart:
        """Send the part at index ``place`` of a file, unless the store already has the same bytes."""
        begun = self._begun[number]
        there = begun.there.get(place + 1)
        if there is not None and there.size == len(data):
            is_same = there.etag == hashlib.md5(data, usedforsecurity=False).hexdigest()
            if is_same:
                return there._replace(sha256=hashlib.sha256(data).digest())
        where = self._target.describe(self.plan.files[number].name)
        ACTIVITY.begin(where)
        try:
            with naming_any(where):
                return self._s3.upload_part(self._path(number), begun.upload, place + 1, data)
        finally:
            ACTIVITY.end()

    def copy(self, number: int, place: int) -> UploadedPart:
        """Let the store copy the part at index ``place`` of a file, unless it already did.

        Raises:
            TransferError: the source changed, or a SHA-256 is needed and the store returns none.
        """
        begun, part = self._begun[number], self.parts[number].parts[place]
        there = begun.there.get(place + 1)
        if there is not None and there.size == part.end - part.begin and there.sha256:
            return there
        checkpoint = self.plan.checkpoint
        source = checkpoint.files[part.source_file]
        where = self._target.describe(self.plan.files[number].name)
        ACTIVITY.begin(where)
        try:
            with naming_any(where):
                try:
                    done = self._s3.copy_part(
                        self._path(number),
                        begun.upload,
                        place + 1,
                        checkpoint.directory.join(source.name),
                        begin=part.source_offset,
                        end=part.source_offset + part.end - part.begin,
                        etag=source.version,
                    )
                except OSError as error:
                    if not is_refused(error):
                        raise
                    raise TransferError(
                        f"{checkpoint.directory.describe(source.name)}: changed while it was being exported, so the shards "
                        "may mix two checkpoints. No manifest was written; run the export again on a checkpoint that is "
                        "finished"
                    ) from error
        finally:
            ACTIVITY.end()
        if self._needs_sha256 and not done.sha256:
            raise TransferError(
                f"{where}: the store tells no SHA-256 of the bytes that it copies itself, so nothing would vouch for them. "
                "Set server_side_copy: false, which sends them through the export, or digest: none"
            )
        return done

    def complete(self, number: int, parts: Sequence[UploadedPart]) -> None:
        """Complete the object from all its parts, in order."""
        name = self.plan.files[number].name
        with naming_any(self._target.describe(name)):
            if number in self._begun:
                self._s3.complete_upload(self._path(number), self._begun[number].upload, parts)
            else:  # an empty file has no parts, and so no upload
                self._s3.put(self._path(number), b"")

    def sweep(self) -> None:
        """Abort uploads that remain when all files are complete, such as one that was begun twice. Rank 0."""
        names = {file.name for file in self.plan.files}
        with naming_any(self._target.url):
            for name, upload in list(self._s3.list_uploads(self._target.path)):
                if name in names:
                    self._s3.abort_upload(self._target.join(name), upload)

    def checksum(self, parts: Sequence[UploadedPart]) -> str:
        """Return the checksum that the store will keep for the object; empty if a part has none."""
        if not parts or not all(part.sha256 for part in parts):
            return ""
        return composite_checksum([part.sha256 for part in parts])

    def _path(self, number: int) -> str:
        return self._target.join(self.plan.files[number].name)


class PartWriter:
    """Writes as :class:`~dist_export.transfer.output_files.StagedFiles` does, but uploads some files in parts. One a thread.

    An uploaded file is written in runs of whole parts, each from begin to end. A part is sent when its last byte is written.
    """

    def __init__(self, staged: StagedFiles, uploads: Uploads) -> None:
        self._staged = staged
        self._uploads = uploads
        self._positions: dict[int, dict[int, int]] = {}
        """For each file: first byte of a part -> index of the part."""
        self._current: tuple[int, int] | None = None
        self._buffer = io.BytesIO()
        """The bytes of the current part. Its value and the memory that the store's library reads are the same."""
        self._sent: dict[int, list[UploadedPart]] = {}

    def write(self, number: int, view: memoryview, offset: int) -> None:
        """Write bytes of output ``number`` from byte ``offset`` on."""
        if self._uploads.is_built(number):
            self._staged.write(number, view, offset)
        else:
            self.send(number, view, offset)

    def write_columns(self, number: int, rows: memoryview, offset: int, row_bytes: int, begin: int, end: int) -> None:
        """Write columns of rows. A file that gets rows from the memory of ranks is always built on a disk."""
        assert self._uploads.is_built(number)
        self._staged.write_columns(number, rows, offset, row_bytes, begin, end)

    def send(self, number: int, view: memoryview, offset: int) -> None:
        """Add bytes to the current part, and send the part when its last byte is added."""
        while view:
            if self._current is None:
                self._current = number, self._place(number, offset)
            place = self._current[1]
            part = self._part(number, place)
            assert self._current[0] == number
            assert offset == part.begin + self._buffer.tell()
            count = min(len(view), part.end - offset)
            self._buffer.write(view[:count])
            view, offset = view[count:], offset + count
            if offset == part.end:
                data, self._buffer, self._current = self._buffer.getvalue(), io.BytesIO(), None
                self._keep(number, self._uploads.send(number, place, data))

    def copy_part(self, number: int, begin: int) -> None:
        """Let the store copy the part that begins at byte ``begin``."""
        self._keep(number, self._uploads.copy(number, self._place(number, begin)))

    def copy(self, number: int, offset: int, source: RangeReader, source_offset: int, num_bytes: int) -> int:
        """Copy inside the kernel as many bytes as possible, and return their number."""
        if not self._uploads.is_built(number):
            return 0
        return self._staged.copy(number, offset, source, source_offset, num_bytes)

    def take_parts(self, number: int) -> list[UploadedPart]:
        """Return the parts of a file that were sent since the last call."""
        assert self._current is None or self._current[0] != number
        return self._sent.pop(number, [])

    def sync(self, number: int) -> None:
        """Make the bytes durable that this writer wrote into output ``number``."""
        self._staged.sync(number)

    def close(self, *, sync: bool) -> None:
        """Close all descriptors. With ``sync``, make the content durable first."""
        self._staged.close(sync=sync)

    def _keep(self, number: int, part: UploadedPart) -> None:
        self._sent.setdefault(number, []).append(part)

    def _part(self, number: int, place: int) -> Part:
        return self._uploads.parts[number].parts[place]

    def _place(self, number: int, begin: int) -> int:
        positions = self._positions.get(number)
        if positions is None:
            positions = self._positions[number] = {
                part.begin: place for place, part in enumerate(self._uploads.parts[number].parts)
            }
        return positions[begin]
