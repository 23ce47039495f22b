"""Find the weights of embeddings in the caller's model, which identify a checkpoint's tables. Reads no values.

A table is one of these:

- the weight of an ``nn.Embedding`` or ``nn.EmbeddingBag``;
- the weight of a module with ``num_embeddings`` and ``embedding_dim``, such as a tensor-parallel embedding;
- a table of a collection with torchrec's names, below ``embedding_bags`` or ``embeddings``;
- in the sparse arch, a matrix of a module of the caller's own, because its code may look up rows in it.

torchrec's sharded collections list their tables only in ``state_dict()``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from dist_export.checkpoint.model_weights import ModelWeights, is_below, plain_name
from dist_export.checkpoint.tensors.classify import split_collection
from dist_export.errors import ModelError
from dist_export.model.managed_collisions import is_collision_module
from dist_export.model.unwrap import find_arch, is_lazy, unwrap
from dist_export.model.user_errors import said

_WEIGHT = "weight"
_SHARDED = "torchrec.distributed"
_KEEPS_TABLES = ("torchrec.", "fbgemm_gpu.", "dynamicemb.")
"""Modules of these lay tables out in tensors of their own, beside what their lookups need."""
_SCRIPTED_HOLDERS = frozenset({"Embedding", "EmbeddingBag", "ParameterDict", "ParameterList", "Module"})


def find_weights(model: Any, *, sparse_model_name: str, dense_model_name: str) -> ModelWeights:
    """Find the weights of a model. Called on all ranks at once, because a sharded module's ``state_dict()`` may be collective.

    Raises:
        ModelError: an arch does not exist, or ``state_dict()`` of a sharded collection fails.
    """
    sparse_name, dense_name = plain_name(sparse_model_name), plain_name(dense_model_name)
    sparse_arch = find_arch(model, sparse_model_name, "sparse_model_name")
    dense_arch = find_arch(model, dense_model_name, "dense_model_name")
    dense_within_sparse = dense_name != sparse_name and is_below(dense_name, sparse_name)
    tables: dict[str, Any] = {
        name: weight
        for name, weight in (*_weights_of(sparse_arch, sparse_name), *plain_matrices(sparse_arch, sparse_name))
        if not (dense_within_sparse and is_below(name, dense_name))
    }
    elsewhere = {
        name
        for name, _ in _weights_of(model, "")
        if name not in tables and not is_below(name, sparse_name) and not is_below(name, dense_name)
    }
    by_weight: dict[int, set[str]] = {}
    for prefix, module in ((sparse_name, sparse_arch), (dense_name, dense_arch), ("", model)):
        for path, parameter in module.named_parameters(remove_duplicate=False):
            by_weight.setdefault(id(parameter), set()).add(plain_name(_join(prefix, path)))
    return ModelWeights(
        sparse_name=sparse_name,
        dense_name=dense_name,
        tables=frozenset(tables),
        elsewhere=frozenset(elsewhere),
        embeddings=frozenset(
            plain_name(_join(sparse_name, path))
            for path, module in sparse_arch.named_modules()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        ),
        dense_names=frozenset(_list_saved(dense_arch)),
        computed=tuple(
            (plain_name(_join(sparse_name, path)), how)
            for path, module in sparse_arch.named_modules()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and (how := say_computed(module))
        ),
        ties=frozenset(
            tuple(sorted(names)) for names in by_weight.values() if len(names) > 1 and not names.isdisjoint(tables)
        ),
    )


def _list_saved(module: nn.Module) -> Iterator[str]:
    """Yield the plain names of parameters and saved buffers without a call of state_dict(), which may be collective."""
    for path, child in module.named_modules(remove_duplicate=False):
        held = {**child._parameters, **child._buffers}  # noqa: SLF001 -- no module lists which buffers are saved
        for name, value in held.items():
            if value is not None and name not in child._non_persistent_buffers_set:  # noqa: SLF001
                yield plain_name(_join(path, name))


def _weights_of(root: nn.Module, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (plain name within the model, weight) of each embedding within a module; a shared weight under each of its names."""
    for path, module in root.named_modules(remove_duplicate=False):
        if unwrap(module) is not module:
            continue
        if _is_embedding(module):
            yield plain_name(_join(prefix, _join(path, _WEIGHT))), module.weight
        if type(module).__module__.startswith(_SHARDED):
            for name in _names_in_state(module):
                yield from _in_collection(_join(prefix, _join(path, name)), None)
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if not is_lazy(parameter) and parameter.dim() == 2:
            yield from _in_collection(_join(prefix, name), parameter)


