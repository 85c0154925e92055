"""`convsim init`: Algorithm 1 on a checkpoint, or on a fresh network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from convsim_cli.cli.console import Console, shape
from convsim_cli.cli.options import (
    ArchOption,
    CheckpointArgument,
    ClassesOption,
    DeviceOption,
    ExcludeOption,
    GroupsOption,
    IncludeOption,
    JsonOption,
    KeyOption,
    QuietOption,
    SeedOption,
    TransposedOption,
    make_patterns,
    note_choice,
    show_layers,
    show_skipped,
    skipped_entries,
    start,
)

if TYPE_CHECKING:
    import torch

    from convsim_cli.minimize import Minimization
    from convsim_cli.networks.model_checkpoint import Source

EXAMPLES = """\b
Examples:
  convsim init --arch resnet18 -o model.safetensors      # a fresh network
  convsim init model.safetensors                         # in place; keeps model.safetensors.bak
  convsim init model.pth -o new.pth --preserve-norm      # similarity only: every filter keeps its norm
  convsim init model.pth --dry-run --json                # what would be touched, and what skipped
  convsim init model.pth --include 'layer3.*' --groups 'layer3.*.conv2.weight=32'"""


def init(
    checkpoint: CheckpointArgument = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write there instead of over CHECKPOINT.", show_default=False)
    ] = None,
    arch: ArchOption = None,
    num_classes: ClassesOption = None,
    key: KeyOption = None,
    iterations: Annotated[int, typer.Option(help="Optimization steps per layer.", min=0)] = 500,
    lr: Annotated[float, typer.Option(help="Step size, above 0.")] = 0.001,
    optimizer: Annotated[Literal["adam", "sgd"], typer.Option(help="Optimizer of the kernels.")] = "adam",
    preserve_norm: Annotated[
        bool, typer.Option("--preserve-norm", help="Hold every filter at its own L2 norm.")
    ] = False,
    tol: Annotated[
        float, typer.Option(help="Stop a layer when 50 iterations lower its loss by less than this share.", min=0)
    ] = 0.0,
    include: IncludeOption = [],  # noqa: B006
    exclude: ExcludeOption = [],  # noqa: B006
    groups: GroupsOption = [],  # noqa: B006
    transposed: TransposedOption = [],  # noqa: B006
    probe: Annotated[
        Literal["white", "uniform", "natural"] | None,
        typer.Option(help="Also measure fm_cos before and after, on such inputs.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be touched and skipped; write nothing.")
    ] = False,
    no_backup: Annotated[
        bool,
        typer.Option("--no-backup", help="Do not keep the former file as CHECKPOINT.bak (a shard as SHARD.bak)."),
    ] = False,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Lower the similarity of a network's feature maps by its kernels alone, before it is trained (Algorithm 1).

    Without --preserve-norm this is the paper's objective, which mostly shrinks the filters; with it every filter keeps
    its norm and only similarity moves. For weights that are going to be trained: a trained network loses what it has
    learned.
    """
    from convsim_cli.machine.allocator import return_freed_memory
    from convsim_cli.minimize import Minimization
    from convsim_cli.networks.model_checkpoint import open_source

    console = Console(quiet, as_json)
    how = Minimization(iterations, lr, optimizer, preserve_norm, tol)
    source = open_source(checkpoint, arch, make_patterns(include, exclude, groups, transposed), seed, num_classes, key)
    source.selection = how.select(source.selection)
    target = _target(source, checkpoint, output, dry_run)
    place = start(device, console)
    return_freed_memory()
    began = time.perf_counter()
    backup = None if no_backup or checkpoint is None or target is None else source.checkpoint.backup(target)
    _warn(source, backup, console)
    if dry_run:
        layers = _describe(source, probe, seed)
    else:
        layers = _minimize(source, how, target, backup, probe, seed, place, console)
    content = {
        "checkpoint": _text(checkpoint),
        "output": _text(target),
        "backup": _text(backup),
        "objective": how.label,
        "iterations": iterations,
        "lr": lr,
        "device": str(place),
        "seconds": time.perf_counter() - began,
        "layers": layers,
        "skipped": skipped_entries(source.selection),
        "total": {when: sum(layer[when]["cs"] or 0.0 for layer in layers) for when in _moments(layers)},
    }
    console.document("init", content)
    if not as_json:
        _show(content, console)


def _target(source: Source, checkpoint: Path | None, output: Path | None, dry_run: bool) -> Path | None:
    from convsim_cli.errors import InputError

    if output is not None:
        return source.checkpoint.target(output)
    if checkpoint is None and not dry_run:
        raise InputError("--arch makes a fresh network: say with -o where to write it")
    return None if checkpoint is None else source.checkpoint.path


def _warn(source: Source, backup: Path | None, console: Console) -> None:
    if source.checkpoint.looks_trained():
        kept = f"; {backup} keeps the old ones" if backup else ""
        console.warn(
            f"{source.checkpoint.path} looks trained, and init is for weights that are going to be trained: "
            f"evaluated as it is, the network will have lost what it learned{kept}"
        )
    note_choice(source.checkpoint, console)


def _describe(source: Source, probe: str | None, seed: int) -> list[dict[str, Any]]:
    from convsim_cli.checkpoints.minimization import describe_checkpoint

    return describe_checkpoint(source.checkpoint, source.selection, probe, seed)


def _minimize(
    source: Source,
    how: Minimization,
    target: Path | None,
    backup: Path | None,
    probe: str | None,
    seed: int,
    device: torch.device,
    console: Console,
) -> list[dict[str, Any]]:
    from convsim_cli.checkpoints.minimization import minimize_checkpoint

    assert target is not None  # only a dry run does without
    with console.progress("init", how.steps(source.selection.kernels)) as advance:
        return minimize_checkpoint(
            source.checkpoint,
            source.selection,
            how,
            target,
            backup=backup,
            probe=probe,
            seed=seed,
            device=device,
            advance=advance,
        )


def _moments(layers: list[dict[str, Any]]) -> list[str]:
    return ["before", "after"] if any("after" in layer for layer in layers) else ["before"]


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _show(content: dict[str, Any], console: Console) -> None:
    layers, when = content["layers"], _moments(content["layers"])
    keys = [key for key in ("cs", "ncs", "norm", "fm_cos") if any(key in layer["before"] for layer in layers)]
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
    show_layers(columns, rows, console)
    show_skipped(content["skipped"], console)
    total = content["total"]
    if "after" not in total:
        return console.note(f"L_CS {total['before']:.4g}; a dry run: nothing was written")
    console.note(
        f"L_CS {total['before']:.4g} → {total['after']:.4g} ({content['objective']}), {content['seconds']:.1f} s"
    )
    backup = f"; the former file is {content['backup']}" if content["backup"] else ""
    console.note(f"wrote {content['output']}{backup}")
