"""The options of `convsim train` that are arguments of a run, made from their declarations.

typer reads a command's options from the signature of its function: a parameter per option, with the type and the
`typer.Option` in its annotation. `with_training_options` adds a parameter per declared argument to that signature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature, signature
from math import inf
from typing import Annotated, Any, Literal

import typer

from convsim_cli.cli.options import complete_arch
from convsim_cli.training.arguments import GROUPS, Declaration, declarations
from convsim_cli.training.modes import modes_that_take

_METAVARS = {int: "N", float: "X"}


def with_training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command that takes `**arguments`: each declared argument becomes an option, and one of its keys.

    Options are ordered by the heading that the help shows them under; the command's own options without a heading
    come last.
    """
    own = [item for item in signature(command, eval_str=True).parameters.values() if item.kind != Parameter.VAR_KEYWORD]
    made = [_parameter(declaration) for declaration in declarations().values() if declaration.group]
    place = {group: number for number, group in enumerate(GROUPS)}
    ordered = sorted([*made, *own], key=lambda item: (item.kind, place.get(_heading(item), len(place))))
    command.__signature__ = Signature(ordered)  # type: ignore[attr-defined]
    return command


def _parameter(declaration: Declaration) -> Parameter:
    option = typer.Option(
        f"--{declaration.name.replace('_', '-')}",
        help=_help(declaration),
        metavar=declaration.metavar or _METAVARS.get(declaration.types[0]),
        min=_least(declaration),
        max=None if declaration.most == inf else declaration.most,
        parser=_number_or_word if _is_number_or_word(declaration) else None,
        show_default=declaration.default is not None,
        rich_help_panel=declaration.group,
        autocompletion=complete_arch if declaration.name == "arch" else None,
    )
    annotation = Annotated[_type(declaration), option]  # type: ignore[valid-type]
    return Parameter(declaration.name, Parameter.KEYWORD_ONLY, default=declaration.default, annotation=annotation)


def _type(declaration: Declaration) -> Any:
    if declaration.choices and not _is_number_or_word(declaration):
        return Literal[tuple(declaration.choices)]
    kind: Any = declaration.types[0]
    return kind | None if declaration.default is None else kind


def _is_number_or_word(declaration: Declaration) -> bool:
    return bool(declaration.choices) and float in declaration.types


def _number_or_word(text: str) -> float | str:
    """The argument's declaration checks the value later."""
    try:
        return float(text)
    except ValueError:
        return text


def _least(declaration: Declaration) -> float | None:
    """The inclusive lower bound, which typer checks and shows. It has no exclusive one: that stands in the help."""
    kind = declaration.types[0]
    if declaration.above is None:
        return declaration.least if kind in (int, float) else None
    return declaration.above + 1 if kind is int else None


def _help(declaration: Declaration) -> str:
    takers = modes_that_take(declaration.name)
    text = declaration.help
    if takers:
        text = f"{', '.join(takers)}: {text[0].lower()}{text[1:]}"
    if isinstance(declaration.choices, Mapping):  # a table, whose entries explain themselves
        text += f" {'; '.join(f'{name}: {entry.help}' for name, entry in declaration.choices.items())}."
    if float in declaration.types and declaration.above is not None:
        text = f"{text.rstrip('.')}, above {declaration.above}."
    return text


def _heading(parameter: Parameter) -> Any:
    return next((option.rich_help_panel for option in getattr(parameter.annotation, "__metadata__", ())), None)
