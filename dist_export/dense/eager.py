"""The dense arch as it runs eagerly: what it gives for the sample, and the names of what it gives."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dist_export.archive.output_diff import has_same_values
from dist_export.dense.blocks import Blocks
from dist_export.errors import ModelError
from dist_export.humanize import few
from dist_export.model.alone import refuse_collectives
from dist_export.model.user_errors import blame, said


@dataclass(frozen=True, slots=True)
class DenseSample:
    """The dense arch in eval mode, its blocks (on its device) and what it gives for them."""

    dense_arch: nn.Module
    blocks: Blocks
    outputs: tuple[torch.Tensor, ...]
    output_names: tuple[str, ...]
    output_keys: tuple[Any, ...] | None
    """Where the dense arch returns a dict: its keys, in the order of the outputs."""
    is_single: bool
    """The dense arch returns a bare Tensor, and so does the program."""

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The tensors of the blocks, sorted by name, as the program takes them; the dense arch gets them by :meth:`call`."""
        return dict(sorted(self.blocks.tensors.items()))

    def call(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Run the dense arch on these tensors, given in the mapping, order and constants that the sparse arch gave."""
        return self.dense_arch(self.blocks.fill(tensors))

    def flatten(self, output: Any) -> list[Any]:
        """Return what the dense arch returned as a list in the order of ``output_names``."""
        if isinstance(output, torch.Tensor):
            return [output]
        if self.output_keys is not None and isinstance(output, Mapping):
            return [output[key] for key in self.output_keys]
        return list(output)


def run_dense_arch(dense_arch: nn.Module, blocks: Blocks, *, export_outputs: Sequence[str] | None) -> DenseSample:
    """Run the dense arch eagerly and name its outputs. Rank 0.

    It runs twice: what the first run sets up (lazy modules, caches) is not taken for state that every run changes.

    Raises:
        ModelError: it fails on the sample; it changes its buffers or parameters with every run; it returns anything
            but a Tensor, a tuple or list of Tensors, or a dict of them; the names do not fit.
    """
    run_eagerly(dense_arch, blocks)
    before = {name: tensor.detach().clone() for name, tensor in _state_of(dense_arch)}
    output = run_eagerly(dense_arch, blocks)
    changed = [
        name for name, tensor in _state_of(dense_arch) if name in before and not has_same_values(before[name], tensor)
    ]
    if changed:
        raise ModelError(
            f"the dense arch changes {', '.join(changed)} whenever it runs, in eval mode too; what is served would then "
            "depend on what was served before. Let forward change state only `if self.training`"
        )
    keys, values = _items(output)
    if not values:
        raise ModelError(f"the dense arch returns an empty {type(output).__name__}; there is nothing to serve")
    for place, value in enumerate(values):
        if not isinstance(value, torch.Tensor):
            raise ModelError(
                f"output {keys[place] if keys else place} of the dense arch is a {type(value).__name__}; serving takes a "
                "Tensor, a tuple or list of Tensors, or a dict of them"
            )
    names, order = _name_outputs(len(values), keys, export_outputs)
    sample = DenseSample(dense_arch, blocks, (), names, order, isinstance(output, torch.Tensor))
    return replace(sample, outputs=tuple(tensor.detach().clone() for tensor in sample.flatten(output)))


@contextlib.contextmanager
def exporting(dense_arch: nn.Module) -> Iterator[None]:
    """Set what holds while the dense arch is traced, and while its eager outputs are computed for comparison.

    Modules with an attribute ``exported`` have it True; the fused transformer kernels, which serving cannot load, are
    off; functions under ``torch.compile`` run as they are written. Everything is put back.
    """
    marked = [module for module in dense_arch.modules() if _can_mark(module)]
    kept = [(module, module.exported) for module in marked]
    inherited = {module for module in marked if "exported" not in module.__dict__}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for module in marked:
        module.exported = True  # type: ignore[assignment]
    try:
        with uncompiled(), warnings.catch_warnings():
            # of the list of weights that nn.GRU and its like keep; state that a program changes is looked for by itself
            warnings.filterwarnings("ignore", message="The tensor attribute", category=UserWarning)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, value in kept:
            module.exported = value
            if module in inherited:  # a class attribute shows again; a property keeps its value elsewhere
                module.__dict__.pop("exported", None)


def note_fast_path(model: nn.Module) -> list[str]:
    """Return a note on encoders that give zeros at padded positions in torch's fast path, which :func:`exporting` turns off."""
    if not torch.backends.mha.get_fastpath_enabled():
        return []
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False)
    ]
    if not names:
        return []
    told = (
        f"{few(names)}: in eval mode without gradients torch's fast path gives zeros at the positions that src_key_padding_mask "
        "marks, and programs give what the encoder computes with gradients. With a mask, and where all positions are used (a "
        "mean, the last one), scores differ that a sample without padding does not show: build it with enable_nested_tensor=False"
    )
    return [told]


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Within this block, what ``torch.compile`` has compiled runs as it was written, and with all of its hooks."""
    if "torch._dynamo" not in sys.modules:  # then nothing was compiled; loading it takes a second
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


def _can_mark(module: nn.Module) -> bool:
    own = getattr(type(module), "exported", None)
    if isinstance(own, property) and own.fset is None:
        return False
    return hasattr(module, "exported") and not (callable(module.exported) or isinstance(module.exported, torch.Tensor))


def run_eagerly(dense_arch: nn.Module, blocks: Blocks) -> Any:
    """Run the dense arch on fresh tensors, as it is traced. ModelError where it fails."""
    with exporting(dense_arch), torch.no_grad(), refuse_collectives():
        try:
            return dense_arch(blocks.fill({name: tensor.clone() for name, tensor in blocks.tensors.items()}))
        except Exception as error:
            raise ModelError(f"the dense arch fails on the sample batch: {said(error)}{blame(error)}") from error


def _state_of(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _items(output: Any) -> tuple[list[Any] | None, list[Any]]:
    """Return the keys of a dict, None otherwise, and the values."""
    if isinstance(output, torch.Tensor):
        return None, [output]
    if isinstance(output, Mapping):
        return list(output), list(output.values())
    if isinstance(output, (tuple, list)):
        return None, list(output)
    raise ModelError(
        f"the dense arch returns a {type(output).__name__}; serving takes a Tensor, a tuple or list of Tensors, or a dict of them"
    )


def _name_outputs(
    count: int, keys: list[Any] | None, export_outputs: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[Any, ...] | None]:
    """Return the outputs' names, and a dict's keys in the order of the names."""
    names = list(export_outputs if export_outputs is not None else keys or [])
    if export_outputs is None and keys is None:
        names = [f"torch_output_{i}" for i in range(count)]
    if len(names) != count:
        raise ModelError(f"export_outputs has {len(names)} names {names}, but the dense arch returns {count} outputs")
    for place, name in enumerate(names):
        if not isinstance(name, str) or not name.strip() or name in names[:place]:
            raise ModelError(f"output {place} of the dense arch is named {name!r}; names must be unique and not empty")
    if keys is None:
        return tuple(names), None
    if set(names) == set(keys):  # the same names in another order ask for that order, not for outputs that swap names
        return tuple(names), tuple(names)
    moved = [name for place, name in enumerate(names) if name in keys and keys[place] != name]
    if moved:
        raise ModelError(
            f"export_outputs {names} gives the name {moved[0]!r} to another output than the one that the dense arch returns "
            f"under that key (its keys: {keys}); either list the same keys in any order, or give new names"
        )
    return tuple(names), tuple(keys)
