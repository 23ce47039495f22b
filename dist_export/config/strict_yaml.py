"""YAML as strict as settings need it: PyYAML's safe loader, without keys that stand twice and aliases that explode."""

from __future__ import annotations

import re
from typing import Any

import yaml

_MAX_NODES = 100_000
"""Values, with what aliases repeat counted each time: nine lines can stand for a billion values."""

_MAX_DEPTH = 64
"""Of brackets within brackets."""


class UnsafeYamlError(yaml.YAMLError):
    """What PyYAML would read, or fall over, and no settings file needs."""

    def __init__(self, problem: str, mark: yaml.Mark | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.problem_mark = mark


class _Loader(yaml.SafeLoader):
    def fetch_flow_collection_start(self, token_class: Any) -> None:
        if self.flow_level >= _MAX_DEPTH:  # the scanner takes a second for a thousand
            raise UnsafeYamlError("it is nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(token_class)


class _ArgumentLoader(_Loader):
    """Takes 1e-7 as the number that it is in JSON and YAML 1.2. In files it stays text: a password may look so."""


_ArgumentLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\.\d+|\d+(?:\.\d*)?)[eE][-+]?\d+$", re.ASCII), list("-+.0123456789")
)


def load_yaml(text: str, *, has_exponents: bool = False) -> Any:
    """Return the values of one YAML document: plain ones, never an object of Python.

    With ``has_exponents``, as on a command line, 1e-7 is a number.

    Raises:
        yaml.YAMLError: with ``problem`` and ``problem_mark``: no YAML; a key twice in one mapping; more values than
            settings have; a value that its own type cannot hold, such as a date that is none.
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
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:  # a tag on what it cannot be
        raise UnsafeYamlError(f"a value is not of its type ({error})") from None


def _check(root: yaml.Node, loader: _Loader) -> None:
    """Refuse mappings with a key twice, and more nodes than settings have, by their number when all aliases are followed."""
    sizes: dict[int, int] = {}
    entered: set[int] = set()

    def size_of(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
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


def _refuse_twice(node: yaml.MappingNode, loader: _Loader) -> None:
    seen: set[object] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UnsafeYamlError("a key is a list or a mapping", key.start_mark)
        # by value, for 1, 0x1 and true are one key of a dict; of << two are one mistake as well
        value = key.value if key.tag == "tag:yaml.org,2002:merge" else loader.construct_object(key)
        if value in seen:
            raise UnsafeYamlError(f"the key {key.value!r} stands there twice", key.start_mark)
        seen.add(value)
