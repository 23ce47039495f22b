"""What an export is given: the checkpoint or the model in memory, its dense parameters, fg and mc."""

from __future__ import annotations

from typing import Any

import msgspec

from dist_export.checkpoint.dense import DenseParameters, RecisDense
from dist_export.checkpoint.detect import detect_format, holds_tables, open_dense
from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.model_weights import ModelWeights, merge_weights
from dist_export.config.needs import ModelValues, ScoreSettings
from dist_export.config.source_needs import CheckpointTensors, ConfFiles, OpenedSource
from dist_export.dense.fg import Features, check_conf
from dist_export.dense.fg_load import collect_confs, has_hashed_input
from dist_export.errors import ConfigError, PlanError
from dist_export.formats.recis import EMBEDDING_SLOT, MERGED
from dist_export.formats.safetensors import decode_object
from dist_export.manifest import MANIFEST
from dist_export.model.user_objects import Objects
from dist_export.pipeline.planning import choose_tables, open_tables, tensor_settings_of
from dist_export.runtime.ranks import Ranks
from dist_export.storage.directory import WORK_DIRECTORY, Directory

FG = "fg.json"


def read_confs(
    config: ConfFiles, objects: Objects, checkpoint: Checkpoint | None
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, Features]:
    """Return fg and mc, checked against their rules, each other and the checkpoint's tables, all findings in one error."""
    fg_conf, mc_conf = collect_confs(objects.fg, config.fg_conf_or_path, config.mc_conf_or_path)
    already_hashed = objects.fg is not None and has_hashed_input(objects.fg)
    features = check_conf(
        fg_conf,
        mc_conf,
        fg_rules=config.fg_rules,
        already_hashed=already_hashed,
        tables=None if checkpoint is None else dims_of(checkpoint),
    )
    return fg_conf, mc_conf, features


def note_renamed(fg_conf: dict[str, Any] | None, checkpoint: Checkpoint | None) -> list[str]:
    """Return what is to be told of tables whose names in fg.json are not those in the package."""
    if fg_conf is None or checkpoint is None:
        return []
    renamed = [f"{t.source_name} is {t.name}" for t in checkpoint.tables if t.source_name is not None]
    if not renamed:
        return []
    more = f" and {len(renamed) - 3} more" if len(renamed) > 3 else ""
    return [f"fg.json names tables as the trainer does, the package otherwise: {', '.join(renamed[:3])}{more}"]


def look_at_source(
    target: Directory, fg_conf: dict[str, Any] | None, folder: str | None, *, has_tables: bool
) -> list[str]:
    """Refuse what an export into its own checkpoint could only do by rewriting a file of it; return notes. Rank 0.

    ``folder``: that of the dense arch, if it is exported. ``has_tables``: whether tables are.
    """
    advice = "export_dir is ckpt_dir, whose files are left as they are. Remove it, or give another export_dir"
    if (
        fg_conf is not None
        and target.exists(FG)
        and decode_object(target.read_text(FG), what=target.describe(FG)) != fg_conf
    ):
        raise ConfigError(f"{target.describe(FG)} is there already, and differs from the one to be exported; {advice}")
    is_ours = target.exists(WORK_DIRECTORY) or target.exists(MANIFEST)
    if folder is not None and target.exists(folder) and not is_ours:
        raise ConfigError(f"{target.describe(folder)} is there already; {advice}")
    if not has_tables or not target.exists(MERGED):
        return []
    raw = target.read_text(MERGED)
    if raw.strip() == b"null":
        raise ConfigError(f"{target.describe(MERGED)} is null, so serving would find no table; {advice}")
    entries = decode_object(raw, what=target.describe(MERGED)).values()
    if all(isinstance(entry, dict) and "is_hashmap" in entry for entry in entries):
        return []
    return [
        f"{MERGED} stays in its old style, with ids and slots and without model.pt: a checkpoint's file is not rewritten"
    ]


def encode_fg(fg_conf: dict[str, Any]) -> bytes:
    """Return the content of fg.json."""
    return msgspec.json.format(msgspec.json.encode(fg_conf), indent=4)


def look_for_weights(ranks: Ranks, config: ModelValues, model: Any) -> ModelWeights | None:
    """Return what the model says of the tensors of its checkpoint; None without either. All ranks, each with its model.

    Raises:
        ModelError: on all ranks, where the model has no such arches, or changes a state_dict while it is loaded.
    """
    if model is None or config.ckpt_dir is None:
        return None
    from dist_export.dense.load_hooks import check_load_hooks  # a copy of files needs no torch
    from dist_export.model.sparse_tables import find_weights

    found = ranks.all_gather(
        "look for the model's tables",
        lambda: find_weights(
            model, sparse_model_name=config.sparse_model_name, dense_model_name=config.dense_model_name
        ),
        may_block=True,
    )
    ranks.check("look for hooks that load a state", lambda: check_load_hooks(model, config))
    return merge_weights(found)


