"""Read pickles of ``torch.save`` as plain values: containers, numbers, texts, and tensors that only know their position.

Source: the functions of torch 2.13's ``torch/_utils.py`` and ``torch/_tensor.py`` that a pickled tensor names, and the
list of names that ``torch.load(weights_only=True)`` allows. None of them is called: a tensor is described by its arguments.
"""

from __future__ import annotations

import functools
import math
import mmap
import re
from collections.abc import Callable, Collection
from typing import Any

from dist_export.formats.dtypes import is_torch_dtype
from dist_export.formats.pickle_machine import Machine
from dist_export.formats.pickle_values import Global, PickleError, Record, recorded
from dist_export.formats.pickled_tensor import (
    MAX_DIMS,
    PickledTensor,
    Storage,
    describe_class,
    itemsize_of,
    make_from_numpy,
    make_meta,
    make_parameter,
    make_plain,
    make_view,
    make_wrapper,
    pad_arguments,
    read_dtype,
    read_sizes,
    refuse_expanded,
    without_storage,
)
from dist_export.formats.torch_zip import StateArchive

_FREE_COPIES = 16
"""Limit for each storage. Tensors share their indices or scales with a few others; further copies are counted."""
_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexDouble": "complex128",
    "ComplexFloat": "complex64",
    "QInt32": "qint32",
    "QInt8": "qint8",
    "QUInt8": "quint8",
    "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4",
    "Untyped": "uint8",
}
"""Start of a storage class's name -> dtype of its elements."""
_INERT = re.compile(
    r"numpy\._?core\.multiarray\.(scalar|_reconstruct)|numpy\.(dtype|ndarray)|argparse\.Namespace"
    r"|pathlib\.(_local\.)?PosixPath|datetime\.(datetime|date|timedelta)|torch\.device"
)
"""Objects that training loops save beside tensors: the best score, the arguments, the time. None of them is built."""
_ARRAY = re.compile(r"numpy\._?core\.multiarray\._reconstruct")
_TENSOR_CLASSES = re.compile(
    r"torch\.distributed\.(\w+\.)*(DTensor|ShardedTensor)|torch\.nested\.(\w+\.)*NestedTensor|torch\.nested\.(\w+\.)*_rebuild_njt"
)
_OF_TENSOR_CLASSES = re.compile(
    r"torch\.distributed\.(_\w+|tensor|device_mesh|distributed_c10d)(\.\w+)*|torch\.(strided|jagged)"
    r"|torch\._dynamo\.decorators\._DimRange"
)
"""Classes that describe tensors of these classes."""
_NAMED = re.compile(
    r"torch\.per_\w+|torch\.(\w+\.|cuda\.sparse\.)?\w+Tensor"
    rf"|torch\.(cuda\.|storage\.)?({'|'.join(_STORAGES)}|Typed)Storage"
)
"""Classes of tensors and storages. They are never called, because that would reserve memory of any size."""
_PLAIN_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")


def load_pickled(
    raw: bytes | mmap.mmap,
    storage_of: Callable[[Storage], None],
    *,
    start: int = 0,
    is_any_known: bool = False,
    foreign: set[str] | None = None,
) -> tuple[Any, int]:
    """Return the object that a pickle of ``torch.save`` describes, and the position behind it. Runs nothing of it.

    Dicts of any class become dicts. Objects that are not used become a :class:`~dist_export.formats.pickle_machine.Record`.

    Args:
        storage_of: is called with each storage that the pickle uses. Raises PickleError if it does not exist.
        start: position in ``raw`` where the pickle begins.
        is_any_known: objects of any class become records. If false, a class that torch refuses is an error.
        foreign: the names of classes that torch refuses are added to it.

    Raises:
        PickleError: it is damaged, or names something that is neither a tensor nor harmless.
    """
    names = _Names(storage_of, is_any_known=is_any_known, foreign=set() if foreign is None else foreign)
    machine = names.machine = Machine(raw, names.find, names.refer, start=start)
    return machine.load(), machine.end


def load_archive(archive: StateArchive, *, is_any_known: bool = False, foreign: set[str] | None = None) -> Any:
    """Return the object that the pickle of an archive describes. Each storage must exist with the size that the pickle claims.

    Raises:
        PickleError: as :func:`load_pickled`, or a storage is missing or has another size.
    """

    def check(storage: Storage) -> None:
        found = archive.storages.get(storage.key)
        if found is None or found[1] != storage.num_bytes:
            has = "is not there" if found is None else f"has {found[1]:,}"
            raise PickleError(
                f"a tensor lies in {storage.num_bytes:,} bytes of '{archive.root}data/{storage.key}', which {has}; it is "
                "damaged, or made to deceive"
            )

    return load_pickled(archive.pickled, check, is_any_known=is_any_known, foreign=foreign)[0]


