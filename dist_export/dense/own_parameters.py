"""Give the caller's own dense arch the checkpoint's values for a while, whatever shards it, and put its own back.

This is the reference's way to the dense parameters. It shares nothing with the plain copy that is exported, except what was
read from the checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from dist_export.archive.output_diff import has_same_values
from dist_export.checkpoint.extra_state import EXTRA_STATE, UntakenState
from dist_export.checkpoint.model_weights import WRAPPER_ELEMENTS, distinct_names
from dist_export.dense.load_hooks import has_load_hooks
from dist_export.errors import ModelError
from dist_export.model.managed_collisions import is_collision_module
from dist_export.model.unwrap import is_fully_sharded, is_lazy, is_of_caller

_MOST_BYTES = 64 << 20
"""A buffer that is larger is not copied in order to put it back."""

_PLAIN = (bool, int, float, str, tuple, type(None))


@contextlib.contextmanager
def state_put_back(module: nn.Module) -> Iterator[None]:
    """Put parameters, buffers and extra state of ``module`` back when the block ends, bit for bit. Any rank, for itself.

    Of a module that does something of its own when a state is loaded, the attributes are put back too.
    """
    reshard(module)
    attributes = [(child, dict(vars(child))) for child in module.modules()] if has_load_hooks(module) else []
    kept = _keep([own for child in module.modules() for own in (child._parameters, child._buffers)])  # noqa: SLF001
    extra = [(child, copy.deepcopy(child.get_extra_state())) for child in module.modules() if _has_extra_state(child)]
    try:
        yield
    finally:
        reshard(module)
        for child, own in attributes:
            vars(child).clear()
            vars(child).update(own)
        _put_back(kept)
        for child, state in extra:
            child.set_extra_state(state)


@contextlib.contextmanager
def buffers_put_back(module: nn.Module) -> Iterator[None]:
    """Put the buffers of ``module`` back when the block ends: a forward may count or cache. Any rank, for itself.

    If one has changed, what modules of the caller's classes have noted in plain attributes is put back too: a forward that
    fills a buffer once knows by a flag or a length that it has, and would never fill it again.
    """
    owners = [child._buffers for child in module.modules()]  # noqa: SLF001 -- the very places that a forward fills anew
    kept = _keep(owners, most_bytes=_MOST_BYTES)
    noted = [(child, _list_plain(child)) for child in module.modules() if is_of_caller(child)]
    try:
        yield
    finally:
        if any(_has_changed(*buffer) for buffer in kept):
            for child, attributes in noted:
                for name in _list_plain(child).keys() - attributes.keys():
                    delattr(child, name)
                vars(child).update(attributes)
        _put_back(kept)


@contextlib.contextmanager
def own_tensors_put_back(module: nn.Module) -> Iterator[None]:
    """Put a module's own parameters and buffers back when the block ends, not those of modules within it, and no large ones."""
    kept = _keep([module._parameters, module._buffers], most_bytes=_MOST_BYTES)  # noqa: SLF001
    try:
        yield
    finally:
        _put_back(kept)


def _list_plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}


def _has_changed(owner: Mapping[str, Any], name: str, tensor: torch.Tensor, values: torch.Tensor) -> bool:
    return owner.get(name) is not tensor or not has_same_values(local_part(tensor), values)


def _keep(
    owners: Sequence[dict[str, Any]], *, most_bytes: int | None = None
) -> list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]]:
    kept = []
    for owner in owners:
        for name, tensor in owner.items():
            if tensor is None or is_lazy(tensor):
                continue
            local = local_part(tensor)
            if most_bytes is None or local.numel() * local.element_size() <= most_bytes:
                kept.append((owner, name, tensor, local.clone()))
    return kept


def _put_back(kept: Sequence[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]]) -> None:
    for owner, name, tensor, values in kept:
        write_into(local_part(tensor), values)
        owner[name] = tensor


def write_into(tensor: torch.Tensor, values: torch.Tensor) -> bool:
    """Write ``values`` into the memory of ``tensor``, of the same shape, which may be expanded or overlap itself.

    Returns whether ``tensor`` has these values then: elements that lie at one place cannot have different ones.
    """
    if not torch._debug_has_internal_overlap(tensor):  # noqa: SLF001 -- what copy_ itself asks; 2 is "may be"
        tensor.copy_(values)
        return True
    once = [slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride()]
    tensor[tuple(once)].copy_(values[tuple(once)])
    written = values.to(device=tensor.device, dtype=tensor.dtype)
    return bool(((tensor == written) | ((tensor != tensor) & (written != written))).all())  # noqa: PLR0124 -- NaN


