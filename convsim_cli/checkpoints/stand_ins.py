"""Harmless objects that training code saves beside tensors, and the inert stand-ins that are loaded in their place.

`torch.load(weights_only=True)` refuses everything but tensors and plain containers. A command-line namespace, a path, a
defaultdict and numpy's scalars and arrays are data as well. Stand-ins keep them without calling numpy, which a forged
dtype can crash, and without holding a factory; `HarmlessPickler` saves the real objects again.

A pickle can set any attribute of a stand-in, its class included, so `real` trusts nothing that was checked before.
"""

from __future__ import annotations

import pickle
import re
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from math import prod
from pathlib import PosixPath
from types import ModuleType
from typing import Any

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


def harmless_names() -> set[str]:
    """Return the globals, as pickles spell them, that rebuild plain data whatever they are called with."""
    from torch._weights_only_unpickler import _get_allowed_globals

    ours = {entry[1] for entry in harmless_globals() if isinstance(entry, tuple)}
    return {*_get_allowed_globals(), *ours, *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core"))}


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
