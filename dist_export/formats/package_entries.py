"""The entries of ``manifest.json``, as data. See :mod:`dist_export.manifest` for the whole."""

from __future__ import annotations

from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
"""Of rows, bytes or elements: what a file can hold."""
Shape = Annotated[tuple[Count, ...], msgspec.Meta(max_length=64)]


class SourceEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Where the rows came from."""

    path: str
    """As the config gave it; where that was a registry's URI or a training run, the checkpoint that it meant."""
    format: str
    fingerprint: str
    num_files: Count
    num_bytes: Count
    uri: str | msgspec.UnsetType = msgspec.UNSET
    """The registry's version, where the checkpoint was named by a registry's URI."""
    step: int | msgspec.UnsetType = msgspec.UNSET
    """The training step, where the checkpoint was one of a run's."""


class CastEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What a slot's values lost when they were cast, over the rows that the package has."""

    source_dtype: str
    """Of the checkpoint; ``int8_rowwise`` where it is a package whose rows have that encoding."""
    values: Count
    """That were cast."""
    max_abs_error: float
    mean_abs_error: float
    """Over the values that fit."""
    nans: Count = 0
    out_of_range: Count = 0
    """Values that do not fit and were clamped; of NaN only int8 has none, and holds 0."""


class SlotEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One slot of a table that was kept, or dropped with ``reason``."""

    name: str
    dtype: str
    """torch's name, such as float32."""
    shape: Shape
    """Of one row."""
    num_bytes: Count
    """Of a kept slot in the shards, of a dropped one in the source."""
    reason: str = ""
    encoding: str | msgspec.UnsetType = msgspec.UNSET
    """``int8_rowwise`` where each row is ``dim`` bytes (uint8), then scale and bias (little-endian float32): a value is
    ``byte * scale + bias``. Left out where rows are plain values of ``dtype``."""
    dim: Count | msgspec.UnsetType = msgspec.UNSET
    """The values of one row, with an encoding; ``shape`` is in bytes then."""
    cast: CastEntry | msgspec.UnsetType = msgspec.UNSET
    """Where ``dtype`` is not that of the checkpoint."""
    earlier_casts: tuple[CastEntry, ...] | msgspec.UnsetType = msgspec.UNSET
    """Where the source is a package: the casts that its rows went through before, oldest first, each of the rows then. What
    they took is not in ``cast``, whose source is what they left."""

    @property
    def casts(self) -> tuple[CastEntry, ...]:
        """All casts that the rows have gone through, oldest first."""
        earlier = () if self.earlier_casts is msgspec.UNSET else self.earlier_casts
        return earlier if self.cast is msgspec.UNSET else (*earlier, self.cast)


class PartEntry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The rows of a table that lie in one file."""

    file: str
    slice: str
    """BEGIN@END@SIZE: the ids with BEGIN <= uint64(id) mod SIZE < END; of a table without ids, rows BEGIN to END of SIZE."""
    rows: Count
    first_row: Count | msgspec.UnsetType = msgspec.UNSET
    """The number of the part's first row, for a table whose rows go by number."""
    keys: dict[str, str]
    """Slot -> name of the block in the file."""


class TableEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One embedding table and the account of its rows: rows_in = rows_out + the sum of rows_dropped."""

    name: str
    rows_in: Count
    rows_out: Count
    rows_dropped: dict[str, Count]
    """Reason -> rows: ``duplicate`` where another row of the same id was kept; ``slot_value``, ``norm``, ``deny_list`` and
    ``allow_list`` where a rule left them behind; ``empty`` where a row of a managed-collision table has no id. A reason that
    dropped none is not listed."""
    misplaced: Count
    """Rows of the source that lay in another slice than the one that their part claims; 0 in a copy, which refuses them."""
    repaired: Count = 0
    """Of these, rows that are in the right slice now; the rest was dropped."""
    duplicates: Count = 0
    """Rows of the source, but those that rules left behind, beyond one for each id."""
    id_sum: str
    """Sum of the mixed ids modulo 2**64, in hexadecimal."""
    kept: tuple[SlotEntry, ...]
    dropped: tuple[SlotEntry, ...]
    parts: tuple[PartEntry, ...]
    is_hashed: bool | msgspec.UnsetType = msgspec.UNSET
    """False where rows go by number: the table has no ids here. Left out, and true, for hash tables."""
    source_name: str | msgspec.UnsetType = msgspec.UNSET
    """The table's name in the source, where it is another one."""
    default_row: str | tuple[float, ...] | msgspec.UnsetType = msgspec.UNSET
    """What serving is to take for an id that the table has not, where that was said: ``zeros``, or the values of a row."""

    @property
    def is_row_indexed(self) -> bool:
        """Whether rows are found by their number, and not by an id."""
        return self.is_hashed is False


class LeftOutEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A table of the source that the settings left out."""

    name: str
    rows: Count
    reason: str
    """``drop_tables`` or ``select_tables``."""


class PruneEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One rule of ``prune``, as the settings have it, and what it did."""

    tables: tuple[str, ...]
    reason: str
    """Under which ``rows_dropped`` counts what it took."""
    slot: str | msgspec.UnsetType = msgspec.UNSET
    below: int | float | msgspec.UnsetType = msgspec.UNSET
    norm_at_most: int | float | msgspec.UnsetType = msgspec.UNSET
    deny: str | msgspec.UnsetType = msgspec.UNSET
    allow: str | msgspec.UnsetType = msgspec.UNSET
    ids: Count | msgspec.UnsetType = msgspec.UNSET
    """In the list."""
    ids_digest: str | msgspec.UnsetType = msgspec.UNSET
    """``xxh3:<hex>``: xxh3-128 over the list's ids as little-endian int64, in order and each once."""
    rows: Count
    """That it took, of those that earlier rules had left."""


class DenseTensorEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A dense tensor among the sparse files; ``reason`` where it was dropped."""

    name: str
    dtype: str
    shape: Shape
    reason: str = ""


class PartDigest(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A part of a file that was put together within an S3 store."""

    num_bytes: Count
    sha256: str
    """In hexadecimal, as the store has computed it."""


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the package."""

    path: str
    """Relative to the package, with forward slashes."""
    num_bytes: Count
    digest: str
    """``<algorithm>:<hex>``: the algorithm (xxh3 is xxh3-128, sha256, blake3) over the digests that it gives for the
    file's chunks of 64 MiB, one behind the other. Empty for a shard that was exported without a digest.
    ``sha256-parts:<hex>`` is the sha256 over those of ``parts``, one behind the other."""
    parts: tuple[PartDigest, ...] | msgspec.UnsetType = msgspec.UNSET
    """Of a file that an S3 store has copied parts of by itself: its parts in order."""


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An input or output of the dense arch."""

    name: str
    dtype: str
    shape: tuple[Count | str, ...]
    """A free dimension is given by its name; ``batch`` is the first of every input."""


class DenseEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The traced dense arch."""

    folder: str
    program: str
    """Path of the exported program, relative to the package."""
    archive_format: str
    inputs: tuple[TensorEntry, ...]
    """In call order; each is a keyword of the program."""
    outputs: tuple[TensorEntry, ...]
    """In the order in which the program returns them."""
    dropped_inputs: tuple[str, ...]
    max_batch_size: Count
    input_order: tuple[str, ...] = ()
    """Inputs, dropped ones too, in the order of the sparse arch's mapping, in which the dense arch got them."""
    constants: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    """Entries of that mapping that are no tensors, as Python writes them: they are constants of the program."""
    torch: str = ""
    """The version of torch that wrote the folder."""


class FilesParityEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The sample batch, scored by the written program on rows of the written shards, against the model on the checkpoint's.

    Where ``reads_rows`` is false, on what the model's sparse arch gave without any row of theirs. The largest differences
    by output.
    """

    rows: Count
    """Of the batch."""
    reads_rows: bool
    """Whether any row of the sample was read from the written shards; else only the program comes from files."""
    reference: str = ""
    """What the program was compared with: as :attr:`ParityEntry.reference`, or ``copy``, the plain copy of the dense arch on
    rows as serving gets them, where settings change a row of the batch (cast, prune, duplicates)."""
    max_abs: dict[str, float]
    max_rel: dict[str, float]
    max_ulp: dict[str, int]


class ParityEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The written program against the model: the largest differences over all batch sizes, by output.

    At the size of the whole batch it is compared with the caller's own model on the checkpoint's own rows, at the other sizes
    with a plain copy of the dense arch.
    """

    reference: str = ""
    """``model``: what the caller's dense arch returned within ``model(batch)``; ``arches``: what
    ``dense_arch(sparse_arch(batch))`` gave, where the model did not run as a whole."""
    batch_sizes: tuple[int, ...]
    atol: float
    rtol: float
    max_abs: dict[str, float]
    max_rel: dict[str, float]
    max_ulp: dict[str, int] = {}
    """In units in the last place of the output's dtype."""
    from_files: FilesParityEntry | None = None


class AccountTensor(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A tensor of the source in no table of the package, and what became of it."""

    name: str
    dtype: str
    """torch's name; empty where it is not known."""
    shape: Shape
    num_bytes: Count
    fate: str
    """``in_program``, ``dropped`` or ``left_out``."""
    reason: str = ""


class AccountEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What became of each tensor and byte of the source's payload: the four parts add up to ``num_bytes``."""

    tensors: Count
    num_bytes: Count
    """Of all tensors, as dtypes and shapes say."""
    exported: Count
    """In the shards; where rows are cast to a wider dtype, the bytes that they had in the source."""
    in_program: Count
    dropped: dict[str, Count]
    """Reason -> bytes: those of slots and dense tensors, those of ``rows_dropped``, and ``cast``: what a narrower dtype saves."""
    left_out: dict[str, Count]
    """Reason -> bytes: a setting, ``no_model``, ``not_served``, or a phrase."""
    others: tuple[AccountTensor, ...]
    """All that is in no table, by name."""

    @property
    def total(self) -> int:
        """What the four parts add up to."""
        return self.exported + self.in_program + sum(self.dropped.values()) + sum(self.left_out.values())


class DriftOutputEntry(msgspec.Struct, frozen=True, kw_only=True):
    """How far one output of the package is from the unmodified model's, over all batches."""

    max_abs: float
    """Largest absolute difference of two finite values."""
    mean_abs: float
    pairs: Count
    """Pairs of rows of a batch, within a column of the output, that differ on both sides."""
    pairs_swapped: Count
    """Of these, pairs whose order is another one."""
    not_finite: Count = 0
    """Values that are infinite or NaN on one side alone; they are in no other figure."""


class DriftEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The package on rank 0's batches, against the unmodified model: the caller's own, on rows without cast and prune."""

    batches: Count
    rows: Count
    """Of these batches."""
    outputs: dict[str, DriftOutputEntry]
    skipped: Count = 0
    """Batches whose blocks have another shape than the program takes, so that it cannot score them."""
    not_measured: str | msgspec.UnsetType = msgspec.UNSET
    """Why there are no figures: the model has read rows that the export could not give it, so both sides had its own."""
