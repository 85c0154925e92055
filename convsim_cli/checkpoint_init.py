"""`convsim init` as a library call: Algorithm 1, or a closed form, on a checkpoint or a new network, saved atomically.

The kernels are changed one layer at a time, as the checkpoint is written. Decorrelation, which needs the feature maps
of the whole network, runs before, on a copy of the network.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from convsim_cli import __version__
from convsim_cli.checkpoints.base import Checkpoint
from convsim_cli.checkpoints.formats import StateDict, check_replaceable
from convsim_cli.device import Advance, Progress, resolve_device, unreported
from convsim_cli.errors import ConvsimWarning, InputError
from convsim_cli.kernels import Kernel, Patterns, Selection, file_kernels, living_filters, weight_of
from convsim_cli.measurement.figures import Record
from convsim_cli.measurement.kernel_figures import check_finite, compare_weights, describe, measure_weight
from convsim_cli.minimize import Minimization, minimize_kernels
from convsim_cli.networks.load import ModelCheckpoint, open_model_checkpoint

if TYPE_CHECKING:  # what most calls do not need
    from convsim_cli.inputs.images import Channels
    from convsim_cli.measurement.synthetic import LayerProbe
    from convsim_cli.networks.probe import Probe

SAMPLES = 256  # images to decorrelate on, unless given: many times as many values per map as a layer has filters
SPREAD = 3.0  # how many times the spread of independent weights a trained layer's norms have to show
FEWEST = 8  # living filters that a spread is taken of
NEAR_ZERO = 0.35  # share of weights below a tenth of their filter's root mean square: raw Algorithm 1 leaves half


@dataclass(frozen=True)
class Method:
    """What is done to the kernels of a checkpoint.

    label: what reports call it. settings: of Algorithm 1, where it is carried out. closed_form: takes a kernel and its
    weight as stored, and gives the new weight: in place of Algorithm 1 or, with settings, of what follows it.
    """

    label: str
    settings: Minimization | None = None
    closed_form: Callable[[Kernel, Tensor], Tensor] | None = None

    def steps(self, kernels: Sequence[Kernel]) -> int:
        """Return the total that `change` reports: `Minimization.steps`, or one step per layer of a closed form."""
        return self.settings.steps(kernels) if self.settings and not self.closed_form else len(kernels)

    def change(self, layers: Iterable[tuple[Kernel, Tensor]], advance: Advance) -> Iterator[tuple[Tensor, Record]]:
        """Yield each layer's new weight, as stored, on its device, and its record: see `minimize_kernels`."""
        if self.settings and not self.closed_form:
            yield from minimize_kernels(layers, self.settings, advance)
        elif self.closed_form:
            for kernel, weight in layers:
                changed = self.closed_form(kernel, weight)
                yield changed, compare_weights(kernel, weight, changed)
                advance(1)


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
    method: Method
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
        settings = self.method.settings
        return {
            "checkpoint": self.checkpoint and str(self.checkpoint),
            "output": self.output and str(self.output),
            "backup": self.backup and str(self.backup),
            "objective": self.method.label,
            "preserve_norm": settings is None or settings.preserve_norm,
            "iterations": settings.iterations if settings else 0,
            "lr": settings.lr if settings else None,
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
    0, optimizer, preserve_norm, objective: see `Minimization`. orthogonal: orthogonal filters instead, each at
    its own norm, without iterations. decorrelate: filters of uncorrelated feature maps on these inputs, with `arch`;
    alone, or with `preserve_norm` after Algorithm 1. It takes the names of `measure_checkpoint`'s `input`, of a data
    set the first `samples` training images; side, input_channels, data_dir, mean, std: as there. include, exclude,
    groups, transposed: see `Patterns`. key: which dictionary of a pickle to take. probe: adds `fm_cos` to the records,
    on `white`, `uniform` or `natural` inputs drawn with `seed`. dry_run: measures and saves nothing. Completes an
    interrupted save to `path` or `output` first; a dry run refuses one to `path`. Warns, with ConvsimWarning, of a
    checkpoint that looks trained and of choices made in reading it. Raises CheckpointError, InputError, DivergedError
    and WriteError; files are then unchanged.
    """
    settings = Minimization(iterations, lr, optimizer, preserve_norm, objective)
    described = (samples, side, input_channels, mean, std) != (SAMPLES, None, None, None, None)
    _check_closed_form(settings, orthogonal, decorrelate, arch, described)
    inputs = None
    if decorrelate is not None:
        from convsim_cli.networks.probe import Probe

        inputs = Probe(decorrelate, samples, side, Path(data_dir), seed, mean, std, channels=input_channels)
    layer_probe = None
    if probe is not None:
        from convsim_cli.measurement.synthetic import LayerProbe

        layer_probe = LayerProbe(probe, seed=seed)

    patterns = Patterns(include, exclude, list((groups or {}).items()), transposed)
    if path is None and arch is not None and output is not None:
        StateDict(Path(arch), {}).target_for(Path(output))  # refused before pretrained weights are downloaded
    source = open_model_checkpoint(
        path, arch, patterns, seed, num_classes, key, pretrained=pretrained, for_writing=not dry_run
    )
    if not (orthogonal or inputs):  # the closed forms have something to do also on 1×1 kernels
        source.selection = settings.select(source.selection)
    checkpoint = source.checkpoint
    target = None if path is None else checkpoint.path
    if output is not None:
        target = checkpoint.target_for(Path(output))
    elif path is None and not dry_run:
        raise InputError("`arch` creates a new network; `output` is required")
    if target is not None and not (force or dry_run):
        check_replaceable(checkpoint.replaced_by(target), Path(output or path or target))
    place = resolve_device(device) if isinstance(device, str) else device
    began = time.perf_counter()
    in_place = path is not None and target is not None and checkpoint.is_in_place(target)
    kept = checkpoint.backup_for(target) if backup and in_place and target else None
    _warn(checkpoint, kept)
    source.selection.require_kernels(f"{checkpoint.path}:")
    for kernel in source.selection.kernels:
        check_finite(kernel, checkpoint.load(kernel.name), checkpoint.path)

    method = Method(settings.label, settings)
    if orthogonal:
        from convsim_cli.closed_forms import orthogonalize_kernel

        method = Method("orthogonal", closed_form=orthogonalize_kernel)
    elif inputs:
        first = settings if preserve_norm else None
        found = {} if dry_run else _decorrelated(source, first, inputs, place, progress)
        label = f"{first.label}+decorrelate" if first else "decorrelate"
        method = Method(label, first, partial(_decorrelated_weight, found))
    if dry_run or target is None:
        layers = _describe(source, layer_probe)
    else:
        layers, kept = _write(source, method, target, kept is not None, layer_probe, place, progress)
    skipped = [entry.record() for entry in source.selection.skipped]
    given = None if path is None else Path(path)
    return MinimizedCheckpoint(given, target, kept, method, place, time.perf_counter() - began, layers, skipped)


def _check_closed_form(
    settings: Minimization, orthogonal: bool, decorrelate: str | None, arch: str | None, described: bool
) -> None:
    """Raise InputError for arguments that contradict each other, or would have no effect.

    described: whether the inputs of `decorrelate` are.
    """
    if decorrelate is None and described:
        raise InputError(
            "`samples`, `side`, `input_channels`, `mean` and `std` describe the inputs of `decorrelate`; "
            "name them there"
        )
    if orthogonal and decorrelate is not None:
        raise InputError("`orthogonal` and `decorrelate` are two closed forms; choose one")
    if decorrelate is not None and arch is None:
        raise InputError("`decorrelate` requires `arch`: the inputs run through the network")
    alone = orthogonal or (decorrelate is not None and not settings.preserve_norm)
    if alone and settings != Minimization():
        name, after = (
            ("orthogonal", "") if orthogonal else ("decorrelate", "; with `preserve_norm` it follows Algorithm 1")
        )
        raise InputError(f"`{name}` is a closed form: the settings of Algorithm 1 have no effect on it{after}")


def _warn(checkpoint: Checkpoint, backup: Path | None) -> None:
    """Warn of weights that look trained, and of what a reader of the file had to choose between."""
    if looks_trained(checkpoint):
        kept = f"; {backup} keeps the old ones" if backup else ""
        message = (
            f"{checkpoint.path} looks trained, and Algorithm 1 is for weights before training: until it is "
            f"trained again, the network will have lost what it learned{kept}"
        )
        warnings.warn(message, ConvsimWarning, stacklevel=3)
    for note in checkpoint.notes:
        warnings.warn(note, ConvsimWarning, stacklevel=3)


def _describe(source: ModelCheckpoint, probe: LayerProbe | None) -> list[Record]:
    """The records of a dry run, with `before` alone."""
    records = []
    for kernel in source.selection.kernels:
        weight = source.checkpoint.load(kernel.name)
        records.append({**describe(kernel), "before": measure_weight(kernel, weight)})
        if probe:
            records[-1]["before"]["fm_cos"] = probe.fm_cos(kernel, weight)
    return records


def _write(
    source: ModelCheckpoint,
    method: Method,
    target: Path,
    backup: bool,
    probe: LayerProbe | None,
    device: torch.device,
    progress: Progress,
) -> tuple[list[Record], Path | None]:
    """Change the selected kernels and write the checkpoint; return a record per layer, and the backup.

    Large layers are in memory one at a time; everything but the selected kernels stays bit-identical. A kernel is
    written under each of its names. probe: adds `fm_cos` to `before` and `after`. The target is unchanged after any
    error.
    """
    checkpoint, kernels = source.checkpoint, source.selection.kernels
    records: list[Record] = []

    def changes() -> Iterator[tuple[str, Tensor]]:
        layers = ((kernel, checkpoint.load(kernel.name).to(device)) for kernel in kernels)
        for kernel, (weight, record) in zip(kernels, method.change(layers, advance), strict=True):
            if probe:
                former = checkpoint.load(kernel.name).to(device)
                living = living_filters(kernel.to_filters(former))
                for moment, tensor in (("before", former), ("after", weight)):
                    record[moment]["fm_cos"] = probe.fm_cos(kernel, tensor, living)
                del former, tensor
            records.append(record)
            changed = weight.cpu()
            for name in (kernel.name, *source.aliases.get(kernel.name, ())):
                yield name, changed
            del weight, changed  # one layer less in memory while the next one is changed

    with progress("init", method.steps(kernels)) as advance:
        kept = checkpoint.write(target, changes(), _metadata(kernels, method), backup=backup)
    return records, kept


def _metadata(kernels: Sequence[Kernel], method: Method) -> Mapping[str, str]:
    """The `convsim.*` record that tells how a file was changed."""
    record = {"convsim.version": __version__, "convsim.objective": method.label}
    if method.settings:
        record["convsim.optimizer"] = method.settings.optimizer
        record["convsim.lr"] = repr(method.settings.lr)
        record["convsim.iterations"] = str(method.settings.iterations)
    return {**record, "convsim.layers": ",".join(kernel.name for kernel in kernels)}


Found = dict[str, tuple[Tensor, Tensor]]  # a kernel's name → its weight in the network, before and after


def _decorrelated(
    source: ModelCheckpoint, settings: Minimization | None, inputs: Probe, device: torch.device, progress: Progress
) -> Found:
    """Decorrelate a copy of a checkpoint's network, and return each kernel's weight there, before and after, by name.

    settings: of a norm-preserving minimization to carry out first. Layers that the network never calls leave the
    selection, with the reason. Raises InputError for a network that does not run on such inputs and for NaN or Inf in a
    kernel or a map, and DivergedError.
    """
    from convsim_cli.closed_forms import decorrelate_kernels_
    from convsim_cli.networks.probe import running_on

    assert source.model is not None
    assert source.arch is not None
    own = {file: name for name, file in reversed((source.names or {}).items())}
    kernels = [replace(kernel, name=own.get(kernel.name, kernel.name)) for kernel in source.selection.kernels]
    chosen = settings.select(Selection(kernels)).kernels if settings else []
    steps = (settings.steps(chosen) if settings else 0) + len(kernels)
    with redirect_stdout(sys.stderr):  # what a user's network prints is no data
        images = inputs.load(source.model, source.arch, training=True)[0].to(device)
        model = copy.deepcopy(source.model).to(device)
        weights = [weight_of(model, kernel).detach() for kernel in kernels]
        former = [weight.clone() for weight in weights]
        with progress("decorrelate", steps) as advance, running_on(images.shape, source.arch, "try another `side`"):
            if settings:
                layers = [(kernel, weight_of(model, kernel)) for kernel in chosen]
                for kernel, (minimized, _) in zip(chosen, minimize_kernels(layers, settings, advance), strict=True):
                    weight_of(model, kernel).detach().copy_(minimized)
            called = {record["name"] for record in decorrelate_kernels_(model, kernels, images, advance)}
    kept = Selection(skipped=list(source.selection.skipped))
    found = {}
    for kernel, ours, was, now in zip(source.selection.kernels, kernels, former, weights, strict=True):
        kept.add(kernel, None if ours.name in called else "the network does not call it on these images")
        found[kernel.name] = was.cpu(), now.cpu()
    kept.require_kernels(f"{source.checkpoint.path}:")
    source.selection = kept
    return found


def _decorrelated_weight(found: Found, kernel: Kernel, weight: Tensor) -> Tensor:
    """The new weight in the stored type, bit-identical where nothing changed."""
    from convsim_cli.closed_forms import check_range

    was, now = (tensor.to(weight.device) for tensor in found[kernel.name])
    changed = torch.where(now == was, weight, now.to(weight.dtype))
    check_range(kernel, changed)
    return changed


def looks_trained(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint's weights look trained.

    Batch-norm statistics decide where there are any: training leaves a counter above zero or a running mean other than
    zero. Without them the filters' norms do: their spread is `SPREAD` times that of independent weights or more, in the
    median over the layers. What `convsim init` wrote is then not taken for trained.
    """
    statistics = [name for name in checkpoint.tensors if name.endswith(("num_batches_tracked", "running_mean"))]
    if statistics:
        return any(_is_nonzero(checkpoint.load(name)) for name in statistics)
    if "convsim.layers" in checkpoint.metadata:
        return False
    kernels = file_kernels(checkpoint.tensors, unfit=checkpoint.unfit).kernels
    spreads = [
        spread for kernel in kernels if (spread := norm_spread(kernel, checkpoint.load(kernel.name))) is not None
    ]
    return bool(spreads) and median(spreads) >= SPREAD


def norm_spread(kernel: Kernel, weight: Tensor) -> float | None:
    """Return the spread of a layer's filter norms, as a multiple of what independent weights give.

    That is the coefficient of variation of the living filters' norms times √(2·C·N): near 1 for Gaussian weights, 0.63
    for uniform ones. None for fewer than `FEWEST` filters, for NaN or infinity, and where `NEAR_ZERO` or more of the
    weights are next to zero: as raw Algorithm 1 takes weights there, the norms that are left spread too.
    """
    filters = kernel.to_filters(weight)
    norms = torch.linalg.vector_norm(filters, dim=(-2, -1), dtype=torch.float64)
    if not norms.isfinite().all():
        return None
    living = living_filters(filters)
    if living.sum() < FEWEST:
        return None
    weights = filters[0, 0].numel()
    next_to_zero = (0.1 * norms / weights**0.5).to(filters.dtype)  # of this type, so that no copy is made in another
    shares = (filters.abs() < next_to_zero[..., None, None]).sum(dim=(-2, -1)) / weights
    if shares[living].mean() >= NEAR_ZERO:
        return None
    norms = norms[living]
    return (norms.std(correction=0) / norms.mean() * (2 * weights) ** 0.5).item()


def _is_nonzero(statistic: Tensor) -> bool:
    if statistic.numel() * statistic.element_size() > statistic.untyped_storage().nbytes():
        return False  # an expanded tensor, perhaps larger than memory: no statistic
    return bool((statistic.to(torch.complex128) != 0).any())
