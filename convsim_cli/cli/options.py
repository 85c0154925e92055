"""The options that several commands share, what they show in the same way, and errors in terms of options.

typer makes a command's options from the signature of its function: an option per parameter, from the type and the
`typer.Option` in its annotation. `with_training_options` adds an option for each declared argument of a run to that
signature. The library's messages name arguments, and the parser's are typer's own: `with_options` and `explain_usage`
name the option, the value and what was expected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from inspect import Parameter, Signature, signature
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

from convsim_cli.checkpoints.formats import new_suffixes
from convsim_cli.cli.console import Console, Least
from convsim_cli.errors import InputError, one_of
from convsim_cli.training.config import GROUPS, Declaration, declarations, modes_that_take

if TYPE_CHECKING:
    import torch

SKIPPED_LINES, SKIPPED_NAMES = 3, 3  # on the screen, after the headline; names in a line
METAVARS = {int: "N", float: "X"}


def complete_arch(begun: str) -> list[str]:
    """Return the networks whose names begin so; those of a library once its name is typed."""
    names = [name for name in ("cnn1", "cnn2", "cnn:", "resnet18", "torchvision:", "timm:") if name.startswith(begun)]
    if begun.startswith("torchvision:"):
        from torchvision.models import list_models

        names = [f"torchvision:{name}" for name in list_models()]
    return [name for name in names if name.startswith(begun)]


DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", show_default=True)]
SeedOption = Annotated[int, typer.Option("--seed", help="Random seed.", min=0, max=2**32 - 1)]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, in full precision.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print only warnings and errors.")]
WideOption = Annotated[bool, typer.Option("--wide", help="Show all columns.")]

DataDirOption = Annotated[Path, typer.Option("--data-dir", help="Where data sets are, or are downloaded to.")]
RunDirOption = Annotated[Path, typer.Option("--run-dir", help="Where the runs' folders are made.")]
MeanOption = Annotated[
    str | None,
    typer.Option("--mean", metavar="R,G,B", help="Normalize images by this mean (full range 0 to 1), not their own."),
]
StdOption = Annotated[
    str | None, typer.Option("--std", metavar="R,G,B", help="Normalize images by this standard deviation.")
]
LimitTrainOption = Annotated[
    int | None, typer.Option("--limit-train", metavar="N", help="Only the first N training images.", min=1)
]
LimitTestOption = Annotated[
    int | None, typer.Option("--limit-test", metavar="N", help="Only the first N test images.", min=1)
]

IncludeOption = Annotated[
    list[str],
    typer.Option(
        "--include",
        metavar="GLOB",
        help="Only tensors matching GLOB; required for 5-D tensors, and for 3-D beside 4-D.",
    ),
]
ExcludeOption = Annotated[list[str], typer.Option("--exclude", metavar="GLOB", help="Skip tensors matching GLOB.")]
GroupsOption = Annotated[
    list[str], typer.Option("--groups", metavar="GLOB=N", help="Number of groups of matching layers.")
]
TransposedOption = Annotated[
    list[str], typer.Option("--transposed", metavar="GLOB", help="Matching layers are transposed convolutions.")
]

CheckpointArgument = Annotated[
    Path | None,
    typer.Argument(metavar="[CHECKPOINT]", help=f"A {one_of(new_suffixes())} file.", show_default=False),
]
ArchOption = Annotated[
    str | None,
    typer.Option(
        "--arch",
        metavar="NAME",
        help=f"The network: {declarations()['arch'].help}",
        show_default=False,
        autocompletion=complete_arch,
    ),
]
PretrainedOption = Annotated[
    bool, typer.Option("--pretrained", help="With --arch: the weights that torchvision or timm publishes.")
]
ObjectiveOption = Annotated[str, typer.Option("--objective", metavar="NAME", help=declarations()["objective"].help)]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key", metavar="KEY", help="Which of a pickle's nested dictionaries to take, such as ema.state_dict."
    ),
]
ClassesOption = Annotated[
    int | None,
    typer.Option(
        "--num-classes", metavar="N", help="Classes of the --arch network; its own number unless given.", min=1
    ),
]


def start(device: str, console: Console) -> torch.device:
    """Return the device, saying which one `auto` took."""
    from convsim_cli.device import resolve_device

    found = resolve_device(device)
    if device == "auto":
        console.note(f"device: {found}")
    return found


def parse_groups(groups: list[str]) -> dict[str, int]:
    """Return glob → number of groups. Raises InputError for a --groups without a number."""
    parsed = {}
    for item in groups:
        glob, separator, number = item.rpartition("=")
        if not separator or not number.isdecimal() or int(number) < 1:
            raise InputError(f"--groups {item!r}: expected GLOB=N with N ≥ 1, for instance 'layer3.*=32'")
        parsed[glob] = int(number)
    return parsed


def show_layers(columns: list[str], rows: list[list[Any]], least: Least, console: Console) -> None:
    """Print the table of layers, and a note where groups are guesses. least: see `Console.table`."""
    assumed = [row[columns.index("assumed")] for row in rows]
    console.table(columns, rows, ["assumed", "groups", *least], groups=1, assumed=all(assumed))
    if any(assumed):
        which = "groups are" if all(assumed) else "groups marked assumed are"
        console.note(f"{which} assumed from names and shapes; --groups, --transposed or --arch set them right")


def show_skipped(skipped: list[dict[str, Any]], taken: int, what: str, console: Console) -> None:
    """Say how many tensors were taken, and why others were left out: in three lines at most, with some of their names.

    taken: the number of layers; what: what they are, such as "can be optimized". All names are in the JSON document.
    """
    reasons: dict[str, list[str]] = {}
    for entry in skipped:
        reasons.setdefault(entry["reason"], []).append(entry["name"])
    if not reasons:
        return
    console.note(f"{taken} of {taken + len(skipped)} convolution-shaped tensors {what}")
    most_first = sorted(reasons.items(), key=lambda item: -len(item[1]))
    lines = []
    for reason, names in most_first:
        by_user = reason.startswith(("not matched by", "matched by"))  # what the user left out is counted, not listed
        more = f" and {len(names) - SKIPPED_NAMES} more" if len(names) > SKIPPED_NAMES else ""
        listed = "" if by_user else f": {', '.join(names[:SKIPPED_NAMES])}{more}"
        lines.append(f"skipped {len(names)} ({reason}){listed}")
    if len(lines) > SKIPPED_LINES:
        rest = [names for _, names in most_first[SKIPPED_LINES - 1 :]]
        lines[SKIPPED_LINES - 1 :] = [f"skipped {sum(map(len, rest))} for {len(rest)} other reasons (--json lists all)"]
    for line in lines:
        console.note(line)


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
    kind: Any = declaration.types[0]
    is_number_or_word = bool(declaration.choices) and float in declaration.types
    least = declaration.least if kind in (int, float) else None
    if declaration.above is not None:  # typer checks and shows inclusive bounds only: an exclusive one is in the help
        least = declaration.above + 1 if kind is int else None
    option = typer.Option(
        f"--{declaration.name.replace('_', '-')}",
        help=_help(declaration),
        metavar=declaration.metavar or METAVARS.get(kind),
        min=least,
        max=None if declaration.most == inf else declaration.most,
        parser=_number_or_word if is_number_or_word else None,
        show_default=declaration.default is not None,
        rich_help_panel=declaration.group,
        autocompletion=complete_arch if declaration.name == "arch" else None,
    )
    if declaration.choices and not is_number_or_word:
        kind = Literal[tuple(declaration.choices)]
    elif declaration.default is None:
        kind = kind | None
    annotation = Annotated[kind, option]
    return Parameter(declaration.name, Parameter.KEYWORD_ONLY, default=declaration.default, annotation=annotation)


def _number_or_word(text: str) -> float | str:
    """The argument's declaration checks the value later."""
    try:
        return float(text)
    except ValueError:
        return text


