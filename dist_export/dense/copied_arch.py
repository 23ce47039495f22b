"""The two arches within the caller's model, and the copy of the dense arch with the values that the program holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dist_export.checkpoint.dense import DenseParameters
from dist_export.checkpoint.model_weights import plain_name
from dist_export.config.needs import ModelValues
from dist_export.dense.load_hooks import check_load_hooks, naming_hooks
from dist_export.dense.load_state import list_taken, load_dense_parameters
from dist_export.dense.missing_values import is_of_sparse
from dist_export.dense.model_rest import is_of_rest
from dist_export.dense.modes import ready_to_load
from dist_export.dense.origins import hidden_parameters, hidden_values
from dist_export.dense.own_values import list_own_values, list_sparse_values
from dist_export.dense.own_values_entry import OWN_DIGEST, OWN_VALUES, SPARSE_DIGEST, SPARSE_VALUES, OwnValues
from dist_export.dense.reachable_tables import find_tables
from dist_export.errors import ConfigError, ModelError
from dist_export.humanize import few
from dist_export.model.unwrap import find_arch, is_lazy, refuse_outer_flat
from dist_export.model.user_errors import said


@dataclass(frozen=True, slots=True)
class LoadedCopy:
    """What was loaded into the copy."""

    notes: tuple[str, ...] = ()
    parameters: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)
    """Of a model in memory: name within the model, torch dtype name and shape of its dense parameters."""
    taken: frozenset[str] = frozenset()
    """Names of the checkpoint's tensors, or of the model's parameters, that the program holds."""
    own_values: dict[str, Any] = field(default_factory=dict)
    """For the manifest's ``run``: names of what the program holds and the checkpoint did not give, and a digest."""


def find_arches(model: Any, config: ModelValues) -> tuple[nn.Module, nn.Module]:
    """Return the sparse and the dense arch of the caller's model. ModelError where one is not there, or FSDP is around both."""
    arches = (
        find_arch(model, config.sparse_model_name, "sparse_model_name"),
        find_arch(model, config.dense_model_name, "dense_model_name"),
    )
    refuse_outer_flat(model, arches)
    return arches


def note_unregistered(model: nn.Module, dense_arch: nn.Module, path: str) -> list[str]:
    """Return notes on what the dense arch keeps in an attribute, a list, a dict or a closure: no checkpoint holds it."""
    registered = {id(parameter) for parameter in model.parameters()}
    names = [name for name, parameter in hidden_parameters(dense_arch, path) if id(parameter) not in registered]
    known = [*model.parameters(), *model.buffers(), *dense_arch.parameters(), *dense_arch.buffers()]
    values = [name for name, _ in hidden_values(dense_arch, path, known)]
    # a table's rows are in the checkpoint, and a dense arch that reads one is refused
    tables = tuple(f"{place}{step}" for place in find_tables(dense_arch, path) for step in ".[")
    names, values = ([name for name in its if not name.startswith(tables)] for its in (names, values))
    notes = []
    if names:
        notes.append(
            f"the dense arch does not register {few(names)}, so no checkpoint holds them: where the program uses them, it has "
            "the model's own values. Use nn.ModuleList, nn.ModuleDict or nn.ParameterList in place of a list or dict"
        )
    if values:
        notes.append(
            f"the dense arch keeps {few(values)}, neither parameter nor buffer, so no checkpoint holds them: where the program "
            "uses them, it has the values of the model as it was built. If training changes them, or they are made of weights, "
            "register them as parameters or buffers"
        )
    return notes


def clear_gradients(optimizer: Any) -> None:
    """Call ``zero_grad`` of the dense optimizer, if there is one. ModelError where it has no such method."""
    if optimizer is None:
        return
    if not callable(getattr(optimizer, "zero_grad", None)):
        raise ModelError(f"dense_optimizer is a {type(optimizer).__name__} without zero_grad()")
    optimizer.zero_grad()


