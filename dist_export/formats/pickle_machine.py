"""Read a pickle without running any of it, with memory and time in proportion to its length.

Python's own reader builds everything that a pickle describes: a few bytes make it hash a key of 2^60 parts, or reserve
gigabytes for an index that nothing uses. This reader knows protocols 2 to 5 as they are written today (source: the opcodes
that ``pickletools`` of the standard library documents). Every step has a bounded cost. Numbers, texts and containers become
Python values. Each name becomes the value that the caller's ``find`` returns for it, and only such values are called.
Nothing is imported, no key is hashed before its cost is bounded, and sets are never built.
"""

from __future__ import annotations

import mmap
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # Python's own mapping of names of protocol 2
from collections.abc import Callable
from typing import Any

from dist_export.formats.pickle_values import MAX_KEY, Global, KeyCheck, PickleError, Record

_MAX_ARGUMENTS = 64
_MAX_NAME = 1_000
_MAX_INT_BYTES = 64

_U16, _I32, _U32, _U64, _F64 = (struct.Struct(code) for code in ("<H", "<i", "<I", "<Q", ">d"))


class _CallerError(Exception):
    """Wraps an exception of the caller's own function that would mean damage here. It is a bug, and must stay visible."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


_SIGNS = (IndexError, struct.error)
"""Exceptions that are raised here if a pickle ends too early, or takes a value that is not there."""


class Machine:
    """Reads one pickle, from ``start`` on in ``raw``. Afterwards ``end`` is the position behind it."""

    def __init__(
        self,
        raw: bytes | mmap.mmap,
        find: Callable[[str, str], Any],
        persistent: Callable[[Any], Any] | None = None,
        *,
        start: int = 0,
    ) -> None:
        """Read nothing yet.

        Args:
            find: returns the value for a name (module, name): a :class:`Global`, or any value. PickleError if it is refused.
            persistent: returns the value for a reference out of the pickle (its id, of any kind). None refuses all.
        """
        self.raw = raw
        self.start = start
        self.end = start
        self._find = find
        self._persistent = persistent
        self._found: dict[tuple[str, str], Any] = {}
        self._allowance = 8 * len(raw) + (1 << 16)
        self._keys = KeyCheck()
        self.check_key = self._keys.check
        self._protocol = 0
        self._memo: list[Any] = []
        self._below: list[list[Any]] = []

    def load(self) -> Any:
        """Return the object that the pickle describes. It may be nested without limit, and may contain one container many times.

        Raises:
            PickleError: it is damaged, cut short, of another protocol, or names, calls or hashes something that is not
                allowed. Other exceptions of the caller's functions pass through.
        """
        try:
            return self._load()
        except _SIGNS:
            raise PickleError("is cut short or damaged") from None
        except _CallerError as caught:
            raise caught.error from None

    def charge(self, amount: int) -> None:
        """Count ``amount`` members or bytes that a call copies. PickleError if the total is out of proportion to the length."""
        self._allowance -= amount
        if self._allowance < 0:
            raise PickleError("copies the same content again and again; it is made to take for ever")

    def charge_state(self, state: Any) -> None:
        """Count the state that an object is restored from, because each attribute is set separately."""
        for attributes in state if type(state) is tuple and len(state) == 2 else (state,):
            if type(attributes) is dict:
                self.charge(4 * len(attributes))

    def _load(self) -> Any:
        raw = self.raw
        memo = self._memo
        stack: list[Any] = []
        at = self._read_protocol()
        while True:
            opcode = raw[at]
            at += 1
            if opcode == 0x94:  # MEMOIZE
                memo.append(stack[-1])
            elif opcode == 0x68:  # BINGET
                stack.append(memo[raw[at]])
                at += 1
            elif opcode == 0x6A:  # LONG_BINGET
                stack.append(memo[_U32.unpack_from(raw, at)[0]])
                at += 4
            elif opcode == 0x4B:  # BININT1
                stack.append(raw[at])
                at += 1
            elif opcode == 0x4D:  # BININT2
                stack.append(_U16.unpack_from(raw, at)[0])
                at += 2
            elif opcode == 0x28:  # MARK
                self._below.append(stack)
                stack = []
            elif opcode == 0x52 or opcode == 0x81:  # REDUCE, NEWOBJ  # noqa: PLR1714 -- a set is slower, a million times
                arguments = stack.pop()
                stack[-1] = self._call(stack[-1], arguments)
            elif opcode == 0x62:  # BUILD
                state = stack.pop()
                self._restore(stack[-1], state)
            elif opcode == 0x75:  # SETITEMS
                items = stack
                stack = self._below.pop()
                self._set_items(stack[-1], items)
            elif opcode == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif opcode == 0x86:  # TUPLE2
                last = stack.pop()
                stack[-1] = (stack[-1], last)
            elif opcode == 0x87:  # TUPLE3
                third, second = stack.pop(), stack.pop()
                stack[-1] = (stack[-1], second, third)
            elif opcode == 0x72 or opcode == 0x71:  # LONG_BINPUT, BINPUT  # noqa: PLR1714 -- as above
                place = raw[at] if opcode == 0x71 else _U32.unpack_from(raw, at)[0]
                at += 1 if opcode == 0x71 else 4
                self._put(place, stack[-1])
            elif opcode == 0x2E:  # STOP
                self.end = at
                return stack.pop()
            elif opcode in _READ:
                value, at = self._read_value(opcode, at)
                stack.append(value)
            elif opcode == 0x63:  # GLOBAL
                value, at = self._read_global(at)
                stack.append(value)
            elif opcode == 0x95:  # FRAME
                at = self._enter_frame(at)
            else:
                stack = self._rare(opcode, stack)

    def _read_protocol(self) -> int:
        head = self.raw[self.start : self.start + 2]
        if len(head) < 2 or head[0] != 0x80 or not 2 <= head[1] <= 5:
            raise PickleError("is no pickle of protocol 2 to 5")
        self._protocol = head[1]
        return self.start + 2

    def _read_value(self, opcode: int, at: int) -> tuple[Any, int]:
        """Return a value that is written out at ``at``, and the position behind it."""
        length, read = _READ[opcode]
        if isinstance(length, int):
            count = length
        else:
            count = length.unpack_from(self.raw, at)[0]
            at += length.size
        if count > len(self.raw) - at:
            raise PickleError("is cut short or damaged")
        return read(self.raw[at : at + count]), at + count

    def _enter_frame(self, at: int) -> int:
        """Return where the frame begins whose length is at ``at``."""
        if _U64.unpack_from(self.raw, at)[0] > len(self.raw) - at - 8:
            raise PickleError("is cut short or damaged")
        return at + 8

    def _read_global(self, at: int) -> tuple[Any, int]:
        """Return what the two lines at ``at`` name, and the position behind them."""
        raw = self.raw
        ends = raw.find(b"\n", at), raw.find(b"\n", raw.find(b"\n", at) + 1)
        if not at <= ends[0] < ends[1]:
            raise PickleError("is cut short or damaged")
        return self._name(_text(raw[at : ends[0]]), _text(raw[ends[0] + 1 : ends[1]])), ends[1] + 1

    def _put(self, place: int, value: Any) -> None:
        if place == len(self._memo):
            self._memo.append(value)
        elif place < len(self._memo):
            self._memo[place] = value
        else:  # Python's reader would reserve memory for all numbers in between
            raise PickleError(f"numbers what it repeats {place:,} after {len(self._memo):,}")

    def _call(self, function: Any, arguments: Any) -> Any:
        if type(function) is not Global or function.make is None or type(arguments) is not tuple:
            name = function.name if type(function) is Global else type(function).__name__
            raise PickleError(f"calls {name}, which is nothing that it may call")
        if len(arguments) > _MAX_ARGUMENTS:
            raise PickleError(f"calls {function.name} with {len(arguments):,} arguments")
        return _ask(function.make, *arguments)

    def _restore(self, restored: Any, state: Any) -> None:
        self.charge_state(state)
        if type(restored) is Record and restored.state is None:
            restored.state = state
        elif type(restored) is not dict:  # an OrderedDict's own attributes are not used
            raise PickleError(f"restores a {type(restored).__name__}, or one object twice")

    def _set_items(self, target: Any, items: list[Any]) -> None:
        if len(items) % 2 or type(target) not in (dict, Record):
            raise PickleError("is cut short or damaged")
        for place in range(0, len(items), 2):
            key = items[place]
            if type(key) is not str or len(key) > MAX_KEY:
                self.check_key(key)
            if type(target) is dict:  # items of other classes are not used
                target[key] = items[place + 1]

    def _name(self, module: Any, name: Any) -> Any:
        if type(module) is not str or type(name) is not str or max(len(module), len(name)) > _MAX_NAME:
            raise PickleError("computes the name of what it calls")
        if self._protocol < 3:
            if (module, name) in NAME_MAPPING:
                module, name = NAME_MAPPING[module, name]
            else:
                module = IMPORT_MAPPING.get(module, module)
        key = (module, name)
        if key not in self._found:
            self._found[key] = _ask(self._find, module, name)
        return self._found[key]

    def _rare(self, opcode: int, stack: list[Any]) -> list[Any]:
        """Run a rare opcode; return the stack to continue with."""
        if opcode in _PUSHED:
            stack.append(_PUSHED[opcode]())
        elif opcode == 0x32:  # DUP
            stack.append(stack[-1])
        elif opcode == 0x30:  # POP; it removes a mark if that is on top
            if not stack:
                return self._below.pop()
            stack.pop()
        elif opcode == 0x61:  # APPEND
            item = stack.pop()
            self._extend(stack[-1], [item])
        elif opcode == 0x73:  # SETITEM
            value, key = stack.pop(), stack.pop()
            self._set_items(stack[-1], [key, value])
        elif opcode == 0x93:  # STACK_GLOBAL
            name, module = stack.pop(), stack.pop()
            stack.append(self._name(module, name))
        elif opcode == 0x51:  # BINPERSID
            if self._persistent is None:
                raise PickleError("refers to something outside of itself")
            stack[-1] = _ask(self._persistent, stack[-1])
        elif opcode == 0x92:  # NEWOBJ_EX
            names, arguments = stack.pop(), stack.pop()
            if names != {}:
                raise PickleError("makes an object of named arguments")
            stack[-1] = self._call(stack[-1], arguments)
        else:
            return self._close(opcode, stack)
        return stack

    def _close(self, opcode: int, items: list[Any]) -> list[Any]:
        """Run an opcode that takes all ``items`` down to the last mark; return the stack below it."""
        if opcode not in _CLOSING:
            raise PickleError(f"has the opcode {opcode:#04x}, which no such file has")
        stack = self._below.pop()
        if opcode == 0x74:  # TUPLE
            stack.append(tuple(items))
        elif opcode == 0x65:  # APPENDS
            self._extend(stack[-1], items)
        elif opcode == 0x90:  # ADDITEMS, whose target is a set
            self._extend(stack[-1], [])
        elif opcode == 0x91:  # FROZENSET
            stack.append(Record("frozenset"))
        return stack  # otherwise POP_MARK

    def _extend(self, target: Any, items: list[Any]) -> None:
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Record:  # items of other classes are not used, as in _set_items
            raise PickleError(f"appends to a {type(target).__name__}")


def _ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of the caller."""
    try:
        return function(*arguments)
    except _SIGNS as error:
        raise _CallerError(error) from error


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise PickleError("has a text that is none") from None


