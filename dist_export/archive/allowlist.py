"""Allow the pickle opcodes, operators and expressions that exported programs use, and refuse all others.

The lists contain what is allowed, not what is forbidden. A new torch may need a new entry; until it has one, its files are
refused.
"""

from __future__ import annotations

import ast
import json
import pickletools
import re
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class UnsafeContentError(Exception):
    """A member contains something that exported programs do not contain. The text is the middle of a sentence."""


_OPCODES = re.compile(
    r"PROTO|FRAME|STOP|MARK|EMPTY_DICT|EMPTY_LIST|EMPTY_TUPLE|TUPLE|TUPLE1|TUPLE2|TUPLE3|NONE|NEWTRUE|"
    r"NEWFALSE|BININT|BININT1|BININT2|LONG1|BINFLOAT|BINUNICODE|SHORT_BINUNICODE|BINPERSID|APPEND|APPENDS|"
    r"SETITEM|SETITEMS|BINPUT|LONG_BINPUT|MEMOIZE|BINGET|LONG_BINGET|GLOBAL|STACK_GLOBAL|REDUCE"
)
"""The opcodes of a ``torch.save`` of tensors in containers. No BUILD, NEWOBJ, INST, OBJ or EXT, which can do more."""

_DTYPES = r"bool|u?int\d+|b?float16|float(32|64|8_\w+|4_\w+)|complex(32|64|128)"
_GLOBALS = re.compile(
    r"collections\.OrderedDict"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch\.(Size|device|strided)"
    r"|torch\.(Float|Double|Half|BFloat16|Byte|Char|Short|Int|Long|Bool|ComplexFloat|ComplexDouble)Storage"
    r"|torch\.storage\.(UntypedStorage|TypedStorage)"
    rf"|torch\.({_DTYPES})"
)

_SYMBOL = r"[a-z]+\d+"
_FUNCTIONS = (
    r"Add|Mul|Pow|Mod|Max|Min|Integer|Rational|Float|Abs|Eq|Ne|Equality|Unequality|LessThan|GreaterThan|"
    r"StrictLessThan|StrictGreaterThan|And|Or|Not|true|false|Piecewise|ExprCondPair|FloorDiv|"
    r"ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural|"
    r"FloatPow|FloatTrueDiv|IntTrueDiv|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|ToFloat|Identity|"
    r"IsNonOverlappingAndDenseIndicator|floor|ceiling|sqrt|oo|int_oo|OpaqueUnaryFn_(sqrt|exp|log|log2)"
)
_EXPRESSION = re.compile(
    rf"(Symbol\('{_SYMBOL}'(, \w+=(True|False))*\)"  # srepr, as torch >= 2.6 writes it
    rf"|\b({_FUNCTIONS})\b|\b{_SYMBOL}\b|\bprecision=\d+|'\d+(\.\d*)?(e[+-]?\d+)?'"
    r"|\b\d+(\.\d*)?(e[+-]?\d+)?(?![\w.])|[-+*/%(),<>=&|~!]|\s)*"
)

_OPERATOR = re.compile(
    r"torch\.ops\.(?!prim\.|profiler\.|aten\.(from_file|save|load|open|print)\b)[a-z]\w*\._?[A-Za-z]\w*(\.[A-Za-z]\w*)?"
    r"|torch\.ops\.aten\.__i?(and|or|xor|lshift|rshift)__\.[A-Za-z]\w*"
    r"|torch\.(_?sym_(int|float|bool|not|max|min|sum|ite|sqrt|fresh_size)|_check|_check_is_size|Size)"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|xor|not_|invert"
    r"|lshift|rshift|getitem|index)"
    r"|math\.(ceil|floor|trunc|sqrt|log|log2|exp|pow|isnan|isinf)"
)
LOOKUP = "torch.ops.dist_export.lookup.default"
"""The only operator of a score program that is not torch's own."""
_OWN_OPERATOR = re.compile(r"torch\.ops\.(aten|higher_order)\..*|torch\.(?!ops\.).*|_operator\..*|math\..*", re.DOTALL)
"""Of the operators above, those of torch itself: a score program has no other besides the lookup."""
_GUARD_NODES = (
    ast.Expression, ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator, ast.Compare, ast.cmpop,
    ast.Subscript, ast.Constant, ast.Call, ast.Name, ast.Attribute, ast.Load, ast.IfExp,
)  # fmt: skip
_GUARD_NAMES = re.compile(r"L|math|torch|cast_symbool_to_symint_guardless|IsNonOverlappingAndDenseIndicator")
_GUARD_ATTRIBUTES = re.compile(
    r"size|stride|storage_offset|dtype|device|floor|ceil|trunc|sqrt|pow|log2|inf|sym_max|sym_min|sym_int|"
    r"sym_float|sym_ite|sym_not|sym_sqrt|_sym_sqrt"
)
_IDENTIFIER = re.compile(r"(?!\d)\w*")
_PLAIN = re.compile(r"[^\"'\\\x00-\x1f]*")
"""Names that are quoted in generated code."""
_CONTAINERS = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"})


