"""`convsim measure` as a library call: a checkpoint's layers one by one, or its network as it runs on images."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from math import ceil
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from convsim_cli.batch_norm import INPUTS, batch_norms_before, choose_statistics
from convsim_cli.device import Progress, resolve_device, return_freed_memory, unreported
from convsim_cli.errors import ConvsimWarning, InputError
from convsim_cli.kernels import Kernel, Patterns, effective_weight, living_filters
from convsim_cli.layers import layers_of
from convsim_cli.measurement.feature_maps import MOST_FILTERS, LayerMaps
from convsim_cli.measurement.figures import Record, add_changes, partners_of, why_duplicates
from convsim_cli.measurement.kernel_figures import check_finite, measure_layer, sum_cs
from convsim_cli.measurement.pairs import HeatMap, make_heat_map, strongest_pairs
from convsim_cli.measurement.synthetic import FEATURES, BatchNormBefore, LayerProbe
from convsim_cli.networks.load import (
    ModelCheckpoint,
    check_inputs,
    explain_failure,
    load_inputs,
    looks_trained,
    open_model_checkpoint,
    require_layer_inputs,
)
from convsim_cli.rotation import filter_angles, median_angle
from convsim_cli.settings import MeasureOptions, make_options, with_signature_of

MAP_BATCH = 32  # images that a network runs on at once


@dataclass
class MeasureReport:
    """What `measure_checkpoint` found.

    source: the path, or the name of a fresh network; bn_statistics: `stored`, `inputs`, or None if no batch
    normalization was run; layers: a record each, with the figures of `figures.FIGURES`; skipped: name, shape and reason
    of each tensor that was left out; total: `cs`, None where float64 cannot hold it, and, where there are labels,
    `accuracy` in per cent; notes: lines that explain figures; warnings: lines that must not be missed; heat: the
    layers' heat maps, if requested; method: the `convsim init` method that the file records, if any;
    avoidable: whether layers of an untrained file have duplicates that `init --method dct` would avoid.
    """

    source: str
    input: str
    bn_statistics: str | None = None
    layers: list[Record] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    total: dict[str, float | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    heat: dict[str, HeatMap] | None = None
    method: str | None = None
    avoidable: bool = False

    def document(self) -> dict[str, Any]:
        """Return the content of the JSON document of `convsim measure`."""
        keys = ("source", "input", "bn_statistics", "layers", "skipped", "total")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True)
class _Task:
    """How checkpoints are measured: the user's options, and what the caller of `measure_checkpoints` decides."""

    options: MeasureOptions
    device: torch.device
    progress: Progress
    paper: bool
    heat: bool


@with_signature_of(MeasureOptions)
def measure_checkpoint(
    path: str | PathLike[str] | None = None, *, progress: Progress = unreported, **options: Any
) -> MeasureReport:
    """Measure how similar the filters and feature maps of a checkpoint are, layer by layer.

    path: a checkpoint, a file, a folder of shards, or `hf://…` (`open_checkpoint`); None for a fresh network. With
    `arch` the network runs; without it each layer is probed by itself. progress: shows the progress, see
    `device.Progress`. options: the fields of `settings.MeasureOptions`, which are the options of `convsim measure`.

    Warns about choices made when reading the file. Raises InputError for a file without kernels, a kernel
    with NaN or Inf, a network that does not run on such inputs, and other bad input.
    """
    (report,) = measure_checkpoints([path], make_options(MeasureOptions, "measure_checkpoint", options), progress)
    for line in report.warnings:
        warnings.warn(line, ConvsimWarning, stacklevel=2)
    return report


def measure_checkpoints(
    paths: Sequence[str | PathLike[str] | None],
    options: MeasureOptions,
    progress: Progress = unreported,
    *,
    paper: bool = True,
    heat: bool = False,
) -> list[MeasureReport]:
    """Return a report per checkpoint; those of several have the changes from the first (`add_changes`).

    Opens all of them before it measures the first. paper: whether to compute the paper's figures of feature maps;
    they are None otherwise. heat: whether to make heat maps. Errors as `measure_checkpoint`.
    """
    options.check()
    check_inputs(options)
    task = _Task(options, resolve_device(options.device), progress, paper, heat)
    groups = list((options.groups or {}).items())
    patterns = Patterns(options.include, options.exclude, groups, options.transposed, options.layout)
    sources = [
        open_model_checkpoint(
            path,
            options.arch,
            patterns,
            options.seed,
            options.num_classes,
            options.key,
            pretrained=options.pretrained,
            parametrized=True,
        )
        for path in paths
    ]
    reports = [_measure(source, task) for source in sources]
    if len(reports) > 1:
        reports[0].warnings += add_changes([report.document() for report in reports])
        for source, report in zip(sources[1:], reports[1:], strict=True):
            _add_turns(sources[0], reports[0], source, report)
    return reports


