"""What a traced program must not have: foreign operators, state that changes, values that are not the checkpoint's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from dist_export.archive.lookup_operator import LOOKUP_TARGET
from dist_export.checkpoint.model_weights import is_below
from dist_export.dense.origins import address_of, hidden_parameters, hidden_values, tensors_in
from dist_export.dense.reference import MODEL
from dist_export.dense.used_inputs import find_changed_state, find_used_state
from dist_export.humanize import few
from dist_export.model.user_errors import blame_text
from dist_export.score.table_weight import NotExportableError

_OWN_NAMESPACES = frozenset({"aten", "higher_order", "_operator", "math"})
_COLLECTIVES = ("_c10d_functional", "c10d", "_dtensor")


def refuse_operators(program: ExportedProgram) -> None:
    """Refuse operators that are neither torch's own nor the lookup."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if node.op != "call_function" or str(node.target) == LOOKUP_TARGET:
                continue
            namespace = _namespace(node)
            if namespace in _OWN_NAMESPACES:
                continue
            where, path = blame_text(str(node.meta.get("stack_trace", ""))), _module_path(node)
            if namespace in _COLLECTIVES:
                text = f"a collective remains in it ({node.target}){where}{_module_of(node)}"
                raise NotExportableError(text, module=path)
            raise NotExportableError(
                f"it uses the operator {node.target}, which is not torch's own{where}", module=path
            )


def refuse_changed_state(program: ExportedProgram) -> None:
    """Refuse programs whose outputs are others from call to call."""
    if changed := find_changed_state(program):
        names = ", ".join(map(_in_model, changed))
        raise NotExportableError(
            f"forward changes {names}, and its outputs depend on that: they would be others from call to call. If "
            "it fills them once, do so in __init__, or call the model once before it is exported"
        )


def _namespace(node: fx.Node) -> str:
    target: Any = node.target
    return (
        str(getattr(target, "namespace", "") or getattr(target, "__module__", "") or "")
        .split(".")[0]
        .replace("torch", "aten" if "sym_" in getattr(target, "__name__", "") else "torch")
    )


def _module_of(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return ""
    path, kind = stack[-1]
    return f", in {_in_model(path) or 'the model'} ({str(kind).rpartition('.')[2]})"


def _in_model(path: str) -> str:
    """Return the path within the model of something that is traced."""
    return path.removeprefix(MODEL).removeprefix(".") if is_below(path, MODEL) else path


def _module_path(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def refuse_untrained(
    program: ExportedProgram, model: nn.Module, arches: Sequence[nn.Module], *, own_dense_arch: nn.Module
) -> None:
    """Refuse what the model's own forward computes scores with: the checkpoint's values are in its arches alone.

    Args:
        program: what was traced.
        model: the caller's, with the copied dense arch in it.
        arches: the sparse arch, and the copied dense arch.
        own_dense_arch: the caller's, which the forward may still reach by another way, such as a closure.
    """
    trained = {address for arch in arches for address in _name_by_address(arch)}
    names = _name_by_address(own_dense_arch) | _name_by_address(model)
    used = find_used_state(program)  # a literal of the code is none of the model's tensors
    found = {name: address_of(tensor) for name, tensor in used.items()}
    lifted = "lifted_tensor"  # what torch calls a tensor that it knows no name of
    if own := sorted(
        names[address] if name.rpartition(".")[2].startswith(lifted) else _in_model(name)
        for name, address in found.items()
        if address and address in names and address not in trained
    ):
        raise NotExportableError(
            f"the model's forward computes with {few(own)}, outside of the sparse and the dense arch: it does not have the "
            "checkpoint's values"
        )


def _name_by_address(root: nn.Module) -> dict[int, str]:
    """Return where the tensors of all modules lie, with a name of each: registered ones, and those in attributes and closures."""
    found = {
        address_of(tensor): path or "the model"
        for path, module in root.named_modules()
        for tensor in tensors_in(vars(module))
    }
    hidden = [*hidden_parameters(root, "", with_classes=True), *hidden_values(root, "", ())]
    found |= {address_of(tensor): path.removeprefix(".") for path, tensor in hidden}
    named = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
    return found | {address_of(tensor): name for name, tensor in named}
