"""Parameters and buffers of the sparse arch that are no tables, and that the checkpoint lacks: they would be untrained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from dist_export.checkpoint.model_weights import is_below, plain_name
from dist_export.dense.hash_feed import tables_of
from dist_export.dense.known_tables import KnownTables
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.table_memory import written_by_insert
from dist_export.dense.table_names import TableNames
from dist_export.errors import ModelError
from dist_export.humanize import few
from dist_export.model.managed_collisions import find_mapped, is_collision_module, names_of_map
from dist_export.model.sparse_tables import is_hash_table
from dist_export.model.unwrap import is_lazy, list_modules

SETTING = "allow_missing_dense"


def refuse_missing_values(
    arch: nn.Module,
    put: Collection[str],
    tables: RowFinder,
    *,
    sparse_model_name: str,
    dense_model_name: str,
    allowed: Sequence[str],
) -> list[str]:
    """Refuse what the checkpoint lacks, unless a pattern of ``allow_missing_dense`` names it. Any rank, for itself.

    Args:
        arch: the caller's sparse arch.
        put: names within the model of what has the checkpoint's values.
        tables: of the checkpoint.
        sparse_model_name: the path of the sparse arch within the model.
        dense_model_name: that of the dense arch, whose parameters are looked at elsewhere.
        allowed: all patterns of the setting.

    Returns the names that a pattern lets pass. Raises ModelError for the others, and for a pattern of the sparse arch that
    matches none.
    """
    path, dense = plain_name(sparse_model_name), plain_name(dense_model_name)
    values, has_table = _list_values(arch, path, tables)
    # of a model none of whose tables has a name in the checkpoint, matrices are its tables: a note says that none was seen
    own = {
        name: tensor
        for name, tensor, is_known in values
        if not is_known and (has_table or tensor.dim() != 2) and not is_below(name, dense)
    }
    own |= _list_unmapped(arch, path, tables)
    there = {id(tensor) for name, tensor in own.items() if name in put}
    lacking = [name for name, tensor in own.items() if name not in put and id(tensor) not in there]
    rows = _list_rows(arch, path, tables, lacking)
    lacking = [name for name in lacking if name not in rows]
    patterns = [pattern for pattern in allowed if is_of_sparse(pattern, sparse_model_name)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in own):
            raise ModelError(
                f"{SETTING}: the pattern {pattern!r} matches no parameter of the sparse arch that is no table"
            )
    passed = [name for name in lacking if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if refused := [name for name in lacking if name not in passed]:
        raise ModelError(
            f"the checkpoint lacks {few(refused)} of the sparse arch, so scores would be those of untrained values. Nothing was "
            f"written. Give the checkpoint that has {'it' if len(refused) == 1 else 'them'}, or the names that were trained; or "
            f"{SETTING}: [{refused[0]}] lets the model's own values pass"
        )
    return passed


def is_of_sparse(pattern: str, sparse_model_name: str) -> bool:
    """Whether a pattern of ``allow_missing_dense`` is of the sparse arch: it begins with the path of that."""
    return bool(sparse_model_name) and pattern.startswith(f"{plain_name(sparse_model_name)}.")


def _list_values(arch: nn.Module, path: str, tables: KnownTables) -> tuple[list[tuple[str, torch.Tensor, bool]], bool]:
    """Return what a state_dict has of the sparse arch, and whether any table is among its modules and names.

    Of each: its name within the model, the tensor, and whether it is a table.
    """
    names, found, has_table = TableNames(tables, path), [], False
    below: set[int] = set()
    for module, paths in list_modules(arch):
        if id(module) in below:
            continue
        is_table = _is_table(module)
        has_table |= is_table or _is_embedding(module) or is_hash_table(module)
        if is_table:
            below.update(id(child) for child in module.modules())
        hidden = module._non_persistent_buffers_set  # noqa: SLF001 -- torch has no public way to ask
        for owner, left_out in ((module._parameters, ()), (module._buffers, hidden)):  # noqa: SLF001
            for name, tensor in owner.items():
                if tensor is None or is_lazy(tensor) or name in left_out:
                    continue
                within = plain_name(".".join(part for part in (paths[0], name) if part))
                full = ".".join(part for part in (path, within) if part)
                is_weight = name == "weight" and _is_embedding(module)
                found.append((full, tensor, is_table or is_weight or _is_known(names, within)))
    return found, has_table or any(is_known for _, _, is_known in found)


def _list_unmapped(arch: nn.Module, path: str, tables: RowFinder) -> dict[str, torch.Tensor]:
    """Return what maps raw ids to rows in modules whose table has no raw ids in the checkpoint, by name within the model."""
    names = TableNames(tables, path)
    found: dict[str, torch.Tensor] = {}
    exported = tables.exported_names()
    mapped = [name for name in exported if tables.table_of(name).raw_ids is not None]
    left_out = [name for name in tables.table_names() if name not in exported]
    for module, paths in list_modules(arch):
        if not is_collision_module(module):
            continue
        full = names.join(plain_name(paths[0]))
        # a table that the settings leave out is refused where it is looked up
        if find_mapped(full, tables.table_names(), [*mapped, *left_out]) is None:
            found |= {f"{full}.{name}": getattr(module, name) for name in names_of_map(module)}
    return found


def _list_rows(arch: nn.Module, path: str, tables: RowFinder, lacking: Collection[str]) -> set[str]:
    """Return those of ``lacking`` in which hash tables keep their rows and ids."""
    found: set[str] = set()
    for module, paths in list_modules(arch):
        if not is_hash_table(module):
            continue
        begin = ".".join(part for part in (path, plain_name(paths[0])) if part)
        saved = (name for name, _ in (*module.named_parameters(), *module.named_buffers()))
        its = {name: full for name in saved if (full := f"{begin}.{plain_name(name)}".removeprefix(".")) in lacking}
        if its:
            found |= {its[name] for name in written_by_insert(module, tables_of(module, begin), tables, its)}
    return found


def _is_table(module: nn.Module) -> bool:
    """Whether a module is a table: what the checkpoint has of it is compared by what the sample looks up.

    A hash table may have values beside its rows, and these count.
    """
    kind = type(module)
    is_collection = kind.__module__.startswith(("torchrec.", "fbgemm_gpu.")) and "Embedding" in kind.__name__
    return is_collection or is_collision_module(module)


def _is_embedding(module: nn.Module) -> bool:
    """Whether its weight is a table; a subclass may have more than that."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _is_known(names: TableNames, path: str) -> bool:
    try:
        return names.find(path) is not None
    except ModelError:  # a table that the settings leave out, or one of two: told where it is looked up
        return True
