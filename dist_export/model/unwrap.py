"""Make a plain copy of the dense arch: no DDP, FSDP or ``torch.compile`` around any module, full tensors, no gradients.

The export loads the checkpoint's weights into the copy and traces it. The caller's model, which may be in the middle of
training, does not change.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from dist_export.errors import ModelError
from dist_export.model.copied_closures import Closures

_FOREIGN = ("torch.distributed", "torch.nn.parallel")
"""Modules of hooks that would gather, scatter or synchronize tensors; the copy already has these whole."""


_PACKED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")


def copy_dense_arch(module: nn.Module) -> nn.Module:
    """Return a plain copy in eval mode. All ranks.

    With FSDP or DTensor parameters this gathers them, which is collective over the ranks that hold them.

    Raises:
        ModelError: a parameter cannot be gathered, with the reason; a module is scripted or quantized; a tensor has no values,
            or is of a kind that a program cannot contain.
    """
    scripted = [name or "itself" for name, child in module.named_modules() if isinstance(child, torch.jit.ScriptModule)]
    if scripted:  # its copy would compute with the original's values, and torch.export cannot trace it
        raise ModelError(
            f"the dense arch is scripted by torch.jit ({scripted[0]}), which torch.export does not trace. Nothing was written. "
            "Give the module as it was before torch.jit.script or torch.jit.trace"
        )
    _refuse_packed(module)
    refuse_unplain(module)
    with _whole_parameters(module):
        plain = _Copier(module).copy()
    return plain.eval()


def _refuse_packed(module: nn.Module) -> None:
    """Refuse modules of torch.ao.quantization: their weights are packed objects, which no state_dict has as tensors."""
    packed = [
        (name or "itself", type(child).__name__)
        for name, child in module.named_modules()
        if type(child).__module__.startswith(_PACKED) and hasattr(child, "_packed_params")
    ]
    if packed:
        name, kind = packed[0]
        raise ModelError(
            f"the dense arch's {name} ({kind}) is quantized by torch.ao.quantization, and a program is not traced with packed "
            "weights. Nothing was written. Give the model, and the checkpoint, as they were before quantize_dynamic or convert, "
            "and quantize for serving afterwards"
        )


def refuse_unplain(module: nn.Module) -> None:
    """Refuse parameters and buffers that are no plain tensors with values. ModelError names the first one."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            continue
        if tensor.device.type == "meta":
            raise ModelError(
                f"the dense arch's {name} is on the meta device, so it has no values, and the caller's own model cannot be run "
                "for comparison. Nothing was written. Build the model on a real device, or call module.to_empty(device='cpu')"
            )
        if kind := _unplain_kind(tensor):
            raise ModelError(
                f"the dense arch's {name} is a {kind} tensor, which a program is not traced with. Nothing was written. Keep it "
                "as a plain tensor, and make the other form of it in forward"
            )


def _unplain_kind(tensor: torch.Tensor) -> str:
    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return "quantized"
    return "" if tensor.layout == torch.strided else f"{str(tensor.layout).removeprefix('torch.')} (not strided)"


def move_to(module: nn.Module, device: torch.device) -> None:
    """Move parameters, buffers and tensors that are plain attributes."""
    module.to(device)
    for child in module.modules():
        for name, value in child.__dict__.items():
            if isinstance(value, torch.Tensor):
                child.__dict__[name] = value.to(device)


def unwrap(module: nn.Module) -> nn.Module:
    """Remove the wrappers of one module: DataParallel, DDP, FSDP, ``torch.compile``, torchrec's DistributedModelParallel."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel, FullyShardedDataParallel)):
            module = cast("nn.Module", module.module)
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = cast("nn.Module", module._orig_mod)  # noqa: SLF001 -- torch.compile's wrapper has no public access to it
        elif isinstance(getattr(module, "_dmp_wrapped_module", None), nn.Module):
            module = cast("nn.Module", module._dmp_wrapped_module)  # noqa: SLF001 -- the same for torchrec
        else:
            return module


def is_sharded_flat(module: nn.Module) -> bool:
    """Return whether a module is the wrapper of FSDP of version 1, which flattens parameters."""
    return isinstance(module, FullyShardedDataParallel)


def refuse_outer_flat(model: nn.Module, arches: Iterable[nn.Module]) -> None:
    """Refuse FSDP of version 1 that has an arch's parameters in one with others: it frees what they view."""
    wrappers = [(path, child) for path, child in model.named_modules() if is_sharded_flat(child)]
    for arch in arches if wrappers else ():
        within = {id(child) for child in arch.modules()}
        for path, wrapper in wrappers:
            if id(wrapper) in within or unwrap(wrapper) is unwrap(arch):
                continue
            if any(id(owner) in within for owner in _flattened_by(wrapper)):
                raise ModelError(
                    f"FullyShardedDataParallel around {path or 'the whole model'} flattens parameters of an arch together with "
                    "others. Nothing was written. Put it around the dense arch itself, or use fully_shard, or give the model "
                    "without it: an export needs none"
                )