def check_pickle(data: bytes) -> None:
    """Refuse a pickle that names anything except the functions that rebuild tensors. Reads opcodes; runs nothing.

    Raises:
        UnsafeContentError: An opcode or a global is not on the list, or the pickle is broken.
    """
    memo: dict[Any, str | None] = {}
    # The strings on top of the stack, if they are known: STACK_GLOBAL takes its two names from there.
    top: list[str | None] = []
    for opcode, argument in _opcodes_of(data):
        if not _OPCODES.fullmatch(opcode):
            raise UnsafeContentError(f"a pickle with the opcode {opcode}")
        if opcode == "GLOBAL":
            _check_global(str(argument).replace(" ", ".", 1))
        elif opcode == "STACK_GLOBAL":
            names = top[-2:]
            if len(names) != 2 or None in names:
                raise UnsafeContentError("a pickle that computes the name of what it calls")
            _check_global(f"{names[0]}.{names[1]}")
        if opcode in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = top[-1] if top else None
        elif opcode in ("BINGET", "LONG_BINGET"):
            top = [*top[-1:], memo.get(argument)]
        elif opcode in ("BINUNICODE", "SHORT_BINUNICODE"):
            top = [*top[-1:], str(argument)]
        elif opcode != "FRAME":
            top = [None]


