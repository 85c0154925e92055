"""`convsim init` as a library call: a method on a checkpoint or a new network, saved atomically.

The kernels are changed one layer at a time, as the checkpoint is written. A method that needs the feature maps of the
whole network runs before, on a copy of the network.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convsim_cli import __version__
from convsim_cli.checkpoints.base import Checkpoint
from convsim_cli.checkpoints.diagnose import explained
from convsim_cli.checkpoints.formats import StateDict, check_replaceable, is_on_hub, path_of
from convsim_cli.device import Advance, Progress, resolve_device, unreported
from convsim_cli.errors import ConvsimWarning, InputError, quoted
from convsim_cli.kernels import Patterns, Selection, living_filters, weight_of
from convsim_cli.measurement.kernel_figures import (
    check_finite,
    check_range,
    compare_weights,
    describe,
    measure_weight,
    sum_cs,
)
from convsim_cli.methods import METHODS, Method
from convsim_cli.minimize import Layer, Minimization, minimize_kernels
from convsim_cli.networks.load import (
    ModelCheckpoint,
    check_inputs,
    explain_failure,
    load_inputs,
    looks_trained,
    open_model_checkpoint,
)
from convsim_cli.settings import InitOptions, make_options, with_signature_of

if TYPE_CHECKING:  # what most calls do not need
    from convsim_cli.measurement.synthetic import LayerProbe


Changed = dict[str, tuple[Tensor, Tensor]]  # a kernel's name → its weight in a network, before and after


@dataclass(frozen=True)
class InitReport:
    """The result of `init_checkpoint`.

    checkpoint: as it was named, None for a new network; output: None for a dry run of one, or of one on the Hub;
    backup: where the former file was kept, or a pattern of the shards' backups; seconds: of the method and the save;
    layers: a record each, with `before` and, unless it was a dry run, `after`; skipped: name, shape and reason of each
    tensor that was left out.
    """

    checkpoint: Path | str | None
    output: Path | None
    backup: Path | None
    options: InitOptions
    device: torch.device
    seconds: float
    layers: list[dict[str, Any]]
    skipped: list[dict[str, Any]]

    def document(self) -> dict[str, Any]:
        """Return the content of the JSON document of `convsim init`; `total` is L_CS summed over the layers."""
        options, iterates = self.options, METHODS[self.options.method].iterates
        moments = [moment for moment in ("before", "after") if any(moment in layer for layer in self.layers)]
        return {
            "checkpoint": self.checkpoint and str(self.checkpoint),
            "output": self.output and str(self.output),
            "backup": self.backup and str(self.backup),
            "method": options.method,
            "preserve_norm": options.preserve_norm or not iterates,
            "iterations": options.iterations if iterates else 0,
            "lr": options.lr if iterates else None,
            "device": str(self.device),
            "seconds": self.seconds,
            "layers": self.layers,
            "skipped": self.skipped,
            "total": {moment: sum_cs(layer[moment] for layer in self.layers) for moment in moments},
        }


@with_signature_of(InitOptions)
def init_checkpoint(
    path: str | Path | None, output: str | Path | None = None, *, progress: Progress = unreported, **options: Any
) -> InitReport:
    """Reduce the similarity of a checkpoint's kernels by a method of `methods.METHODS`, and save it atomically.

    path: the checkpoint, a file, a folder of shards, or `hf://…` (`open_checkpoint`); None for a new network, which
    `arch` names, with `pretrained` that of its library. output: where to save; in place if None, unless on the Hub. A
    file that is replaced is kept as `FILE.bak` (`.bak.1`, …) unless `no_backup`. progress: shows the progress, see
    `device.Progress`. options: the fields of `settings.InitOptions`, which are the options of `convsim init`.

    Completes an interrupted save to `path` or `output` first; a dry run refuses one to `path`. Warns (ConvsimWarning)
    about a checkpoint that looks trained and about choices made when reading it. Raises CheckpointError, InputError,
    DivergedError and WriteError; files are then unchanged.
    """
    chosen = make_options(InitOptions, "init_checkpoint", options)
    chosen.check()
    output = None if output is None else path_of("output", output)
    groups = list((chosen.groups or {}).items())
    patterns = Patterns(chosen.include, chosen.exclude, groups, chosen.transposed, chosen.layout)
    in_place = path is not None and not is_on_hub(path)
    if output is None and not in_place and not chosen.dry_run and (path or chosen.arch):
        what = f"`path` {path} is on the Hub" if path is not None else "`arch` creates a new network"
        raise InputError(f"{what}; `output` is required")
    if path is None and chosen.arch is not None and output is not None:
        with explained(Path(output)):  # refused before pretrained weights are downloaded
            StateDict(Path(chosen.arch), {}).target_for(Path(output))
    source = open_model_checkpoint(
        path,
        chosen.arch,
        patterns,
        chosen.seed,
        chosen.num_classes,
        chosen.key,
        pretrained=chosen.pretrained,
        for_writing=not chosen.dry_run,
    )
    method, minimization = METHODS[chosen.method], None
    if method.iterates:
        minimization = Minimization(
            chosen.iterations, chosen.lr, chosen.optimizer, chosen.preserve_norm, objective=chosen.method
        )
        source.selection = minimization.select(source.selection)
    checkpoint = source.checkpoint
    target = checkpoint.path if in_place else None
    with explained(Path(output or path or "")):
        if output is not None:
            target = checkpoint.target_for(Path(output))
        if target is not None and not (chosen.force or chosen.dry_run):
            check_replaceable(checkpoint.replaced_by(target), Path(output or path or target))
    device = resolve_device(chosen.device)
    began = time.perf_counter()
    keeps_backup = target is not None and not chosen.no_backup and bool(checkpoint.replaced_by(target))
    kept = checkpoint.backup_for(target) if target and keeps_backup else None
    _warn(checkpoint, method, target, None if chosen.dry_run else kept)
    source.selection.require_kernels(f"{checkpoint.name}:")
    for kernel in source.selection.kernels:  # all of them before anything is written
        check_finite([(kernel, checkpoint.load(kernel.name))], checkpoint.name)
    probe = None
    if chosen.probe is not None:
        from convsim_cli.measurement.synthetic import LayerProbe

        probe = LayerProbe(chosen.probe, seed=chosen.seed)
    if chosen.dry_run or target is None:
        layers = _describe(source, probe)
    else:
        found = _change_network(source, chosen, device, progress) if method.needs_images else {}
        kernels = source.selection.kernels
        with progress("init", minimization.steps(kernels) if minimization else len(kernels)) as advance:
            change = partial(_change_layers, method, minimization, found, advance)
            layers, kept = _write(source, change, target, chosen, keeps_backup, probe, device)
    skipped = [entry.record() for entry in source.selection.skipped]
    given = Path(path) if in_place and path is not None else path
    return InitReport(given, target, kept, chosen, device, time.perf_counter() - began, layers, skipped)


def _warn(checkpoint: Checkpoint, method: Method, target: Path | None, backup: Path | None) -> None:
    """Warn about weights that look trained, risks of the method, and choices made when reading the file."""
    has_statistics = any(name.endswith("running_var") for name in checkpoint.tensors)
    if looks_trained(checkpoint):
        kept = f"; the original is kept in {backup}" if backup else ""
        message = (
            f"{checkpoint.name} looks trained, and init is for weights before training: it destroys what the network "
            f"has learned{kept}"
        )
        warnings.warn(message, ConvsimWarning, stacklevel=3)
        if target is not None and has_statistics and not checkpoint.keeps_record(target):
            message = (
                f"{target} cannot record that its batch-norm statistics no longer match its kernels: to run the "
                f"network, convsim measure {quoted(target)} --arch NAME --bn-statistics inputs"
            )
            warnings.warn(message, ConvsimWarning, stacklevel=3)
    caution = method.warning({name: info.shape for name, info in checkpoint.tensors.items()})
    for note in (*([caution] if caution else []), *checkpoint.notes):
        warnings.warn(note, ConvsimWarning, stacklevel=3)


def _describe(source: ModelCheckpoint, probe: LayerProbe | None) -> list[dict[str, Any]]:
    """The records of a dry run, with `before` alone."""
    records = []
    for kernel in source.selection.kernels:
        weight = source.checkpoint.load(kernel.name)
        records.append({**describe(kernel), "before": measure_weight(kernel, weight)})
        if probe:
            records[-1]["before"]["fm_corr"] = probe.fm_corr(kernel, weight)
    return records


def _change_layers(
    method: Method, minimization: Minimization | None, found: Changed, advance: Advance, layers: Iterable[Layer]
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Yield each layer's new weight, as stored, on its device, and its record. found: by a method that needs images."""
    if minimization:
        yield from minimize_kernels(layers, minimization, advance)
        return
    for kernel, weight in layers:
        if method.of_kernel:
            changed = method.of_kernel(kernel, weight)
        else:
            was, now = (tensor.to(weight.device) for tensor in found[kernel.name])
            changed = torch.where(now == was, weight, now.to(weight.dtype))  # bit-identical where nothing changed
            check_range(kernel, changed)
        (record,) = compare_weights([(kernel, weight, changed)])
        if method.applied_to:
            record["method"] = method.applied_to(kernel)
        yield changed, record
        advance(1)