def _flattened_by(wrapper: nn.Module) -> list[nn.Module]:
    """Return the modules whose parameters one wrapper of FSDP has in its flat parameter."""
    handle = getattr(wrapper, "_handle", None)
    flat = getattr(handle, "flat_param", None)
    infos = (*getattr(flat, "_param_infos", ()), *getattr(flat, "_shared_param_infos", ()))
    return [info.module for info in infos]


def list_modules(root: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Return each module once, parents first, with all its paths. Wrappers are left out: what they wrap is there too."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        if unwrap(module) is module:
            found.setdefault(id(module), (module, []))[1].append(path)
    return list(found.values())


def find_arch(model: Any, name: str, setting: str) -> nn.Module:
    """Return a submodule by its path, through wrappers. ModelError if ``setting`` names no module."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    module: nn.Module = model
    for element in name.split(".") if name else []:
        module = unwrap(module)
        child = getattr(module, element, None)
        if not isinstance(child, nn.Module):
            children = ", ".join(child_name for child_name, _ in module.named_children()) or "none"
            raise ModelError(
                f"{setting} is {name!r}, but {type(module).__name__} has no module {element!r} (it has {children}). The module "
                "that looks ids up is sparse_model_name, and dense_model_name is the one that gets what it returns; give the "
                "model these two parts, with the names that the checkpoint has"
            )
        module = child
    return module


def is_lazy(tensor: torch.Tensor) -> bool:
    """Return whether a lazy module has not seen its first input yet, so that this parameter has no shape."""
    return isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))


def copy_lazy(tensor: Any) -> Any:
    """Return another parameter or buffer without a shape: torch refuses to copy such a buffer."""
    return type(tensor)(tensor.requires_grad, tensor.data.device, tensor.data.dtype)


@contextlib.contextmanager
def _whole_parameters(module: nn.Module) -> Iterator[None]:
    """Give FSDP (version 1) modules their whole parameters while the block runs."""
    if not any(isinstance(child, FullyShardedDataParallel) for child in module.modules()):
        yield
        return
    with FullyShardedDataParallel.summon_full_params(module, writeback=False):
        yield


class _Copier:
    """Copies a tree of modules. Objects that are shared within the tree are shared within the copy."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._memo: dict[int, Any] = {}
        self._inner: list[tuple[nn.Module, nn.Module]] = []
        self._bases: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        """Address of a storage -> the parameters and buffers in it, each with its copy."""
        self._closures = Closures(self._find_copy)

    def copy(self) -> nn.Module:
        plain = self._allocate(self._root)
        for original, new in self._inner:  # grows when modules are found in plain attributes
            self._fill(original, new)
        return plain

    def _allocate(self, wrapped: nn.Module) -> nn.Module:
        """Make all module copies with their tensors first, so that references among modules and views of tensors find them."""
        original = unwrap(wrapped)
        if id(original) not in self._memo:
            kind = plain_class(original)
            new = kind.__new__(kind)
            self._memo[id(original)] = new
            self._inner.append((original, new))
            for place in ("_parameters", "_buffers"):
                tensors = original.__dict__[place].items()
                new.__dict__[place] = {name: self._copy_tensor(tensor, original) for name, tensor in tensors}
            for child in original._modules.values():  # noqa: SLF001 -- children() leaves out duplicates
                if child is not None:
                    self._allocate(child)
        new = self._memo[id(original)]
        while wrapped is not original:
            self._memo[id(wrapped)] = new
            wrapped = next(child for child in wrapped.children() if unwrap(child) is original)
        return new  # type: ignore[no-any-return]

    def _fill(self, original: nn.Module, new: nn.Module) -> None:
        for name, value in original.__dict__.items():
            if name in {"_parameters", "_buffers"} or name.startswith("__composable_api"):
                continue
            if name == "_modules":
                new.__dict__[name] = {key: None if m is None else self._memo[id(m)] for key, m in value.items()}
            elif name == "_compiled_call_impl":
                new.__dict__[name] = None
            elif name.endswith("_hooks") and isinstance(value, dict):
                own = {key: hook for key, hook in value.items() if not _is_foreign(hook)}
                hooks = type(value)((key, self._copy_attribute(hook, new)) for key, hook in own.items())
                new.__dict__[name] = self._memo[id(value)] = (
                    hooks  # a handle within the module removes its hook from there
                )
            else:
                new.__dict__[name] = self._copy_attribute(value, original)

    def _copy_tensor(self, tensor: torch.Tensor | None, owner: nn.Module) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in self._memo:
            if is_lazy(tensor):
                self._memo[id(tensor)] = copy_lazy(tensor)
                return self._memo[id(tensor)]  # type: ignore[no-any-return]
            whole = _as_plain(_gather(tensor, owner)).clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            new = nn.Parameter(whole, requires_grad=tensor.requires_grad) if is_parameter else whole
            self._memo[id(tensor)] = new
            if new.shape == tensor.shape and new.stride() == tensor.stride() and not hasattr(tensor, "full_tensor"):
                self._bases.setdefault(_address(tensor), []).append((tensor, new))
        return self._memo[id(tensor)]  # type: ignore[no-any-return]

    def _copy_attribute(self, value: Any, owner: nn.Module) -> Any:
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, torch.Tensor):
            return self._copy_view(value, owner)
        if isinstance(value, nn.Module):
            # a reference to a module that contains the dense arch must not copy the whole model
            return value if any(child is self._root for child in value.modules()) else self._allocate(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self._copy_attribute(value.__self__, owner))
        if isinstance(value, types.FunctionType):
            return self._closures.follow(value)
        if type(value) is functools.partial:
            function, *args = [self._copy_attribute(item, owner) for item in (value.func, *value.args)]
            keywords = {key: self._copy_attribute(item, owner) for key, item in value.keywords.items()}
            return functools.partial(function, *args, **keywords)
        if type(value) in (list, tuple, set):
            return type(value)(self._copy_attribute(item, owner) for item in value)
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._copy_attribute(item, owner)) for key, item in value.items())
        try:
            return copy.deepcopy(value, self._memo)
        except Exception:  # noqa: BLE001 -- objects that cannot be copied (process groups, streams, locks) are shared
            return value

    def _find_copy(self, value: Any) -> Any:
        """Return the copy of a module or a tensor of the tree, or of a view of its tensors; any other object itself."""
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not hasattr(value, "full_tensor"):
            return value if is_lazy(value) else self._find_view(value)
        return value

    def _copy_view(self, tensor: torch.Tensor, owner: nn.Module) -> torch.Tensor | None:
        """Copy a tensor that is a plain attribute; a view of a parameter becomes a view of the parameter's copy."""
        if is_lazy(tensor) or tensor.layout != torch.strided or hasattr(tensor, "full_tensor"):
            return self._copy_tensor(tensor, owner)
        view = self._find_view(tensor)
        return self._copy_tensor(tensor, owner) if view is tensor else view

    def _find_view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the view of a parameter's copy for a view of the parameter; any other tensor itself."""
        for base, new in self._bases.get(_address(tensor), []):
            first = tensor.storage_offset() - base.storage_offset()
            last = first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            room = new.untyped_storage().nbytes() // new.element_size()
            if tensor.dtype == base.dtype and tensor.numel() and first >= 0 and last < room:
                view = new.detach().as_strided(tensor.shape, tensor.stride(), first)
                self._memo[id(tensor)] = view
                return view
        return tensor


