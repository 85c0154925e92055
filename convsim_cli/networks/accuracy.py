"""Test loss and accuracy of a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convsim_cli.device import Advance
from convsim_cli.inputs.images import Dataset, Split
from convsim_cli.precision import full_precision

BATCH_PIXELS = 1000 * 32 * 32  # of the images that are evaluated at once
CACHED_PIXELS = BATCH_PIXELS // 4  # on a CPU twice as fast: the maps stay in its cache


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    split: Split,
    device: torch.device,
    forward: Callable[[Tensor], Tensor] | None = None,
    side: int | None = None,
    batch_pixels: int = BATCH_PIXELS,
) -> tuple[float, float]:
    """Return the mean cross entropy (nats) and the accuracy (per cent) over a split, in evaluation mode.

    split: on the CPU or on the device. forward: called in place of the model, such as its compiled form. side: pixels
    to resize the images to. batch_pixels: how large a batch may be, in pixels of its images.
    """
    loss, correct = evaluation_totals(model, dataset, split, device, forward, side, batch_pixels).tolist()
    return loss / len(split), 100 * correct / len(split)


def evaluation_totals(
    model: nn.Module,
    dataset: Dataset,
    split: Split,
    device: torch.device,
    forward: Callable[[Tensor], Tensor] | None = None,
    side: int | None = None,
    batch_pixels: int = BATCH_PIXELS,
) -> Tensor:
    """Return the sums over a split that `evaluate` divides, on the device: cross entropy, and correct predictions.

    Arguments as in `evaluate`.
    """
    forward = forward or model
    model.eval()
    totals = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    with torch.no_grad():  # not inference_mode: a network may keep a tensor for its training
        height, width = split.images.shape[1:3]
        batch = max(1, batch_pixels // (side * side if side else height * width))
        count = max(1, math.ceil(len(split) / batch))  # near-equal: no small rest, whose own statistics would be poor
        for images, labels in zip(split.images.tensor_split(count), split.labels.tensor_split(count), strict=True):
            logits = forward(resize(dataset.normalize(images.to(device)), side)).float()
            labels = labels.to(device)
            totals[0] += nn.functional.cross_entropy(logits, labels, reduction="sum")
            totals[1] += (logits.argmax(1) == labels).sum()
    return totals


def measure_accuracy(
    model: nn.Module, data: Dataset, device: torch.device, side: int | None, advance: Advance
) -> tuple[float | None, list[str]]:
    """Return a network's accuracy in per cent over the test images, with its stored statistics, and notes about it.

    None, and a note of why, where the network's output cannot be compared with labels. Arguments as in `evaluate`.
    """
    outputs: set[int] = set()

    def forward(images: Tensor) -> Tensor:
        logits = require_logits(model(images), len(images), data.classes)
        outputs.add(logits.shape[1])
        advance(len(images))
        return logits

    try:
        with full_precision(device):
            pixels = CACHED_PIXELS if device.type == "cpu" else BATCH_PIXELS
            accuracy = evaluate(model, data, data.test, device, forward, side, pixels)[1]
    except NotLogitsError as error:
        return None, [f"no test accuracy: {error}"]
    surplus = [count for count in outputs if count != data.classes]
    return accuracy, [
        f"{count} outputs for {data.classes} classes: the first {data.classes} count" for count in surplus
    ]


class NotLogitsError(Exception):
    """What a network gives cannot be compared with labels."""


def require_logits(output: Any, images: int, classes: int) -> Tensor:
    """Return a network's output where it is logits `[images, ≥ classes]`. Raises NotLogitsError."""
    if not isinstance(output, Tensor):
        raise NotLogitsError(f"the network gives a {type(output).__name__}, not logits [images, {classes}]")
    if output.ndim != 2 or len(output) != images:
        raise NotLogitsError(f"for {images} images the network gives {list(output.shape)}, not [{images}, {classes}]")
    if output.shape[1] < classes:
        raise NotLogitsError(f"{output.shape[1]} outputs for {classes} classes")
    return output


def resize(images: Tensor, side: int | None) -> Tensor:
    """Return images `[B, C, height, width]` of side × side pixels, untouched where that is None or what they have."""
    if side is None or tuple(images.shape[-2:]) == (side, side):
        return images
    return nn.functional.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
