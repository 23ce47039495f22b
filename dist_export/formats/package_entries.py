"""The entries of ``manifest.json``, as data. :mod:`dist_export.manifest` has the whole manifest."""

from __future__ import annotations

from typing import Annotated

import msgspec

from dist_export.formats.delta_entries import Count, DeltaEntry, RowFingerprintsEntry

Shape = Annotated[tuple[Count, ...], msgspec.Meta(max_length=64)]


class CastEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The error that casting a slot's values caused, over the rows of the package.

    In a compacted package it is over the rows of its base and of its delta, also those of the base that the delta replaced.
    """

    source_dtype: str
    """The dtype in the checkpoint; ``int8_rowwise`` if the source is a package whose rows have that encoding."""
    values: Count
    """The number of values that were cast."""
    max_abs_error: float
    mean_abs_error: float
    """The mean over the values that fit."""
    nans: Count = 0
    out_of_range: Count = 0
    """Values that do not fit and were clamped. NaN is kept, except in int8, which has no NaN: there it becomes 0."""


class SlotEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One slot of a table. It was kept, or dropped for ``reason``."""

    name: str
    dtype: str
    """torch's name, such as float32."""
    shape: Shape
    """The shape of one row."""
    num_bytes: Count
    """Bytes in the shards for a kept slot, in the source for a dropped one."""
    reason: str = ""
    encoding: str | msgspec.UnsetType = msgspec.UNSET
    """``int8_rowwise``: each row is ``dim`` bytes (uint8), then scale and bias (little-endian float32); a value is
    ``byte * scale + bias``. Absent if rows are plain values of ``dtype``."""
    dim: Count | msgspec.UnsetType = msgspec.UNSET
    """The number of values in one row, if there is an encoding; ``shape`` is in bytes then."""
    cast: CastEntry | msgspec.UnsetType = msgspec.UNSET
    """Present if ``dtype`` is not the dtype of the checkpoint."""
    earlier_casts: tuple[CastEntry, ...] | msgspec.UnsetType = msgspec.UNSET
    """If the source is a package: the earlier casts of its rows, oldest first, each over the rows of that time. Their errors
    are not in ``cast``, which starts from their result."""
    is_ignored: bool | msgspec.UnsetType = msgspec.UNSET
    """True if a delta did not compare the slot (``delta_ignore_slots``), and ``compact`` took rows of its base: in these rows it
    has the values of the base, and not those of the source. Else absent."""

    @property
    def casts(self) -> tuple[CastEntry, ...]:
        """All casts of the rows, oldest first."""
        earlier = () if self.earlier_casts is msgspec.UNSET else self.earlier_casts
        return earlier if self.cast is msgspec.UNSET else (*earlier, self.cast)


class RowIndexEntry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Where the row index of a part is. :mod:`dist_export.formats.row_index` describes its content."""

    file: str
    """Relative to the package, with forward slashes."""
    offset: Count
    """Bytes of the file before the first slot; a multiple of 64."""
    num_slots: Count
    """Slots of 4 bytes, the empty one at the end included."""
    seed: Count
    """The seed of the hash of ids."""
    longest_probe: Count
    """The largest distance of a row from its bucket, in slots."""


class PartEntry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The rows of a table in one file."""

    file: str
    slice: str
    """BEGIN@END@SIZE: the ids with BEGIN <= uint64(id) mod SIZE < END; in a row-indexed table, rows BEGIN to END of SIZE."""
    rows: Count
    first_row: Count | msgspec.UnsetType = msgspec.UNSET
    """The number of the part's first row, for a row-indexed table."""
    keys: dict[str, str]
    """Slot -> name of the block in the file."""
    row_index: RowIndexEntry | msgspec.UnsetType = msgspec.UNSET
    """Absent for a row-indexed table, for a part without rows, and if ``row_index`` is off."""
    row_fingerprints: RowFingerprintsEntry | msgspec.UnsetType = msgspec.UNSET
    """Absent for a part without rows, and if ``row_fingerprints`` is off."""


class TableEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One embedding table and the account of its rows: rows_in = rows_out + the sum of rows_dropped."""

    name: str
    rows_in: Count
    rows_out: Count
    rows_dropped: dict[str, Count]
    """Reason -> rows: ``duplicate`` if another row of the same id was kept; ``slot_value``, ``norm``, ``deny_list`` and
    ``allow_list`` for pruned rows; ``empty`` for rows of a managed-collision table without an id; ``same`` for rows that a
    delta package leaves to its base. A reason without rows is not listed."""
    misplaced: Count
    """Misplaced rows of the source: rows outside the slice of their part. 0 in a copy, which refuses them."""
    repaired: Count = 0
    """Misplaced rows that are in the right slice now, in a delta also those that it leaves to its base; the others were
    dropped."""
    duplicates: Count = 0
    """Rows of the source beyond one for each id, without pruned rows."""
    id_sum: str
    """Sum of the mixed ids modulo 2**64, in hexadecimal."""
    kept: tuple[SlotEntry, ...]
    dropped: tuple[SlotEntry, ...]
    parts: tuple[PartEntry, ...]
    is_hashed: bool | msgspec.UnsetType = msgspec.UNSET
    """False for a row-indexed table: it has no ids here. Absent, which means true, for hash tables."""
    source_name: str | msgspec.UnsetType = msgspec.UNSET
    """The table's name in the source, if it differs."""
    default_row: str | tuple[float, ...] | msgspec.UnsetType = msgspec.UNSET
    """What serving must use for an out-of-vocabulary id, if the settings define it: ``zeros``, or the values of a row."""
    delta: DeltaEntry | msgspec.UnsetType = msgspec.UNSET
    """In a delta package: how the table differs from that of the base."""

    @property
    def is_row_indexed(self) -> bool:
        """Whether rows are found by their row number, and not by an id."""
        return self.is_hashed is False


class LeftOutEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A table of the source that the settings exclude."""

    name: str
    rows: Count
    reason: str
    """``drop_tables`` or ``select_tables``."""


class PruneEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One rule of ``prune``, as in the settings, and what it did."""

    tables: tuple[str, ...]
    reason: str
    """The reason under which ``rows_dropped`` counts these rows."""
    slot: str | msgspec.UnsetType = msgspec.UNSET
    below: int | float | msgspec.UnsetType = msgspec.UNSET
    norm_at_most: int | float | msgspec.UnsetType = msgspec.UNSET
    deny: str | msgspec.UnsetType = msgspec.UNSET
    allow: str | msgspec.UnsetType = msgspec.UNSET
    ids: Count | msgspec.UnsetType = msgspec.UNSET
    """The number of ids in the list."""
    ids_digest: str | msgspec.UnsetType = msgspec.UNSET
    """``xxh3:<hex>``: xxh3-128 over the list's ids as little-endian int64, sorted, without duplicates."""
    rows: Count
    """The rows that this rule pruned, among those that earlier rules left."""


class DenseTensorEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A dense tensor among the sparse files. If it was dropped, ``reason`` says why."""

    name: str
    dtype: str
    shape: Shape
    reason: str = ""


class PartDigest(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A part of a file that was assembled within an S3 store."""

    num_bytes: Count
    sha256: str
    """In hexadecimal, as the store computed it."""


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the package."""

    path: str
    """Relative to the package, with forward slashes."""
    num_bytes: Count
    digest: str
    """``<algorithm>:<hex>``: the algorithm (xxh3 is xxh3-128, sha256, blake3) over the concatenated digests of the file's
    64 MiB chunks, which use the same algorithm. Empty for a shard that was exported without a digest.
    ``sha256-parts:<hex>`` is the sha256 over the concatenated digests of ``parts``."""
    parts: tuple[PartDigest, ...] | msgspec.UnsetType = msgspec.UNSET
    """The parts in order, for a file of which an S3 store copied parts itself."""


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An input or output of the dense arch."""

    name: str
    dtype: str
    shape: tuple[Count | str, ...]
    """A free dimension is its name. The first dimension of every input is ``batch``."""


class FormatEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The dense arch in a further format, beside the exported program: the same inputs and outputs by the same names."""

    format: str
    """``onnx``, or ``aoti``: compiled by AOTInductor. The bytes of such a file differ between two exports."""
    file: str
    """Relative to the package, with forward slashes."""
    parity: ParityEntry
    """The file, run by its own runtime, against the model."""
    versions: dict[str, str]
    """Of the software that wrote and ran the file, besides torch."""
    opset: Count | msgspec.UnsetType = msgspec.UNSET
    """Of an ONNX file, the version of its operators."""
    machine: str | msgspec.UnsetType = msgspec.UNSET
    """Of compiled code, the kind of machine: ``x86_64``, ``aarch64``."""
    features: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    """Of compiled code, the features of the processor that it may use, by the names of Linux's /proc/cpuinfo."""


class DenseEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The traced dense arch."""

    folder: str
    program: str
    """Path of the exported program, relative to the package."""
    archive_format: str
    inputs: tuple[TensorEntry, ...]
    """In call order. Each is a keyword argument of the program."""
    outputs: tuple[TensorEntry, ...]
    """In the order in which the program returns them."""
    dropped_inputs: tuple[str, ...]
    max_batch_size: Count
    input_order: tuple[str, ...] = ()
    """All inputs, dropped ones too, in the order of the sparse arch's mapping, which is how the dense arch got them."""
    constants: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    """Entries of that mapping that are not tensors, as Python literals. They are constants of the program."""
    torch: str = ""
    """The version of torch that wrote the folder."""
    formats: tuple[FormatEntry, ...] | msgspec.UnsetType = msgspec.UNSET
    """The dense arch in further formats, in the order of the setting ``dense_formats``; absent without any."""
    layouts: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    """Layout of a server -> its directory, relative to the package. ``triton``: a model repository."""


class FilesParityEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The sample batch, scored by the written program on rows of the written shards, and by the model on rows of the checkpoint.

    If ``reads_rows`` is false, both use the outputs of the model's sparse arch, without any row of the shards. The figures
    are the largest differences, by output.
    """

    rows: Count
    """The rows of the batch."""
    reads_rows: bool
    """Whether any row of the sample was read from the written shards. If not, only the program comes from files."""
    reference: str = ""
    """What the program was compared with: as :attr:`ParityEntry.reference`, or ``copy``: the plain copy of the dense arch on
    rows as serving gets them. ``copy`` is used if settings (cast, prune, duplicates) change a row of the batch."""
    max_abs: dict[str, float]
    max_rel: dict[str, float]
    max_ulp: dict[str, int]


class ParityEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The written program against the model: the largest differences over all batch sizes, by output.

    At the size of the whole batch, the reference is the caller's own model on the checkpoint's own rows. At the other sizes
    it is a plain copy of the dense arch.
    """

    reference: str = ""
    """``model``: the output of the caller's dense arch within ``model(batch)``; ``arches``: the output of
    ``dense_arch(sparse_arch(batch))``, if the model did not run as a whole."""
    batch_sizes: tuple[int, ...]
    atol: float
    rtol: float
    max_abs: dict[str, float]
    max_rel: dict[str, float]
    max_ulp: dict[str, int] = {}
    """In units in the last place of the output's dtype."""
    from_files: FilesParityEntry | None = None


class ScoreParityEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The written score program on rows of the written shards, against the model. The largest differences by output."""

    batch_sizes: tuple[int, ...]
    """Examples of the batches that were compared: the sample, then the sample cut or repeated to 1, 2 and 301 examples."""
    further_batches: Count = 0
    """Batches of the dataset that were compared instead, if it is not known which elements belong to one example."""
    reference: str
    """What the sample was compared with: as :attr:`ParityEntry.reference`, or ``copy`` if settings change a row of it. The
    other batches are compared with the plain copy of the dense arch on what the model's own sparse arch gives."""
    max_abs: dict[str, float]
    max_rel: dict[str, float]
    max_ulp: dict[str, int]


class ScoreEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The score program: the whole model as one exported program, with lookups as operators. Its rows are in the shards."""

    program: str
    """Path of the exported program, relative to the package."""
    sample: str
    """Path of the stored inputs and outputs of a sample, relative to the package."""
    inputs: tuple[TensorEntry, ...]
    """In call order. Each is a keyword argument of the program. Free sizes are names or expressions of names."""
    outputs: tuple[TensorEntry, ...]
    """In the order in which the program returns them."""
    dropped_inputs: tuple[str, ...]
    """Tensors of the batch that reach no output."""
    conditions: tuple[str, ...] = ()
    """What the program demands of free sizes, such as ``batch <= 1000``, because the model's code branches on them. It refuses
    other inputs."""
    tables: tuple[str, ...]
    """The tables that it looks rows up in."""
    row_modules: dict[str, str] = {}
    """Module of the sparse arch that was replaced by a lookup as a whole -> its table, because it returned exactly the rows
    of its ids."""
    parity: ScoreParityEntry | None = None
    torch: str = ""
    """The version of torch that wrote the program."""


class AccountTensor(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A tensor of the source that is in no table of the package, and what happened to it."""

    name: str
    dtype: str
    """torch's name; empty if it is not known."""
    shape: Shape
    num_bytes: Count
    fate: str
    """``in_program``, ``dropped`` or ``left_out``."""
    reason: str = ""


class AccountEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to each tensor and byte of the source's payload: the four parts add up to ``num_bytes``."""

    tensors: Count
    num_bytes: Count
    """Bytes of all tensors, computed from dtypes and shapes."""
    exported: Count
    """Bytes in the shards. If rows are cast to a wider dtype, the bytes that they had in the source."""
    in_program: Count
    dropped: dict[str, Count]
    """Reason -> bytes of slots, dense tensors and the rows of ``rows_dropped``; ``cast``: bytes that a narrower dtype saves."""
    left_out: dict[str, Count]
    """Reason -> bytes. The reason is a setting, ``no_model``, ``not_served``, or a phrase."""
    others: tuple[AccountTensor, ...]
    """All tensors that are in no table, by name."""

    @property
    def total(self) -> int:
        """The sum of the four parts."""
        return self.exported + self.in_program + sum(self.dropped.values()) + sum(self.left_out.values())


class DriftOutputEntry(msgspec.Struct, frozen=True, kw_only=True):
    """How far one output of the package is from the unmodified model's, over all batches."""

    max_abs: float
    """Largest absolute difference of two finite values."""
    mean_abs: float
    pairs: Count
    """Pairs of rows of a batch, within a column of the output, whose values differ in both the package and the model."""
    pairs_swapped: Count
    """Pairs of these whose order changes."""
    not_finite: Count = 0
    """Values that are infinite or NaN on one side only; no other figure includes them."""


class DriftEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The package on rank 0's batches, against the unmodified model: the caller's own, on rows without cast and prune."""

    batches: Count
    rows: Count
    """The rows of these batches."""
    outputs: dict[str, DriftOutputEntry]
    skipped: Count = 0
    """Batches that the program cannot score, because their blocks have a different shape from the one that it takes."""
    not_measured: str | msgspec.UnsetType = msgspec.UNSET
    """Why there are no figures: the model read rows that the export could not replace, so both sides used its own rows; or the
    rows are those of a base, and the checkpoint's were not read."""