def load_copy(
    copied: nn.Module,
    parameters: DenseParameters | None,
    model: Any,
    config: ModelValues,
    *,
    tables: Collection[str] = (),
) -> LoadedCopy:
    """Load the checkpoint's dense parameters into the copy; without any, the copy keeps the values that training left.

    ``tables`` are names of the checkpoint's, which give the sparse arch its rows. The model must not have run yet.

    Raises:
        ModelError: parameters are missing, or are too many, and no setting allows it; or lazy modules have none yet.
    """
    name = config.dense_model_name
    if parameters is None:
        _refuse_lazy(copied, name)
        prefix = f"{name}." if name else ""
        held = [
            (prefix + key, str(value.dtype).removeprefix("torch."), tuple(value.shape))
            for key, value in copied.state_dict().items()
            if isinstance(value, torch.Tensor)
        ]
        # without ckpt_dir all of the program is the model's own, and no two exports are the same one
        own_values = {} if config.ckpt_dir is None else _describe_own_values(copied, {}, model, name)
        return LoadedCopy(parameters=held, taken=frozenset(key for key, _, _ in held), own_values=own_values)
    _refuse_lazy(find_arches(model, config)[0], config.sparse_model_name)
    state = parameters.load()
    own_values = _describe_own_values(copied, state, model, name)
    own_values |= _describe_sparse_values(model, config, [*state, *tables])
    taken = list_taken(copied, state, dense_model_name=name)
    with ready_to_load(copied), naming_hooks(copied, name):
        notes = load_dense_parameters(
            copied,
            state,
            dense_model_name=name,
            allow_missing=_patterns_of_dense(model, config),
            allow_unexpected=config.allow_unexpected_dense,
            where=parameters.where,
        )
    _refuse_lazy(copied, name)
    notes = (*notes, *check_load_hooks(model, config))
    return LoadedCopy(notes, taken=taken, own_values=own_values)


def _refuse_lazy(module: nn.Module, path: str) -> None:
    """Refuse lazy modules that nothing has given a shape: their first batch would fill them with random numbers."""
    named = (*module.named_parameters(), *module.named_buffers())
    if lazy := [plain_name(f"{path}.{name}" if path else name) for name, tensor in named if is_lazy(tensor)]:
        raise ModelError(
            f"{few(lazy)} have neither shape nor values yet (lazy modules). Give the model that was trained; where the "
            "checkpoint has their values, call the model once on a batch before it is handed over"
        )


def _patterns_of_dense(model: Any, config: ModelValues) -> list[str]:
    """Return the patterns of ``allow_missing_dense`` that are not of the sparse arch or of the rest of the model."""
    patterns = [p for p in config.allow_missing_dense if not is_of_sparse(p, config.sparse_model_name)]
    arches = find_arches(model, config) if patterns else ()
    return [pattern for pattern in patterns if not is_of_rest(pattern, model, arches)]


def _describe_own_values(copied: nn.Module, state: Mapping[str, Any], model: Any, name: str) -> dict[str, Any]:
    names = list_own_values(copied, state, dense_model_name=name)
    digest = OwnValues(model, name).digest(names) if names else None
    return ({OWN_VALUES: names} if names else {}) | ({OWN_DIGEST: digest} if digest else {})


def _describe_sparse_values(model: Any, config: ModelValues, given: Collection[str]) -> dict[str, Any]:
    sparse_arch, _ = find_arches(model, config)
    sparse_name, dense_name = config.sparse_model_name, config.dense_model_name
    names = list_sparse_values(model, sparse_arch, given, sparse_model_name=sparse_name, dense_model_name=dense_name)
    digest = OwnValues(model, dense_name, sparse_name).digest_sparse(names) if names else None
    return {} if digest is None else {SPARSE_VALUES: names, SPARSE_DIGEST: digest}


def device_of(copied: nn.Module, asked: str | None) -> torch.device:
    """Return the device that the setting names, else that of the copy. ConfigError where it is not there."""
    tensor = next((t for t in (*copied.parameters(), *copied.buffers())), None)
    try:
        device = torch.device(asked or (tensor.device if tensor is not None else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise ConfigError(f"device is {asked!r}: {said(error)}") from None
    return device
