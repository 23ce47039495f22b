"""Trace the dense arch with ``torch.export``: inputs by keyword, a free batch dimension, one Tensor or a flat tuple out."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from dist_export.errors import ConfigError, ModelError, TraceError

_SHAPE_OF_FIRST = frozenset({"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"})
_SHAPE_OF_FIRST_NEW = frozenset({"new_zeros", "new_ones", "new_full", "new_empty"})
_SHAPE_OF_SECOND = frozenset({"expand_as", "view_as", "reshape_as"})


@dataclass(frozen=True, slots=True)
class DenseSample:
    """The dense arch in eval mode, its inputs (sorted, on its device) and what it gives for them."""

    dense_arch: nn.Module
    inputs: dict[str, torch.Tensor]
    outputs: tuple[torch.Tensor, ...]
    output_names: tuple[str, ...]
    is_single: bool
    """The dense arch returns a bare Tensor, and so does the program."""


@dataclass(frozen=True, slots=True)
class TracedDense:
    """The program, and the inputs that reach its outputs."""

    program: ExportedProgram
    inputs: dict[str, torch.Tensor]
    dropped: tuple[str, ...]


def run_dense_arch(
    dense_arch: nn.Module, inputs: dict[str, torch.Tensor], *, export_outputs: Sequence[str] | None
) -> DenseSample:
    """Run the dense arch once, eagerly, and name its outputs. Rank 0.

    Raises:
        ModelError: it fails on the sample, or returns anything but a Tensor, a tuple or list of Tensors, or a dict of
            them; ``export_outputs`` has another count.
    """
    with exporting(dense_arch), torch.no_grad():
        try:
            output = dense_arch({name: tensor.clone() for name, tensor in inputs.items()})
        except Exception as error:
            raise ModelError(f"the dense arch fails on the sample batch: {_said(error)}{_blame(error)}") from error
    keys, values = _flatten(output)
    if not values:
        raise ModelError(f"the dense arch returns an empty {type(output).__name__}; there is nothing to serve")
    for place, value in enumerate(values):
        if not isinstance(value, torch.Tensor):
            raise ModelError(
                f"output {keys[place] if keys else place} of the dense arch is a {type(value).__name__}; serving takes a "
                "Tensor, a tuple or list of Tensors, or a dict of them"
            )
    names = list(export_outputs) if export_outputs is not None else keys
    if names is None:
        names = [f"torch_output_{i}" for i in range(len(values))]
    if len(names) != len(values):
        raise ModelError(
            f"export_outputs has {len(names)} names {names}, but the dense arch returns {len(values)} outputs"
        )
    for place, name in enumerate(names):
        if not isinstance(name, str) or not name.strip() or name in names[:place]:
            raise ModelError(f"output {place} of the dense arch is named {name!r}; names must be unique and not empty")
    return DenseSample(dense_arch, inputs, tuple(values), tuple(names), isinstance(output, torch.Tensor))


def trace_dense(
    sample: DenseSample, *, max_batch_size: int, dynamic_dims: Mapping[str, Mapping[int, str]]
) -> TracedDense:
    """Trace the dense arch with a batch dimension that is free from 1 to ``max_batch_size``. Rank 0; writes nothing.

    Inputs without a data path to an output are left out of the program; where the arch still asks for them, it gets
    zeros of their shape.

    Raises:
        ConfigError: ``dynamic_dims`` names an input or dimension that is not there.
        TraceError: torch.export refused; its own error is kept as the cause.
    """
    dims = _dynamic_shapes(sample.inputs, max_batch_size=max_batch_size, dynamic_dims=dynamic_dims)
    with exporting(sample.dense_arch):
        program = _export(sample, list(sample.inputs), dims)
        used = _inputs_with_data_path(program)
        if not used:
            raise ModelError("no input of the dense arch has a data path to an output: every output is a constant")
        if len(used) < len(sample.inputs):
            program = _export(sample, used, dims)
    dropped = tuple(name for name in sample.inputs if name not in used)
    return TracedDense(program, {name: sample.inputs[name] for name in used}, dropped)


@contextlib.contextmanager
def exporting(dense_arch: nn.Module) -> Iterator[None]:
    """Set what holds while the dense arch is traced, and while its eager outputs are computed for comparison.

    Modules with an attribute ``exported`` have it True; the fused transformer kernels, which serving cannot load, are
    off. Everything is put back.
    """
    marked = [(m, m.exported) for m in dense_arch.modules() if hasattr(m, "exported") and not callable(m.exported)]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for module, _ in marked:
        module.exported = True  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, value in marked:
            module.exported = value


class _Keyworded(nn.Module):
    """Calls the dense arch with a dict. Subclasses have a ``forward`` with the inputs as explicit keywords."""

    def __init__(self, sample: DenseSample, names: list[str]) -> None:
        super().__init__()
        self.dense_arch = sample.dense_arch
        self._constant = {
            name: (tensor.shape[1:], tensor.dtype) for name, tensor in sample.inputs.items() if name not in names
        }
        self._order = list(sample.inputs)
        self._is_single = sample.is_single

    def call(self, inputs: dict[str, torch.Tensor]) -> Any:
        first = next(iter(inputs.values()))
        for name, (shape, dtype) in self._constant.items():
            inputs[name] = first.new_zeros((first.shape[0], *shape), dtype=dtype)
        output = self.dense_arch({name: inputs[name] for name in self._order})
        return output if self._is_single else tuple(_flatten(output)[1])


def _wrap(sample: DenseSample, names: list[str]) -> nn.Module:
    """Build the wrapper; torch.export wants an explicit signature, for ``**kwargs`` have no dynamic shapes."""
    pairs = ", ".join(f"{name!r}: {name}" for name in names)
    source = f"def forward(self, *, {', '.join(names)}):\n    return self.call({{{pairs}}})\n"
    namespace: dict[str, Any] = {}
    exec(source, namespace)  # noqa: S102 -- the names were checked to be identifiers
    kind = type("Keyworded", (_Keyworded,), {"forward": namespace["forward"]})
    wrapper: nn.Module = kind(sample, names)
    return wrapper.eval()


def _export(sample: DenseSample, names: list[str], dims: dict[str, dict[int, Any]]) -> ExportedProgram:
    wrapper = _wrap(sample, names)
    kwargs = {name: sample.inputs[name].clone() for name in names}
    try:
        with torch.no_grad():
            return torch.export.export(
                wrapper, args=(), kwargs=kwargs, dynamic_shapes={name: dims[name] for name in names}, strict=False
            )
    except Exception as error:
        raise TraceError(
            f"torch.export refused the dense arch: {_said(error)}{_blame(error)}. What usually helps: no branch on a "
            "tensor's value or on the batch size (torch.where, torch.cond), no .item() or .tolist(), no size of the sample "
            "written into a view; modules may look at an attribute `exported`, which is True during the trace"
        ) from error


def _dynamic_shapes(
    inputs: Mapping[str, torch.Tensor], *, max_batch_size: int, dynamic_dims: Mapping[str, Mapping[int, str]]
) -> dict[str, dict[int, Any]]:
    batch = Dim("batch", min=1, max=max_batch_size)
    shapes: dict[str, dict[int, Any]] = {name: {0: batch} for name in inputs}
    labels: dict[str, tuple[Any, int, str]] = {}
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
            known = labels.setdefault(label, (Dim(label), size, name))
            if known[1] != size:
                raise ConfigError(
                    f"dynamic_dims: {label!r} is {known[1]} in {known[2]} but {size} in {name}; one name is one size"
                )
            shapes[name][dim] = known[0]
    return shapes


def _flatten(output: Any) -> tuple[list[str] | None, list[Any]]:
    if isinstance(output, torch.Tensor):
        return None, [output]
    if isinstance(output, Mapping):
        return list(output), list(output.values())
    if isinstance(output, (tuple, list)):
        return None, list(output)
    raise ModelError(
        f"the dense arch returns a {type(output).__name__}; serving takes a Tensor, a tuple or list of Tensors, or a dict of them"
    )


def _inputs_with_data_path(program: ExportedProgram) -> list[str]:
    """Return the inputs whose values, not only their shapes, can reach an output."""
    outputs = set(program.graph_signature.user_outputs)
    reached: set[fx.Node] = set()
    stack = [node for node in program.graph.nodes if node.name in outputs]
    while stack:
        node = stack.pop()
        if node in reached:
            continue
        reached.add(node)
        stack.extend(source for source in node.all_input_nodes if _carries_data(source, node))
    reached_names = {node.name for node in reached}
    return [
        name
        for name, placeholder in zip(_input_names(program), program.graph_signature.user_inputs, strict=True)
        if placeholder in reached_names
    ]


def _carries_data(source: fx.Node, user: fx.Node) -> bool:
    if isinstance(user.meta.get("val"), (torch.SymInt, int)):
        return not isinstance(source.meta.get("val"), torch.Tensor)  # a size of the tensor
    name = getattr(user.target, "__name__", str(user.target)).split(".")[0]
    if name in _SHAPE_OF_FIRST | _SHAPE_OF_FIRST_NEW:
        return source not in user.args[:1]
    if name in _SHAPE_OF_SECOND:
        return source in user.args[:1]
    return True


def _input_names(program: ExportedProgram) -> list[str]:
    _, keywords = (
        program.call_spec.in_spec.children()
        if hasattr(program.call_spec.in_spec, "children") and callable(program.call_spec.in_spec.children)
        else program.call_spec.in_spec.children_specs
    )
    return list(keywords.context)


def _said(error: BaseException) -> str:
    """Return the first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:400]}" if lines else type(error).__name__


def _blame(error: BaseException) -> str:
    """Return the innermost line of the user's own code, from the traceback or from torch's message."""
    own = [
        (frame.filename, frame.lineno, frame.line)
        for frame in traceback.extract_tb(error.__traceback__)
        if _is_users(frame.filename)
    ]
    if not own:
        own = [
            (file, int(line), None)
            for file, line in re.findall(r'File "([^"]+)", line (\d+)', str(error))
            if _is_users(file)
        ]
    if not own:
        return ""
    file, line, text = own[-1]
    return f" at {file}:{line}" + (f" ({text.strip()})" if text else "")


def _is_users(filename: str) -> bool:
    path = filename.replace("\\", "/")
    return not (filename.startswith("<") or "/torch/" in path or "/dist_export/" in path or "/sympy/" in path)