def as_tensor(value: Any) -> PickledTensor | None:
    """Return a value of a pickle as a tensor; None if it is no tensor."""
    if type(value) is PickledTensor:
        return value
    if type(value) is Record and _TENSOR_CLASSES.fullmatch(value.kind):  # its state does not contain its position
        return PickledTensor("", (), (), 0, None, describe_class(value.kind))
    return None


def as_array(value: Any) -> tuple[tuple[int, ...], int] | None:
    """Return (shape, size in bytes) of a numpy array, if its state has them, else ((), 0); None if the value is no array."""
    if type(value) is not Record or not _ARRAY.fullmatch(value.kind):
        return None
    match value.state:  # version, shape, dtype, order, content; objects are a list
        case (int(), tuple(shape), _, _, bytes(content)) if len(shape) <= MAX_DIMS:
            return tuple(size for size in shape if type(size) is int), len(content)
    return (), 0


class _Names:
    """Gives each name in such a pickle its value."""

    machine: Machine

    def __init__(self, storage_of: Callable[[Storage], None], *, is_any_known: bool, foreign: set[str]) -> None:
        self._storage_of = storage_of
        self._is_any_known = is_any_known
        self._foreign = foreign
        self._copies: dict[str, int] = {}
        self._makers: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": _empty_dict,
            "_codecs.encode": self._encode,
            "builtins.bytearray": self._bytearray,
            "builtins.set": self._set,
            "collections.Counter": self._counter,
            "builtins.complex": _complex,
            "torch.Size": self._size,
            "torch.serialization._get_layout": _layout,
            "torch.nn.parameter.Parameter": make_parameter,
            "torch._utils._rebuild_parameter": make_parameter,
            "torch._utils._rebuild_parameter_with_state": self._parameter_with_state,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor_v2,
            "torch._utils._rebuild_tensor_v3": self._tensor_v3,
            "torch._tensor._rebuild_from_type_v2": self._from_type,
            "torch._utils._rebuild_qtensor": self._quantized,
            "torch._utils._rebuild_sparse_tensor": self._sparse,
            "torch._utils._rebuild_nested_tensor": self._nested,
            "torch._utils._rebuild_meta_tensor_no_storage": make_meta,
            "torch._utils._rebuild_wrapper_subclass": make_wrapper,
            "torch._utils._rebuild_device_tensor_from_numpy": make_from_numpy,
            "torch._utils._rebuild_device_tensor_from_cpu_tensor": self._from_cpu,
        }

    def find(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._makers:
            return Global(full, self._makers[full])
        if any(pattern.fullmatch(full) for pattern in (_TENSOR_CLASSES, _INERT, _OF_TENSOR_CLASSES)):
            return recorded(full)
        if full in _PLAIN_CLASSES or _NAMED.fullmatch(full) or (module == "torch" and is_torch_dtype(name)):
            return Global(full)
        if self._is_any_known:
            self._foreign.add(full)
            return recorded(full)
        return Global(full, functools.partial(_refuse_call, full))  # a tensor's class may be named, but never called

    def refer(self, reference: Any) -> Storage:
        match reference:
            case ("storage", Global() as kind, str(key), _, int(numel), *more) if more in (
                [],
                [None],
            ):  # pickles of older versions have None
                dtype = _STORAGES.get(kind.name.rpartition(".")[2].removesuffix("Storage"))
                if dtype is not None:
                    storage = Storage(key, dtype, numel * itemsize_of(dtype))
                    self._storage_of(storage)
                    return storage
        raise PickleError("asks for what is no storage of a tensor; it is no file of torch.save")

    def _encode(self, *arguments: Any) -> bytes:
        match arguments:  # how protocol 2 writes bytes
            case (str(text), "latin1" | "latin-1"):
                self.machine.charge(len(text))
                try:
                    return text.encode("latin-1")
                except UnicodeEncodeError:
                    pass
        raise PickleError("encodes a text in a way that no bytes are written")

    def _bytearray(self, *arguments: Any) -> Record:
        match arguments:
            case () | (bytes(),) | (str(), "latin1" | "latin-1"):
                self.machine.charge(len(arguments[0]) if arguments else 0)
                return Record("bytearray")
        raise PickleError("makes a bytearray of what is no bytes")

    def _set(self, *arguments: Any) -> Record:
        match arguments:
            case () | (list() | tuple(),):
                self._hash_each(arguments[0] if arguments else ())
                return Record("set")
        raise PickleError("makes a set of what is no list")

    def _counter(self, *arguments: Any) -> Record:
        match arguments:
            case () | (dict() | list() | tuple(),):  # a Counter is pickled as the dict of its counts
                self._hash_each(arguments[0] if arguments else ())
                return Record("collections.Counter")
        raise PickleError("makes a Counter of what is no dict")

    def _hash_each(self, members: Collection[Any]) -> None:
        self.machine.charge(4 * len(members))
        for member in members:
            self.machine.check_key(member)

    def _size(self, *arguments: Any) -> tuple[Any, ...]:
        match arguments:
            case ():
                return ()
            case (tuple() | list(),) if len(arguments[0]) <= MAX_DIMS:
                return tuple(arguments[0])
        raise PickleError("has a size that is none")

    def _tensor(self, *arguments: Any) -> PickledTensor:
        storage, first, shape, strides, *_ = pad_arguments(arguments, 4)
        return make_plain(storage, first, shape, strides, storage.dtype if isinstance(storage, Storage) else "")

    def _tensor_v2(self, *arguments: Any) -> PickledTensor:
        return make_view(self._tensor(*arguments), pad_arguments(arguments, 7)[6])

    def _tensor_v3(self, *arguments: Any) -> PickledTensor:
        storage, first, shape, strides, _, _, dtype, metadata = pad_arguments(arguments, 8)
        return make_view(make_plain(storage, first, shape, strides, read_dtype(dtype)), metadata)

    def _from_type(self, *arguments: Any) -> Any:
        """Return a tensor of a subclass, or with attributes, from its function, its class, its arguments and its attributes."""
        match arguments:
            case (Global() as function, Global(), tuple(), _) if _TENSOR_CLASSES.fullmatch(function.name):
                return PickledTensor("", (), (), 0, None, describe_class(function.name))
            case (Global() as function, Global() as kind, tuple() as inner, state) if (
                function.name.startswith("torch._utils._rebuild_")
                and function.make is not None
                and len(inner) <= MAX_DIMS
            ):
                self.machine.charge_state(state)
                made = function.make(*inner)
                if isinstance(made, PickledTensor):
                    return (
                        made
                        if kind.name in _PLAIN_CLASSES or made.reason
                        else without_storage(made, describe_class(kind.name))
                    )
        raise PickleError("makes a tensor in a way that torch does not")

    def _parameter_with_state(self, *arguments: Any) -> Any:
        self.machine.charge_state(pad_arguments(arguments, 4)[3])
        return make_parameter(*arguments)

    def _quantized(self, *arguments: Any) -> PickledTensor:
        _, _, _, _, scheme, *_ = pad_arguments(arguments, 5)
        if isinstance(scheme, tuple):
            self._note_copied(*(part for part in scheme[:8] if isinstance(part, PickledTensor)))
        made = self._tensor(*arguments)
        refuse_expanded(made)
        return without_storage(made, "quantized")

    def _sparse(self, *arguments: Any) -> PickledTensor:
        match arguments:
            case (Global() as layout, tuple() as data) if 3 <= len(data) <= 6:
                tensors = [part for part in data if isinstance(part, PickledTensor)]
                self._note_copied(*tensors)
                sizes = [part for part in data if isinstance(part, (tuple, list))]
                if tensors and sizes:
                    reason = layout.name.removeprefix("torch.")
                    return PickledTensor(tensors[-1].dtype, read_sizes(sizes[-1]), (), 0, None, reason)
        raise PickleError("has a sparse tensor in an unknown way")

    def _nested(self, *arguments: Any) -> PickledTensor:
        self._note_copied(*pad_arguments(arguments, 4)[:4])
        return PickledTensor(arguments[0].dtype, (), (), 0, None, "nested")

    def _from_cpu(self, *arguments: Any) -> PickledTensor:
        data, dtype, *_ = pad_arguments(arguments, 4)
        self._note_copied(data)
        name = read_dtype(dtype)
        if data.dtype == name:
            return data  # type: ignore[no-any-return]
        return without_storage(data, f"of {name}, but stored as {data.dtype}")._replace(dtype=name)

    def _note_copied(self, *tensors: Any) -> None:
        """Count the bytes that torch copies or reads when it makes another tensor from these."""
        for tensor in tensors:
            refuse_expanded(tensor)
            if tensor.storage is not None:
                count = self._copies[tensor.storage.key] = self._copies.get(tensor.storage.key, 0) + 1
                if count > _FREE_COPIES:
                    self.machine.charge(math.prod(tensor.shape) * itemsize_of(tensor.dtype))


def _refuse_call(name: str, *_: Any) -> None:
    shown = name.removeprefix("builtins.")
    raise PickleError(f"Unsupported global: GLOBAL {shown} was not an allowed global by default")


def _empty_dict(*arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise PickleError(
            "fills an OrderedDict in a way of Python 2; load it with torch.load and write it again with torch.save"
        )
    return {}


def _complex(*arguments: Any) -> Record:
    if len(arguments) != 2 or not all(type(part) in (int, float) for part in arguments):
        raise PickleError("has a complex number that is none")
    return Record("complex")


def _layout(*arguments: Any) -> Global:
    if len(arguments) != 1 or type(arguments[0]) is not str or len(arguments[0]) > 100:
        raise PickleError("has a layout that is none")
    return Global(arguments[0])
