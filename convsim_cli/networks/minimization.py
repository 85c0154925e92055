"""Algorithm 1, or a closed form, on a checkpoint file or a new network, with the same safety as `convsim init`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from convsim_cli.checkpoints.minimization import ClosedForm, Method, check_kernels, describe_kernels, write_minimized
from convsim_cli.checkpoints.protection import check_replaceable
from convsim_cli.checkpoints.state_dict import StateDict
from convsim_cli.checkpoints.training_evidence import looks_trained
from convsim_cli.closed_forms import orthogonalize_kernel
from convsim_cli.errors import ConvsimWarning, InputError
from convsim_cli.inputs.images import Channels
from convsim_cli.kernels import Patterns
from convsim_cli.machine.device import resolve_device
from convsim_cli.machine.progress import Progress, unreported
from convsim_cli.measurement.figures import Record
from convsim_cli.minimize import Minimization
from convsim_cli.networks.decorrelation import SAMPLES, decorrelated, decorrelation
from convsim_cli.networks.model_checkpoint import ModelCheckpoint, open_model_checkpoint
from convsim_cli.networks.probe import Probe


@dataclass(frozen=True)
class MinimizedCheckpoint:
    """What `minimize_checkpoint` did.

    checkpoint: None for a new network; output: None for a dry run of one; backup: where the former file was kept, or a
    pattern of the shards' backups; seconds: of the minimization and the save; layers: a record each, with `before` and,
    unless it was a dry run, `after`; skipped: name, shape and reason of each tensor that was left out.
    """

    checkpoint: Path | None
    output: Path | None
    backup: Path | None
    how: Method
    device: torch.device
    seconds: float
    layers: list[Record]
    skipped: list[dict[str, Any]]

    @property
    def total(self) -> dict[str, float]:
        """L_CS summed over the layers, `before` and `after`."""
        moments = [moment for moment in ("before", "after") if any(moment in layer for layer in self.layers)]
        return {moment: sum(layer[moment]["cs"] or 0.0 for layer in self.layers) for moment in moments}

    def document(self) -> dict[str, Any]:
        """Return the content of the JSON document of `convsim init`."""
        return {
            "checkpoint": _text(self.checkpoint),
            "output": _text(self.output),
            "backup": _text(self.backup),
            "objective": self.how.label,
            "preserve_norm": self.how.preserve_norm,
            "iterations": self.how.iterations,
            "lr": self.how.lr,
            "device": str(self.device),
            "seconds": self.seconds,
            "layers": self.layers,
            "skipped": self.skipped,
            "total": self.total,
        }


def minimize_checkpoint(
    path: str | Path | None,
    output: str | Path | None = None,
    *,
    iterations: int = 500,
    lr: float = 1e-3,
    optimizer: Literal["adam", "sgd"] = "adam",
    preserve_norm: bool = False,
    objective: str = "cs",
    tol: float = 0.0,
    orthogonal: bool = False,
    decorrelate: str | None = None,
    samples: int = SAMPLES,
    side: int | None = None,
    input_channels: int | None = None,
    data_dir: str | Path = "data",
    mean: Channels | None = None,
    std: Channels | None = None,
    backup: bool = True,
    force: bool = False,
    dry_run: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    groups: Mapping[str, int] | None = None,
    transposed: Sequence[str] = (),
    arch: str | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    key: str | None = None,
    probe: str | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: Progress = unreported,
) -> MinimizedCheckpoint:
    """Minimize the kernels of a checkpoint (Algorithm 1), or give them a closed form, and save it, atomically.

    path: the checkpoint, a file or a folder of shards; None for a new network, which `arch` names, with `pretrained`
    that of its library. output: where to save; in place if None, which keeps the former file as `path.bak` (`.bak.1`,
    …) unless `backup` is false. force: replace also a file that is read-only or that others share. iterations ≥ 0, lr >
    0, optimizer, preserve_norm, objective, tol ≥ 0: see `Minimization`. orthogonal: orthogonal filters instead, each at
    its own norm, without iterations. decorrelate: filters of uncorrelated feature maps on these inputs, with `arch`;
    alone, or with `preserve_norm` after Algorithm 1. It takes the names of `measure_checkpoint`'s `input`, of a data
    set the first `samples` training images; side, input_channels, data_dir, mean, std: as there. include, exclude,
    groups, transposed: see `Patterns`. key: which dictionary of a pickle to take. probe: adds `fm_cos` to the records,
    on `white`, `uniform` or `natural` inputs drawn with `seed`. dry_run: measures and saves nothing. An interrupted
    save to `path` or `output` is completed first; a dry run refuses one to `path`. Warns, with ConvsimWarning, of a
    checkpoint that looks trained and of choices made in reading it. Raises CheckpointError, InputError, DivergedError
    and WriteError; files are then unchanged.
    """
    how = Minimization(iterations, lr, optimizer, preserve_norm, tol, objective)
    inputs = None
    if decorrelate is not None:
        inputs = Probe(decorrelate, samples, side, Path(data_dir), seed, mean, std, channels=input_channels)
    _check_closed_form(how, orthogonal, inputs, arch, (samples, side, input_channels, mean, std))
    patterns = Patterns(include, exclude, list((groups or {}).items()), transposed)
    if path is None and arch is not None and output is not None:
        StateDict(Path(arch), {}).target_for(Path(output))  # refused before pretrained weights are downloaded
    source = open_model_checkpoint(
        path, arch, patterns, seed, num_classes, key, pretrained=pretrained, for_writing=not dry_run
    )
    if not (orthogonal or inputs):  # the closed forms have something to do also on 1×1 kernels
        source.selection = how.select(source.selection)
    target = _target(source, path, output, dry_run)
    if target is not None and not (force or dry_run):
        check_replaceable(source.checkpoint.replaced_by(target), Path(output or path or target))
    place = resolve_device(device) if isinstance(device, str) else device
    began = time.perf_counter()
    in_place = path is not None and target is not None and source.checkpoint.is_in_place(target)
    kept = source.checkpoint.backup_for(target) if backup and in_place and target else None
    _warn(source, kept)
    method = _method(source, how, orthogonal, inputs, place, progress, dry_run)
    if dry_run or target is None:
        layers = describe_kernels(source.checkpoint, source.selection, probe, seed)
    else:
        layers, kept = _minimize(source, method, target, kept is not None, probe, seed, place, progress)
    given = None if path is None else Path(path)
    return MinimizedCheckpoint(
        given, target, kept, method, place, time.perf_counter() - began, layers, source.skipped()
    )


def _check_closed_form(
    how: Minimization, orthogonal: bool, inputs: Probe | None, arch: str | None, described: tuple[object, ...]
) -> None:
    """Raise InputError for arguments that contradict each other, or would have no effect."""
    if inputs is None and described != (SAMPLES, None, None, None, None):
        raise InputError(
            "`samples`, `side`, `input_channels`, `mean` and `std` describe the inputs of `decorrelate`; "
            "name them there"
        )
    if orthogonal and inputs:
        raise InputError("`orthogonal` and `decorrelate` are two closed forms; choose one")
    if inputs and arch is None:
        raise InputError("`decorrelate` requires `arch`: the inputs run through the network")
    name = "orthogonal" if orthogonal else "decorrelate"
    if (orthogonal or (inputs and not how.preserve_norm)) and how != Minimization():
        after = "" if orthogonal else "; with `preserve_norm` it follows Algorithm 1"
        raise InputError(f"`{name}` is a closed form: the settings of Algorithm 1 have no effect on it{after}")


def _method(
    source: ModelCheckpoint,
    how: Minimization,
    orthogonal: bool,
    inputs: Probe | None,
    device: torch.device,
    progress: Progress,
    dry_run: bool,
) -> Method:
    """What to do to the kernels. Decorrelation is computed here: it needs the whole network."""
    if orthogonal:
        return ClosedForm("orthogonal", orthogonalize_kernel)
    if inputs is None:
        return how
    check_kernels(source.checkpoint, source.selection)
    first = how if how.preserve_norm else None
    return decorrelation(first, {} if dry_run else decorrelated(source, first, inputs, device, progress))


def _target(source: ModelCheckpoint, path: str | Path | None, output: str | Path | None, dry_run: bool) -> Path | None:
    if output is not None:
        return source.checkpoint.target_for(Path(output))
    if path is None and not dry_run:
        raise InputError("`arch` creates a new network; `output` is required")
    return None if path is None else source.checkpoint.path


def _warn(source: ModelCheckpoint, backup: Path | None) -> None:
    """Warn of weights that look trained, and of what a reader of the file had to choose between."""
    if looks_trained(source.checkpoint):
        kept = f"; {backup} keeps the old ones" if backup else ""
        message = (
            f"{source.checkpoint.path} looks trained, and Algorithm 1 is for weights before training: until it is "
            f"trained again, the network will have lost what it learned{kept}"
        )
        warnings.warn(message, ConvsimWarning, stacklevel=3)
    for note in source.checkpoint.notes:
        warnings.warn(note, ConvsimWarning, stacklevel=3)


def _minimize(
    source: ModelCheckpoint,
    how: Method,
    target: Path,
    backup: bool,
    probe: str | None,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> tuple[list[Record], Path | None]:
    kernels = source.selection.kernels
    with progress("init", how.steps(kernels) if isinstance(how, Minimization) else len(kernels)) as advance:
        return write_minimized(
            source.checkpoint,
            source.selection,
            how,
            target,
            aliases=source.aliases,
            backup=backup,
            probe=probe,
            seed=seed,
            device=device,
            advance=advance,
        )


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