def _integer(raw: bytes) -> int:
    if len(raw) > _MAX_INT_BYTES:
        raise PickleError(f"has a whole number of {len(raw):,} bytes")
    return int.from_bytes(raw, "little", signed=True)


_U8 = struct.Struct("B")
_READ: dict[int, tuple[struct.Struct | int, Callable[[bytes], Any]]] = {
    0x8C: (_U8, _text),  # SHORT_BINUNICODE
    0x58: (_U32, _text),  # BINUNICODE
    0x8D: (_U64, _text),  # BINUNICODE8
    0x55: (_U8, _text),  # SHORT_BINSTRING
    0x54: (_U32, _text),  # BINSTRING
    0x43: (_U8, bytes),  # SHORT_BINBYTES
    0x42: (_U32, bytes),  # BINBYTES
    0x8E: (_U64, bytes),  # BINBYTES8
    0x96: (_U64, bytes),  # BYTEARRAY8
    0x4A: (4, lambda raw: _I32.unpack(raw)[0]),  # BININT
    0x47: (8, lambda raw: _F64.unpack(raw)[0]),  # BINFLOAT
    0x8A: (_U8, _integer),  # LONG1
    0x8B: (_U32, _integer),  # LONG4
}
"""Opcode -> (number of bytes that follow, or the format of that number; function that converts them)."""

_PUSHED: dict[int, Callable[[], Any]] = {
    0x7D: dict,
    0x29: tuple,
    0x5D: list,
    0x8F: lambda: Record("set"),
    0x4E: lambda: None,
    0x88: lambda: True,
    0x89: lambda: False,
}
_CLOSING = b"te1\x90\x91"
