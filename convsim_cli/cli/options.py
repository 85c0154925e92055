"""The options of the commands, their help, what several commands show in the same way, and errors in terms of options.

typer makes a command's options from the signature of its function: an option per parameter, from the type and the
`typer.Option` in its annotation. `add_options` adds an option for each declared field (`settings`) to that signature.
The library's messages name arguments, and the parser's are typer's own: `with_options` and `explain_usage` name the
option, the value and what was expected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from math import inf
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

from convsim_cli.checkpoints.formats import HUB_FORM, new_suffixes
from convsim_cli.cli.console import Console, Least
from convsim_cli.errors import InputError, one_of, some_of
from convsim_cli.settings import Declaration, declarations

if TYPE_CHECKING:
    import torch

SKIPPED_LINES = 3  # on the screen, after the headline
OUTPUT = "Output"  # the heading of --json and its like
MOST_SEEDS = 10_000  # of one command: more would only be a mistyped number
HEADINGS = (  # in the order of the help
    *("Arguments", "Options", "Method", "Network", "Recipe", "Layers", "Inputs", "Data", "Figures", "Saving", "Run"),
    *(OUTPUT, "Help"),
)
GONE: dict[str, dict[str, str]] = {  # by command: an option of former versions, and what to type now
    "init": {
        "--objective": "--method NAME",
        "--orthogonal": "--method orthogonal",
        "--decorrelate": "--method decorrelate --input INPUT",
    },
    "train": {"--pairs": "--objective NAME"},
}


def completer(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a function that returns the names with a given prefix."""

    def complete(begun: str) -> list[str]:
        return [name for name in names if name.startswith(begun)]

    return complete


def complete_arch(begun: str) -> list[str]:
    """Return the network names with this prefix; those of a library once its name is typed."""
    names = ["cnn1", "cnn2", "cnn:", "resnet18", "torchvision:", "timm:"]
    if begun.startswith("torchvision:"):
        from torchvision.models import list_models

        names = [f"torchvision:{name}" for name in list_models()]
    return completer(names)(begun)


DeviceOption = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel="Run")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document. In full precision.", rich_help_panel=OUTPUT)
]
QuietOption = Annotated[
    bool, typer.Option("-q", "--quiet", help="Print only warnings and errors.", rich_help_panel=OUTPUT)
]
WideOption = Annotated[bool, typer.Option("--wide", help="Show all columns.", rich_help_panel=OUTPUT)]
CheckpointArgument = Annotated[
    str | None,  # no Path, which would take a slash from hf://
    typer.Argument(metavar="CHECKPOINT", help=f"A {one_of(new_suffixes())} file, or {HUB_FORM}.", show_default=False),
]


