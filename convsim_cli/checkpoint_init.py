"""Whether a checkpoint's weights have been trained, judged by what training leaves in them.

Algorithm 1, or a closed form, on the kernels of an open checkpoint: one at a time, as the checkpoint is written.

Decorrelate the feature maps of a checkpoint's network on a batch of the user's images.

Algorithm 1, or a closed form, on a checkpoint file or a new network, with the same safety as `convsim init`.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from convsim_cli import __version__
from convsim_cli.checkpoints.base import Checkpoint
from convsim_cli.checkpoints.formats import StateDict, check_replaceable
from convsim_cli.closed_forms import compare_weights, decorrelate_kernels_, orthogonalize_kernel
from convsim_cli.device import Advance, Progress, resolve_device, unreported
from convsim_cli.errors import CheckpointError, ConvsimError, ConvsimWarning, InputError
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.inputs.images import Channels
from convsim_cli.kernels import Kernel, Patterns, Selection, file_kernels, living_filters, weight_of
from convsim_cli.measurement.figures import Record
from convsim_cli.measurement.kernel_figures import check_finite, describe, is_finite, kernel_figures
from convsim_cli.measurement.synthetic import LayerProbe
from convsim_cli.minimize import Minimization, minimize_kernels
from convsim_cli.networks.accuracy import resize
from convsim_cli.networks.architectures import usual_side
from convsim_cli.networks.load import ModelCheckpoint, open_model_checkpoint
from convsim_cli.networks.probe import Probe

SPREAD = 3.0  # how many times the spread of independent weights a layer's norms have to show
FEWEST = 8  # living filters that a spread is taken of
NEAR_ZERO = (
    0.35  # share of weights below a tenth of their filter's root mean square: raw Algorithm 1 leaves half or more
)


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


CPU = torch.device("cpu")
Aliases = Mapping[str, Sequence[str]]  # a kernel's name → the other names that the checkpoint holds it under


@dataclass(frozen=True)
class ClosedForm:
    """A closed form in the place of Algorithm 1, or after it.

    label: what reports call it. rewrite: returns a layer's new weight, as stored, and its record. after: the norm-
    preserving minimization that comes first, if one does; `rewrite` then carries out both.
    """

    label: str
    rewrite: Callable[[Kernel, Tensor], tuple[Tensor, Record]]
    after: Minimization | None = None
    preserve_norm = True

    @property
    def iterations(self) -> int:
        return self.after.iterations if self.after else 0

    @property
    def lr(self) -> float | None:
        return self.after.lr if self.after else None


Method = Minimization | ClosedForm


def write_minimized(
    checkpoint: Checkpoint,
    selection: Selection,
    how: Method,
    target: Path,
    *,
    aliases: Aliases | None = None,
    backup: bool = False,
    probe: str | None = None,
    seed: int = 0,
    device: torch.device = CPU,
    advance: Advance | None = None,
) -> tuple[list[Record], Path | None]:
    """Change the selected kernels and write the checkpoint to `target`; return a record per layer, and the backup.

    Large layers are in memory one at a time; everything but the selected kernels stays bit-identical. aliases: a kernel
    is written under each of these names as well. probe: adds `fm_cos` on such inputs to `before` and `after`. advance:
    takes the steps (`Minimization.steps`) completed since the last call, one per layer of a closed form. Raises
    InputError for a kernel with NaN or Inf, DivergedError for a loss that stops being finite, WriteError; the target is
    then unchanged.
    """
    check_kernels(checkpoint, selection)
    aliases = aliases or {}
    records: list[Record] = []
    layer_probe = LayerProbe(probe, seed=seed) if probe else None

    def weights() -> Iterator[tuple[Kernel, Tensor]]:
        for kernel in selection.kernels:
            yield kernel, checkpoint.load(kernel.name).to(device)

    def changes() -> Iterator[tuple[str, Tensor]]:
        minimized_layers = _changed(weights(), how, advance)
        for kernel, (minimized, record) in zip(selection.kernels, minimized_layers, strict=True):
            if layer_probe:
                former = checkpoint.load(kernel.name).to(device)
                living = living_filters(kernel.to_filters(former))
                for moment, tensor in (("before", former), ("after", minimized)):
                    record[moment]["fm_cos"] = layer_probe.fm_cos(kernel, tensor, living)
                del former
            records.append(record)
            minimized = minimized.to(CPU)
            for name in (kernel.name, *aliases.get(kernel.name, ())):
                yield name, minimized
            del minimized  # one layer less in memory while the next one is minimized

    kept = checkpoint.write(target, changes(), make_metadata(selection, how), backup=backup)
    return records, kept


def _changed(
    layers: Iterable[tuple[Kernel, Tensor]], how: Method, advance: Advance | None
) -> Iterator[tuple[Tensor, Record]]:
    if isinstance(how, Minimization):
        yield from minimize_kernels(layers, how, advance)
        return
    for kernel, weight in layers:
        yield how.rewrite(kernel, weight)
        if advance:
            advance(1)


def describe_kernels(
    checkpoint: Checkpoint, selection: Selection, probe: str | None = None, seed: int = 0
) -> list[Record]:
    """Return the records of a dry run, with `before` alone. Raises InputError as `write_minimized` does."""
    check_kernels(checkpoint, selection)
    records = []
    layer_probe = LayerProbe(probe, seed=seed) if probe else None
    for kernel in selection.kernels:
        weight = checkpoint.load(kernel.name)
        figures = kernel_figures(kernel, weight)
        before = {key: figures[key] for key in ("cs", "ncs", "norm")}
        if layer_probe:
            before["fm_cos"] = layer_probe.fm_cos(kernel, weight)
        records.append({**describe(kernel), "before": before})
    return records


def check_kernels(checkpoint: Checkpoint, selection: Selection) -> None:
    """Raise InputError, before any work is done, if there is nothing to act on or a kernel holds NaN or Inf."""
    if not selection.kernels:
        left_out = ", ".join(f"{skipped.name} ({skipped.reason})" for skipped in selection.skipped[:3])
        raise CheckpointError(
            f"{checkpoint.path}: no convolution kernels to act on" + (f"; left out: {left_out}" if left_out else "")
        )
    for kernel in selection.kernels:
        check_finite(kernel, checkpoint.load(kernel.name), checkpoint.path)


def make_metadata(selection: Selection, how: Method) -> Mapping[str, str]:
    """Return the `convsim.*` record that tells how a file was changed."""
    record = {"convsim.version": __version__, "convsim.objective": how.label}
    minimization = how if isinstance(how, Minimization) else how.after
    if minimization:
        record["convsim.optimizer"] = minimization.optimizer
        record["convsim.lr"] = repr(minimization.lr)
        record["convsim.iterations"] = str(minimization.iterations)
        record["convsim.tol"] = repr(minimization.tol)
    return {**record, "convsim.layers": ",".join(kernel.name for kernel in selection.kernels)}


Found = Mapping[str, tuple[Tensor, Tensor]]  # a kernel's name → its weight before and after

SAMPLES = 256  # images, unless given: many times as many values per map as a layer has filters


def decorrelation(how: Minimization | None, found: Found) -> ClosedForm:
    """Return the closed form that gives each kernel its weight in `found`, of `decorrelated`.

    how: the norm-preserving minimization that was carried out first.
    """
    label = f"{how.label}+decorrelate" if how else "decorrelate"
    return ClosedForm(label, lambda kernel, weight: _rewritten(kernel, weight, *found[kernel.name]), how)


def decorrelated(
    source: ModelCheckpoint, how: Minimization | None, probe: Probe, device: torch.device, progress: Progress
) -> Found:
    """Return each kernel's weight in a copy of a checkpoint's network, before and after it was decorrelated, by name.

    how: a norm-preserving minimization to carry out first. Layers that the network never calls leave the selection,
    with the reason. Raises InputError for a network that does not run on such inputs and for NaN or Inf in a kernel or
    a map, and DivergedError.
    """
    images = _images(source, probe).to(device)
    model = copy.deepcopy(source.model)
    assert model is not None
    model.to(device)
    own = {file: name for name, file in reversed((source.names or {}).items())}
    kernels = [replace(kernel, name=own.get(kernel.name, kernel.name)) for kernel in source.selection.kernels]
    weights = [weight_of(model, kernel).detach() for kernel in kernels]
    former = [weight.clone() for weight in weights]
    chosen = how.select(Selection(kernels)).kernels if how else []
    steps = (how.steps(chosen) if how else 0) + len(kernels)
    try:
        with progress("decorrelate", steps) as advance, redirect_stdout(sys.stderr), torch.no_grad():
            if how:
                layers = [(kernel, weight_of(model, kernel)) for kernel in chosen]
                for kernel, (turned, _) in zip(chosen, minimize_kernels(layers, how, advance), strict=True):
                    weight_of(model, kernel).copy_(turned)
            called = {entry["name"] for entry in decorrelate_kernels_(model, kernels, images, advance)}
    except ConvsimError:
        raise
    except Exception as error:  # whatever a network's own code raises
        raise InputError(
            f"`arch` {source.arch}: does not run on inputs {list(images.shape)} "
            f"({' '.join(str(error).split())[:160] or type(error).__name__}); try another `side`"
        ) from error
    found = {
        kernel.name: (was.cpu(), weight.cpu())
        for kernel, was, weight in zip(source.selection.kernels, former, weights, strict=True)
    }
    _leave_out_uncalled(source, [kernel.name in called for kernel in kernels])
    return found


def _images(source: ModelCheckpoint, probe: Probe) -> Tensor:
    """The first training images of a data set, or what `Probe` takes."""
    assert source.model is not None
    assert source.arch is not None
    if not probe.is_labeled:
        probe.dataset(source.arch)  # raises for an unknown name
        return probe.images(source.model, source.arch, None)
    side = probe.side or usual_side(source.arch)
    data = load_dataset(probe.input, probe.data_dir, side, probe.mean, probe.std)
    return resize(data.normalize(data.train.images[: probe.samples]), probe.side)


def _leave_out_uncalled(source: ModelCheckpoint, called: list[bool]) -> None:
    kept = Selection(skipped=list(source.selection.skipped))
    for kernel, is_called in zip(source.selection.kernels, called, strict=True):
        kept.add(kernel, None if is_called else "the network does not call it on these images")
    source.selection = kept


def _rewritten(kernel: Kernel, weight: Tensor, was: Tensor, now: Tensor) -> tuple[Tensor, Record]:
    """The new weight in the stored type, bit-identical where nothing changed, and the layer's record."""
    was, now = was.to(weight.device), now.to(weight.device)
    changed = torch.where(now == was, weight, now.to(weight.dtype))
    if not is_finite(changed):
        kind = str(weight.dtype).removeprefix("torch.")
        raise InputError(f"{kernel.name}: the new kernels leave the range of {kind}; scale this layer down first")
    return changed, compare_weights(kernel, weight, changed)


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