def say_lost(value: torch.Tensor, own: torch.Tensor) -> str:
    """Return what is lost if ``own``, a tensor of the model, gets this value of another dtype; empty if it is rounding alone.

    A cast drops imaginary parts, cuts fractions off where the model has whole numbers, and makes what is too large infinite.
    """
    told = " and ".join(
        f"{str(tensor.dtype).removeprefix('torch.')} in the {where}"
        for tensor, where in ((value, "checkpoint"), (own, "model"))
    )
    if value.dtype == own.dtype:
        return ""
    if value.is_complex() and not own.is_complex():
        return f"is {told}: its imaginary part would be lost" if bool(value.imag.any()) else ""
    cast = value.to(own.dtype)
    if not (own.is_floating_point() or own.is_complex()):
        is_whole = cast.to(value.dtype) == value
        if value.dtype == torch.uint64 and own.dtype != torch.uint64:  # what wraps around comes back as it was
            is_whole = is_whole & (cast.to(torch.int64) >= 0)
        return "" if bool(is_whole.all()) else f"is {told}: values that are no such number would be lost"
    is_there, is_kept = (  # float8 knows no isfinite
        (tensor if tensor.is_complex() else tensor.to(torch.float64)).isfinite() for tensor in (value, cast)
    )
    is_lost = is_there & ~is_kept
    return f"is {told}: values that are too large would become infinite" if bool(is_lost.any()) else ""


def _refuse_one_place(name: str, tensor: torch.Tensor) -> ModelError:
    return ModelError(
        f"the model's {name} has several elements at one place in memory (shape {list(tensor.shape)}, strides "
        f"{list(tensor.stride())}), and the checkpoint has different values for them. Give the model a tensor of its own: "
        "tensor.clone()"
    )


@contextlib.contextmanager
def values_within(
    module: nn.Module,
    state: Mapping[str, Any],
    *,
    path: str,
    except_below: str,
    others: Mapping[int, Collection[str]] | None = None,
    must_fit: bool = True,
) -> Iterator[list[str]]:
    """Within this block, parameters and buffers of ``module`` have the values that ``state`` holds. Any rank, for itself.

    Args:
        module: the sparse arch of the caller's own model, at ``path`` within it.
        state: name within the model, or within ``module`` where no name begins with ``path``, -> tensor.
        except_below: the path within the model of the dense arch, which has its values in another way.
        others: ``id()`` of a tensor -> all its names within the model: a file of safetensors has a tied tensor under one.
        must_fit: whether a value of another shape, or one that would be lost by a cast, is refused; otherwise it is left out.

    Yields the names within the model of what was put. Raises ModelError where a value has another shape.
    """
    begin = f"{_plain(path)}." if path else ""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    distinct = distinct_names(name for name, _ in tensors)
    has_path = any(_plain(name).startswith(begin) for name in state)
    written = {name: f"{path}.{name}" if path and has_path else name for name in distinct}
    exact = {name: full if full in state else None for name, full in written.items()}
    given = _by_plain_name(set(state).difference(exact.values()))  # what is another tensor's own name is not this one's
    # these get what the checkpoint knows of raw ids with the rows, in another order
    mapped = tuple(f"{place}." for place, child in module.named_modules() if is_collision_module(child))
    found, put = [], []
    for name, tensor in tensors:
        if name.startswith(mapped):
            continue
        full = begin + distinct[name]
        names = [begin + _plain(name) if has_path else _plain(name), *(others or {}).get(id(tensor), ())]
        held = exact[name] or _only(next((given[known] for known in names if known in given), []), name)
        if (
            held is None
            or is_lazy(tensor)
            or (except_below and (begin + _plain(name)).startswith(f"{_plain(except_below)}."))
        ):
            continue
        value = state[held]
        if isinstance(value, torch.Tensor):
            if not must_fit and (value.shape != tensor.shape or say_lost(value, tensor)):
                continue
            if value.shape != tensor.shape:
                raise ModelError(f"{held} is {list(value.shape)} in the checkpoint, the model has {list(tensor.shape)}")
            if lost := say_lost(value, tensor):
                raise ModelError(f"{held} {lost}. Give the model the dtype that it was trained in")
            found.append((full, tensor, value))
            put.append(full)
    kept = [(local_part(tensor), local_part(tensor).clone()) for _, tensor, _ in found]
    try:
        with torch.no_grad():
            for name, tensor, value in found:
                if not write_into(local_part(tensor), _share_of(value, tensor)):
                    raise _refuse_one_place(name, tensor)
        yield put
    finally:
        with torch.no_grad():
            for own, values in kept:
                write_into(own, values)


