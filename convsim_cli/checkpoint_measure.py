"""What is measured of one checkpoint, and what a reader has to know about it.

Measure a checkpoint: its layers one by one, or its network on synthetic inputs, a data set or a folder of images.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from math import ceil
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convsim_cli.batch_norm import INPUTS, choose_statistics, evaluation_mode
from convsim_cli.device import Advance, Progress, resolve_device, unreported
from convsim_cli.errors import InputError
from convsim_cli.inputs.images import Channels
from convsim_cli.kernels import Kernel, Patterns, Selection
from convsim_cli.kernels.modules import effective_weight
from convsim_cli.measurement.figures import Record, add_changes, make_record
from convsim_cli.measurement.kernel_figures import Layer, LayerMaps, check_finite, describe
from convsim_cli.measurement.network import feature_maps, layers_of
from convsim_cli.measurement.pairs import THRESHOLD, HeatMap, make_heat_map, strongest_pairs
from convsim_cli.measurement.synthetic import LayerProbe
from convsim_cli.networks.accuracy import measure_accuracy
from convsim_cli.networks.load import ModelCheckpoint, open_model_checkpoint
from convsim_cli.networks.probe import Probe


class Report(dict[str, Any]):
    """The JSON document of one checkpoint, without the keys that all commands share.

    Keys: `source`, `input`, `bn_statistics` (`stored`, `inputs`, or None where no batch normalization was run),
    `layers`, `skipped`, and `total` with `cs` and, where there are labels, `accuracy` in per cent. Beside them:

    notes: lines that explain figures; warnings: lines that must not be missed; heat: the layers' heat maps, where they
    were asked for.
    """

    def __init__(self, source: str, input_name: str, selection: Selection) -> None:
        super().__init__(
            source=source, input=input_name, bn_statistics=None, layers=[], skipped=_entries(selection), total={}
        )
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.heat: dict[str, HeatMap] = {}


def call_notes(layers: Sequence[Record]) -> list[str]:
    """Return what a reader has to know of layers that the network does not call exactly once."""
    never = [layer["name"] for layer in layers if layer["calls"] == 0]
    often = [f"{layer['name']} ({layer['calls']} times)" for layer in layers if layer["calls"] > 1]
    notes = [f"never called, so without feature maps: {', '.join(never)}"] if never else []
    return notes + ([f"called more than once, every call counts: {', '.join(often)}"] if often else [])


def statistics_notes(chosen: str | None, wanted: str) -> list[str]:
    """Return which batch-norm statistics were taken, where they are not simply the stored ones."""
    if chosen != INPUTS:
        return []
    why = "" if wanted == INPUTS else ": the stored ones do not belong to these kernels"
    return [f"batch-norm statistics are re-estimated on the inputs{why}"]


def bound_notes(layers: Sequence[Record]) -> list[str]:
    """Return which layers have too many pairs of filters to keep a mean cosine for each."""
    large = [layer["name"] for layer in layers if layer["fm_cos"] is not None and layer["fm_rank"] is None]
    figures = "fm_rank, redundant, opposite, removable and clusters are null"
    return [f"too many filters to keep every pair's mean cosine, so {figures}: {', '.join(large)}"] if large else []


def _entries(selection: Selection) -> list[dict[str, Any]]:
    return [{"name": entry.name, "shape": list(entry.shape), "reason": entry.reason} for entry in selection.skipped]


MAP_BATCH = 32  # images that a network runs on at once


def measure_checkpoint(
    path: str | PathLike[str] | None = None,
    *,
    arch: str | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    key: str | None = None,
    input: str = "white",
    samples: int = 16,
    side: int | None = None,
    input_channels: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    groups: Sequence[tuple[str, int]] = (),
    transposed: Sequence[str] = (),
    data_dir: str | PathLike[str] = "data",
    mean: Channels | None = None,
    std: Channels | None = None,
    threshold: float = THRESHOLD,
    bn_statistics: str = "auto",
    top: int = 0,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = unreported,
) -> Report:
    """Measure how similar the filters and feature maps of a checkpoint are, layer by layer.

    path: a checkpoint file, or None for a fresh network. arch: the network by name, which is then run, with its number
    of classes; without it each layer is probed by itself. pretrained: a new network has its library's weights
    (`find_network`). input_channels: of the network, if its dry run does not find them. key: which of a pickle's
    dictionaries. include, exclude, groups, transposed: see `kernels.Patterns`. The others: see `Measurement`. Returns
    what `convsim measure --json` prints, as a dictionary (`Report`). Warns of what a reader of the file had to choose
    between. Raises InputError for a file without kernels, a kernel with NaN or Inf, a network that does not run on such
    inputs, and other bad input.
    """
    probe = Probe(
        input, samples, side, Path(data_dir), seed, mean, std, threshold, bn_statistics, top, None, input_channels
    )
    (report,) = measure_checkpoints(
        [None if path is None else Path(path)],
        probe,
        resolve_device(device),
        arch=arch,
        pretrained=pretrained,
        num_classes=num_classes,
        key=key,
        patterns=Patterns(include, exclude, groups, transposed),
        progress=progress,
    )
    for line in report.warnings:
        warnings.warn(line, stacklevel=2)
    return report


def measure_checkpoints(
    paths: Sequence[Path | None],
    probe: Probe,
    device: torch.device,
    *,
    arch: str | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    key: str | None = None,
    patterns: Patterns | None = None,
    progress: Progress = unreported,
) -> list[Report]:
    """Return a report per checkpoint; those of several have the changes from the first (`comparison.add_changes`).

    Opens all of them before it measures the first. Arguments and errors as in `measure_checkpoint`.
    """
    sources = [
        open_model_checkpoint(
            path, arch, patterns, probe.seed, num_classes, key, pretrained=pretrained, parametrized=True
        )
        for path in paths
    ]
    reports = [_measure(source, probe, device, progress) for source in sources]
    if len(reports) > 1:
        reports[0].warnings += add_changes(reports)
    return reports


def _measure(source: ModelCheckpoint, probe: Probe, device: torch.device, progress: Progress) -> Report:
    report = Report(str(source.checkpoint.path), probe.input, source.selection)
    report.warnings += source.checkpoint.notes
    if not source.selection.kernels:
        left_out = ", ".join(f"{skipped.name} ({skipped.reason})" for skipped in source.selection.skipped[:3])
        raise InputError(
            f"{source.checkpoint.path}: no convolution kernels to measure"
            + (f"; left out: {left_out}" if left_out else "")
        )
    if source.model is None:
        _measure_layers(report, source, probe, device, progress)
    else:
        with redirect_stdout(sys.stderr):  # what a user's network prints is no data
            _measure_network(report, source, probe, device, progress)
    report.notes += bound_notes(report["layers"])
    report["total"]["cs"] = float(sum(layer["cs"] or 0.0 for layer in report["layers"]))
    return report


def _measure_layers(
    report: Report, source: ModelCheckpoint, probe: Probe, device: torch.device, progress: Progress
) -> None:
    probe.require_synthetic()
    checkpoint, kernels = source.checkpoint, source.selection.kernels
    for kernel in kernels:  # before any work is done
        check_finite(kernel, checkpoint.load(kernel.name), checkpoint.path)
    layer_probe = LayerProbe(probe.input, probe.samples, probe.side, probe.seed)
    with progress(f"measure {checkpoint.path}", len(kernels)) as advance:
        for kernel in kernels:
            weight = checkpoint.load(kernel.name).to(device)
            _add(report, probe, kernel, weight, layer_probe.look(kernel, weight))
            advance(1)


def _measure_network(
    report: Report, source: ModelCheckpoint, probe: Probe, device: torch.device, progress: Progress
) -> None:
    path, kernels, arch = source.checkpoint.path, source.selection.kernels, source.arch or ""
    assert source.model is not None
    model = source.model.to(device)
    weights = _weights(source)
    for kernel in kernels:
        check_finite(kernel, weights[kernel.name], path)
    data = probe.dataset(arch)
    images = probe.images(model, arch, data)
    report["bn_statistics"] = chosen = choose_statistics(model, probe.bn_statistics, source.kernels_changed)
    report.notes += statistics_notes(chosen, probe.bn_statistics)
    passes = 2 if chosen == INPUTS else 1
    try:
        with progress(f"feature maps of {path}", passes * len(images)) as advance:
            batches = _Batches(images, device, advance)
            maps = feature_maps(model, kernels, batches, source.names, bn_statistics=chosen, seed=probe.seed)
    except Exception as error:  # whatever a network's own code raises
        raise InputError(
            f"`arch` {arch}: does not run on inputs {list(images.shape)} "
            f"({' '.join(str(error).split())[:160] or type(error).__name__}); "
            "try another `side`, `input` or `input_channels`"
        ) from error
    with progress(f"measure {path}", len(kernels)) as advance:
        for kernel in kernels:
            seen = maps.pop(kernel.name)
            _add(report, probe, kernel, weights[kernel.name], seen)
            report["layers"][-1]["calls"] = seen.calls // batches.count
            advance(1)
    report.notes += call_notes(report["layers"])
    if data is not None:
        with progress(f"test accuracy of {path}", len(data.test)) as advance:
            accuracy, notes = measure_accuracy(model, data, device, probe.side, advance)
        report.notes += notes
        if accuracy is not None:
            report["total"]["accuracy"] = accuracy


def _weights(source: ModelCheckpoint) -> dict[str, Tensor]:
    """The weight that each kernel's layer computes with, on the network's device."""
    assert source.model is not None
    with torch.no_grad(), evaluation_mode(source.model):
        layers = layers_of(source.model, source.selection.kernels, source.names or {})
        found = {kernel.name: effective_weight(layer) for kernel, layer in layers}
    return {name: weight.detach() for name, weight in found.items() if weight is not None}


def _add(report: Report, probe: Probe, kernel: Kernel, weight: Tensor, seen: LayerMaps) -> None:
    layer = Layer(kernel, weight, seen, probe.threshold)
    record = describe(kernel) | make_record(layer)
    mean = layer.mean_cosines
    if probe.top:
        record["top"] = [] if mean is None else strongest_pairs(mean, probe.top)
    if probe.heat and mean is not None:
        report.heat[kernel.name] = make_heat_map(mean, probe.heat)
    report["layers"].append(record)


class _Batches:
    """Images in batches of nearly equal size, moved to a device as they are taken; can be taken several times."""

    def __init__(self, images: Tensor, device: torch.device, advance: Advance) -> None:
        self.count = ceil(len(images) / MAP_BATCH)
        self._images, self._device, self._advance = images, device, advance

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._images.tensor_split(self.count):
            yield batch.to(self._device)
            self._advance(len(batch))