def plain_matrices(root: nn.Module, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (plain name within the model, matrix) of each module of the caller's own, whose code may look up rows in it."""
    for path, module in root.named_modules(remove_duplicate=False):
        if is_of_library(module):
            continue
        for name, parameter in module._parameters.items():  # noqa: SLF001 -- only its own
            if parameter is not None and not is_lazy(parameter) and parameter.dim() == 2:
                yield plain_name(_join(prefix, _join(path, name))), parameter


def is_hash_table(module: nn.Module) -> bool:
    """Whether a module has the surface of RecIS's hash table."""
    return callable(getattr(module, "ids", None)) and callable(getattr(module, "insert", None))


def is_of_library(module: nn.Module) -> bool:
    """Return whether a module's class belongs to torch or torchrec, so that it is known whether it looks up rows."""
    if isinstance(
        module, torch.jit.ScriptModule
    ):  # scripted from any class, whose name it keeps; its own class always belongs to torch
        kind = getattr(module, "original_name", "")
        return isinstance(getattr(nn, kind, None), type) and kind not in _SCRIPTED_HOLDERS
    is_holder = isinstance(module, (nn.ParameterDict, nn.ParameterList))
    comes_with_it = type(module).__module__.startswith(("torch.", "torchrec.", "fbgemm_gpu."))
    return is_collision_module(module) or (comes_with_it and not is_holder)


def keeps_tables(module: Any) -> bool:
    """Return whether a module is a hash table by its surface, or is of a library that lays tables out by itself."""
    has_ids_and_rows = callable(getattr(module, "ids", None)) and any(
        callable(getattr(module, name, None)) for name in ("insert", "embeddings")
    )
    return has_ids_and_rows or type(module).__module__.startswith(_KEEPS_TABLES)


def constants_of(module: nn.Module) -> set[tuple[int, ...]]:
    """Return the shapes of the matrices that scripted code contains as constants; empty if the module is not scripted."""
    if not isinstance(module, torch.jit.ScriptModule):
        return set()
    script: Any = module
    try:
        found = (node.output() for node in script.graph.findAllNodes("prim::Constant"))
    except RuntimeError:  # a part whose forward is never called has no graph
        return set()
    values = (output.toIValue() for output in found if output.type().kind() == "TensorType")
    return {tuple(value.shape) for value in values if isinstance(value, torch.Tensor) and value.dim() == 2}


def say_computed(module: nn.Module) -> str:
    """Return by what the weight of an embedding is computed whenever it is read or run; empty where it is held as it is."""
    if _WEIGHT in module._parameters or _WEIGHT in module._buffers:  # noqa: SLF001 -- its own alone
        return ""
    if is_parametrized(module, _WEIGHT):
        chain = cast("Any", module).parametrizations[_WEIGHT]
        return f"torch.nn.utils.parametrize ({', '.join(type(step).__name__.lstrip('_') for step in chain)})"
    # FSDP has plain tensors there as well, without a hook
    return "a hook before its forward, as torch.nn.utils.weight_norm does it" if module._forward_pre_hooks else ""  # noqa: SLF001


def _is_embedding(module: nn.Module) -> bool:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return True
    if not all(isinstance(getattr(module, size, None), int) for size in ("num_embeddings", "embedding_dim")):
        return False  # nothing else is read of it: a weight under spectral_norm changes buffers whenever it is read
    weight = getattr(module, _WEIGHT, None)
    return isinstance(weight, nn.Parameter) and not is_lazy(weight) and weight.dim() == 2


def _names_in_state(module: nn.Module) -> list[str]:
    try:
        return list(module.state_dict())
    except Exception as error:
        raise ModelError(f"state_dict() of the model's {type(module).__name__} fails: {said(error)}") from error


def _in_collection(name: str, weight: Any) -> Iterator[tuple[str, Any]]:
    plain = plain_name(name)
    if split_collection(plain) is not None:
        yield plain, weight


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix and path else prefix or path
