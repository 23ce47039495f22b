"""The zip layout of ``torch.export.save`` up to torch 2.7, and the program's JSON reduced to the fields of that version.

torch 2.7 passes every field that it reads to a constructor, so one unknown field makes a file unreadable there. The
fields that it knows are listed below. This list defines the format here; it is not read from the installed torch.
"""

from __future__ import annotations

import io
import json
import zipfile
from typing import TYPE_CHECKING, Any

from dist_export.errors import TraceError

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

SCHEMA_MAJOR, SCHEMA_MINOR = 8, 7

STRUCTS: dict[str, dict[str, str]] = {
    "ExportedProgram": {
        "graph_module": "GraphModule",
        "opset_version": "",
        "range_constraints": "{RangeConstraint}",
        "schema_version": "SchemaVersion",
        "verifiers": "",
        "torch_version": "",
    },
    "GraphModule": {
        "graph": "Graph",
        "signature": "GraphSignature",
        "module_call_graph": "[ModuleCallEntry]",
        "metadata": "",
        "treespec_namedtuple_fields": "{NamedTupleDef}",
    },
    "Graph": {
        "inputs": "[Argument]",
        "outputs": "[Argument]",
        "nodes": "[Node]",
        "tensor_values": "{TensorMeta}",
        "sym_int_values": "{SymInt}",
        "sym_bool_values": "{SymBool}",
        "is_single_tensor_return": "",
        "custom_obj_values": "{CustomObjArgument}",
        "sym_float_values": "{SymFloat}",
    },
    "Node": {
        "target": "",
        "inputs": "[NamedArgument]",
        "outputs": "[Argument]",
        "metadata": "",
        "is_hop_single_tensor_return": "",
    },
    "NamedArgument": {"name": "", "arg": "Argument", "kind": ""},
    "TensorMeta": {
        "dtype": "ScalarType",
        "sizes": "[SymInt]",
        "requires_grad": "",
        "device": "Device",
        "strides": "[SymInt]",
        "storage_offset": "SymInt",
        "layout": "",
    },
    "Device": {"type": "", "index": ""},
    "SymExpr": {"expr_str": "", "hint": "SymExprHint"},
    "TensorArgument": {"name": ""},
    "TokenArgument": {"name": ""},
    "GraphArgument": {"name": "", "graph": "Graph"},
    "CustomObjArgument": {"name": "", "class_fqn": ""},
    "GraphSignature": {"input_specs": "[InputSpec]", "output_specs": "[OutputSpec]"},
    "UserInputSpec": {"arg": "Argument"},
    "InputToConstantInputSpec": {"name": "", "value": "ConstantValue"},
    "InputToParameterSpec": {"arg": "TensorArgument", "parameter_name": ""},
    "InputToBufferSpec": {"arg": "TensorArgument", "buffer_name": "", "persistent": ""},
    "InputToTensorConstantSpec": {"arg": "TensorArgument", "tensor_constant_name": ""},
    "InputToCustomObjSpec": {"arg": "CustomObjArgument", "custom_obj_name": ""},
    "InputTokenSpec": {"arg": "TokenArgument"},
    "UserOutputSpec": {"arg": "Argument"},
    "LossOutputSpec": {"arg": "TensorArgument"},
    "BufferMutationSpec": {"arg": "TensorArgument", "buffer_name": ""},
    "GradientToParameterSpec": {"arg": "TensorArgument", "parameter_name": ""},
    "GradientToUserInputSpec": {"arg": "TensorArgument", "user_input_name": ""},
    "UserInputMutationSpec": {"arg": "TensorArgument", "user_input_name": ""},
    "OutputTokenSpec": {"arg": "TokenArgument"},
    "RangeConstraint": {"min_val": "", "max_val": ""},
    "ModuleCallEntry": {"fqn": "", "signature": "ModuleCallSignature"},
    "ModuleCallSignature": {
        "inputs": "[Argument]",
        "outputs": "[Argument]",
        "in_spec": "",
        "out_spec": "",
        "forward_arg_names": "",
    },
    "NamedTupleDef": {"field_names": ""},
    "SchemaVersion": {"major": "", "minor": ""},
}
"""Class -> field -> type. ``""`` is plain JSON, ``[X]`` a list of X, ``{X}`` an object whose values are X."""