def add_options(
    options: type | None = None,
    *,
    only: Collection[str] = (),
    rare: Collection[str] = (),
    tables: Mapping[str, Mapping[str, str]] = {},
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command: each declared field of a dataclass becomes an option, and a key of its `**arguments`.

    only: the fields, all for none. `--help` shows the common options alone; rare: the names of the command's own
    parameters that are not common. tables: heading → name → meaning, which `--help-all` shows after the options.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        shown = signature(command, eval_str=True)
        own = [one for one in shown.parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
        fields = declarations(options).values() if options else ()
        declared = [one for one in fields if one.group and (not only or one.name in only)]
        made = [_parameter(one) for one in declared]
        everything = Parameter("help_all", Parameter.KEYWORD_ONLY, default=False, annotation=_HelpAll)

        @wraps(command)
        def called(**arguments: Any) -> None:
            command(**{name: value for name, value in arguments.items() if name != "help_all"})

        called.__signature__ = shown.replace(  # type: ignore[attr-defined]
            parameters=[*sorted([*own, *made], key=lambda one: one.kind), everything]
        )
        explained = {f"--{one.name}": one.choices for one in declared if isinstance(one.choices, Mapping)}
        called.tables = {  # type: ignore[attr-defined]
            **{option: {name: entry.meaning for name, entry in table.items()} for option, table in explained.items()},
            **tables,
        }
        called.rare = {*rare, *(one.name for one in declared if not one.common)}  # type: ignore[attr-defined]
        return called

    return decorate


def _show_help_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        context.meta["help_all"] = True
        typer.echo(context.get_help())
        raise typer.Exit


_HelpAll = Annotated[
    bool,
    typer.Option(
        "--help-all",
        is_eager=True,
        expose_value=False,
        callback=_show_help_all,
        help="Show all options with their full help, and exit.",
    ),
]


def _parameter(declaration: Declaration) -> Parameter:
    kind: Any = declaration.types[0]
    is_number_or_word = float in declaration.types and bool(declaration.choices)
    least = declaration.least if kind in (int, float) else None
    if declaration.above is not None:  # typer checks and shows inclusive bounds only: an exclusive one is in the help
        least = declaration.above + 1 if kind is int else None
    help, known = declaration.help, declaration.known or declaration.choices
    completion: Callable[[str], list[str]] | None = None
    if isinstance(declaration.choices, Mapping):  # `--help-all` explains the entries of such a table
        first, _, more = help.partition(". ")
        help = f"{first.rstrip('.')}: {', '.join(declaration.choices)}. {more}".rstrip()
    if declaration.name == "arch":
        completion = complete_arch
    elif known and declaration.metavar:
        completion = completer(list(known))
    if float in declaration.types and declaration.above is not None:
        help = f"{help} Above {declaration.above:g}."
    option = typer.Option(
        f"--{declaration.name.replace('_', '-')}",
        help=help,
        metavar=declaration.metavar,
        min=least,
        max=None if declaration.most == inf else declaration.most,
        parser=_number_or_word if is_number_or_word else None,
        show_default=declaration.default not in (None, ()),
        rich_help_panel=declaration.group,
        autocompletion=completion,
    )
    default = declaration.default
    if kind in (Sequence, Mapping):
        kind, default = list[str], []
    elif declaration.choices and not declaration.metavar:
        kind = Literal[tuple(declaration.choices)]
    elif kind is tuple:
        kind = str | None
    elif default is None:
        kind = kind | None
    return Parameter(declaration.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _number_or_word(text: str) -> float | str:
    """The declaration checks the value later."""
    try:
        return float(text)
    except ValueError:
        return text


def parse_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the parser gives as text in the types of their declarations. Raises InputError."""
    parsed: dict[str, Any] = {}
    for name in ("mean", "std"):
        if arguments[name] is not None:
            from convsim_cli.inputs.images import parse_channels

            parsed[name] = parse_channels(name, arguments[name])
    return {**arguments, **parsed, "groups": parse_groups(arguments["groups"])}


def typed(context: typer.Context) -> dict[str, Any]:
    """Return the options that were given on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name: context.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def choose_device(device: str, console: Console) -> torch.device:
    """Return the device; print the one that `auto` chose."""
    from convsim_cli.device import resolve_device

    found = resolve_device(device)
    if device == "auto":
        console.note(f"device: {found}")
    return found


def parse_groups(groups: list[str]) -> dict[str, int]:
    """Return glob → number of groups. Raises InputError for a --groups without a number, and for two of one glob."""
    parsed: dict[str, int] = {}
    for item in groups:
        glob, separator, number = item.rpartition("=")
        usable = separator and number.isdecimal() and len(number) < 20  # int() refuses thousands of digits
        if not usable or int(number) < 1:
            raise InputError(f"--groups {item!r}: expected GLOB=N with N ≥ 1, for instance 'layer3.*=32'")
        if parsed.setdefault(glob, int(number)) != int(number):
            raise InputError(f"--groups {item!r}: the same glob has {parsed[glob]} groups above; remove one of them")
    return parsed


def show_layers(columns: list[str], rows: list[list[Any]], least: Least, console: Console, above: int = 1) -> None:
    """Print the table of layers, and a note if groups are guessed. least, above: see `Console.table`."""
    assumed = [row[columns.index("assumed")] for row in rows]
    console.table(columns, rows, ["assumed", "groups", *least], above, groups=1, assumed=all(assumed))
    if any(assumed):
        names = [row[columns.index("name")] for row in rows if row[columns.index("assumed")]]
        which = "groups are" if all(assumed) else f"groups of {some_of(names)} are"
        console.note(f"{which} assumed from names and shapes; correct them with --groups, --transposed or --arch")


def show_cs(total: float | None) -> str:
    """Return a sum of L_CS as a note shows it."""
    return "beyond float64" if total is None else f"{total:.4g}"


def show_skipped(skipped: list[dict[str, Any]], taken: int, what: str, console: Console) -> None:
    """Print how many tensors were used, and why others were skipped: in at most three lines, with some of their names.

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
        listed = "" if by_user else f": {some_of(names)}"
        lines.append(f"skipped {len(names)} ({reason}){listed}")
    if len(lines) > SKIPPED_LINES:
        rest = [names for _, names in most_first[SKIPPED_LINES - 1 :]]
        lines[SKIPPED_LINES - 1 :] = [f"skipped {sum(map(len, rest))} for {len(rest)} other reasons (--json lists all)"]
    for line in lines:
        console.note(line)


def _shortened(name: str, text: str) -> tuple[str, str]:
    """An option and the first sentence of its help, with its default."""
    text, _, extra = text.partition("  [")
    default = re.search(r"default: \(?([^;\])]+)", extra)
    sentence = text.partition(". ")[0].rstrip(".")
    return name, f"{sentence} [{default[1]}]" if default else sentence


class GroupedCommand(TyperCommand):
    """A command whose help fits on one screen: summary, examples and common options.

    `--help-all` shows every option, under its `rich_help_panel` as the heading.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help: examples before options."""
        everything = ctx.meta.get("help_all", False)
        rare: Collection[str] = () if everything else getattr(self.callback, "rare", ())
        sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in HEADINGS}
        for parameter in self.get_params(ctx):
            record = None if parameter.name in rare else parameter.get_help_record(ctx)
            if record and parameter.param_type_name == "argument":
                sections["Arguments"].append((str(parameter.metavar), record[1]))
            elif record:
                usual = "Help" if parameter.name in ("help", "help_all") else "Options"
                sections[getattr(parameter, "rich_help_panel", None) or usual].append(record)
        if not everything:
            records = [_shortened(*record) for found in sections.values() for record in found]
            more = f", and {len(rare)} more" if rare else ""
            sections = {f"Options (--help-all explains them{more})": records}
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        self.format_epilog(ctx, formatter)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)
        for heading, names in getattr(self.callback, "tables", {}).items() if everything else ():
            width = max(map(len, names))
            with formatter.section(heading):
                for name, text in names.items():  # here names, which may have hyphens, are never broken
                    line, indent = f"  {name:<{width}}  {text}", " " * (width + 4)
                    formatter.write(
                        fill(line, formatter.width, subsequent_indent=indent, break_on_hyphens=False) + "\n"
                    )

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse empty arguments, which a shell passes for unset variables; no option accepts them."""
        takers = {name for one in self.params if not getattr(one, "is_flag", True) for name in one.opts}
        for word, following in zip(["", *args], [*args, None], strict=True):
            if ctx.resilient_parsing:  # a shell asks for completions
                break
            option, joined, value = word.partition("=")
            if following == "" or (joined and not value and option in takers):
                name = option if option in takers else "an argument"
                raise InputError(f"{name} is empty; is a shell variable unset?")
        return super().parse_args(ctx, args)


def with_options(message: str, command: Any) -> str:
    """Return a message of the library with a command's options in place of `arguments` in backticks.

    command: the parser's, None if no command was recognized: names then lose their backticks alone.
    """
    spelled = {}
    for parameter in [] if command is None else command.params:
        is_argument = parameter.param_type_name == "argument"
        spelled[parameter.name.strip("_")] = (
            str(parameter.metavar.strip("[].…")) if is_argument else max(parameter.opts, key=len)
        )
        if is_argument and "CHECKPOINT" in parameter.metavar:
            spelled["path"] = "checkpoint" if parameter.nargs == -1 else "CHECKPOINT"  # as the library calls it
    return re.sub(r"`([a-z_]+)`", lambda found: spelled.get(found[1], found[1]), message)


def name_options(skipped: list[dict[str, Any]], command: Any) -> list[dict[str, Any]]:
    """Return the `skipped` list of a JSON document with options in its reasons (`with_options`)."""
    return [{**entry, "reason": with_options(entry["reason"], command)} for entry in skipped]


def explain_usage(error: Any, arguments: Sequence[str]) -> str:
    """Return a usage error of the parser as a line: the option, the value found, and what was expected."""
    message = " ".join(error.format_message().split())
    parameter, gone = getattr(error, "param", None), getattr(error, "option_name", None)
    if gone in (known := GONE.get(error.ctx.command.name, {}) if error.ctx else {}):
        return f"{gone} was replaced by {known[gone]}"
    commands = getattr(error.ctx.command, "commands", {}) if error.ctx else {}
    given = next((word for word in arguments if word in commands), None)
    if given and any(gone in parameter.opts for parameter in commands[given].params):
        return f"{gone} goes behind the command: convsim {given} {gone}"
    if commands and message.startswith("No such command") and "Did you mean" not in message:
        return f"{message.rstrip('.')}: expected {one_of(commands)}"
    if parameter is None:
        return message
    if message.startswith("Missing argument"):
        return f"{message} See convsim {error.ctx.command.name} --help"
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
