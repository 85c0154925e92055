"""The globals that pickles refer to, listed without loading them; and stand-ins for harmless objects beside tensors.

Globals are listed in bounded time and memory, and the calls of harmless ones with them. Torch's own list of these
still lets a small file take any memory (`Counter(range(10**10))`, `bytearray(10**12)`, a tensor larger than its
storage), so a call is refused unless the file holds all that it makes.

`torch.load(weights_only=True)` refuses everything but tensors and plain
containers, but a command-line namespace, a path, a defaultdict and numpy's scalars and arrays are data as well.
Stand-ins keep them without calling numpy, which a forged dtype can crash, and without holding a factory;
`HarmlessPickler` saves the real objects again.

A pickle can set any attribute of a stand-in, its class included, so `real` trusts nothing that was checked before.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import PosixPath
from types import ModuleType
from typing import Any, BinaryIO, TypeAlias, TypeGuard

COMPUTED = "(a computed name)"
MISFIT = "a tensor that does not fit into its storage"

_BUDGET = 1_000_000  # opcodes, bytes of text and KiB that are skipped, of all pickles of a file
_LONGEST = 512  # bytes of a text; what is longer is no name
_WIDTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_TEXTS: dict[str, Callable[[BinaryIO], str]] = {  # how each opcode of a text is decoded
    opcode.name: opcode.arg.reader
    for opcode in pickletools.opcodes
    if opcode.arg and ("STRING" in opcode.name or "UNICODE" in opcode.name)
}
_IMPORTING = ("GLOBAL", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")
_IN_PLACE = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")  # opcodes that change what they leave


class _Shared(str):
    """A text taken from the memo, so that each use costs the file a few bytes."""


class _Global(str):
    """A global on the stack: no text, and nothing whose attributes a pickle may set."""


@dataclass(frozen=True)
class _Made:
    """What a pickle has made: `by` is "" for a container or a long text, or the global that was called.

    items: of a tuple; leaves, depth: of tuples within it; elements: of a storage. shared: taken from the memo, so that
    each use costs the file a few bytes.
    """

    by: str = ""
    items: tuple[_Value, ...] | None = None
    leaves: int = 1
    depth: int = 0
    elements: int = 0
    shared: bool = False


_Value: TypeAlias = "str | int | float | _Made | None"  # on the stack; None for what is not followed


class TornPickleError(ValueError):
    """A pickle that does not parse to its end."""


class LongPickleError(ValueError):
    """A pickle with more in it than is worth reading to list its globals."""


class PickleGlobals:
    """The globals of one or several pickles.

    names: module and name joined by a dot, as pickles spell them; `COMPUTED` for those that only loading would tell,
    and "changes to …" for those whose attributes are set. An error leaves what was found before it. protocol: the
    newest one that a pickle declares; refused: the first call that is more than what the file holds for it; storages:
    the elements of each storage, by its key, and the bytes of one.
    """

    def __init__(self, budget: int = _BUDGET) -> None:
        self.names: set[str] = set()
        self.protocol = 0
        self.refused: str | None = None
        self.storages: dict[str, tuple[int, int]] = {}
        self._budget = budget

    def read(self, file: BinaryIO, most: int | None = None) -> None:
        """Read the pickles that follow each other in a seekable file: all up to its end, or the first `most`.

        Raises TornPickleError and LongPickleError.
        """
        start = file.tell()
        size = file.seek(0, os.SEEK_END)
        file.seek(start)
        count = 0
        while count != most and (file.tell() < size or not count):
            self._read_one(file, size)
            count += 1

    def _read_one(self, file: BinaryIO, size: int) -> None:
        """Follow which texts the unpickler would have on its stack and in its memo: STACK_GLOBAL takes names there."""
        stack: list[_Value] = []
        marks: list[int] = []
        memo: dict[int, _Value] = {}
        while True:
            opcode = _OPCODES.get(file.read(1))
            if opcode is None:
                raise TornPickleError
            name = opcode.name
            argument = self._argument(file, size, opcode.arg)
            self._spend(1)
            if name == "STOP":
                return
            if name == "PROTO":
                self.protocol = max(self.protocol, argument[0])
            elif name in ("GLOBAL", "INST"):
                found = ".".join(line.decode("utf-8", "backslashreplace") for line in argument.split(b"\n")[:2])
                self.names.add(found)
            elif name.startswith("EXT"):
                found = f"copyreg extension {int.from_bytes(argument, 'little', signed=name == 'EXT4')}"
                self.names.add(found)
            if name == "MARK":
                marks.append(len(stack))
            elif name == "POP" and marks and marks[-1] == len(stack):
                marks.pop()
            elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else _index(name, argument)] = _top(stack, marks)
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                value = memo.get(_index(name, argument))
                if isinstance(value, _Made):
                    value = replace(value, items=None, shared=True)
                stack.append(_Shared(value) if type(value) is str else value)
            elif name == "DUP":
                stack.append(_top(stack, marks))
            elif name in _TEXTS:
                try:
                    stack.append(_TEXTS[name](io.BytesIO(argument)))
                except ValueError:  # too long for a name, so its bytes are not here, or no text at all
                    stack.append(_Made())
            elif name in _NUMBERS:
                stack.append(_NUMBERS[name](io.BytesIO(argument)))
            elif name in ("TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
                items = tuple(_pop_tuple(stack, marks, name))
                made_items = [item for item in items if isinstance(item, _Made)]
                leaves = 1 + sum(item.leaves for item in made_items)
                depth = 1 + max((item.depth for item in made_items), default=0)
                if leaves > _MOST_LEAVES + size:  # its hash alone would take for ever
                    self.refused = self.refused or "tuples within tuples that expand beyond the file"
                if depth > _DEEPEST:  # its hash alone would overflow the stack of the process
                    self.refused = self.refused or f"tuples within tuples, more than {_DEEPEST} deep"
                    items = ()
                stack.append(_Made(items=items, leaves=leaves, depth=depth))
            else:
                taken = _pop(stack, marks, opcode.stack_before)
                if name == "STACK_GLOBAL":
                    found = ".".join(map(str, taken)) if all(map(_is_name, taken)) else COMPUTED
                    self.names.add(found)
                elif name == "BUILD" and isinstance(taken[0], _Global):
                    self.names.add(f"changes to {taken[0]}")
                elif name == "BUILD" and isinstance(taken[0], _Made) and taken[0].by in _UNCHANGED:
                    self.refused = self.refused or "changes to a tensor"
                made: _Value = _Global(found) if name in _IMPORTING else taken[0] if name in _IN_PLACE else None
                if name in ("REDUCE", "NEWOBJ"):
                    made = self._call(*taken)
                elif name == "BINPERSID":
                    made = self._storage(taken[0])
                elif name in _LITERALS:
                    made = _Made()
                stack += [made] * len(opcode.stack_after)

    def _storage(self, identifier: _Value) -> _Made:
        """Follow `("storage", type, key, device, elements, …)`."""
        items = _items(identifier)
        kind, key, elements = (items[1], items[2], items[4]) if len(items) > 4 else (None, None, None)
        if not isinstance(kind, _Global) or not _is_name(key) or type(elements) is not int or elements < 0:
            self.refused = self.refused or "a storage without a type, a key or a size"
            return _Made()
        bytes_each = _ELEMENT_BYTES.get(kind.rpartition(".")[2].removesuffix("Storage"), 1)
        self.storages[key] = max(self.storages.get(key, (0, 0)), (elements, bytes_each), key=prod)
        return _Made(_STORAGE, elements=elements)

    def _call(self, function: _Value, arguments: _Value) -> _Value:
        """Return what a call makes, and note a harmless one that makes more than the file holds for it."""
        items = _items(arguments)
        if not isinstance(function, _Global):
            self.refused = self.refused or "a call of what is no global"
            return None
        module, _, name = function.rpartition(".")
        called = ".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)))
        if called == _FROM_TYPE and len(items) > 2:
            return self._call(items[0], items[2])
        check = _CALLS.get(called)
        if check is None and called in harmless_names():
            check = _never
        if check and (not isinstance(arguments, _Made) or arguments.items is None or not check(items)):
            makes_tensor = check in (_fits_storage, _fits_without_expanding)
            self.refused = self.refused or (
                MISFIT if makes_tensor else f"a call of {called} that makes more than the file holds"
            )
        return _Made(called)

    def _argument(self, file: BinaryIO, size: int, kind: pickletools.ArgumentDescriptor | None) -> bytes:
        """Return the bytes of an opcode's argument, or only the first where it is too long for a name."""
        if kind is None:
            return b""
        if kind.n == pickletools.UP_TO_NEWLINE:
            lines = 2 if kind.name == "stringnl_noescape_pair" else 1
            return b"".join(self._line(file) for _ in range(lines))
        if kind.n >= 0:
            return _exactly(file, kind.n)
        prefix = _exactly(file, _WIDTHS[kind.n])
        length = int.from_bytes(prefix, "little", signed=kind.n == pickletools.TAKEN_FROM_ARGUMENT4)
        if not 0 <= length <= size - file.tell():
            raise TornPickleError
        if length <= _LONGEST:
            self._spend(length)
            return prefix + _exactly(file, length)
        file.seek(length, os.SEEK_CUR)
        return prefix

    def _line(self, file: BinaryIO) -> bytes:
        line = file.readline(_LONGEST)
        self._spend(len(line))
        if line.endswith(b"\n"):
            return line
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(1 << 16)
            self._spend(1 + len(rest) // 1024)
        if not rest:
            raise TornPickleError
        return line + "…\n".encode()

    def _spend(self, amount: int) -> None:
        self._budget -= amount
        if self._budget < 0:
            raise LongPickleError


def _items(value: _Value) -> tuple[_Value, ...]:
    return (value.items or ()) if isinstance(value, _Made) else ()


def _never(_: Sequence[_Value]) -> bool:
    return False


def _is_any(_: Sequence[_Value]) -> bool:
    return True


def _is_name(value: _Value) -> TypeGuard[str]:
    """Whether a value is a text, of which globals are made."""
    return isinstance(value, str) and not isinstance(value, _Global)


def _is_copy(arguments: Sequence[_Value]) -> bool:
    """Return whether a call copies a container, or bytes, that nothing shares."""
    return all(isinstance(v, _Made) and not v.shared and v.by in ("", "_codecs.encode") for v in arguments)


def _is_encoding(arguments: Sequence[_Value]) -> bool:
    """Return whether a call encodes a text of its own, or a short one, in a codec that pickle uses."""
    if len(arguments) != 2 or not (isinstance(arguments[1], str) and str(arguments[1]) in _CODECS):
        return False
    text = arguments[0]
    return text == _Made() or (_is_name(text) and not (isinstance(text, _Shared) and len(text) > _LONGEST_SHARED))


def _is_bytes(arguments: Sequence[_Value]) -> bool:
    return _is_copy(arguments) or _is_encoding(arguments)


def _is_path(arguments: Sequence[_Value]) -> bool:
    return all(map(_is_name, arguments)) and sum(map(len, map(str, arguments))) <= _LONGEST_PATH


def _is_of_numbers(arguments: Sequence[_Value]) -> bool:
    """Return whether nothing is nested: slices within slices overflow the stack when they are freed."""
    return all(not isinstance(value, _Made) or value.by.endswith("multiarray.scalar") for value in arguments)


def _fits_storage(arguments: Sequence[_Value]) -> bool:
    """Return whether a tensor, given as `(storage, offset, size, stride, …)`, lies within its storage."""
    if len(arguments) < 4 or not isinstance(arguments[0], _Made) or arguments[0].by != _STORAGE:
        return False
    written = [*_items(arguments[2]), *_items(arguments[3]), arguments[1]]
    *axes, offset = (number if type(number) is int else -1 for number in written)
    if min([offset, *axes]) < 0 or len(axes) != 2 * len(_items(arguments[2])):
        return False
    sizes, strides = axes[: len(axes) // 2], axes[len(axes) // 2 :]
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return 0 in sizes or last < arguments[0].elements


def _fits_without_expanding(arguments: Sequence[_Value]) -> bool:
    sizes = [number for number in _items(arguments[2] if len(arguments) > 2 else None) if type(number) is int]
    return _fits_storage(arguments) and prod(sizes) <= getattr(arguments[0], "elements", 0)


_NUMBERS: dict[str, Callable[[BinaryIO], Any]] = {
    opcode.name: opcode.arg.reader
    for opcode in pickletools.opcodes
    if opcode.arg and opcode.name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
}
_LITERALS = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "LIST", "DICT", "FROZENSET", "BINBYTES", "SHORT_BINBYTES")
_CODECS = ("latin1", "latin-1", "iso-8859-1", "ascii", "utf-8", "utf8")  # others may take a text's length squared
_LONGEST_SHARED, _LONGEST_PATH = 16, 4096  # characters
_MOST_LEAVES, _DEEPEST = 1_000_000, 500
_ELEMENT_BYTES = {"Double": 8, "Long": 8, "ComplexDouble": 16, "ComplexFloat": 8, "Float": 4, "Int": 4, "QInt32": 4}
_ELEMENT_BYTES |= {"Half": 2, "BFloat16": 2, "Short": 2}  # of torch's types of storages; 1 for the others
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"  # (function, type, arguments, state)
_STORAGE = "storage"  # in the place of the global that made one
_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_QUANTIZED = "torch._utils._rebuild_qtensor"
_PARAMETERS = (
    *("torch.nn.parameter.Parameter", "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
)
_UNCHANGED = (*_TENSORS, _QUANTIZED, *_PARAMETERS)  # made whole: torch.save sets no state on them afterwards
_CALLS: Mapping[str, Callable[[Sequence[_Value]], bool]] = {  # of harmless globals: what their arguments must be
    **dict.fromkeys(_TENSORS, _fits_storage),
    _QUANTIZED: _fits_without_expanding,
    **dict.fromkeys(_PARAMETERS, _is_any),
    **dict.fromkeys(
        ("collections.OrderedDict", "collections.Counter", "builtins.set", "builtins.frozenset", "torch.Size"), _is_copy
    ),
    **dict.fromkeys(("builtins.bytearray", "builtins.bytes"), _is_bytes),
    "builtins.slice": _is_of_numbers,
    "_codecs.encode": _is_encoding,
    **dict.fromkeys(("pathlib.PosixPath", "pathlib._local.PosixPath"), _is_path),
    **dict.fromkeys(
        (
            *("argparse.Namespace", "collections.defaultdict", "builtins.complex", "builtins.range"),
            *("numpy.dtype", "numpy.ndarray", "torch.device", "torch.serialization._get_layout"),
            *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
            *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
            *(
                f"torch._utils._rebuild_{what}"
                for what in ("sparse_tensor", "meta_tensor_no_storage", "nested_tensor", "wrapper_subclass")
            ),
            "torch._utils._rebuild_device_tensor_from_numpy",
        ),
        _is_any,
    ),
}


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise TornPickleError
    return data


def _index(name: str, argument: bytes) -> int:
    try:
        return int.from_bytes(argument, "little") if "BIN" in name else int(argument)
    except ValueError as error:
        raise TornPickleError from error


def _top(stack: list[_Value], marks: list[int]) -> _Value:
    if len(stack) <= (marks[-1] if marks else 0):
        raise TornPickleError
    return stack[-1]


def _pop_tuple(stack: list[_Value], marks: list[int], opcode: str) -> list[_Value]:
    """Take the items of a tuple from the stack."""
    if opcode == "TUPLE" and not marks:
        raise TornPickleError
    first = marks.pop() if opcode == "TUPLE" else len(stack) - (0 if opcode == "EMPTY_TUPLE" else int(opcode[-1]))
    if first < (marks[-1] if marks else 0):
        raise TornPickleError
    items = stack[first:]
    del stack[first:]
    return items


def _pop(stack: list[_Value], marks: list[int], before: list[pickletools.StackObject]) -> list[_Value]:
    """Take from the stack what an opcode takes; return what it took last, which lay below any mark."""
    count = len(before)
    if pickletools.markobject in before:
        if not marks:
            raise TornPickleError
        del stack[marks.pop() :]
        count = before.index(pickletools.markobject)
    first = len(stack) - count
    if first < (marks[-1] if marks else 0):
        raise TornPickleError
    taken = stack[first:]
    del stack[first:]
    return taken


_BUILT_IN = (list, dict, int, float, str, bool, tuple, frozenset, range, slice)
_FACTORIES = (*_BUILT_IN, set, OrderedDict, None)  # of defaultdicts
_FACTORY = "_convsim_factory"  # attribute of an OrderedDict that stands for a defaultdict
_CODES = re.compile(r"b1|[iu][1248]|f[248]|c(?:8|16)|[SU][1-9]\d{0,3}")  # numpy's dtypes of plain values


class RefusedError(ValueError):
    """What looks harmless by its name, but is not plain data."""


class Dtype:
    """A numpy.dtype of plain values."""

    code: Any = None
    order: Any = "|"

    def __init__(self, code: str, *_: object) -> None:
        self.code = code
        self.check()

    def __setstate__(self, state: Any) -> None:
        _, self.order, subdtype, names, fields, *_ = state
        if not (subdtype is names is fields is None):
            raise RefusedError("a numpy.dtype of several fields")
        self.check()

    def check(self) -> None:
        if type(self.code) is not str or not _CODES.fullmatch(self.code):
            raise RefusedError(
                f"numpy.dtype({self.code!r})" if type(self.code) is str else "a numpy.dtype without a code"
            )
        if type(self.order) is not str or self.order not in ("<", ">", "|", "="):
            raise RefusedError("a numpy.dtype of unknown byte order")

    def itemsize(self) -> int:
        return int(self.code[1:]) * (4 if self.code[0] == "U" else 1)

    def real(self) -> Any:
        import numpy

        Dtype.check(self)
        return numpy.dtype(self.code if self.order == "|" else self.order + self.code)


class NumpyScalar:
    """A numpy scalar, by its bytes."""

    dtype: Any = None
    data: Any = None

    def __init__(self, dtype: Dtype, data: bytes) -> None:
        _check(dtype, (), data)
        self.dtype, self.data = dtype, data

    def real(self) -> Any:
        import numpy

        _check(self.dtype, (), self.data)
        return numpy.frombuffer(self.data, Dtype.real(self.dtype))[0]


class NumpyArray:
    """A numpy.ndarray, by its shape and bytes."""

    dtype: Any = None
    shape: Any = None
    data: Any = None
    fortran: Any = False

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state
        _check(self.dtype, self.shape, self.data)

    def real(self) -> Any:
        import numpy

        _check(self.dtype, self.shape, self.data)
        order: Any = "F" if self.fortran is True else "C"
        return numpy.ndarray(self.shape, Dtype.real(self.dtype), self.data, order=order).copy(order)


class HarmlessPickler(pickle.Pickler):
    """A pickler that saves the real objects for their stand-ins."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is OrderedDict and _FACTORY in vars(obj):
            return defaultdict, (_checked_factory(vars(obj)[_FACTORY]),), None, None, iter(obj.items())
        for kind in (Dtype, NumpyScalar, NumpyArray):
            if type(obj) is kind:
                return kind.real(obj).__reduce__()  # of the class: an attribute of the object may hide it
        return NotImplemented


def pickle_module() -> ModuleType:
    """Return Python's pickle module with `HarmlessPickler`, as `torch.save` takes it."""
    module = ModuleType("pickle")
    vars(module).update(vars(pickle), Pickler=HarmlessPickler)
    return module


def harmless_globals() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Return what `torch.serialization.safe_globals` is to allow: (object, the name in pickles)."""
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    allowed += [(Namespace, "argparse.Namespace"), (_default_dict, "collections.defaultdict")]
    allowed += [(PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")]
    allowed += [(kind, f"builtins.{kind.__name__}") for kind in _BUILT_IN]
    allowed += [(_no_bytes, "builtins.bytes")]  # how protocol 2 writes b""
    allowed += [(Dtype, "numpy.dtype"), (NumpyArray, "numpy.ndarray")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(NumpyScalar, f"{module}.scalar"), (_empty_array, f"{module}._reconstruct")]
    return allowed


@cache
def harmless_names() -> frozenset[str]:
    """Return the globals, as pickles spell them, that rebuild plain data whatever they are called with."""
    from torch._weights_only_unpickler import _get_allowed_globals

    ours = {entry[1] for entry in harmless_globals() if isinstance(entry, tuple)}
    arrays = (f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core"))
    return frozenset([*_get_allowed_globals(), *ours, *arrays])


def _default_dict(factory: Any = None) -> OrderedDict[Any, Any]:
    """Return a dictionary that remembers its factory: of a type that torch's unpickler fills with items."""
    found: OrderedDict[Any, Any] = OrderedDict()
    vars(found)[_FACTORY] = _checked_factory(factory)
    return found


def _checked_factory(factory: Any) -> Any:
    if not any(factory is known for known in _FACTORIES):
        raise RefusedError(f"a defaultdict of {(factory if isinstance(factory, type) else type(factory)).__name__}")
    return factory


def _no_bytes() -> bytes:
    return b""


def _empty_array(kind: Any, *_: object) -> NumpyArray:
    if kind is not NumpyArray:
        raise RefusedError("an array of another class than numpy.ndarray")
    return NumpyArray()


def _check(dtype: Any, shape: Any, data: Any) -> None:
    if type(dtype) is not Dtype:
        raise RefusedError("a numpy value without a dtype")
    Dtype.check(dtype)
    plain = type(data) is bytes and type(shape) is tuple and all(type(size) is int and size >= 0 for size in shape)
    if not plain or prod(shape) * Dtype.itemsize(dtype) != len(data):
        raise RefusedError("a numpy value whose bytes do not fit its shape")