def _add_turns(first: ModelCheckpoint, before: MeasureReport, source: ModelCheckpoint, report: MeasureReport) -> None:
    """Add `turned` to the layers of a report whose partner in the first has filters of the same shape."""
    partners = partners_of(before.document(), report.document())
    former = {kernel.name: kernel for kernel in first.selection.kernels}
    for kernel, layer in zip(source.selection.kernels, report.layers, strict=True):
        own = former.get(partners[kernel.name]["name"]) if kernel.name in partners else None
        stored = own is not None and own.name in first.checkpoint.tensors and kernel.name in source.checkpoint.tensors
        if own is None or not stored or replace(own, name=kernel.name, assumed=kernel.assumed) != kernel:
            continue
        start = _used_weight(first, own)
        living = living_filters(kernel.to_filters(start)).flatten()  # those that count in a `TurnMonitor`
        angles = filter_angles(kernel, _used_weight(source, kernel), start)
        layer["turned"] = median_angle(angles.masked_fill(~living, torch.nan))


def _used_weight(source: ModelCheckpoint, kernel: Kernel) -> Tensor:
    """The weight that a layer uses, where it is computed in the layer's `forward`, else the stored one."""
    if kernel.computed and source.model is not None:
        _, layer = next(iter(layers_of(source.model, [kernel], source.names)))  # of several, all use this weight
        with torch.no_grad():
            if (weight := effective_weight(layer)) is not None:
                return weight.cpu()
    return source.checkpoint.load(kernel.name)