def _write(
    source: ModelCheckpoint,
    change: Callable[[Iterable[Layer]], Iterator[tuple[Tensor, dict[str, Any]]]],
    target: Path,
    options: InitOptions,
    backup: bool,
    probe: LayerProbe | None,
    device: torch.device,
) -> tuple[list[dict[str, Any]], Path | None]:
    """Change the selected kernels and write the checkpoint; return a record per layer, and the backup.

    Large layers are in memory one at a time; everything but the selected kernels stays bit-identical. A kernel is
    written under each of its names. probe: adds `fm_corr` to `before` and `after`. The target is unchanged after any
    error.
    """
    checkpoint, kernels = source.checkpoint, source.selection.kernels
    records: list[dict[str, Any]] = []

    def changes() -> Iterator[tuple[str, Tensor]]:
        layers = ((kernel, checkpoint.load(kernel.name).to(device)) for kernel in kernels)
        for kernel, (weight, record) in zip(kernels, change(layers), strict=True):
            if probe:
                former = checkpoint.load(kernel.name).to(device)
                living = living_filters(kernel.to_filters(former))
                for moment, tensor in (("before", former), ("after", weight)):
                    record[moment]["fm_corr"] = probe.fm_corr(kernel, tensor, living)
                del former, tensor
            records.append(record)
            changed = weight.cpu()
            for name in (kernel.name, *source.aliases.get(kernel.name, ())):
                yield name, changed
            del weight, changed  # one layer less in memory while the next one is changed

    note = {"convsim.version": __version__, "convsim.method": options.method}
    if METHODS[options.method].iterates:
        for name in ("preserve_norm", "optimizer", "lr", "iterations"):
            note[f"convsim.{name}"] = str(getattr(options, name)).lower()
    note["convsim.layers"] = ",".join(kernel.name for kernel in kernels)
    # nothing is computed until `write` asks for a change: it takes the layers one by one, which also fills `records`
    kept = checkpoint.write(target, changes(), note, backup=backup)
    return records, kept


