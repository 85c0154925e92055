"""Test loss and accuracy of a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from convsim_cli.device import Advance
from convsim_cli.inputs.images import Dataset, Split, resize
from convsim_cli.precision import full_precision

BATCH_PIXELS = 1000 * 32 * 32  # of the images that are evaluated at once
CACHED_PIXELS = BATCH_PIXELS // 4  # on a CPU twice as fast: the maps stay in its cache

Batches = Iterator[tuple[Tensor, Tensor]]  # images `[B, 3, height, width]`, normalized, and labels `[B]`


def evaluation_totals(
    model: nn.Module,
    dataset: Dataset,
    split: Split,
    device: torch.device,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return sums over a split, in evaluation mode, on the device: cross entropy (nats), and correct predictions.

    split: on the CPU or on the device. forward: called in place of the model, such as its compiled form.
    """
    model.eval()
    return _totals(forward or model, _batches(dataset, split, device), device)


def evaluation_batch(split: Split) -> int:
    """Return the largest batch that `evaluation_totals` takes of a split."""
    return math.ceil(len(split) / _number_of_batches(split))


def measure_accuracy(
    model: nn.Module, data: Dataset, device: torch.device, side: int | None, advance: Advance
) -> tuple[float | None, list[str]]:
    """Return a network's accuracy in per cent over the test images, with its stored statistics, and notes about it.

    None, and a note of why, where the network's output cannot be compared with labels. side: pixels to resize the
    images to. advance: takes the number of images evaluated since the last call.
    """
    pixels = CACHED_PIXELS if device.type == "cpu" else BATCH_PIXELS

    def forward(images: Tensor) -> Tensor:
        logits: Tensor = model(images)
        advance(len(images))
        return logits

    model.eval()
    with full_precision(device):
        images, _ = next(_batches(data, data.test, device, side, pixels))
        with torch.no_grad():
            output = model(images)
        reason = ""
        if not isinstance(output, Tensor):
            reason = f"the network gives a {type(output).__name__}, not logits [images, {data.classes}]"
        elif output.ndim != 2 or len(output) != len(images):
            shape = list(output.shape)
            reason = f"for {len(images)} images the network gives {shape}, not [{len(images)}, {data.classes}]"
        elif output.shape[1] < data.classes:
            reason = f"{output.shape[1]} outputs for {data.classes} classes"
        if reason:
            return None, [f"no test accuracy: {reason}"]
        correct = _totals(forward, _batches(data, data.test, device, side, pixels), device)[1].item()
    notes = [f"{output.shape[1]} outputs for {data.classes} classes: the first {data.classes} count"]
    return 100 * correct / len(data.test), notes if output.shape[1] > data.classes else []


def _batches(
    dataset: Dataset, split: Split, device: torch.device, side: int | None = None, pixels: int = BATCH_PIXELS
) -> Batches:
    """A split in batches of nearly equal size: of a small rest, batch statistics would be poor."""
    count = _number_of_batches(split, side, pixels)
    for images, labels in zip(split.images.tensor_split(count), split.labels.tensor_split(count), strict=True):
        yield resize(dataset.normalize(images.to(device)), side), labels.to(device)


def _number_of_batches(split: Split, side: int | None = None, pixels: int = BATCH_PIXELS) -> int:
    height, width = split.images.shape[1:3]
    batch = max(1, pixels // (side * side if side else height * width))
    return max(1, math.ceil(len(split) / batch))


def _totals(forward: Callable[[Tensor], Tensor], batches: Batches, device: torch.device) -> Tensor:
    totals = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    with torch.no_grad():  # not inference_mode: a network may keep a tensor for its training
        for images, labels in batches:
            logits = forward(images).float()
            totals[0] += nn.functional.cross_entropy(logits, labels, reduction="sum")
            totals[1] += (logits.argmax(1) == labels).sum()
    return totals