def _measure(source: ModelCheckpoint, task: _Task) -> MeasureReport:
    skipped = [entry.record() for entry in source.selection.skipped]
    report = MeasureReport(source.checkpoint.name, task.options.input, skipped=skipped, heat={} if task.heat else None)
    report.method = source.checkpoint.metadata.get("convsim.method")
    report.warnings += source.checkpoint.notes
    source.selection.require_kernels(f"{source.checkpoint.name}:")
    if any(kernel.filters // kernel.groups > MOST_FILTERS for kernel in source.selection.kernels):
        return_freed_memory()  # slower, but layers this wide then need half the memory
    if source.model is None:
        _measure_layers(report, source, task)
    else:
        with redirect_stdout(sys.stderr):  # what a user's network prints is no data
            _measure_network(report, source, task)
    report.notes += _sample_notes(report.layers)
    report.total["cs"] = sum_cs(report.layers)
    if report.method != "dct" and why_duplicates(report.layers):
        report.avoidable = not looks_trained(source.checkpoint)
    return report


def _measure_layers(report: MeasureReport, source: ModelCheckpoint, task: _Task) -> None:
    options, device = task.options, task.device
    require_layer_inputs(options)
    if options.bn_statistics != "auto":
        raise InputError("`bn_statistics` requires `arch`: a checkpoint alone runs no batch normalization")
    checkpoint, kernels = source.checkpoint, source.selection.kernels
    for kernel in kernels:  # before any work is done
        check_finite([(kernel, checkpoint.load(kernel.name))], checkpoint.name)
    layer_probe = LayerProbe(options.input, options.samples, options.input_size, options.seed)
    norms: dict[str, str] = {}
    if options.input == FEATURES:
        channels = dict.fromkeys((entry.name for entry in source.selection.skipped), 0)  # to stand between kernels
        channels |= {kernel.name: kernel.channels for kernel in kernels}
        norms = batch_norms_before({name: info.shape for name, info in checkpoint.tensors.items()}, channels)
    with task.progress(f"measure {checkpoint.name}", len(kernels)) as advance:
        for kernel in kernels:
            weight = checkpoint.load(kernel.name).to(device)
            norm = _load_norm(source, norms[kernel.name], device) if kernel.name in norms else None
            _add(report, options, kernel, weight, layer_probe.look(kernel, weight, norm, paper=task.paper))
            advance(1)


def _load_norm(source: ModelCheckpoint, name: str, device: torch.device) -> BatchNormBefore:
    """γ and β of a batch norm, 1 and 0 where it has none."""
    checkpoint = source.checkpoint
    likewise = torch.zeros_like(checkpoint.load(f"{name}.running_var"), dtype=torch.float32, device=device)
    found = [likewise + 1, likewise]
    for index, part in enumerate((f"{name}.weight", f"{name}.bias")):
        if part in checkpoint.tensors and checkpoint.tensors[part].shape == tuple(likewise.shape):
            found[index] = checkpoint.load(part).to(device, torch.float32)
    return found[0], found[1]


def _measure_network(report: MeasureReport, source: ModelCheckpoint, task: _Task) -> None:
    from convsim_cli.inputs.images import measure_accuracy
    from convsim_cli.measurement.network import Batches, record_feature_maps

    path, kernels, arch = source.checkpoint.name, source.selection.kernels, source.arch or ""
    options, device, progress = task.options, task.device, task.progress
    assert source.model is not None
    model = source.model.to(device)
    with torch.no_grad():  # computed weights are then read as in evaluation mode
        found = {kernel.name: effective_weight(layer) for kernel, layer in layers_of(model, kernels, source.names)}
    weights = {name: weight.detach() for name, weight in found.items() if weight is not None}
    check_finite([(kernel, weights[kernel.name]) for kernel in kernels], path)
    images, data = load_inputs(options, options.seed, model, arch)
    report.bn_statistics = chosen = choose_statistics(model, options.bn_statistics, source.kernels_changed)
    if chosen == INPUTS:
        why = "" if options.bn_statistics == INPUTS else ": the stored ones no longer match these kernels"
        report.notes.append(f"batch-norm statistics are re-estimated on the inputs{why}")
    count = ceil(len(images) / MAP_BATCH)
    advice = "try another `input_size`, `input` or `input_channels`"
    with (
        explain_failure(images.shape, arch, advice),
        progress(f"feature maps of {path}", len(images) * (2 if chosen == INPUTS else 1)) as advance,
    ):
        batches = Batches(images.tensor_split(count), device, advance)
        maps = record_feature_maps(
            model, kernels, batches, source.names, bn_statistics=chosen, seed=options.seed, paper=task.paper
        )
    with progress(f"measure {path}", len(kernels)) as advance:
        for kernel in kernels:
            of_layer = maps.pop(kernel.name)
            _add(report, options, kernel, weights[kernel.name], of_layer)
            report.layers[-1]["calls"] = ceil(of_layer.calls / count)
            advance(1)
    report.notes += _call_notes(report.layers)
    if data is not None:
        with progress(f"test accuracy of {path}", len(data.test)) as advance:
            accuracy, notes = measure_accuracy(model, data, device, options.input_size, advance)
        report.notes += notes
        if accuracy is not None:
            report.total["accuracy"] = accuracy


def _add(report: MeasureReport, options: MeasureOptions, kernel: Kernel, weight: Tensor, maps: LayerMaps) -> None:
    record = measure_layer(kernel, weight, maps, options.threshold)
    correlation = maps.correlation() if maps.sample is None and (options.top or report.heat is not None) else None
    if options.top:
        record["top"] = [] if correlation is None else strongest_pairs(correlation, options.top)
    if report.heat is not None and correlation is not None:
        report.heat[kernel.name] = make_heat_map(correlation)
    report.layers.append(record)


def _call_notes(layers: Sequence[Record]) -> list[str]:
    """Notes about layers that the network does not call exactly once. Calls on nothing do not count."""
    never = [layer["name"] for layer in layers if layer["calls"] == 0]
    often = [f"{layer['name']} ({layer['calls']} times)" for layer in layers if layer["calls"] > 1]
    notes = [f"no inputs reach these layers, so they have no feature maps: {', '.join(never)}"] if never else []
    return notes + ([f"called more than once, every call counts: {', '.join(often)}"] if often else [])


def _sample_notes(layers: Sequence[Record]) -> list[str]:
    """Notes about layers with too many filters to compare all pairs of maps."""
    large = [f"{layer['name']} ({layer['sampled']} per group)" for layer in layers if "sampled" in layer]
    figures = "redundant, opposite, removable and clusters are null, --top and --plot leave them out"
    return [f"too many filters to compare all maps: a sample is compared, and {figures}: {', '.join(large)}"] * bool(
        large
    )
