"""`convsim init`: Algorithm 1, or a closed form, on a checkpoint or a fresh network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from convsim_cli.cli.console import Console, shape
from convsim_cli.cli.options import (
    ArchOption,
    CheckpointArgument,
    ClassesOption,
    DataDirOption,
    DeviceOption,
    ExcludeOption,
    GroupsOption,
    IncludeOption,
    JsonOption,
    KeyOption,
    MeanOption,
    ObjectiveOption,
    PretrainedOption,
    QuietOption,
    SeedOption,
    StdOption,
    TransposedOption,
    WideOption,
    name_options,
    parse_groups,
    show_layers,
    show_skipped,
    start,
)

EXAMPLES = """\b
Examples:
 # a fresh network: less similar feature maps, every filter at its norm
 convsim init --arch cnn1 --preserve-norm --probe natural -o model.safetensors
 convsim init model.safetensors              # raw, in place; keeps a .bak
 convsim init model.pth -o new.pth --preserve-norm
 convsim init model.pth --orthogonal         # closed form, no iterations
 convsim init --arch cnn1 -o new.pth --decorrelate cifar10 --data-dir data
 convsim init model.pth --dry-run            # what would be touched
 convsim init a.pth --include 'layer3.*' --groups 'layer3.*.conv2.weight=32'"""


def init(
    context: typer.Context,
    checkpoint: CheckpointArgument = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write there instead of over CHECKPOINT.", show_default=False)
    ] = None,
    arch: ArchOption = None,
    pretrained: PretrainedOption = False,
    num_classes: ClassesOption = None,
    key: KeyOption = None,
    iterations: Annotated[int, typer.Option(help="Optimization steps per layer.", min=0)] = 500,
    lr: Annotated[float, typer.Option(help="Step size, above 0.")] = 0.001,
    optimizer: Annotated[Literal["adam", "sgd"], typer.Option(help="Optimizer of the kernels.")] = "adam",
    preserve_norm: Annotated[
        bool, typer.Option("--preserve-norm", help="Hold every filter at its own L2 norm.")
    ] = False,
    objective: ObjectiveOption = "cs",
    orthogonal: Annotated[
        bool, typer.Option("--orthogonal", help="Orthogonal filters, each at its own norm, in place of Algorithm 1.")
    ] = False,
    decorrelate: Annotated[
        str | None,
        typer.Option(
            "--decorrelate",
            metavar="INPUT",
            help="With --arch: filters whose feature maps on these inputs are uncorrelated, each at its own norm; "
            "alone, or with --preserve-norm after Algorithm 1. INPUT as in measure; of a data set, training images.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="--decorrelate: number of inputs.", min=1)] = 256,
    side: Annotated[
        int | None,
        typer.Option(
            "--input-size",
            help="--decorrelate: pixels along each axis of an input: 32 unless given, 224 with an --arch that is not "
            "built in.",
            min=1,
            show_default=False,
        ),
    ] = None,
    input_channels: Annotated[
        int | None,
        typer.Option(
            "--input-channels",
            metavar="N",
            help="--decorrelate: channels of a synthetic input; found by a dry run of the network unless given.",
            min=1,
        ),
    ] = None,
    data_dir: DataDirOption = Path("data"),
    mean: MeanOption = None,
    std: StdOption = None,
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
    force: Annotated[bool, typer.Option("--force", help="Also overwrite read-only and shared files.")] = False,
    recover: Annotated[
        bool, typer.Option("--recover", help="Complete an interrupted save of CHECKPOINT, and do nothing else.")
    ] = False,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    wide: WideOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Lower the similarity of a network's feature maps by its kernels alone, before training (Algorithm 1).

    The paper's objective mostly shrinks the filters. With --preserve-norm every filter keeps its norm, and only their
    similarity changes; --orthogonal and --decorrelate are closed forms that do so without iterations. This is for
    weights before training: a trained network loses what it has learned.
    """
    from convsim_cli.checkpoint_init import minimize_checkpoint
    from convsim_cli.device import return_freed_memory
    from convsim_cli.inputs.images import parse_channels

    console = Console(quiet, as_json, wide)
    if recover:
        return _recover(context, checkpoint, console)
    return_freed_memory()
    minimized = minimize_checkpoint(
        checkpoint,
        output,
        iterations=iterations,
        lr=lr,
        optimizer=optimizer,
        preserve_norm=preserve_norm,
        objective=objective,
        orthogonal=orthogonal,
        decorrelate=decorrelate,
        samples=samples,
        side=side,
        input_channels=input_channels,
        data_dir=data_dir,
        mean=parse_channels("mean", mean),
        std=parse_channels("std", std),
        backup=not no_backup,
        force=force,
        dry_run=dry_run,
        include=include,
        exclude=exclude,
        groups=parse_groups(groups),
        transposed=transposed,
        arch=arch,
        pretrained=pretrained,
        num_classes=num_classes,
        key=key,
        probe=probe,
        seed=seed,
        device=start(device, console),
        progress=console.progress,
    )
    content = minimized.document()
    content["skipped"] = name_options(content["skipped"], context.command)
    document = console.document("init", content)
    if not as_json:
        _show(document, console)


def _recover(context: typer.Context, checkpoint: Path | None, console: Console) -> None:
    from convsim_cli.checkpoints.atomic import finish_saves
    from convsim_cli.errors import CheckpointError, InputError

    if checkpoint is None:
        raise InputError("`recover` requires a `checkpoint`")
    for name in context.params.keys() - {"checkpoint", "recover", "as_json", "quiet", "wide"}:
        source = context.get_parameter_source(name)
        if source and source.name == "COMMANDLINE":
            raise InputError(f"`recover` only completes an interrupted save; leave out `{name}`")
    moved = finish_saves(checkpoint, strict=True)
    if not moved and not checkpoint.exists():
        raise CheckpointError(f"{checkpoint}: no such file")
    recovered = [str(folder / name) for folder, names in moved.items() for name in names]
    console.document("init", {"checkpoint": str(checkpoint), "recovered": recovered})
    for folder, names in moved.items():
        console.note(f"completed an interrupted save to {folder}: moved {', '.join(names)}")
    if not moved:
        console.note(f"{checkpoint}: no save was interrupted; nothing to do")


def _least(preserve_norm: bool, probed: bool) -> list[str | tuple[str, ...]]:
    """The columns that a narrow terminal does without: those that `init` changed least go first."""
    pairs = {key: (f"{key}_before", f"{key}_after") for key in ("ncs", "norm", "cs")}
    order = ("norm", "cs", "ncs") if preserve_norm else ("ncs", "norm", "cs")
    return ["shape", *(pairs[key] for key in order[: 3 if probed else 2])]


def _show(content: dict[str, Any], console: Console) -> None:
    layers, when = content["layers"], list(content["total"])
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
    show_layers(columns, rows, _least(content["preserve_norm"], "fm_cos" in keys), console)
    show_skipped(content["skipped"], len(layers), "can be optimized", console)
    total = content["total"]
    if "after" not in total:
        return console.note(f"L_CS {total['before']:.4g}; a dry run: nothing was written")
    console.note(
        f"L_CS {total['before']:.4g} → {total['after']:.4g} ({content['objective']}), {content['seconds']:.1f} s"
    )
    backup = f"; the former file is {content['backup']}" if content["backup"] else ""
    console.note(f"wrote {content['output']}{backup}")
