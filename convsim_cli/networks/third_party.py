"""Networks of other people by name: torchvision's, timm's, and the user's own by the callable that makes them."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from convsim_cli.errors import ConvsimError, InputError, did_you_mean

LIBRARIES = ("torchvision", "timm")
_AUXILIARY = ("googlenet", "inception_v3")  # give a tuple of logits in training, unless told not to


def find_network(name: str) -> Callable[[int | None], nn.Module] | None:
    """Return what builds a network with so many classes (None: its own number), or None for a name of another kind.

    name: `torchvision:NAME`, `timm:NAME` or `package.module:callable`, imported from the current folder too; the number
    of classes goes to its `num_classes`, where it takes that. Raises InputError, with the closest known name, where
    there is none such, or the library is missing; what builds it raises it where the user's own code fails.
    """
    library, separator, rest = name.partition(":")
    if not separator or not rest:
        return None
    if library == "torchvision":
        return _torchvision(rest)
    if library == "timm":
        return _timm(rest)
    if library == "cnn":
        return None
    return _callable(library, rest)


def _torchvision(name: str) -> Callable[[int | None], nn.Module]:
    from torchvision import models

    try:
        builder = models.get_model_builder(name)
    except ValueError as error:
        raise InputError(f"unknown network torchvision:{name}: {did_you_mean(name, models.list_models())}") from error
    parameters = inspect.signature(builder).parameters
    options: dict[str, Any] = {key: None for key in ("weights", "weights_backbone") if key in parameters}
    if name.removeprefix("quantized_") in _AUXILIARY:
        options["aux_logits"] = False
    return lambda classes: _quietly(builder, options | ({} if classes is None else {"num_classes": classes}))


def _timm(name: str) -> Callable[[int | None], nn.Module]:
    try:
        import timm
    except ImportError as error:
        raise InputError(f"--arch timm:{name} needs timm, which is not installed: pip install timm") from error
    if not timm.is_model(name):
        raise InputError(f"unknown network timm:{name}: {did_you_mean(name, timm.list_models())}")
    return lambda classes: _quietly(
        timm.create_model, {"model_name": name} | ({} if classes is None else {"num_classes": classes})
    )


def _callable(module_name: str, name: str) -> Callable[[int | None], nn.Module]:
    where = f"--arch {module_name}:{name}"
    if module_name.endswith(".py") or "/" in module_name:
        dotted = ".".join(part for part in Path(module_name).with_suffix("").parts if part.isidentifier())
        raise InputError(f"{where}: is a file; write {dotted}:{name}, as Python imports it from here")
    with _users_code(where, f"importing {module_name}"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            _not_found(module_name, name, error)
    make = getattr(module, name, None)
    if not callable(make):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{where}: {module_name} has no callable {name}; {did_you_mean(name, known)}")

    def build(classes: int | None) -> nn.Module:
        with _users_code(where, f"calling {name}"):
            model = _quietly(make, {"num_classes": classes} if classes is not None and _takes_classes(make) else {})
        if not isinstance(model, nn.Module):
            raise InputError(f"{where}: gives a {type(model).__name__}; expected a torch.nn.Module")
        if any(isinstance(parameter, nn.UninitializedParameter) for parameter in model.parameters()):
            raise InputError(f"{where}: has lazy layers without weights; run it on an input once before giving it back")
        return model

    return build


def _not_found(module_name: str, name: str, error: ModuleNotFoundError) -> NoReturn:
    close = get_close_matches(module_name, LIBRARIES, n=1)
    hint = f"did you mean {close[0]}:{name}?" if close else "it is looked for here too"
    raise InputError(f"--arch {module_name}:{name}: cannot import {module_name} ({error}); {hint}") from error


def _takes_classes(make: Callable[..., Any]) -> bool:
    parameters = inspect.signature(make).parameters.values()
    return any(p.name == "num_classes" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _quietly(make: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Build without the notes that libraries give on how they initialize."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(**options)


@contextmanager
def _users_code(where: str, doing: str) -> Iterator[None]:
    """Run what a user has written: it imports from the current folder too, as under `python -m`, and prints on stderr.

    What it raises, whatever that is, becomes one line.
    """
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        with redirect_stdout(sys.stderr):
            yield
    except ConvsimError:
        raise
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: {doing} raised {type(error).__name__}{f': {said}' if said else ''}") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