def _opcodes_of(data: bytes) -> Iterator[tuple[str, Any]]:
    """Yield the opcodes of a pickle with their arguments, one at a time."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            yield opcode.name, argument
    except Exception as error:  # pickletools raises anything on a broken pickle
        raise UnsafeContentError(f"a broken pickle ({error})") from error


def _check_global(name: str) -> None:
    if not _GLOBALS.fullmatch(name):
        raise UnsafeContentError(f"a pickle that calls {name}")


def expect(value: Any, kind: type[T], what: str) -> T:
    """Return a value of JSON, after a check of its type.

    Raises:
        UnsafeContentError: It has another type. ``what`` names it.
    """
    if type(value) is not kind:
        raise UnsafeContentError(f"not the JSON of an exported program: {what} is a {type(value).__name__}")
    return value


def check_program(document: dict[str, Any], tables: Collection[str] | None = None) -> None:
    """Refuse the JSON of a program if loading or calling it could run more than torch operators.

    Args:
        document: the JSON.
        tables: of a score program, the tables that its lookups may name; it must have no operator besides torch's own and the
            lookup. None refuses lookups.

    Raises:
        UnsafeContentError: An operator, a size expression, a guard or a container type is not on the list, or a value
            that is checked has a different type from that in programs.
        ValueError: A text that should be JSON is not.
        RecursionError: It is nested too deeply.
    """
    for symbol, bounds in expect(document.get("range_constraints", {}), dict, "range_constraints").items():
        _check_expression(symbol)
        for limit in expect(bounds, dict, "a range").values():
            if limit is not None and type(limit) is not int:
                raise UnsafeContentError(f"a range {str(bounds)[:100]!r}")
    for guard in expect(document.get("guards_code", []), list, "guards_code"):
        _check_guard(guard)
    _check_values(document)
    _check_lookups(document, tables)


def _check_lookups(value: Any, tables: Collection[str] | None) -> None:
    """Check the calls of the lookup operator, at any depth; with ``tables``, also that no other foreign operator is called."""
    if isinstance(value, list):
        for item in value:
            _check_lookups(item, tables)
        return
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key in ("target", "as_operator") and isinstance(item, str):
            if item == LOOKUP and key == "target" and tables is not None:
                _check_lookup(value, tables)
            elif item.startswith("torch.ops.dist_export."):
                raise UnsafeContentError(f"an operator {item[:100]!r}")
            elif tables is not None and not _OWN_OPERATOR.fullmatch(item):
                raise UnsafeContentError(f"an operator {item[:100]!r}, which is not torch's own")
        _check_lookups(item, tables)


def _check_lookup(node: dict[str, Any], tables: Collection[str]) -> None:
    """Check one call of ``lookup(Tensor ids, str table) -> Tensor``."""
    arguments = expect(node.get("inputs"), list, "the inputs of a lookup")
    given = {expect(one, dict, "an input").get("name"): one.get("arg") for one in arguments}
    if len(arguments) != 2 or set(given) != {"ids", "table"}:
        raise UnsafeContentError(f"a lookup with the arguments {', '.join(map(str, given))[:100]}")
    ids, table = (expect(given[name], dict, f"the {name} of a lookup") for name in ("ids", "table"))
    if set(ids) != {"as_tensor"} or set(table) != {"as_string"}:
        raise UnsafeContentError("a lookup whose arguments are not a tensor and a name")
    name = expect(table["as_string"], str, "the table of a lookup")
    if name not in tables:
        raise UnsafeContentError(f"a lookup in the table {name[:100]!r}, which the manifest does not have")


def read_version(document: dict[str, Any]) -> str:
    """Return the version of a program's schema, such as "8.20".

    Raises:
        UnsafeContentError: It has no version of two whole numbers.
    """
    version = expect(document.get("schema_version"), dict, "schema_version")
    return ".".join(str(expect(version.get(part), int, f"the {part} version")) for part in ("major", "minor"))


def _check_values(value: Any) -> None:
    """Check the keys that contain code, at any depth. Such a key may also be the name of a tensor; its value is no text then.

    Names of nodes, arguments and attributes count as code: FX writes them into the source that it compiles.
    """
    if isinstance(value, list):
        for item in value:
            _check_values(item)
        return
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key in ("forward_arg_names", "field_names") and item is not None:
            for name in item if isinstance(item, list) else [item]:
                _check_name(_IDENTIFIER, name)
        elif key == "constant_input":  # torch makes a guard with a quoted text, if a text is given instead of a tensor
            _check_values(item)
            given = expect(item, dict, "constant_input").get("value")
            for text in expect(given, dict, "the value of a constant_input").values():
                if isinstance(text, str):
                    _check_name(_PLAIN, text)
        elif not isinstance(item, str):
            _check_values(item)
        elif key in ("target", "as_operator"):
            if not _OPERATOR.fullmatch(item):
                raise UnsafeContentError(f"an operator {item[:100]!r}")
        elif key in ("name", "as_name", "user_input_name"):
            _check_name(_IDENTIFIER, item)
        elif key.endswith(("_name", "fqn")):
            _check_name(_PLAIN, item)
        elif key == "expr_str":
            _check_expression(item)
        elif key in ("in_spec", "out_spec"):
            version_and_spec = expect(json.loads(item), list, key)
            _check_treespec(version_and_spec[1] if len(version_and_spec) > 1 else None, depth=0)


def check_attribute_name(name: object) -> None:
    """Refuse the fully qualified name of a weight if it could break out of a string in generated code.

    Raises:
        UnsafeContentError: It has a quote, a backslash or a control character in it.
    """
    _check_name(_PLAIN, name)


def _check_name(pattern: re.Pattern[str], name: object) -> None:
    if not isinstance(name, str) or not pattern.fullmatch(name):
        raise UnsafeContentError(f"a name {str(name)[:100]!r}")


def _check_expression(text: object) -> None:
    if not isinstance(text, str) or len(text) > 10_000 or not _EXPRESSION.fullmatch(text):
        raise UnsafeContentError(f"a size expression {str(text)[:100]!r}")


def _check_guard(text: object) -> None:
    try:
        nodes = list(ast.walk(ast.parse(str(text), mode="eval")))
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise UnsafeContentError(f"a guard that is no expression {str(text)[:100]!r}") from error
    for node in nodes:
        if (
            "\n" in str(text)  # the guard becomes one line of a function
            or not isinstance(node, _GUARD_NODES)
            or (isinstance(node, ast.Name) and not _GUARD_NAMES.fullmatch(node.id))
            or (isinstance(node, ast.Attribute) and not _GUARD_ATTRIBUTES.fullmatch(node.attr))
            or (isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)) and not _is_key(node.value))
        ):
            raise UnsafeContentError(f"a guard {str(text)[:100]!r}")


def _is_key(value: str | bytes) -> bool:
    return isinstance(value, str) and _PLAIN.fullmatch(value) is not None


def _check_treespec(spec: Any, *, depth: int) -> None:
    """Check a container. At depth 1 are the arguments: the keys of that dict are parameters of a function that FX writes."""
    spec = expect(spec, dict, "a container of inputs or outputs")
    kind, context = spec.get("type"), spec.get("context")
    if not isinstance(kind, str | None) or kind not in _CONTAINERS or "__enum__" in str(context):
        raise UnsafeContentError(f"inputs or outputs in a container of type {str(kind)[:100]!r}")
    keys = json.loads(expect(context, str, "the context of a container")) if context is not None else None
    if keys is not None and not isinstance(keys, list):
        raise UnsafeContentError(f"inputs or outputs with the keys {str(keys)[:100]!r}")
    for key in keys or ():
        if type(key) is not int:
            _check_name(_IDENTIFIER if depth == 1 else _PLAIN, key)
    for child in expect(spec.get("children_spec"), list, "children_spec"):
        _check_treespec(child, depth=depth + 1)
