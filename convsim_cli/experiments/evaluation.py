"""Measure a source: its layers by themselves, or a whole network on synthetic inputs or a data set's test images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from convsim_cli.errors import InputError, did_you_mean
from convsim_cli.experiments import datasets
from convsim_cli.experiments.datasets import Dataset, Split, load_dataset
from convsim_cli.experiments.source import Source
from convsim_cli.initialize import check_kernels
from convsim_cli.precision import full_precision
from convsim_cli.probes import PROBES, make_inputs
from convsim_cli.report import Record, feature_maps, layer_record, measure_file

BATCH = 1000
MAP_BATCH = 32  # images at once where feature maps are kept for their Gram product
NETWORK_INPUT = 32  # pixels along each axis of the built-in networks' images


@dataclass(frozen=True)
class Report:
    """The records of a source's layers, and its totals: `cs`, and `accuracy` in per cent where there are labels."""

    layers: list[Record]
    total: dict[str, float]


@dataclass(frozen=True)
class Probe:
    """What to measure with: a synthetic input or a data set, how many samples, and of which size."""

    name: str = "white"
    samples: int = 16
    side: int | None = None
    data_dir: Path = Path("data")
    seed: int = 0

    def measure(self, source: Source, device: torch.device, advance: Callable[[int], None]) -> Report:
        """Return the report of a source; `advance` is told of each layer.

        Raises InputError where there are no kernels or one holds NaN or Inf, and as `load_dataset` and `make_inputs`.
        """
        check_kernels(source.checkpoint, source.selection)
        if source.model is None:
            return self._measure_file(source, device, advance)
        model = source.model.to(device)
        kernels = source.selection.kernels
        data = None if self.name in PROBES else self._load_dataset()
        batches = (images.to(device) for images in self._images(data).split(MAP_BATCH))
        maps = feature_maps(model, kernels, batches, source.names)
        layers = []
        for kernel in kernels:
            layers.append(layer_record(kernel, source.checkpoint.load(kernel.name), maps[kernel.name]))
            advance(1)
        accuracy = {}
        if data is not None:
            with full_precision(device):
                accuracy["accuracy"] = evaluate(model, data, data.test, device)[1]
        return Report(layers, {"cs": _sum(layers)} | accuracy)

    def _measure_file(self, source: Source, device: torch.device, advance: Callable[[int], None]) -> Report:
        if self.name not in PROBES:
            hint = "needs --arch: a checkpoint alone is probed layer by layer" if self.name in datasets.NAMES else ""
            raise InputError(f"--input {self.name}: {hint or did_you_mean(self.name, (*PROBES, *datasets.NAMES))}")
        layers = []
        for record in measure_file(
            source.selection, source.checkpoint.load, self.name, self.samples, self.side, self.seed, device
        ):
            layers.append(record)
            advance(1)
        return Report(layers, {"cs": _sum(layers)})

    def _load_dataset(self) -> Dataset:
        if self.name not in datasets.NAMES:
            raise InputError(f"--input {self.name!r}: {did_you_mean(self.name, (*PROBES, *datasets.NAMES))}")
        return load_dataset(self.name, self.data_dir)

    def _images(self, data: Dataset | None) -> Tensor:
        if data is None:
            side = self.side or NETWORK_INPUT
            return make_inputs(self.name, self.samples, 3, (side, side), self.seed)
        images = data.normalise(data.test.images[: self.samples])
        if self.side is None:
            return images
        return nn.functional.interpolate(images, size=(self.side, self.side), mode="bilinear")


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    split: Split,
    device: torch.device,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> tuple[float, float]:
    """Return mean cross entropy and accuracy in per cent over a split, in evaluation mode.

    forward: what to call instead of the model (its compiled form). The split may be on the CPU or on the device.
    """
    forward = forward or model
    model.eval()
    totals = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    with torch.inference_mode():
        for images, labels in zip(split.images.split(BATCH), split.labels.split(BATCH), strict=True):
            logits, labels = forward(dataset.normalise(images.to(device))).float(), labels.to(device)
            totals[0] += nn.functional.cross_entropy(logits, labels, reduction="sum")
            totals[1] += (logits.argmax(1) == labels).sum()
    loss, correct = totals.tolist()
    return loss / len(split), 100 * correct / len(split)


def _sum(layers: list[Record]) -> float:
    return float(sum(layer["cs"] or 0.0 for layer in layers))
