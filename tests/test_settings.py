"""An option is declared once: the command, the library call of its name, and their checks agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from inspect import Parameter, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import torch
from conftest import Convsim
from safetensors.torch import save_file
from typer.main import get_command

from convsim_cli import init_checkpoint, measure_checkpoint
from convsim_cli.cli import app
from convsim_cli.errors import InputError
from convsim_cli.inputs.datasets import DATASETS
from convsim_cli.measurement.synthetic import PROBES
from convsim_cli.methods import METHODS, OBJECTIVE_NAMES
from convsim_cli.objectives import OBJECTIVES
from convsim_cli.settings import DATA, INPUTS, Declaration, InitOptions, MeasureOptions, declarations
from convsim_cli.training.config import Arguments

Call = tuple[str, Callable[..., Any], type]
CALLS: tuple[Call, ...] = (
    ("init", init_checkpoint, InitOptions),
    ("measure", measure_checkpoint, MeasureOptions),
)
TEXT = (str, list)  # how the command line gives lists, dictionaries and colours


def test_inputs_are_the_synthetic_ones_and_the_data_sets() -> None:
    assert (*PROBES, *DATASETS) == INPUTS
    assert (*DATASETS,) == DATA


def test_the_methods_that_iterate_are_the_objectives() -> None:
    assert tuple(OBJECTIVES) == OBJECTIVE_NAMES
    assert [name for name, method in METHODS.items() if method.iterates] == [*OBJECTIVES]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_the_library_call_has_the_options_of_the_command(call: Call) -> None:
    name, function, options = call
    keywords = [one for one in signature(function).parameters.values() if one.kind is Parameter.KEYWORD_ONLY]
    declared = [Parameter(one.name, Parameter.KEYWORD_ONLY, default=one.default) for one in fields(options)]
    found = [one.replace(annotation=Parameter.empty) for one in keywords if one.name != "progress"]
    assert found == declared
    assert [one.annotation for one in keywords if one.name != "progress"] == [one.type for one in fields(options)]
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    parser, shown = {one.name: one for one in command.params}, signature(command.callback).parameters
    for one in declarations(options).values():
        option = parser[one.name]
        assert option.opts == [f"--{one.name.replace('_', '-')}"]
        assert option.help.startswith(one.help.partition(". ")[0].rstrip("."))
        assert option.default == one.default or (option.default, one.default) in (([], ()), ([], None))
        kind = shown[one.name].annotation.__origin__
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        text = TEXT if {Sequence, Mapping, tuple} & {*one.types} else ()
        assert {get_origin(kind) or kind for kind in kinds} <= {*one.types, *text, Literal, NoneType}, one.name
        assert option.multiple == bool({Sequence, Mapping} & {*one.types})


def wrong(declaration: Declaration) -> object:
    """A value that a declaration refuses, None where there is none of its type."""
    kinds = set(declaration.types)
    if kinds & {int, float}:
        return declaration.least - 1 if declaration.above is None else declaration.above
    return "nonsense" if declaration.choices else None


@pytest.mark.parametrize(
    ("call", "name"),
    [(call, name) for call in CALLS for name, one in declarations(call[2]).items() if wrong(one) is not None],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_the_library_call_and_the_command_refuse_the_same_values(
    call: Call, name: str, tmp_path: Path, convsim: Convsim
) -> None:
    command, function, options = call
    save_file({"a.weight": torch.randn(4, 3, 3, 3)}, tmp_path / "m.safetensors")
    before, value = (tmp_path / "m.safetensors").read_bytes(), wrong(declarations(options)[name])
    with pytest.raises(InputError, match=f"`{name}` {value}: expected "):
        function(tmp_path / "m.safetensors", **{name: value})
    option = f"--{name.replace('_', '-')}"
    failed = convsim(command, tmp_path / "m.safetensors", option, value)
    assert failed.code == 2
    assert failed.error.startswith(f"convsim: error: {option} {value}")
    assert ": expected " in failed.error
    assert (tmp_path / "m.safetensors").read_bytes() == before


@pytest.mark.parametrize("options", [InitOptions, MeasureOptions, Arguments])
def test_a_value_of_another_type_is_refused_with_the_one_that_is_meant(options: type) -> None:
    for name, one in declarations(options).items():
        other: object = "much" if {int, float, bool} & set(one.types) else 3
        with pytest.raises(InputError, match=f"`{name}` {other}: expected "):
            options(**{name: other}).check()
        if bool not in one.types:
            with pytest.raises(InputError, match=f"`{name}` True: expected "):
                options(**{name: True}).check()


@pytest.mark.parametrize("options", [InitOptions, MeasureOptions, Arguments])
def test_the_defaults_pass_their_own_checks(options: type) -> None:
    options().check()
    for one in declarations(options).values():
        assert one.has_type(one.default)
        assert one.help.endswith(".")


def test_a_number_that_is_not_finite_is_named_so() -> None:
    for value in (float("inf"), float("nan")):
        with pytest.raises(InputError, match=f"`lr` {value}: expected a finite number above 0"):
            Arguments(lr=value).check()