UNIONS: dict[str, dict[str, str]] = {
    "Argument": {
        "as_none": "",
        "as_tensor": "TensorArgument",
        "as_tensors": "[TensorArgument]",
        "as_int": "",
        "as_ints": "",
        "as_float": "",
        "as_floats": "",
        "as_string": "",
        "as_strings": "",
        "as_sym_int": "SymIntArgument",
        "as_sym_ints": "[SymIntArgument]",
        "as_scalar_type": "ScalarType",
        "as_memory_format": "",
        "as_layout": "",
        "as_device": "Device",
        "as_bool": "",
        "as_bools": "",
        "as_sym_bool": "SymBoolArgument",
        "as_sym_bools": "[SymBoolArgument]",
        "as_graph": "GraphArgument",
        "as_optional_tensors": "[OptionalTensorArgument]",
        "as_custom_obj": "CustomObjArgument",
        "as_operator": "",
        "as_sym_float": "SymFloatArgument",
        "as_sym_floats": "[SymFloatArgument]",
    },
    "OptionalTensorArgument": {"as_tensor": "TensorArgument", "as_none": ""},
    "SymInt": {"as_expr": "SymExpr", "as_int": ""},
    "SymFloat": {"as_expr": "SymExpr", "as_float": ""},
    "SymBool": {"as_expr": "SymExpr", "as_bool": ""},
    "SymExprHint": {"as_int": "", "as_bool": "", "as_float": ""},
    "SymIntArgument": {"as_name": "", "as_int": ""},
    "SymFloatArgument": {"as_name": "", "as_float": ""},
    "SymBoolArgument": {"as_name": "", "as_bool": ""},
    "ConstantValue": {"as_none": "", "as_int": "", "as_float": "", "as_string": "", "as_bool": ""},
    "InputSpec": {
        "user_input": "UserInputSpec",
        "parameter": "InputToParameterSpec",
        "buffer": "InputToBufferSpec",
        "tensor_constant": "InputToTensorConstantSpec",
        "custom_obj": "InputToCustomObjSpec",
        "token": "InputTokenSpec",
        "constant_input": "InputToConstantInputSpec",
    },
    "OutputSpec": {
        "user_output": "UserOutputSpec",
        "loss_output": "LossOutputSpec",
        "buffer_mutation": "BufferMutationSpec",
        "gradient_to_parameter": "GradientToParameterSpec",
        "gradient_to_user_input": "GradientToUserInputSpec",
        "user_input_mutation": "UserInputMutationSpec",
        "token": "OutputTokenSpec",
    },
}
"""The same for tagged unions: an object with exactly one of these keys."""

SCALAR_TYPES = frozenset({*range(14), 28, 29, 30})

_EXPENDABLE = frozenset({("ExportedProgram", "guards_code"), ("Node", "name")})
"""Later fields that may have a value and are removed nevertheless: checks of the inputs' shapes, and debugging names."""


def has_dtype(dtype: torch.dtype) -> bool:
    """Return whether schema 8.7 has this dtype."""
    from torch._export.serde.serialize import _TORCH_TO_SERIALIZE_DTYPE

    number = _TORCH_TO_SERIALIZE_DTYPE.get(dtype)
    return number is not None and int(number) in SCALAR_TYPES


def pack_legacy(exported_program: ExportedProgram) -> bytes:
    """Return the program as the zip that torch 2.7 reads, with schema 8.7 at most. Members are uncompressed, without dates.

    Raises:
        TraceError: The program needs an argument type or a dtype that schema 8.7 does not have.
    """
    from torch._export.serde.serialize import serialize

    artifact = serialize(exported_program)
    document = prune(json.loads(artifact.exported_program))
    version = document["schema_version"]
    members = {
        "serialized_exported_program.json": json.dumps(document).encode(),
        "serialized_state_dict.pt": artifact.state_dict,
        "serialized_constants.pt": artifact.constants,
        "serialized_example_inputs.pt": artifact.example_inputs,
        "version": f"{version['major']}.{version['minor']}".encode(),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            # A bare ZipInfo is dated 1980-01-01; fixed owner bits keep the bytes equal from machine to machine.
            member = zipfile.ZipInfo(name)
            member.create_system = 3
            member.external_attr = 0o644 << 16
            archive.writestr(member, content)
    return buffer.getvalue()


def prune(document: dict[str, Any]) -> dict[str, Any]:
    """Return a serialized ExportedProgram with only the fields of schema 8.7, and with that version.

    Raises:
        TraceError: Something cannot be left out without changing the result of the program.
    """
    pruned: dict[str, Any] = _prune("ExportedProgram", document, "$")
    version = pruned["schema_version"]
    if version["major"] != SCHEMA_MAJOR:
        raise TraceError(
            f"this torch writes export schema {version['major']}.{version['minor']}, and the legacy archive is of "
            f"schema {SCHEMA_MAJOR}: use archive_format 'pt2'"
        )
    version["minor"] = min(version["minor"], SCHEMA_MINOR)
    return pruned


def _prune(kind: str, value: Any, where: str) -> Any:
    if kind == "" or value is None:
        return value
    if kind.startswith("["):
        return [_prune(kind[1:-1], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if kind.startswith("{"):
        return {key: _prune(kind[1:-1], item, f"{where}.{key}") for key, item in value.items()}
    if kind == "ScalarType":
        if value not in SCALAR_TYPES:
            raise _unknown(where, f"dtype number {value}")
        return value
    if kind in UNIONS:
        (tag, content), *_ = value.items()
        if tag not in UNIONS[kind]:
            raise _unknown(where, f"{kind}.{tag}")
        return {tag: _prune(UNIONS[kind][tag], content, f"{where}.{tag}")}
    fields = STRUCTS[kind]
    for name, content in value.items():
        # An empty later field means the same as a missing one; a full one may be something that torch 2.7 must know.
        if name not in fields and content not in (None, False, [], {}, "") and (kind, name) not in _EXPENDABLE:
            raise _unknown(where, f"{kind}.{name}")
    return {name: _prune(kind_, value[name], f"{where}.{name}") for name, kind_ in fields.items() if name in value}


def _unknown(where: str, what: str) -> TraceError:
    return TraceError(
        f"the program cannot be written for torch 2.7: {where} needs {what}, which its schema "
        f"{SCHEMA_MAJOR}.{SCHEMA_MINOR} does not have; use archive_format 'pt2'"
    )
