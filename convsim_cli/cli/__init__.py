"""The command line: parse, call one function, show. Nothing here is imported by the rest."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.main import get_command

from convsim_cli import __version__
from convsim_cli.cli.compare_command import compare
from convsim_cli.cli.console import say
from convsim_cli.cli.init_command import init
from convsim_cli.cli.measure_command import measure
from convsim_cli.cli.options import GroupedCommand, explain_usage, with_options
from convsim_cli.cli.plot_command import plot
from convsim_cli.cli.reproduce_command import reproduce
from convsim_cli.cli.train_command import train
from convsim_cli.errors import ConvsimError, ConvsimWarning, RankZeroFailedError, brief, is_out_of_memory

UNUSABLE = (  # numbers of an OSError that another path or other rights help against
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENOENT),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)

SETTINGS = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    context_settings=SETTINGS,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Measure the similarity of a convolutional network's feature maps, and reduce it by changing the kernels.\n\n"
    "L_CS (the figure and method cs) is Convolutional Similarity, Eq. 10 of arXiv:2411.03226: the sum of "
    "squared cross-correlations over all pairs of filters.",
    epilog="""\b
Examples:
 # a fresh network whose feature maps are less similar, in seconds
 convsim init --arch cnn1 --preserve-norm --probe natural -o model.safetensors
 convsim measure model.safetensors           # the similarity of every layer
 convsim train --mode init --data-dir data   # the paper's CNN1 on CIFAR-10
 convsim compare runs                        # means over seeds, differences""",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            torch_version = version("torch")
        except PackageNotFoundError:
            torch_version = "missing"
        typer.echo(f"convsim {__version__} (torch {torch_version})")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the versions of convsim and torch."
        ),
    ] = False,
) -> None:
    """Hold the options that come before a command."""


COMMANDS: dict[Callable[..., None], str] = {
    init: "Make a network's kernels less similar.",
    measure: "Measure similarity, per layer.",
    train: "Train a network; store results and weights.",
    compare: "Compare training runs, averaged over seeds.",
    reproduce: "Repeat the paper's experiments.",
    plot: "Draw the training curves of runs.",
}
SHOWN = 1000  # characters of each end of a message
SPINS = 2000  # of a waiting thread of OpenMP before it sleeps, some tens of microseconds

for command, summary in COMMANDS.items():
    examples = sys.modules[command.__module__].EXAMPLES
    app.command(cls=GroupedCommand, context_settings=SETTINGS, short_help=summary, epilog=examples)(command)


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed while running, 2 bad usage or input, 130 interrupted."""
    share_cores()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where the encoding has no ×
    code = run(sys.argv[1:])
    if code == 130:  # a library's import that was cut short could fail again while the interpreter ends
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def share_cores() -> None:
    """Let waiting OpenMP threads sleep early, unless the user has configured it. Call it before torch is imported.

    By default they spin for milliseconds, on cores that other threads may need.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code.

    Errors and warnings are one line each on stderr; CONVSIM_DEBUG=1 shows tracebacks.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", ConvsimWarning)
        shown = set[str]()
        is_launched = os.environ.get("WORLD_SIZE", "1") != "1" and arguments[:1] == ["train"]
        is_follower = is_launched and os.environ.get("RANK", "0") != "0"  # of several processes, all say the same

        def show_once(message: Warning | str, *_: Any, **__: Any) -> None:  # a run warns of a network more than once
            text = " ".join(str(message).split())
            if text not in shown and not is_follower:
                shown.add(text)
                _show("warning", text, arguments)

        warnings.showwarning = show_once
        try:
            shows_all = arguments[:1] == ["--help-all"]  # of the commands each has its own
            code = app(["--help"] if shows_all else arguments or ["--help"], standalone_mode=False) or 0
        except (KeyboardInterrupt, typer.Abort):
            code = 130
        except (Exception, SystemExit) as error:  # a network's own code may exit
            if os.environ.get("CONVSIM_DEBUG") == "1":
                raise
            said = f": {' '.join(str(error).split())[:300]}" if str(error).strip() else ""
            code, message = 1, f"{type(error).__name__}{said} (CONVSIM_DEBUG=1 shows the traceback)"
            if isinstance(error, ConvsimError):
                code, message = error.exit_code, str(error)
            elif is_out_of_memory(error):
                message = f"not enough memory ({brief(error)}); free some, or use a smaller network, batch or dataset"
            elif isinstance(error, OSError) and error.errno in UNUSABLE and error.filename is not None:
                code, message = 2, f"{error.filename}: cannot be opened ({error.strerror}); choose another path"
            elif hasattr(error, "format_message"):  # a usage error of the parser
                code, message = 2, explain_usage(error, arguments) or "see convsim --help"
            if isinstance(error.__context__, BrokenPipeError):  # of a help page that nobody reads
                code = 0
            elif not isinstance(error, RankZeroFailedError):  # which rank 0 reports
                _show("error", message, arguments)
        if code == 130:  # the parser turns some interruptions into this code by itself
            say("convsim: interrupted")
        return code


def find_command(arguments: list[str]) -> Any:
    """Return the parser's command that a command line invokes, None for none or an unknown one."""
    return get_command(app).commands.get(next(iter(arguments), ""))  # type: ignore[attr-defined]


def _show(kind: str, message: str, arguments: list[str]) -> None:
    if len(message) > 2 * SHOWN:  # a value from a file may have any length
        message = f"{message[:SHOWN]} … {message[-SHOWN:]}"
    say(f"convsim: {kind}: {with_options(message, find_command(arguments))}")
