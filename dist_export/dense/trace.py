"""Trace the dense arch with ``torch.export``: inputs by keyword, a free batch dimension, one Tensor or a flat tuple out."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from dist_export.dense.eager import DenseSample, exporting
from dist_export.dense.used_inputs import find_used_inputs
from dist_export.errors import ConfigError, TraceError
from dist_export.model.user_errors import blame, said, watch_sizes


@dataclass(frozen=True, slots=True)
class TracedDense:
    """The program, and the inputs that reach its outputs."""

    program: ExportedProgram
    inputs: dict[str, torch.Tensor]
    dropped: tuple[str, ...]


def check_dynamic_dims(inputs: Mapping[str, torch.Tensor], dynamic_dims: Mapping[str, Mapping[int, str]]) -> None:
    """Refuse further free dimensions that the sample does not have. ConfigError names the setting."""
    labels: dict[str, tuple[int, str]] = {}
    for name, by_dim in dynamic_dims.items():
        if name not in inputs:
            raise ConfigError(f"dynamic_dims: {name!r} is no input of the dense arch; its inputs: {', '.join(inputs)}")
        for dim, label in by_dim.items():
            if dim >= inputs[name].dim():
                raise ConfigError(f"dynamic_dims.{name}: no dimension {dim} in a tensor of {list(inputs[name].shape)}")
            size = inputs[name].shape[dim]
            if size < 2:
                raise ConfigError(
                    f"dynamic_dims.{name}.{dim}: the sample has size {size} there, which torch.export takes for a "
                    "constant; use a sample with at least 2"
                )
            known_size, known_name = labels.setdefault(label, (size, name))
            if known_size != size:
                raise ConfigError(
                    f"dynamic_dims: {label!r} is {known_size} in {known_name} but {size} in {name}; one name is one size"
                )


def trace_dense(
    sample: DenseSample, *, max_batch_size: int, dynamic_dims: Mapping[str, Mapping[int, str]]
) -> TracedDense:
    """Trace the dense arch with a batch dimension that is free from 1 to ``max_batch_size``. Rank 0; writes nothing.

    Inputs without a data path to an output are left out of the program; where the arch still asks for them, it gets
    zeros of their shape.

    Args:
        sample: of 2 to ``max_batch_size`` rows; torch.export takes 1 for a constant.
        dynamic_dims: as ``check_dynamic_dims`` lets them pass.

    Raises:
        TraceError: torch.export refused, its own error is kept as the cause; or no input reaches an output.
    """
    dims = _dynamic_shapes(sample.inputs, max_batch_size=max_batch_size, dynamic_dims=dynamic_dims)
    with exporting(sample.dense_arch):
        program = _export(sample, list(sample.inputs), dims, dynamic_dims)
        has_branches = hides_tensors(program.graph_module)
        if has_branches:
            program = _export(sample, list(sample.inputs), dims, dynamic_dims, has_branches=True)
        used = find_used_inputs(program, dynamic_dims)
        if not used:
            raise TraceError(
                "no input of the dense arch has a data path to an output: its outputs are constants, or follow from the "
                "shapes of the inputs alone. Check what forward does with its inputs"
            )
        if len(used) < len(sample.inputs):
            program = _export(sample, used, dims, dynamic_dims, has_branches=has_branches)
    dropped = tuple(name for name in sample.inputs if name not in used)
    return TracedDense(program, {name: sample.inputs[name] for name in used}, dropped)


def hides_tensors(graph_module: torch.fx.GraphModule) -> bool:
    """Whether a branch or loop body (``torch.cond``, ``while_loop``, ``map``) holds tensors that its operator does not take.

    That is how they are traced where ``torch.compile`` is off, and such a program cannot be written.
    """
    inner = [module for module in graph_module.modules() if module is not graph_module]
    for module in inner:
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if node.op == "get_attr" and isinstance(_attribute(module, str(node.target)), torch.Tensor):
                return True
    return False


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for element in path.split("."):
        value = getattr(value, element, None)
    return value


def output_shapes(traced: TracedDense, dynamic_dims: Mapping[str, Mapping[int, str]]) -> list[tuple[int | str, ...]]:
    """Return the outputs' shapes; a size that follows from free dimensions is given as an expression of their names."""
    values = {node.name: node.meta.get("val") for node in traced.program.graph.nodes}
    names: dict[str, str] = {}
    for name, node in zip(traced.inputs, traced.program.graph_signature.user_inputs, strict=True):
        value = values.get(str(node))
        for dim, label in ({0: "batch"} | dict(dynamic_dims.get(name, {}))).items():
            if isinstance(value, torch.Tensor):
                names[str(value.shape[dim])] = label
    shapes: list[tuple[int | str, ...]] = []
    for node in traced.program.graph_signature.user_outputs:
        value = values.get(str(node))
        sizes = [str(size) for size in value.shape] if isinstance(value, torch.Tensor) else []
        shapes.append(tuple(int(size) if size.isdigit() else _in_words(size, names) for size in sizes))
    return shapes