def _gather(tensor: torch.Tensor, owner: nn.Module) -> torch.Tensor:
    """Return the whole of a DTensor; return any other tensor itself, without its history."""
    if hasattr(tensor, "local_shards"):
        raise ModelError(
            f"a parameter of {type(owner).__name__} is a ShardedTensor, which has no way to be gathered on every rank; "
            "shard the dense arch with fully_shard (DTensor), or not at all"
        )
    whole = tensor.detach()
    if not hasattr(whole, "full_tensor"):
        return whole
    try:
        return whole.full_tensor()  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise ModelError(
            f"a parameter of {type(owner).__name__} is a DTensor that cannot be gathered: {error}"
        ) from error


def _as_plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a subclass with a tensor's own behaviour as a plain tensor; a subclass with other behaviour stays."""
    kind = type(tensor)
    own = [getattr(kind, name, None) for name in ("__torch_function__", "__torch_dispatch__")]
    if kind is torch.Tensor or own[0] is None or own[1] is not _NO_DISPATCH:
        return tensor
    is_default = getattr(own[0], "__func__", own[0]) is _NO_FUNCTION or own[0] is torch._C._disabled_torch_function_impl  # noqa: SLF001
    return tensor.as_subclass(torch.Tensor) if is_default else tensor


_NO_FUNCTION = torch.Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
_NO_DISPATCH = torch.Tensor.__torch_dispatch__


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_foreign(hook: Any) -> bool:
    while not hasattr(hook, "__func__") and (isinstance(hook, functools.partial) or hasattr(hook, "hook")):
        hook = hook.func if isinstance(hook, functools.partial) else hook.hook
    return str(getattr(getattr(hook, "__func__", hook), "__module__", "")).startswith(_FOREIGN)


def is_fully_sharded(module: nn.Module) -> bool:
    """Return whether FSDP2's ``fully_shard`` was applied to this module."""
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:  # before torch 2.6 it has another path, and there are no FSDP2 modules
        return False
    return isinstance(module, FSDPModule)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that the user wrote: FSDP2's ``fully_shard`` replaces it with a subclass."""
    if not is_fully_sharded(module):
        return type(module)
    from torch.distributed.fsdp import FSDPModule

    return cast("type[nn.Module]", next(k for k in type(module).__mro__[1:] if not issubclass(k, FSDPModule)))
