"""What the sample tells of the model's tables and the checkpoint's: notes for the summary, and models that share no table."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from dist_export.dense.blocks import Blocks
from dist_export.dense.eager import DenseSample
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.sample_rows import SampleRows
from dist_export.errors import ModelError
from dist_export.humanize import count, few

SCORES_BEHIND = (
    "model(batch) gives other scores than its dense arch returns: what forward does behind the dense arch, such as a sigmoid, "
    "is in no score of the package. Put it into the dense arch to have it there"
)
"""The note of a model whose scores are not those of its dense arch."""


def note_rows(
    rows: SampleRows, finder: RowFinder | None, missing: Sequence[str], *, has_checkpoint: bool, is_asked: bool
) -> list[str]:
    """Return notes on tables that the sample did not take from the checkpoint, or not whole.

    ``missing``: embeddings that have the model's own rows. ``is_asked``: whether any rank has looked up a table of the
    checkpoint.
    """
    notes = []
    if finder is None:
        if has_checkpoint:
            notes.append("ckpt_dir has no sparse files: the sample batch was run with the model's own rows")
    elif finder.table_names() and not rows.sharded_tables and not is_asked and not missing and not rows.unseen:
        notes.append(
            "the sample looked up no table of the checkpoint, so its scores are of the model's own rows. Tables are fed "
            "where a module is a hash table, an nn.Embedding or an nn.EmbeddingBag: give a model that is not sharded"
        )
    notes += [f"{name} is no table of the checkpoint: the sample used the model's own rows" for name in missing]
    notes += [
        f"table {name!r} has {count(num_rows, 'row')} in the checkpoint, the model's {num_own:,}: "
        + (
            f"of ids from {num_rows:,} on the package has no row, and lookups give its default_row or zeros"
            if num_own > num_rows
            else f"it cannot look up rows from {num_own:,} on, which are exported all the same"
        )
        for name, num_rows, num_own in rows.other_sizes
    ]
    notes += [
        f"{name} is sharded in memory: the sample used the model's own rows, before and after the export"
        for name in rows.sharded_tables
    ]
    notes += [
        f"of table {name!r} the sample used the model's own rows, before and after the export: {why}"
        for name, why in sorted(rows.unseen.items())
    ]
    notes += [
        f"table {name!r} is read as a whole by the sparse arch ({whole.how}): the sample has all of its rows, and none of them "
        "counts as an id that was looked up"
        for name, whole in sorted(rows.whole.items())
    ]
    notes += [
        f"table {name!r}: the sparse arch writes into rows before it reads them ({how}), and the model's scores are made of what "
        "is there then. The package has the rows as they were before: a server that looks rows up and runs the dense program has "
        "to do the same to them, or its scores are others"
        for name, how in sorted(rows.changed.items())
    ]
    return notes


def note_sparse_values(put: Sequence[str], in_program: Collection[str]) -> list[str]:
    """Return notes on what the sparse arch holds besides tables (``put``), and which of it the score program has."""
    notes = []
    here, lacking = [name for name in put if name in in_program], [name for name in put if name not in in_program]
    if here:
        notes.append(
            f"{count(len(here), 'parameter')} of the sparse arch ({few(here)}) had the checkpoint's values in the sample, and "
            "the score program has them: a server that runs the sparse arch by itself needs them too"
        )
    if lacking:
        notes.append(
            f"{count(len(lacking), 'parameter')} of the sparse arch ({few(lacking)}) had the checkpoint's values in the sample, "
            "and no file of the package holds them: a server that runs the sparse arch needs them too"
        )
    return notes


def note_lacking(names: Sequence[str]) -> list[str]:
    """Return a note on extra state of the sparse arch that the checkpoint does not have."""
    told = f"extra state of the sparse arch is the model's own, because the checkpoint has none: {few(names)}"
    return [told] if names else []


def note_passed(names: Sequence[str], what: str) -> list[str]:
    """Return a note on parameters of ``what`` that the checkpoint lacks, and that ``allow_missing_dense`` lets pass."""
    told = f"parameters of the {what} taken from the model, not from the checkpoint: {few(names)}"
    return [told] if names else []


def note_pruned(left: int, to_model: int) -> list[str]:
    """Return a note on ids that the sample looked up and rules leave behind, ``to_model`` of them to the model's own rows.

    How many they are depends on how the dataset is shared out, and stands in the manifest's run.
    """
    told = [] if to_model >= left else ["the sample has the table's default_row or zeros for them, as serving has"]
    told += ["tables that take no rows were left with what they give themselves"] if to_model else []
    return [f"ids that the sample looked up are left behind by prune: {'; '.join(told)}"]


def refuse_foreign_tables(
    names: Sequence[str], unknown: Sequence[str], *, is_any_known: bool, sparse_model_name: str
) -> None:
    """Raise ModelError where this rank has tables (``unknown``), and no rank has one of the checkpoint's (``names``)."""
    if is_any_known or not unknown:
        return
    raise ModelError(
        f"none of the model's tables ({few(unknown)}) is one of the checkpoint's ({few(names) or 'which has none'}), so its "
        "scores would say nothing of the rows that are exported. A table goes by the path of its module or weight within "
        f"the model, or within sparse_model_name ({sparse_model_name!r}); no setting maps names to others "
        "(rename_tables gives those in the package). Nothing was written. Give a model whose modules are called as in the "
        "checkpoint; without model the tables alone are exported"
    )


def note_constants(blocks: Blocks) -> list[str]:
    """Return a note on entries of the sparse arch that are no tensors."""
    if not blocks.constants:
        return []
    told = ", ".join(f"{place} = {value[:40]}" for place, value in list(blocks.constants.items())[:5])
    more = f" and {len(blocks.constants) - 5:,} more" if len(blocks.constants) > 5 else ""
    return [f"the sparse arch gives entries that are no tensors; they are constants of the program: {told}{more}"]


def note_not_finite(sample: DenseSample) -> list[str]:
    """Return a note on outputs with NaN, or without any finite score: nothing is proven by comparing these."""
    told = []
    for name, output in zip(sample.output_names, sample.outputs, strict=True):
        wide = output.to(
            torch.complex128 if output.is_complex() else torch.float64
        )  # float8 has no isfinite of its own
        num_finite, num_values = int(wide.isfinite().sum()), output.numel()
        if num_values and (wide.isnan().any() or not num_finite):
            told.append(f"{name!r} in {num_values - num_finite:,} of {num_values:,}")
    if not told:
        return []
    return [
        f"the model's scores of the sample are not finite: {', '.join(told)}; these say nothing of parity and drift"
    ]


def refuse_lacking(batches: Sequence[bool]) -> None:
    """Raise ModelError where a rank, by its place, has no batch."""
    lacking = [str(rank) for rank, is_there in enumerate(batches) if not is_there]
    if lacking:
        raise ModelError(
            f"the dataset gave no batch on rank {', '.join(lacking)}; the sparse arch may be collective, so every rank "
            "needs one. Give the dataset at least one batch a rank"
        )
