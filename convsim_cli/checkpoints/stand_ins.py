"""Harmless objects that training code saves beside tensors, and the inert stand-ins that are loaded in their place.

`torch.load(weights_only=True)` refuses everything but tensors and plain containers. A command-line namespace, a path, a
defaultdict and numpy's scalars and arrays are data as well. Stand-ins keep them without calling numpy, which a forged
dtype can crash, and without holding a factory; `HarmlessPickler` saves the real objects again.
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


class Dtype:
    """A numpy.dtype of plain values."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not _CODES.fullmatch(code):
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({code!r})")
        self.code, self.order = code, "|"
        self.bytes = int(code[1:]) * (4 if code[0] == "U" else 1)

    def __setstate__(self, state: Any) -> None:
        _, order, subdtype, names, fields, *_ = state
        if order not in ("<", ">", "|", "=") or (subdtype, names, fields) != (None, None, None):
            raise pickle.UnpicklingError("GLOBAL numpy.dtype")
        self.order = order

    def real(self) -> Any:
        import numpy

        return numpy.dtype(self.code if self.order == "|" else self.order + self.code)


class NumpyScalar:
    """A numpy scalar, by its bytes."""

    def __init__(self, dtype: Dtype, data: bytes) -> None:
        _check(dtype, (), data)
        self.dtype, self.data = dtype, data

    def real(self) -> Any:
        import numpy

        return numpy.frombuffer(self.data, self.dtype.real())[0]


class NumpyArray:
    """A numpy.ndarray, by its shape and bytes."""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state
        _check(self.dtype, self.shape, self.data)

    def real(self) -> Any:
        import numpy

        order: Any = "F" if self.fortran else "C"
        return numpy.ndarray(self.shape, self.dtype.real(), self.data, order=order).copy(order)


class HarmlessPickler(pickle.Pickler):
    """A pickler that saves the real objects for their stand-ins."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is OrderedDict and _FACTORY in vars(obj):
            return defaultdict, (_checked_factory(vars(obj)[_FACTORY]),), None, None, iter(obj.items())
        if isinstance(obj, (Dtype, NumpyScalar, NumpyArray)):
            return obj.real().__reduce__()
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


def _default_dict(factory: Any = None) -> OrderedDict[Any, Any]:
    """Return a dictionary that remembers its factory: of a type that torch's unpickler fills with items."""
    found: OrderedDict[Any, Any] = OrderedDict()
    vars(found)[_FACTORY] = _checked_factory(factory)
    return found


def _checked_factory(factory: Any) -> Any:
    if not any(factory is known for known in _FACTORIES):
        raise pickle.UnpicklingError(f"GLOBAL {getattr(factory, '__qualname__', type(factory).__name__)}")
    return factory


def _no_bytes() -> bytes:
    return b""


def _empty_array(kind: Any, *_: object) -> NumpyArray:
    if kind is not NumpyArray:
        raise pickle.UnpicklingError("GLOBAL numpy._reconstruct")
    return NumpyArray()


def _check(dtype: Any, shape: Any, data: Any) -> None:
    whole = isinstance(dtype, Dtype) and isinstance(data, bytes) and isinstance(shape, tuple)
    if not (whole and all(isinstance(size, int) and size >= 0 for size in shape)):
        raise pickle.UnpicklingError("GLOBAL numpy.ndarray")
    if prod(shape) * dtype.bytes != len(data):
        raise pickle.UnpicklingError("a numpy value whose bytes do not fit its shape")
