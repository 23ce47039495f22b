"""Embeddings of the sparse arch that the checkpoint lacks: their rows would be the model's own, and in no file of the package."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.model_weights import ModelWeights, is_below, plain_name
from dist_export.config.needs import MissingTables
from dist_export.dense.known_tables import KnownTables
from dist_export.dense.sample_notes import refuse_foreign_tables
from dist_export.dense.sample_rows import SampleRows
from dist_export.dense.table_names import TableNames
from dist_export.errors import ModelError
from dist_export.humanize import few
from dist_export.runtime.ranks import Ranks

SETTING = "allow_missing_tables"


def find_missing(config: MissingTables, rows: SampleRows, put: Collection[str]) -> list[str]:
    """Return the embeddings of this rank's sparse arch whose rows are the model's own, by their paths within the model.

    ``put``: names of parameters that have the checkpoint's values although they are no table, as in a copy of RecIS's files.
    """
    sparse, dense = plain_name(config.sparse_model_name), plain_name(config.dense_model_name)
    is_dense_within = dense != sparse and is_below(dense, sparse)
    return [
        name
        for name in rows.unknown_tables
        if f"{name}.weight" not in put and not (is_dense_within and is_below(name, dense))
    ]


def refuse_missing(
    ranks: Ranks,
    config: MissingTables,
    rows: SampleRows,
    missing: Sequence[str],
    tables: Sequence[str],
    *,
    is_any_known: bool,
) -> None:
    """Refuse embeddings that the checkpoint lacks, unless ``allow_missing_tables`` names them. All ranks.

    Without tables in the package none of its rows is wrong, and a note tells.

    Args:
        rows: what this rank's sample looked up.
        missing: those of this rank.
        tables: of the checkpoint.
        is_any_known: whether any rank's model has one of these.

    Raises:
        ModelError: on all ranks, for those of any rank; for a pattern that matches no embedding.
    """
    told = ranks.all_gather(
        "look for tables that the checkpoint lacks",
        lambda: (list(missing), [*rows.embeddings, *rows.unregistered], rows.computed),
    )
    lacking = sorted({name for names, _, _ in told for name in names})
    every = sorted({name for _, names, _ in told for name in names})
    computed = {path: how for *_, its in told for path, how in its.items()}

    def refuse() -> None:
        _refuse_computed(config, lacking, computed)
        if config.need_export_sparse:
            refuse_foreign_tables(
                tables, missing, is_any_known=is_any_known, sparse_model_name=config.sparse_model_name
            )
        if idle := _tell_idle(config, every):
            raise ModelError(idle)
        _refuse(config, lacking)

    ranks.check("match the model's tables", refuse)


def is_let_pass(path: str, config: MissingTables) -> bool:
    """Whether ``allow_missing_tables`` names what is at a path within the model."""
    return any(_matches(path, pattern, config) for pattern in config.allow_missing_tables)


def refuse_missing_by_name(
    config: MissingTables, weights: ModelWeights, checkpoint: Checkpoint, dense_state: Collection[str]
) -> list[str]:
    """Refuse what :func:`refuse_missing` does, as far as names tell: for a plan, which runs no sample.

    Args:
        config: the settings.
        weights: what the model says.
        checkpoint: the tables as they are exported.
        dense_state: names of the dense parameters of the checkpoint.

    Returns:
        A note on a pattern that matches none: it may be of a module that is not registered, which the sample finds.

    Raises:
        ModelError: an embedding that the checkpoint lacks, or that the settings leave out.
    """
    exported = {table.name_in_source: number for number, table in enumerate(checkpoint.tables)}
    left_out = {table.name: table.reason for table in checkpoint.left_out}
    names = TableNames(KnownTables(exported, left_out), weights.sparse_name)
    put = {plain_name(name) for name in dense_state}
    ties = {name: tie for tie in weights.ties for name in tie}
    begin = f"{weights.sparse_name}." if weights.sparse_name else ""
    dense = weights.dense_name
    is_dense_within = dense != weights.sparse_name and is_below(dense, weights.sparse_name)
    lacking = []
    for path in sorted(weights.embeddings):
        weight = f"{path}.weight"
        spellings = [name.removesuffix(".weight") for name in ties.get(weight, (weight,))]
        is_known = any(names.find(its.removeprefix(begin)) is not None for its in spellings)
        if not is_known and weight not in put and not (is_dense_within and is_below(path, dense)):
            lacking.append(path)
    _refuse_computed(config, lacking, dict(weights.computed))
    _refuse(config, lacking)
    idle = _tell_idle(config, sorted(weights.embeddings))
    return [f"{idle}. The export refuses it, unless it is of a module that is not registered"] if idle else []


def _tell_idle(config: MissingTables, every: Sequence[str]) -> str:
    """Return what is wrong with a pattern that matches none of ``every`` embedding; empty where each matches one."""
    for pattern in config.allow_missing_tables:
        if not any(_matches(name, pattern, config) for name in every):
            return (
                f"{SETTING}: the pattern {pattern!r} matches no embedding of the sparse arch, which has "
                f"{few(every) or 'none'}"
            )
    return ""


def _refuse(config: MissingTables, lacking: Sequence[str]) -> None:
    """Refuse those of ``lacking`` that no pattern matches."""
    refused = [name for name in lacking if not any(_matches(name, p, config) for p in config.allow_missing_tables)]
    if refused and config.need_export_sparse:
        raise ModelError(
            f"{few(refused)}: no table of the checkpoint, so the scores would be of the model's own rows, which no file of "
            "the package has. Nothing was written. Give the checkpoint that has "
            f"{'it' if len(refused) == 1 else 'them'}; or {SETTING}: [patterns] lets the model's own rows pass"
        )


def _refuse_computed(config: MissingTables, lacking: Sequence[str], computed: Mapping[str, str]) -> None:
    """Refuse those of ``lacking`` whose rows no checkpoint holds, because the model computes them, with the way to have them."""
    refused = [name for name in lacking if name in computed and not is_let_pass(name, config)]
    if refused and config.need_export_sparse:
        more = f" ({len(refused) - 1:,} more embeddings too)" if len(refused) > 1 else ""
        raise ModelError(
            f"the weight of {refused[0]} is computed by {computed[refused[0]]}, so the checkpoint holds its parts and not "
            f"the rows that serving needs{more}. Nothing was written. Take this off before the checkpoint is saved, with "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') or torch.nn.utils.remove_weight_norm(module), "
            "and give a model without it"
        )


def _matches(name: str, pattern: str, config: MissingTables) -> bool:
    """Whether a pattern is of an embedding: of its path or that of its weight, from the model or from the sparse arch on."""
    begin = f"{plain_name(config.sparse_model_name)}."
    return any(fnmatchcase(path + end, pattern) for path in (name, name.removeprefix(begin)) for end in ("", ".weight"))
