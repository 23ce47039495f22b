"""What a model's names tell of the roots of a checkpoint: which holds the model, or which two hold its arches. Pure.

Some trainers save the arches apart, ``{"sparse": ..., "dense": ...}``, each under the names within it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from dist_export.checkpoint.model_weights import ModelWeights, is_below
from dist_export.checkpoint.state_keys import Root, is_copy


def find_arch_roots(by_root: Mapping[Root, Collection[str]], weights: ModelWeights) -> dict[Root, str]:
    """Return the roots that hold the model's arches, each with the path of its arch; nothing where that is not certain.

    Each arch needs a root of its own that has all names of the arch: the tables of the sparse one, all parameters and buffers
    of the dense one. What is called as a copy does not count where another one has the names too.

    Args:
        by_root: root -> plain names below it.
        weights: what the model says.
    """
    sparse, dense = weights.sparse_name, weights.dense_name
    if not sparse or not dense or is_below(sparse, dense) or is_below(dense, sparse):
        return {}
    if any(not weights.tables.isdisjoint(its) for its in by_root.values()):
        return {}  # a root has tables under their names within the model: that one is meant
    tables = {name.removeprefix(f"{sparse}.") for name in weights.tables}
    holders = [_find_holders(by_root, tables), _find_holders(by_root, weights.dense_names)]
    if any(len(its) != 1 for its in holders) or holders[0] == holders[1]:
        return {}
    found = {holders[0][0]: sparse, holders[1][0]: dense}
    is_named = all(path == ".".join(root) or ".".join(root).endswith(f".{path}") for root, path in found.items())
    return {} if is_named else found  # then the names are those within the model as they are


def find_model_root(by_root: Mapping[Root, Collection[str]], weights: ModelWeights | None) -> Root | None:
    """Return the one root that holds all tables of the model by their names, and no other one a parameter of its dense arch."""
    if weights is None:
        return None
    found = _find_holders(by_root, weights.tables)
    dense = {f"{weights.dense_name}.{name}" if weights.dense_name else name for name in weights.dense_names}
    is_whole = not any(not dense.isdisjoint(its) for root, its in by_root.items() if root not in found)
    return found[0] if len(found) == 1 and is_whole else None


def _find_holders(by_root: Mapping[Root, Collection[str]], names: Collection[str]) -> Sequence[Root]:
    if not names:
        return []
    found = [root for root, its in by_root.items() if root and all(name in its for name in names)]
    originals = [root for root in found if not any(map(is_copy, root))]
    return originals if len(found) > 1 else found