def _in_words(size: str, names: Mapping[str, str]) -> str:
    return re.sub(r"[a-z]+\d+", lambda match: names.get(match[0], match[0]), size)


class _Keyworded(nn.Module):
    """Calls the dense arch with its blocks. Subclasses have a ``forward`` with the inputs as explicit keywords."""

    def __init__(self, sample: DenseSample, names: list[str], dynamic_dims: Mapping[str, Mapping[int, str]]) -> None:
        super().__init__()
        self.dense_arch = sample.dense_arch
        self._sample = sample
        self._dropped = [name for name in sample.inputs if name not in names]
        self._labels = dynamic_dims

    def call(self, inputs: dict[str, torch.Tensor]) -> Any:
        stand_ins = {name: self._zeros(name, inputs) for name in self._dropped}
        output = self._sample.call(inputs | stand_ins)
        return output if self._sample.is_single else tuple(self._sample.flatten(output))

    def _zeros(self, name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return what stands in for a dropped input; its free dimensions are those of the others."""
        first = next(iter(inputs.values()))
        template = self._sample.inputs[name]
        sizes: list[Any] = [first.shape[0], *template.shape[1:]]
        for dim, label in self._labels.get(name, {}).items():
            for other, tensor in inputs.items():
                for other_dim, other_label in self._labels.get(other, {}).items():
                    if other_label == label:
                        sizes[dim] = tensor.shape[other_dim]
        return first.new_zeros(sizes, dtype=template.dtype)


def _wrap(sample: DenseSample, names: list[str], dynamic_dims: Mapping[str, Mapping[int, str]]) -> nn.Module:
    """Build the wrapper; torch.export wants an explicit signature, for ``**kwargs`` have no dynamic shapes."""
    pairs = ", ".join(f"{name!r}: {name}" for name in names)
    source = f"def forward(self, *, {', '.join(names)}):\n    return self.call({{{pairs}}})\n"
    namespace: dict[str, Any] = {}
    exec(source, namespace)  # noqa: S102 -- the names were checked to be identifiers
    kind = type("Keyworded", (_Keyworded,), {"forward": namespace["forward"]})
    wrapper: nn.Module = kind(sample, names, dynamic_dims)
    return wrapper.eval()


def _export(
    sample: DenseSample,
    names: list[str],
    dims: dict[str, dict[int, Any]],
    dynamic_dims: Mapping[str, Mapping[int, str]],
    *,
    has_branches: bool = False,
) -> ExportedProgram:
    """Trace. ``has_branches``: lift the weights within branches and loop bodies, for which torch needs its compiler."""
    wrapper = _wrap(sample, names, dynamic_dims)
    shapes = {name: dims[name] for name in names}

    def export() -> ExportedProgram:
        kwargs = {name: sample.inputs[name].clone() for name in names}
        stance: Any = torch.compiler.set_stance("default") if has_branches else contextlib.nullcontext()
        with torch.no_grad(), stance:
            return torch.export.export(wrapper, args=(), kwargs=kwargs, dynamic_shapes=shapes, strict=False)

    try:
        return export()
    except Exception as error:
        place = blame(error)
        if not place:  # a size that became a constant: torch names no line, so look where that happens
            with watch_sizes() as lines, contextlib.suppress(Exception):
                export()
            place = lines[0] if lines else ""
        raise TraceError(
            f"torch.export refused the dense arch: {said(error)}{_detail(error)}{place}. {_advice(error)}; modules may "
            "look at an attribute `exported`, which is True during the trace"
        ) from error


def _advice(error: BaseException) -> str:
    if "UnsupportedOperator" in type(error).__name__ or "UnsupportedOperator" in str(error):
        return (
            "torch.export does not know which shape and dtype this operator gives: register that with "
            "torch.library.register_fake, or use other operators"
        )
    return (
        "What usually helps: no branch on a tensor's value or on the batch size (torch.where, torch.cond), no .item() or "
        ".tolist(), no size of the sample written into a view"
    )


def _detail(error: BaseException) -> str:
    """Return what follows 'Constraints violated (batch)!', which says nothing by itself."""
    details = [line.strip(" -") for line in str(error).splitlines() if line.startswith("  - ")]
    return f" {details[0].split('. If ')[0].rstrip('.')[:300]}" if details else ""


def _dynamic_shapes(
    inputs: Mapping[str, torch.Tensor], *, max_batch_size: int, dynamic_dims: Mapping[str, Mapping[int, str]]
) -> dict[str, dict[int, Any]]:
    batch = Dim("batch", min=1, max=max_batch_size)
    labels = {label: Dim(label) for by_dim in dynamic_dims.values() for label in by_dim.values()}
    return {
        name: {0: batch} | {dim: labels[label] for dim, label in dynamic_dims.get(name, {}).items()} for name in inputs
    }