def _help(declaration: Declaration) -> str:
    text = declaration.help
    if takers := modes_that_take(declaration.name):
        text = f"{', '.join(takers)}: {text[0].lower()}{text[1:]}"
    if isinstance(declaration.choices, Mapping):  # a table, whose entries explain themselves
        text += f" {'; '.join(f'{name}: {entry.help}' for name, entry in declaration.choices.items())}."
    if float in declaration.types and declaration.above is not None:
        text = f"{text.rstrip('.')}, above {declaration.above}."
    return text


def _heading(parameter: Parameter) -> Any:
    return next((option.rich_help_panel for option in getattr(parameter.annotation, "__metadata__", ())), None)


class GroupedCommand(TyperCommand):
    """A command whose help lists each option under its `rich_help_panel`, and the others under "Options"."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options, in the order in which their headings first occur."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if record := parameter.get_help_record(ctx):
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def with_options(message: str, command: Any) -> str:
    """Return a message of the library with a command's options in place of `arguments` in backticks.

    command: the parser's, None where no command was recognized: names then lose their backticks alone.
    """
    spelled = {}
    for parameter in [] if command is None else command.params:
        is_argument = parameter.param_type_name == "argument"
        spelled[parameter.name.strip("_")] = (
            str(parameter.metavar.strip("[].…")) if is_argument else max(parameter.opts, key=len)
        )
    return re.sub(r"`([a-z_]+)`", lambda found: spelled.get(found[1], found[1]), message)


def name_options(skipped: list[dict[str, Any]], command: Any) -> list[dict[str, Any]]:
    """Return the `skipped` list of a JSON document with options in its reasons (`with_options`)."""
    return [{**entry, "reason": with_options(entry["reason"], command)} for entry in skipped]


def explain_usage(error: Any, arguments: Sequence[str]) -> str:
    """Return a usage error of the parser as a line: the option, the value found, and what was expected."""
    message = " ".join(error.format_message().split())
    parameter = getattr(error, "param", None)
    if parameter is None:
        return message
    value = None  # the last one that was given
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, separator, joined = word.partition("=")
        if name in parameter.opts:
            value = joined if separator else following
    declared = signature(error.ctx.command.callback, eval_str=True).parameters.get(parameter.name)
    expected = _expected(declared.annotation, value) if declared is not None and value is not None else None
    return f"{max(parameter.opts, key=len)} {value}: expected {expected}" if expected else message


def _expected(annotation: Any, value: str) -> str | None:
    """What an option's annotation says against a value, None for nothing."""
    kinds = (annotation.__origin__, *get_args(annotation.__origin__))  # T | None counts as T
    option = annotation.__metadata__[0]
    known = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if known:
        close = get_close_matches(value, known, n=1)
        return one_of(known) + (f"; did you mean {close[0]!r}?" if close else "")
    for kind, name in ((int, "a whole number"), (float, "a number")):
        if kind not in kinds:
            continue
        try:
            number = kind(value)
        except ValueError:
            return name
        if option.min is not None and not number >= option.min:
            return f"{option.min} or more"
        if option.max is not None and not number <= option.max:
            return f"at most {option.max}"
    return None
