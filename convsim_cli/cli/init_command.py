"""`convsim init`: a method on a checkpoint or a fresh network."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from convsim_cli.checkpoints.formats import check_exists, is_on_hub
from convsim_cli.cli.console import Console, shape
from convsim_cli.cli.options import (
    CheckpointArgument,
    JsonOption,
    QuietOption,
    WideOption,
    add_options,
    choose_device,
    name_options,
    parse_options,
    show_cs,
    show_layers,
    show_skipped,
    typed,
)
from convsim_cli.errors import CheckpointError, InputError, quoted, some_of
from convsim_cli.settings import InitOptions

EXAMPLES = """\b
Examples:
 # a fresh network: less similar feature maps, norms unchanged
 convsim init --arch cnn1 --preserve-norm --probe natural -o model.safetensors
 convsim init model.safetensors              # in place; keeps a .bak
 convsim init model.pth -o new.pth --method orthogonal   # no iterations
 convsim init --arch cnn1 -o new.pth --method decorrelate --input cifar10
 convsim init model.pth --dry-run            # what would change
 convsim init a.pth --include 'layer3.*' --groups 'layer3.*.conv2.weight=32'"""


@add_options(InitOptions, rare=("recover", "wide", "quiet"))
def init(
    context: typer.Context,
    checkpoint: CheckpointArgument = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Output file; without it, CHECKPOINT is overwritten.",
            show_default=False,
            rich_help_panel="Saving",
        ),
    ] = None,
    recover: Annotated[
        bool,
        typer.Option(
            "--recover",
            help="Only complete an interrupted save of CHECKPOINT.",
            rich_help_panel="Saving",
        ),
    ] = False,
    wide: WideOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **arguments: Any,
) -> None:
    """Reduce the similarity of a network's feature maps by changing its kernels, before training (Algorithm 1).

    The paper's objective, cs, mostly shrinks the filters; with --preserve-norm every filter keeps its norm. A trained
    network loses its accuracy.
    """
    console = Console(quiet, as_json, wide)
    if recover:
        return _recover(context, checkpoint, console)
    options = parse_options(arguments)
    InitOptions(**options).check()
    if checkpoint is not None:
        check_exists(checkpoint, for_writing=not options["dry_run"])
    from convsim_cli.checkpoint_init import init_checkpoint  # it imports torch, which takes seconds
    from convsim_cli.device import return_freed_memory

    return_freed_memory()
    options["device"] = str(choose_device(options["device"], console))
    with redirect_stdout(sys.stderr):  # a network may print
        report = init_checkpoint(checkpoint, output, progress=console.progress, **options)
    content = report.document()
    content["skipped"] = name_options(content["skipped"], context.command)
    document = console.document("init", content)
    if not as_json:
        _show(document, options["probe"], console)


def _recover(context: typer.Context, name: str | None, console: Console) -> None:
    from convsim_cli.checkpoints.atomic import finish_saves

    if name is None or is_on_hub(name):
        raise InputError(f"`recover` requires a local `checkpoint`{f', got {name}' if name else ''}")
    checkpoint = Path(name)
    for option in typed(context).keys() - {"checkpoint", "recover", "as_json", "quiet", "wide"}:
        raise InputError(f"`recover` only completes an interrupted save; remove `{option}`")
    moved = finish_saves(checkpoint, strict=True)
    if not moved and not checkpoint.exists():
        raise CheckpointError(f"{checkpoint}: no such file")
    recovered = [str(folder / name) for folder, names in moved.items() for name in names]
    console.document("init", {"checkpoint": str(checkpoint), "recovered": recovered})
    for folder, names in moved.items():
        console.note(f"completed an interrupted save to {folder}: moved {', '.join(names)}")
    if not moved:
        console.note(f"{checkpoint}: no interrupted save; nothing to do")


def _least(preserve_norm: bool, probed: bool) -> list[str | tuple[str, ...]]:
    """The columns that a narrow terminal does without: those that `init` changed least go first."""
    pairs = {key: (f"{key}_before", f"{key}_after") for key in ("ncs", "norm", "cs")}
    order = ("norm", "cs", "ncs") if preserve_norm else ("ncs", "norm", "cs")
    return ["shape", *(pairs[key] for key in order[: 3 if probed else 2])]


def _show(content: dict[str, Any], probe: str | None, console: Console) -> None:
    layers, when = content["layers"], list(content["total"])
    keys = [key for key in ("cs", "ncs", "norm", "fm_corr") if any(key in layer["before"] for layer in layers)]
    columns = ["name", "shape", "groups", "assumed", *(f"{key}_{moment}" for key in keys for moment in when)]
    rows = [
        [
            layer["name"],
            shape(layer["shape"]),
            layer["groups"],
            layer["assumed"],
            *(layer[m][k] for k in keys for m in when),
        ]
        for layer in layers
    ]
    show_layers(columns, rows, _least(content["preserve_norm"], "fm_corr" in keys), console)
    show_skipped(content["skipped"], len(layers), "can be optimized", console)
    total = content["total"]
    if "after" not in total:
        return console.note(f"L_CS {show_cs(total['before'])}; dry run, nothing was written")
    norms = "norms kept" if content["preserve_norm"] else "raw"
    change = f"{show_cs(total['before'])} → {show_cs(total['after'])}"
    if content["lr"] is not None:
        console.note(f"L_CS {change} ({content['method']}, {norms}), {content['seconds']:.1f} s")
    else:  # a closed form
        hint = "" if "fm_corr" in keys else "; --probe natural shows fm_corr"
        what = f"{content['method']}, {norms}, {content['seconds']:.1f} s"
        console.note(f"{what}; it does not minimize L_CS ({change}){hint}")
    others: dict[str, list[str]] = {}
    for layer in layers:
        if layer.get("method", content["method"]) != content["method"]:
            others.setdefault(layer["method"], []).append(layer["name"])
    for method, names in others.items():
        console.note(f"{method} instead of {content['method']}: {some_of(names)}")
    backup = f"; the original is kept in {content['backup']}" if content["backup"] else ""
    console.note(f"wrote {content['output']}{backup}")
    inputs = f" --input {probe}" if probe else ""
    console.note(f"next: convsim measure {quoted(content['output'])}{inputs}")
    reasons = [entry["reason"] for entry in content["skipped"] if "matched by" not in entry["reason"]]
    if len(reasons) > len(layers):
        pointwise = any(reason.startswith("1×1") for reason in reasons)
        hint = "; 1×1 layers: --method orthogonal or decorrelate" * pointwise
        console.note(f"only {len(layers)} of {len(layers) + len(reasons)} layers changed{hint}")
