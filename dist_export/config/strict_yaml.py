"""Read YAML as strictly as settings require: PyYAML's safe loader, without duplicate keys and without explosive aliases."""

from __future__ import annotations

import re
from typing import Any

import yaml

_MAX_NODES = 100_000
"""Limit of values, counting each use of an alias: nine lines can represent a billion values."""

_MAX_DEPTH = 64
"""Limit of nested brackets."""

_TO_BASE_8_OR_60 = re.compile(r"[-+]?(?:0[0-7_]*[0-7][0-7_]*|[0-9][0-9_.]*(?::[0-9_.]+)+)", re.ASCII)
"""What YAML 1.1 takes for numbers to base 8 (0100 is 64) and 60 (1:30 is 90), and people for something else."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class UnsafeYamlError(yaml.YAMLError):
    """YAML that PyYAML would read, or crash on, but that no settings file needs."""

    def __init__(self, problem: str, mark: yaml.Mark | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.problem_mark = mark


class _Loader(yaml.SafeLoader):
    def fetch_flow_collection_start(self, token_class: Any) -> None:
        if self.flow_level >= _MAX_DEPTH:  # the scanner needs a second for a thousand levels
            raise UnsafeYamlError("it is nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(token_class)


class _ArgumentLoader(_Loader):
    """Reads 1e-7 as a number, as JSON and YAML 1.2 do. In files it stays text, because a password may have that form."""


_ArgumentLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\.\d+|\d+(?:\.\d*)?)[eE][-+]?\d+$", re.ASCII), list("-+.0123456789")
)


def load_yaml(text: str, *, has_exponents: bool = False) -> Any:
    """Return the values of one YAML document. They are plain values, never other Python objects.

    With ``has_exponents``, as on a command line, 1e-7 is a number.

    Raises:
        yaml.YAMLError: with ``problem`` and ``problem_mark``: no YAML; a duplicate key in a mapping; more values than
            settings need; a value that does not fit its own type, such as an impossible date.
    """
    try:
        loader = (_ArgumentLoader if has_exponents else _Loader)(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node, loader)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise UnsafeYamlError("it is nested too deeply") from None
    except (
        ValueError,
        ArithmeticError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:  # a tag on an unsuitable value
        raise UnsafeYamlError(f"a value is not of its type ({error})") from None


def _check(root: yaml.Node, loader: _Loader) -> None:
    """Refuse mappings with a duplicate key, and more nodes than settings need, counting the nodes of each alias again."""
    sizes: dict[int, int] = {}
    entered: set[int] = set()

    def size_of(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            _refuse_other_bases(node)
            return 1
        known = sizes.get(id(node))
        if known is not None:
            return known
        if id(node) in entered:
            raise UnsafeYamlError("a value contains itself", node.start_mark)
        entered.add(id(node))
        children = list(node.value)
        if isinstance(node, yaml.MappingNode):
            _refuse_twice(node, loader)
            children = [child for pair in node.value for child in pair]
        size = 1 + sum(map(size_of, children))
        if size > _MAX_NODES:
            raise UnsafeYamlError(f"it stands for more than {_MAX_NODES:,} values", node.start_mark)
        sizes[id(node)] = size
        return size

    size_of(root)


def _refuse_other_bases(node: yaml.ScalarNode) -> None:
    if node.tag in _NUMBERS and _TO_BASE_8_OR_60.fullmatch(node.value):
        base, what = (60, "a colon") if ":" in node.value else (8, "a zero at its beginning")
        problem = f"YAML takes a number with {what} for one to base {base}; write it without, or quote it as text"
        raise UnsafeYamlError(problem, node.start_mark)  # without the value, which may be a password


def _refuse_twice(node: yaml.MappingNode, loader: _Loader) -> None:
    seen: set[object] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UnsafeYamlError("a key is a list or a mapping", key.start_mark)
        # compared by value, because 1, 0x1 and true are the same key of a dict; two << are refused too
        value = key.value if key.tag == "tag:yaml.org,2002:merge" else loader.construct_object(key)
        if value in seen:
            raise UnsafeYamlError(f"the key {key.value!r} stands there twice", key.start_mark)
        seen.add(value)