def _change_network(source: ModelCheckpoint, options: InitOptions, device: torch.device, progress: Progress) -> Changed:
    """Apply a method that needs images to a copy of the network; return each kernel's weight there, by name.

    Layers that no inputs reach leave the selection, with the reason. Raises InputError for a network that does
    not run on such inputs, and for NaN or Inf in a kernel or a map.
    """
    assert source.model is not None
    assert source.arch is not None
    method = METHODS[options.method]
    assert method.of_maps is not None
    check_inputs(options)
    own = {file: name for name, file in reversed((source.names or {}).items())}
    kernels = [replace(kernel, name=own.get(kernel.name, kernel.name)) for kernel in source.selection.kernels]
    with redirect_stdout(sys.stderr):  # what a user's network prints is no data
        images = load_inputs(options, options.seed, source.model, source.arch, training=True)[0].to(device)
        model = copy.deepcopy(source.model).to(device)
        weights = [weight_of(model, kernel).detach() for kernel in kernels]
        former = [weight.clone() for weight in weights]
        advice = "try another `input_size`"
        with progress(method.name, len(kernels)) as advance, explain_failure(images.shape, source.arch, advice):
            called = {record["name"] for record in method.of_maps(model, kernels, images, advance)}
    kept = Selection(skipped=list(source.selection.skipped))
    found = {}
    for kernel, ours, was, now in zip(source.selection.kernels, kernels, former, weights, strict=True):
        kept.add(kernel, None if ours.name in called else "no inputs reach it from these images")
        found[kernel.name] = was.cpu(), now.cpu()
    kept.require_kernels(f"{source.checkpoint.name}:")
    source.selection = kept
    return found
