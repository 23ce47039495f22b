"""Write the FX folder of a dense export: a plain Python package with the program's graph as code, and its weights.

``GraphModule.to_folder`` cannot be used. It refuses the result of ``ExportedProgram.module()``, writes the absolute path of
the weights into the code, and pickles the children.
"""

from __future__ import annotations

import copy
import keyword
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.package.importer import sys_importer

from dist_export.errors import ConfigError, TraceError
from dist_export.storage.local_io import naming, naming_any

if TYPE_CHECKING:
    from torch.export import ExportedProgram

GRAPH = "graph.txt"
"""Written beside the folder."""

STATE_DICT_NAME = "state_dict.pt"
MODULE_NAME = "module.py"
INIT_NAME = "__init__.py"
INIT_TEXT = "from .module import *\n"

_ASSERTIONS = re.compile(r"(aten\.(_assert\w*|_functional_assert\w*|sym_constrain_range\w*)\.\w+|torch\._check\w*)")
_INDENT = " " * 4


def write_fx_folder(exported_program: ExportedProgram, folder: Path, module_name: str) -> None:
    """Write the program's graph as an importable package of ``__init__.py``, ``module.py`` and ``state_dict.pt``.

    The folder may be moved and imported from anywhere. Its class ``module_name`` takes no arguments, loads its weights
    with ``weights_only=True`` from beside its own file, and is called with the program's inputs, by position in the
    program's order or by name; a nested input is one argument per tensor. It returns a Tensor, or a tuple of Tensors in
    the program's order. It does not check its inputs: the program's guards and assertions are left out.

    Attributes are flat: the weight ``mlp.0.weight`` is ``mlp_0_weight`` in the class and in ``state_dict.pt``. Weights
    that the graph does not use are left out, and a tensor known by two names is written once.

    Args:
        exported_program: Traced on the CPU; returns a Tensor or a flat tuple of Tensors. It is not changed.
        folder: Made if it is missing. Files of these names in it are overwritten.
        module_name: Name of the class: a Python identifier.

    Raises:
        ConfigError: ``module_name`` cannot be the name of a class.
        TraceError: The graph contains something other than operators, tensors and subgraphs of those.
    """
    source, weights = render_fx_module(exported_program, module_name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / STATE_DICT_NAME
    with naming_any(str(path)), path.open("wb") as file:  # with a path, torch.save would write its name into the file
        torch.save(weights, file)
    for name, text in ((MODULE_NAME, source), (INIT_NAME, INIT_TEXT)):
        with naming(str(folder / name)):
            (folder / name).write_text(text, encoding="utf-8", newline="\n")


def render_fx_module(exported_program: ExportedProgram, module_name: str) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the text of ``module.py``, and the tensors of ``state_dict.pt`` by name, for the class ``module_name``.

    The same program and the same torch give the same text.

    Raises:
        ConfigError: ``module_name`` cannot be the name of a class.
        TraceError: The graph contains something other than operators, tensors and subgraphs of those.
    """
    module = _flatten(exported_program)
    reserved = {"Path", *module.graph.python_code("self").globals}
    if not module_name.isidentifier() or keyword.iskeyword(module_name) or module_name in reserved:
        raise ConfigError(f"{module_name!r} cannot be the name of the exported class; use another Python identifier")
    return _render_file(module, module_name), {name: _compact(value) for name, value in module.state_dict().items()}


def graph_text(exported_program: ExportedProgram) -> str:
    """Return the text of ``graph.txt``: the FX graph in the folder, then the Python code made from it."""
    module = _flatten(exported_program)
    code = module.graph.python_code("self").src.strip()
    return f"{module.graph}\n\n{code}\n"


def _flatten(exported_program: ExportedProgram) -> fx.GraphModule:
    """Return the program as a GraphModule with plain arguments and flat attributes, sharing the program's tensors."""
    unlifted = exported_program.module()
    assert isinstance(unlifted, fx.GraphModule)
    graph = unlifted.graph  # ``module()`` made this graph for its caller, so it may be changed
    graph.set_codegen(fx.graph.CodeGen())  # the exported one packs and unpacks pytrees around every call
    _name_arguments(exported_program, graph)
    out_spec = exported_program.call_spec.out_spec
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
        elif node.op == "output" and out_spec is not None and out_spec.is_leaf():
            (outputs,) = node.args
            node.args = (outputs[0],)
    return _flatten_attributes(unlifted, graph)


def _name_arguments(exported_program: ExportedProgram, graph: fx.Graph) -> None:
    """Give keyword inputs their own names: FX writes ``User`` as ``user`` and drops letters beyond ASCII."""
    in_spec = exported_program.call_spec.in_spec
    children = getattr(in_spec, "children", None)  # a method, a property or missing, depending on the version
    positional, keywords = children() if callable(children) else in_spec.children_specs
    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    names = list(keywords.context or ())
    if positional.num_leaves or keywords.num_leaves != len(names) or len(arguments) != len(names):
        return  # nested or positional inputs: one argument per tensor, named by FX
    for node, name in zip(arguments, names, strict=True):
        node.target = name


def _flatten_attributes(owner: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Move the attributes of ``owner`` that ``graph`` reads to the top level of a new module. Subgraphs stay children."""
    _drop_dead_nodes(graph)
    root = nn.Module()
    taken = {*dir(root), "forward", "_forward"}
    names: dict[int, str] = {}
    for node in graph.nodes:
        node.meta.pop("stack_trace", None)
        if node.op == "call_module":
            raise TraceError(
                f"the graph calls the module {node.target!r}; an FX folder holds operators and tensors only"
            )
        if node.op != "get_attr":
            continue
        value = _attribute(owner, str(node.target))
        if id(value) not in names:
            name = names[id(value)] = _free_name(re.sub(r"\W", "_", str(node.target)), taken)
            taken.add(name)
            _attach(root, name, value)
        node.target = names[id(value)]
    module = fx.GraphModule(root, graph)
    for (
        name,
        value,
    ) in root.named_children():  # GraphModule copies tensors that the graph reads, but not always children
        setattr(module, name, value)
    return module


def _attach(root: nn.Module, name: str, value: Any) -> None:
    if isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    elif isinstance(value, torch.Tensor):
        root.register_buffer(name, value)
    elif isinstance(value, fx.GraphModule):  # a region under torch.no_grad, torch.autocast or torch.cond
        root.add_module(name, _flatten_attributes(value, copy.deepcopy(value.graph)))
    else:
        raise TraceError(
            f"the graph reads {name!r}, a {type(value).__name__}; an FX folder holds tensors and subgraphs only"
        )


def _drop_dead_nodes(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and _ASSERTIONS.fullmatch(_operator_name(node.target)):
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _operator_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):  # noqa: SLF001 -- an operator's class has no public name
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}"


def _attribute(owner: nn.Module, target: str) -> Any:
    value: Any = owner
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _free_name(wanted: str, taken: set[str]) -> str:
    stem = wanted if wanted.isidentifier() and not keyword.iskeyword(wanted) else f"attr_{wanted}"
    name, count = stem, 0
    while name in taken:
        count += 1
        name = f"{stem}_{count}"
    return name


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor on the CPU in a storage of its own size: ``torch.save`` writes the whole storage of a view."""
    tensor = tensor.detach().cpu()
    if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor
    return tensor.clone()


def _render_file(module: fx.GraphModule, module_name: str) -> str:
    imports: set[str] = {"import torch"}
    classes = _render_classes(module, module_name, imports, last_lines=_LOAD_STATE_DICT)
    head = ["from pathlib import Path", *sorted(imports), "", f"__all__ = [{module_name!r}]"]
    return "\n".join(head) + "\n\n\n" + classes.rstrip() + "\n"


_LOAD_STATE_DICT = (
    f"path = Path(__file__).with_name({STATE_DICT_NAME!r})",
    "self.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))",
)


def _render_classes(
    module: fx.GraphModule, class_name: str, imports: set[str], *, last_lines: tuple[str, ...] = ()
) -> str:
    """Return the class of ``module`` after the classes of its subgraphs; add their imports to ``imports``."""
    before: list[str] = []
    init = ["super().__init__()"]
    for name, parameter in module.named_parameters(recurse=False):
        empty = f"{_render_empty(parameter)}, requires_grad={parameter.requires_grad}"
        init.append(f"self.{name} = torch.nn.Parameter({empty})")
    for name, buffer in module.named_buffers(recurse=False):
        init.append(f"self.register_buffer({name!r}, {_render_empty(buffer)})")
    for name, child in module.named_children():
        assert isinstance(child, fx.GraphModule)
        child_class = f"_{class_name.lstrip('_')}_{name}"
        before.append(_render_classes(child, child_class, imports))
        init.append(f"self.{name} = {child_class}()")
    methods = "\n".join(
        [
            "def __init__(self):",
            *(_INDENT + line for line in (*init, *last_lines)),
            "",
            _render_forward(module, imports),
        ]
    )
    return "".join(before) + f"class {class_name}(torch.nn.Module):\n{textwrap.indent(methods, _INDENT)}\n\n"


def _render_empty(tensor: torch.Tensor) -> str:
    if tensor.is_contiguous():
        return f"torch.empty({list(tensor.shape)}, dtype={tensor.dtype})"
    # Kernels may sum in a different order with a different layout, so the layout is kept too.
    return f"torch.empty_strided({list(tensor.shape)}, {list(tensor.stride())}, dtype={tensor.dtype})"


def _render_forward(module: fx.GraphModule, imports: set[str]) -> str:
    """Return the source of ``forward``.

    FX writes ``torch.ops...`` and ``device(...)``. An input with such a name would hide them, as in the program's own
    module. In that case the code goes to ``_forward``, with other argument names.
    """
    graph = copy.deepcopy(module.graph)
    known = graph.python_code("self").globals
    arguments = [node for node in graph.nodes if node.op == "placeholder"]
    public = [str(node.target) for node in arguments]
    has_hidden_global = not known.keys().isdisjoint(public)
    if has_hidden_global:
        for index, node in enumerate(arguments):
            node.target = f"input_{index}_"
    code = graph.python_code("self")
    imports.update(fx.graph_module._format_import_block(code.globals, sys_importer).splitlines())  # noqa: SLF001
    source = code.src.strip() + "\n"
    if not has_hidden_global:
        return source
    names = ", ".join(public)
    shim = f"def forward(self, {names}):\n{_INDENT}return self._forward({names})\n\n"
    return shim + source.replace("def forward(", "def _forward(", 1)