def _by_plain_name(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_plain(name), []).append(name)
    return found


def _only(names: Sequence[str], wanted: str) -> str | None:
    """Return the one name that a checkpoint has for a tensor. ModelError if it has several."""
    if len(names) > 1:
        raise ModelError(
            f"the checkpoint's {' and '.join(sorted(names))} are one name without the elements of wrappers, and the model has "
            f"{wanted}: which one it is cannot be told. Give the model as it was when the checkpoint was saved"
        )
    return names[0] if names else None


def put_values(module: nn.Module, state: Mapping[str, Any], *, dense_model_name: str) -> None:
    """Write the values of ``state`` into the dense arch itself. All ranks: FSDP of version 1 gathers its parameters for it.

    Names are compared without the path elements of wrappers. What ``state`` lacks stays; what does not fit was refused when
    the copy was loaded.
    """
    begin = f"{_plain(dense_model_name)}." if dense_model_name else ""
    under = {_plain(name)[len(begin) :]: value for name, value in state.items() if _plain(name).startswith(begin)}
    values = {key: value for key, value in under.items() if not isinstance(value, UntakenState)}
    is_flat = any(isinstance(child, FullyShardedDataParallel) for child in module.modules())
    is_sharded = is_flat or any(hasattr(tensor, "device_mesh") for tensor in (*module.parameters(), *module.buffers()))
    if not is_sharded and has_load_hooks(module):  # they see the whole state, as when the trained model is loaded
        _load_rest(module, values, put=set())
        return
    whole: Any = FullyShardedDataParallel.summon_full_params(module, writeback=True) if is_flat else None
    with contextlib.nullcontext() if whole is None else whole, torch.no_grad():
        every = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        pairs = [(name, tensor) for name, tensor in every if not is_lazy(tensor)]
        # not by load_state_dict, which autograd counts as a change of the caller's parameters
        for name, tensor in pairs:
            value = values.get(_plain(name))
            if isinstance(value, torch.Tensor) and not write_into(local_part(tensor), _share_of(value, tensor)):
                raise _refuse_one_place(begin + name, tensor)
    if not is_sharded:
        _load_rest(module, values, put={_plain(name) for name, _ in pairs})
        return
    for name, child in module.named_modules():
        key = _plain(f"{name}.{EXTRA_STATE}" if name else EXTRA_STATE)
        if _has_extra_state(child) and key in values:
            cast("Any", child).set_extra_state(values[key])


def _load_rest(module: nn.Module, values: Mapping[str, Any], *, put: Collection[str]) -> None:
    """Load what is not ``put`` by ``load_state_dict``, with what modules have in their state by hooks of their own."""
    names = {_plain(name): name for name in module.state_dict()}
    rest = {names[key]: copied(value) for key, value in values.items() if key in names and key not in put}
    if rest:
        module.load_state_dict(rest, strict=False)


def copied(value: Any) -> Any:
    """Return a value that a hook may change in place."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def reshard(module: nn.Module) -> None:
    """Let FSDP drop the whole parameters that a forward has left, which would hide what is written into its shards."""
    for child in module.modules():
        if isinstance(child, FullyShardedDataParallel):
            handle = getattr(child, "_handle", None)
            has_run = hasattr(getattr(handle, "flat_param", None), "_local_shard")  # before, it has the shard alone
            if handle is not None and handle.uses_sharded_strategy and has_run:
                handle.reshard(True)  # free the whole parameter
        elif is_fully_sharded(child):
            cast("Any", child).reshard()


@contextlib.contextmanager
def resharded(module: nn.Module) -> Iterator[None]:
    """Let FSDP drop whole parameters after what runs within this block, too. Any rank, for itself; nothing is sent."""
    reshard(module)
    try:
        yield
    finally:
        reshard(module)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's values, in the tensor's own memory and apart from autograd's count of changes."""
    local = tensor.detach()
    return (local.to_local() if hasattr(local, "to_local") else local).data


def _share_of(value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's share of the whole ``value``, sharded as ``tensor`` is. Nothing is sent."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import DTensor, Replicate

    here = local_part(tensor)
    everywhere = DTensor.from_local(
        value.to(here.device),
        mesh,
        [Replicate()] * mesh.ndim,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )
    return everywhere.redistribute(mesh, tensor.placements).to_local()  # type: ignore[attr-defined]


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _plain(name: str) -> str:
    return ".".join(element for element in name.split(".") if element not in WRAPPER_ELEMENTS)
