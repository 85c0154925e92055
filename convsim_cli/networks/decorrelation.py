"""Decorrelate the feature maps of a checkpoint's network on a batch of the user's images."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace

import torch
from torch import Tensor

from convsim_cli.checkpoints.minimization import ClosedForm
from convsim_cli.closed_forms import decorrelate_kernels_
from convsim_cli.closed_forms.directions import record
from convsim_cli.errors import ConvsimError, InputError
from convsim_cli.inputs.datasets import load_dataset
from convsim_cli.kernels import Kernel, Selection, weight_of
from convsim_cli.machine.progress import Progress
from convsim_cli.measurement.figures import Record
from convsim_cli.measurement.kernel_figures import is_finite
from convsim_cli.minimize import Minimization, minimize_kernels
from convsim_cli.networks.accuracy import resize
from convsim_cli.networks.model_checkpoint import ModelCheckpoint
from convsim_cli.networks.names import usual_side
from convsim_cli.networks.probe import Probe

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
    return changed, record(kernel, weight, changed)