def open_source(
    ranks: Ranks,
    config: OpenedSource,
    source: Directory | None,
    model: Any = None,
    *,
    weights: ModelWeights | None = None,
    exports_dense: bool = False,
) -> Checkpoint | None:
    """Open the checkpoint, or look at ``model`` in memory; None for a dense-only export of a source without tables.

    ``weights`` are what the model of a checkpoint says; ``exports_dense``: whether a model in memory is traced.
    """
    if source is None:
        from dist_export.dense.own_parameters import reshard
        from dist_export.live.assemble import open_live
        from dist_export.live.left_out import add_others, list_others
        from dist_export.model.unwrap import find_arch  # a copy of files needs no torch

        name = config.sparse_model_name

        def look() -> Any:
            if model is None:
                raise ConfigError("format is live, but there is no model whose tables could be exported; set model")
            reshard(model)  # its shards are what is read, and a forward may have left whole parameters in their place
            return find_arch(model, name, "sparse_model_name")

        sparse_arch = ranks.check("look into the model", look)
        if not config.need_export_sparse:
            return None
        checkpoint = open_live(ranks, sparse_arch, sparse_model_name=name)
        names = [table.name for table in checkpoint.tables]
        dense_name = config.dense_model_name if exports_dense else None
        others = ranks.all_gather(
            "tell what is no table", lambda: list_others(model, names, dense_model_name=dense_name)
        )
        return choose_tables(ranks, add_others(checkpoint, others), config)
    if not config.need_export_sparse:

        def look_for_tables() -> bool:
            return holds_tables(source, detect_format(source, asked=config.format), tensor_settings_of(config, weights))

        if not ranks.broadcast("look for tables", look_for_tables):
            return None

    def find_dims() -> dict[str, frozenset[int]]:
        if model is None:
            return {}
        from dist_export.dense.model_dims import find_model_dims

        return find_model_dims(model, sparse_model_name=config.sparse_model_name)

    checkpoint = open_tables(ranks, source, config, find_dims, weights)
    if model is not None and any(table.raw_ids is not None for table in checkpoint.tables):
        from dist_export.model.managed_collisions import refuse_hashed_ids

        tables, allowed = checkpoint.tables, config.allow_hashed_ids
        ranks.check("look for hashed ids", lambda: refuse_hashed_ids(model, tables, allowed))
    return checkpoint


def find_dense(
    config: CheckpointTensors,
    source: Directory | None,
    checkpoint: Checkpoint | None,
    weights: ModelWeights | None = None,
) -> DenseParameters | None:
    """Return the dense parameters of the checkpoint, which are still to be read; None for a model in memory."""
    if source is None:
        return None
    if checkpoint is not None and checkpoint.has_state_tables:
        row_indexed = [table.name_in_source for table in checkpoint.tables if not table.has_ids]
        return RecisDense(source, tables=frozenset([*row_indexed, *(table.name for table in checkpoint.left_out)]))
    found = detect_format(source, asked=config.format) if checkpoint is None else checkpoint.format
    return open_dense(source, found, tensor_settings_of(config, weights))


_PATTERNS_OF_MODEL = (
    "allow_missing_tables",
    "allow_missing_dense",
    "allow_unexpected_dense",
    "allow_load_hooks",
    "lookup_modules",
)


def refuse_unscored(config: ScoreSettings, objects: Objects, checkpoint: Checkpoint | None) -> None:
    """Refuse settings that scores cannot be had for. ConfigError, PlanError."""
    has_model = objects.model is not None and objects.dataset is not None
    if config.max_drift is not None and not has_model:
        raise ConfigError(
            "max_drift needs model and dataset, because it bounds the drift of scores; set both, or remove max_drift"
        )
    if config.dense_formats and not has_model:
        raise ConfigError(
            "dense_formats names formats of the dense arch, which needs model and dataset; give both, or no dense_formats"
        )
    idle = [name for name in _PATTERNS_OF_MODEL if getattr(config, name)]
    if idle and objects.model is None:
        raise ConfigError(
            f"{idle[0]} has patterns of what is in the model, and no model is exported, so they match nothing; give model and "
            f"dataset, or leave {idle[0]} out"
        )
    if checkpoint is None or not has_model:
        return
    for table in checkpoint.tables:
        for slot in table.slots:
            if slot.encoding:
                raise PlanError(
                    f"model: the rows of table {table.name_in_source!r} are {slot.encoding} in {checkpoint.directory.url}, and "
                    "no model is run on such rows. Leave model out for the tables alone, or export from the checkpoint"
                )


def refuse_without_scores() -> None:
    """Refuse ``score_program: require`` where there is no model, no dataset or no table in the package. ConfigError."""
    raise ConfigError(
        "score_program is require, which needs model, dataset and tables that are exported; give them, or set "
        "score_program: auto"
    )


def dims_of(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the last dimension of each table's embedding, by the name that the trainer has for the table.

    Tables that are parameters of a model stand there by the module's own name too (``user`` for ``ebc.embedding_bags.
    user.weight``), unless several have it: a feature names its table so.
    """
    dims = {
        table.name_in_source: (slot.values_shape or (1,))[-1]
        for table in checkpoint.tables
        for slot in table.slots
        if slot.name == EMBEDDING_SLOT
    }
    by_module: dict[str, list[str]] = {}
    for table in checkpoint.tables:
        if not table.has_ids or table.raw_ids is not None:
            name = table.name_in_source
            by_module.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(name)
    return {module: dims[names[0]] for module, names in by_module.items() if len(names) == 1} | dims
