"""Measure a checkpoint: its layers one by one, or its network on synthetic inputs, a data set or a folder of images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convsim_cli.checkpoints.minimization import check_kernels
from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.inputs import datasets
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.inputs.image_folders import load_images
from convsim_cli.inputs.images import Channels, Dataset
from convsim_cli.kernels import Kernel, is_convolution
from convsim_cli.machine.precision import full_precision
from convsim_cli.measurement.feature_maps import FeatureMapSimilarity, probe_kernel
from convsim_cli.measurement.figures import Record, layer_record
from convsim_cli.measurement.network import feature_maps
from convsim_cli.measurement.synthetic_inputs import PROBES, SIDE, make_inputs
from convsim_cli.networks.accuracy import NotLogitsError, evaluate, require_logits, resize
from convsim_cli.networks.model_checkpoint import ModelCheckpoint
from convsim_cli.networks.names import usual_side

MAP_BATCH = 32  # images at once where feature maps are kept for their Gram product
HEAT = 128  # filters along each axis of a layer's heat map, beyond which the largest of neighbours is kept
Advance = Callable[[float], None]  # told how many steps were done since the last call
Watch = Callable[[str, float], AbstractContextManager[Advance]]  # told what is being done, and in how many steps


def _unwatched(_: str, __: float) -> AbstractContextManager[Advance]:
    return nullcontext(lambda _: None)


@dataclass(frozen=True)
class Report:
    """The records of a source's layers; its totals: `cs`, and `accuracy` in per cent where there are labels; and notes.

    heat: mean |cos| of feature maps by filter pairs, `[groups, side, side]` per layer, where it was asked for.
    """

    layers: list[Record]
    total: dict[str, float]
    notes: list[str] = field(default_factory=list)
    heat: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """What to measure with, and what beside the figures.

    name: a synthetic input, a data set, or a folder of images; side: pixels along each axis, the usual for None; mean,
    std: to normalize images by, the data set's own for None; top: how many of the most similar filter pairs to list;
    heat: whether to keep what heat maps are drawn from.
    """

    name: str = "white"
    samples: int = 16
    side: int | None = None
    data_dir: Path = Path("data")
    seed: int = 0
    mean: Channels | None = None
    std: Channels | None = None
    top: int = 0
    heat: bool = False

    def measure(self, source: ModelCheckpoint, device: torch.device, progress: Watch = _unwatched) -> Report:
        """Return the report of a source.

        progress: told what is being done and in how many steps, gives what is called with the steps that were done.
        Raises InputError where there are no kernels or one holds NaN or Inf, where the network cannot be run on such
        inputs, and as `load_dataset` and `make_inputs`.
        """
        check_kernels(source.checkpoint, source.selection)
        report = Report([], {})
        if source.model is None:
            self._measure_layers(report, source, device, progress)
        else:
            with redirect_stdout(sys.stderr):  # what a user's network prints is no data
                self._measure_network(report, source, source.model.to(device), device, progress)
        report.total["cs"] = float(sum(layer["cs"] or 0.0 for layer in report.layers))
        return report

    def _measure_layers(self, report: Report, source: ModelCheckpoint, device: torch.device, progress: Watch) -> None:
        self._check_synthetic()
        with progress(f"measure {source.checkpoint.path}", len(source.selection.kernels)) as advance:
            for kernel in source.selection.kernels:
                weight = source.checkpoint.load(kernel.name).to(device)
                maps = probe_kernel(kernel, weight, self.name, self.samples, self.side, self.seed)
                self._add(report, kernel, weight, maps)
                advance(1)

    def _measure_network(
        self, report: Report, source: ModelCheckpoint, model: nn.Module, device: torch.device, progress: Watch
    ) -> None:
        path, kernels = source.checkpoint.path, source.selection.kernels
        data = self._dataset(source.arch or "")
        images = self._inputs(model, source.arch or "", data)
        try:
            with progress(f"feature maps of {path}", len(images)) as advance:
                maps = feature_maps(model, kernels, _batches(images, device, advance), source.names)
        except Exception as error:  # whatever a network's own code raises
            raise InputError(
                f"--arch {source.arch}: does not run on inputs {list(images.shape)} "
                f"({' '.join(str(error).split())[:160] or type(error).__name__}); try another --input-size or --input"
            ) from error
        with progress(f"measure {path}", len(kernels)) as advance:
            for kernel in kernels:
                found = maps.pop(kernel.name)
                self._add(report, kernel, source.checkpoint.load(kernel.name), found)
                report.layers[-1]["calls"] = found.calls // -(-len(images) // MAP_BATCH)
                advance(1)
        report.notes.extend(_notes(report.layers))
        if data is not None:
            with progress(f"test accuracy of {path}", len(data.test)) as advance:
                self._classify(report, model, data, device, advance)

    def _classify(
        self, report: Report, model: nn.Module, data: Dataset, device: torch.device, advance: Advance
    ) -> None:
        """Add the test accuracy, or a note of why there is none."""

        def forward(images: Tensor) -> Tensor:
            logits = require_logits(model(images), len(images), data.classes)
            outputs.add(logits.shape[1])
            advance(len(images))
            return logits

        outputs: set[int] = set()
        try:
            with full_precision(device):
                accuracy = evaluate(model, data, data.test, device, forward, side=self.side)[1]
        except NotLogitsError as error:
            report.notes.append(f"no test accuracy: {error}")
            return
        report.total["accuracy"] = accuracy
        report.notes.extend(
            f"{count} outputs for {data.classes} classes: the first {data.classes} are taken for them"
            for count in outputs
            if count != data.classes
        )

    def _add(self, report: Report, kernel: Kernel, weight: Tensor, maps: FeatureMapSimilarity) -> None:
        record = layer_record(kernel, weight, maps.result())
        if self.top:
            record["top"] = maps.most_similar(self.top)
        report.layers.append(record)
        if self.heat and record["fm_cos"] is not None:
            matrix = maps.matrix().cpu()
            side = min(HEAT, matrix.shape[-1])
            report.heat[kernel.name] = nn.functional.adaptive_max_pool2d(matrix, side)

    def _check_synthetic(self) -> None:
        if self.name not in PROBES:
            known = self.name in datasets.NAMES or self.name.startswith("folder:") or Path(self.name).is_dir()
            hint = "needs --arch: a checkpoint alone is probed layer by layer" if known else ""
            raise InputError(f"--input {self.name}: {hint or did_you_mean(self.name, (*PROBES, *datasets.NAMES))}")

    def _dataset(self, arch: str) -> Dataset | None:
        """The labelled images to take, or None for synthetic ones and a folder of images."""
        labelled = self.name in datasets.NAMES or self.name.startswith("folder:")
        if self.name in PROBES or (not labelled and Path(self.name).is_dir()):
            return None
        if not labelled:
            raise InputError(
                f"--input {self.name!r}: {did_you_mean(self.name, (*PROBES, *datasets.NAMES))}, or a folder"
            )
        side = self.side or usual_side(arch)
        return load_dataset(self.name, self.data_dir, side, self.mean, self.std, test_only=True)

    def _inputs(self, model: nn.Module, arch: str, data: Dataset | None) -> Tensor:
        if data is not None:
            return resize(data.normalize(data.test.images[: self.samples]), self.side)
        first = next((layer for layer in model.modules() if is_convolution(layer)), None)
        assert first is not None  # there are kernels
        axes, channels = len(first.kernel_size), int(first.in_channels)  # type: ignore[arg-type]
        side = self.side or (usual_side(arch) if axes == 2 else SIDE[axes])
        if self.name in PROBES:
            return make_inputs(self.name, self.samples, channels, (side,) * axes, self.seed)
        return load_images(Path(self.name), self.samples, side, self.mean, self.std)


def _batches(images: Tensor, device: torch.device, advance: Advance) -> Iterator[Tensor]:
    for batch in images.split(MAP_BATCH):
        yield batch.to(device)
        advance(len(batch))


def _notes(layers: list[dict[str, Any]]) -> list[str]:
    """What a reader has to know of layers that the network does not call once."""
    never = [layer["name"] for layer in layers if layer["calls"] == 0]
    often = [f"{layer['name']} ({layer['calls']} times)" for layer in layers if layer["calls"] > 1]
    notes = [f"never called, so without feature maps: {', '.join(never)}"] if never else []
    return notes + ([f"called more than once, all of their maps counted: {', '.join(often)}"] if often else [])
